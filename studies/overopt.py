"""
Over-optimisation of a reward model: what the true reward does while a policy climbs a learned one. See `overopt`.

Letters: M prompts, N samples of a prompt, S seeds, W windows of iterations (for best-of-n: values of n).
"""

import itertools
import math

from evaluate import best_of_n, best_of_n_kl
from reward import score_batches
from studies.common import (
    base,
    column,
    curves_by_seed,
    fit,
    interpolate,
    labelled,
    mean_curve,
    optimise,
    peak_and_fall,
    powers,
    reference_samples,
    ruled,
    select,
    windows,
)
from studies.lab import fit_law, mean_se, parallel, publish, spearman, table

COLUMNS = ["method", "labels", "beta", "peak_gold", "peak_se", "peak_d", "end_gold", "end_se", "end_d", "end_score",
           "fall", "fall_se", "rmse_law", "rmse_rival"]
GRID = 8  # steps of the grid of d on which two curves are compared


def overopt(seeds, quick, out):
    """
    Question: what does the true reward do while a policy climbs a learned one?

    Claim (Gao et al. 2023, arXiv:2210.10760): the proxy rises; gold rises and then falls with d = sqrt(KL). Gold
    follows d (alpha - beta log d) for RL and d (alpha - beta d) for best-of-n. Reward models with more labels are
    over-optimised later. A KL penalty does not move the curve of gold against KL, it only stops earlier on it.
    (The learning rate is 3e-4, because at 1e-3 the first window was already beyond the peak.)

    Criterion, for PPO with beta 0: reproduced if, at the fewest labels, (a) the proxy rises over the windows (Spearman
    above 0.8), (b) gold peaks inside and falls from its peak to the end by more than 2 standard errors over seeds, and
    (c) each larger number of labels has a peak that is later in d or higher in gold.

    Apart from that, one curve: over the range of d that both have, gold of beta 0 and of each other beta differs by
    less than 2 standard errors in the mean, and the error is below 0.1, or it cannot be told.
    """
    small = quick or seeds < 3
    if quick:
        labels = (50, 100, 200)
        betas = (0.0, 0.2)
    else:
        labels = (300, 1000, 4000)
        betas = (0.0, 0.03, 0.1)
    ppo_settings = [("ppo", n, 0.0) for n in labels] + [("ppo", labels[0], beta) for beta in betas[1:]]
    bon_settings = [("best of n", n, None) for n in labels]

    rows = run_jobs(ppo_settings, bon_settings, seeds, quick)
    summary = [summarise(rows, seeds, *setting) for setting in ppo_settings + bon_settings]

    verdicts = [judge_overoptimisation(summary[:len(labels)], small)]
    for beta in betas[1:]:
        verdicts.append(judge_one_curve(rows, seeds, labels[0], beta, small))
    return publish(out, rows, table(summary, COLUMNS), verdicts, draw(summary, labels))


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def run_jobs(ppo_settings, bon_settings, seeds, quick):
    """Run every setting for every seed. Returns one row for each point of each curve."""
    ppo_jobs = [(seed, quick, n, beta) for _, n, beta in ppo_settings for seed in range(seeds)]
    bon_jobs = [(seed, quick, n) for _, n, _ in bon_settings for seed in range(seeds)]
    results = parallel(overopt_ppo, ppo_jobs) + parallel(overopt_bon, bon_jobs)
    return list(itertools.chain.from_iterable(results))


def overopt_ppo(seed, quick, labels, beta):
    """Train with PPO on a reward model of so many labels. Returns one row for each window of iterations."""
    run = base(seed, quick)
    reward_model = fit(run, labelled(run, labels), seed)
    _, logged = optimise(run, reward_model, beta, 5 if quick else 30, seed, lr=3e-4)
    size = 1 if quick else 2
    kl = windows(logged, "kl", size)
    gold = windows(logged, "gold", size)
    score = windows(logged, "score", size)
    length = windows(logged, "length", size)
    rows = []
    for w in range(len(kl)):
        d = math.sqrt(max(kl[w], 0.0))  # rounding can make a KL of 0 negative
        rows.append(dict(method="ppo", seed=seed, labels=labels, beta=beta, window=w, d=d, gold=gold[w],
                         score=score[w], length=length[w]))
    return rows


def overopt_bon(seed, quick, labels):
    """Choose the best of n SFT samples by a reward model of so many labels. Returns one row for each n."""
    run = base(seed, quick)
    M, N = (8, 16) if quick else (48, 64)
    rollouts, gold = reference_samples(run, M, N, seed)                                       # gold (M, N)
    reward_model = fit(run, labelled(run, labels), seed)
    score = score_batches(reward_model, rollouts).view(M, N)
    rows = []
    for w, n in enumerate(powers(N)):
        rows.append(dict(method="best of n", seed=seed, labels=labels, beta=None, window=w,
                         d=math.sqrt(best_of_n_kl(n)), gold=best_of_n(score, gold, n).mean().item(),
                         score=best_of_n(score, score, n).mean().item()))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# summary

