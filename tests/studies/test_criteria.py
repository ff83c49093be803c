"""
The summaries and criteria of the studies on rows made by hand, where the right verdict is known, both ways.

The seeds differ by much more than any effect, so that only paired differences see it.
"""

import math

import numpy
import pytest

from pipeline.config import Config
from studies import direct, estimators, frontier, limits, limits_exact, overopt, robust, robust_exact, tree

APART = (-5.0, 0.0, 7.0)  # the seeds
MEAN = sum(APART) / 3


def parts(row, expected):
    return {name: row[name] for name in expected}


def test_overopt():
    """Bug: the peak for a fixed distance, a lost sign, another beta, curves compared by window and not at equal d."""
    rows = []
    for seed, apart in enumerate(APART):
        for labels, beta, shift, extra in ((9, 0.0, 0.0, 0.0), (9, 0.1, 1.0, 0.05), (81, 0.0, 0.0, 3.0)):
            rows += [dict(method="ppo", seed=seed, labels=labels, beta=beta, d=d + shift, score=1.0 * d,
                          gold=apart + extra + 2 * (d + shift) - (seed + 1) * max(0.0, d + shift - 2))
                     for d in range(8)]
    rises, falls, peaks, curve = overopt.make_claims(rows, 3, (9, 81), (0.1,))
    assert rises.values == pytest.approx([0.2] * 3)
    assert falls.values == pytest.approx([-3.0, 0.0, 3.0])  # of gold: 2 (2 - 5) + 3 (seed + 1)
    assert peaks.values == pytest.approx([3 / math.log(9)] * 3)
    assert curve.values == pytest.approx([0.05] * 3) and curve.within == 0.1


def test_the_table_of_overopt():
    """Bug: columns exchanged, best-of-n's law for PPO, the peak of the score, the end of another curve."""
    gold = [0.0, 2.0, 2 * (2 - 0.9 * math.log(2)), 3 * (2 - 0.9 * math.log(3))]
    rows = [dict(method="ppo", seed=seed, labels=5, beta=0.0, d=1.0 * i, gold=gold[i] + i * noise, score=10.0 * i)
            for seed, noise in enumerate((-0.1, 0.0, 0.1)) for i in range(4)]
    row = overopt.summarise([*rows, dict(rows[0], labels=6, gold=99.0)], 3, "ppo", 5, 0.0)
    error = 0.1 / math.sqrt(3)
    expected = dict(peak_gold=gold[3], peak_se=3 * error, peak_d=3, end_gold=gold[3], end_se=3 * error, end_d=3,
                    end_score=30, fall=gold[2] - gold[3], fall_se=error, rmse_law=0)
    assert parts(row, expected) == pytest.approx(expected, abs=1e-9) and row["rmse_rival"] > 0.02


def test_the_table_and_the_claims_of_direct():
    """Bug: a mark that is tested on the seeds that chose it, another beta or kind, an implicit reward for nats."""
    rows = []
    falls = [("dpo", 0.01, 1.0), ("ipo", 0.01, 0.25), ("slic", 0.01, 0.0), ("dpo", 0.5, 0.0),
             *[(kind, 0.01, 0.1 * i) for i, kind in enumerate(direct.REMEDIES)]]
    for kind, beta, fall in falls:
        for seed, apart in enumerate((*APART, 2.0)):
            for m, step in enumerate(direct.MARKS):
                gold = apart + min(m, 3) + 9.0 * (seed > 1 and m == 4) - fall * max(0, m - 3)
                rows.append(dict(seed=seed, kind=kind, beta=beta, step=step, gold=gold, kl=1.0 * m, d=0.5 * m,
                                 wins=0.01 * m, length=10.0 + m, chosen_reward=-1.0 * m * beta,
                                 rejected_reward=2.0 * m * beta))
            rows[-1]["implicit_accuracy"] = 0.7 + 0.1 * (kind == "ipo")
    row = direct.summarise(rows, 4, "dpo", 0.01)
    expected = dict(kl=7, wins=0.07, length=17, best_step=64, chosen=-7, rejected=14, implicit=0.7)
    assert parts(row, expected) == pytest.approx(expected)
    claims = {claim.name: claim for claim in direct.make_claims(rows, 4)}
    assert claims["hump"].values == pytest.approx([4.0] * 2) and claims["hump"].why.endswith("32")
    assert claims["KL rises"].values == pytest.approx([1.0] * 4)
    # from step 32 (m = 3) to the end DPO falls by 4 and IPO by 1
    assert claims["mildest"].values == pytest.approx([3.0] * 4)
    assert claims["chosen fall"].values == pytest.approx([0.07] * 4)
    assert claims["rejected fall"].values == pytest.approx([-0.14] * 4)
    assert claims["accuracy"].within == 0.3 and len(claims["law"].values) == 4
    for i, name in enumerate(("chi-PO", "DPO, length", "DPO + SFT", "online DPO")):  # at the end of the falls
        assert claims[name].values == pytest.approx([4 - 0.4 * i] * 4)
    assert "chosen" not in direct.summarise(rows, 4, "chipo", 0.01)


