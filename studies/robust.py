"""
Robust rewards: do rewards that know where they are unsure resist over-optimisation? See `robust`.

Letters: M prompts, N samples of a prompt, k members, S seeds, W windows of iterations.
"""

import itertools
import random
from dataclasses import replace

import torch

from evaluate import best_of_n, spread_and_error
from reward import label_pairs, score_batches
from robust import RobustConfig, member_pairs, two_opinions
from studies import common
from studies.lab import Claim, column, curves_by_seed, judge, mean_se, paired, panel, parallel, publish, select, table
from tokenizer import decode

MEMBERS = 5
VERDICTS = ("recommend it", "come back", "do it again", "complain", "warn people")
WORDS = ("superb", "clever", "solid", "charming", "fresh")
ARMS = {  # each annotator over-scores one verdict by 2 deviations of gold, or one word by 4, or flips a quarter
    "annotators": dict(bias=",".join(f"phrase:{phrase}=2" for phrase in VERDICTS)),
    "bonus": dict(bias=",".join(f"phrase:{word}=4" for word in WORDS)),
    "flips": dict(flip=0.25)}
REWARDS = ("single", "pooled", "mean", "half", "wco", "uwo", "brme 1.0", "brme 0.5")
PPO_REWARDS = ("single", "pooled", "mean", "wco", "brme 1.0", "brme 0.5")
LAMBDAS = {"mean": ("ensemble", 1.0), "half": ("ensemble", 0.5), "wco": ("ensemble", 0.0), "uwo": ("uwo", 0.5),
           "brme 1.0": ("brme", 1.0), "brme 0.5": ("brme", 0.5)}
KL = 5.0  # nats at which runs of PPO are compared
COLUMNS = ["arm", "reward", "n 16", "n 64", "n 256", "se", "at KL 5", "at the end", "its se", "fluctuation"]


def robust(seeds, quick, out):
    """
    Question: does a reward that knows its own uncertainty resist over-optimisation?

    Claims: Coste et al. 2024, arXiv:2310.02743; Yan et al. 2024, arXiv:2409.15360; Eisenstein et al. 2023. In words,
    with the criteria: docs/studies.md#robust. Five annotators label 700 pairs each. `single` is a model of one
    annotator's labels, the mean over five. The honest baseline is `pooled`: one model of all 3,500 labels. The members
    of the ensembles learn from one annotator each. The heads of BRME have their own last blocks, and learn the pooled
    model's scores; they are fitted in the first arm only.
    """
    jobs = [(seed, quick, arm) for arm in ARMS for seed in range(seeds)]
    rows = list(itertools.chain(*parallel(robust_arm, jobs, out)))
    summary = [summarise(rows, arm, how) for arm in ARMS for how in REWARDS if select(rows, arm=arm, how=how)]
    text = table(summary, COLUMNS) + "\n\n" + describe_spread(rows)
    panels = [panel(f"best of n, {arm}", select(rows, study="best of n", arm=arm), "n", "gold", "how", "log")
              for arm in ARMS]
    panels.append(panel("PPO, annotators", select(rows, study="ppo"), "d", "gold", "how"))
    return publish(out, rows, text, judge(make_claims(rows), quick), panels)


# ---- jobs -----------------------------------------------------------------------------------------

def annotated(run, n, seed, **settings):
    """The first n training pairs, labelled again by five annotators with these settings."""
    pairs = run.pairs[0][:n]
    responses = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    gold = [value for pair in pairs for value in pair["gold"]]
    texts = [decode(run.tokenizer, response) for response in responses]
    config = replace(run.config, annotators=MEMBERS, **{"bias": "", "flip": 0.0, **settings})
    return label_pairs([pair["prompt"] for pair in pairs], responses, gold, config, random.Random(seed), texts)


def fit_rewards(run, arm, n, seed):
    """The rewards of an arm: {"pooled": a model, "ensemble": a robust reward}, and for `annotators` "brme", another."""
    pairs = annotated(run, n, seed, **ARMS[arm])
    shares = [[pair for pair in pairs if pair["annotator"] == i] for i in range(MEMBERS)]
    rewards = dict(pooled=common.fit(run, pairs, seed), ensemble=common.fit_robust(run, "ensemble", shares, seed))
    if arm == "annotators":  # no claim about BRME is about the other arms
        heads = member_pairs(pairs, "brme", RobustConfig(members=MEMBERS), seed)
        rewards["brme"] = common.fit_robust(run, "brme", heads, seed, rewards["pooled"])
    return rewards


def robust_arm(seed, quick, arm):
    """Fit all rewards of an arm and optimise them: rows of best of n and of the spread, for `annotators` of PPO too."""
    run = common.base(seed, quick)
    rewards = fit_rewards(run, arm, 120 if quick else 3500, seed)
    rows = best_rows(run, rewards, quick, seed)
    if arm == "annotators":
        for how in PPO_REWARDS:
            rows += ppo_rows(run, rewards, how, quick, seed)
    return [dict(row, seed=seed, arm=arm) for row in rows]


def answers_of(reward, rollouts):
    """The members' answers to all samples: means (k, M N), and for brme their standard deviations, else None."""
    means, stds = zip(*[reward.answers(rollout) for rollout in rollouts])
    return torch.cat(means, dim=1), None if stds[0] is None else torch.cat(stds, dim=1)


