"""
The studies from their jobs to their verdicts, with made-up jobs, where the right number of each claim is known.

The seeds differ by much more than any effect, so that only paired differences see it.
"""

import itertools
import math
from types import SimpleNamespace

import numpy
import pytest

from studies import direct, estimators, frontier, limits, limits_exact, overopt, robust, robust_exact, tree
from studies.lab import fit_law, law_error, mean_se

APART = (-5.0, 0.0, 7.0, 2.0, -1.0)  # the seeds
MEAN, ERROR = mean_se(APART[:3])


def parts(row, expected):
    return {name: row[name] for name in expected}


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """
    ask(module, seeds, job=function, ...) runs the study of a module, in full, with functions in the place of its jobs.

    Returns its claims by name, the rows of its tables, and the last point of every line of its panels.
    """
    def ask(module, seeds, **jobs):
        found, study = SimpleNamespace(table=[]), getattr(module, module.__name__.split(".")[1])

        def parallel(function, arguments, out=None):
            assert out == (None if module in (tree, robust_exact) else tmp_path)  # jobs of seconds are not kept
            return [jobs[function.__name__](*each) for each in arguments]

        def table(rows, columns):
            assert set(columns) <= set().union(*rows)
            found.table += rows
            return "a table"

        def judge(claims, quick):
            assert quick is None
            found.claims = {claim.name: claim for claim in claims}
            return ["verdicts"]

        def publish(out, rows, text, verdicts, panels):
            assert out == tmp_path and rows and "a table" in text and verdicts[0] == "verdicts"
            found.texts = text, verdicts[-1]
            found.rows, found.panels = rows, panels
            found.ends = [[pytest.approx((line["x"][-1], line["y"][-1])) for line in each["lines"]] for each in panels]

        for function in (parallel, table, judge, publish):
            monkeypatch.setattr(module, function.__name__, function)
        study(seeds, None, tmp_path)  # not False: a quick pass is known to its judge
        found.values = {name: pytest.approx(claim.values) for name, claim in found.claims.items()}
        return found
    return ask


def test_overopt(ask):
    """
    Bug: the end for the peak, a lost sign, another beta, curves compared by window and not at equal d, one law for
    both methods, the columns of a panel or of the table exchanged.
    """
    def ppo(seed, quick, labels, beta):
        shift, extra = (0.0, {300: 0.0, 1000: 1.0, 4000: 3.0}[labels]) if beta == 0 else (1.0, 0.0)
        shift += 9.0 * ((seed, beta) == (2, 0.03))  # here it shares no d with beta 0
        return [dict(method="ppo", seed=seed, labels=labels, beta=beta, d=d + shift, score=1.0 * d,
                     gold=APART[seed] + extra * (1 + (d < 7)) + (2 + beta / 8) * (d + shift)
                     - (seed + 2) * max(0.0, d + shift - 2))
                for d in range(8)]  # with beta it differs by beta / 2 in the mean over d from 1 to 7, which both have

    def best(seed, quick, labels):
        return [dict(method="best of n", seed=seed, labels=labels, beta=None, d=d, score=9, gold=d * (2 - 0.3 * d))
                for d in range(4)]

    found = ask(overopt, 3, overopt_ppo=ppo, overopt_bon=best)
    slope = numpy.polyfit(numpy.log([300, 1000, 4000]), [0, 2, 6], 1)[0]  # the peaks are at d = 2
    assert found.values == {"the proxy rises": [0.2] * 3,
                            "gold falls": [0.0, 3.0, 6.0],  # 2 (2 - 5) + 3 (seed + 2)
                            "more labels, higher peak": [slope] * 3,
                            "one curve, beta 0.03 against 0": [0.015] * 2, "one curve, beta 0.1 against 0": [0.05] * 3}
    assert found.claims["one curve, beta 0.03 against 0"].why == "1 seeds share no d"
    assert found.claims["one curve, beta 0.1 against 0"].within == 0.1
    panel, line = found.panels[0], found.panels[0]["lines"][0]
    assert (panel["xlabel"], panel["ylabel"], line["label"], line["yerr"][0]) == ("d", "gold", "labels 300", ERROR)
    assert found.ends == [[(7, MEAN + gold) for gold in (-1, 0, 2)], [(7, 7)] * 3,
                          [(7, MEAN - 1), (11, MEAN + 11 * (2 + 0.03 / 8) - 30), (8, MEAN - 1.9)], [(3, 3.3)] * 3]
    assert len(found.rows) == 3 * (5 * 8 + 3 * 4)
    gold = [MEAN + 2 * d - 3 * max(0, d - 2) for d in range(8)]
    expected = dict(labels=300, beta=0, peak_gold=MEAN + 4, peak_se=ERROR, peak_d=2, end_gold=gold[-1],
                    end_se=mean_se([-1, -1, 1])[1], end_d=7, end_score=7,
                    rmse_law=law_error(range(8), gold, "rl", fit_law(range(8), gold, "rl")))
    assert parts(found.table[0], expected) == pytest.approx(expected)
    assert found.table[-1]["rmse_law"] == pytest.approx(0, abs=1e-9) and found.table[-1]["rmse_rival"] > 0.02


