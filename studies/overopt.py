"""
Over-optimisation of a reward model: what the true reward does while a policy climbs a learned one. See `overopt`.

Letters: M prompts, N samples of a prompt, S seeds, W windows of iterations (for best-of-n: values of n).
"""

import itertools
import math

from evaluate import best_of_n, best_of_n_kl
from reward import score_batches
from studies import common, lab
from studies.lab import Claim, column, curves_by_seed, judge, mean_curve, panel, parallel, publish, select, table

COLUMNS = ["method", "labels", "beta", "peak_gold", "peak_se", "peak_d", "end_gold", "end_se", "end_d", "end_score",
           "rmse_law", "rmse_rival"]
NEAR, FAR = 2.0, 5.0  # d between which gold falls
GRID = 8  # steps of the grid of d on which two curves are compared


def overopt(seeds, quick, out):
    """
    Question: what does the true reward do while a policy climbs a learned one?

    Claim: Gao et al. 2023, arXiv:2210.10760. In words, with the criteria: docs/studies.md#overopt. PPO has beta 0 at
    three numbers of labels, and at the fewest two other betas. The learning rate is 3e-4, because at 1e-3 the first
    window was already beyond the peak.
    """
    labels = (50, 100, 200) if quick else (300, 1000, 4000)
    betas = (0.0, 0.2) if quick else (0.0, 0.03, 0.1)
    settings = [("ppo", n, 0.0) for n in labels] + [("ppo", labels[0], beta) for beta in betas[1:]]
    settings += [("best of n", n, None) for n in labels]

    ppo_jobs = [(seed, quick, n, beta) for method, n, beta in settings if method == "ppo" for seed in range(seeds)]
    bon_jobs = [(seed, quick, n) for n in labels for seed in range(seeds)]
    ppo = list(itertools.chain(*parallel(overopt_ppo, ppo_jobs, out)))
    best = list(itertools.chain(*parallel(overopt_bon, bon_jobs, out)))
    summary = [summarise(ppo + best, *setting) for setting in settings]
    claims = make_claims(ppo, labels, betas[1:])
    panels = [panel("PPO, beta 0", select(ppo, beta=0.0), "d", "gold", "labels"),
              panel("PPO, beta 0: what it maximises", select(ppo, beta=0.0), "d", "score", "labels"),
              panel(f"PPO, {labels[0]} labels", select(ppo, labels=labels[0]), "d", "gold", "beta"),
              panel("best of n", best, "d", "gold", "labels")]
    return publish(out, ppo + best, table(summary, COLUMNS), judge(claims, quick), panels)


# ---- jobs -----------------------------------------------------------------------------------------

def overopt_ppo(seed, quick, labels, beta):
    """Train with PPO on a reward model of so many labels. Returns one row for each window of iterations."""
    run = common.base(seed, quick)
    reward_model = common.fit(run, common.labelled(run, labels), seed)
    _, logged = common.optimise(run, reward_model, seed, beta=beta, ppo_iterations=5 if quick else 30, ppo_lr=3e-4)
    where = dict(method="ppo", seed=seed, labels=labels, beta=beta)
    return [{**where, **window} for window in common.windows(logged, 1 if quick else 2)]


def overopt_bon(seed, quick, labels):
    """Choose the best of n SFT samples by a reward model of so many labels. Returns one row for each n."""
    run = common.base(seed, quick)
    M, N = (8, 16) if quick else (48, 64)
    rollouts, gold = common.reference_samples(run, M, N, seed)                                # gold (M, N)
    reward_model = common.fit(run, common.labelled(run, labels), seed)
    score = score_batches(reward_model, rollouts).view(M, N)
    where = dict(method="best of n", seed=seed, labels=labels, beta=None)
    return [dict(where, window=w, d=math.sqrt(best_of_n_kl(n)), gold=best_of_n(score, gold, n).mean().item(),
                 score=best_of_n(score, score, n).mean().item()) for w, n in enumerate(common.powers(N))]


# ---- summary --------------------------------------------------------------------------------------

def summarise(rows, method, labels, beta):
    """The curves of one setting as a row of the table."""
    where = dict(method=method, labels=labels, beta=beta)
    (gold, gold_se), (score, _), (d, _) = [mean_curve(curves_by_seed(rows, name, **where))
                                           for name in ("gold", "score", "d")]                # (W,) each
    peak = gold.index(max(gold))
    laws = ("rl", "bon") if method == "ppo" else ("bon", "rl")
    law, rival = [lab.law_error(d, gold, each, lab.fit_law(d, gold, each)) for each in laws]
    return dict(where, peak_gold=gold[peak], peak_se=gold_se[peak], peak_d=d[peak], end_gold=gold[-1],
                end_se=gold_se[-1], end_d=d[-1], end_score=score[-1], rmse_law=law, rmse_rival=rival)


def falls(rows, **where):
    """Gold at d = 2 minus gold at d = 5, one for each seed. A curve that ends before has its end's gold."""
    curves = zip(curves_by_seed(rows, "d", **where), curves_by_seed(rows, "gold", **where))
    return [common.interpolate(NEAR, d, gold) - common.interpolate(FAR, d, gold) for d, gold in curves]


# ---- criteria -------------------------------------------------------------------------------------

def make_claims(ppo, labels, betas):
    """The criteria, as claims about one number for each seed. ppo: its rows; betas: all but 0."""
    fewest = dict(labels=labels[0], beta=0.0)
    scores = curves_by_seed(ppo, "score", **fewest)                                           # (S, W)
    golds = [curves_by_seed(ppo, "gold", labels=n, beta=0.0) for n in labels]                 # (labels, S, W)
    peaks = [[max(curve) for curve in seed] for seed in zip(*golds)]
    claims = [Claim("the proxy rises", [lab.spearman(range(len(curve)), curve) - 0.8 for curve in scores]),
              Claim("gold falls", falls(ppo, **fewest)),
              Claim("more labels, higher peak", [lab.slope([math.log(n) for n in labels], peak) for peak in peaks])]
    for beta in betas:
        gaps = [gap_at_equal_d(ppo, seed, labels[0], beta) for seed in range(len(scores))]
        known = [gap for gap in gaps if gap is not None]
        why = f"{len(gaps) - len(known)} seeds share no d"
        claims.append(Claim(f"one curve, beta {beta} against 0", known or [0.0], why, within=0.1))
    return claims


def gap_at_equal_d(ppo, seed, labels, beta):
    """Average gold of this beta minus gold of beta 0 over the d that both curves have. None if they share no d."""
    curves = [select(ppo, seed=seed, labels=labels, beta=each) for each in (0.0, beta)]
    (d0, gold0), (d1, gold1) = [(column(curve, "d"), column(curve, "gold")) for curve in curves]
    low, high = max(min(d0), min(d1)), min(max(d0), max(d1))
    if low >= high:
        return None
    grid = [low + (high - low) * i / GRID for i in range(GRID + 1)]
    gaps = [common.interpolate(d, d1, gold1) - common.interpolate(d, d0, gold0) for d in grid]
    return sum(gaps) / len(gaps)
