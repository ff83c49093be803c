"""The verdict on answers: what differs, what it costs, and what is said about it."""

import math

import judge
import pytest
import torch
from draw import gradients, raised
from problems import Problem
from values import difference, encode

INF, NAN = math.inf, math.nan


def tensor(*x, dtype=torch.float64):
    return encode(torch.tensor(x, dtype=dtype))


@pytest.mark.parametrize(("expected", "got", "said"), [
    (1.0, 1.00001, "wrong"), (1000.0, 1000.0005, ""), (1.0, "1.0", "wrong"), (None, 0, "wrong"),
    (NAN, NAN, ""), (NAN, 1.0, "wrong"), (1.0, NAN, "wrong"), (INF, -INF, "wrong"),
    ([1, 2], [1], "number of parts"), (dict(a=1), dict(b=1), "other parts"),
    (dict(a=[1, 2]), dict(a=[1, 3]), ".a[1] is wrong"), (dict(a=1, b=2), dict(b=2, a=1), ""),
    (tensor(1.0, 2.0), tensor(1.0, 2.1), "wrong value"), (tensor(1.0), tensor(1.0, 1.0), "another shape"),
    (tensor(1, dtype=torch.bool), tensor(1), "another dtype"), (tensor(1.0), tensor(1, dtype=torch.int64), "dtype"),
    (tensor(1, dtype=torch.int64), tensor(1, dtype=torch.int32), ""),
    (tensor(1.0, dtype=torch.float32), tensor(1.0, dtype=torch.bfloat16), "another dtype"),
    (tensor(1.0, dtype=torch.float32), tensor(1.0), ""), (tensor(1.0), 1.0, "no tensor"),
    (encode(torch.tensor(1.0)), 1.0, ""), (1.0, encode(torch.tensor(1.0)), ""),
    (tensor(1.0), dict(tensor=[[1.0]], shape=[1], dtype="float64"), "no tensor")])
def test_what_differs(expected, got, said):
    """Bug: two values that differ count as equal, or equal ones as different."""
    found = difference("x", expected, got)
    assert (found is None) == (said == "") and (found is None or said in found[0] and found[0].startswith("x"))


def test_parts_have_their_points():
    """Bug: one part costs all points, a half is lost, error checks alone have some, or too many answers are taken."""
    cases = [dict(part=part) for part in ("a", "b", "b", "errors")]

    def verdict(values, hidden=True):
        answers = [dict(values=value, changed=[]) for value in values]
        return judge.verdict(Problem("9.1", "a.py::f", 8, hint="the hint"), cases, [1, 2, 3, 4], answers, hidden)
    for values, points in (((0, 2, 3, 4), 4.5), ((1, 0, 3, 4), 4.5), ((1, 2, 3, 0), 7), ((0, 0, 3, 4), 0)):
        assert verdict(values)[0] == points
    assert verdict((1, 2, 3, 4)) == (8, "solved")
    assert verdict((1, 2, 0, 4)) == (4.5, "b: the result is wrong. Hint: the hint")
    assert verdict((1, 2, 0, 4), False)[1] == "b: the result is wrong (case 3: expected 3, got 0). Hint: the hint"
    for strange in ((1, 2, 3), (1, 2, 3, 4, 5)):
        assert verdict(strange) == (0, "no values came back")


def test_gradients_are_those_of_a_weighted_sum():
    """Bug: gradients of two cells cancel, or a detached output counts as a gradient of 0 by chance."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    odd = gradients(dict(b=x[:1] - x[1:], a=x[1:] - x[:1]), dict(x=x))["x"]
    assert odd.abs().min() > 1e-3
    same = gradients(dict(a=x[1:] - x[:1], b=x[:1] - x[1:]), dict(x=x))["x"]
    assert torch.equal(odd, same) and torch.equal(gradients(x.detach(), dict(x=x))["x"], torch.zeros_like(x))


def test_a_stub_is_no_error_that_was_asked_for():
    """Bug: an empty function passes where an error is expected, or a subclass of the error does not."""
    def stub():
        raise NotImplementedError("problem 1.1")
    with pytest.raises(NotImplementedError):
        raised(stub)
    assert raised(int, "x") == "ValueError" and raised(str.encode, "\ud800") == "ValueError" and raised(int) == ""
