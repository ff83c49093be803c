"""
What the studies with a GPT share: base runs, reward models, PPO on any reward, samples and their gold, and curves.

Units: gold and score in standard deviations of the SFT policy's, KL in nats a response, d = sqrt(KL). Errors are
standard errors over seeds.

Letters: M prompts, N samples of a prompt, n answers, k members of an ensemble, S seeds, W windows of iterations.
"""

import contextlib
import copy
import io
import math
import random
from dataclasses import replace
from pathlib import Path

import torch

import minirlhf
from data import UserError, pad_id
from evaluate import sample_policy, standard_error, win_rate
from pipeline.config import parse_config
from pipeline.run import Run
from ppo import exact_kl, train_ppo
from reward import normalise, score_batches, score_pairs
from robust import train_ensemble
from studies.lab import mean_se, parallel, verdict

HOME = Path("runs/studies")
QUICK_BASE = "--quick --n-layer 1 --n-embd 32 --pretrain-steps 60 --sft-steps 30 --pairs 200".split()
WIDTHS = {True: [], False: [("--n-embd", "32"), ("--n-embd", "64")]}  # of `direct`, besides the default width of 128

# ---------------------------------------------------------------------------------------------------------------------
# base runs

def base(seed, quick, *flags):
    """
    Return a Run with an SFT policy, labelled pairs and a reward model, as minirlhf.py makes it.

    The first study that needs a base run makes it, the others find it. Raises UserError when it cannot be made.
    """
    name = f"base-{seed}"
    if quick:
        name += "-quick"
    for flag in flags:
        name += "-" + flag.strip("-")
    folder = HOME / name
    argv = ["--seed", str(seed), "--out", str(folder), "--device", "cpu", *flags]
    if quick:
        argv += QUICK_BASE
    if not (folder / "reward.json").exists():  # what the last stage writes
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = minirlhf.main([*argv, "--stages", "pretrain,sft,preferences,reward"])
        if status:
            raise UserError(f"{folder} could not be made: {output.getvalue().splitlines()[-1]}")
    return Run(parse_config([*argv, "--stages", "report"]))


def make_bases(name, seeds, quick):
    """Make the base runs that a study needs, in parallel, before its jobs look for them."""
    variants = [()]  # flags
    if name == "tree":
        variants = []
    if name == "direct":
        variants += WIDTHS[quick]
    if name == "limits":
        variants.append(("--held-out", "film"))
    parallel(make_base, [(seed, quick, *flags) for flags in variants for seed in range(seeds)])


def make_base(seed, quick, *flags):
    base(seed, quick, *flags)  # a Run is not returned: it need not be picklable


# ---------------------------------------------------------------------------------------------------------------------
# labels and reward models

def labelled(run, n, seed=0, flip=0.0):
    """Return the first n training pairs, with the labels of a random share `flip` of them turned around."""
    rng = random.Random(seed)
    train, _ = run.pairs()
    pairs = []
    for pair in train[:n]:
        if rng.random() < flip:
            pair = dict(pair, chosen=pair["rejected"], rejected=pair["chosen"], gold=pair["gold"][::-1])
        pairs.append(pair)
    return pairs


