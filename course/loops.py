"""
Set 6, the bug hunt: how the training loops are called. A few iterations of tiny networks; every logged number, the size
of the weights, what is saved, and how often each canary is asked, are compared.
"""

import copy
import math
from functools import partial
from types import SimpleNamespace

import torch
from draw import PAD, E, batch_of, network, raised
from set2 import quiet as saving

import dpo
import grpo
import ppo
import reward


def settings(**changed):
    usual = dict(ppo_lr=1e-2, critic_lr=2e-2, grpo_lr=1e-2, ppo_iterations=3, ppo_batch=12, minibatch=5, ppo_epochs=3,
                 response_tokens=5, temperature=0.8, beta=0.3, gamma=0.97, lam=0.8, clip=0.1, value_clip=0.2,
                 grpo_kind="rloo", group=3, grpo_kl="reward", grpo_mean="", grpo_ratio="token", grpo_clip_high=0.3,
                 batch_size=4, reward_lr=1e-2, reward_epochs=2, weight_decay=0.1, dpo_beta=0.3, dpo_lr=1e-2,
                 dpo_kind="dpo", label_smoothing=0.0, dpo_epochs=2)
    return SimpleNamespace(**{**usual, **changed})


def size(net):
    return float(sum((p.detach().double() ** 2).sum() * (1 + i % 3) for i, p in enumerate(net.parameters())))


def four(seed):
    """policy, critic, reference, reward model."""
    reference = network(seed).requires_grad_(False)
    scorer = reward.RewardModel(network(seed + 1)).double()
    with torch.no_grad():
        scorer.score.weight.copy_(torch.linspace(-1, 1, 8)[None])
    critic = copy.deepcopy(scorer)
    critic.score.bias.data.fill_(0.5)
    return copy.deepcopy(reference).requires_grad_(True), critic, reference, scorer.requires_grad_(False)


def draw_train_ppo(draw):
    return [dict(prompts=draw.texts(B=6)["prompts"], seed=draw.integer(0, 10 ** 6))]


draw_train_grpo = draw_train_ppo


def logged(rows):
    return lambda **row: rows.append({name: x for name, x in row.items() if name != "seconds"})


quiet = saving([])
CANARIES = ("check_kl", "check_start_kl", "check_first_ratio", "check_padding", "check_trains", "finite")


def called(module, train):
    """How often a training loop looks at each canary."""
    counts, kept = {}, {name: getattr(module, name) for name in CANARIES}
    for name in CANARIES:
        def watched(*args, name=name):
            counts[name] = counts.get(name, 0) + 1
            return kept[name](*args)
        setattr(module, name, watched)
    try:
        train()
    finally:
        for name in CANARIES:
            setattr(module, name, kept[name])
    return counts


def run_train_ppo(case):
    policy, critic, reference, scorer = four(case["seed"])
    rows, saved, seen = [], [], []
    gold = lambda prompts, rollout: torch.tensor([float(len(prompt)) for prompt in prompts])  # noqa: E731
    counts = called(ppo, lambda: ppo.train_ppo(policy, critic, reference, scorer, case["prompts"], settings(), 5,
                                               logged(rows), gold, saving(saved),
                                               watch=lambda iteration, network: seen.append(iteration)))
    ppo.train_ppo(*four(case["seed"]), case["prompts"], settings(), 5, progress=saving([], 2),
                  watch=lambda iteration, network: seen.append(iteration))
    broken = four(case["seed"])
    wild = four(case["seed"])
    strange = network(case["seed"] + 2).requires_grad_(False)
    frozen = copy.deepcopy(broken[1]).requires_grad_(False)
    nan = lambda batch: torch.full((len(batch),), math.nan)  # noqa: E731

    def tried(*four_, **changed):
        return raised(ppo.train_ppo, *four_, case["prompts"], settings(ppo_iterations=1, **changed), 5,
                      progress=quiet)
    with_graph = [scorer.requires_grad_(True)(batch_of(dict(prompts=[[1]], responses=[[E]]))).requires_grad]
    return dict(rows=rows, policy=size(policy), critic=size(critic), graph=with_graph, counts=counts, saved=saved,
                seen=seen,
                same=tried(reference, critic, reference, scorer), frozen_critic=tried(broken[0], frozen, *broken[2:]),
                other_reference=tried(wild[0], wild[1], strange, wild[3]),
                nan_scores=tried(*four(case["seed"])[:3], nan), no_gradient=gradients(case),
                frozen_policy=tried(four(case["seed"])[0].requires_grad_(False), *four(case["seed"])[1:]))