def test_direct(ask):
    """Bug: a mark that is tested on the seeds that chose it, another beta or kind, an implicit reward for nats."""
    def job(seed, quick, kind, beta):
        fall = {"dpo": 1.0, "ipo": 0.25, "dpo_sft": 0.5}.get(kind, 0.0) if beta == 0.01 else 0.0
        rows = []
        for m, step in enumerate(direct.MARKS):
            gold = APART[seed] * (m > 0) + min(m, 3) + 9.0 * (seed > 1 and m == 4) - fall * max(0, m - 3)
            rows.append(dict(seed=seed, kind=kind, beta=beta, step=step, gold=gold, kl=1.0 * m, d=0.5 * m + beta,
                             length=10.0 + m, chosen_reward=-1.0 * m * beta, rejected_reward=2.0 * m * beta))
        rows[-1]["implicit_accuracy"] = 0.7 - (0.01 if kind in direct.KINDS else -0.01) * rows[-1]["gold"]
        return rows

    found = ask(direct, 4, direct_job=job)
    dpo = [row for seed in range(4) for beta in (0.01, 0.05, 0.1, 0.3, 0.5) for row in job(seed, False, "dpo", beta)]
    errors = {law: [direct.left_out_errors(dpo, seed, law) for seed in range(4)] for law in ("rl", "quadratic")}
    assert found.values.pop("law") == [a - b for a, b in zip(errors["quadratic"], errors["rl"])]
    # from step 32 (m = 3) to the end DPO falls by 4 and IPO by 1
    assert found.values == {"hump": [4.0] * 2, "KL rises": [1.0] * 4, "mildest": [3.0] * 4, "chosen fall": [0.07] * 4,
                            "rejected fall": [-0.14] * 4, "accuracy": [-1.0] * 4, "chi-PO": [4.0] * 4,
                            "DPO, length": [4.0] * 4, "DPO + SFT": [2.0] * 4, "online DPO": [4.0] * 4}
    assert found.claims["hump"].why.endswith("32") and found.claims["accuracy"].within == 0.3
    expected = dict(kl=7, length=17, best_step=64, gold=MEAN * 0.75 + 0.5 - 1, gold_se=mean_se(APART[:4])[1],
                    best_gold=MEAN * 0.75 + 0.5 + 3 + 4.5 - 1)
    assert parts(found.table[0], expected) == pytest.approx(expected)
    betas, rest = (0.01, 0.05, 0.1, 0.3, 0.5), [4] * 4
    assert found.ends == [*[[(3.5 + beta, gold) for beta, gold in zip(betas, golds)]
                            for golds in ([0, *rest], [3, *rest], [4, *rest])],
                          [(3.51, gold) for gold in (0, 4, 4, 2, 4)]]  # DPO and the remedies


