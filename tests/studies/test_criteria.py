"""
The criteria and statistics of the studies on made-up data, where the right verdict is known, both ways.

Nothing is trained. The jobs of a study are replaced by rows made by hand, and the study judges them.
"""

import itertools
import math
import random

import numpy
import pytest
import torch

from evaluate import optimum
from pipeline.config import parse_config
from pipeline.run import Run
from studies import direct, estimators, frontier, lab, limits, limits_exact, overopt, robust, robust_exact, tree

YES = "reproduced: "
NO = "not reproduced: "
UNTESTED = "not tested here: "
SEEDS = range(3)
APART = (-5.0, 0.0, 7.0)  # seeds differ by much more than any effect, so that only paired differences see it


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(lab, "picture", lambda path, panels: True)


# ---------------------------------------------------------------------------------------------------------------------
# overopt

def overopt_curve(method, labels, beta, d, golds, scores):
    """Rows of one setting; golds: one curve for each seed."""
    rows = []
    for seed, gold in enumerate(golds):
        for w in range(len(d)):
            rows.append(dict(method=method, seed=seed, labels=labels, beta=beta, window=w, d=d[w],
                             gold=gold[w] + APART[seed], score=scores[w]))
    return rows


def hump(peak, height, ends):
    """d, and gold for each seed: up to the peak in the middle, then down to the ends."""
    d = [peak * x for x in (0, 0.5, 1, 1.5, 2)]
    return d, [[0, 0.5 * height, height, (height + end) / 2, end] for end in ends]


def run_overopt(monkeypatch, tmp_path, first=None, peaks=((2, 2), (2.5, 2.5), (3, 3)), scores=(0, 1, 2, 3, 4),
                gaps=(0.02, -0.03, 0.03), shift=0.0, seeds=3, quick=False):
    """
    The verdicts of overopt. first: (d, golds) at the fewest labels; peaks: (d, gold) of each number of labels.

    gaps: gold of beta 0.03 minus that of beta 0 at equal d, for each seed. Its KL grows half as fast.
    """
    labels = (50, 100, 200) if quick else (300, 1000, 4000)
    rows = []
    for n, (peak, height) in zip(labels, peaks):
        d, golds = hump(peak, height, [height - 1.1, height - 1.0, height - 0.9])
        if n == labels[0] and first is not None:
            d, golds = first
        rows += overopt_curve("ppo", n, 0.0, d, golds[:seeds], scores)
        rows += overopt_curve("best of n", n, None, [0, 1, 2], [[0, 1, 2]] * seeds, [0, 1, 2])
    for beta in (0.2,) if quick else (0.03, 0.1):
        golds = [[0 + gap, 0.5 + gap, 1 + gap, 1.5 + gap, 2 + gap] for gap in gaps]
        d = [0 + shift, 0.5 + shift, 1 + shift, 1.5 + shift, 2 + shift]
        rows += overopt_curve("ppo", labels[0], beta, d, golds[:seeds], scores)
    monkeypatch.setattr(overopt, "run_jobs", lambda *arguments: rows)
    overopt.overopt(seeds, quick, tmp_path)
    return (tmp_path / "verdict.txt").read_text().splitlines()


def test_overopt_a_hump_that_falls_is_reproduced(monkeypatch, tmp_path):
    """Bugs: a fall with the wrong sign or unpaired errors, the seeds' deviation for their error, a wrong peak."""
    main, mild, strong = run_overopt(monkeypatch, tmp_path)
    assert main == (YES + "the proxy rises: True; gold falls by 1.00 ± 0.06 from a peak at d = 2.00: True; "
                    "more labels, later or higher: True")
    assert mild == "one curve, beta 0.03 against 0: " + YES + "gold differs by +0.01 ± 0.02 at equal d"
    assert strong.startswith("one curve, beta 0.1 against 0: " + YES)


@pytest.mark.parametrize("first, part", [
    (hump(2, 2, [2.2, 1.0, -0.4]), "gold falls by 1.07 ± 0.75 from a peak at d = 2.00: False"),  # more than 1 error
    (([0, 1, 2, 3, 4], [[0, 1, 2, 3, 4]] * 3), "from a peak at d = 4.00: False"),  # no fall at all
    (([0, 1, 2, 3, 4], [[4, 3, 2, 1, 0.1 * i] for i in range(3)]), "from a peak at d = 0.00: False"),  # only a fall
])
def test_overopt_without_a_clear_fall_is_not_reproduced(first, part, monkeypatch, tmp_path):
    """Bugs: a fall within its noise counts; a peak at an edge of the curve counts as inside."""
    main = run_overopt(monkeypatch, tmp_path, first=first)[0]
    assert main.startswith(NO)
    assert part in main


@pytest.mark.parametrize("scores", [(0, 3, 2, 1, 4), (4, 3, 2, 1, 0)])
def test_overopt_needs_a_proxy_that_rises(scores, monkeypatch, tmp_path):
    """Bugs: the sign of Spearman is lost, its limit is lower, or the rank is that of gold."""
    main = run_overopt(monkeypatch, tmp_path, scores=scores)[0]
    assert main.startswith(NO + "the proxy rises: False; gold falls by 1.00 ± 0.06 from a peak at d = 2.00: True")


@pytest.mark.parametrize("peaks, held", [
    (((2, 2), (2.5, 1.5), (3, 1.2)), True),    # later and lower
    (((2, 2), (2, 2.5), (1.5, 3)), True),      # higher, and not later
    (((2, 2), (2, 2), (3, 3)), False),         # neither later nor higher
    (((2, 2), (3, 3), (2.5, 2.5)), False),     # beyond the first and behind the second
    (((2, 2), (1.5, 1.5), (3, 3)), False),     # beyond both, but the second is behind the first
])
def test_overopt_later_or_higher(peaks, held, monkeypatch, tmp_path):
    """Bugs: `and` for `or`, only the first and the last are compared, equal counts as later."""
    main = run_overopt(monkeypatch, tmp_path, peaks=peaks)[0]
    assert main.startswith(YES if held else NO)
    assert main.endswith(f"more labels, later or higher: {held}")


@pytest.mark.parametrize("gaps, shift, verdict", [
    ((0.2, 0.25, 0.3), 0.0, NO + "gold differs by +0.25 ± 0.03"),
    ((-0.2, -0.25, -0.3), 0.0, NO + "gold differs by -0.25 ± 0.03"),
    ((-0.5, 0.0, 0.6), 0.0, UNTESTED + "gold differs by +0.03 ± 0.32"),  # too noisy to see a difference
    ((1.0, 2.0, 3.0), 0.0, NO + "gold differs by +2.00 ± 0.58"),  # noisy, and a difference is seen
    ((0.0, 0.1, 0.2), 9.0, UNTESTED + "gold differs by +nan"),  # no d in common
])
def test_overopt_one_curve(gaps, shift, verdict, monkeypatch, tmp_path):
    """Bugs: curves compared window by window, a difference with the wrong sign, noise that passes for equality."""
    line = run_overopt(monkeypatch, tmp_path, gaps=gaps, shift=shift)[1]
    assert line.startswith("one curve, beta 0.03 against 0: " + verdict)


