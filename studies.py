"""
The research that minirlhf comes from, asked again at toy scale: over-optimisation, direct alignment, robust rewards, the limits of reward models.

    python studies.py overopt|direct|tree|robust|limits|frontier [--quick] [--seeds N]

A study prints its table and its verdicts, and leaves them in runs/studies/NAME with a CSV and, where matplotlib is installed, a picture. Its
docstring holds the question, the claim with its source, and the criterion, written down before there were numbers; docs/studies.md tells what came
out, and what was changed after a first pass. The three studies of small exact problems are in studies_tree.py; the world, the policies and the losses are the repository's own.

Units: gold and score in standard deviations of the SFT policy's, KL in nats a response, d = sqrt(KL). Errors are standard errors over seeds.

Letters: M prompts, N samples of a prompt, k members of an ensemble, S seeds, W windows of iterations.
"""

import argparse
import contextlib
import copy
import io
import math
import os
import random
import sys
import time
from pathlib import Path

import torch

import minirlhf
import studies_tree
import world
from data import collate, end_id, pad_id
from dpo import train_dpo
from evaluate import best_of_n, best_of_n_kl, exact_kl, fit_law, optimum, optimum_mean, sample_policy, standard_error, win_rate
from lab import cores, mean_se, parallel, publish, spearman, table, verdict
from model import response_logprobs
from ppo import train_ppo
from reward import (
    Ensemble,
    GaussianHeads,
    RobustReward,
    aggregate,
    collate_pairs,
    normalise,
    robust_reward,
    score_batches,
    score_pairs,
    train_brme,
    train_ensemble,
)
from run import Run

HOME = Path("runs/studies")

# ---------------------------------------------------------------------------------------------------------------------
# what the studies share

def base(seed, quick, *flags):
    """A run with an SFT policy, labelled pairs and a reward model, as minirlhf.py makes it; made once and found again by every study."""
    name = "-".join(["base", str(seed), *(["quick"] if quick else []), *[flag.strip("-") for flag in flags]])
    small = ["--quick", "--n-layer", "1", "--pretrain-steps", "60", "--sft-steps", "30", "--pairs", "200"] if quick else []
    argv = ["--seed", str(seed), "--out", str(HOME / name), "--device", "cpu", *small, *flags]
    if not (HOME / name / "reward.json").exists():
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            status = minirlhf.main([*argv, "--stages", "pretrain,sft,preferences,reward"])
        if status:
            raise RuntimeError(f"{HOME / name} could not be made: {said.getvalue().splitlines()[-1]}")
    return Run(minirlhf.parse_config([*argv, "--stages", "report"]))


def make_bases(name, seeds, quick):
    """The base runs that a study needs, side by side."""
    flags = dict(tree=[], direct=[(), *WIDTHS[quick]], limits=[(), ("--held-out", "film")]).get(name, [()])
    parallel(make_base, [(seed, quick, *chosen) for chosen in flags for seed in range(seeds)])


def make_base(seed, quick, *flags):
    base(seed, quick, *flags)


def labelled(run, n, seed=0, flip=0.0):
    """The first n training pairs, a share `flip` of them turned around."""
    rng = random.Random(seed)
    pairs = run.pairs()[0][:n]
    return [dict(pair, chosen=pair["rejected"], rejected=pair["chosen"], gold=pair["gold"][::-1]) if rng.random() < flip else pair for pair in pairs]