def test_a_law_is_judged_by_the_marks_that_it_did_not_see():
    """Bug: a third coefficient wins because it is a third one; the marks of another seed or kind."""
    rows = [dict(seed=seed, kind="dpo", d=d, gold=d * (2 - seed - 0.9 * math.log(d)))
            for seed in range(2) for d in (0.2, 0.5, 1.0, 1.7, 2.5, 4.0, 6.0, 9.0)]
    rows += [dict(row, kind="ipo", gold=99.0) for row in rows]
    for seed in range(2):
        assert direct.left_out_errors(rows, seed, "rl") == pytest.approx(0, abs=1e-9)
        assert direct.left_out_errors(rows, seed, "quadratic") > 0.05


def test_the_rate_of_direct_is_constant():
    """Bug: a learning rate that falls to 0 within the epoch, where the KL cannot rise at its end."""
    config = Config()
    for step in range(250):
        direct.set_rate(config, step, 250)
        wanted = pytest.approx(1e-4 * min(1, (step + 1) / 10))
        assert config.dpo_lr * min((step + 1) / 26, 1 - step / 250) == wanted  # what train_dpo makes of it
        assert config.ppo_lr * (1 - step / 250) == wanted                      # and train_online_dpo


def test_frontier():
    """Bug: the curve of the other reward, a share without SFT subtracted, errors that are added, seeds that mix."""
    curves = dict(score=(0.5, 1.5, 2.0, 2.25), gold=(0.2, 1.2, 1.8, 2.0))  # of the optimum at a KL of 0, 1, 2 and 3
    rows = []
    for seed, apart in enumerate(APART):
        rows += [{"seed": seed, "method": f"optimum of {reward}", "kl": kl, reward: value + apart, f"{reward}_se": 0.04}
                 for reward, values in curves.items() for kl, value in enumerate(values)]
        for method, (kl, score, gold) in (("SFT", (0, 0.5, 0.2)), ("ppo", (1.5, 1.6, 1.45)),
                                          ("ppo on gold", (1.5, 1.7, 1.45)), ("dpo", (9.0, 9.0, 9.0))):
            rows.append(dict(seed=seed, method=method, setting=0.3, kl=kl, score=score + apart, gold=gold + apart,
                             score_se=0.03, gold_se=0.03))
    points = [each for reward in frontier.REWARDS for seed in range(3) for each in frontier.compare(rows, reward, seed)]
    found = {claim.name: claim.values for claim in frontier.make_claims(points)}
    # the errors 0.04 and 0.03 make 0.05, and the curves are at 1.75 and 1.5; DPO is beyond their end
    assert found["under the curve of score"] == pytest.approx([1.75 + 0.1 - 1.7] * 3)
    assert found["under the curve of gold"] == pytest.approx([1.5 + 0.1 - 1.45] * 3)
    assert found["ppo close to the curve"] == pytest.approx([1.1 / 1.25 - 0.9] * 3)
    assert found["ppo on gold close to the curve"] == pytest.approx([1.25 / 1.3 - 0.9] * 3)