@pytest.mark.parametrize("seeds, quick", [(2, False), (1, False), (3, True)])
def test_overopt_a_small_pass_gives_no_verdict(seeds, quick, monkeypatch, tmp_path):
    """Bug: fewer than three seeds, or a quick pass, reproduce something."""
    for line in run_overopt(monkeypatch, tmp_path, seeds=seeds, quick=quick):
        assert UNTESTED in line


def test_overopt_a_missing_seed_is_an_error(monkeypatch, tmp_path):
    """Bug: a verdict on three seeds from the rows of two."""
    first = hump(2, 2, [1, 1])
    with pytest.raises(ValueError):
        run_overopt(monkeypatch, tmp_path, first=first)


@pytest.mark.parametrize("method", ["ppo", "best of n"])
def test_overopt_summary_by_hand(method):
    """Bugs: columns exchanged, the law of best-of-n for PPO, the peak of the score, the end of another curve."""
    d = [0.0, 1.0, 2.0, 3.0]
    law = [x * (2.0 - 0.9 * math.log(x)) if x else 0.0 for x in d]
    if method == "best of n":
        law = [x * (2.0 - 0.5 * x) for x in d]
    rows = []
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        for w in range(4):
            rows.append(dict(method=method, seed=seed, labels=5, beta=0.0, window=w, d=d[w], gold=law[w] + w * noise,
                             score=10.0 * w))
    rows.append(dict(rows[0], labels=6, gold=99.0))
    row = overopt.summarise(rows, 3, method, 5, 0.0)
    peak = max(range(4), key=lambda w: law[w])
    error = 0.1 / math.sqrt(3)
    assert row["peak_gold"] == pytest.approx(law[peak])
    assert row["peak_se"] == pytest.approx(peak * error)
    assert row["peak_d"] == d[peak]
    assert row["end_gold"] == pytest.approx(law[3])
    assert row["end_se"] == pytest.approx(3 * error)
    assert row["end_d"] == 3.0
    assert row["end_score"] == 30.0
    assert row["fall"] == pytest.approx(law[peak] - law[3])
    assert row["fall_se"] == pytest.approx((3 - peak) * error)
    assert row["rmse_law"] < 1e-9
    assert row["rmse_rival"] > 0.02
    assert row["rank"] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# direct

BETAS = (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0)
ENDS = (0.5, 1.0, 1.2, 1.6, 1.3, 1.0, 0.8)  # gold at the end for each beta: a hump
KLS = (40.0, 30.0, 20.0, 10.0, 5.0, 3.0, 1.0)


def direct_rows(kind, ends=ENDS, kls=KLS, noise=(-0.05, 0.0, 0.05), middle=0.6, before=0.8, chosen=-1.0,
                width="128", betas=BETAS):
    """Rows of one kind: nine marks for each beta and seed. middle: how far gold is above its end at the fifth mark."""
    rows = []
    for beta, end, kl in zip(betas, ends, kls):
        for seed in SEEDS:
            for mark in range(9):
                gold = end + APART[seed] + (noise[seed] if beta == betas[0] else 0.0)
                gold -= 0.1 * (8 - mark)
                if mark == 4:
                    gold += middle + 0.4
                its_kl = kl if mark == 8 else kl * before * (mark + 1) / 7
                row = dict(seed=seed, kind=kind, beta=beta, width=width, epoch=(mark + 1) / 9, gold=gold, kl=its_kl,
                           d=math.sqrt(its_kl), wins=0.5 + 0.01 * seed, length=10.0 + mark,
                           chosen_reward=chosen * (mark + 1) * beta, rejected_reward=-2.0 * (mark + 1) * beta)
                rows.append(row)
            rows[-1]["implicit_accuracy"] = 0.7
    return rows


def run_direct(monkeypatch, tmp_path, seeds=3, losses=((0.9, 0.8),) * 3, others=None, **changes):
    """
    {criterion: verdict} of direct. losses: of gold at widths 32 and 64, for each kind; at width 128 it is 0.8 + 0.05.

    changes: to the rows of DPO; others: to those of the other kinds.
    """
    rows = []
    for kind, lost in zip(direct.KINDS, losses):
        rows += direct_rows(kind, **(changes if kind == "dpo" else others or {}))
        for width, loss in zip(("32", "64"), lost):
            rows += direct_rows(kind, ends=(1.0 - loss, 1.0), kls=(40.0, 5.0), width=width, betas=(0.01, 0.3))
    monkeypatch.setattr(direct, "run_jobs", lambda *arguments: rows)
    direct.direct(seeds, False, tmp_path)
    lines = (tmp_path / "verdict.txt").read_text().splitlines()
    found = {"": lines[0]}
    for line in lines[1:]:
        name, rest = line.split(": ", 1)
        found[name] = rest
    return found


def test_direct_hump_epoch_and_both_fall(monkeypatch, tmp_path):
    """Bugs: the verdict of another kind, unpaired errors, the best beta for the one with the largest KL."""
    found = run_direct(monkeypatch, tmp_path, others=dict(chosen=1.0))
    assert found[""] == YES + "DPO's hump, epoch and both fall"
    assert found["dpo, hump"] == YES + "gold falls by 1.10 ± 0.03 from beta 0.1 to beta 0.01"
    assert found["dpo, epoch"] == (YES + "at beta 0.01 the best mark is at 0.56 of the epoch; "
                                   "KL 32.0 to 40.0 over its last quarter")
    assert found["dpo, both fall"] == (YES + "at beta 0.01, chosen -9.0, rejected -18.0 nats since the start, "
                                       "-8.0 and -16.0 since the first mark")
    assert found["ipo, both fall"].startswith(NO)
    assert found["slic, both fall"].startswith(NO)


@pytest.mark.parametrize("changes, part", [
    (dict(noise=(-2.0, 0.0, 2.0)), "hump"),                    # 1.10 ± 1.15
    (dict(ends=(1.8, 1.7, 1.2, 1.6, 1.3, 1.0, 0.8)), "hump"),  # the best has the largest KL
    (dict(kls=(40.0, 30.0, 20.0, 50.0, 5.0, 3.0, 1.0)), "hump"),  # the largest KL is not at the smallest beta
    (dict(middle=-0.4), "epoch"),                              # the best mark is the last
    (dict(before=1.2), "epoch"),                               # KL falls at the end
    (dict(chosen=0.01), "both fall"),
])
def test_direct_one_part_fails(changes, part, monkeypatch, tmp_path):
    """Bugs: a part that no data can fail, a part that the verdict leaves out, another kind's part in the verdict."""
    found = run_direct(monkeypatch, tmp_path, **changes)
    assert found[""].startswith(NO)
    for name in ("hump", "epoch", "both fall"):
        assert found[f"dpo, {name}"].startswith(NO if name == part else YES)
        assert found[f"ipo, {name}"].startswith(YES)