def fit_ensemble(run, pairs, k, seed):
    """k reward models fitted to the same pairs, each with mean 0 and deviation 1 on SFT samples."""
    sft = run.load_network("sft", "sft")
    members = train_ensemble(sft, pairs, pad_id(run.tokenizer), k, seed, epochs=2, lr=1e-3, batch_size=min(32, len(pairs) // 8))
    samples = sample_policy(sft, run.prompts()[0][:512], run.config.response_tokens, 1.0, seed, "normalise")
    for member in members:
        normalise(member.requires_grad_(False), samples)
    return members


def fit(run, pairs, seed):
    return fit_ensemble(run, pairs, 1, seed)[0]


def gold_accuracy(run, model, pairs):
    """Share of pairs that the reward model orders as gold does; pairs of equal gold are left out."""
    pairs = [pair for pair in pairs if pair["gold"][0] != pair["gold"][1]]
    better, worse = score_pairs(model, pairs, pad_id(run.tokenizer))
    sign = torch.tensor([math.copysign(1.0, pair["gold"][0] - pair["gold"][1]) for pair in pairs])
    return win_rate(sign * better, sign * worse)


def optimise(run, reward_model, beta, iterations, seed, lr=1e-3, batch_size=128, critic=None):
    """PPO from the SFT policy on any reward; (policy, the rows that it logged: score, gold, kl, length of each rollout before its updates)."""
    rows, sft = [], run.load_network("sft", "sft")
    policy = copy.deepcopy(sft).requires_grad_(True)
    batch_size = 64 if run.config.quick else batch_size
    train_ppo(policy, sft, reward_model, run.prompts()[0], iterations=iterations, batch_size=batch_size, minibatch_size=64, epochs=2, beta=beta, lr=lr,
              critic_lr=1e-3, max_new_tokens=run.config.response_tokens, seed=seed, critic=critic, log=lambda **row: rows.append(row),
              judge=lambda prompts, rollout: run.gold(prompts, rollout.response_ids()))
    return policy, rows


def answers(run, policy, n, seed):
    """(rollouts, gold (n,)) of one sample for each of n held-out prompts."""
    prompts = (run.prompts()[1] * n)[:n]
    rollouts = sample_policy(policy, prompts, run.config.response_tokens, 1.0, seed, "judge")
    return rollouts, run.gold(prompts, [ids for rollout in rollouts for ids in rollout.response_ids()])


def judge(run, policy, sft, opponents, seed, reward_model=None):
    """A policy's answers to as many prompts as there are opponents, the gold (n,) of SFT answers: a dict of gold, score, kl, length and win rate."""
    rollouts, gold = answers(run, policy, len(opponents), seed)
    lengths = torch.cat([rollout.response_lens for rollout in rollouts]).float()
    kl = torch.cat([exact_kl(policy, sft, rollout) for rollout in rollouts]).mean().item()
    row = dict(gold=gold.mean().item(), gold_se=standard_error(gold), kl=kl, d=math.sqrt(max(kl, 0.0)), wins=win_rate(gold, opponents),
               length=lengths.mean().item())
    if reward_model is not None:
        score = score_batches(reward_model, rollouts)
        row.update(score=score.mean().item(), score_se=standard_error(score))
    return row


def reference_samples(run, M, N, seed):
    """N SFT samples for each of M held-out prompts: (rollouts, gold (M, N))."""
    prompts = [prompt for prompt in (run.prompts()[1] * M)[:M] for _ in range(N)]
    rollouts = sample_policy(run.load_network("sft", "sft"), prompts, run.config.response_tokens, 1.0, seed, "SFT samples")
    return rollouts, run.gold(prompts, [ids for rollout in rollouts for ids in rollout.response_ids()]).view(M, N)


def powers(N):
    return [2 ** i for i in range(int(math.log2(N)) + 1)]


def windows(rows, name, size=5):
    """Means over windows of `size` iterations: one iteration's rollout is noisy."""
    return [sum(row[name] for row in rows[at:at + size]) / len(rows[at:at + size]) for at in range(0, len(rows), size)]


def peak_and_fall(curves):
    """
    Curves (S, W) -> (index of the peak of their mean, mean and standard error over seeds of the fall from the peak to the last point).

    Each seed's fall is measured from where the other seeds have their peak: from a peak that is picked by the same noise, even flat curves fall.
    """
    def peak(curves):
        mean = [sum(column) / len(column) for column in zip(*curves)]
        return mean.index(max(mean))
    others = [curves[:i] + curves[i + 1:] or curves for i in range(len(curves))]
    return peak(curves), *mean_se([curve[peak(rest)] - curve[-1] for curve, rest in zip(curves, others)])


def ruled(small, held, why):
    """The verdict on a criterion; held is None where there is nothing to judge, and a quick pass or fewer than three seeds are too small for one."""
    return verdict(None if small else held, why)


def together(parts):
    """What several verdicts, True, False or None, come to: all of them held, or one did not, or it cannot be told."""
    return False if False in parts else None if None in parts else True


# ---------------------------------------------------------------------------------------------------------------------
# 1. over-optimisation

def overopt_ppo(seed, quick, labels, beta):
    run = base(seed, quick)
    _, rows = optimise(run, fit(run, labelled(run, labels), seed), beta, 5 if quick else 30, seed, lr=3e-4)
    columns = {name: windows(rows, name, 1 if quick else 2) for name in ("kl", "gold", "score", "length")}
    return [dict(method="ppo", seed=seed, labels=labels, beta=beta, window=w, d=math.sqrt(max(kl, 0.0)), gold=gold, score=score, length=length)
            for w, (kl, gold, score, length) in enumerate(zip(*columns.values()))]


def overopt_bon(seed, quick, labels):
    run = base(seed, quick)
    M, N = (8, 16) if quick else (48, 64)
    rollouts, gold = reference_samples(run, M, N, seed)
    score = score_batches(fit(run, labelled(run, labels), seed), rollouts).view(M, N)
    return [dict(method="best of n", seed=seed, labels=labels, beta=None, window=w, d=math.sqrt(best_of_n_kl(n)),
                 gold=best_of_n(score, gold, n).mean().item(), score=best_of_n(score, score, n).mean().item()) for w, n in enumerate(powers(N))]


def overopt(seeds, quick, out):
    """
    Question: what does the true reward do while a policy climbs a learned one?

    Claim (Gao et al. 2023, arXiv:2210.10760): the proxy rises, gold rises and then falls with d = sqrt(KL); gold follows d (alpha - beta log d) for
    RL and d (alpha - beta d) for best-of-n; reward models of more labels are over-optimised later; a KL penalty does not move the curve of gold
    against KL, it only stops earlier on it. (The learning rate is 3e-4 because at 1e-3 the first window already lay beyond the peak.)
    Criterion, for PPO with beta 0: reproduced if, at the fewest labels, (a) the proxy rises over windows (Spearman above 0.8), (b) gold peaks inside
    and falls from its peak to the end by more than 2 standard errors over seeds, and (c) each larger number of labels has a peak that is later in d
    or higher in gold. Apart from that, one curve: over the d that both have, gold of beta 0 and of each other beta differ by less than 2 standard
    errors in the mean, and the error is below 0.1, or it cannot be told.
    """
    small = quick or seeds < 3
    labels, betas = ((50, 100, 200), (0.0, 0.2)) if quick else ((300, 1000, 4000), (0.0, 0.03, 0.1))
    jobs = [(seed, quick, n, 0.0) for n in labels for seed in range(seeds)] + [(seed, quick, labels[0], b) for b in betas[1:] for seed in range(seeds)]
    rows = sum(parallel(overopt_ppo, jobs), []) + sum(parallel(overopt_bon, [(seed, quick, n) for n in labels for seed in range(seeds)]), [])

    def curves(name, method, n, beta):  # (S, W)
        return [[row[name] for row in rows if (row["method"], row["labels"], row["beta"], row["seed"]) == (method, n, beta, seed)] for seed in range(seeds)]

    summary, panels = [], [dict(title=title, xlabel="sqrt(KL)", ylabel="gold (solid), score (dashed)", lines=[])
                           for title in ("PPO, beta 0", f"PPO, {labels[0]} labels", "best of n")]
    for method, n, beta in [("ppo", n, 0.0) for n in labels] + [("ppo", labels[0], b) for b in betas[1:]] + [("best of n", n, None) for n in labels]:
        gold, score, d = (curves(name, method, n, beta) for name in ("gold", "score", "d"))
        mean_gold, mean_score, mean_d = ([mean_se(column)[0] for column in zip(*x)] for x in (gold, score, d))
        peak, fall, error = peak_and_fall(gold)
        law, rival = ("rl", "bon") if method == "ppo" else ("bon", "rl")
        peak_se, end_se = (mean_se([curve[at] for curve in gold])[1] for at in (peak, -1))
        summary.append(dict(method=method, labels=n, beta=beta, peak_gold=mean_gold[peak], peak_se=peak_se, peak_d=mean_d[peak],
                            end_gold=mean_gold[-1], end_se=end_se, end_d=mean_d[-1], end_score=mean_score[-1], fall=fall, fall_se=error,
                            rmse_law=fit_law(mean_d, mean_gold, law)[1], rmse_rival=fit_law(mean_d, mean_gold, rival)[1],
                            inside=0 < peak < len(mean_gold) - 1, rank=spearman(range(len(mean_score)), mean_score)))
        for panel in panels[:2] if (n, beta) == (labels[0], 0.0) else [panels[0 if beta == 0.0 else 1 if beta else 2]]:
            label = f"{n} labels" if panel is not panels[1] else f"beta {beta}"
            color = f"C{len(panel['lines']) // 2}"
            panel["lines"] += [dict(label=label, x=mean_d, y=mean_gold, yerr=[mean_se(c)[1] for c in zip(*gold)], style=f"{color}-"),
                               dict(label="", x=mean_d, y=mean_score, style=f"{color}--")]

    few, proxy = summary[0], summary[:len(labels)]
    rises, falls = few["rank"] > 0.8, few["inside"] and few["fall"] > 2 * few["fall_se"]
    later = all(b["peak_d"] > a["peak_d"] or b["peak_gold"] > a["peak_gold"] for a, b in zip(proxy, proxy[1:]))
    verdicts = [ruled(small, rises and falls and later, f"the proxy rises: {rises}; gold falls by {few['fall']:.2f} ± {few['fall_se']:.2f} from a peak at "
                        f"d = {few['peak_d']:.2f}: {falls}; more labels, later or higher: {later}")]
    for beta in betas[1:]:  # the distance of the other curve from the one of beta 0, interpolated at the same d, by seed
        gaps = []
        for x0, y0, x1, y1 in zip(*(curves(name, "ppo", labels[0], b) for b in (0.0, beta) for name in ("d", "gold"))):
            low, high = max(min(x0), min(x1)), min(max(x0), max(x1))
            grid = [low + (high - low) * i / 8 for i in range(9)]
            gaps += [sum(interpolate(x, x1, y1) - interpolate(x, x0, y0) for x in grid) / 9] if low < high else []
        gap, error = mean_se(gaps) if gaps else (math.nan, math.nan)
        held = None if len(gaps) < seeds or abs(gap) < 2 * error and error >= 0.1 else abs(gap) < 2 * error
        verdicts.append(f"one curve, beta {beta} against 0: " + ruled(small, held, f"gold differs by {gap:+.2f} ± {error:.2f} at equal d"))
    columns = "method labels beta peak_gold peak_se peak_d end_gold end_se end_d end_score fall fall_se rmse_law rmse_rival".split()
    return publish(out, rows, table(summary, columns), verdicts, panels)


def interpolate(x, xs, ys):
    """y at x on the line through the points (xs, ys), in the order of xs; beyond the ends, the value at the end."""
    points = sorted(zip(xs, ys))
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 if x <= x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# 2. direct alignment

WIDTHS = {True: [], False: [("--n-embd", "32"), ("--n-embd", "64")]}  # beside the default width of 128


def direct_job(seed, quick, kind, beta, width):
    """One epoch of DPO, IPO or SLiC on the widest policy's pairs; judged eight times on the way, and once more at the end."""
    run = base(seed, quick)  # its gold too is the widest policy's, so that all widths have one unit
    sft, pairs = base(seed, quick, *width).load_network("sft", "sft"), labelled(run, 36 if quick else 1000)
    policy, size = copy.deepcopy(sft).requires_grad_(True), 4 if quick else 24
    steps, rows, (_, opponents) = -(-len(pairs) // size), [], answers(run, sft, 8 if quick else 96, seed + 1)
    marks = {round((i + 1) * steps / 9) - 1 for i in range(9)}

    def log(step, **row):
        if step in marks:
            rows.append(dict(seed=seed, kind=kind, beta=beta, width=str(sft.config.n_embd), epoch=(step + 1) / steps,
                             **{name: row[name] for name in ("loss", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward")},
                             **judge(run, policy, sft, opponents, seed)))

    train_dpo(policy, sft, pairs, pad_id(run.tokenizer), epochs=1, batch_size=size, beta=beta, lr=1e-3, kind=kind, seed=seed, log=log)
    reference = response_logprobs_of(sft, run.pairs()[1][:256], run)
    margins = (response_logprobs_of(policy, run.pairs()[1][:256], run) - reference).chunk(2)
    rows[-1]["implicit_accuracy"] = win_rate(*margins)
    return rows


@torch.no_grad()
def response_logprobs_of(policy, pairs, run):
    """Log-probs of whole responses, the chosen ones first, (2 x pairs,)."""
    return response_logprobs(policy, collate_pairs(pairs, pad_id(run.tokenizer))).sum(dim=1)


def direct(seeds, quick, out):
    """
    Question: does fitting pairs directly escape over-optimisation, as it has no reward model to exploit?

    Claim (Rafailov et al. 2024, arXiv:2406.02900): no. Gold against d = sqrt(KL) is a hump for DPO, IPO and SLiC; with a wide KL budget the best
    policy is reached before the first epoch ends; gold follows d (alpha - beta log d) better than a quadratic in KL; smaller models lose more;
    log-probs of chosen and rejected responses fall together; the accuracy of the implicit reward does not tell gold.
    Criteria: (hump) of the ends of the epoch, one for each beta, the best in gold is not the one with the largest KL and beats it by more than 2
    standard errors over seeds (the best as the other seeds have it), for DPO; (law) RMSE of the law with 2 coefficients at most 0.7 of the quadratic's
    with 3, for DPO; (epoch) at the smallest beta, DPO's best mark is before the end and KL still rises at the end; (both fall) at the smallest beta,
    both log-probs end lower than they began, in all seeds; (accuracy) |Spearman| of implicit accuracy and win rate below 0.3 over all settings of a
    kind; (size) the loss of gold from beta 0.3 to the smallest falls from width to width for two of the three kinds.
    The verdict is that of hump, epoch and both fall together; the others are told beside it.
    """
    kinds, betas = ("dpo", "ipo", "slic"), (0.01, 1.0) if quick else (0.01, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0)
    widths, small = WIDTHS[quick], quick or seeds < 3
    few = betas[::4]  # for the smaller models
    jobs = [(seed, quick, kind, beta, ()) for kind in kinds for beta in betas for seed in range(seeds)]
    jobs += [(seed, quick, kind, beta, width) for width in widths for kind in kinds for beta in few for seed in range(seeds)]
    rows = sum(parallel(direct_job, jobs), [])
    wide = "64" if quick else "128"

    def at(name, kind, beta, width=wide, mark=-1):  # one number for each seed
        return [[row for row in rows if (row["seed"], row["kind"], row["beta"], row["width"]) == (seed, kind, beta, width)][mark][name]
                for seed in range(seeds)]

    summary, verdicts, panels = [], [], [dict(title=f"{kind}: gold at the end of the epoch and on the way", xlabel="sqrt(KL)", ylabel="gold", lines=[])
                                         for kind in kinds]
    told = {}
    for kind, panel in zip(kinds, panels):
        ends = {beta: {name: mean_se(at(name, kind, beta)) for name in ("gold", "d", "kl", "wins", "length")} for beta in betas}
        for beta in betas:
            chosen, rejected = ([end - start for start, end in zip(at(name, kind, beta, mark=0), at(name, kind, beta))]
                                for name in ("chosen_reward", "rejected_reward"))
            path = [mean_se(at("gold", kind, beta, mark=m))[0] for m in range(9)]
            summary.append(dict(kind=kind, beta=beta, gold=ends[beta]["gold"][0], gold_se=ends[beta]["gold"][1], kl=ends[beta]["kl"][0],
                                wins=ends[beta]["wins"][0], best_epoch=(path.index(max(path)) + 1) / 9, best_gold=max(path),
                                chosen=mean_se(chosen)[0] / beta, rejected=mean_se(rejected)[0] / beta,
                                implicit=mean_se(at("implicit_accuracy", kind, beta))[0], length=ends[beta]["length"][0]))
            panel["lines"].append(dict(label=f"beta {beta}", x=[mean_se(at("d", kind, beta, mark=m))[0] for m in range(9)], y=path, style="-"))
        x, y, e = zip(*sorted((ends[beta]["d"][0], *ends[beta]["gold"]) for beta in betas))
        panel["lines"].append(dict(label="ends", x=x, y=y, yerr=e, style="ko"))
        best, far = max(betas, key=lambda b: ends[b]["gold"][0]), max(betas, key=lambda b: ends[b]["kl"][0])
        _, fall, error = peak_and_fall(list(zip(*(at("gold", kind, beta) for beta in [*(b for b in betas if b != far), far]))))
        points = [(row["d"], row["gold"]) for row in rows if row["kind"] == kind and row["width"] == wide]
        law, square = (fit_law(*zip(*points), name)[1] for name in ("rl", "quadratic"))
        summed = [row for row in summary if row["kind"] == kind]
        least = summed[0]
        path_kl = [mean_se(at("kl", kind, betas[0], mark=m))[0] for m in (-3, -1)]
        told[kind] = dict(hump=best != far and fall > 2 * error, epoch=least["best_epoch"] < 1 and path_kl[1] > path_kl[0],
                          both=all(end < start for name in ("chosen_reward", "rejected_reward")
                                   for start, end in zip([0.0] * seeds, at(name, kind, betas[0]))))
        at_start = [mean_se(at(name, kind, betas[0]))[0] / betas[0] for name in ("chosen_reward", "rejected_reward")]
        rank = spearman([row["implicit_accuracy"] for row in rows if "implicit_accuracy" in row and row["kind"] == kind and row["width"] == wide],
                        [row["wins"] for row in rows if "implicit_accuracy" in row and row["kind"] == kind and row["width"] == wide])
        verdicts += [f"{kind}, hump: " + ruled(small, told[kind]["hump"], f"gold falls by {fall:.2f} ± {error:.2f} from beta {best} to beta {far}"),
                     f"{kind}, law: " + ruled(small, law <= 0.7 * square, f"RMSE {law:.3f}, of the quadratic {square:.3f}"),
                     f"{kind}, epoch: " + ruled(small, told[kind]["epoch"], f"at beta {betas[0]} the best mark is at {least['best_epoch']:.2f} of the epoch; "
                                                  f"KL {path_kl[0]:.1f} to {path_kl[1]:.1f} over its last quarter"),
                     f"{kind}, both fall: " + ruled(small, told[kind]["both"], f"at beta {betas[0]}, chosen {at_start[0]:+.1f}, rejected {at_start[1]:+.1f} nats "
                                                      f"since the start, {least['chosen']:+.1f} and {least['rejected']:+.1f} since the first mark"),
                     f"{kind}, accuracy: " + ruled(small, abs(rank) < 0.3, f"Spearman {rank:+.2f} of implicit accuracy and win rate")]
    losses = {kind: [mean_se([a - b for a, b in zip(at("gold", kind, few[-1], w), at("gold", kind, few[0], w))])[0] for w in [*(x[1] for x in widths), wide]]
              for kind in kinds}
    falling = sum(all(b < a for a, b in zip(loss, loss[1:])) for loss in losses.values())
    verdicts.append("size: " + ruled(small, falling >= 2, "; ".join(f"{kind} loses {' '.join(f'{x:.2f}' for x in loss)}" for kind, loss in losses.items())
                                       + f" at widths {' '.join(x[1] for x in widths)} {wide}"))
    verdicts.insert(0, ruled(small, all(told["dpo"].values()), "DPO's hump, epoch and both fall"))
    columns = "kind beta gold gold_se kl wins best_gold best_epoch chosen rejected implicit length".split()
    return publish(out, rows, table(summary, columns), verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# 4. robust rewards

HOWS = ("single", "mean", "wco", "uwo", "brme 1.0", "brme 0.6", "brme 0.2", "brme 0.0")  # the rewards of best of n
LONG = {0.0: ("single", "wco", "uwo"), 0.25: ("single", "mean", "wco", "uwo", "brme 1.0", "brme 0.2")}  # those of PPO, by the share of flips


def noisy_labels(run, seed, quick, flip):
    return labelled(run, 64 if quick else 400, seed, flip)


def fit_heads(reward_model, pairs, run, seed, loss):
    """(BRME's five heads on a copy of the reward model's trunk, the rows that their training logged: std and error)."""
    torch.manual_seed(seed)
    heads, rows = GaussianHeads(reward_model.trunk, 5).requires_grad_(True), []
    train_brme(heads, reward_model, pairs, pad_id(run.tokenizer), loss=loss, epochs=1 if run.config.quick else 4, batch_size=32, lr=1e-3, seed=seed,
               log=lambda **row: rows.append(row))
    return heads.requires_grad_(False), rows


def robust_bon(seed, quick, flip):
    """
    Best of n by each reward, from the same samples, which the members score once. Leaves the rewards in the base run's folder, for robust_ppo.
    """
    run = base(seed, quick)
    pairs, rows, (M, N) = noisy_labels(run, seed, quick, flip), [], (8, 16) if quick else (48, 128)
    members = fit_ensemble(run, pairs, 2 if quick else 5, seed)
    for loss in ("mse", "nll"):  # the likelihood's heads are those that go on
        heads, logged = fit_heads(members[0], pairs, run, seed, loss)
        rows.append(dict(study="trap", seed=seed, flip=flip, how=loss, **{name: sum(row[name] for row in logged[-10:]) / len(logged[-10:])
                                                                          for name in ("std", "error")}))
    torch.save((members, heads), run.folder / f"robust-{flip}.pt")
    rollouts, gold = reference_samples(run, M, N, seed)
    scores = torch.stack([score_batches(model, rollouts) for model in members])                          # (k, M N)
    with torch.no_grad():
        means, stds = (torch.cat(parts, dim=1) for parts in zip(*[heads(rollout) for rollout in rollouts]))  # (5, M N) each
    for how in HOWS:
        if how == "single":  # the average over the members, each on its own
            proxies = scores
        else:
            proxies = (robust_reward(means, stds, float(how.split()[1])) if how.startswith("brme") else aggregate(scores, how))[None]
        rows += [dict(study="best of n", seed=seed, flip=flip, how=how, n=n, gold=sum(best_of_n(proxy.view(M, N), gold, n).mean().item()
                                                                                  for proxy in proxies) / len(proxies)) for n in powers(N)]
    return rows


def robust_ppo(seed, quick, flip, how):
    """A long PPO run without a leash on one of the rewards."""
    run = base(seed, quick)
    members, heads = torch.load(run.folder / f"robust-{flip}.pt", weights_only=False)
    if how == "single":
        reward_model = members[0]
    elif how.startswith("brme"):
        reward_model = RobustReward(heads, float(how.split()[1]))
    else:
        reward_model = Ensemble(members, how)
    _, rows = optimise(run, reward_model, 0.0, 4 if quick else 18, seed, lr=3e-4, critic=members[0])
    gold, kl = (windows(rows, name, 1 if quick else 3) for name in ("gold", "kl"))
    return [dict(study="ppo", seed=seed, flip=flip, how=how, n=w, gold=g, d=math.sqrt(max(x, 0.0))) for w, (g, x) in enumerate(zip(gold, kl))]


def robust(seeds, quick, out):
    """
    Question: does a reward that knows what it does not know resist over-optimisation?

    Claims: an ensemble's minimum (WCO) or mean minus variance (UWO) gives more gold than a single reward model and falls less, above all with 25%
    wrong labels (Coste et al. 2024, arXiv:2310.02743); a mixture of the nominal reward and the worst case over heads is stabler at the end of
    long PPO than the nominal one (Yan et al. 2024, arXiv:2409.15360). Where all members share an error, no ensemble helps (Eisenstein et al. 2023).
    Criteria, with 25% flipped labels: (best of n) at the largest n both WCO and UWO have more gold than the average single model by more than 2
    standard errors over seeds, and fall less from their peaks, where the single model falls by more than 2 standard errors, or there is nothing to
    resist; (PPO) the same at the end of a run with beta 0, where the single model is the first; (BRME) lambda 0.2 ends PPO with more gold than
    lambda 1 by more than 2 standard errors; (control) on the exact table where the members share their error, see studies_tree.py, the ensemble gains
    nothing. What the 8 x 8 table shows is told there too. The verdict is that of best of n and PPO together.
    """
    small = quick or seeds < 3
    flips, hows = (0.0, 0.25), {0.0: ("single",), 0.25: ("single", "wco")} if quick else LONG
    rows = sum(parallel(robust_bon, [(seed, quick, flip) for flip in flips for seed in range(seeds)]), [])
    rows += sum(parallel(robust_ppo, [(seed, quick, flip, how) for flip in flips for how in hows[flip] for seed in range(seeds)]), [])

    def curves(kind, flip, how):  # (S, W)
        return [[row["gold"] for row in rows if (row["study"], row["flip"], row["how"], row["seed"]) == (kind, flip, how, seed)] for seed in range(seeds)]

    summary, panels, verdicts, reached = [], [], [], []
    for kind in ("best of n", "ppo"):
        for flip in flips:
            panels.append(dict(title=f"{kind}, {flip:.0%} flipped", xlabel="n" if kind != "ppo" else "window of iterations", ylabel="gold",
                               xscale="log" if kind != "ppo" else "linear", lines=[]))
            for how in HOWS if kind != "ppo" else hows[flip]:
                gold = curves(kind, flip, how)
                mean = [mean_se(column)[0] for column in zip(*gold)]
                peak, fall, error = peak_and_fall(gold)
                late = [curve[len(curve) // 2:] for curve in gold]  # how far gold jumps from window to window in the second half
                summary.append({"optimiser": kind, "flipped": flip, "reward": how, "peak": mean[peak], "end": mean[-1],
                                "end_se": mean_se([curve[-1] for curve in gold])[1], "fall": fall, "fall_se": error,
                                "end-single": mean_se([a[-1] - b[-1] for a, b in zip(gold, curves(kind, flip, "single"))])[0],
                                "its se": mean_se([a[-1] - b[-1] for a, b in zip(gold, curves(kind, flip, "single"))])[1],
                                "fluctuation": mean_se([abs(b - a) for curve in late for a, b in zip(curve, curve[1:])])[0]})
                x = [row["n"] for row in rows if (row["study"], row["flip"], row["how"], row["seed"]) == (kind, flip, how, 0)]
                panels[-1]["lines"].append(dict(label=how, x=x, y=mean, yerr=[mean_se(column)[1] for column in zip(*gold)]))
        found = {row["reward"]: row for row in summary if row["optimiser"] == kind and row["flipped"] == 0.25}
        guarded, single = [found[how] for how in ("wco", "uwo") if how in found], found["single"]
        ends = all(row["end-single"] > 2 * row["its se"] for row in guarded)
        falls = all(row["fall"] < single["fall"] for row in guarded) if single["fall"] > 2 * single["fall_se"] else None
        reached += [ends, falls]
        verdicts += [f"{kind}, end: " + ruled(small, ends, "; ".join(f"{row['reward']} ends {row['end-single']:+.2f} ± {row['its se']:.2f} from single"
                                                                     for row in guarded)),
                     f"{kind}, fall: " + ruled(small, falls, f"single falls {single['fall']:.2f} ± {single['fall_se']:.2f}, "
                                               + ", ".join(f"{row['reward']} {row['fall']:.2f}" for row in guarded))]
    if not quick:
        gain, error = mean_se([a[-1] - b[-1] for a, b in zip(*(curves("ppo", 0.25, how) for how in ("brme 0.2", "brme 1.0")))])
        verdicts.append("BRME: " + ruled(small, gain > 2 * error, f"lambda 0.2 ends {gain:+.2f} ± {error:.2f} from lambda 1"))
    verdicts.insert(0, ruled(small, together(reached), "best of n and PPO with 25% flipped labels, all of the four below"))
    _, exact_text = studies_tree.robust_exact(None, quick, out / "exact")
    trap = [dict(loss=loss, flipped=flip, **{key: value for name in ("std", "error") for key, value in zip((name, f"{name}_se"), mean_se(
        [row[name] for row in rows if (row["study"], row["how"], row["flip"]) == ("trap", loss, flip)]))}) for flip in flips for loss in ("mse", "nll")]
    stuck = {row["loss"]: row["std"] / row["error"] for row in trap if row["flipped"] == 0.25}
    verdicts.append(f"trap: under MSE the heads' std ends at {stuck['mse']:.2f} of their error, under the likelihood at {stuck['nll']:.2f}")
    columns = ["optimiser", "flipped", "reward", "peak", "end", "end_se", "fall", "fall_se", "end-single", "its se", "fluctuation"]
    text = "\n\n".join([table(summary, columns), table(trap, ["loss", "flipped", "std", "std_se", "error", "error_se"]), exact_text])
    return publish(out, rows, text, verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# 5. the limits of reward models

def limits_labels(seed, quick, n, flip):
    """What the number of labels and their noise do to the reward model's accuracy."""
    run = base(seed, quick)
    return dict(part="labels", seed=seed, labels=n, flip=flip, accuracy=gold_accuracy(run, fit(run, labelled(run, n, seed, flip), seed), run.pairs()[1]))


def limits_subject(seed, quick):
    """A subject that no label is about: accuracy on it, and on the others. The SFT policy's demonstrations left it out too."""
    run = base(seed, quick, "--held-out", "film")
    model, heldout = fit(run, labelled(run, 64 if quick else 1000), seed), run.pairs()[1]
    film = [world.subject_of(pair["text"][0]) == "film" for pair in heldout]
    return [dict(part="subject", seed=seed, subject=name, accuracy=gold_accuracy(run, model, [pair for pair, is_film in zip(heldout, film) if is_film == wanted]))
            for name, wanted in (("held-out subject", True), ("other subjects", False))]


def limits_coverage(seed, quick, k):
    """As many labels as ever, but on prompts about k of the five subjects: accuracy on those, and on the subjects that were not labelled."""
    run, subjects = base(seed, quick), list(world.ASPECTS)
    seen = [subjects[(seed + i) % len(subjects)] for i in range(k)]
    train, heldout = ([(pair, world.subject_of(pair["text"][0]) in seen) for pair in side] for side in run.pairs())
    model = fit(run, [pair for pair, is_seen in train if is_seen][:24 if quick else 400], seed)
    labelled_on, others = (gold_accuracy(run, model, [pair for pair, is_seen in heldout if is_seen == wanted]) for wanted in (True, False))
    return dict(part="coverage", seed=seed, subjects=k, labelled=labelled_on, unlabelled=others)


def limits_tax(seed, quick):
    """Log-likelihood of held-out texts, in nats a token, before and after PPO and DPO: what alignment costs elsewhere."""
    run = base(seed, quick)
    sft, pairs = run.load_network("sft", "sft"), labelled(run, 64 if quick else 1000)
    ppo, _ = optimise(run, fit(run, pairs, seed), 0.1, 3 if quick else 24, seed)
    dpo = copy.deepcopy(sft).requires_grad_(True)
    train_dpo(dpo, sft, pairs, pad_id(run.tokenizer), beta=0.5, batch_size=8 if quick else 32, lr=2e-4, seed=seed)
    rng, end = random.Random(seed + 1000), end_id(run.tokenizer)
    texts = [(run.tokenizer.encode_ordinary(world.make_document(rng)) + [end])[:run.config.block_size - 1] for _ in range(32 if quick else 256)]
    batch = collate([[end]] * len(texts), texts, pad_id(run.tokenizer))
    with torch.no_grad():
        return [dict(part="tax", seed=seed, policy=name, loglik=(response_logprobs(policy, batch).sum() / batch.mask.sum()).item())
                for name, policy in (("pretrained", run.load_network("pretrained", "pretrain")), ("sft", sft), ("ppo", ppo), ("dpo", dpo))]


def limits(seeds, quick, out):
    """
    Question: what can go wrong with a reward model even when all is done right?

    Claims ('RLHF Deciphered', arXiv:2404.08555, sections 5, 5.1 and 7.7, which has no experiments of its own): small error on labelled data says
    nothing beyond it (misgeneralisation); noise and few labels make it worse; alignment costs likelihood elsewhere (the alignment tax). Coverage of
    outputs, the trade-off in beta, sparse rewards, and two annotators in one reward are done exactly, on the tree: studies_tree.limits_exact.
    Criteria: (labels) accuracy rises with the number of labels without flips, and falls with flips at the largest number, both with Spearman beyond
    0.9 of the means over seeds; (coverage) with labels on prompts about one subject, accuracy on the others is lower by more than 2 standard errors
    over seeds, and it rises with the number of subjects, Spearman beyond 0.9; (subject) accuracy on a subject that the demonstrations left out too is
    lower than on the others by more than 2 standard errors; (tax) held-out texts are less likely after PPO and after DPO than under SFT, by more than
    2 standard errors. The exact parts have their own.
    """
    small = quick or seeds < 3
    sizes, flips = ((16, 64), (0.0, 0.4)) if quick else ((125, 500, 2000), (0.0, 0.1, 0.25, 0.4))
    grid = [(n, 0.0) for n in sizes] + [(sizes[-1], flip) for flip in flips[1:]]
    rows = parallel(limits_labels, [(seed, quick, n, flip) for n, flip in grid for seed in range(seeds)])
    subjects = (1, 4) if quick else (1, 2, 3, 4)
    rows += parallel(limits_coverage, [(seed, quick, k) for k in subjects for seed in range(seeds)])
    rows += sum(parallel(limits_subject, [(seed, quick) for seed in range(seeds)]) + parallel(limits_tax, [(seed, quick) for seed in range(seeds)]), [])

    def over_seeds(value, **key):
        return [row[value] for row in rows if all(row.get(name) == wanted for name, wanted in key.items())]

    accuracy = {(n, flip): mean_se(over_seeds("accuracy", part="labels", labels=n, flip=flip)) for n, flip in grid}
    up = spearman(sizes, [accuracy[n, 0.0][0] for n in sizes])
    down = spearman(flips, [accuracy[sizes[-1], flip][0] for flip in flips])
    covered = {k: mean_se(over_seeds("unlabelled", part="coverage", subjects=k)) for k in subjects}
    wider = spearman(subjects, [covered[k][0] for k in subjects])
    blind, blind_se = mean_se([a - b for a, b in zip(*(over_seeds(side, part="coverage", subjects=1) for side in ("labelled", "unlabelled")))])
    unseen, error = mean_se([a - b for a, b in zip(over_seeds("accuracy", subject="other subjects"), over_seeds("accuracy", subject="held-out subject"))])
    tax = {name: mean_se([a - b for a, b in zip(over_seeds("loglik", policy="sft"), over_seeds("loglik", policy=name))]) for name in ("ppo", "dpo")}
    summary = [dict(part="labels", what=f"{n} labels, {flip:.0%} flipped", value=mean, se=se) for (n, flip), (mean, se) in accuracy.items()]
    summary += [dict(part="coverage", what=f"{k} subjects labelled, {side} ones", value=mean, se=se) for k in subjects for side in ("labelled", "unlabelled")
                for mean, se in [mean_se(over_seeds(side, part="coverage", subjects=k))]]
    summary += [dict(part="accuracy", what=name, **dict(zip(("value", "se"), mean_se(over_seeds("accuracy", subject=name)))))
                for name in ("other subjects", "held-out subject")]
    summary += [dict(part="nats a token", what=name, **dict(zip(("value", "se"), mean_se(over_seeds("loglik", policy=name)))))
                for name in ("pretrained", "sft", "ppo", "dpo")]
    _, exact_text = studies_tree.limits_exact(None, quick, out / "exact")
    verdicts = ["labels: " + ruled(small, up > 0.9 and down < -0.9, f"Spearman of accuracy with labels {up:+.2f}, with flips {down:+.2f}"),
                "coverage: " + ruled(small, blind > 2 * blind_se and wider > 0.9, f"labels on one subject: {blind:.3f} ± {blind_se:.3f} less accurate on the "
                                     f"others; Spearman of that accuracy with the number of subjects {wider:+.2f}"),
                "subject: " + ruled(small, unseen > 2 * error, f"{unseen:.3f} ± {error:.3f} less accurate on the subject that no label and no "
                                    "demonstration is about"),
                "tax: " + ruled(small, all(cost > 2 * se for cost, se in tax.values()),
                                  "; ".join(f"{name} costs {cost:.3f} ± {se:.3f} nats a token" for name, (cost, se) in tax.items()))]
    panels = [dict(title="coverage", xlabel="subjects that labels are about", ylabel="accuracy against gold",
                   lines=[dict(label=side, x=subjects, y=[mean for mean, _ in values], yerr=[se for _, se in values]) for side in ("labelled", "unlabelled")
                          for values in [[mean_se(over_seeds(side, part="coverage", subjects=k)) for k in subjects]]]),
              dict(title="labels", xlabel="labels", ylabel="accuracy against gold", xscale="log",
                   lines=[dict(label="no flips", x=sizes, y=[accuracy[n, 0.0][0] for n in sizes], yerr=[accuracy[n, 0.0][1] for n in sizes])]),
              dict(title=f"noise, {sizes[-1]} labels", xlabel="share of labels flipped", ylabel="accuracy against gold",
                   lines=[dict(label="accuracy", x=flips, y=[accuracy[sizes[-1], f][0] for f in flips], yerr=[accuracy[sizes[-1], f][1] for f in flips])])]
    return publish(out, rows, table(summary, ["part", "what", "value", "se"]) + "\n\n" + exact_text, verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# 6. the frontier

class Gold(torch.nn.Module):
    """The oracle in a reward model's place: gold (B,) of a rollout."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, batch):
        prompts = [row[batch.P - n:batch.P] for row, n in zip(batch.ids.tolist(), batch.prompt_lens.tolist())]
        return self.run.gold(prompts, batch.response_ids())


def frontier_job(seed, quick, method, setting):
    """One policy, judged on the reward model's score and on gold."""
    run = base(seed, quick)
    model, sft = run.load_network("reward", "reward"), run.load_network("sft", "sft")
    if method.startswith("ppo"):
        policy, _ = optimise(run, Gold(run) if method == "ppo on gold" else model, setting, run.config.ppo_iterations, seed, lr=run.config.ppo_lr,
                             batch_size=run.config.ppo_batch, critic=model)
    else:
        policy = copy.deepcopy(sft).requires_grad_(True)
        train_dpo(policy, sft, run.pairs()[0], pad_id(run.tokenizer), beta=setting, batch_size=32, lr=2e-4, kind=method, seed=seed)
    _, opponents = answers(run, sft, 32 if quick else 512, seed + 1)
    return dict(seed=seed, method=method, setting=setting, **judge(run, policy, sft, opponents, seed, model))


def frontier_reference(seed, quick):
    """From SFT samples alone: SFT, best of n, and the exact curves of the optimum for the score and for gold, while 100 samples carry the weight."""
    run = base(seed, quick)
    M, N = (16, 16) if quick else (256, 64)
    rollouts, gold = reference_samples(run, M, N, seed)
    score = score_batches(run.load_network("reward", "reward"), rollouts).view(M, N)
    rows = [dict(seed=seed, method="best of n", setting=n, kl=best_of_n_kl(n), score=best_of_n(score, score, n).mean().item(),
                 gold=best_of_n(score, gold, n).mean().item(), gold_se=standard_error(best_of_n(score, gold, n)),
                 score_se=standard_error(best_of_n(score, score, n))) for n in powers(N // 2)[1:]]
    rows.append(dict(seed=seed, method="SFT", setting=0, kl=0.0, score=score.mean().item(), gold=gold.mean().item(),
                     score_se=standard_error(score.mean(dim=1)), gold_se=standard_error(gold.mean(dim=1))))
    for name, reward in (("score", score), ("gold", gold)):
        for beta in [8 * 0.85 ** i for i in range(40)]:
            J, ess = optimum(reward, beta)
            if ess >= 100 or quick and ess >= 10:
                value = optimum_mean(reward, reward, beta)
                # the curve is estimated too: the error of a weighted mean
                spread = math.sqrt(optimum_mean((reward - value) ** 2, reward, beta) / ess)
                rows.append(dict(seed=seed, method=f"optimum of {name}", setting=beta, kl=(value - J) / beta, **{name: value, f"{name}_se": spread}))
    return rows


def frontier(seeds, quick, out):
    """
    Question: how much reward does each method get for the KL that it spends, and how far is it from the best possible?

    Claim (Ziegler et al. 2019; Rafailov et al. 2023, whose Figure 2 has this form): no policy lies above the curve of ref exp(r / beta) / Z, the
    optimum by reweighting, and a good optimiser lies close below it. (Their finding that DPO beats PPO even on the true reward is about their PPO;
    it is not asked here.)
    Criterion: reproduced if every point lies under the curve of its reward plus 2 standard errors (its own and the curve's), and the best PPO point
    of each kind, on the score and on gold, is within 10% of the curve's gain over SFT at equal KL. Points beyond the curve's last trustworthy
    KL (effective sample size 100) are told and not judged. PPO has the settings of minirlhf.py, with beta 0.3 so that it ends where the curve is sure.
    """
    small = quick or seeds < 3
    settings = {"dpo": (0.2, 0.5), "ipo": (0.1, 0.5), "ppo": (0.3,), "ppo on gold": (0.3,)}
    if quick:
        settings = {method: values[-1:] for method, values in settings.items()}
    jobs = [(seed, quick, method, value) for method, values in settings.items() for value in values for seed in range(seeds)]
    rows = sum(parallel(frontier_reference, [(seed, quick) for seed in range(seeds)]), []) + parallel(frontier_job, jobs)
    panels = [dict(title=f"{name}, seed 0", xlabel="KL (nats)", ylabel=name, lines=[]) for name in ("score", "gold")]
    judged, summary = [], []
    for name, panel in zip(("score", "gold"), panels):
        for seed in range(seeds):
            curve = sorted((row["kl"], row[name], row[f"{name}_se"]) for row in rows if (row["seed"], row["method"]) == (seed, f"optimum of {name}"))
            xs, ys, es = (list(column) for column in zip(*curve))
            start = next(row[name] for row in rows if (row["seed"], row["method"]) == (seed, "SFT"))
            for row in rows:
                if row["seed"] != seed or row["method"] == "SFT" or row["method"].startswith("optimum"):
                    continue
                inside = row["kl"] <= xs[-1]
                best, error = interpolate(row["kl"], xs, ys), math.hypot(interpolate(row["kl"], xs, es), row[f"{name}_se"])
                judged.append(dict(reward=name, method=row["method"], setting=row["setting"], seed=seed, kl=row["kl"], value=row[name], curve=best, se=error,
                                   inside=inside, under=row[name] <= best + 2 * error, share=(row[name] - start) / (best - start)))
        first = [row for row in rows if row["seed"] == 0]
        panel["lines"].append(dict(label="the optimum", **dict(zip("xy", zip(*sorted((r["kl"], r[name]) for r in first if r["method"] == f"optimum of {name}")))),
                                   style="k-"))
        panel["lines"] += [dict(label=method, **dict(zip("xy", zip(*sorted((r["kl"], r[name]) for r in first if r["method"] == method)))), style="o--")
                           for method in ["SFT", "best of n", *settings]]
        for method in ["best of n", *settings]:
            for value in sorted({row["setting"] for row in judged if row["method"] == method}):
                points = [row for row in judged if (row["reward"], row["method"], row["setting"]) == (name, method, value)]
                summary.append(dict(reward=name, method=method, setting=value, **{key: mean_se([row[key] for row in points])[0] for key in
                                                                                  ("kl", "value", "curve", "share")},
                                    value_se=mean_se([row["value"] for row in points])[1], share_se=mean_se([row["share"] for row in points])[1],
                                    under=f"{sum(row['under'] for row in points)}/{len(points)}", judged=f"{sum(row['inside'] for row in points)}/{len(points)}"))
    under = all(row["under"] for row in judged if row["inside"])
    best = {method: max((row["share"] for row in summary if (row["reward"], row["method"]) == (name, method) and row["judged"] == f"{seeds}/{seeds}"),
                        default=math.nan) for name, method in (("score", "ppo"), ("gold", "ppo on gold"))}
    close = {method: None if math.isnan(share) else share >= 0.9 for method, share in best.items()}  # a point beyond the curve in one seed is not judged
    above = [f"{row['method']} {row['setting']} seed {row['seed']} on {row['reward']}" for row in judged if row["inside"] and not row["under"]]
    verdicts = [ruled(small, together([under, *close.values()]), "all of what follows"),
                ruled(small, under, "all points under the curve + 2 s.e." + (f" but {'; '.join(above)}" if above else ""))]
    verdicts += [ruled(small, close[method], f"{method} has {share:.2f} of the curve's gain at equal KL") for method, share in best.items()]
    return publish(out, rows, table(summary, ["reward", "method", "setting", "kl", "value", "value_se", "curve", "share", "share_se",
                                               "under", "judged"]), verdicts, panels)


# ---------------------------------------------------------------------------------------------------------------------
# the command line

STUDIES = dict(overopt=overopt, direct=direct, tree=studies_tree.tree, robust=robust, limits=limits, frontier=frontier)


def main(argv=None):
    """Run one study; returns the exit status."""
    parser = argparse.ArgumentParser(prog="studies.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("study", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--quick", action="store_true", help="small, in seconds: to see that it works, not what comes out")
    parser.add_argument("--seeds", type=int, help="how many seeds (3, or 24 for the tree; 1 and 4 with --quick)")
    arguments = parser.parse_args(argv)
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error("--seeds is at least 1")
    name, quick = arguments.study, arguments.quick
    seeds = arguments.seeds or ((4 if quick else 24) if name == "tree" else 1 if quick else 3)
    out, started = HOME / (name + ("-quick" if quick else "")), time.perf_counter()
    os.environ["TQDM_DISABLE"] = "1"  # the bars of the jobs: they run side by side and would write over one another
    make_bases(name, seeds, quick)
    print(STUDIES[name].__doc__.split("\n\n")[0].strip())
    _, text = STUDIES[name](seeds, quick, out)
    print(f"\n{text}\n\n{seeds} seeds, {time.perf_counter() - started:.0f} s on {cores()} cores; written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
