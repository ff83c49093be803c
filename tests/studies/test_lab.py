"""The tools of the studies against numbers by hand, closed forms and plain loops."""

import csv
import itertools
import math
import sys

import pytest
import torch
from helpers import double, noise

from data import UserError
from studies import lab
from studies.lab import LAWS, fit_law

# ---------------------------------------------------------------------------------------------------------------------
# statistics

def test_mean_and_standard_error_by_hand():
    """Bug: the population's deviation, or the deviation of the seeds instead of the error of their mean."""
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error sqrt(7 / 3)
    assert lab.mean_se([1, 2, 6]) == pytest.approx((3, math.sqrt(7 / 3)))
    assert lab.mean_se([4]) == (4, 0)
    with pytest.raises(ValueError):
        lab.mean_se([])


def test_rank_correlation_by_hand():
    """Bug: ties are ranked by position."""
    # x has the ranks 1 2.5 2.5 4 and y has 1 3 2 4
    assert lab.spearman([1, 2, 2, 3], [10, 30, 20, 40]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert lab.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
    assert lab.spearman([1, 2, 3], [3, 2, -9]) == pytest.approx(-1)
    assert math.isnan(lab.spearman([1, 2], [5, 5]))
    with pytest.raises(ValueError):
        lab.spearman([1, 2], [1])


def test_rank_correlation_without_ties_is_the_textbook_sum():
    """Bug: a wrong norm. Without ties it is 1 - 6 sum d^2 / (n (n^2 - 1)), for every order of five numbers."""
    for order in itertools.permutations(range(5)):
        squares = [(i - j) ** 2 for i, j in enumerate(order)]
        textbook = 1 - 6 * sum(squares) / (5 * 24)
        assert lab.spearman(range(5), order) == pytest.approx(textbook)


# ---------------------------------------------------------------------------------------------------------------------
# laws

DISTANCES = [0.0, 0.3, 0.7, 1.0, 1.6, 2.5, 4.0]
COEFFICIENTS = {"rl": (1.4, 0.6), "bon": (1.4, 0.6), "quadratic": (0.2, 0.5, -0.03)}


def slow_law(law, coefficients, d):
    """R at one distance, in Python floats."""
    if law == "rl":
        alpha, beta = coefficients
        return d * (alpha - beta * math.log(d)) if d else 0.0
    if law == "bon":
        alpha, beta = coefficients
        return d * (alpha - beta * d)
    a, b, c = coefficients
    KL = d ** 2
    return a + b * KL + c * KL ** 2


@pytest.mark.parametrize("law", LAWS)
def test_fit_law_finds_the_law_that_made_the_points(law):
    """Bugs: a wrong sign of beta, d for KL, the logarithm of KL, or NaN from 0 log 0."""
    points = [slow_law(law, COEFFICIENTS[law], d) for d in DISTANCES]  # one of them at d = 0
    fitted, rmse = fit_law(DISTANCES, points, law)
    assert isinstance(fitted, tuple)
    assert fitted == pytest.approx(COEFFICIENTS[law])
    assert isinstance(rmse, float)
    assert rmse < 1e-12


@pytest.mark.parametrize("law", LAWS)
def test_fit_law_is_least_squares(law):
    """
    Bugs: coefficients that do not minimise the squared error; an rmse divided by the degrees of freedom, or squared.

    At the optimum the slope of the squared error is 0 in every coefficient, by finite differences.
    """
    R = [slow_law(law, COEFFICIENTS[law], d) + e for d, e in zip(DISTANCES, noise(0, 7).tolist())]

    def squared_error(coefficients):
        return sum((slow_law(law, coefficients, d) - r) ** 2 for d, r in zip(DISTANCES, R))

    def moved(coefficients, i, step):
        coefficients = list(coefficients)
        coefficients[i] += step
        return coefficients

    fitted, rmse = fit_law(double(DISTANCES), double(R), law)
    assert rmse == pytest.approx(math.sqrt(squared_error(fitted) / 7))
    assert rmse > 0.1
    for i in range(len(fitted)):
        up = squared_error(moved(fitted, i, 1e-5))
        down = squared_error(moved(fitted, i, -1e-5))
        assert abs(up - down) / 2e-5 < 1e-5
        assert min(up, down) > squared_error(fitted)


def test_fit_law_counts_a_point_at_0_as_reward_0():
    """Bug: 0 log 0. At d = 0 the laws are 0 for all coefficients, so the point moves none and is all residual."""
    R = noise(0, 6)
    for law in ("rl", "bon"):
        without, rmse = fit_law(DISTANCES[1:], R, law)
        with_it, more = fit_law(DISTANCES, torch.cat([double([0.5]), R]), law)
        assert with_it == pytest.approx(without)
        assert 7 * more ** 2 == pytest.approx(6 * rmse ** 2 + 0.25)


@pytest.mark.parametrize("d, law, message", [
    (DISTANCES, "linear", "unknown law 'linear', choose from rl, bon, quadratic"),
    ([0.1, -0.2, 1.0], "rl", "at least 0, got -0.2"),
    ([0.1, math.nan, 1.0], "bon", "at least 0"),
    ([1.0], "rl", "2 coefficients and cannot be fitted to 1 points"),
    ([1.0, 2.0], "quadratic", "3 coefficients and cannot be fitted to 2 points"),
])
def test_fit_law_refuses_what_it_cannot_fit(d, law, message):
    """Bugs: d from a KL that was estimated below 0, a law with another name, too few points for the coefficients."""
    with pytest.raises(ValueError, match=message):
        fit_law(d, [0.0] * len(d), law)


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def slow_first(x, y):
    torch.manual_seed(x)
    if x == 7:
        raise KeyError("seven")
    if x == 8:
        raise UserError("eight")
    total = sum(i for i in range(3_000_000 if x == 0 else 10))
    return x, y, total > 0, torch.get_num_threads(), torch.randn(3).sum().item()


@pytest.mark.parametrize("serial", [pytest.param("0", marks=pytest.mark.slow), "1"])  # new processes import torch
def test_jobs_come_back_in_order_on_one_thread_each(serial, monkeypatch):
    """Bug: results in the order in which jobs finish, or processes that give other numbers than a loop."""
    monkeypatch.setenv("LAB_SERIAL", serial)
    monkeypatch.setattr(lab, "cores", lambda: 2)
    jobs = [(x, "abc"[x]) for x in range(3)]
    expected = []
    for job in jobs:
        x, y, positive, _, drawn = slow_first(*job)
        expected.append((x, y, positive, 1, drawn))
    assert lab.parallel(slow_first, jobs) == expected
    assert lab.parallel(slow_first, []) == []
    with pytest.raises(RuntimeError, match=r"slow_first\(7, 'b'\).*seven"):
        lab.parallel(slow_first, [(0, "a"), (7, "b")])
    with pytest.raises(UserError, match="^eight$"):
        lab.parallel(slow_first, [(1, "a"), (8, "b")])


def test_a_serial_pass_gives_the_threads_back(monkeypatch):
    """Bug: after a study the caller is left with one thread."""
    monkeypatch.setenv("LAB_SERIAL", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lab.parallel(slow_first, [(1, "a")])
        with pytest.raises(RuntimeError):
            lab.parallel(slow_first, [(7, "b")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# what a study leaves

def test_table_aligns_and_csv_keeps_all_keys(tmp_path):
    """Bug: a row with fewer keys shifts the columns, or a key that only a later row has is lost."""
    rows = [dict(name="a", x=1.0), dict(name="long", x=-12.5, y=3)]
    lines = lab.table(rows, ("name", "x", "y")).split("\n")
    assert lines == ["name        x  y", "a       1.000", "long  -12.500  3"]
    lab.write_csv(tmp_path / "r.csv", rows)
    with open(tmp_path / "r.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [dict(name="a", x="1.0", y=""), dict(name="long", x="-12.5", y="3")]


def test_a_study_goes_on_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Bug: an ImportError at the end of an hour of runs."""
    panels = [dict(title="t", xlabel="x", ylabel="y", lines=[dict(label="l", x=[1, 2], y=[3, 4], yerr=[0.1, 0.1])])]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert lab.picture(tmp_path / "p.png", panels) is False
    assert "pip install matplotlib" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert lab.picture(tmp_path / "p.png", panels) is True
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


def test_verdicts():
    """Bug: None, which means not tested, is printed as a failure."""
    lines = [lab.verdict(held, "w") for held in (True, False, None)]
    assert lines == ["reproduced: w", "not reproduced: w", "not tested here: w"]


def test_publish_leaves_all_files(tmp_path, monkeypatch):
    """Bug: a text without its verdicts, or a file that is missing."""
    monkeypatch.setattr(lab, "picture", lambda path, panels: True)
    rows, text = lab.publish(tmp_path / "a" / "b", [dict(x=1)], "table", ["reproduced: a", "not reproduced: b"], [])
    folder = tmp_path / "a" / "b"
    assert rows == [dict(x=1)]
    assert text == "table\n\nreproduced: a\nnot reproduced: b"
    assert (folder / "table.txt").read_text() == "table\n"
    assert (folder / "verdict.txt").read_text() == "reproduced: a\nnot reproduced: b\n"
    assert (folder / "results.csv").read_text() == "x\n1\n"