def test_a_law_is_judged_by_the_marks_that_it_did_not_see():
    """Bug: a third coefficient wins because it is a third one; the marks of another seed or kind."""
    ds = numpy.array([0.2, 0.5, 1.0, 1.7, 2.5, 4.0, 6.0, 9.0])
    golds = [ds * (2 - seed - 0.9 * numpy.log(ds)) for seed in range(2)]
    rows = [dict(seed=seed, kind="dpo", d=d, gold=g) for seed in range(2) for d, g in zip(ds, golds[seed])]
    rows += [dict(row, kind="ipo", gold=99.0) for row in rows]
    for seed in range(2):
        assert direct.left_out_errors(rows, seed, "rl") == pytest.approx(0, abs=1e-9)
        polynomial = numpy.polyfit(ds[::2] ** 2, golds[seed][::2], 2)
        missed = numpy.polyval(polynomial, ds[1::2] ** 2) - golds[seed][1::2]
        assert direct.left_out_errors(rows, seed, "quadratic") == pytest.approx((missed ** 2).mean() ** 0.5)


def test_frontier(ask):
    """Bug: the curve of the other reward, a share without SFT subtracted, errors that are added, seeds that mix."""
    curves = dict(score=(0.5, 1.5, 2.0, 2.25), gold=(0.2, 1.2, 1.8, 2.0))  # of the optimum at a KL of 0, 1, 2 and 3
    places = {"SFT": (0, 0.5, 0.2), "best of n": (0.5, 0.6, 0.3), "ppo": (1.5, 1.6, 1.45),
              "ppo on gold": (1.5, 1.7, 1.45), frontier.LONGER: (1.0, 1.0, 0.8), "dpo": (9.0, 9.0, 9.0),
              "ipo": (1.0, 1.0, 1.0)}

    def point(seed, quick, method, setting):
        kl, score, gold = places[method]
        if (seed, method) == (1, "ppo on gold"):
            kl = 9.0  # not judged, so seed 1 says nothing about time
        return dict(seed=seed, method=method, setting=setting, kl=kl, score=score + APART[seed],
                    gold=gold + APART[seed], score_se=0.03, gold_se=0.0)

    def reference(seed, quick):
        optimum = [{"seed": seed, "method": f"optimum of {reward}", "kl": kl, reward: value + APART[seed],
                    f"{reward}_se": 0.04} for reward, values in curves.items() for kl, value in enumerate(values)]
        return [point(seed, quick, "SFT", 0), point(seed, quick, "best of n", 2), *optimum]

    found = ask(frontier, 3, frontier_job=point, frontier_reference=reference)
    # the score's errors 0.04 and 0.03 make 0.05, and the curves are at 1.75 and 1.5; DPO is beyond their end
    assert found.values == {
        "under the curve of score": [1.85 - 1.7, 1.85 - 1.6, 1.85 - 1.7],
        "under the curve of gold": [1.5 + 0.08 - 1.45] * 3,
        "ppo close to the curve": [1.1 / 1.25 - 0.9] * 3, "ppo on gold close to the curve": [1.25 / 1.3 - 0.9] * 2,
        f"{frontier.LONGER} close to the curve": [0.6 - 0.9] * 3,
        "PPO on gold gains by twice the iterations": [0.6 - 1.25 / 1.3] * 2}
    rows = {(row["reward"], row["method"], row["setting"]): row for row in found.table}
    assert len(rows) == 2 * 8 and rows["gold", "dpo", 0.2]["judged"] == "0/3" and ("gold", "ipo", 0.1) in rows
    expected = dict(kl=1.5, value=1.6 + MEAN, curve=1.75 + MEAN, share=1.1 / 1.25)
    assert parts(rows["score", "ppo", 0.3], expected) == pytest.approx(expected)
    assert rows["score", "ppo", 0.3]["judged"] == "3/3"
    ends = [[(0, 0.5), (0.5, 0.6), (3, 2.25), (9, 9), (1, 1), (1.5, 1.6), (4, 1.7), (1, 1)],
            [(0, 0.2), (0.5, 0.3), (3, 2), (9, 9), (1, 1), (1.5, 1.45), (4, 1.45), (1, 0.8)]]
    assert found.ends == [[(x, y + MEAN) for x, y in lines] for lines in ends]


