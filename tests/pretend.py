"""
A GPU made of CPU memory, to test what otherwise only a GPU shows.

Tensors on the device "meta" are real CPU tensors in a wrapper. Computing with one of them and one on the CPU is an error, as it is on a GPU (which
would only wait, and not refuse, where a CPU tensor is the index). Counted as a wait is what makes a GPU wait: to read a value of a tensor from Python,
a shape that follows from values, a copy in either direction unless it is non_blocking. A CUDA graph is pretended too: what is launched while it
records is kept, can be done again on the same memory, and leaves nothing behind before that; to wait meanwhile is an error. Attention's answer lies in
memory as CUDA's kernels leave it, the heads of a token side by side. What this cannot show is speed, and what CUDA's own functions do: that a graph
needs a warm-up, say, or a registered generator.

    with Pretend() as gpu:
        model.to(gpu.device) ...
        gpu.waits, gpu.launches
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
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.masked_scatter_backward, aten.equal, aten._unique2}


class Far(torch.Tensor):
    """A tensor on the pretended device; `near` holds its values."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
                                                   device=DEVICE)

    def __init__(self, near):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on the pretended device, but outside of `with Pretend()`")

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def tolist(self):
        return self.cpu().tolist()


def is_far(x):
    return isinstance(x, Far)


def waits(function, args, kwargs):
    """Whether a GPU has to be done before this returns: its result is a value, or has a shape that follows from values."""
    op = function.overloadpacket
    if op in (aten.index, aten.index_put_):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return op in WAITS or op == aten.repeat_interleave and kwargs.get("output_size") is None


class Pretend(TorchDispatchMode):
    device = DEVICE

    def __init__(self):
        super().__init__()
        self.waits = self.launches = 0
        self.recording, self.graphs = None, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), function.overloadpacket
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        near = [x for x in tensors if not is_far(x) and x.dim() > 0]
        if near and any(map(is_far, tensors)) and op not in COPIES:
            raise AssertionError(f"{function}: a tensor on the CPU, {tuple(near[0].shape)}, meets one on the GPU")
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        far = target == DEVICE if target else is_far(args[0]) if op == aten.copy_ else any(map(is_far, tensors))
        crosses = op in COPIES and not all(is_far(x) == far for x in tensors) and not kwargs.get("non_blocking") and True not in args[2:]
        if crosses or any(map(is_far, tensors)) and (not far or waits(function, args, kwargs)):
            assert self.recording is None, f"{function}: a GPU cannot be waited for while a graph is recorded"
            self.waits += 1
        if target:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda x: x.near if is_far(x) else x, (args, kwargs))
        result = function(*args, **kwargs)
        if far:
            self.launches += 1
            if self.recording is not None:
                self.recording.append((function, args, kwargs, result))
        wrapped = {id(x.near): x for x in tensors if is_far(x)}  # what is written in place stays the tensor that it was
        return tree_map(lambda x: wrapped.get(id(x)) if id(x) in wrapped else Far(x) if far and isinstance(x, torch.Tensor) else x, result)

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        make, load, save, attention = torch.tensor, torch.load, torch.save, torch.nn.functional.scaled_dot_product_attention
        for target, name, new in (
            (torch, "tensor", lambda data, device=None, **options: make(data, **options).to(device or "cpu")),
            (torch, "load", lambda path, map_location, **options: tree_map(
                lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, load(path, map_location="cpu", **options))),
            (torch, "save", lambda content, file: save(tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, content), file)),
            (torch, "Generator", Generator),
            (torch.nn.functional, "scaled_dot_product_attention",
             lambda *tensors, **options: attention(*tensors, **options).transpose(1, 2).contiguous().transpose(1, 2)),
            (torch.cuda, "CUDAGraph", lambda: Graph(self)), (torch.cuda, "graph", Graph.record), (torch.cuda, "Stream", mock.MagicMock),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()), (torch.cuda, "current_stream", mock.MagicMock), (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"]),
        ):
            self.patches.enter_context(mock.patch.object(target, name, new))
        return super().__enter__()

    def __exit__(self, *fault):
        super().__exit__(*fault)
        self.patches.close()


CPUGenerator = torch.Generator


class Generator:
    def __new__(cls, device="cpu"):
        return CPUGenerator()


class Graph:
    """torch.cuda.CUDAGraph, as far as it is used here."""

    def __init__(self, gpu):
        self.gpu, self.launches, self.generators, self.replays = gpu, None, [], 0
        gpu.graphs.append(self)

    def register_generator_state(self, generator):
        self.generators.append(generator)

    @contextlib.contextmanager
    def record(self):
        self.launches = self.gpu.recording = []
        yield
        self.gpu.recording = None
        for function, _, _, result in self.launches:
            if has_memory_of_its_own(function):
                tree_map(lambda x: x.zero_() if isinstance(x, torch.Tensor) else None, result)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.launches:
            again = function(*args, **kwargs)
            if has_memory_of_its_own(function):
                tree_map(lambda old, new: old.copy_(new) if isinstance(old, torch.Tensor) else None, result, again)


def has_memory_of_its_own(function):
    """Whether the result is neither a view nor one of the arguments."""
    return not any(result.alias_info for result in function._schema.returns)
