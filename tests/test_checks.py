"""Tests of checks.py: every canary, alone and in the loops; and all loops, healthy and continued from a checkpoint."""

import copy
import functools
import math
import random

import pytest
import torch
from helpers import PAD, PAIRS, double, finish, random_batch, random_texts, through_a_file, tiny_gpt, unchanged, weights

import checks
import dpo
import grpo
import ppo
import reward
import robust
import sft
from checks import CanaryError
from pipeline.config import Config
from reward import RewardModel


@pytest.mark.parametrize("scores, message", [
    ([0.5, 0.5], "must return a tensor of floats, got list"), (torch.tensor([1, 2]), "floats, got torch.int64"),
    (torch.zeros(1), r"one score for each of 2 responses, shape \(2,\), got \(1,\)"),
    (torch.zeros(2, 1), r"shape \(2,\), got \(2, 1\)"),
    (torch.tensor([0.5, math.nan]), "gave 1 of 2 responses .* NaN or infinite"),
    (torch.tensor([-math.inf, math.inf]), "gave 2 of 2 responses .* NaN or infinite")])
def test_check_scores_refuses_what_is_not_one_number_for_each_response(scores, message):
    """Bug: a score (1,) or (B, 1) is broadcast over all responses, or a NaN reaches the advantages."""
    with pytest.raises(CanaryError, match=message):
        checks.check_scores(scores, 2)


@pytest.mark.parametrize("reader", [
    lambda batch: batch.ids.gather(1, (batch.start - 1).clamp(min=0)[:, None]),  # the pad before the prompt
    lambda batch: batch.ids.gather(1, (batch.P + batch.response_lens).clamp(max=batch.ids.shape[1] - 1)[:, None]),
    lambda batch: 1e-12 * batch.ids[:, -1].double()])
def test_check_padding_finds_every_reader(reader):
    """Bug: pads keep their ids on one side, next to the real tokens, or everywhere. 1e-12 is a leak too."""
    with pytest.raises(CanaryError, match="the padding changes the result"):
        checks.check_padding(reader, random_batch(0, R=8))


@pytest.mark.parametrize("check, inputs, message", [
    ("check_first_ratio", (double([[0.0, 1e-7], [0.0, -2e-4]]),), "is off 1 by 0.0002: sampling and scoring disagree"),
    ("check_first_ratio", (double([[0.0, math.nan]]),), "sampling and scoring disagree"),
    ("check_start_margin", (double([0.0, -2e-3, 0.0]), double([-90.0, -30.0])), "up to 0.002 nats before the first"),
    ("check_start_margin", (double([6e-3, 0.0]), double([-300.0, -500.0])), "up to 0.006 nats"),
    ("check_start_margin", (double([math.nan, 0.0]), double([-90.0, -30.0])), "before the first step, not 0"),
    ("check_kl", (8.1 * 40, 40.0), "is 324 nats from the reference in 40 tokens.*lower the learning rate"),
    ("check_kl", (math.nan, 40.0), "the training exploded")])
def test_one_wrong_number_is_found(check, inputs, message):
    """Bug: a mean that hides one token or response, one sign only, a tolerance, or a NaN that compares as no error."""
    with pytest.raises(CanaryError, match=message):
        getattr(checks, check)(*inputs)


def test_a_check_returns_what_it_measured_and_allows_rounding():
    """Bug: a false alarm: for the rounding of a large sum, a large KL of a long response, or a part that is frozen."""
    assert checks.check_first_ratio(double([1e-7, -3e-5])) == pytest.approx(3e-5, rel=1e-3)
    checks.check_start_margin(double([4e-3, -4e-3]), double([-3.0, -500.0]))
    checks.check_kl(7.9 * 40, 40.0)
    checks.check_trains("pair", torch.nn.ModuleList([tiny_gpt(0).requires_grad_(False), tiny_gpt(0)]), 0.1)
    with torch.autocast("cpu", torch.bfloat16):  # it rounds single tokens far off
        assert checks.check_first_ratio(torch.tensor([0.1, *[0.0] * 9])) > 0.1
        checks.check_start_margin(torch.tensor([0.05]), torch.tensor([-3.0]))
        with pytest.raises(CanaryError, match="sampling and scoring disagree"):
            checks.check_first_ratio(torch.full((10,), 0.1))