def test_robust(ask):
    """Bug: another n or arm than the claim's, a lost sign, the end for a KL of 5, seeds that mix, a peak for a jump."""
    def job(seed, quick, arm):
        i, apart = list(robust.ARMS).index(arm), APART[seed]
        rows = [dict(study="spread", seed=seed, arm=arm, correlation=0.1 * i + 0.01 * seed)]
        for j, how in enumerate(robust.REWARDS):
            rows += [dict(study="best of n", seed=seed, arm=arm, how=how, n=n, gold=apart * n / 64 + n * j * (1.0 + i))
                     for n in (16, 64, 256)]
        if arm == "annotators":
            rows += [dict(study="ppo", seed=seed, arm=arm, how=how, kl=2.0 * w, d=0.5 * w,
                          gold=apart + (j + 1) * (w if w < 3 else 0.5 * w))
                     for j, how in enumerate(robust.PPO_REWARDS) for w in range(5)]
        return rows

    found = ask(robust, 3, robust_arm=job)
    place = {how: j for j, how in enumerate(robust.REWARDS)}
    best = {"annotators: mean above single": ("mean", "single"), "annotators: WCO above mean": ("wco", "mean"),
            "bonus: WCO above mean": ("wco", "mean"), "annotators: WCO above pooled": ("wco", "pooled"),
            "flips: mean above WCO": ("mean", "wco")}
    arms = {name: 1.0 + list(robust.ARMS).index(name.split(":")[0]) for name in best}
    expected = {f"best of 64, {name}": [64 * arms[name] * (place[a] - place[b])] * 3 for name, (a, b) in best.items()}
    # between w = 2 and 3, at a KL of 4 and 6: gold 2 and 1.5 times j + 1; WCO is j = 3, the mean j = 2;
    # jumps of 0.5 and 0.5 times j + 1, in the second half
    expected |= {"the spread correlates with the error": [0, 0.01, 0.02], "PPO at KL 5: WCO above mean": [1.75] * 3,
                 "PPO at the end: WCO above mean": [2.0] * 3, "BRME at the end: lambda 0.5 above 1": [2.0] * 3,
                 "BRME: lambda 0.5 fluctuates less": [-0.5] * 3}
    assert found.values == expected
    rows = {(row["arm"], row["reward"]): row for row in found.table}
    assert len(rows) == 24 and "at KL 5" not in rows["flips", "wco"]
    expected = {"n 64": MEAN + 256, "se": ERROR, "at KL 5": MEAN + 7, "at the end": MEAN + 8, "its se": ERROR,
                "fluctuation": 2.0}
    assert parts(rows["annotators", "wco"], expected) == pytest.approx(expected)
    assert found.ends == [*[[(256, 4 * MEAN + 256 * i * j) for j in range(8)] for i in (1, 2, 3)],
                          [(2, MEAN + 2 * j) for j in (1, 2, 3, 4, 5, 6)]]
    assert "correlate by +0.01 (annotators), +0.11 (bonus), +0.21 (flips)" in found.texts[0]


def test_limits(ask):
    """Bug: a lost sign, seeds that mix, one subject for two, the number of labels for its logarithm, PPO for DPO."""
    def labels(seed, quick, n, flip):
        return dict(part="labels", seed=seed, labels=n, flip=flip, value=APART[seed] + 2 * math.log(n) - 3 * flip)

    def coverage(seed, quick, k):
        values = dict(labelled=APART[seed] + 1, unlabelled=APART[seed] + 0.5 * (k - 1))
        return [dict(part="coverage", seed=seed, subjects=k, side=side, value=values[side]) for side in limits.SIDES]

    def subject(seed, quick):
        return [dict(part="subject", seed=seed, subject=name, value=APART[seed] - lost)
                for name, lost in zip(limits.TESTED_ON, (0, 0.7))]

    def tax(seed, quick):
        return [dict(part="tax", seed=seed, policy=name, kl=1.5 + seed, value=APART[seed] - lost)
                for name, lost in (("sft", 0), ("ppo", 0.1), ("rloo", 0.3), ("dpo", -0.2), ("pretrained", 9))]

    found = ask(limits, 3, limits_labels=labels, limits_coverage=coverage, limits_subject=subject, limits_tax=tax)
    for claim, value in zip(found.claims.values(), (2, 3, 1, 0.5, 0.7, 0.1, 0.3, -0.2), strict=True):
        assert claim.values == pytest.approx([value] * 3), claim.name
    rows = {(row["part"], row["setting"]): row["value"] for row in found.table}
    assert len(rows) == 6 + 8 + 2 + 5 and found.claims["tax: RLOO costs likelihood"].why == "KL 2.5"
    assert rows["labels", "labels 2000, flip 0.25"] == pytest.approx(MEAN + 2 * math.log(2000) - 0.75)
    assert found.table[0]["se"] == pytest.approx(ERROR)
    most = MEAN + 2 * math.log(2000)
    assert found.ends == [[(2000, most)], [(0.4, most - 1.2)], [(4, MEAN + 1), (4, MEAN + 1.5)]]


