"""Values as plain JSON, and their comparison. A tensor is {"tensor": lists, "dtype": "float64", "shape": [2, 3]}."""

import math

WIDTH = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}  # a result may be finer than asked, never coarser


def encode(x):
    """A tensor, number, text, list or dict of them as plain JSON. TypeError for anything else."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if hasattr(x, "_asdict"):
        return encode(x._asdict())
    if isinstance(x, (list, tuple)):
        return [encode(item) for item in x]
    if isinstance(x, dict):
        return {str(name): encode(item) for name, item in x.items()}
    if hasattr(x, "detach") and hasattr(x, "tolist"):
        x = x.detach().cpu()
        return {"tensor": x.tolist(), "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
    raise TypeError(f"a {type(x).__name__} came back, which is no number and no tensor")


def decode(x):
    """The inverse of encode."""
    if isinstance(x, list):
        return [decode(item) for item in x]
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        import torch  # only where values are computed with

        return torch.tensor(x["tensor"], dtype=getattr(torch, x["dtype"])).view(x["shape"])
    return {name: decode(item) for name, item in x.items()}


def flat(x, at=()):
    """(index, number) of each number in nested lists."""
    if not isinstance(x, list):
        return [(at, x)]
    return [pair for i, item in enumerate(x) for pair in flat(item, (*at, i))]


def kind(dtype):
    """"float", "int" or "bool" of a dtype: int32 is as good as int64."""
    return next((name for name in ("float", "bool", "int") if name in str(dtype)), "")


def differs(expected, got, tolerance):
    """Whether two numbers, texts or None differ. NaN equals NaN."""
    if not all(isinstance(x, (int, float)) for x in (expected, got)):
        return expected != got or type(expected) is not type(got)
    if math.isfinite(expected) and math.isfinite(got):
        return abs(expected - got) > tolerance * (1 + abs(expected))
    return not (expected == got or (math.isnan(expected) and math.isnan(got)))


def brief(value):
    text = f"{value:.9g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def difference(name, expected, got, tolerance=1e-6):
    """
    None, or (property, detail): which property of an encoded result is wrong, and the numbers that show it. The
    property has nothing of `got`: it may be shown where the numbers are secret.
    """
    both = f"expected {brief(expected)}, got {brief(got)}"
    if isinstance(expected, dict) and "tensor" in expected:
        return tensor_difference(name, expected, got, tolerance)
    if isinstance(expected, dict):
        if not isinstance(got, dict) or sorted(got) != sorted(expected):
            return f"{name} has other parts", f"expected {', '.join(sorted(expected))}, got {brief(got)}"
        parts = [(f"{name}.{key}", expected[key], got[key]) for key in expected]
    elif isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return f"{name} has another number of parts", both
        parts = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, got))]
    else:
        if isinstance(got, dict) and got.get("shape") == []:
            got = got.get("tensor")  # a tensor of one number is a number
        return (f"{name} is wrong", both) if differs(expected, got, tolerance) else None
    return next((found for part in parts if (found := difference(*part, tolerance))), None)


def tensor_difference(name, expected, got, tolerance):
    if isinstance(got, (bool, int, float)) and not expected["shape"]:
        got = dict(expected, tensor=got)  # a number is a tensor of one number
    if not isinstance(got, dict) or "tensor" not in got:
        return f"{name} is no tensor", f"expected the shape {expected['shape']}, got {brief(got)}"
    if got.get("shape") != expected["shape"]:
        return f"{name} has another shape", f"expected {expected['shape']}, got {brief(got.get('shape'))}"
    dtypes = expected["dtype"], got.get("dtype")
    if kind(dtypes[0]) != kind(dtypes[1]) or WIDTH.get(dtypes[1], 0) < WIDTH.get(dtypes[0], 0):
        return f"{name} has another dtype", f"expected {dtypes[0]}, got {brief(dtypes[1])}"
    ours, theirs = flat(expected["tensor"]), flat(got["tensor"])
    if [at for at, _ in ours] != [at for at, _ in theirs]:
        return f"{name} is no tensor", brief(got)
    for (at, a), (_, b) in zip(ours, theirs):
        if differs(a, b, tolerance):
            return f"{name} has a wrong value", f"at {list(at)} expected {brief(a)}, got {brief(b)}"
    return None
