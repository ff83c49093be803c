"""
Direct alignment on pairs: do DPO, IPO and SLiC over-optimise, although they have no reward model? See `direct`.

Letters: S seeds, K marks, which are measurements at equal distances on the way through the epoch.
"""

import copy
import itertools
import math
from dataclasses import replace

import torch

from data import collate_pairs
from dpo import train_dpo
from evaluate import win_rate
from model import response_logprobs
from studies import common
from studies.common import WIDTHS, curves_by_seed, mean_curve
from studies.lab import column, difference, fit_law, mean_se, parallel, publish, select, spearman, table, verdict

KINDS = ("dpo", "ipo", "slic")
MARKS = 9
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
      KL, and beats it by more than 2 standard errors over seeds (for each seed, the other seeds choose the best).
    - law, for DPO: the RMSE of the law with 2 coefficients is at most 0.7 of the RMSE of the quadratic with 3.
    - epoch: at the smallest beta, DPO's best mark is before the end, and KL still rises at the end.
    - both fall: at the smallest beta, both log-probs end lower than they began, in all seeds.
    - accuracy: |Spearman| of implicit accuracy and win rate is below 0.3 over all settings of a kind.
    - size: the loss of gold from beta 0.3 to the smallest beta falls from width to width, for two of the three kinds.

    The verdict is about hump, epoch and both fall together, for DPO. The others are reported too.
    """
    small = quick or seeds < 3
    betas = (0.01, 1.0) if quick else (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0)
    size_betas = (0.01,) if quick else (0.01, 0.3)  # of the smaller models
    width = 32 if quick else 128
    rows = run_jobs(seeds, quick, betas, size_betas)

    summary, verdicts, panels, parts = [], [], [], {}
    for kind in KINDS:
        settings = [summarise(rows, seeds, kind, beta, width) for beta in betas]
        points = select(rows, kind=kind, width=width)
        parts[kind] = [judge_hump(settings), judge_epoch(settings[0]), judge_both_fall(settings[0])]
        lines = [name + ": " + verdict(small, held, why) for name, held, why in
                 [*parts[kind], judge_law(points), judge_accuracy(points)]]
        verdicts += [f"{kind}, {line}" for line in lines]
        summary += settings
        panels.append(draw(kind, settings))
    verdicts.append(judge_size(rows, seeds, size_betas, [*WIDTHS[quick], width], small))
    main = verdict(small, all(held for _, held, _ in parts["dpo"]), "DPO's hump, epoch and both fall")
    return publish(out, rows, table(summary, COLUMNS), [main, *verdicts], panels)


# ---- jobs -----------------------------------------------------------------------------------------

def run_jobs(seeds, quick, betas, size_betas):
    """Train every kind at every beta, and the smaller models at the size_betas. Returns one row for each mark."""
    settings = [({}, beta) for beta in betas]
    settings += [(dict(n_embd=width), beta) for width in WIDTHS[quick] for beta in size_betas]
    jobs = [(seed, quick, kind, beta, changes) for changes, beta in settings for kind in KINDS for seed in range(seeds)]
    return list(itertools.chain(*parallel(direct_job, jobs)))


def direct_job(seed, quick, kind, beta, changes):
    """
    Train one epoch of DPO, IPO or SLiC. Returns one row for each of the nine marks, the last one at the end.

    changes: settings of the base run with the SFT policy. Pairs and gold come from the default width for all widths, so
    that all have one unit.
    """
    run = common.base(seed, quick)
    sft = common.base(seed, quick, **changes).load_network("sft")
    pairs = common.labelled(run, 36 if quick else 1000)
    config = replace(run.config, dpo_kind=kind, dpo_beta=beta, dpo_lr=1e-3, dpo_epochs=1, label_smoothing=0.0,
                     dpo_batch=4 if quick else 24)
    opponents = common.opponents_of(run, sft, 8 if quick else 96, seed)
    steps = math.ceil(len(pairs) / config.dpo_batch)
    marks = [round((i + 1) * steps / MARKS) - 1 for i in range(MARKS)]
    policy = copy.deepcopy(sft).requires_grad_(True)
    rows = []
    for metrics, _ in train_dpo(policy, sft, pairs, config, seed):
        if metrics["step"] in marks:
            where = dict(seed=seed, kind=kind, beta=beta, width=sft.width, epoch=(metrics["step"] + 1) / steps)
            rows.append({**where, **metrics, **common.judge(run, policy, sft, opponents, seed)})
    rows[-1]["implicit_accuracy"] = implicit_accuracy(policy, sft, run.pairs[1][:256])
    return rows


@torch.no_grad()
def implicit_accuracy(policy, reference, pairs):
    """The share of pairs whose chosen response has the larger implicit reward."""
    batch = collate_pairs(pairs, policy.pad)
    log_ratio = (response_logprobs(policy, batch) - response_logprobs(reference, batch)).sum(dim=1)   # (2 pairs,)
    return win_rate(*log_ratio.chunk(2))  # chosen first, then rejected


# ---- summary --------------------------------------------------------------------------------------

def summarise(rows, seeds, kind, beta, width):
    """
    One setting as a row of the table. Gold, KL, wins and length are those at the end of the epoch.

    chosen and rejected are changes of log-probs since the first mark, in nats. The row also keeps what the criteria and
    the picture need.
    """
    where = dict(kind=kind, beta=beta, width=width)
    names = ("gold", "d", "kl", "wins", "length", "chosen_reward", "rejected_reward")
    by_seed = {name: curves_by_seed(rows, name, seeds, **where) for name in names}            # (S, K) each
    mean = {name: mean_curve(curves)[0] for name, curves in by_seed.items()}                  # (K,) each
    ends = {name: last_points(curves) for name, curves in by_seed.items()}                    # (S,) each
    gold, gold_se = mean_curve(by_seed["gold"])
    accuracies = [row["implicit_accuracy"] for row in select(rows, **where) if "implicit_accuracy" in row]
    change = {name: (mean[name][-1] - mean[name][0]) / beta for name in ("chosen_reward", "rejected_reward")}
    return dict(
        kind=kind, beta=beta, gold=gold[-1], gold_se=gold_se[-1], kl=mean["kl"][-1], wins=mean["wins"][-1],
        best_gold=max(gold), best_epoch=(gold.index(max(gold)) + 1) / MARKS, chosen=change["chosen_reward"],
        rejected=change["rejected_reward"], implicit=mean_se(accuracies)[0], length=mean["length"][-1], d=mean["d"][-1],
        gold_curve=gold, d_curve=mean["d"], kl_curve=mean["kl"], gold_ends=ends["gold"],
        chosen_ends=ends["chosen_reward"], rejected_ends=ends["rejected_reward"])


def last_points(curves):
    return [curve[-1] for curve in curves]  # (S,)


# ---- criteria: (name, whether it held, why) -------------------------------------------------------

def judge_hump(settings):
    """Judge whether gold is best at a beta that is not the one with the largest KL."""
    best = max(settings, key=lambda row: row["gold"])
    farthest = max(settings, key=lambda row: row["kl"])
    # as a curve over beta that ends at the largest KL, so that its fall is the loss of gold from the best beta to there
    order = [row for row in settings if row is not farthest] + [farthest]
    _, fall, error = common.peak_and_fall(list(zip(*column(order, "gold_ends"))))             # (S, number of betas)
    why = f"gold falls by {fall:.2f} ± {error:.2f} from beta {best['beta']} to beta {farthest['beta']}"
    return "hump", best is not farthest and fall > 2 * error, why


def judge_law(points):
    """Judge whether the law of RL fits all marks of a kind much better than a quadratic in KL."""
    law, quadratic = [fit_law(column(points, "d"), column(points, "gold"), name)[1] for name in ("rl", "quadratic")]
    return "law", law <= 0.7 * quadratic, f"RMSE {law:.3f}, of the quadratic {quadratic:.3f}"


def judge_epoch(setting):
    """Judge whether gold is best before the end although KL still rises. setting: the smallest beta."""
    before, end = setting["kl_curve"][-3], setting["kl_curve"][-1]
    why = (f"at beta {setting['beta']} the best mark is at {setting['best_epoch']:.2f} of the epoch; "
           f"KL {before:.1f} to {end:.1f} over its last quarter")
    return "epoch", setting["best_epoch"] < 1 and end > before, why


def judge_both_fall(setting):
    """Judge whether chosen and rejected log-probs end below the reference's. setting: the smallest beta."""
    beta, chosen, rejected = setting["beta"], setting["chosen_ends"], setting["rejected_ends"]
    why = (f"at beta {beta}, chosen {mean_se(chosen)[0] / beta:+.1f}, rejected {mean_se(rejected)[0] / beta:+.1f} nats "
           f"since the start, {setting['chosen']:+.1f} and {setting['rejected']:+.1f} since the first mark")
    return "both fall", max(chosen + rejected) < 0, why  # implicit rewards, which are 0 at the start


