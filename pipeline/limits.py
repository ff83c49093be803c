"""Which settings can work: the limits of each number, and what must fit together."""

import dataclasses
import os

import torch

import world
from data import UserError
from dpo import LOSSES, SMOOTHED
from grpo import KINDS


def need(condition, message):
    if not condition:
        raise UserError(message)


def flag(name):
    return "--" + name.replace("_", "-")


# (least, most) of a number. What is not here: 1 to 10,000,000 of a count, 0 to 1,000,000 of another number, and up to
# 1 of a learning rate. Within these limits nothing overflows, and no rounding is mistaken for a fault.
LIMITS = dict(seed=(0, 2 ** 53), n_embd=(2, 10 ** 5),  # a width of 1 is always 0 after a LayerNorm
              temperature=(0.1, 10), flip=(0, 1), gamma=(0, 1), lam=(0, 1), beta=(0, 10 ** 4), clip=(0, 1000),
              ppo_epochs=(1, 1000), reward_epochs=(1, 1000), dpo_epochs=(1, 1000),
              value_clip=(1e-6, 10 ** 4), weight_decay=(0, 100), dpo_beta=(1e-4, 10 ** 4))


def limits(field):
    usual = (1, 10 ** 7) if field.type is int else (1e-30, 1) if field.name.endswith("_lr") else (0, 10 ** 6)
    return LIMITS.get(field.name, usual)


def bytes_needed(config):
    """About how much memory the largest stage takes: networks, a step with its graph, a rollout, and lists of ids."""
    C, T, V = config.n_embd, config.block_size, config.vocab_size + 258
    weights = (V + T) * C + 12 * config.n_layer * C * C
    rows = max(2 * config.batch_size, config.minibatch)  # of a step; a pair has two
    step = rows * T * (20 * config.n_layer * C + 3 * V + T)
    cache = max(256, config.ppo_batch) * T * 2 * config.n_layer * C
    texts = 2 * config.pairs + config.ppo_batch + config.eval_prompts * (config.best_of + 4) + config.documents
    return 4 * (10 * weights + step + cache) + 50 * texts * T  # 10: four networks, and two with gradients and Adam


def check(config):
    """Raise UserError for settings that cannot work."""
    for field in dataclasses.fields(config):
        if field.type in (int, float):
            value, (least, most) = getattr(config, field.name), limits(field)
            need(least <= value <= most, f"{flag(field.name)} must be between {least:,} and {most:,}, got {value}")
    need(config.beta == 0 or config.beta >= 1e-6, f"--beta is 0, or at least 1e-06, got {config.beta}")
    need(config.n_embd % config.n_head == 0,
         f"--n-embd {config.n_embd} cannot be divided into --n-head {config.n_head} heads")
    longest_prompt = config.block_size - config.response_tokens
    need(longest_prompt >= (1 if config.data else 16),  # the built-in world's prompts have up to 16 tokens
         f"--response-tokens {config.response_tokens} leaves no room for a prompt in --block-size {config.block_size}")
    need(config.data or config.response_tokens >= 4,
         f"--response-tokens must be at least 4, which the shortest clause has, got {config.response_tokens}")
    need(config.data or config.eval_prompts <= 8000, f"--eval-prompts must be at most 8,000, got {config.eval_prompts}")
    need(config.minibatch <= config.ppo_batch,
         f"--minibatch {config.minibatch} is larger than --ppo-batch {config.ppo_batch}")
    for name, choices in (("reward_from", ("model", "gold")), ("grpo_kind", KINDS), ("grpo_kl", ("reward", "loss"))):
        value = getattr(config, name)
        need(value in choices, f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")
    need(not config.data or config.reward_from == "model",
         "--reward-from gold: the true reward is only known in the built-in world, without --data")
    if "grpo" in config.stages.split(","):
        need(config.group > 1 or config.grpo_kind == "reinforce++",
             f"--group must be at least 2 for --grpo-kind {config.grpo_kind}, got {config.group}")
        need(config.ppo_batch % config.group == 0,
             f"--ppo-batch {config.ppo_batch} cannot be divided into groups of --group {config.group}")
    need(config.dpo_kind in LOSSES, f"--dpo-kind must be one of {', '.join(LOSSES)}, got {config.dpo_kind!r}")
    need(config.label_smoothing < 0.5, f"--label-smoothing must be below 0.5, got {config.label_smoothing}")
    need(config.label_smoothing == 0 or config.dpo_kind in SMOOTHED,
         f"--label-smoothing belongs to --dpo-kind {' and '.join(SMOOTHED)}, got {config.dpo_kind!r}")
    subjects = ", ".join(world.ASPECTS)
    need(config.held_out in ("", *world.ASPECTS), f"--held-out must be one of {subjects}, got {config.held_out!r}")
    kind = config.device.split(":")[0]
    known = kind in ("", "cuda") or config.device in ("cpu", "mps")
    need(known, f"--device is cpu, cuda or mps, got {config.device!r}")
    need(kind != "cuda" or torch.cuda.is_available(), "--device cuda: this machine, or this torch, has no CUDA")
    need(kind != "mps" or torch.backends.mps.is_available(), "--device mps: this machine, or this torch, has no MPS")
    needed = bytes_needed(config)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    need(needed <= there, f"this takes about {needed / 2 ** 30:,.0f} GiB of memory of {there / 2 ** 30:,.0f}: "
         "lower --n-embd, --n-layer, --block-size, --batch-size, --ppo-batch or --pairs")