def test_limits_exact(ask):
    """
    Bug: a lost sign of Spearman, means over seeds, a best beta that is an end or tested on its own seeds, an optimum
    never reached.
    """
    def job(seed, iterations):
        assert iterations == 300
        first = seed < 3  # these choose the beta, the others are tested
        learned = [9.0, 5.0, 1.0, 0, 0, 0, 0] if first else [0.0, 1.0, 3.0, 0, 0, 0, 2.0]
        sign = 1 if first else -1
        rows = [dict(part="coverage", x=x, labelled=0.0, unlabelled=-sign * x, gap=-x) for x in (0.0, 1.0, 2.0)]
        rows += [dict(part="beta", x=x, learned=y, gap=-x, oracle=x) for x, y in zip(limits_exact.BETAS, learned)]
        rows += [dict(part="annotators", x=x, kept=sign * x) for x in (0.0, 1.0, 2.0)]
        rows += [dict(part="dense", x=x, episodes=n, curve=[0.0, share])
                 for x, n, share in zip(("sparse", "dense"), (64, 32) if first else (None, 19200), (0.2, 0.9))]
        return [dict(row, seed=seed) for row in rows]

    found = ask(limits_exact, 5, limits_job=job)
    # the first seeds choose the second beta, the best between the ends, where the others have 1, and 2 at their end;
    # what is never reached counts as twice the 32 episodes of each iteration
    expected = [[0.5] * 3 + [-1.5] * 2, [0.5] * 5, [0.5] * 5, [-1.5] * 5, [-1.0] * 2, [1] * 3 + [0] * 2,
                [-1.5] * 3 + [0.5] * 2]
    for claim, right in zip(found.claims.values(), expected, strict=True):
        assert claim.values == pytest.approx(right), claim.name
    assert "0.03" in found.claims["beta: best inside"].why
    assert found.ends == [[(2, 0), (2, -0.4), (2, -2)], [(10, 0.8), (10, 10), (10, -10)], [(2, 0.4)],
                          [(32, 0.2), (32, 0.9)]]  # each column against its settings; shares after 32 episodes
    assert found.panels[0]["lines"][1]["yerr"][2] == pytest.approx(mean_se([2, 2, 2, -2, -2])[1])


def test_robust_exact(ask):
    """Bug: a gain over one of the five, a lost sign, the weights exchanged, the errors of another kind."""
    def job(error, seeds, steps):
        def golds(shift):
            return [10.0 * i + 0.1 * shift for i in range(seeds)]

        assert steps == 3000
        cell = {"over": 2, "under": -3, "both": -4, "shared": -1e-3}[error]
        found = {("expectation", weight): golds(-abs(cell) * (1 - weight)) for weight in robust_exact.WEIGHTS}
        found |= {("cell", weight): golds(cell * (1 - weight)) for weight in robust_exact.WEIGHTS}
        return {**found, ("one of five", None): golds(7)}, 1e-3 if error == "over" else 1e-4

    found = ask(robust_exact, 20, robust_job=job)
    for claim, value in zip(found.claims.values(), (0.2, -0.2, 0.3, 0.4), strict=True):
        assert claim.values == pytest.approx([value] * 20), claim.name
    gains = {(row["error"], row["minimum_of"], row["weight"]): row["gain"] for row in found.table}
    assert len(gains) == 4 * 13 and gains["under", "cell", 0.0] == pytest.approx(-0.3)
    assert gains["both", "one of five", None] == pytest.approx(0.7)
    assert found.texts[1].endswith("changes by at most 1e-04; the solver is within 1e-03 of the optimum")
    _, line = next(panel["lines"] for panel in found.panels if panel["title"] == "errors: under")
    assert line["y"] == pytest.approx([95 - 0.3 * (1 - weight) for weight in robust_exact.WEIGHTS])
    assert line["yerr"] == pytest.approx([mean_se(range(0, 200, 10))[1]] * 6)