def gradients(case):
    """Whether the reward model is called with gradients on, in PPO."""
    policy, critic, reference, scorer = four(case["seed"])
    seen = []

    def watched(batch):
        seen.append(torch.is_grad_enabled())
        return scorer(batch)
    ppo.train_ppo(policy, critic, reference, watched, case["prompts"], settings(ppo_iterations=1), 5, progress=quiet)
    return seen


def run_train_grpo(case):
    found = {}
    for name, changed in dict(usual={}, loss=dict(grpo_kl="loss", grpo_kind="grpo"),
                              gspo=dict(grpo_ratio="gspo", grpo_mean="token")).items():
        policy, _, reference, scorer = four(case["seed"])
        rows, saved, seen, config = [], [], [], settings(**changed)
        train = partial(grpo.train_grpo, policy, reference, scorer, case["prompts"], config, 5, logged(rows),
                        progress=saving(saved), watch=lambda iteration, network, seen=seen: seen.append(iteration))
        counts = called(grpo, train)
        found[name] = dict(rows=rows, policy=size(policy), counts=counts, saved=saved, seen=seen)
    policy, _, reference, scorer = four(case["seed"])
    resumed = []
    grpo.train_grpo(policy, reference, scorer, case["prompts"], settings(), 5, progress=saving([], 2),
                    watch=lambda iteration, network: resumed.append(iteration))
    strange, nan = network(case["seed"] + 2).requires_grad_(False), lambda batch: torch.full((len(batch),), math.nan)

    def tried(policy, reference, scorer):
        return raised(grpo.train_grpo, policy, reference, scorer, case["prompts"], settings(ppo_iterations=1), 5,
                      progress=quiet)
    policy, _, reference, scorer = four(case["seed"])
    return dict(found, resumed=resumed, other_reference=tried(policy, strange, scorer),
                same=tried(reference, reference, scorer),
                nan=tried(four(case["seed"])[0], reference, nan),
                frozen=tried(four(case["seed"])[0].requires_grad_(False), reference, scorer))


def run_train_reward_model(case):
    net = reward.RewardModel(network(case["seed"])).double()
    net.score.weight.data.copy_(torch.linspace(-1, 1, 8)[None])
    rows = []
    frozen = copy.deepcopy(net).requires_grad_(False)
    reward.train_reward_model(net, case["pairs"], PAD, settings(), 5, logged(rows), quiet)
    return dict(rows=rows, size=size(net), frozen=raised(reward.train_reward_model, frozen, case["pairs"], PAD,
                                                         settings(), 5, progress=quiet))


def run_train_dpo(case):
    reference = network(case["seed"]).requires_grad_(False)
    found = {}
    for kind in ("dpo", "ipo"):
        policy, rows = copy.deepcopy(reference).requires_grad_(True), []
        dpo.train_dpo(policy, reference, case["pairs"], PAD, settings(dpo_kind=kind), 5, logged(rows), quiet)
        found[kind] = dict(rows=rows, policy=size(policy))

    def tried(policy, reference, **changed):
        return raised(dpo.train_dpo, policy, reference, case["pairs"], PAD, settings(**changed), 5, progress=quiet)
    near = copy.deepcopy(reference)
    near.ln_f.bias.data += 3e-3  # margins of some 1e-3 nats
    return dict(found, same=tried(reference, reference), frozen=tried(copy.deepcopy(reference), reference),
                other=tried(network(case["seed"] + 1), reference),
                other_beta=tried(network(case["seed"] + 1), reference, dpo_beta=1e-4))
