"""
The frontier: how much reward each method gets for its KL, compared with the best that is possible. See `frontier`.

Letters: B batch, M prompts, N samples of a prompt.
"""

import itertools
import math
from dataclasses import replace

from evaluate import best_of_n, best_of_n_kl, optimum, optimum_mean, standard_error
from pipeline.scores import make_scorer
from reward import score_batches
from studies import common
from studies.lab import Claim, column, judge, mean_se, panel, parallel, publish, select, table

REWARDS = ("score", "gold")
LONGER = "ppo on gold, longer"  # twice the iterations
PPO_REWARD = {"ppo": "score", "ppo on gold": "gold", LONGER: "gold"}  # what each kind of PPO was trained on
COLUMNS = ["reward", "method", "setting", "kl", "value", "value_se", "curve", "share", "share_se", "judged"]


def frontier(seeds, quick, out):
    """
    Question: how much reward does each method get for the KL that it spends, and how far is it from the best possible?

    Claim: Ziegler et al. 2019; Rafailov et al. 2023, Figure 2. In words, with the criteria: docs/studies.md#frontier.
    Points beyond the curve's last reliable KL (effective sample size 100) are reported and not judged. PPO has beta
    0.3, so that it ends where the curve is reliable. With twice the iterations it sees as many episodes as in
    minirlhf.py: if its share on gold is larger then, time was missing; if not, it comes to rest below the curve.
    """
    settings = {"dpo": (0.2, 0.5), "ipo": (0.1, 0.5), **dict.fromkeys(PPO_REWARD, (0.3,))}
    if quick:
        settings = {method: values[-1:] for method, values in settings.items()}
    jobs = [(seed, quick, method, value) for method in settings for value in settings[method] for seed in range(seeds)]
    rows = list(itertools.chain(*parallel(frontier_reference, [(seed, quick) for seed in range(seeds)], out)))
    rows += parallel(frontier_job, jobs, out)

    points, summary, panels = [], [], []
    for reward in REWARDS:
        for seed in range(seeds):
            points += compare(rows, reward, seed)
        for method in ("best of n", *settings):
            summary += summarise(points, reward, method)
        known = [row for row in rows if reward in row]  # not the curve of the other reward
        panels.append(panel(f"{reward} for its KL", known, "kl", reward, "method"))
    return publish(out, rows, table(summary, COLUMNS), judge(make_claims(points), quick), panels)


# ---- jobs -----------------------------------------------------------------------------------------

def frontier_job(seed, quick, method, setting):
    """Train one policy and measure it by the reward model's score and by gold. setting: its beta."""
    run = common.base(seed, quick)
    sft, reward_model = run.load_network("sft"), run.load_network("reward")
    if method in PPO_REWARD:
        run.config = replace(run.config, reward_from="gold" if PPO_REWARD[method] == "gold" else "model")
        iterations = run.config.ppo_iterations * (2 if method == LONGER else 1)
        policy, _ = common.optimise(run, make_scorer(run), seed, critic=reward_model, beta=setting,
                                    ppo_iterations=iterations)
    else:
        policy = common.fit_policy(run, run.pairs[0], seed, dpo_kind=method, dpo_beta=setting)
    measured = common.judge(run, policy, sft, 32 if quick else 512, seed, reward_model)
    return dict(seed=seed, method=method, setting=setting, **measured)


