"""Scores of answers: the true reward ("gold"), and the score that policies maximise."""

import functools
import math

import torch

import world
from pipeline.own import function_scorer
from tokenizer import decode


def raw_gold(run, prompts, responses, judge=world.gold):
    """Gold of responses (lists of ids) in the points of world.gold, (n,). NaN for own texts: there is no oracle."""
    if not run.config.in_world:
        return torch.full((len(prompts),), math.nan)
    return torch.tensor([judge(decode(run.tokenizer, prompt), decode(run.tokenizer, response))
                         for prompt, response in zip(prompts, responses)])


def scaled_gold(run, prompts, responses):
    """Gold of responses in standard deviations of the SFT policy's, around its mean, (n,). NaN for own texts."""
    raw = raw_gold(run, prompts, responses)
    if not run.config.in_world:
        return raw
    scale = run.read("gold.json")
    run.need_readable(scale["std"] > 0, "gold.json")
    return (raw - scale["mean"]) / scale["std"]


def make_scorer(run):
    """The score that policies maximise, of a batch -> (B,): by the reward model, gold, the task or a function."""
    config = run.config
    if config.reward_from == "model":
        return run.load_network("reward" if config.reward_model == "single" else "robust")
    if ".py:" in config.reward_from:
        rows = run.texts["train"] + run.texts["heldout"]
        known = {tuple(ids): row for ids, row in zip(sum(run.prompts, []), rows)}
        return function_scorer(config.reward_from, run.tokenizer, known)
    judge = functools.partial(raw_gold, judge=world.task) if config.reward_from == "task" else scaled_gold
    return lambda batch: judge(run, batch.prompt_ids(), batch.response_ids()).to(batch.ids.device)