def test_robust():
    """Bug: another n or arm than the claim's, a lost sign, the end for a KL of 5, seeds that mix, a peak for a jump."""
    rows = []
    for seed, apart in enumerate(APART):
        for i, arm in enumerate(robust.ARMS):
            rows.append(dict(study="spread", seed=seed, arm=arm, correlation=0.1 * i + 0.01 * seed, coverage=0.5))
            for j, how in enumerate(robust.REWARDS):
                rows += [dict(study="best of n", seed=seed, arm=arm, how=how, n=n, gold=apart + n * (j + 10.0 * i))
                         for n in (16, 64, 256)]
        for j, how in enumerate(robust.PPO_REWARDS):
            rows += [dict(study="ppo", seed=seed, arm="annotators", how=how, kl=2.0 * w, d=0.0,
                          gold=apart + (j + 1) * (w if w < 3 else 0.5 * w)) for w in range(5)]
    claims = robust.make_claims(rows, 3)
    found = {claim.name.split(": ")[0]: claim.values for claim in claims}
    assert claims[0].values == pytest.approx([0, 0.01, 0.02])
    place = {how: j for j, how in enumerate(robust.REWARDS)}
    for name, a, b in (("annotators: mean above single", "mean", "single"), ("bonus: WCO above mean", "wco", "mean"),
                       ("annotators: WCO above pooled", "wco", "pooled"), ("flips: mean above WCO", "mean", "wco")):
        values = next(claim.values for claim in claims if claim.name.endswith(name))
        assert values == pytest.approx([64.0 * (place[a] - place[b])] * 3)
    # between w = 2 and 3, at a KL of 4 and 6: gold 2 and 1.5 times j + 1; WCO is j = 3, the mean j = 2
    assert found["PPO at KL 5"] == pytest.approx([1.75] * 3) and found["PPO at the end"] == pytest.approx([2.0] * 3)
    assert found["BRME at the end"] == pytest.approx([2.0] * 3)
    assert found["BRME"] == pytest.approx([-0.5] * 3)  # jumps of 0.5 and 0.5 times j + 1, in the second half
    row = robust.summarise(rows, 3, "annotators", "wco")
    expected = {"n 16": MEAN + 16 * 4, "n 256": MEAN + 256 * 4, "at KL 5": MEAN + 7, "at the end": MEAN + 8}
    assert parts(row, expected) == pytest.approx(expected)
    assert "n 64" in robust.summarise(rows, 3, "flips", "uwo")


def test_limits():
    """Bug: a lost sign, seeds that mix, one subject for two, the number of labels for its logarithm, PPO for DPO."""
    rows = []
    for seed, apart in enumerate(APART):
        rows += [dict(part="labels", seed=seed, labels=n, flip=0.0, accuracy=apart + 2 * math.log(n)) for n in (5, 50)]
        rows.append(dict(part="labels", seed=seed, labels=50, flip=0.4, accuracy=apart + 2 * math.log(50) - 0.4 * 3))
        rows += [dict(part="coverage", seed=seed, subjects=k, labelled=apart + 1, unlabelled=apart + 0.5 * (k - 1))
                 for k in (1, 3)]
        rows += [dict(part="subject", seed=seed, subject=name, accuracy=apart - lost)
                 for name, lost in zip(limits.TESTED_ON, (0, 0.7))]
        rows += [dict(part="tax", seed=seed, policy=name, loglik=apart - lost)
                 for name, lost in (("sft", 0), ("ppo", 0.1), ("dpo", -0.2), ("pretrained", 9))]
    claims = limits.make_claims(rows, 3, (5, 50), (0.0, 0.4), (1, 3))
    for claim, value in zip(claims, (2, 3, 1, 0.5, 0.7, 0.1, -0.2), strict=True):
        assert claim.values == pytest.approx([value] * 3), claim.name


def test_limits_exact():
    """
    Bug: a lost sign of Spearman, means over seeds, a best beta that is an end or tested on its own seeds, an optimum
    never reached.
    """
    xs = (0.0, 1.0, 2.0)
    def settings(name, *curves):
        return [[{"x": x, name: curve[i], "gap": -x, "labelled": 0.0, "oracle": x} for curve in curves]
                for i, x in enumerate(xs)]

    dense = [[dict(episodes=64), dict(episodes=None)], [dict(episodes=32), dict(episodes=64)]]
    learned = [[9.0, 5.0, 1.0, 0, 0, 0, 0], [0.0, 1.0, 3.0, 0, 0, 0, 2.0]]
    beta = [[dict(x=b, learned=curve[i], gap=-b, oracle=b) for curve in learned]
            for i, b in enumerate(limits_exact.BETAS)]
    parts_ = dict(coverage=settings("unlabelled", (3, 2, 1), (1, 2, 3)), beta=beta, dense=dense,
                  annotators=settings("kept", (1, 2, 3), (3, 2, 1)))
    values = [claim.values for claim in limits_exact.make_claims(parts_, 8)]
    # the first seed chooses the second beta, the best between the ends, where the other one has 1, and 2 at its end;
    # 8 iterations are 512 episodes
    expected = [[0.5, -1.5], [0.5, 0.5], [0.5, 0.5], [-1.5, -1.5], [-1.0], [1, 3], [-1.5, 0.5]]
    for found, right in zip(values, expected, strict=True):
        assert found == pytest.approx(right)


