"""
Direct alignment on pairs: do DPO, IPO and SLiC over-optimise, although they have no reward model? See `direct`.

Letters: S seeds, K marks, which are measurements on the way.
"""

import copy
import itertools
import math
from dataclasses import replace

import torch

from data import collate_pairs
from dpo import train_dpo, train_online_dpo
from evaluate import wins
from model import response_logprobs
from pipeline.config import POLICIES, policy_config
from studies import common, lab
from studies.lab import Claim, column, curves_by_seed, judge, paired, panel, parallel, publish, select, table

KINDS = ("dpo", "ipo", "slic")
REMEDIES = ("chipo", "dpo_length", "dpo_sft", "online_dpo")  # by their names in --policies, at the smallest beta
MARKS = (4, 8, 16, 32, 64, 96, 128, 192)  # steps; an epoch of 4,000 pairs has 125
RATE = 1e-4  # the learning rate, after ten steps
COLUMNS = ["kind", "beta", "gold", "gold_se", "kl", "best_gold", "best_step", "length"]


def direct(seeds, quick, out):
    """
    Question: does fitting pairs directly escape over-optimisation, as it has no reward model to exploit?

    Claim: Rafailov et al. 2024, arXiv:2406.02900. In words, with the criteria: docs/studies.md#direct. The learning
    rate is constant after ten steps, as in the paper: with one that falls to 0 within the epoch the KL cannot rise at
    its end.
    """
    betas = (0.01, 1.0) if quick else (0.01, 0.05, 0.1, 0.3, 0.5)
    settings = [(kind, beta) for kind in KINDS for beta in betas] + [(kind, betas[0]) for kind in REMEDIES]
    jobs = [(seed, quick, kind, beta) for kind, beta in settings for seed in range(seeds)]
    rows = list(itertools.chain(*parallel(direct_job, jobs, out)))
    summary = [summarise(rows, kind, beta) for kind, beta in settings]
    panels = [panel(kind, select(rows, kind=kind), "d", "gold", "beta") for kind in KINDS]
    remedies = [row for row in rows if row["kind"] in ("dpo", *REMEDIES) and row["beta"] == betas[0]]
    panels.append(panel(f"DPO and its remedies at beta {betas[0]}", remedies, "d", "gold", "kind"))
    return publish(out, rows, table(summary, COLUMNS), judge(make_claims(rows, seeds), quick), panels)


# ---- jobs -----------------------------------------------------------------------------------------

def direct_job(seed, quick, kind, beta):
    """Train with a loss or a remedy. Returns one row for each of the marks, the last one at the end."""
    run = common.base(seed, quick)
    sft = run.load_network("sft")
    marks = (2, 4, 8) if quick else MARKS
    pairs = common.labelled(run, 36 if quick else 4000)
    size = 4 if quick else 32  # pairs in a step
    steps = 2 * math.ceil(len(pairs) / size)
    config = policy_config(replace(run.config, dpo_beta=beta, dpo_epochs=2, label_smoothing=0.0, dpo_batch=size), kind)
    policy = copy.deepcopy(sft).requires_grad_(True)
    if kind == "online_dpo":  # as many sampled pairs in a step, labelled by the reward model
        config = replace(config, beta=beta, ppo_batch=2 * size, minibatch=2 * size, ppo_epochs=1, ppo_iterations=steps)
        loop = train_online_dpo(policy, sft, run.load_network("reward"), run.prompts[0], config, seed)
    else:
        loop = train_dpo(policy, sft, pairs, config, seed)
    rows = []
    set_rate(config, 0, steps)
    for metrics, *_ in loop:
        step = metrics["step"] + 1
        set_rate(config, min(step, steps - 1), steps)
        if step in marks:
            judged = common.judge(run, policy, sft, 8 if quick else 192, seed)
            rows.append({"seed": seed, "kind": kind, "beta": beta, **metrics, "step": step, **judged})
        if step == marks[-1]:
            break
    rows[-1]["implicit_accuracy"] = implicit_accuracy(policy, sft, run.pairs[1][:256])
    return rows