def summarise(rows, seeds, method, labels, beta):
    """
    Summarise the curves of one setting as a row of the table.

    It also keeps what the criteria need (inside, rank) and what the picture needs (the mean curves).
    """
    where = dict(method=method, labels=labels, beta=beta)
    gold_by_seed = curves_by_seed(rows, "gold", seeds, **where)                               # (S, W)
    gold, gold_se = mean_curve(gold_by_seed)                                                  # (W,) each
    score, _ = mean_curve(curves_by_seed(rows, "score", seeds, **where))
    d, _ = mean_curve(curves_by_seed(rows, "d", seeds, **where))
    peak, fall, fall_se = peak_and_fall(gold_by_seed)
    law, rival = ("rl", "bon") if method == "ppo" else ("bon", "rl")
    _, rmse_law = fit_law(d, gold, law)
    _, rmse_rival = fit_law(d, gold, rival)
    return dict(
        method=method, labels=labels, beta=beta,
        peak_gold=gold[peak], peak_se=gold_se[peak], peak_d=d[peak],
        end_gold=gold[-1], end_se=gold_se[-1], end_d=d[-1], end_score=score[-1],
        fall=fall, fall_se=fall_se, rmse_law=rmse_law, rmse_rival=rmse_rival,
        inside=0 < peak < len(gold) - 1,
        rank=spearman(range(len(score)), score),
        gold=gold, gold_se=gold_se, score=score, d=d,
    )


# ---------------------------------------------------------------------------------------------------------------------
# criteria

def judge_overoptimisation(summary, small):
    """Judge the main criterion. summary: one row for each number of labels, the fewest first, PPO with beta 0."""
    fewest = summary[0]
    rises = fewest["rank"] > 0.8
    falls = fewest["inside"] and fewest["fall"] > 2 * fewest["fall_se"]
    later = True
    for fewer, more in zip(summary, summary[1:]):
        if more["peak_d"] <= fewer["peak_d"] and more["peak_gold"] <= fewer["peak_gold"]:
            later = False
    why = (f"the proxy rises: {rises}; gold falls by {fewest['fall']:.2f} ± {fewest['fall_se']:.2f} from a peak at "
           f"d = {fewest['peak_d']:.2f}: {falls}; more labels, later or higher: {later}")
    return ruled(small, rises and falls and later, why)


def judge_one_curve(rows, seeds, labels, beta, small):
    """Judge whether PPO with this beta and with beta 0 are on one curve of gold against d."""
    gaps = []
    for seed in range(seeds):
        gap = gap_at_equal_d(rows, seed, labels, beta)
        if gap is not None:
            gaps.append(gap)
    mean, error = mean_se(gaps) if gaps else (math.nan, math.nan)
    equal = abs(mean) < 2 * error
    held = equal
    if len(gaps) < seeds:  # the curves of some seed have no d in common
        held = None
    if equal and error >= 0.1:  # too noisy to see a difference
        held = None
    why = f"gold differs by {mean:+.2f} ± {error:.2f} at equal d"
    return f"one curve, beta {beta} against 0: " + ruled(small, held, why)


def gap_at_equal_d(rows, seed, labels, beta):
    """Average gold of this beta minus gold of beta 0 over the d that both curves have. None if they share no d."""
    d0, gold0 = curve_of(rows, seed, labels, 0.0)
    d1, gold1 = curve_of(rows, seed, labels, beta)
    low = max(min(d0), min(d1))
    high = min(max(d0), max(d1))
    if low >= high:
        return None
    gaps = []
    for i in range(GRID + 1):
        d = low + (high - low) * i / GRID
        gaps.append(interpolate(d, d1, gold1) - interpolate(d, d0, gold0))
    return sum(gaps) / len(gaps)


def curve_of(rows, seed, labels, beta):
    """Return d and gold of the windows of one PPO run."""
    points = select(rows, method="ppo", seed=seed, labels=labels, beta=beta)
    return column(points, "d"), column(points, "gold")


# ---------------------------------------------------------------------------------------------------------------------
# picture

def draw(summary, labels):
    """Make the panels: PPO by number of labels, PPO by beta, and best of n."""
    by_labels = panel("PPO, beta 0")
    by_beta = panel(f"PPO, {labels[0]} labels")
    best = panel("best of n")
    for row in summary:
        if row["method"] == "best of n":
            add_curves(best, f"{row['labels']} labels", row)
        else:
            if row["beta"] == 0.0:
                add_curves(by_labels, f"{row['labels']} labels", row)
            if row["labels"] == labels[0]:
                add_curves(by_beta, f"beta {row['beta']}", row)
    return [by_labels, by_beta, best]


def panel(title):
    return dict(title=title, xlabel="sqrt(KL)", ylabel="gold (solid), score (dashed)", lines=[])


def add_curves(panel, label, row):
    color = f"C{len(panel['lines']) // 2}"  # gold and score of a setting have one colour
    panel["lines"].append(dict(label=label, x=row["d"], y=row["gold"], yerr=row["gold_se"], style=color + "-"))
    panel["lines"].append(dict(label="", x=row["d"], y=row["score"], style=color + "--"))