def judge_accuracy(points):
    """Judge whether the accuracy of the implicit reward says nothing about the win rate."""
    ends = [row for row in points if "implicit_accuracy" in row]
    rank = spearman(column(ends, "implicit_accuracy"), column(ends, "wins"))
    return "accuracy", abs(rank) < 0.3, f"Spearman {rank:+.2f} of implicit accuracy and win rate"


def judge_size(rows, seeds, betas, widths, small):
    """Judge whether wider models lose less gold from the largest to the smallest of the betas, for two of the kinds."""
    losses = {kind: [loss_of_gold(rows, seeds, kind, betas, width) for width in widths] for kind in KINDS}
    falling = sum(all(wider < narrower for narrower, wider in itertools.pairwise(lost)) for lost in losses.values())
    why = "; ".join(f"{kind} loses " + " ".join(f"{loss:.2f}" for loss in lost) for kind, lost in losses.items())
    return "size: " + verdict(small, falling >= 2, f"{why} at widths {' '.join(map(str, widths))}")


def loss_of_gold(rows, seeds, kind, betas, width):
    """Gold at the largest of the betas minus gold at the smallest, at the end of the epoch, the mean over seeds."""
    ends = [last_points(curves_by_seed(rows, "gold", seeds, kind=kind, beta=beta, width=width))
            for beta in (betas[-1], betas[0])]
    return difference(*ends)[0]


# ---- picture --------------------------------------------------------------------------------------

def draw(kind, settings):
    """A panel of gold against d: a line through the marks of each beta, and a dot at each end."""
    lines = [dict(label=f"beta {row['beta']}", x=row["d_curve"], y=row["gold_curve"]) for row in settings]
    ends = sorted(settings, key=lambda row: row["d"])
    lines.append(dict(label="ends", x=column(ends, "d"), y=column(ends, "gold"), yerr=column(ends, "gold_se"),
                      style="ko"))
    return dict(title=f"{kind}: gold at the end of the epoch and on the way", xlabel="sqrt(KL)", ylabel="gold",
                lines=lines)
