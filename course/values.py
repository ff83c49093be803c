"""
Values as plain JSON, and their comparison: what check.py and the grader have in common.

A tensor becomes {"tensor": nested lists, "dtype": "float64", "shape": [2, 3]}. Expected and given values are compared
in this form, so the comparison needs no torch and runs none of the student's code.
"""

import math


def encode(x):
    """A tensor, number, text, list or dict of them as plain JSON. TypeError for anything else."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
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


def show(number, digits=3):
    return f"{number:.{digits}f}" if isinstance(number, float) else repr(number)


def differs(expected, got, tolerance):
    """Whether two numbers, texts or None differ. A bool is a number. NaN equals NaN."""
    numbers = isinstance(expected, (int, float)) and isinstance(got, (int, float))
    if not numbers:
        return expected != got or type(expected) is not type(got)
    if math.isnan(expected) or math.isnan(got):
        return math.isnan(expected) != math.isnan(got)
    if math.isinf(expected) or math.isinf(got):
        return expected != got
    return abs(expected - got) > tolerance * (1 + abs(expected))


def both(expected, got):
    """Two values with as many digits as it takes to see that they differ."""
    for digits in (3, 6, 9, 15):
        shown = show(expected, digits), show(got, digits)
        if shown[0] != shown[1]:
            break
    return f"expected {shown[0]}, got {shown[1]}"


def first_difference(name, expected, got, tolerance):
    """The first place where two encoded values differ, as a sentence; None when there is none."""
    if isinstance(expected, dict) and "tensor" in expected:
        if not isinstance(got, dict) or "tensor" not in got:
            if expected["shape"] or isinstance(got, (list, dict, str)) or got is None:
                return f"{name} expected a tensor of shape {tuple(expected['shape'])}, got {brief(got)}"
            got = {"tensor": got, "shape": []}
        if expected["shape"] != got.get("shape"):
            return f"{name} expected the shape {tuple(expected['shape'])}, got {brief(got.get('shape'))}"
        return within(name, expected["tensor"], got["tensor"], tolerance, ())
    if isinstance(got, dict) and got.get("shape") == [] and not isinstance(expected, (list, dict)):
        got = got["tensor"]  # a tensor of one number is a number
    if isinstance(expected, dict):
        if not isinstance(got, dict) or sorted(got) != sorted(expected):
            return f"{name} expected {brief(sorted(expected))}, got {brief(got)}"
        parts = [(f"{name}.{key}" if name else key, expected[key], got[key]) for key in expected]
    elif isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return f"{name} expected {len(expected)} values, got {brief(got)}"
        parts = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, got))]
    else:
        if isinstance(got, (list, dict)):
            return f"{name} expected {show(expected)}, got {brief(got)}"
        return f"{name} {both(expected, got)}" if differs(expected, got, tolerance) else None
    found = (first_difference(*part, tolerance) for part in parts)
    return next((message for message in found if message), None)


def within(name, expected, got, tolerance, at):
    """As first_difference, for the nested lists of two tensors of one shape."""
    if isinstance(expected, list):
        if not isinstance(got, list) or len(got) != len(expected):
            return f"{name} is no tensor"
        found = (within(name, a, b, tolerance, (*at, i)) for i, (a, b) in enumerate(zip(expected, got)))
        return next((message for message in found if message), None)
    if isinstance(got, (list, dict)):
        return f"{name} is no tensor"
    place = f"[{', '.join(map(str, at))}]" if at else ""
    return f"{name}{place} {both(expected, got)}" if differs(expected, got, tolerance) else None


def brief(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def compare(problem, expected, got, tolerance=1e-6):
    """
    The verdict on the outputs of all cases of a problem: "" when all agree, else one sentence.

    expected: a list of encoded outputs, one a case. got: the same, or a text, which says why there is none.
    """
    if isinstance(got, str):
        return f"{problem}: {got}"
    if not isinstance(got, list) or len(got) != len(expected):
        return f"{problem}: no values came back"
    for number, (a, b) in enumerate(zip(expected, got), start=1):
        if isinstance(b, str) and not isinstance(a, str):
            return f"{problem}: case {number}: {b}"
        message = first_difference("", a, b, tolerance)
        if message:
            case = f" (case {number})" if len(expected) > 1 else ""
            return f"{problem}: {message.strip()}{case}"
    return ""