def frontier_reference(seed, quick):
    """Compute what follows from SFT samples alone: SFT itself, best of n, and the curves of the optimum."""
    run = common.base(seed, quick)
    M, N = (16, 16) if quick else (256, 64)
    rollouts, gold = common.reference_samples(run, M, N, seed)                                # gold (M, N)
    score = score_batches(run.load_network("reward"), rollouts).view(M, N)
    rows = [reference_row(seed, "SFT", 0, 0.0, score.mean(dim=1), gold.mean(dim=1))]
    for n in common.powers(N // 2)[1:]:  # without n = 1, which is SFT
        rows.append(reference_row(seed, "best of n", n, best_of_n_kl(n), best_of_n(score, score, n),
                                  best_of_n(score, gold, n)))
    least_ess = 10 if quick else 100
    return rows + optimum_rows(seed, "score", score, least_ess) + optimum_rows(seed, "gold", gold, least_ess)


def reference_row(seed, method, setting, kl, score, gold):
    """A point of the frontier, from the mean score and gold of each prompt, (M,) each."""
    return dict(seed=seed, method=method, setting=setting, kl=kl, score=score.mean().item(), gold=gold.mean().item(),
                score_se=standard_error(score), gold_se=standard_error(gold))


def optimum_rows(seed, name, reward, least_ess):
    """The curve of the optimum of one reward (M, N): a row for each beta with enough effective samples."""
    rows = []
    for i in range(40):
        beta = 8 * 0.85 ** i
        objective, ess = optimum(reward, beta)
        if ess < least_ess:
            continue
        value = optimum_mean(reward, reward, beta)
        variance = optimum_mean((reward - value) ** 2, reward, beta)
        error = math.sqrt(variance / ess)  # the curve is an estimate too: the error of a weighted mean
        kl = (value - objective) / beta    # because objective = value - beta KL
        rows.append({"seed": seed, "method": f"optimum of {name}", "setting": beta, "kl": kl, name: value,
                     f"{name}_se": error})
    return rows


# ---- points and summary ---------------------------------------------------------------------------

def compare(rows, reward, seed):
    """Compare each policy of one seed with the curve of one reward at equal KL. Returns one dict for each policy."""
    curve = select(rows, seed=seed, method=f"optimum of {reward}")
    curve_kl, curve_value, curve_se = [column(curve, name) for name in ("kl", reward, f"{reward}_se")]
    sft = select(rows, seed=seed, method="SFT")[0][reward]
    points = []
    for row in select(rows, seed=seed):
        if row["method"] == "SFT" or row["method"].startswith("optimum"):
            continue
        kl, value = row["kl"], row[reward]
        best = common.interpolate(kl, curve_kl, curve_value)
        error = math.hypot(common.interpolate(kl, curve_kl, curve_se), row[f"{reward}_se"])
        points.append(dict(reward=reward, method=row["method"], setting=row["setting"], seed=seed, kl=kl, value=value,
                           curve=best, inside=kl <= max(curve_kl), room=best + 2 * error - value,
                           share=(value - sft) / (best - sft)))
    return points


def summarise(points, reward, method):
    """Average the points of a method over seeds. Returns a row of the table for each of its settings."""
    rows = []
    for setting in sorted({point["setting"] for point in points if point["method"] == method}):
        chosen = select(points, reward=reward, method=method, setting=setting)
        row = dict(reward=reward, method=method, setting=setting)
        for name in ("kl", "value", "curve", "share"):
            row[name], row[f"{name}_se"] = mean_se(column(chosen, name))
        rows.append(dict(row, judged=f"{sum(column(chosen, 'inside'))}/{len(chosen)}"))
    return rows


# ---- criterion ------------------------------------------------------------------------------------

def make_claims(points):
    """The criteria, as claims about one number for each seed."""
    judged = select(points, inside=True)
    seeds = sorted({point["seed"] for point in judged})
    claims = [Claim(f"under the curve of {reward}", [min(column(judged, "room", reward=reward, seed=seed))
                                                      for seed in seeds]) for reward in REWARDS]
    shares = {method: {point["seed"]: point["share"] for point in select(judged, reward=reward, method=method)}
              for method, reward in PPO_REWARD.items()}
    for method, by_seed in shares.items():
        claims.append(Claim(f"{method} close to the curve", [share - 0.9 for share in by_seed.values()] or [0.0]))
    gains = [shares[LONGER][seed] - share for seed, share in shares["ppo on gold"].items() if seed in shares[LONGER]]
    return claims + [Claim("PPO on gold gains by twice the iterations", gains or [0.0])]
