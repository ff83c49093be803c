"""Values as JSON, their comparison, the share of the optimum in plain Python, and the game."""

import math
import sys
from pathlib import Path

import pytest
import torch

COURSE = Path(__file__).resolve().parent.parent.parent / "course"
sys.path.insert(0, str(COURSE))

import answer7  # noqa: E402
import exact  # noqa: E402
import game  # noqa: E402
import prove  # noqa: E402
from bugs import all_bugs  # noqa: E402
from judge import verdict  # noqa: E402
from open_end import LOW, points  # noqa: E402
from problems import PROBLEMS  # noqa: E402
from project import read_project, write  # noqa: E402
from values import compare, decode, encode  # noqa: E402

import lesson  # noqa: E402
import mdp  # noqa: E402


def test_values_come_back():
    """A dtype, a shape or an empty tensor is lost on the way through JSON."""
    for x in (torch.zeros(2, 0), torch.tensor([[True]]), torch.tensor(1.5), torch.arange(3), torch.ones(2).bfloat16()):
        back = decode(encode(x))
        assert back.dtype == x.dtype and torch.equal(back, x)
    assert decode(encode(dict(a=[1, (2.5, "b", None)]))) == dict(a=[1, [2.5, "b", None]])
    with pytest.raises(TypeError):
        encode(object())


@pytest.mark.parametrize(("expected", "got", "message"), [
    (dict(a=torch.tensor([[1.0, 0.731]])), dict(a=torch.tensor([[1.0, 0.0]])), "a[0, 1] expected 0.731, got 0.000"),
    (dict(a=torch.zeros(2)), dict(a=torch.zeros(3)), "a expected the shape (2,), got [3]"),
    (dict(a=torch.zeros(2)), dict(a=0.0), "a expected a tensor of shape (2,), got 0.0"),
    (dict(a=1.0), dict(a=float("nan")), "a expected 1.000, got nan"),
    (dict(a=1.0), dict(b=1.0), "expected ['a'], got {'b': 1.0}"),
    (dict(a=1.0), dict(a=1.00001), "a expected 1.000000, got 1.000010"),
    (dict(a=[1, 2]), dict(a=[1]), "a expected 2 values, got [1]"),
    (dict(a="x"), dict(a=""), "a expected 'x', got ''"),
    (dict(a=torch.tensor(float("nan"))), dict(a=torch.tensor(float("nan"))), ""),
    (dict(a=torch.tensor([1])), dict(a=torch.tensor([1.0 + 1e-9])), "")])
def test_the_first_difference_is_named(expected, got, message):
    """Two values that differ count as equal, or the student is not told where they differ."""
    found = compare("f", [encode(expected)], [encode(got)])
    assert found == (f"f: {message}" if message else "")


def test_no_values_is_a_sentence():
    """A text where numbers should be counts as an answer."""
    assert compare("f", [{"a": 1}], "not solved yet") == "f: not solved yet"
    assert compare("f", [{"a": 1}], None) and compare("f", [{"a": 1}], []) and compare("f", [{"a": 1}], [[]])


def test_the_share_of_the_optimum_is_that_of_mdp():
    """The plain tree numbers its states in another order than mdp.Tree."""
    tree, ref, rewards, _ = lesson.problem(3)
    best = mdp.solve(tree, ref, rewards, 0.4)
    plain = exact.Tree(4, 3)
    assert plain.leaves == tree.leaves
    for policy in (ref, best.logp, 0.3 * ref):
        J = [mdp.objective(tree, p, ref, rewards, 0.4) for p in (policy, ref)]
        share = plain.share(policy.tolist(), ref.tolist(), rewards.tolist(), 0.4)
        assert math.isclose(share, (J[0] - J[1]) / (best.J - J[1]), abs_tol=1e-9)
    assert exact.share_of(dict(vocab=4, horizon=3), {"logits": 3}) == -math.inf


def test_the_budget_of_labels_is_kept():
    """A player gets more labels than 300, or negative ones."""
    played = game.Game("a")
    assert len(played.compare(played.ref, torch.tensor(played.ref), 300)) == 300
    for n in (1, -1):
        with pytest.raises(game.OverBudget):
            played.compare(played.ref, played.ref, n)


def test_a_player_sees_what_the_grader_shows():
    """What works in check.py is not there in the grader."""
    played = game.Game("a")
    seen = game.Seen(played)
    assert {name for name in vars(seen) if name[0] != "_"} == set(played.public())
    seen.compare(seen.ref, seen.ref, 7)
    assert seen.labels_left == played.labels_left == 293


@pytest.mark.slow
def test_the_open_end_cannot_be_won_without_looking():
    """A policy that ignores the labels gets points, or the model answer does not get most of them."""
    played = game.Game("a")
    for policy in (played.ref, [[0.0] * 5] * 85, [[1.0] * 5] * 85, None, "x", [[math.nan] * 5] * 85):
        assert points(max(-1.0, played.share(policy))) == 0
    assert played.share(answer7.train(played)) > LOW + 0.3


@pytest.mark.slow
def test_a_problem_is_graded_right(tmp_path):
    """The right function, the stub, wrong functions and planted bugs are not told apart."""
    files = read_project(COURSE.parent)
    write(tmp_path / "project", files)
    for path in COURSE.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    keys = ("best_of_n",)
    some = [problem for problem in PROBLEMS if problem.key in keys]
    bugs = all_bugs(COURSE.parent, files, some)
    assert len(bugs) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "PROBLEMS", some)
        patch.setattr(prove, "HUNTED", [])
        rows = prove.prove_functions(tmp_path, files, bugs, "test", (3,))
    assert prove.faults(rows) == [] and len(rows) == 11


def test_a_share_below_the_goal_is_not_solved():
    """PPO that stops early gets the points of the loop."""
    problem = next(p for p in PROBLEMS if p.key == "learn_ppo")
    ref, rewards = torch.zeros(1, 2), torch.tensor([1.0, 0.0])
    case = dict(cases=[encode(dict(vocab=2, horizon=1, ref=ref, rewards=rewards, beta=0.5))], expected=[{"a": 1}])
    message, share = verdict(problem, case, [encode(dict(a=1, logits=ref))], "4.9")
    assert share == 0 and "0.000 of the optimum, 0.90 is asked" in message
    assert verdict(problem, case, [encode(dict(a=1, logits=torch.tensor([[2.0, 0.0]])))], "4.9") == ("", 1.0)