def test_direct_two_seeds_give_no_verdict(monkeypatch, tmp_path):
    """Bug: fewer than three seeds reproduce something."""
    found = run_direct(monkeypatch, tmp_path, seeds=2)
    assert len(found) == 17
    for verdict in found.values():
        assert verdict.startswith(UNTESTED)


@pytest.mark.parametrize("losses, held", [
    (((0.95, 0.9), (0.95, 0.9), (0.9, 0.95)), True),   # two of three kinds
    (((0.95, 0.9), (0.9, 0.95), (0.9, 0.95)), False),
    (((0.7, 0.9), (0.7, 0.9), (0.95, 0.9)), False),
    (((-0.9, -0.8), (-0.9, -0.8), (-0.9, -0.8)), False),  # smaller models gain: they lose less
])
def test_direct_size(losses, held, monkeypatch, tmp_path):
    """Bugs: a loss with the wrong sign, one kind is enough or all are needed, widths in the wrong order."""
    line = run_direct(monkeypatch, tmp_path, losses=losses)["size"]
    assert line.startswith(YES if held else NO)
    assert line.endswith(f"slic loses {losses[2][0]:.2f} {losses[2][1]:.2f} 0.80 at widths 32 64 128")


def test_direct_law():
    """Bugs: the two laws exchanged, or a limit of 1: fewer coefficients must fit clearly better."""
    noise = random.Random(0)
    d = [0.5 * i for i in range(1, 20)]
    law = [x * (2.0 - 0.9 * math.log(x)) + noise.gauss(0, 0.05) for x in d]
    rival = [0.3 + 0.2 * x ** 2 - 0.002 * x ** 4 + noise.gauss(0, 0.05) for x in d]
    for gold, verdict in ((law, YES), (rival, NO), ([noise.gauss(0, 1) for _ in d], NO)):
        points = [dict(d=x, gold=y) for x, y in zip(d, gold)]
        assert direct.judge_law(points, False).startswith("law: " + verdict)
        assert direct.judge_law(points, True).startswith("law: " + UNTESTED)


@pytest.mark.parametrize("wins, held", [((1, 2, 3, 4, 5), False), ((5, 4, 3, 2, 1), False), ((2, 5, 1, 4, 3), True)])
def test_direct_accuracy(wins, held):
    """Bugs: a negative correlation counts as none; marks on the way, which have no accuracy, are counted."""
    points = [dict(implicit_accuracy=i, wins=w) for i, w in enumerate(wins)] + [dict(wins=9)]
    assert direct.judge_accuracy(points, False).startswith("accuracy: " + (YES if held else NO))


@pytest.mark.parametrize("kl, held", [([1, 2, 3, 4, 5, 6, 7, 9, 8], True), ([1, 2, 3, 4, 5, 6, 9, 7, 8], False)])
def test_direct_kl_rises_over_the_last_quarter(kl, held):
    """Bug: the last two marks alone decide whether KL still rises."""
    setting = dict(beta=0.1, best_epoch=0.5, kl_curve=kl)
    assert direct.judge_epoch(setting, False)[0] is held


def test_direct_one_seed_that_rises_is_enough_against_both_fall():
    """Bugs: the mean over seeds for all seeds; only one of the two responses is looked at."""
    setting = dict(beta=0.5, chosen=-1.0, rejected=-2.0, chosen_ends=[-3, -3, -3], rejected_ends=[-4, -4, -4])
    assert direct.judge_both_fall(setting, False)[0] is True
    assert direct.judge_both_fall(dict(setting, chosen_ends=[-3, 1, -3]), False)[0] is False
    assert direct.judge_both_fall(dict(setting, rejected_ends=[-4, 1, -4]), False)[0] is False


def test_direct_summary_by_hand():
    """Bugs: columns exchanged, the first mark for the last, an implicit reward for nats, another width's rows."""
    rows = direct_rows("ipo", chosen=-3.0) + direct_rows("ipo", width="32", ends=[9.0] * 7)
    row = direct.summarise(rows, 3, "ipo", 0.1, "128")
    offset = sum(APART) / 3
    assert row["gold"] == pytest.approx(1.6 + offset)
    assert row["gold_se"] == pytest.approx(math.sqrt(sum((x - offset) ** 2 for x in APART) / 6))
    assert (row["kl"], row["d"]) == pytest.approx((10.0, math.sqrt(10)))
    assert (row["wins"], row["length"], row["implicit"]) == pytest.approx((0.51, 18.0, 0.7))
    assert row["best_gold"] == pytest.approx(1.6 + offset - 0.4 + 1.0)
    assert row["best_epoch"] == pytest.approx(5 / 9)
    assert row["chosen"] == pytest.approx(-3.0 * 8)
    assert row["rejected"] == pytest.approx(-2.0 * 8)


# ---------------------------------------------------------------------------------------------------------------------
# frontier

CURVES = dict(score=(0.5, 1.5, 2.0, 2.25), gold=(0.2, 1.2, 1.8, 2.0))  # of the optimum at a KL of 0, 1, 2 and 3


def point(seed, method, setting, kl, score, gold):
    return dict(seed=seed, method=method, setting=setting, kl=kl, score=score, gold=gold, score_se=0.03, gold_se=0.03)


def run_frontier(monkeypatch, tmp_path, changes=None, seeds=3):
    """
    The verdicts of frontier. changes: {(method, setting, seed): (KL, score, gold)} for points that differ.

    All other points are close under both curves, at a KL of 1.5.
    """
    rows = []
    for seed in range(seeds):
        for reward, values in CURVES.items():
            for kl, value in enumerate(values):
                rows.append({"seed": seed, "method": f"optimum of {reward}", "setting": kl, "kl": kl,
                             reward: value + APART[seed], f"{reward}_se": 0.04})
        rows.append(point(seed, "SFT", 0, 0.0, 0.5, 0.2))
        for method, setting in (("best of n", 2), ("dpo", 0.2), ("dpo", 0.5), ("ipo", 0.1), ("ipo", 0.5),
                                ("ppo", 0.3), ("ppo on gold", 0.3)):
            kl, score, gold = (changes or {}).get((method, setting, seed), (1.5, 1.7, 1.45))
            rows.append(point(seed, method, setting, kl, score, gold))
    for row in rows:
        if not row["method"].startswith("optimum"):
            row["score"] += APART[row["seed"]]
            row["gold"] += APART[row["seed"]]
    monkeypatch.setattr(frontier, "run_jobs", lambda *arguments: rows)
    frontier.frontier(seeds, False, tmp_path)
    return (tmp_path / "verdict.txt").read_text().splitlines()


def everywhere(method, setting, values):
    return {(method, setting, seed): values for seed in SEEDS}


