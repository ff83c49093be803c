"""
Shared by the studies with a GPT: base runs, reward models, policies on any reward, samples and their gold, and curves.

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

import numpy
import torch

from dpo import train_dpo
from evaluate import sample_policy, standard_error, wins
from grpo import train_grpo
from minirlhf import SEEDS
from pipeline.config import Config
from pipeline.folder import lock, write_settings
from pipeline.run import Run
from pipeline.scores import scaled_gold
from pipeline.stages import all_stages
from ppo import exact_kl, train_ppo
from reward import RewardModel, normalise, score_batches, score_pairs, train_reward_model
from robust import RobustReward, make_members, normalise_robust, train_members
from studies.lab import column, source_key

HOME = Path("runs/studies")
STAGES = ("pretrain", "sft", "preferences", "reward")  # of a base run
QUICK_BASE = dict(n_layer=1, n_embd=32, documents=2000, pretrain_steps=40, pretrain_lr=5e-3, demonstrations=1000,
                  sft_steps=20, sft_lr=4e-3, pairs=200, ppo_iterations=6, ppo_batch=32, eval_prompts=64)

# ---- base runs ------------------------------------------------------------------------------------

def base(seed, quick, **changes):
    """
    A Run with an SFT policy, labelled pairs and a reward model, the same as minirlhf.py makes.

    changes: settings that are not at their default. The first study that needs a base run makes it, the others find it:
    its folder is named after its settings and the source.
    """
    config = Config(**{**(QUICK_BASE if quick else {}), **changes, "seed": seed})
    changed = [f"{name}-{value}" for name, value in changes.items()]
    name = "-".join(["base", str(seed), source_key("common"), *["quick"] * quick, *changed])
    run = Run(HOME / name, config, "cpu")
    stages = all_stages(config)
    if all(run.has(stages[name].files) for name in STAGES):
        return run
    with lock(run.folder), contextlib.redirect_stderr(io.StringIO()):  # without the bars: several jobs run side by side
        write_settings(run)
        for name in STAGES:
            if not run.has(stages[name].files):
                stage_seed = 1000 * seed + SEEDS[name]
                torch.manual_seed(stage_seed)
                stages[name].run(run, name, stage_seed)
                run.remove(["checkpoint.pt"])
    return run


def make_base(seed, quick):
    """Make a base run before several jobs look for it. It is not returned: a Run need not be picklable."""
    base(seed, quick)


# ---- labels and reward models ---------------------------------------------------------------------

def labelled(run, n, seed=0, flip=0.0):
    """The first n training pairs, with the labels of a random share `flip` of them turned around."""
    rng = random.Random(seed)
    pairs = []
    for pair in run.pairs[0][:n]:
        if rng.random() < flip:
            pair = dict(pair, chosen=pair["rejected"], rejected=pair["chosen"], gold=pair["gold"][::-1])
        pairs.append(pair)
    return pairs


def reward_settings(run, pairs):
    """The run's settings, with a pass over the pairs that suits any number of them."""
    return replace(run.config, reward_epochs=2, reward_lr=1e-3, reward_batch=min(32, len(pairs) // 8))


def sft_samples(run, seed):
    """Samples of the SFT policy on which rewards are normalised, a list of Rollouts."""
    return list(sample_policy(run.load_network("sft"), run.prompts[0][:512], run.config.response_tokens, 1.0, seed))


def fit(run, pairs, seed):
    """Fit a reward model to pairs, with mean 0 and deviation 1 on samples of the SFT policy."""
    sft = run.load_network("sft")
    torch.manual_seed(seed)  # of the first weights of the score layer
    model = RewardModel(sft).requires_grad_(True)
    for _ in train_reward_model(model, pairs, reward_settings(run, pairs), seed):
        pass
    normalise(model.requires_grad_(False), sft_samples(run, seed))
    return model


def fit_robust(run, kind, shares, seed, reward_model=None):
    """
    Fit a robust reward of this kind, a member to each of the shares of pairs. With lambda 0.5; set `lam` for others.

    reward_model: for brme, the model that the heads are fitted to.
    """
    members = make_members(run.load_network("sft"), kind, len(shares), seed)
    settings = reward_settings(run, min(shares, key=len))
    for _ in train_members(members, shares, settings, seed, reward_model):
        pass
    reward = RobustReward(members, kind, 0.5).requires_grad_(False)
    normalise_robust(reward, sft_samples(run, seed))
    return reward


def gold_accuracy(model, pairs):
    """The share of pairs that the reward model orders as gold does. Pairs of equal gold are left out."""
    pairs = [pair for pair in pairs if pair["gold"][0] != pair["gold"][1]]
    chosen, rejected = score_pairs(model, pairs)                                              # (pairs,) each
    gold = torch.tensor([pair["gold"] for pair in pairs])                                     # (pairs, 2)
    sign = (gold[:, 0] - gold[:, 1]).sign()  # -1 where gold says that the chosen response is the worse one
    return wins(sign * chosen, sign * rejected).mean().item()


# ---- policies -------------------------------------------------------------------------------------

def optimise(run, reward_model, seed, method="ppo", critic=None, watch=None, **settings):
    """
    Train the SFT policy on any reward, with PPO or a kind of train_grpo. Returns (policy, rows), a row an iteration.

    A row holds the metrics of the loop, and the gold of its rollout, which was sampled before the updates. The policy
    never sees gold. critic: the network that PPO's critic starts from, by default the reward model. watch(policy) is
    called after each iteration. settings: of the loop; the others are the run's, except that a rollout has at most 128
    responses.
    """
    config = replace(run.config, **{"ppo_batch": min(128, run.config.ppo_batch), **settings})
    sft = run.load_network("sft")
    policy = copy.deepcopy(sft).requires_grad_(True)
    if method == "ppo":
        critic = copy.deepcopy(reward_model if critic is None else critic).requires_grad_(True)
        loop = train_ppo(policy, critic, sft, reward_model, run.prompts[0], config, seed)
    else:
        loop = train_grpo(policy, sft, reward_model, run.prompts[0], replace(config, kind=method), seed)
    rows = []
    for metrics, _, rollout in loop:
        gold = scaled_gold(run, rollout.prompt_ids(), rollout.response_ids()).mean().item()
        rows.append(dict(metrics, gold=gold))
        if watch:
            watch(policy)
    return policy, rows


def fit_policy(run, pairs, seed, watch=None, **settings):
    """
    Fit the SFT policy to pairs directly, for one epoch, with these settings of train_dpo. Returns the policy.

    watch(policy) is called after each step.
    """
    sft = run.load_network("sft")
    policy = copy.deepcopy(sft).requires_grad_(True)
    config = replace(run.config, dpo_lr=2e-4, dpo_epochs=1, label_smoothing=0.0, **settings)
    for _ in train_dpo(policy, sft, pairs, config, seed):
        if watch:
            watch(policy)
    return policy


def response_lists(rollouts):
    """The responses of all rollouts as one list of lists of ids."""
    return [response for rollout in rollouts for response in rollout.response_ids()]


def answers(run, policy, M, N, seed):
    """Sample N answers to each of the first M held-out prompts, which repeat. Returns (rollouts, gold (M N,))."""
    prompts = [run.prompts[1][i % len(run.prompts[1])] for i in range(M) for _ in range(N)]
    rollouts = list(sample_policy(policy, prompts, run.config.response_tokens, 1.0, seed))
    return rollouts, scaled_gold(run, prompts, response_lists(rollouts))


def judge(run, policy, sft, n, seed, reward_model=None):
    """
    Measure a policy on n held-out prompts. Returns a dict of gold, kl, d and length, with errors over the answers.

    reward_model: also measure the score.
    """
    rollouts, gold = answers(run, policy, n, 1, seed)
    lengths = torch.cat([rollout.response_lens for rollout in rollouts])                      # (n,)
    kl = torch.cat([exact_kl(policy, sft, rollout) for rollout in rollouts]).mean().item()
    row = dict(gold=gold.mean().item(), gold_se=standard_error(gold), kl=kl, d=distance(kl),
               length=lengths.float().mean().item())
    if reward_model is not None:
        score = score_batches(reward_model, rollouts)                                         # (n,)
        row.update(score=score.mean().item(), score_se=standard_error(score))
    return row


def reference_samples(run, M, N, seed):
    """Sample N SFT responses to each of M held-out prompts. Returns (rollouts, gold (M, N))."""
    rollouts, gold = answers(run, run.load_network("sft"), M, N, seed)
    return rollouts, gold.view(M, N)


# ---- curves ---------------------------------------------------------------------------------------

def distance(kl):
    return math.sqrt(max(kl, 0.0))  # rounding can make a KL of 0 negative


def powers(N):
    """1, 2, 4, ... up to N."""
    return [2 ** i for i in range(N.bit_length())]


def windows(logged, size):
    """
    Average what `optimise` logged over windows of `size` iterations, because the rollout of one iteration is noisy.

    Returns a dict for each window: its number, the means of score, gold, kl and objective, and d.
    """
    rows = []
    for at in range(0, len(logged), size):
        part = logged[at:at + size]
        means = {name: sum(column(part, name)) / len(part) for name in ("score", "gold", "kl", "objective")}
        rows.append(dict(window=len(rows), **means, d=distance(means["kl"])))
    return rows


def interpolate(x, xs, ys):
    """Interpolate y at x linearly between the points (xs, ys), in any order. Beyond the ends it is the end's y."""
    return numpy.interp(x, *zip(*sorted(zip(xs, ys)))).item()