PROMPTS, _ = random_texts(0, B=5)
SMALL = dict(
    sft_steps=4, sft_lr=1e-2, sft_batch=4, reward_epochs=2, reward_lr=1e-2, reward_batch=4, dpo_epochs=2, dpo_lr=1e-2,
    dpo_batch=4, beta=0.1, ppo_iterations=3, response_tokens=5, ppo_batch=8, minibatch=3, ppo_epochs=1, ppo_lr=1e-2,
    critic_lr=1e-2, grpo_lr=1e-2, temperature=0.6)


def with_head(policy, kind=RewardModel):
    """A reward model, or another kind of network, on this trunk; its head is always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(policy).to(policy.dtype)


def train(name, network, seed=0, checkpoint=None, reference=None, scorer=None, **changes):
    """Start a loop with the settings SMALL and `changes`. By default the reference is a copy and scored by a model."""
    config = Config(**{**SMALL, **changes})
    if name == "sft":
        return sft.train_sft(network, [(pair["prompt"], pair["chosen"]) for pair in PAIRS], config, seed, checkpoint)
    if name == "reward":
        return reward.train_reward_model(network, PAIRS, config, seed, checkpoint)
    if name == "heads":
        judge = with_head(tiny_gpt(0, network.trunk.dtype))
        return robust.train_head(network, judge, PAIRS, config, seed, checkpoint)
    reference = copy.deepcopy(network).requires_grad_(False) if reference is None else reference
    if name == "dpo":
        return dpo.train_dpo(network, reference, PAIRS, config, seed, checkpoint)
    critic = with_head(reference).requires_grad_(True)
    scorer = copy.deepcopy(critic).requires_grad_(False) if scorer is None else scorer
    if name == "grpo":
        return grpo.train_grpo(network, reference, scorer, PROMPTS, config, seed, checkpoint)
    if name == "online":
        return dpo.train_online_dpo(network, reference, scorer, PROMPTS, config, seed, checkpoint)
    return ppo.train_ppo(network, critic, reference, scorer, PROMPTS, config, seed, checkpoint)


# name of a loop -> how to make, from a GPT, the network that it trains
MAKE = dict(sft=copy.deepcopy, reward=with_head, dpo=copy.deepcopy, ppo=copy.deepcopy, grpo=copy.deepcopy,
            online=copy.deepcopy, heads=functools.partial(with_head, kind=robust.GaussianReward))


@pytest.mark.parametrize("name", MAKE)
def test_a_loop_continues_from_a_checkpoint_with_the_same_bits(name):
    """Bug: a false alarm; a checkpoint without a part; a step twice; random numbers of the process, or no seed."""
    gpt = tiny_gpt(0, torch.float32)
    whole, other = MAKE[name](gpt), MAKE[name](gpt)
    rows, checkpoints, after = [], [], []
    for metrics, parts, *_ in train(name, whole):
        rows.append(metrics)
        checkpoints.append(through_a_file(checks.save_parts(parts, len(rows))))
        after.append(weights(whole))
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert all(list(row)[0] == "step" and isinstance(x, (int, float)) for row in rows for x in row.values())
    if name in ("ppo", "grpo", "online"):
        assert rows[0]["kl_at_start"] == 0
        assert not any("kl_at_start" in row for row in rows[1:])
    if name in ("ppo", "grpo"):
        assert all(0 <= row["ratio_error"] < 1e-4 for row in rows)
    next(train(name, other, seed=5))
    assert not unchanged(other, after[0])
    for k in (1, 2):
        torch.manual_seed(k)
        random.seed(k)
        states = torch.get_rng_state(), random.getstate()
        network = MAKE[name](tiny_gpt(1, torch.float32))  # all of it must come from the checkpoint
        later = finish(train(name, network, checkpoint=checkpoints[k - 1], reference=gpt))
        assert later == rows[k:] and unchanged(network, after[-1])
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


# ---- bugs in a loop: each is found before the first step ----------------------------------------------------------

def stops(name, message, network=None, **options):
    """Assert that a loop is stopped by this canary, and before its first step."""
    network = MAKE[name](tiny_gpt(0)) if network is None else network
    before = weights(network)
    with pytest.raises(CanaryError, match=message):
        finish(train(name, network, **options))
    assert unchanged(network, before)


@pytest.mark.parametrize("name, when", [("ppo", "update"), ("grpo", "update"), ("online", "update"), ("dpo", "step")])
def test_another_reference_is_found(name, when):
    """Bug: the reference is a checkpoint of another run."""
    stops(name, f"before the first {when}, not 0: the reference is not", reference=tiny_gpt(1))


@pytest.mark.parametrize("name", ["ppo", "grpo", "online"])
def test_a_broken_scorer_is_found(name):
    """Bug: one score is spread over all responses."""
    stops(name, r"shape \(8,\), got \(1,\)", scorer=lambda batch: torch.ones(1))


@pytest.mark.parametrize("name, rate, what", [
    ("ppo", "ppo_lr", "policy"), ("ppo", "critic_lr", "critic"), ("grpo", "grpo_lr", "policy"),
    ("online", "ppo_lr", "policy"), ("dpo", "dpo_lr", "policy"), ("reward", "reward_lr", "reward model"),
    ("heads", "reward_lr", "head"), ("sft", "sft_lr", "network")])
def test_training_that_cannot_train_is_said(name, rate, what):
    """Bug: a loop runs to its end on a frozen network, or at a rate of 0, and its curves seem to show a hard task."""
    stops(name, f"the learning rate of the {what} is 0", **{rate: 0.0})
    stops(name, "nothing of the .* can be trained", MAKE[name](tiny_gpt(0)).requires_grad_(False))


def infinite(original, *inputs, **named):
    return original(*inputs, **named) * math.inf


def tiny_and_negative(original, *inputs):
    kl = original(*inputs)
    return torch.where(torch.arange(len(kl)) == 0, -1e-12, kl)


def far(original, *inputs):
    return {**original(*inputs), "kl": 1e4}


def without_temperature(original, model, batch, temperature):
    return original(model, batch)


def with_pads(original, model, batch, temperature=1.0):
    logp = original(model, batch, temperature)
    return torch.where(batch.mask, logp + 1e-6 * (batch.ids != PAD).sum(1, keepdim=True), 0.0)


def of_the_last_column(original, trunk, batch):
    return trunk.hidden(batch.ids, batch.start)[:, -1]


@pytest.mark.parametrize("module, name, function, wrong, message", [
    (ppo, "ppo", "policy_loss", infinite, "the PPO loss is .*diverged; lower --ppo-lr"),
    (ppo, "ppo", "value_loss", infinite, "the PPO loss is .*diverged; lower --ppo-lr"),
    (grpo, "grpo", "loss_mean", infinite, "the GRPO loss is .*diverged; lower --grpo-lr"),
    (dpo, "dpo", "dpo_loss", infinite, "the DPO loss is .*lower --dpo-lr or raise --dpo-beta"),
    (dpo, "online", "dpo_loss", infinite, "the online DPO loss is .*lower --ppo-lr"),
    (reward, "reward", "bradley_terry_loss", infinite, "the reward model's loss is .*lower reward_lr"),
    (robust, "heads", "gaussian_nll", infinite, "the head's loss is .*lower reward_lr"),
    (sft, "sft", "sft_loss", infinite, "the SFT loss is .*lower sft_lr"),
    (ppo, "ppo", "exact_kl", tiny_and_negative, "is 1e-12 nats before the first update, not 0: the reference is not"),
    (ppo, "ppo", "rollout_metrics", far, "the training exploded"),
    (grpo, "grpo", "rollout_metrics", far, "the training exploded"),
    (dpo, "online", "rollout_metrics", far, "the training exploded"),
    (ppo, "ppo", "response_logprobs", without_temperature, "sampling and scoring disagree"),
    (grpo, "grpo", "response_logprobs", without_temperature, "sampling and scoring disagree"),
    (ppo, "ppo", "response_logprobs", with_pads, "the padding changes the result"),
    (dpo, "dpo", "response_logprobs", with_pads, "the padding changes the result"),
    (reward, "reward", "last_hidden", of_the_last_column, "the padding changes the result"),
    (robust, "heads", "last_hidden", of_the_last_column, "the padding changes the result"),
])
def test_a_loop_stops_before_a_step_that_is_wrong(module, name, function, wrong, message, monkeypatch):
    """Bug: a run trains on when it diverged, explodes, forgets the temperature, or reads pads."""
    monkeypatch.setattr(module, function, functools.partial(wrong, getattr(module, function)))
    stops(name, message, temperature=0.7, ppo_batch=32)
