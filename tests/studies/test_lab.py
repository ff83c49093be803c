"""The tools of the studies against numbers by hand, closed forms and plain loops."""

import csv
import itertools
import json
import math
import sys
import time

import pytest
import torch
from helpers import noise

from pipeline.errors import UserError
from studies import lab, picture


def test_means_and_differences_by_hand():
    """Bug: the population's deviation, the deviation for the error of the mean, or a difference that is not paired."""
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error sqrt(7 / 3)
    assert lab.mean_se([1, 2, 6]) == pytest.approx((3, math.sqrt(7 / 3)))
    assert lab.mean_se([4]) == (4, 0)
    assert lab.paired([101, 12, 6], [100, 10, 0]) == [1, 2, 6]


def test_rank_correlation():
    """Bug: ties ranked by position, values in the place of ranks, or a wrong norm."""
    # x has the ranks 1 2.5 2.5 4 and y has 1 3 2 4
    assert lab.spearman([1, 2, 2, 9], [10, 30, 20, 99]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


LAWS = dict(rl=lambda d, a, b: d * (a - b * math.log(d)) if d else 0.0, bon=lambda d, a, b: d * (a - b * d),
            quadratic=lambda d, a, b, c: a + b * d ** 2 + c * d ** 4)


@pytest.mark.parametrize("law, true", [("rl", (1.4, 0.6)), ("bon", (1.4, 0.6)), ("quadratic", (0.2, 0.5, -0.03))])
def test_a_law_is_fitted_by_least_squares(law, true):
    """Bug: a wrong sign, d for KL, NaN from 0 log 0, a fit that is not the best, an rmse of another divisor."""
    d = [0.0, 0.3, 0.7, 1.0, 1.6, 2.5, 4.0]
    points = [LAWS[law](x, *true) + e for x, e in zip(d, noise(0, 7).tolist())]

    def error(coefficients):
        return math.sqrt(sum((LAWS[law](x, *coefficients) - y) ** 2 for x, y in zip(d, points)) / 7)

    fitted = lab.fit_law(d, points, law)
    rmse = lab.law_error(d, points, law, fitted)
    assert rmse == pytest.approx(error(fitted)) and rmse > 0.1
    for i, step in itertools.product(range(len(fitted)), (-1e-3, 1e-3)):
        assert error([c + step * (i == j) for j, c in enumerate(fitted)]) > rmse


def job(x, y):
    if x > 6:
        raise UserError("eight") if x == 8 else KeyError("seven")
    time.sleep(0.3 * (x == 0))
    return x, y, torch.get_num_threads()


@pytest.mark.parametrize("serial", [pytest.param("0", marks=pytest.mark.slow), "1"])  # new processes import torch
def test_jobs_come_back_in_order_on_one_thread_each(serial, monkeypatch):
    """Bug: results in the order in which jobs finish, an error that names no job, threads that are kept."""
    monkeypatch.setenv("LAB_SERIAL", serial)
    monkeypatch.setattr(lab, "cores", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert lab.parallel(job, [(0, "a"), (1, "b"), (2, "c")]) == [(0, "a", 1), (1, "b", 1), (2, "c", 1)]
        with pytest.raises(RuntimeError, match=r"job\(7, 'b'\).*seven"):
            lab.parallel(job, [(0, "a"), (7, "b")])
        with pytest.raises(UserError, match="^eight$"):
            lab.parallel(job, [(1, "a"), (8, "b")])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_finished_jobs_are_kept(tmp_path, monkeypatch):
    """Bug: a finished job is computed again, or one of other arguments, of older source or that failed is kept."""
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    monkeypatch.setenv("LAB_SERIAL", "1")
    for name in ("pipeline", "studies"):
        (tmp_path / name).mkdir()
    calls = []

    def invert(x):
        calls.append(x)
        return 1 / x

    def invert_all(*xs):
        calls.clear()
        return lab.parallel(invert, [(x,) for x in xs], tmp_path / "out"), list(calls)

    invert.__module__ = "studies.tree_exact"
    with pytest.raises(RuntimeError, match="division by zero"):
        invert_all(4, 2, 0)
    assert invert_all(2, 1, 4) == ([0.5, 1.0, 0.25], [1])
    for name in ("ppo.py", "pipeline/run.py", "studies/common.py", "studies/tree.py", "studies/robust.py"):
        (tmp_path / name).write_text("other source")
        assert invert_all(2)[1] == ([] if name == "studies/robust.py" else [2]), name


def test_what_a_study_leaves(tmp_path, monkeypatch):
    """Bug: a key that only a later row has is lost, or a verdict; an ImportError after an hour."""
    rows = [dict(name="a", x=1.0), dict(name="long", x=-12.5, y=3)]
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert lab.publish(tmp_path, rows, "text", ["reproduced: a", "b"], []) == "text\n\nreproduced: a\nb"
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [dict(name="a", x="1.0", y=""), dict(name="long", x="-12.5", y="3")]
    assert [(tmp_path / f"{name}.txt").read_text() for name in ("table", "verdict")] == ["text\n", "reproduced: a\nb\n"]
    zero = [dict(name="a", x=0.0), dict(name="long", y=3)]
    assert lab.table(zero, ["name", "x", "y"]).splitlines() == ["name      x  y", "a     0.000", "long         3"]


def test_what_is_drawn(tmp_path, monkeypatch):
    """Bug: no error bars; in the README's picture, score and gold exchanged, or the best score elsewhere."""
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, []
    for name in ("errorbar", "plot", "axhline", "set_xlabel"):
        monkeypatch.setattr(axes, name, lambda axes, *numbers, **named: drawn.append(numbers))
    monkeypatch.setattr(axes, "legend", lambda *_, **named: None)  # of nothing
    lines = [dict(label="a", x=[1, 2], y=[3, 4], yerr=[0.1, 0.2])]
    lab.picture(tmp_path / "picture.png", [dict(title="", xlabel="d", ylabel="gold", lines=lines)])
    rows = [dict(stage=stage, step=i, score=i + k, gold=-i) for k, stage in enumerate(picture.PANELS) for i in range(2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "report.json").write_text('{"config": {"beta": 0.5}, "optimum": {"objective": 2, "kl": 3}}')
    picture.draw(tmp_path, tmp_path / "run.png")
    steps, gold = [0, 1], [0, -1]
    assert drawn == [([1, 2], [3, 4], [0.1, 0.2]), ("d",), (steps, [0, 1]), (steps, gold), (3.5,), ("iteration",),
                     (steps, [1, 2]), (steps, gold), ("iteration",)]


# ---- claims and verdicts --------------------------------------------------------------------------

@pytest.mark.parametrize("n, t, p", [  # from the tables of Student's t: one-sided
    (2, 6.314, 0.05), (3, 4.303, 0.025), (5, 2.132, 0.05), (10, 2.262, 0.025), (10, 3.250, 0.005), (31, 1.697, 0.05)])
def test_students_t_has_its_tables(n, t, p):
    """Bug: the normal distribution for Student's, two sides for one, another number of degrees of freedom."""
    values = [float(i) for i in range(n)]
    mean, error = lab.mean_se(values)
    assert lab.student_p(values, mean - t * error) == pytest.approx(p, rel=2e-3)
    assert lab.student_p(values, mean + t * error) == pytest.approx(1 - p, rel=2e-3)
    if p == 0.025:
        assert lab.half_width(values) == pytest.approx(t * error, rel=1e-3)


def test_p_values_by_hand():
    """Bug: a division by 0, certainty from a single seed, Bonferroni for all, a later one below an earlier one."""
    assert [lab.student_p([x] * 3) for x in (1.0, 0.0, -1.0)] == [0, 0.5, 1]
    assert lab.student_p([9.0]) == 0.5
    assert lab.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert lab.holm([0.9, 0.8]) == [1, 1]


def test_three_verdicts():
    """Bug: an undecided claim is printed as a failure, a small pass rules, no correction for several claims."""
    plus, flat = [0.9, 1.0, 1.1, 1.2], [-1.0, 1.1, 0.4, -0.3]
    claims = [lab.Claim("a", plus, "why"), lab.Claim("b", [-x for x in plus]), lab.Claim("c", flat),
              lab.Claim("d", flat, within=0.1), lab.Claim("e", [0.01, -0.01, 0.02, 0.0], within=0.1),
              lab.Claim("f", plus, within=0.1)]
    p = lab.student_p([1.0, 2.0, 3.0], 1.0)  # that the mean is above 1; that it is outside has two sides
    assert lab.p_values(lab.Claim("", [1.0, 2.0, 3.0], within=1.0)) == pytest.approx((1 - p, 2 * p))
    lines = lab.judge(claims, False)
    assert [line.split(":")[0] for line in lines] == ["reproduced", "contradicted", "undecided", "undecided",
                                                      "reproduced", "contradicted"]
    assert lines[0] == "reproduced: a: +1.050 ± 0.205 (above 0; 95%, 4 seeds), p 0.0015; why"
    assert ", p 0.0015" in lines[1]
    twice = lab.judge(2 * [lab.Claim("g", [-0.1, -1.0, -0.4, -0.5])], False)  # alone its p would be 0.038
    assert all(line.startswith("undecided") for line in twice)
    # mean 0.05, deviation 0.904: (2.8 * 0.904 / 0.05)^2 is over 999
    assert lab.seeds_needed(claims[2]) is None
    few = [lab.Claim("few", plus[:3])]  # too few seeds
    assert all(line.startswith("not tested here: ") for line in lab.judge(claims, True) + lab.judge(few, False))
    assert lab.seeds_needed(lab.Claim("h", [0.0, 2.0, 1.0])) == math.ceil(2.8 ** 2)
    assert lab.seeds_needed(lab.Claim("h", [0.0, 2.0, 1.0], within=1.5)) == math.ceil((2.8 / 0.5) ** 2)


def test_a_point_is_chosen_on_some_seeds_and_tested_on_others():
    """Bug: a mark that is tested on the seeds that chose it, where noise alone is a peak."""
    curves = [[0.0, 2.0, 1.0], [0.0, 1.0, 1.5], [5.0, 0.0, 0.0], [7.0, 1.0, 0.0]]
    assert lab.chosen_and_tested(curves) == (1, curves[2:])
    assert lab.chosen_and_tested(curves[:1]) == (1, curves[:1])
    assert lab.slope([1, 2, 3], [0, 5, 4]) == pytest.approx(2)