def score_by_all(rewards, rollouts):
    """
    The scores of all samples by each reward, {name: [(M N,)]}; of `single` by each member alone.

    Each member is asked once. RobustReward also moves and divides the mixture, which changes no choice of a best one.
    """
    answers = {kind: answers_of(rewards[kind], rollouts) for kind in ("ensemble", "brme") if kind in rewards}
    scores = dict(single=list(answers["ensemble"][0]), pooled=[score_batches(rewards["pooled"], rollouts)])
    for how, (kind, lam) in LAMBDAS.items():
        members = "brme" if kind == "brme" else "ensemble"
        if members in answers:
            nominal, worst = two_opinions(kind, *answers[members])
            scores[how] = [lam * nominal + (1 - lam) * worst]
    return scores


def best_rows(run, rewards, quick, seed):
    """
    Choose the best of n SFT samples by each reward. Returns one row for each reward and n, and one of the spread.

    All rewards score the same samples.
    """
    M, N = (8, 16) if quick else (32, 256)
    rollouts, gold = common.reference_samples(run, M, N, seed)                                # gold (M, N)
    scores = score_by_all(rewards, rollouts)
    rows = []
    for how, proxies in scores.items():
        for n in common.powers(N):
            golds = [best_of_n(proxy.view(M, N), gold, n).mean().item() for proxy in proxies]
            rows.append(dict(study="best of n", how=how, n=n, gold=sum(golds) / len(golds)))
    means = torch.stack(scores["single"])                                                     # (k, M N)
    known = spread_and_error(means.mean(dim=0), means.std(dim=0, correction=0), gold.flatten())
    return [*rows, dict(study="spread", **known)]


def pick(rewards, how):
    """The scorer of one name; of `single` it is the first member."""
    if how == "pooled":
        return rewards["pooled"]
    if how == "single":
        return rewards["ensemble"].members[0]
    kind, lam = LAMBDAS[how]
    rewards[kind].lam = lam
    return rewards[kind]


def ppo_rows(run, rewards, how, quick, seed):
    """Train with PPO and beta 0.02 on one of the rewards. Returns one row for each window of iterations."""
    _, logged = common.optimise(run, pick(rewards, how), seed, critic=rewards["pooled"], beta=0.02,
                                ppo_iterations=4 if quick else 16, ppo_lr=4e-4)
    return [dict(row, study="ppo", how=how) for row in common.windows(logged, 1 if quick else 2)]


# ---- the summary ----------------------------------------------------------------------------------

def bon(rows, arm, how, n):
    """Gold of the best of n, one number for each seed; of the largest n that was measured, if n is larger."""
    largest = max(column(rows, "n", study="best of n", arm=arm))
    return column(rows, "gold", study="best of n", arm=arm, how=how, n=min(n, largest))


def ppo_curves(rows, how, name):
    return curves_by_seed(rows, name, study="ppo", how=how)


def at_kl(rows, how):
    """Gold of PPO at a KL of 5 nats, by interpolation, one for each seed."""
    curves = zip(ppo_curves(rows, how, "kl"), ppo_curves(rows, how, "gold"))
    return [common.interpolate(KL, kl, gold) for kl, gold in curves]


def at_end(rows, how):
    return [curve[-1] for curve in ppo_curves(rows, how, "gold")]


def fluctuations(rows, how):
    """How far gold jumps from one window to the next in the second half of the run, on average, for each seed."""
    halves = [curve[len(curve) // 2:] for curve in ppo_curves(rows, how, "gold")]
    return [sum(abs(b - a) for a, b in itertools.pairwise(half)) / (len(half) - 1) for half in halves]


def summarise(rows, arm, how):
    row = {"arm": arm, "reward": how, "se": mean_se(bon(rows, arm, how, 64))[1]}
    row.update({f"n {n}": mean_se(bon(rows, arm, how, n))[0] for n in (16, 64, 256)})
    if select(rows, study="ppo", arm=arm, how=how):
        end, end_se = mean_se(at_end(rows, how))
        row.update({"at KL 5": mean_se(at_kl(rows, how))[0], "at the end": end, "its se": end_se,
                    "fluctuation": mean_se(fluctuations(rows, how))[0]})
    return row


def describe_spread(rows):
    """What the spread of the members knows, in each arm."""
    known = {arm: mean_se(column(rows, "correlation", study="spread", arm=arm))[0] for arm in ARMS}
    return "the members' spread and their error correlate by " + ", ".join(f"{known[arm]:+.2f} ({arm})" for arm in ARMS)


def make_claims(rows):
    """The criteria, as claims about one number for each seed."""
    def best_of(arm, a, b):
        return paired(bon(rows, arm, a, 64), bon(rows, arm, b, 64))

    def ppo(measure, a, b):
        return paired(measure(rows, a), measure(rows, b))

    return [
        Claim("the spread correlates with the error", column(rows, "correlation", study="spread", arm="annotators")),
        Claim("best of 64, annotators: mean above single", best_of("annotators", "mean", "single")),
        Claim("best of 64, annotators: WCO above mean", best_of("annotators", "wco", "mean")),
        Claim("best of 64, bonus: WCO above mean", best_of("bonus", "wco", "mean")),
        Claim("best of 64, annotators: WCO above pooled", best_of("annotators", "wco", "pooled")),
        Claim("best of 64, flips: mean above WCO", best_of("flips", "mean", "wco")),
        Claim("PPO at KL 5: WCO above mean", ppo(at_kl, "wco", "mean")),
        Claim("PPO at the end: WCO above mean", ppo(at_end, "wco", "mean")),
        Claim("BRME at the end: lambda 0.5 above 1", ppo(at_end, "brme 0.5", "brme 1.0")),
        Claim("BRME: lambda 0.5 fluctuates less", ppo(fluctuations, "brme 1.0", "brme 0.5"))]