def test_robust_exact():
    """Bug: a gain over one of the five, a lost sign, the weights exchanged, the errors of another kind."""
    golds = {}
    for size, error in enumerate(robust_exact.ERRORS):
        golds[error] = {(kind, weight): [10.0 * i + size + 0.1 * shift for i in range(20)] for kind, weight, shift in
                        (("cell", 1.0, 0), ("cell", 0.0, 2 + size), ("expectation", 0.0, -3), ("one of five", None, 7))}
    assert [claim.values[3] for claim in robust_exact.make_claims(golds)] == pytest.approx([0.2, -0.3, -0.3, -0.4])
    rows = robust_exact.summary_rows("under", golds["under"])
    assert [row["gain"] for row in rows] == pytest.approx([0, 0.3, -0.3, 0.7])


def test_tree():
    """Bug: half of the effect counts, start and end exchanged, one reference is enough, no control, betas exchanged."""
    ends = [(0.2, 0.1, 0.7), (0.2, 0.25, 0.55), (0.34, 0.05, 0.61), (0.4, 0.02, 0.58)]
    row = tree.summary_row("rnn", "dpo", 0.1, tree.ONE_APART, "random", numpy.array([[(0.3, 0.1, 0.6)] * 4, ends]))
    expected = dict(chosen_falls=0.5, others_rise=0.5, both=0.25, both_se=math.sqrt(0.25 * 0.75) / 2, chosen_start=0.3,
                    chosen_end=0.285, others_start=0.6, others_end=0.61,
                    margin=sum(math.log(a / b / 3) for a, b, _ in ends) / 4)
    assert parts(row, expected) == pytest.approx(expected)
    shown = numpy.array([[(0.3, 0.1, 0.6)] * 4, ends])
    still = numpy.array([[(0.3, 0.1, 0.6)] * 4] * 2)
    tracks = {("rnn", "dpo", 0.01): {(pair, reference): shown if pair == tree.ONE_APART else still
                                     for pair in tree.PAIRS for reference in tree.REFERENCES},
              ("rnn", "dpo", 0.5): {("x", "y"): still}}
    rows = [dict(policy="table", loss="dpo", beta=0.01, others_rise=0.0)]
    random, fitted, beta = tree.make_claims(tracks, rows, (0.01, 0.5))
    assert random.values == fitted.values == [x - 0.25 for x in (1, 0, 0, 0)] == [0.75, -0.25, -0.25, -0.25]
    assert beta.values == [0.5, 0, 0, 0]


def test_estimators():
    """Bug: equal seconds are equal episodes, a lost sign, the wrong two methods, the start for the end."""
    rows = []
    for method, group, pace, gain in (("ppo", 1, 10.0, 0.0), ("rloo", 4, 5.0, 0.03), ("grpo", 4, 5.0, 0.0),
                                      ("dr_grpo", 4, 5.0, 0.1)):
        rows += [dict(seed=seed, reward=reward, method=method, G=group, window=w, kl=1.0 + w, seconds=pace * (w + 1),
                      share=apart + 0.2 * w + gain * (1 if reward == "model" else -1))
                 for reward in estimators.REWARDS for seed, apart in enumerate(APART) for w in range(4)]
    picks = [dict(pick=pick, score=apart + 0.3 * (pick == "best")) for apart in APART for pick in ("best", "random")]
    means = [sum(claim.values) / 3 for claim in estimators.make_claims(rows, picks, 3)]
    # at 20 of PPO's 40 seconds PPO is at w = 1, and RLOO at w = 3
    assert means == pytest.approx([0.08, 0.43, 0.1, 0.02, 0.37, -0.1, 0.3])