def test_tree(ask):
    """Bug: half of the effect counts, start and end exchanged, one reference is enough, no control, betas exchanged."""
    starts = (0.3, 0.1, 0.6)
    ends = [(0.2, 0.1, 0.7), (0.2, 0.25, 0.55), (0.34, 0.05, 0.61), (0.4, 0.02, 0.58)]

    def job(policy, kind, beta, seeds, steps):
        assert steps == 1000
        shown = numpy.array([[starts] * seeds, ends * (seeds // 4)])
        tracks = dict.fromkeys(itertools.product(tree.PAIRS, tree.REFERENCES), numpy.array([[starts] * seeds] * 2))
        if (policy, kind) == ("rnn", "dpo") and beta < 0.5:
            tracks[tree.ONE_APART, "random"] = tracks[tree.PAIRS[1], "random"] = shown
            tracks[tree.ONE_APART, tree.FITTED] = shown[:, ::-1]  # other seeds
        if (policy, kind, beta) == ("table", "dpo", 0.01):
            tracks[tree.ONE_APART, tree.FITTED] = numpy.array([[starts] * seeds, ends[:1] * seeds])  # the control fails
        return tracks

    found = ask(tree, 20, tree_job=job)
    shares = [x - 0.25 for x in (1, 0, 0, 0)] * 5
    assert found.values == {"effect, reference random": shares, f"effect, reference {tree.FITTED}": shares[::-1],
                            "most at small beta": [0.5, 0, 0, 0.25] * 5}
    assert found.claims["effect, reference random"].why.startswith("with a table the other mass rises in 100% of seeds")
    assert found.panels[-1]["lines"][0]["y"] == [0.25, 0.25, 0]  # of the RNN, against beta
    assert found.ends[:2] == [[(20, p) for p in (0.285, 0.105, 0.61)], [(20, p) for p in ends[0]]]
    row = next(row for row in found.table if row["policy"] == "rnn" and row["both"] > 0)
    assert (row["others_rise"], row["both"], len(found.table)) == (0.5, 0.25, 2 * 3 * 3 * 4)


def test_estimators(ask):
    """Bug: equal seconds are equal episodes, a lost sign, the wrong two methods, the start for the end."""
    def curve(seed, quick, reward, method):
        pace = {"ppo": 10.0, "dr_grpo": 30.0}.get(method, 5.0)
        gain = {"rloo": 0.03, "dr_grpo": 0.1}.get(method, 0.0) * (1 if reward == "model" else -1)
        return [dict(seed=seed, reward=reward, method=method, window=w, kl=1.0 + w, seconds=pace * (w + 1),
                     share=APART[seed] * (w > 0) + 0.2 * w + gain) for w in range(4)]

    def rejection(seed, quick):
        return [dict(seed=seed, pick=pick, score=APART[seed] + 0.3 * (pick == "best"), score_se=0, gold=0, kl=0)
                for pick in ("best", "random")]

    found = ask(estimators, 5, curve_job=curve, rejection_job=rejection)
    # at 20 of PPO's 40 seconds PPO is at w = 1, and RLOO at w = 3
    for claim, value in zip(found.claims.values(), (0.08, 0.43, 0.1, 0.02, 0.37, -0.1, 0.3), strict=True):
        assert claim.values == pytest.approx([value] * 5), claim.name
    rows = {(row["reward"], row["method"]): row for row in found.table if "method" in row}
    expected = dict(share=sum(APART) / 5 + 0.63, share_se=mean_se(APART)[1], kl=4.0, seconds=20.0)
    assert parts(rows["model", "rloo"], expected) == pytest.approx(expected) and len(rows) == 8
    assert found.ends == [[(3, 1.2 + sign * gain) for gain in (0, 0.03, 0, 0.1)] for sign in (1, -1)]
    assert len(found.rows) == 5 * (2 * 4 * 4 + 2)
    assert estimators.share_at(curve(2, False, "model", "dr_grpo"), 20) == pytest.approx(0.1)  # no window has ended
