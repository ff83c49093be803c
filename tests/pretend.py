"""
A GPU made of CPU memory, to test what otherwise only a GPU shows.

    with Pretend() as gpu:
        model.to(gpu.device) ...
        gpu.waits, gpu.launches

A tensor on the device "meta" is a CPU tensor in a wrapper. To compute with one of them and one on the CPU is an error,
as it is on a GPU. (A GPU would accept a CPU tensor as an index and wait for it. Here that is an error too.)

A GPU works on while Python goes ahead, until Python needs a result. `waits` counts these places: the value of a tensor
is read, a shape follows from values, or a tensor is copied to or from the GPU without non_blocking.
The result of attention lies in memory as CUDA's kernels leave it: the heads of a token side by side.

What this cannot show: speed, and what CUDA's own functions do.
"""

import contextlib
import sys
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward, aten.equal,
         aten._unique2}


class Far(torch.Tensor):
    """A tensor on the pretended device. `near` holds its values."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), strides=near.stride(), dtype=near.dtype,
                                                   storage_offset=near.storage_offset(), device=DEVICE)

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on the pretended device, but outside of `with Pretend()`")

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copy, self.requires_grad)
        return copy

    def tolist(self):
        return self.cpu().tolist()


def is_far(x):
    return isinstance(x, Far)


def unwrap(x):
    return x.near if is_far(x) else x


def is_read(function, args, kwargs):
    """Whether Python gets a value from the GPU, or a tensor whose shape follows from values."""
    op = function.overloadpacket
    if op in (aten.index, aten.index_put_):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if op == aten.repeat_interleave:
        return kwargs.get("output_size") is None
    return op in WAITS


def is_blocking_copy(function, args, kwargs, tensors, far):
    """Whether Python waits for a copy between the CPU and the pretended device. far: where the result is."""
    if function.overloadpacket not in COPIES or all(is_far(x) == far for x in tensors):
        return False
    return not kwargs.get("non_blocking") and True not in args[2:]


class Pretend(TorchDispatchMode):
    device = DEVICE

    def __init__(self):
        super().__init__()
        self.waits = 0
        self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        op = function.overloadpacket
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        any_far = any(is_far(x) for x in tensors)
        near = [x for x in tensors if not is_far(x) and x.dim() > 0]  # a number may come from anywhere
        if near and any_far and op not in COPIES:
            raise AssertionError(f"{function}: a tensor on the CPU, {tuple(near[0].shape)}, meets one on the GPU")

        if kwargs.get("device") is not None:  # is the result on the pretended device?
            far = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        elif op == aten.copy_:
            far = is_far(args[0])
        else:
            far = any_far
        reads = any_far and (not far or is_read(function, args, kwargs))
        if reads or is_blocking_copy(function, args, kwargs, tensors, far):
            self.waits += 1
        self.launches += far

        args, kwargs = tree_map(unwrap, (args, kwargs))
        result = function(*args, **kwargs)
        wrapped = {id(x.near): x for x in tensors if is_far(x)}

        def wrap(x):
            if id(x) in wrapped:  # written in place: it stays the tensor that it was
                return wrapped[id(x)]
            return Far(x) if far and isinstance(x, torch.Tensor) else x
        return tree_map(wrap, result)

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        for target, name, new in (
            (torch, "tensor", make_tensor),
            (torch, "load", load),
            (torch, "save", save),
            (torch, "Generator", Generator),
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        ):
            self.patches.enter_context(mock.patch.object(target, name, new))
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.patches.close()


# ---- functions of torch that do not come through the dispatcher ------------------------------------------------------

cpu_tensor, cpu_load, cpu_save, cpu_generator = torch.tensor, torch.load, torch.save, torch.Generator
cpu_attention = torch.nn.functional.scaled_dot_product_attention


def make_tensor(data, device=None, **options):
    return cpu_tensor(data, **options).to(device or "cpu")


def load(path, map_location, **options):
    content = cpu_load(path, map_location="cpu", **options)
    return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, content)


def save(content, file):
    cpu_save(tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, content), file)


class Generator:  # a class, because torch writes `torch.Generator | None` when it is imported
    def __new__(cls, device="cpu"):
        return cpu_generator()


def attention(*tensors, **options):
    return cpu_attention(*tensors, **options).transpose(1, 2).contiguous().transpose(1, 2)
