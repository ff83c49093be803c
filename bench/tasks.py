"""
The benchmarks' policy, prompts and pairs, our side of every task, and how many operations it takes.

The policy has random weights, but it says E with a probability of 1/30 at each step (in the geometric mean). So
responses have natural lengths, about 20 tokens in the mean. The learning rate is too small to change that.

Letters: B batch, C embedding.
"""

import copy
import math
import random

import torch

from dpo import DPOConfig, train_dpo
from evaluate import sample_policy
from model import GPT, GPTConfig, generate
from ppo import PPOConfig, train_ppo
from reward import RewardModel

CONFIG = GPTConfig(vocab_size=560, block_size=96, n_layer=4, n_head=4, n_embd=128)
END_PROBABILITY = 1 / 30
BATCH = 128  # rows of a rollout and of a PPO iteration
CAP = 40     # response tokens, at most
EPOCHS = 3   # of PPO on each rollout, all rows in one minibatch
PAIRS = 32   # in a step of DPO
LR = 1e-6    # so small that every iteration meets responses of the same lengths

# ---- policy, prompts and pairs --------------------------------------------------------------------

def make_policy(device="cpu"):
    """A GPT with random weights. The bias of its last norm moves along E's row until E has END_PROBABILITY."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        row = model.wte.weight[model.end]                                                     # (C,)
        logit = math.log(CONFIG.vocab_size * END_PROBABILITY / (1 - END_PROBABILITY))
        model.ln_f.bias += row * logit / row.square().sum()
        # PAD is then almost never sampled. TRL finds pads by their id and would take a sampled one for the end
        model.wte.weight[model.pad] = -row
    return model.to(device)


def make_prompts(count):
    """Prompts of 8 to 12 random tokens, as lists of ids."""
    rng = random.Random(0)
    return [[rng.randrange(CONFIG.vocab_size - 2) for _ in range(rng.randint(8, 12))] for _ in range(count)]


def make_pairs(policy, prompts):
    """Sample two responses to each prompt. Both end in E, also at the cap, because TRL ends every response with E."""
    sides = [[ids[:-1] + [policy.end] for rollout in sample_policy(policy, prompts, CAP, 1.0, seed)
              for ids in rollout.response_ids()] for seed in (1, 2)]
    return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(prompts, *sides, strict=True)]


# ---- our side of each task: it does `steps` steps and calls tick() after each ---------------------

def rollouts(policy, prompts, steps, tick):
    """Sample a response to each of BATCH prompts. tick gets the number of sampled tokens."""
    for _ in range(steps):
        rollout = generate(policy, prompts[:BATCH], CAP)
        tick(tokens=int(rollout.response_lens.sum()))


def ppo_iterations(policy, prompts, steps, tick):
    config = PPOConfig(response_tokens=CAP, ppo_iterations=steps, ppo_batch=BATCH, minibatch=BATCH, ppo_epochs=EPOCHS,
                       ppo_lr=LR, critic_lr=LR)
    reward_model = RewardModel(policy).to(policy.device)
    critic = copy.deepcopy(reward_model)
    for _ in train_ppo(copy.deepcopy(policy), critic, policy, reward_model, prompts, config, seed=0):
        tick()


def dpo_steps(policy, pairs, steps, tick):
    """DPO with PAIRS new pairs in every step. The reference's log-probs are computed in the first one."""
    config = DPOConfig(dpo_epochs=1, dpo_lr=LR, dpo_batch=PAIRS)
    for _ in train_dpo(copy.deepcopy(policy), policy, pairs[:PAIRS * steps], config, seed=0):
        tick()


# ---- how many operations a task takes -------------------------------------------------------------

def forward_flops(batch, head=True):
    """
    The floating-point operations of one forward pass over the real tokens of a batch.

    A token takes 2 operations for each weight of a matrix, and in each layer 4C for itself and each token before it.
    The output matrix (head) is needed only where a response token is predicted. A backward pass takes twice as much.
    What a side computes at pads is not counted: it shows as a lower share of the limit.
    """
    C = CONFIG.n_embd
    lengths = (batch.prompt_lens + batch.response_lens).cpu().double()                        # (B,)
    matrices = 2 * 12 * C * C * lengths                                                       # (B,)
    attention = 4 * C * lengths * (lengths + 1) / 2                                           # (B,)
    flops = CONFIG.n_layer * (matrices + attention).sum().item()
    if head:
        flops += 2 * C * CONFIG.vocab_size * batch.response_lens.sum().item()
    return flops


def ppo_flops(batch):
    """The operations of a PPO iteration that works on the given rows."""
    policy, critic = forward_flops(batch), forward_flops(batch, head=False)
    scoring = policy + 2 * critic  # reference, reward model and critic
    updates = EPOCHS * 3 * (policy + critic)  # forward and backward
    return policy + scoring + updates  # the first is the rollout