def test_frontier_all_under_the_curve(monkeypatch, tmp_path):
    """Bugs: the curve of the other reward, a share without SFT subtracted, seeds that are mixed."""
    assert run_frontier(monkeypatch, tmp_path) == [
        YES + "all of what follows",
        YES + "all points under the curve + 2 s.e.",
        YES + "ppo has 0.96 of the curve's gain at equal KL",           # (1.7 - 0.5) / (1.75 - 0.5)
        YES + "ppo on gold has 0.96 of the curve's gain at equal KL"]   # (1.45 - 0.2) / (1.5 - 0.2)
    for line in run_frontier(monkeypatch, tmp_path, seeds=2):
        assert line.startswith(UNTESTED)


@pytest.mark.parametrize("score, gold, above", [
    (1.84, 1.45, ""),               # the errors 0.04 and 0.03 make 0.05: 1.75 + 0.10 is the limit
    (1.86, 1.45, "dpo 0.5 seed 1 on score"),
    (1.70, 1.59, ""),               # 1.5 + 0.10
    (1.70, 1.61, "dpo 0.5 seed 1 on gold"),
])
def test_frontier_under_the_curve(score, gold, above, monkeypatch, tmp_path):
    """Bugs: one error for two, an error of the point or of the curve that is left out, errors that are just added."""
    lines = run_frontier(monkeypatch, tmp_path, {("dpo", 0.5, 1): (1.5, score, gold)})
    if above:
        assert lines[0].startswith(NO)
        assert lines[1] == NO + "all points under the curve + 2 s.e. but " + above
    else:
        assert lines[0].startswith(YES)
    assert lines[2].startswith(YES)


def test_frontier_beyond_the_end_of_the_curve_nothing_is_judged(monkeypatch, tmp_path):
    """Bugs: a point beyond the last reliable KL counts against the claim, or for it."""
    lines = run_frontier(monkeypatch, tmp_path, everywhere("dpo", 0.2, (3.5, 9.0, 9.0)))
    assert lines[:2] == [YES + "all of what follows", YES + "all points under the curve + 2 s.e."]
    lines = run_frontier(monkeypatch, tmp_path, {("ppo", 0.3, 2): (3.5, 2.2, 1.9)})  # one seed is enough
    assert lines[0] == UNTESTED + "all of what follows"
    assert lines[1].startswith(YES)
    assert lines[2].startswith(UNTESTED)
    assert lines[3].startswith(YES)


def test_frontier_each_ppo_is_judged_by_its_own_reward(monkeypatch, tmp_path):
    """Bugs: PPO on gold measured by the score; a share of 0.9 that is not asked for; one kind is enough."""
    lines = run_frontier(monkeypatch, tmp_path, everywhere("ppo", 0.3, (1.5, 1.65, 0.3)))
    assert lines[2] == YES + "ppo has 0.92 of the curve's gain at equal KL"  # its gold does not matter
    lines = run_frontier(monkeypatch, tmp_path, everywhere("ppo", 0.3, (1.5, 1.6, 1.45)))
    assert lines[0].startswith(NO)
    assert lines[2:] == [NO + "ppo has 0.88 of the curve's gain at equal KL",
                         YES + "ppo on gold has 0.96 of the curve's gain at equal KL"]
    lines = run_frontier(monkeypatch, tmp_path, everywhere("ppo on gold", 0.3, (1.5, 1.7, 1.2)))
    assert lines[0].startswith(NO)
    assert lines[3] == NO + "ppo on gold has 0.77 of the curve's gain at equal KL"


def test_frontier_summary_counts_seeds(monkeypatch, tmp_path):
    """Bugs: `under` and `judged` exchanged, or a point that counts for another reward or setting."""
    run_frontier(monkeypatch, tmp_path, {("dpo", 0.2, 0): (3.5, 9.0, 1.0), ("dpo", 0.2, 1): (1.5, 1.5, 9.0)})
    lines = (tmp_path / "table.txt").read_text().splitlines()
    rows = [line.split() for line in lines]
    ends = {(row[0], row[1], row[2]): row[-2:] for row in rows if row[1] == "dpo"}
    assert ends["score", "dpo", "0.200"] == ["2/3", "2/3"]
    assert ends["gold", "dpo", "0.200"] == ["2/3", "2/3"]
    assert ends["score", "dpo", "0.500"] == ["3/3", "3/3"]


# ---------------------------------------------------------------------------------------------------------------------
# robust

def robust_curves(single=(0, 2, 1), wco=(0, 2, 1.7), uwo=(0, 2, 1.6), noise=0.05, others=(0, 2, 0.5)):
    """{reward: gold of its curve}, and the noise of the end over seeds."""
    return dict(single=single, wco=wco, uwo=uwo, others=others, noise=noise)


def run_robust(monkeypatch, tmp_path, bon=None, ppo=None, brme=(0.5, 0.6, 0.7), seeds=3):
    """{criterion: verdict} of robust. brme: by how much lambda 0.2 ends above lambda 1 in PPO, for each seed."""
    rows = []
    studies = {"best of n": (bon or robust_curves(), dict.fromkeys(robust.FLIPS, robust.BON_REWARDS)),
               "ppo": (ppo or robust_curves(), robust.PPO_REWARDS)}
    for study, (curves, rewards) in studies.items():
        for flip, seed in itertools.product(robust.FLIPS, range(seeds)):
            for how in rewards[flip]:
                curve = list(curves.get(how, curves["others"]))
                if flip == 0.0:
                    curve = [0, 1, -how.count("o")]  # without flips all is the other way round
                if how in robust.ENSEMBLES:
                    curve[-1] += curves["noise"] * (seed - 1)
                if study == "ppo" and how == "brme 0.2":
                    curve[-1] += brme[seed]
                for n, gold in enumerate(curve):
                    rows.append(dict(study=study, seed=seed, flip=flip, how=how, n=n, gold=gold + APART[seed]))
    for flip, seed, loss in itertools.product(robust.FLIPS, range(seeds), ("mse", "nll")):
        std = (0.1 if loss == "mse" else 0.6) + flip
        rows.append(dict(study="trap", seed=seed, flip=flip, how=loss, std=std, error=0.5))
    monkeypatch.setattr(robust, "run_jobs", lambda *arguments: rows)
    monkeypatch.setattr(robust, "robust_exact", lambda *arguments: (None, "the exact part"))
    robust.robust(seeds, False, tmp_path)
    lines = (tmp_path / "verdict.txt").read_text().splitlines()
    found = {"": lines[0]}
    for line in lines[1:]:
        name, rest = line.split(": ", 1)
        found[name] = rest
    return found


def test_robust_all_four_parts(monkeypatch, tmp_path):
    """Bugs: the rows without flips, unpaired errors, a gain with the wrong sign, std and error exchanged."""
    found = run_robust(monkeypatch, tmp_path)
    assert found[""].startswith(YES)
    for study in ("best of n", "ppo"):
        assert found[f"{study}, end"] == (YES + "wco ends +0.70 ± 0.03 from single; uwo ends +0.60 ± 0.03 from single")
        assert found[f"{study}, fall"] == YES + "single falls 1.00 ± 0.00, wco 0.30, uwo 0.40"
    assert found["BRME"] == YES + "lambda 0.2 ends +0.60 ± 0.06 from lambda 1"
    assert found["trap"] == ("under MSE the heads' std ends at 0.70 of their error, "
                             "under the likelihood at 1.70")


