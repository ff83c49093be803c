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
from studies import common
from studies.lab import (
    Claim,
    chosen_and_tested,
    column,
    curves_by_seed,
    fit_law,
    judge,
    law_error,
    mean_curve,
    mean_se,
    paired,
    panel,
    parallel,
    publish,
    select,
    spearman,
    table,
)

KINDS = ("dpo", "ipo", "slic")
REMEDIES = ("chipo", "dpo_length", "dpo_sft", "online_dpo")  # by their names in --policies, at the smallest beta
MARKS = (4, 8, 16, 32, 64, 96, 128, 192)  # steps; an epoch of 4,000 pairs has 125
QUICK_MARKS = (2, 4, 8)
RATE = 1e-4  # the learning rate, after ten steps
COLUMNS = ["kind", "beta", "gold", "gold_se", "kl", "wins", "best_gold", "best_step", "chosen", "rejected", "implicit",
           "length"]


def direct(seeds, quick, out):
    """
    Question: does fitting pairs directly escape over-optimisation, as it has no reward model to exploit?

    Claim (Rafailov et al. 2024, arXiv:2406.02900): no. Gold against d = sqrt(KL) is a hump for DPO, IPO and SLiC.
    With a wide KL budget the best policy is reached at a quarter of the first epoch; afterwards KL rises and gold
    falls. IPO loses least. Gold follows d (alpha - beta log d) better than a quadratic in KL. Log-probs of chosen and
    rejected responses fall together. The accuracy of the implicit reward does not predict gold.

    The learning rate is constant after ten steps, as in the paper: with one that falls to 0 within the epoch the KL
    cannot rise at its end.

    Criteria, one number a seed, Student's t, Holm's correction over all of them, for DPO unless another is named:
    - hump: at beta 0.01, gold at the best mark is above gold at the last one. Half of the seeds choose the mark, the
      others are tested
    - KL rises: at beta 0.01, d at the last mark is above d at the last but two
    - mildest: at beta 0.01, gold falls less with IPO than with DPO, from step 32 to the last one
    - both fall: at beta 0.01, the log-probs of chosen responses end lower than the reference's, and of rejected ones
    - law: fitted to every second mark of a seed, the law misses the other marks by less than the quadratic does
    - accuracy: within a seed, Spearman of implicit accuracy and gold over all settings is between -0.3 and 0.3
    - a claim for each remedy: at beta 0.01, gold at the last mark is above DPO's. The remedies are chi-PO, a price of
      0.05 for each token of difference in length, an SFT term of weight 1, and online DPO on the run's reward model
    """
    small = quick or seeds < 4
    betas = (0.01, 1.0) if quick else (0.01, 0.05, 0.1, 0.3, 0.5)
    settings = [(kind, beta) for kind in KINDS for beta in betas] + [(kind, betas[0]) for kind in REMEDIES]
    jobs = [(seed, quick, kind, beta) for kind, beta in settings for seed in range(seeds)]
    rows = list(itertools.chain(*parallel(direct_job, jobs, out)))
    summary = [summarise(rows, kind, beta) for kind, beta in settings]
    panels = [panel(kind, select(rows, kind=kind), "d", "gold", "beta") for kind in KINDS]
    remedies = [row for row in rows if row["kind"] in ("dpo", *REMEDIES) and row["beta"] == betas[0]]
    panels.append(panel(f"DPO and its remedies at beta {betas[0]}", remedies, "d", "gold", "kind"))
    return publish(out, rows, table(summary, COLUMNS), judge(make_claims(rows, seeds), small), panels)


# ---- jobs -----------------------------------------------------------------------------------------

def direct_job(seed, quick, kind, beta):
    """Train with a loss or a remedy. Returns one row for each of the marks, the last one at the end."""
    run = common.base(seed, quick)
    sft = run.load_network("sft")
    marks = QUICK_MARKS if quick else MARKS
    pairs = common.labelled(run, 36 if quick else 4000)
    size = 4 if quick else 32  # pairs in a step
    steps = 2 * math.ceil(len(pairs) / size)
    config = policy_config(replace(run.config, dpo_beta=beta, dpo_epochs=2, label_smoothing=0.0, dpo_batch=size), kind)
    opponents = common.opponents_of(run, sft, 8 if quick else 192, seed)
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
            where = dict(seed=seed, kind=kind, beta=beta)
            rows.append({**where, **metrics, "step": step, **common.judge(run, policy, sft, opponents, seed)})
        if step == marks[-1]:
            break
    rows[-1]["implicit_accuracy"] = implicit_accuracy(policy, sft, run.pairs[1][:256])
    return rows


def set_rate(config, step, steps):
    """Set the settings that the loops read in every step, so that this step is taken at RATE, after a warm-up."""
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
    """
    One setting as a row of the table. Gold, KL, wins and length are those at the last mark.

    chosen and rejected are changes of log-probs since the start, in nats.
    """
    where = dict(kind=kind, beta=beta)
    gold, gold_se = mean_curve(curves_by_seed(rows, "gold", **where))                         # (K,) each
    steps = column(rows, "step", seed=0, **where)
    ends = select(rows, step=steps[-1], **where)
    end = {name: mean_se(column(ends, name))[0] for name in ("kl", "wins", "length", "implicit_accuracy")}
    row = dict(
        kind=kind, beta=beta, gold=gold[-1], gold_se=gold_se[-1], kl=end["kl"], wins=end["wins"],
        best_gold=max(gold), best_step=steps[gold.index(max(gold))], implicit=end["implicit_accuracy"],
        length=end["length"])
    if kind in KINDS:  # chi-PO's reward is not linear in the log-probs, and online DPO has other pairs
        for side in ("chosen", "rejected"):
            row[side] = mean_se(column(ends, f"{side}_reward"))[0] / beta
    return row


# ---- criteria -------------------------------------------------------------------------------------

def make_claims(rows, seeds):
    """The criteria, as claims about one number for each seed."""
    beta = min(column(rows, "beta"))
    def curves(name, kind="dpo"):
        return curves_by_seed(rows, name, kind=kind, beta=beta)                               # (S, K)

    mark, tested = chosen_and_tested(curves("gold"))
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
    coefficients, _ = fit_law(column(fitted, "d"), column(fitted, "gold"), law)
    return law_error(column(left_out, "d"), column(left_out, "gold"), law, coefficients)


def rank_of_accuracy(rows, seed):
    ends = [row for row in select(rows, seed=seed) if "implicit_accuracy" in row and row["kind"] in KINDS]
    return spearman(column(ends, "implicit_accuracy"), column(ends, "gold"))
