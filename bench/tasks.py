"""
What the benchmarks work on: the policy, prompts and pairs, our side of every task, and how many operations it takes.

The policy has random weights, but it says E with a probability of 1/30 at each step (in the geometric mean). So
responses have natural lengths, about 20 tokens in the mean, and end at different times. The learning rate is too
small to change that.

Letters: B batch, C embedding.
"""

import copy
import math
import random
from types import SimpleNamespace

import torch

from dpo import train_dpo
from evaluate import sample_policy
from model import GPT, GPTConfig, generate, response_logprobs
from ppo import train_ppo
from reward import RewardModel, train_reward_model

CONFIG = GPTConfig(vocab_size=560, block_size=96, n_layer=4, n_head=4, n_embd=128)
END = CONFIG.vocab_size - 2
PAD = CONFIG.vocab_size - 1
BATCH = 128  # rows of a rollout and of a PPO iteration
CAP = 40     # response tokens, at most
EPOCHS = 3   # of PPO on each rollout, all rows in one minibatch
PAIRS = 32   # in a step of DPO or of the reward model
LR = 1e-6    # so small that every iteration meets responses of the same lengths

SETTINGS = dict(
    ppo_batch=BATCH, minibatch=BATCH, ppo_epochs=EPOCHS, ppo_lr=LR, critic_lr=LR, beta=0.2, gamma=1.0, lam=0.95,
    clip=0.2, value_clip=0.2, temperature=1.0, response_tokens=CAP,
    batch_size=PAIRS, reward_epochs=1, reward_lr=LR, weight_decay=0.1,
    dpo_epochs=1, dpo_lr=LR, dpo_beta=0.1, dpo_kind="dpo", label_smoothing=0.0,
)


# ---- policy, prompts and pairs ---------------------------------------------------------------------------------------

def make_policy(end_probability, device):
    """
    Make a GPT with random weights that says E with the given probability, in the geometric mean over states.

    The bias of the last norm is moved along E's row of the output matrix until E's logit is high enough.
    """
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        row = model.wte.weight[END]                                                           # (C,)
        logit = math.log(CONFIG.vocab_size * end_probability / (1 - end_probability))
        model.ln_f.bias += row * logit / row.square().sum()
        # PAD is then almost never sampled. TRL finds pads by their id and would take a sampled one for the end.
        model.wte.weight[PAD] = -row
    return model.to(device)


def make_prompts(count):
    """Make prompts of 8 to 12 random tokens, as lists of ids."""
    rng = random.Random(0)
    prompts = []
    for _ in range(count):
        length = rng.randint(8, 12)
        prompts.append([rng.randrange(END) for _ in range(length)])
    return prompts


def make_pairs(policy, prompts):
    """Sample two responses to each prompt. Both end in E, also at the cap, because TRL ends every response with E."""
    responses = []
    for seed in (1, 2):
        side = []
        for rollout in sample_policy(policy, prompts, CAP, 1.0, seed, "pairs"):
            side += [ids[:-1] + [END] for ids in rollout.response_ids()]
        responses.append(side)
    return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(prompts, *responses, strict=True)]


# ---- our side of each task -------------------------------------------------------------------------------------------
# Each function does `steps` steps and calls tick() after each one.

def rollouts(policy, prompts, steps, tick):
    """Sample a response to every prompt. tick gets the number of sampled tokens."""
    for _ in range(steps):
        rollout = generate(policy, prompts, CAP)
        tick(tokens=int(rollout.response_lens.sum()))


def make_reward_model(policy):
    return RewardModel(policy).to(policy.wte.weight.device)


def ppo_iterations(policy, prompts, steps, tick, batch=BATCH, cap=CAP):
    settings = dict(SETTINGS, ppo_iterations=steps, ppo_batch=batch, minibatch=batch, response_tokens=cap)
    reward_model = make_reward_model(policy)
    critic = copy.deepcopy(reward_model)
    train_ppo(copy.deepcopy(policy), critic, policy, reward_model, prompts, SimpleNamespace(**settings), seed=0,
              log=lambda **row: tick())


def dpo_steps(policy, pairs, steps, tick):
    """DPO with `PAIRS` new pairs in every step. The reference's log-probs are computed in the first one."""
    train_dpo(copy.deepcopy(policy), policy, pairs[:PAIRS * steps], PAD, SimpleNamespace(**SETTINGS), seed=0,
              log=lambda **row: tick())


def reward_steps(policy, pairs, steps, tick):
    train_reward_model(make_reward_model(policy), pairs[:PAIRS * steps], PAD, SimpleNamespace(**SETTINGS), seed=0,
                       log=lambda **row: tick())


def forward_backwards(policy, batch, steps, tick):
    for _ in range(steps):
        policy.zero_grad()
        response_logprobs(policy, batch).sum().backward()
        tick()


# ---- how many operations a task takes --------------------------------------------------------------------------------

def forward_flops(batch, head=True):
    """
    Count the floating-point operations of one forward pass over the real tokens of a batch.

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
    """Count the operations of a PPO iteration that works on the given rows."""
    policy = forward_flops(batch)
    critic = forward_flops(batch, head=False)
    rollout = policy
    scoring = policy + 2 * critic  # reference, reward model and critic
    updates = EPOCHS * 3 * (policy + critic)  # forward and backward
    return rollout + scoring + updates


def decode_bytes(batch):
    """Count the bytes that sampling must read: all weights at each step, and the cache of each row that still runs."""
    C = CONFIG.n_embd
    weights = 12 * CONFIG.n_layer * C ** 2 + C * CONFIG.vocab_size
    tokens = 0  # read from the cache, over all rows and steps
    for prompt_len, response_len in zip(batch.prompt_lens.tolist(), batch.response_lens.tolist()):
        tokens += sum(range(prompt_len + 1, prompt_len + response_len))
    return 4 * (weights * batch.R + 2 * CONFIG.n_layer * C * tokens)
