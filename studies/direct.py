"""
Direct alignment on pairs: do DPO, IPO and SLiC over-optimise, although they have no reward model? See `direct`.

Letters: S seeds, K marks, which are measurements at equal distances on the way through the epoch.
"""

import copy
import itertools
import math
from dataclasses import replace

import torch

from data import collate_pairs, pad_id
from dpo import train_dpo
from evaluate import win_rate
from model import response_logprobs
from studies.common import (
    WIDTHS,
    answers,
    base,
    column,
    curves_by_seed,
    judge,
    labelled,
    mean_curve,
    peak_and_fall,
    ruled,
    select,
)
from studies.lab import fit_law, mean_se, parallel, publish, spearman, table

KINDS = ("dpo", "ipo", "slic")
MARKS = 9
LOGGED = ("loss", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward")  # by train_dpo
COLUMNS = ["kind", "beta", "gold", "gold_se", "kl", "wins", "best_gold", "best_epoch", "chosen", "rejected",
           "implicit", "length"]


def direct(seeds, quick, out):
    """
    Question: does fitting pairs directly escape over-optimisation, as it has no reward model to exploit?

    Claim (Rafailov et al. 2024, arXiv:2406.02900): no. Gold against d = sqrt(KL) is a hump for DPO, IPO and SLiC.
    With a wide KL budget the best policy is reached before the first epoch ends. Gold follows d (alpha - beta log d)
    better than a quadratic in KL. Smaller models lose more. Log-probs of chosen and rejected responses fall together.
    The accuracy of the implicit reward does not predict gold.

    Criteria:
    - hump, for DPO: compare the ends of the epoch, one for each beta. The best in gold is not the one with the largest
      KL, and beats it by more than 2 standard errors over seeds (for each seed, the best is that of the other seeds).
    - law, for DPO: the RMSE of the law with 2 coefficients is at most 0.7 of the RMSE of the quadratic with 3.
    - epoch: at the smallest beta, DPO's best mark is before the end, and KL still rises at the end.
    - both fall: at the smallest beta, both log-probs end lower than they began, in all seeds.
    - accuracy: |Spearman| of implicit accuracy and win rate is below 0.3 over all settings of a kind.
    - size: the loss of gold from beta 0.3 to the smallest beta falls from width to width, for two of the three kinds.

    The verdict is that of hump, epoch and both fall together, for DPO. The others are reported beside it.
    """
    small = quick or seeds < 3
    if quick:
        betas = (0.01, 1.0)
        size_betas = (0.01,)
        width = "32"
    else:
        betas = (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0)
        size_betas = (0.01, 0.3)  # of the smaller models
        width = "128"
    rows = run_jobs(seeds, quick, betas, size_betas)

    summary = []
    verdicts = []
    panels = []
    for kind in KINDS:
        settings = [summarise(rows, seeds, kind, beta, width) for beta in betas]
        points = select(rows, kind=kind, width=width)
        hump, hump_line = judge_hump(settings, small)
        epoch, epoch_line = judge_epoch(settings[0], small)
        both_fall, both_fall_line = judge_both_fall(settings[0], small)
        if kind == "dpo":
            why = "DPO's hump, epoch and both fall"
            verdicts.insert(0, ruled(small, hump and epoch and both_fall, why))
        lines = [hump_line, judge_law(points, small), epoch_line, both_fall_line, judge_accuracy(points, small)]
        verdicts += [f"{kind}, {line}" for line in lines]
        summary += settings
        panels.append(draw(kind, settings))
    verdicts.append(judge_size(rows, seeds, quick, size_betas, width, small))
    return publish(out, rows, table(summary, COLUMNS), verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# jobs

def run_jobs(seeds, quick, betas, size_betas):
    """Train every kind at every beta, and the smaller models at the size_betas. Returns one row for each mark."""
    jobs = []
    for kind, beta, seed in itertools.product(KINDS, betas, range(seeds)):
        jobs.append((seed, quick, kind, beta, ()))
    for width, kind, beta, seed in itertools.product(WIDTHS[quick], KINDS, size_betas, range(seeds)):
        jobs.append((seed, quick, kind, beta, width))
    return list(itertools.chain.from_iterable(parallel(direct_job, jobs)))


def direct_job(seed, quick, kind, beta, width):
    """
    Train one epoch of DPO, IPO or SLiC. Returns one row for each of the nine marks, the last one at the end.

    width: the flags of the base run with the SFT policy. Pairs and gold are those of the default width for all widths,
    so that all have one unit.
    """
    run = base(seed, quick)
    sft = base(seed, quick, *width).load_network("sft")
    pairs = labelled(run, 36 if quick else 1000)
    config = replace(run.config, dpo_kind=kind, dpo_beta=beta, dpo_lr=1e-3, dpo_epochs=1, batch_size=4 if quick else 24)
    _, opponents = answers(run, sft, 8 if quick else 96, seed + 1)
    policy = copy.deepcopy(sft).requires_grad_(True)
    steps = math.ceil(len(pairs) / config.batch_size)
    marks = [round((i + 1) * steps / MARKS) - 1 for i in range(MARKS)]
    rows = []

    def log(step, **metrics):
        if step not in marks:
            return
        row = dict(seed=seed, kind=kind, beta=beta, width=str(sft.config.n_embd), epoch=(step + 1) / steps)
        for name in LOGGED:
            row[name] = metrics[name]
        row.update(judge(run, policy, sft, opponents, seed))
        rows.append(row)

    train_dpo(policy, sft, pairs, pad_id(run.tokenizer), config, seed, log=log)
    rows[-1]["implicit_accuracy"] = implicit_accuracy(run, policy, sft)
    return rows


def implicit_accuracy(run, policy, reference):
    """Compute the share of held-out pairs whose chosen response has the larger implicit reward."""
    _, heldout = run.pairs()
    batch = collate_pairs(heldout[:256], pad_id(run.tokenizer))  # chosen first, then rejected
    with torch.no_grad():
        logp = response_logprobs(policy, batch).sum(dim=1)
        ref_logp = response_logprobs(reference, batch).sum(dim=1)
    chosen, rejected = (logp - ref_logp).chunk(2)                                             # (pairs,) each
    return win_rate(chosen, rejected)


# ---------------------------------------------------------------------------------------------------------------------
# summary

def summarise(rows, seeds, kind, beta, width):
    """
    Summarise one setting as a row of the table. Gold, KL, wins and length are those at the end of the epoch.

    chosen and rejected are changes of log-probs since the first mark, in nats. The row also keeps what the criteria and
    the picture need.
    """
    where = dict(kind=kind, beta=beta, width=width)
    gold_by_seed = curves_by_seed(rows, "gold", seeds, **where)                               # (S, K)
    chosen_by_seed = curves_by_seed(rows, "chosen_reward", seeds, **where)
    rejected_by_seed = curves_by_seed(rows, "rejected_reward", seeds, **where)
    gold, gold_se = mean_curve(gold_by_seed)                                                  # (K,) each
    d, _ = mean_curve(curves_by_seed(rows, "d", seeds, **where))
    kl, _ = mean_curve(curves_by_seed(rows, "kl", seeds, **where))
    wins, _ = mean_curve(curves_by_seed(rows, "wins", seeds, **where))
    length, _ = mean_curve(curves_by_seed(rows, "length", seeds, **where))
    ends = [row for row in select(rows, **where) if "implicit_accuracy" in row]
    implicit, _ = mean_se(column(ends, "implicit_accuracy"))
    return dict(
        kind=kind, beta=beta,
        gold=gold[-1], gold_se=gold_se[-1], kl=kl[-1], wins=wins[-1], length=length[-1],
        best_gold=max(gold), best_epoch=(gold.index(max(gold)) + 1) / MARKS,
        chosen=change(chosen_by_seed) / beta, rejected=change(rejected_by_seed) / beta, implicit=implicit,
        d=d[-1], gold_curve=gold, d_curve=d, kl_curve=kl,
        gold_ends=last_points(gold_by_seed),
        chosen_ends=last_points(chosen_by_seed), rejected_ends=last_points(rejected_by_seed),
    )


def last_points(curves):
    return [curve[-1] for curve in curves]  # (S,)


def change(curves):
    """Average the change from the first to the last mark over seeds."""
    mean, _ = mean_se([curve[-1] - curve[0] for curve in curves])
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# criteria

def judge_hump(settings, small):
    """Judge whether gold is best at a beta that is not the one with the largest KL. Returns (held, line)."""
    best = max(settings, key=lambda row: row["gold"])
    farthest = max(settings, key=lambda row: row["kl"])
    # as a curve over beta that ends at the largest KL, so that its fall is the loss of gold from the best beta to there
    order = [row for row in settings if row is not farthest] + [farthest]
    curves = list(zip(*column(order, "gold_ends")))                                            # (S, number of betas)
    _, fall, error = peak_and_fall(curves)
    held = best is not farthest and fall > 2 * error
    why = f"gold falls by {fall:.2f} ± {error:.2f} from beta {best['beta']} to beta {farthest['beta']}"
    return held, "hump: " + ruled(small, held, why)


def judge_law(points, small):
    """Judge whether the law of RL fits all marks of a kind much better than a quadratic in KL."""
    d = column(points, "d")
    gold = column(points, "gold")
    _, law = fit_law(d, gold, "rl")
    _, quadratic = fit_law(d, gold, "quadratic")
    return "law: " + ruled(small, law <= 0.7 * quadratic, f"RMSE {law:.3f}, of the quadratic {quadratic:.3f}")


def judge_epoch(setting, small):
    """Judge whether gold is best before the end although KL still rises. setting: the smallest beta."""
    before = setting["kl_curve"][-3]
    end = setting["kl_curve"][-1]
    held = setting["best_epoch"] < 1 and end > before
    why = (f"at beta {setting['beta']} the best mark is at {setting['best_epoch']:.2f} of the epoch; "
           f"KL {before:.1f} to {end:.1f} over its last quarter")
    return held, "epoch: " + ruled(small, held, why)


def judge_both_fall(setting, small):
    """Judge whether chosen and rejected log-probs end below the reference's. setting: the smallest beta."""
    ends = setting["chosen_ends"] + setting["rejected_ends"]  # implicit rewards, which are 0 at the start
    held = all(end < 0 for end in ends)
    beta = setting["beta"]
    chosen = mean_se(setting["chosen_ends"])[0] / beta  # nats
    rejected = mean_se(setting["rejected_ends"])[0] / beta
    why = (f"at beta {beta}, chosen {chosen:+.1f}, rejected {rejected:+.1f} nats since the start, "
           f"{setting['chosen']:+.1f} and {setting['rejected']:+.1f} since the first mark")
    return held, "both fall: " + ruled(small, held, why)


def judge_accuracy(points, small):
    """Judge whether the accuracy of the implicit reward says nothing about the win rate."""
    ends = [row for row in points if "implicit_accuracy" in row]
    rank = spearman(column(ends, "implicit_accuracy"), column(ends, "wins"))
    return "accuracy: " + ruled(small, abs(rank) < 0.3, f"Spearman {rank:+.2f} of implicit accuracy and win rate")


def judge_size(rows, seeds, quick, size_betas, width, small):
    """Judge whether wider models lose less gold from the largest to the smallest of the size_betas."""
    widths = [value for _, value in WIDTHS[quick]] + [width]
    falling = 0
    parts = []
    for kind in KINDS:
        losses = [loss_of_gold(rows, seeds, kind, size_betas, each) for each in widths]
        if all(wider < narrower for narrower, wider in zip(losses, losses[1:])):
            falling += 1
        parts.append(f"{kind} loses " + " ".join(f"{loss:.2f}" for loss in losses))
    why = "; ".join(parts) + " at widths " + " ".join(widths)
    return "size: " + ruled(small, falling >= 2, why)


def loss_of_gold(rows, seeds, kind, betas, width):
    """Average over seeds gold at the largest of the betas minus gold at the smallest, at the end of the epoch."""
    mild = last_points(curves_by_seed(rows, "gold", seeds, kind=kind, beta=betas[-1], width=width))
    strong = last_points(curves_by_seed(rows, "gold", seeds, kind=kind, beta=betas[0], width=width))
    mean, _ = mean_se([a - b for a, b in zip(mild, strong)])
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# picture

def draw(kind, settings):
    """Make a panel of gold against d: a line through the marks of each beta, and a dot at each end."""
    lines = []
    for row in settings:
        lines.append(dict(label=f"beta {row['beta']}", x=row["d_curve"], y=row["gold_curve"], style="-"))
    ends = sorted(settings, key=lambda row: row["d"])
    lines.append(dict(label="ends", x=column(ends, "d"), y=column(ends, "gold"), yerr=column(ends, "gold_se"),
                      style="ko"))
    title = f"{kind}: gold at the end of the epoch and on the way"
    return dict(title=title, xlabel="sqrt(KL)", ylabel="gold", lines=lines)