@pytest.mark.parametrize("curves, end, fall", [
    (robust_curves(uwo=(0, 2, 0.95)), NO, NO),            # uwo alone is worse
    (robust_curves(wco=(0, 2, 0.9)), NO, NO),             # wco alone is worse
    (robust_curves(noise=0.8), NO, YES),                  # 0.70 ± 0.46
    (robust_curves(wco=(0, 3, 1.7)), YES, NO),            # it ends higher, and falls further
    (robust_curves(single=(0, 0.5, 1)), YES, UNTESTED),   # the single model does not fall
    (robust_curves(single=(0, 0.5, 1), wco=(0, 2, 0.5)), NO, UNTESTED),
])
@pytest.mark.parametrize("study", ["best of n", "ppo"])
def test_robust_needs_wco_and_uwo_both(curves, end, fall, study, monkeypatch, tmp_path):
    """Bugs: `or` for `and`, one error for two, a fall that is not there still gives a verdict."""
    found = run_robust(monkeypatch, tmp_path, **{"bon" if study == "best of n" else "ppo": curves})
    other = "ppo" if study == "best of n" else "best of n"
    assert found[f"{study}, end"].startswith(end)
    assert found[f"{study}, fall"].startswith(fall)
    assert found[f"{other}, end"].startswith(YES)
    assert found[f"{other}, fall"].startswith(YES)
    assert found[""].startswith(NO if NO in (end, fall) else UNTESTED)


@pytest.mark.parametrize("brme, held", [((0.5, 0.6, 0.7), True), ((-0.5, -0.6, -0.7), False), ((0.1, 0.6, 1.2), False)])
def test_robust_brme(brme, held, monkeypatch, tmp_path):
    """Bugs: the two lambdas exchanged, one error for two, BRME in the verdict on ensembles."""
    found = run_robust(monkeypatch, tmp_path, brme=brme)
    assert found["BRME"].startswith(YES if held else NO)
    assert found[""].startswith(YES)


def test_robust_two_seeds_give_no_verdict(monkeypatch, tmp_path):
    """Bug: fewer than three seeds reproduce something."""
    found = run_robust(monkeypatch, tmp_path, seeds=2)
    found.pop("trap")  # it has no criterion
    for verdict in found.values():
        assert verdict.startswith(UNTESTED)


def test_robust_statistics_by_hand():
    """Bugs: jumps of the first half, jumps that cancel, a first window for the last, the first ten steps of a trap."""
    assert robust.fluctuation([[0, 9, 1, 3, 2], [0, 9, 5, 5, 5]]) == pytest.approx((2 + 1 + 0 + 0) / 4)
    assert robust.mean_gain([[0, 5], [0, 7]], [[9, 4], [9, 4]]) == pytest.approx((2, 1))
    logged = [dict(std=100.0, error=50.0)] * 5 + [dict(std=float(i), error=2.0) for i in range(10)]
    assert robust.trap_row(1, 0.25, "mse", logged) == dict(study="trap", seed=1, flip=0.25, how="mse", std=4.5,
                                                           error=2.0)


# ---------------------------------------------------------------------------------------------------------------------
# limits