def set_rate(config, step, steps):
    """Set the settings that the loops read in every step: RATE after a warm-up, constant as in the paper."""
    rate = RATE * min(1.0, (step + 1) / 10)
    config.dpo_lr = rate / min((step + 1) / (0.1 * steps + 1), 1 - step / steps)  # train_dpo's rises and falls to 0
    config.ppo_lr = rate / (1 - step / steps)                                     # train_online_dpo's falls


@torch.no_grad()
def implicit_accuracy(policy, reference, pairs):
    """The share of pairs whose chosen response has the larger implicit reward."""
    batch = collate_pairs(pairs, policy.pad)
    log_ratio = (response_logprobs(policy, batch) - response_logprobs(reference, batch)).sum(dim=1)   # (2 pairs,)
    return wins(*log_ratio.chunk(2)).mean().item()  # chosen first, then rejected


# ---- summary --------------------------------------------------------------------------------------

def summarise(rows, kind, beta):
    """One setting as a row of the table. Gold, KL and length are those at the last mark."""
    where = dict(kind=kind, beta=beta)
    (gold, gold_se), (kl, _), (length, _) = [lab.mean_curve(curves_by_seed(rows, name, **where))
                                             for name in ("gold", "kl", "length")]                # (K,) each
    steps = column(rows, "step", seed=0, **where)
    return dict(where, gold=gold[-1], gold_se=gold_se[-1], kl=kl[-1], length=length[-1], best_gold=max(gold),
                best_step=steps[gold.index(max(gold))])


# ---- criteria -------------------------------------------------------------------------------------

def make_claims(rows, seeds):
    """The criteria, as claims about one number for each seed."""
    beta = min(column(rows, "beta"))
    def curves(name, kind="dpo"):
        return curves_by_seed(rows, name, kind=kind, beta=beta)                               # (S, K)

    mark, tested = lab.chosen_and_tested(curves("gold"))
    steps = column(rows, "step", seed=0, kind="dpo", beta=beta)
    start = steps.index(32) if 32 in steps else 0
    falls = {kind: [curve[start] - curve[-1] for curve in curves("gold", kind)] for kind in KINDS}
    return [
        Claim("hump", [curve[mark] - curve[-1] for curve in tested], f"the best mark is step {steps[mark]}"),
        Claim("KL rises", [curve[-1] - curve[-3] for curve in curves("d")]),
        Claim("mildest", paired(falls["dpo"], falls["ipo"])),
        Claim("chosen fall", [-curve[-1] for curve in curves("chosen_reward")]),
        Claim("rejected fall", [-curve[-1] for curve in curves("rejected_reward")]),
        Claim("law", paired(*[[left_out_errors(rows, seed, law) for seed in range(seeds)]
                              for law in ("quadratic", "rl")])),
        Claim("accuracy", [rank_of_accuracy(rows, seed) for seed in range(seeds)], within=0.3),
        *[Claim(POLICIES[kind][0], paired(*[[curve[-1] for curve in curves("gold", k)] for k in (kind, "dpo")]))
          for kind in REMEDIES]]


def left_out_errors(rows, seed, law):
    """Fit a law to every second mark of a seed's DPO, of all betas. Returns its rmse on the other marks."""
    points = sorted(select(rows, seed=seed, kind="dpo"), key=lambda row: row["d"])
    fitted, left_out = points[::2], points[1::2]
    coefficients = lab.fit_law(column(fitted, "d"), column(fitted, "gold"), law)
    return lab.law_error(column(left_out, "d"), column(left_out, "gold"), law, coefficients)


def rank_of_accuracy(rows, seed):
    ends = [row for row in select(rows, seed=seed) if "implicit_accuracy" in row and row["kind"] in KINDS]
    return lab.spearman(column(ends, "implicit_accuracy"), column(ends, "gold"))