def fit_ensemble(run, pairs, k, seed):
    """Fit k reward models to the same pairs, each with mean 0 and deviation 1 on samples of the SFT policy."""
    sft = run.load_network("sft")
    config = replace(run.config, reward_epochs=2, reward_lr=1e-3, batch_size=min(32, len(pairs) // 8))
    members = train_ensemble(sft, pairs, pad_id(run.tokenizer), k, config, seed)
    prompts, _ = run.prompts()
    samples = sample_policy(sft, prompts[:512], run.config.response_tokens, 1.0, seed, "normalise")
    for member in members:
        member.requires_grad_(False)
        normalise(member, samples)
    return members


def fit(run, pairs, seed):
    return fit_ensemble(run, pairs, 1, seed)[0]


def gold_accuracy(run, model, pairs):
    """Compute the share of pairs that the reward model orders as gold does. Pairs of equal gold are left out."""
    pairs = [pair for pair in pairs if pair["gold"][0] != pair["gold"][1]]
    chosen, rejected = score_pairs(model, pairs, pad_id(run.tokenizer))                       # (pairs,) each
    gold = torch.tensor([pair["gold"] for pair in pairs])                                     # (pairs, 2)
    sign = (gold[:, 0] - gold[:, 1]).sign()  # -1 where gold says that the chosen response is the worse one
    return win_rate(sign * chosen, sign * rejected)


# ---------------------------------------------------------------------------------------------------------------------
# policies

def optimise(run, reward_model, beta, iterations, seed, lr=1e-3, batch_size=128, critic=None):
    """
    Train the SFT policy with PPO on any reward. Returns (policy, rows), with one logged row an iteration.

    A row holds the score, gold, kl and length of its rollout, which was sampled before the updates.
    critic: the network that the critic starts from, by default the reward model.
    """
    if run.config.quick:
        batch_size = 64
    if critic is None:
        critic = reward_model
    config = replace(run.config, beta=beta, ppo_iterations=iterations, ppo_batch=batch_size, minibatch=64,
                     ppo_epochs=2, ppo_lr=lr, critic_lr=1e-3)
    sft = run.load_network("sft")
    policy = copy.deepcopy(sft).requires_grad_(True)
    critic = copy.deepcopy(critic).requires_grad_(True)
    prompts, _ = run.prompts()
    rows = []

    def log(**row):
        rows.append(row)

    def gold_fn(prompts, rollout):
        return run.gold(prompts, rollout.response_ids())

    train_ppo(policy, critic, sft, reward_model, prompts, config, seed, log=log, gold_fn=gold_fn)
    return policy, rows


def response_lists(rollouts):
    """Return the responses of all rollouts as one list of lists of ids."""
    responses = []
    for rollout in rollouts:
        responses += rollout.response_ids()
    return responses


def answers(run, policy, n, seed):
    """Sample one answer to each of n held-out prompts. Returns (rollouts, gold (n,))."""
    _, heldout = run.prompts()
    prompts = (heldout * n)[:n]  # they repeat when there are fewer than n
    rollouts = sample_policy(policy, prompts, run.config.response_tokens, 1.0, seed, "answers")
    return rollouts, run.gold(prompts, response_lists(rollouts))


def judge(run, policy, sft, opponents, seed, reward_model=None):
    """
    Measure a policy on held-out prompts. Returns a dict of gold, kl, d, wins and length, with errors over the answers.

    opponents (n,): gold of SFT answers, one for each prompt. reward_model: also measure the score.
    """
    rollouts, gold = answers(run, policy, len(opponents), seed)
    lengths = torch.cat([rollout.response_lens for rollout in rollouts])                      # (n,)
    kl = torch.cat([exact_kl(policy, sft, rollout) for rollout in rollouts]).mean().item()
    row = dict(
        gold=gold.mean().item(),
        gold_se=standard_error(gold),
        kl=kl,
        d=math.sqrt(max(kl, 0.0)),  # rounding can make a KL of 0 negative
        wins=win_rate(gold, opponents),
        length=lengths.float().mean().item(),
    )
    if reward_model is not None:
        score = score_batches(reward_model, rollouts)                                         # (n,)
        row["score"] = score.mean().item()
        row["score_se"] = standard_error(score)
    return row


def reference_samples(run, M, N, seed):
    """Sample N SFT responses to each of M held-out prompts. Returns (rollouts, gold (M, N))."""
    _, heldout = run.prompts()
    prompts = []
    for prompt in (heldout * M)[:M]:
        prompts += [prompt] * N
    rollouts = sample_policy(run.load_network("sft"), prompts, run.config.response_tokens, 1.0, seed, "SFT samples")
    gold = run.gold(prompts, response_lists(rollouts))                                        # (M * N,)
    return rollouts, gold.view(M, N)


# ---------------------------------------------------------------------------------------------------------------------
# rows and curves

def powers(N):
    """Return 1, 2, 4, ... up to N."""
    return [2 ** i for i in range(int(math.log2(N)) + 1)]


def windows(rows, name, size=5):
    """Average a logged number over windows of `size` iterations, because the rollout of one iteration is noisy."""
    means = []
    for at in range(0, len(rows), size):
        window = column(rows[at:at + size], name)
        means.append(sum(window) / len(window))
    return means


def select(rows, **where):
    """Return the rows that have these values in these columns."""
    return [row for row in rows if where.items() <= row.items()]


def column(rows, name):
    return [row[name] for row in rows]


def curves_by_seed(rows, name, seeds, **where):
    """Gather one column of the selected rows as one curve for each seed, (S, W)."""
    curves = []
    for seed in range(seeds):
        curves.append(column(select(rows, seed=seed, **where), name))
    return curves


def mean_curve(curves):
    """Compute mean and standard error over seeds at every point of the curves (S, W). Returns two lists (W,)."""
    means = []
    errors = []
    for numbers in zip(*curves):  # one for each seed
        mean, error = mean_se(numbers)
        means.append(mean)
        errors.append(error)
    return means, errors


def peak_of_mean(curves):
    """Return the index of the highest point of the mean of the curves (S, W)."""
    means, _ = mean_curve(curves)
    return means.index(max(means))


def peak_and_fall(curves):
    """
    Measure how far curves (S, W) fall. Returns (index of the peak of their mean, mean fall, its standard error).

    The fall of a seed is measured from the peak of the *other* seeds to its own last point. Measured from a peak that
    its own noise picked, even a flat curve would fall.
    """
    falls = []
    for i, curve in enumerate(curves):
        others = curves[:i] + curves[i + 1:]
        if not others:  # a single seed has only its own peak
            others = curves
        falls.append(curve[peak_of_mean(others)] - curve[-1])
    fall, error = mean_se(falls)
    return peak_of_mean(curves), fall, error


def interpolate(x, xs, ys):
    """Interpolate y at x linearly between the points (xs, ys), in any order. Beyond the ends it is the end's y."""
    points = sorted(zip(xs, ys))
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


# ---------------------------------------------------------------------------------------------------------------------
# verdicts

def ruled(small, held, why):
    """
    Format the verdict on one criterion. held: True, False, or None if the data cannot tell.

    small: a quick pass, or fewer than three seeds, which can never tell.
    """
    if small:
        held = None
    return verdict(held, why)


def together(parts):
    """Combine verdicts: False if one of them is False, else None if one of them is None, else True."""
    if False in parts:
        return False
    if None in parts:
        return None
    return True