def run_limits(monkeypatch, tmp_path, by_size=(0.7, 0.8, 0.9), by_flip=(0.85, 0.8, 0.7), wider=(0.6, 0.7, 0.8, 0.9),
               coverage=(0.09, 0.1, 0.11), subject=(0.28, 0.3, 0.32), tax=None, seeds=3):
    """
    {criterion: verdict} of limits. wider: accuracy on unlabelled subjects for 1 to 4 labelled ones.

    coverage, subject and tax["ppo"], tax["dpo"]: the loss in each seed.
    """
    tax = dict(dict(ppo=(0.2, 0.25, 0.3), dpo=(0.1, 0.11, 0.12)), **(tax or {}))
    rows = []
    for seed in range(seeds):
        for n, accuracy in zip((125, 500, 2000), by_size):
            rows.append(dict(part="labels", seed=seed, labels=n, flip=0.0, accuracy=accuracy + APART[seed]))
        for flip, accuracy in zip((0.1, 0.25, 0.4), by_flip):
            rows.append(dict(part="labels", seed=seed, labels=2000, flip=flip, accuracy=accuracy + APART[seed]))
        for k, accuracy in zip((1, 2, 3, 4), wider):
            unlabelled = accuracy + APART[seed]
            labelled = unlabelled + (coverage[seed] if k == 1 else -9.0)
            rows.append(dict(part="coverage", seed=seed, subjects=k, labelled=labelled, unlabelled=unlabelled))
        rows.append(dict(part="subject", seed=seed, subject="held-out subject", accuracy=0.5 + APART[seed]))
        rows.append(dict(part="subject", seed=seed, subject="other subjects",
                         accuracy=0.5 + APART[seed] + subject[seed]))
        logliks = dict(pretrained=-1.4, sft=-1.8, ppo=-1.8 - tax["ppo"][seed], dpo=-1.8 - tax["dpo"][seed])
        for policy, loglik in logliks.items():
            rows.append(dict(part="tax", seed=seed, policy=policy, loglik=loglik + APART[seed]))
    monkeypatch.setattr(limits, "run_jobs", lambda *arguments: rows)
    monkeypatch.setattr(limits, "limits_exact", lambda *arguments: (None, "the exact part"))
    limits.limits(seeds, False, tmp_path)
    lines = (tmp_path / "verdict.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_limits_all_four_parts(monkeypatch, tmp_path):
    """Bugs: a difference with the wrong sign, unpaired errors, the pretrained policy for SFT."""
    found = run_limits(monkeypatch, tmp_path)
    assert found["labels"] == YES + "Spearman of accuracy with labels +1.00, with flips -1.00"
    assert found["coverage"] == (YES + "labels on one subject: 0.100 ± 0.006 less accurate on the others; "
                                 "Spearman of that accuracy with the number of subjects +1.00")
    assert found["subject"].startswith(YES + "0.300 ± 0.012 less accurate")
    assert found["tax"] == YES + "ppo costs 0.250 ± 0.029 nats a token; dpo costs 0.110 ± 0.006 nats a token"
    lines = (tmp_path / "table.txt").read_text().splitlines()
    means = {line[:52].strip(): line.split()[-2] for line in lines if line.startswith("nats a token")}
    assert list(means.values()) == [f"{x + sum(APART) / 3:.3f}" for x in (-1.4, -1.8, -2.05, -1.91)]


@pytest.mark.parametrize("changes, part", [
    (dict(by_size=(0.9, 0.8, 0.95)), "labels"),
    (dict(by_size=(0.97, 0.96, 0.95)), "labels"),
    (dict(by_flip=(0.8, 0.85, 0.7)), "labels"),
    (dict(by_flip=(0.91, 0.92, 0.93)), "labels"),
    (dict(wider=(0.6, 0.8, 0.7, 0.9)), "coverage"),
    (dict(wider=(0.9, 0.8, 0.7, 0.6)), "coverage"),
    (dict(coverage=(-0.09, -0.1, -0.11)), "coverage"),
    (dict(coverage=(0.0, 0.1, 0.2)), "coverage"),     # 0.100 ± 0.058
    (dict(subject=(-0.28, -0.3, -0.32)), "subject"),
    (dict(subject=(0.0, 0.3, 0.6)), "subject"),       # 0.300 ± 0.173
    (dict(tax=dict(ppo=(0.0, 0.3, 0.6))), "tax"),
    (dict(tax=dict(dpo=(0.0, 0.3, 0.6))), "tax"),
    (dict(tax=dict(dpo=(-0.1, -0.11, -0.12))), "tax"),
])
def test_limits_one_part_fails(changes, part, monkeypatch, tmp_path):
    """Bugs: a part that no data can fail, one error for two, a lost sign, PPO or DPO is enough for a tax."""
    found = run_limits(monkeypatch, tmp_path, **changes)
    for name, verdict in found.items():
        assert verdict.startswith(NO if name == part else YES)


def test_limits_two_seeds_give_no_verdict(monkeypatch, tmp_path):
    """Bug: fewer than three seeds reproduce something."""
    for verdict in run_limits(monkeypatch, tmp_path, seeds=2).values():
        assert verdict.startswith(UNTESTED)


# ---------------------------------------------------------------------------------------------------------------------
# tree

def tracks_of(seeds, showing, falls=True, rises=True):
    """A track (2 measurements, seeds, 3) in which the first `showing` seeds show the effect, and the others do not."""
    p = numpy.zeros((2, seeds, 3))
    p[0] = (0.3, 0.1, 0.6)
    p[1] = (0.4, 0.05, 0.55)
    for seed in range(showing):
        p[1, seed, 0] = 0.2 if falls else 0.4
        p[1, seed, 2] = 0.75 if rises else 0.55
    return p


def run_tree(monkeypatch, tmp_path, one_apart=(0.3, 0.3), all_apart=0.5, highest=0.1, control=0.0, seeds=20,
             part=None, losses=("dpo",)):
    """
    The verdict of tree. one_apart: the share of seeds that show the effect at the smallest beta, for each reference;
    highest: the share at the largest beta; control: of the table's seeds. The other losses and betas show nothing.
    """
    shown = dict(falls=part != "rises", rises=part != "falls")

    def parallel(job, jobs):
        results = []
        for policy, kind, beta, _, _ in jobs:
            found = {}
            for pair, (i, reference) in itertools.product(tree.PAIRS, enumerate(tree.REFERENCES)):
                share = 0.0
                if policy == "table":
                    share = control if (beta == 0.01 and i == 1) else 0.0
                elif kind in losses and beta == 0.01:
                    share = one_apart[i] if pair == tree.ONE_APART else all_apart
                elif kind in losses and beta == 0.5:
                    share = highest
                found[pair, reference] = tracks_of(seeds, round(share * seeds), **shown)
            results.append(found)
        return results

    monkeypatch.setattr(tree, "parallel", parallel)
    tree.tree(seeds, False, tmp_path)
    return (tmp_path / "verdict.txt").read_text().strip()


@pytest.mark.parametrize("changes, verdict", [
    (dict(), YES),
    (dict(one_apart=(0.25, 0.25)), YES),
    (dict(one_apart=(0.2, 0.9)), NO),                                # each of the two references
    (dict(one_apart=(0.9, 0.2)), NO),
    (dict(highest=0.35), YES),                                       # the mean at the smallest beta is 0.4
    (dict(highest=0.45), NO),
    (dict(control=0.05), NO),                                        # one seed of the table
    (dict(losses=("ipo", "slic")), NO),                              # the other losses do not count
    (dict(part="falls"), NO),                                        # p(chosen) falls, the other mass does not rise
    (dict(part="rises"), NO),
    (dict(seeds=19, one_apart=(0.9, 0.9)), UNTESTED),
])
def test_tree(changes, verdict, monkeypatch, tmp_path):
    """Bugs: one reference is enough, the betas exchanged, no control, one half of the effect is enough."""
    assert run_tree(monkeypatch, tmp_path, **changes).startswith(verdict)


def test_tree_numbers_in_the_verdict(monkeypatch, tmp_path):
    """Bugs: the largest share for the smallest, the mean over one kind of pairs only."""
    line = run_tree(monkeypatch, tmp_path, one_apart=(0.3, 0.5), all_apart=0.6, highest=0.1, control=0.25)
    assert line.startswith(
        NO + "DPO, beta 0.01: at least 30% of the RNN's seeds show the effect on pairs one token apart (25% asked); "
        "over all pairs 50%, at beta 0.5 10%; with a table the other mass rises in up to 25% of seeds (0% asked), "
        "and p(chosen) falls in 25%")


def test_tree_summary_by_hand():
    """Bugs: start and end exchanged, rejected for others, a margin of probabilities, the share of half an effect."""
    p = numpy.array([[(0.3, 0.1, 0.6), (0.3, 0.1, 0.6), (0.3, 0.1, 0.6), (0.3, 0.1, 0.6)],
                     [(0.2, 0.1, 0.7), (0.2, 0.25, 0.55), (0.34, 0.05, 0.61), (0.4, 0.02, 0.58)]])
    row = tree.summary_row("rnn", "dpo", 0.1, tree.ONE_APART, "random", p)
    assert (row["chosen_falls"], row["others_rise"], row["both"]) == (0.5, 0.5, 0.25)
    assert row["both_se"] == pytest.approx(math.sqrt(0.25 * 0.75) / 2)
    assert (row["chosen_start"], row["chosen_end"]) == pytest.approx((0.3, 1.14 / 4))
    assert (row["others_start"], row["others_end"]) == pytest.approx((0.6, 2.44 / 4))
    margins = [math.log(a / b / 3) for a, b, _ in p[1]]
    assert row["margin"] == pytest.approx(sum(margins) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# limits_exact

def exact_seed(seed, coverage=(1e-9, (6, 5, 4, 3, 2, 1), (6, 5, 4, 3, 2, 1)), gap=(7, 6, 5, 4, 3, 2, 1),
               oracle=(9, 8, 7, 6, 5, 4, 3), learned=(2, 3, 1, 1, 1, 1, 1), noise=0.05, sparse=320, dense=160,
               kept=(1.0, 0.8, 0.6, 0.4, 0.2), loss=0.1):
    """What one job of limits_exact returns."""
    labelled, unlabelled, coverage_gap = coverage
    off = (seed - 3) * 10.0  # the seeds differ by much
    result = dict(coverage=[], beta=[], annotators=[])
    for i, x in enumerate(limits_exact.SHARES):
        result["coverage"].append(dict(x=x, labelled=labelled, unlabelled=unlabelled[i] + off,
                                       gap=coverage_gap[i] + off))
    for i, x in enumerate(limits_exact.BETAS):
        jitter = noise * (seed - 2) if i == 1 else 0.0
        result["beta"].append(dict(x=x, learned=learned[i] + off + jitter, oracle=oracle[i] + off, gap=gap[i] + off))
    for i, x in enumerate(limits_exact.DISAGREEMENTS):
        result["annotators"].append(dict(x=x, kept=kept[i] + off, kept_most=0.0, smallest_loss=loss if i else -1.0))
    result["dense"] = [dict(x="sparse", episodes=sparse, curve=[0.0, 1.0]),
                       dict(x="dense", episodes=dense, curve=[0.0, 1.0])]
    return result


def run_limits_exact(monkeypatch, tmp_path, seeds=5, last=None, **changes):
    """{criterion: verdict} of limits_exact. last: changes to the last seed alone."""
    results = [exact_seed(seed, **changes) for seed in range(seeds)]
    results[-1] = exact_seed(seeds - 1, **dict(changes, **(last or {})))
    monkeypatch.setattr(limits_exact, "parallel", lambda job, jobs: results)
    limits_exact.limits_exact(seeds, False, tmp_path)
    lines = (tmp_path / "verdict.txt").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test_limits_exact_all_four_parts(monkeypatch, tmp_path):
    """Bugs: a lost sign of Spearman, unpaired errors, a column for another."""
    found = run_limits_exact(monkeypatch, tmp_path)
    assert found["coverage"] == (YES + "largest error on labelled responses 1e-09; rank correlation with the share: "
                                 "unlabelled error -1.00, J* - J -1.00")
    assert found["beta"] == (YES + "rank correlation with beta: gap -1.00, oracle -1.00; beta 0.03 beats the smallest "
                             "by 1.000 +- 0.035 and the largest by 2.000 +- 0.035")
    assert found["dense"] == YES + "fewer episodes in 5 of 5 seeds"
    assert found["annotators"] == (YES + "smallest loss 0.100; rank correlation of the kept share with disagreement "
                                   "-1.00")


@pytest.mark.parametrize("part, changes", [
    ("coverage", dict(last=dict(coverage=(1e-5, (6, 5, 4, 3, 2, 1), (6, 5, 4, 3, 2, 1))))),
    ("coverage", dict(coverage=(0.0, (1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1)))),
    ("coverage", dict(coverage=(0.0, (6, 5, 4, 3, 2, 1), (1, 2, 3, 4, 5, 6)))),
    ("coverage", dict(coverage=(0.0, (6, 5, 4, 3, 2, 1), (6, 3, 4, 5, 2, 1)))),  # -0.77
    ("beta", dict(gap=(1, 2, 3, 4, 5, 6, 7))),
    ("beta", dict(oracle=(3, 4, 5, 6, 7, 8, 9))),
    ("beta", dict(learned=(4, 3, 1, 1, 1, 1, 1))),      # best at the smallest
    ("beta", dict(learned=(2, 3, 1, 1, 1, 1, 4))),      # best at the largest
    ("beta", dict(noise=1.0)),                          # 1.00 +- 0.71 over the smallest
    ("dense", dict(last=dict(dense=320))),              # as many
    ("dense", dict(last=dict(dense=640))),
    ("dense", dict(last=dict(dense=None, sparse=None))),
    ("annotators", dict(last=dict(loss=-0.01))),        # one seed
    ("annotators", dict(kept=(0.2, 0.4, 0.6, 0.8, 1.0))),
])
def test_limits_exact_one_part_fails(part, changes, monkeypatch, tmp_path):
    """Bugs: a part that no data can fail, the mean over seeds for every seed, one error for two."""
    for name, verdict in run_limits_exact(monkeypatch, tmp_path, **changes).items():
        assert verdict.startswith(NO if name == part else YES), name


def test_limits_exact_sparse_may_never_arrive(monkeypatch, tmp_path):
    """Bug: a seed in which only the dense reward reaches the optimum does not count."""
    assert run_limits_exact(monkeypatch, tmp_path, last=dict(sparse=None))["dense"].startswith(YES)


def test_limits_exact_four_seeds_give_no_verdict(monkeypatch, tmp_path):
    """Bug: fewer than five seeds reproduce something."""
    for verdict in run_limits_exact(monkeypatch, tmp_path, seeds=4).values():
        assert verdict.startswith(UNTESTED)


# ---------------------------------------------------------------------------------------------------------------------
# robust_exact

def run_robust_exact(monkeypatch, tmp_path, large=(0.2, 0.5, 0.3, 0.2, 0.1, 0.0), noise=0.1, control=0.0, N=20):
    """The verdict of robust_exact. large: the gain of each weight over weight 1 at the large error."""
    def parallel(job, jobs):
        results = []
        for size, shared, _, _ in jobs:
            gains = (0.0, 0.1, 0.1, 0.2, 0.1, 0.0)
            if (size, shared) == (robust_exact.LARGE, 0.0):
                gains = large
            if shared == 1.0:
                gains = (0.0, -control, 0.0, 0.0, 0.0, 0.0)
            golds = {}
            for kind in ("expectation", "cell"):
                for weight, gain in zip(robust_exact.WEIGHTS, gains):
                    golds[kind, weight] = []
                    for i in range(N):
                        jitter = noise * (-1) ** i if weight == 0.2 and shared == 0.0 else 0.0
                        golds[kind, weight].append(10.0 * i + gain + jitter)
            golds["mean", None] = [10.0 * i + 0.7 for i in range(N)]
            results.append((golds, 1e-5 * size))
        return results

    monkeypatch.setattr(robust_exact, "parallel", parallel)
    robust_exact.robust_exact(N, False, tmp_path)
    return (tmp_path / "verdict.txt").read_text().strip()


def test_robust_exact_numbers_in_the_verdict(monkeypatch, tmp_path):
    """Bugs: the rows of another error, unpaired errors, weight 1 among the ones below it, the smallest gap."""
    assert run_robust_exact(monkeypatch, tmp_path) == (
        YES + "large error: weight 0.2 gains 0.500 +- 0.023 over weight 1, weight 0 gains 0.200; small error: weight "
        "0.6 gains 0.200; the plain mean of the five gains 0.700; one error shared by all: at most 0e+00; the solver "
        "is within 2e-05 of the optimum")


@pytest.mark.parametrize("changes, verdict", [
    (dict(large=(0.6, 0.5, 0.3, 0.2, 0.1, 0.0)), NO),          # weight 0 is the best
    (dict(large=(-0.2, -0.1, -0.1, -0.2, -0.3, 0.0)), NO),     # weight 1 is the best
    (dict(noise=1.2), NO),                                     # 0.500 +- 0.275
    (dict(noise=0.8), YES),                                    # 0.500 +- 0.184
    (dict(control=1e-3), NO),                                  # the control shows a bug, whatever its sign
    (dict(control=-1e-3), NO),
    (dict(control=1e-8), YES),
    (dict(N=19), UNTESTED),
])
def test_robust_exact(changes, verdict, monkeypatch, tmp_path):
    """Bugs: no control, the sign of the control's gain, one error for two, a verdict from a few tables."""
    assert run_robust_exact(monkeypatch, tmp_path, **changes).startswith(verdict)


def test_robust_exact_names_the_best_weight_below_one(monkeypatch, tmp_path):
    """Bug: weight 1 is compared with itself."""
    line = run_robust_exact(monkeypatch, tmp_path, large=(-0.3, -0.1, -0.2, -0.2, -0.3, 0.0))
    assert line.startswith(NO + "large error: weight 0.2 gains -0.100 +- 0.023 over weight 1, weight 0 gains -0.300")


# ---------------------------------------------------------------------------------------------------------------------
# estimators

def run_estimators(monkeypatch, tmp_path, gains=None, speed=2.0, noise=0.01, pick=0.3, seeds=5, quick=False):
    """
    The verdicts of estimators, by name. gains: {method: share above PPO}, for both rewards; speed: PPO's seconds for
    one of the others; noise: of the gains, over seeds; pick: what the best of n gains over a random one.
    """
    wobble = (1, -1, 1, -1, 0)

    def curve_job(seed, quick, reward, method, group):
        gain = (gains or {}).get(method, 0.0) + (noise * wobble[seed % 5] if method != "ppo" else 0.0)
        second = speed if method == "ppo" else 1.0
        return [dict(study="curve", seed=seed, reward=reward, method=method, G=group, window=w, kl=1.0,
                     share=APART[seed % 3] + 0.1 * (w + 1) + gain, seconds=second * (w + 1)) for w in range(8)]

    def rejection_job(seed, quick):
        rows = [dict(study="rejection", seed=seed, pick=name, gold=0.0, kl=0.1, score_se=0.1,
                     score=APART[seed % 3] + (pick + 0.01 * wobble[seed % 5] if name == "best" else 0.0))
                for name in ("best", "random")]
        return rows

    monkeypatch.setattr(estimators, "parallel", lambda function, jobs: [function(*job) for job in jobs])
    monkeypatch.setattr(estimators, "curve_job", curve_job)
    monkeypatch.setattr(estimators, "rejection_job", rejection_job)
    _, text = estimators.estimators(seeds, quick, tmp_path)
    lines = (tmp_path / "verdict.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines), text


def test_estimators_both_ways(monkeypatch, tmp_path):
    """Bugs: a difference with its sign turned, without its error, not paired by seed, or of the wrong two methods."""
    verdicts, text = run_estimators(monkeypatch, tmp_path, gains=dict(dr_grpo=0.1))
    assert len(verdicts) == 7 and "share at PPO's half" in text
    for reward in ("model", "gold"):
        for name in ("episodes", "seconds", "bias"):
            assert verdicts[f"{reward}, {name}"].startswith(YES)
    assert verdicts["rejection"].startswith(YES)
    verdicts, _ = run_estimators(monkeypatch, tmp_path, gains=dict(rloo=-0.1, grpo=0.1), speed=1.0, pick=0.0)
    assert all(verdict.startswith(NO) for verdict in verdicts.values())


def test_equal_seconds_are_not_equal_episodes(monkeypatch, tmp_path):
    """Bug: the share at equal seconds is the share at the end, where RLOO is worse here."""
    verdicts, _ = run_estimators(monkeypatch, tmp_path, gains=dict(rloo=-0.1), speed=2.0)
    assert verdicts["gold, episodes"].startswith(NO) and verdicts["gold, seconds"].startswith(YES)


@pytest.mark.parametrize("seeds, quick", [(4, False), (5, True)])
def test_few_seeds_give_no_verdict_on_estimators(monkeypatch, tmp_path, seeds, quick):
    """Bug: a verdict from a quick pass, or from fewer seeds than the criterion asks for."""
    verdicts, _ = run_estimators(monkeypatch, tmp_path, seeds=seeds, quick=quick)
    assert all(verdict.startswith(UNTESTED) for verdict in verdicts.values())


@pytest.mark.parametrize("method, group", [("ppo", 1), ("dr_grpo", 4)])
def test_a_curve_has_its_budget_its_shares_and_its_seconds(method, group, tiny, monkeypatch):
    """Bug: another budget than the docstring's, a share from the wrong end, or seconds that do not add up."""
    run = Run(parse_config(["--out", str(tiny), "--stages", "report"]))
    clock = [100.0]
    rows = []

    def train(iterations, batch_size):
        assert (iterations, batch_size) == (30, 128)
        clock[0] += 60.0
        rows.extend(dict(objective=0.1 * i, kl=float(i)) for i in range(iterations))
        return rows

    def optimise(run, scorer, beta, iterations, seed, lr, batch_size, critic):
        assert method == "ppo"
        return None, train(iterations, batch_size)

    def train_grpo(policy, reference, scorer, prompts, config, seed, log):
        assert (config.grpo_kind, config.group) == (method, group)
        for row in train(config.ppo_iterations, config.ppo_batch):
            log(**row)

    gold = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    for name, function in (("base", lambda seed, quick: run), ("optimise", optimise), ("train_grpo", train_grpo),
                           ("reference_samples", lambda *arguments: ([], gold))):
        monkeypatch.setattr(estimators, name, function)
    monkeypatch.setattr(estimators.time, "process_time", lambda: clock[0])
    curve = estimators.curve_job(0, False, "gold", method, group)
    assert [row["seconds"] for row in curve] == pytest.approx([10, 20, 30, 40, 50, 60])
    assert [row["kl"] for row in curve] == pytest.approx([2, 7, 12, 17, 22, 27])
    best = optimum(gold, run.config.beta).objective
    assert [row["share"] for row in curve] == pytest.approx([(0.1 * row["kl"] - 1.5) / (best - 1.5) for row in curve])


def test_the_row_of_a_method_among_the_estimators():
    """Bug: the share at half time stands for that at the end, the KL is that of the start, or another method's."""
    rows = []
    for method, group, gain, pace in (("ppo", 1, 0.0, 10.0), ("rloo", 4, 0.1, 5.0)):
        for seed in range(3):
            for w in range(4):
                rows.append(dict(study="curve", seed=seed, reward="gold", method=method, G=group, window=w, kl=1.0 + w,
                                 share=APART[seed] + 0.2 * w + gain, seconds=pace * (w + 1)))
    spread = estimators.mean_se(APART[:3])
    ppo = estimators.summarise(rows, 3, "gold", "ppo", 1)
    rloo = estimators.summarise(rows, 3, "gold", "rloo", 4)
    assert [ppo[name] for name in ("share", "kl", "seconds", "share at PPO's half")] == pytest.approx(
        [spread[0] + 0.6, 4.0, 40.0, spread[0] + 0.2])
    assert [rloo[name] for name in ("share", "kl", "seconds", "share at PPO's half")] == pytest.approx(
        [spread[0] + 0.7, 4.0, 20.0, spread[0] + 0.7])
    assert rloo["share_se"] == pytest.approx(spread[1]) and (rloo["method"], rloo["G"]) == ("rloo", 4)
