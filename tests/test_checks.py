"""
Tests of checks.py: every canary with its bug planted, by itself and in the training loops, and in healthy runs; and all
loops, continued from a checkpoint and with other seeds.
"""

import copy
import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PAD,
    PAIRS,
    VOCAB,
    finish,
    is_pad,
    make_batch,
    random_batch,
    random_texts,
    rng,
    through_a_file,
    tiny_gpt,
    unchanged,
    weights,
)

import dpo
import grpo
import ppo
import reward
import robust
import sft
from checks import (
    CanaryError,
    canary,
    check_first_ratio,
    check_kl,
    check_padding,
    check_scores,
    check_start_kl,
    check_start_margin,
    check_trains,
    finite,
    load_parts,
    save_parts,
)
from model import Rollout, generate, response_logprobs
from reward import RewardModel

# ---- the checks by themselves ----------------------------------------------------------------------------------------

def test_a_canary_raises_only_when_it_fails():
    """Bug: a canary that never raises, always raises, or loses its message."""
    canary(True, "no")
    with pytest.raises(CanaryError, match="^the cause$"):
        canary(False, "the cause")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -3.0, 1e30])
def test_finite_returns_the_loss_or_names_it(value):
    """Bug: a NaN or an infinity passes, a healthy loss is refused, or another number is in the log."""
    loss = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    if math.isfinite(value):
        assert finite(loss, "PPO", "lower it") == value
    else:
        with pytest.raises(CanaryError, match="the PPO loss is -?(nan|inf).*diverged; lower it"):
            finite(loss, "PPO", "lower it")


@pytest.mark.parametrize("scores, message", [
    ([0.5, 0.5], "must return a tensor of floats, got list"), (None, "floats, got NoneType"),
    (torch.tensor([1, 2]), "floats, got torch.int64"), (torch.tensor([True, False]), "floats, got torch.bool"),
    (torch.zeros(1), r"one score for each of 2 responses, shape \(2,\), got \(1,\)"),
    (torch.zeros(2, 1), r"shape \(2,\), got \(2, 1\)"), (torch.tensor(0.5), r"shape \(2,\), got \(\)"),
    (torch.tensor([0.5, math.nan]), "gave 1 of 2 responses .* NaN or infinite, the first of them response 1"),
    (torch.tensor([-math.inf, math.inf]), "gave 2 of 2 responses .* the first of them response 0")])
def test_check_scores_refuses_what_is_not_one_number_for_each_response(scores, message):
    """Bug: a score (1,) or (B, 1) is broadcast over all responses, or a NaN reaches the advantages."""
    with pytest.raises(CanaryError, match=message):
        check_scores(scores, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_check_scores_lets_numbers_pass(dtype):
    """Bug: a false alarm for scores of another precision, for large ones, or for a single response."""
    check_scores(torch.tensor([-1e30, 0.0, 5.0], dtype=dtype), 3)
    check_scores(torch.zeros(1, dtype=dtype), 1)


def test_check_kl_is_per_token():
    """Bug: a policy that lost the text is trained on, or a long healthy response is refused."""
    check_kl(7.9 * 40, 40.0)
    with pytest.raises(CanaryError, match="is 324 nats from the reference in 40 tokens.*lower the learning rate"):
        check_kl(8.1 * 40, 40.0)


def readers():
    """Functions of a batch that read one column of padding, or that take an id for padding."""
    def before_the_prompt(batch):
        return batch.ids.gather(1, (batch.start - 1).clamp(min=0)[:, None])

    def after_the_response(batch):
        last = batch.ids.shape[1] - 1
        return batch.ids.gather(1, (batch.P + batch.response_lens).clamp(max=last)[:, None])

    return dict(first=lambda batch: batch.ids[:, 0], last=lambda batch: batch.ids[:, -1],
                before_the_prompt=before_the_prompt, after_the_response=after_the_response,
                by_id=lambda batch: (batch.ids != PAD).sum(1), mean=lambda batch: batch.ids.double().mean(),
                slightly=lambda batch: 1e-12 * batch.ids[:, -1].double())


@pytest.mark.parametrize("name", list(readers()))
def test_check_padding_finds_every_reader(name):
    """Bug: pads keep their ids on one side, next to the real tokens, or everywhere. 1e-12 is a leak too."""
    with pytest.raises(CanaryError, match="the padding changes the result"):
        check_padding(readers()[name], random_batch(0, R=8))


def test_check_padding_leaves_real_tokens_alone():
    """Bug: a false alarm. Functions that read real tokens and lengths, and the real scorer, must pass."""
    batch = random_batch(0, min_response=0, P=8, R=9)
    check_padding(lambda batch: torch.where(is_pad(batch), 0, batch.ids), batch)
    check_padding(lambda batch: batch.prompt_lens * 100 + batch.response_lens, batch)
    check_padding(lambda batch: response_logprobs(tiny_gpt(), batch), batch)
    check_padding(lambda batch: batch.ids, make_batch([[1, 2], [3, 4]], [[5], [6]]))  # there are no pads


def test_check_padding_changes_all_pads_and_nothing_else():
    """Bug: the caller's batch changes, a rollout loses its log-probs, an id is not in the vocabulary, or a graph."""
    rollout = generate(tiny_gpt(), [[1, 2], [3]], 4, generator=rng())
    before = rollout.ids.clone()
    seen = []

    def logp(batch):
        assert not torch.is_grad_enabled()
        seen.append(batch)
        return batch.logp

    check_padding(logp, rollout)
    assert torch.equal(rollout.ids, before)
    assert len(seen) == 2
    for batch in seen:
        assert type(batch) is Rollout
        assert torch.equal(batch.logp, rollout.logp)
        assert 0 <= batch.ids.min()
        assert batch.ids.max() < VOCAB
    assert is_pad(rollout).any()
    assert torch.equal(seen[0].ids != seen[1].ids, is_pad(rollout))


@pytest.mark.parametrize("kl", [[0.0, 1e-12], [-1e-12, 0.0], [0.0, math.nan]])
def test_check_start_kl_wants_exactly_zero(kl):
    """Bug: a tolerance, a mean that hides one response, a sign, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="before the first update, not 0: the reference is not the network"):
        check_start_kl(torch.tensor(kl, dtype=torch.float64))


def test_check_start_kl_returns_the_largest():
    """Bug: a false alarm, or a tensor in the log."""
    assert check_start_kl(torch.tensor([0.0, -0.0])) == 0
    with pytest.raises(CanaryError, match="is 0.25 nats"):
        check_start_kl(torch.tensor([0.0, -0.25, 0.125]))


@pytest.mark.parametrize("log_ratio", [2e-4, -2e-4, math.nan, math.inf, -math.inf])
def test_check_first_ratio_finds_one_wrong_token(log_ratio):
    """Bug: a mean that hides one token, one side of 1 only, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        check_first_ratio(torch.tensor([[0.0, 1e-7], [0.0, log_ratio]], dtype=torch.float64))


@pytest.mark.parametrize("log_ratio", [5e-5, -5e-5])
def test_check_first_ratio_returns_the_largest_distance_from_1(log_ratio):
    """Bug: rounding in float32 that stops a run, or another number in the log."""
    error = check_first_ratio(torch.tensor([[0.0, 1e-5], [log_ratio, 0.0]], dtype=torch.float64, requires_grad=True))
    assert error == pytest.approx(abs(math.exp(log_ratio) - 1), rel=1e-9)


@pytest.mark.parametrize("margin", [2e-3, -2e-3, math.nan])
def test_check_start_margin_finds_one_wrong_pair(margin):
    """Bug: a mean that hides one pair, one sign only, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="before the first step, not 0: the reference is not the network"):
        check_start_margin(torch.tensor([0.0, margin, 0.0]), torch.tensor([-90.0, -30.0]))


def test_check_start_margin_allows_rounding():
    """Bug: a false alarm. In float32 a sum of 1,000 nats has no digit below 1e-4. A real margin must not pass."""
    check_start_margin(torch.tensor([1e-4, -5e-4, 0.0]), torch.tensor([-30.0]))
    check_start_margin(torch.tensor([4e-3, -4e-3]), torch.tensor([-3.0, -500.0]))
    with pytest.raises(CanaryError, match="up to 0.006 nats"):
        check_start_margin(torch.tensor([6e-3, 0.0]), torch.tensor([-3.0, -500.0]))


def test_check_trains_wants_a_parameter_that_learns():
    """Bug: a frozen network, an optimizer of another one, or a rate of 0 trains for minutes and learns nothing."""
    network, other = tiny_gpt(0), tiny_gpt(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0)
    check_trains("policy", network, optimizer, 1e-30)
    for lr in (0, 0.0, -1.0, math.nan):
        with pytest.raises(CanaryError, match=f"the learning rate of the policy is {lr}"):
            check_trains("policy", network, optimizer, lr)
    with pytest.raises(CanaryError, match="the optimizer holds no parameter of the critic"):
        check_trains("critic", other, optimizer, 1.0)
    network.requires_grad_(False)
    network.ln_f.weight.requires_grad_(True)  # one parameter is enough
    check_trains("policy", network, optimizer, 1.0)
    with pytest.raises(CanaryError, match="nothing of the policy can be trained: call requires_grad_"):
        check_trains("policy", network.requires_grad_(False), optimizer, 1.0)
    optimizer.param_groups.clear()
    with pytest.raises(CanaryError, match="the optimizer holds no parameter of the policy"):
        check_trains("policy", network.requires_grad_(True), optimizer, 1.0)


# ---- the loops -------------------------------------------------------------------------------------------------------

@dataclass
class Config(sft.SFTConfig, reward.RewardConfig, dpo.DPOConfig, grpo.GRPOConfig):
    """The settings of all loops in one object."""


PROMPTS, _ = random_texts(0, B=5)
SMALL = dict(
    sft_steps=4, sft_lr=1e-2, sft_batch=4, reward_epochs=2, reward_lr=1e-2, reward_batch=4, dpo_epochs=2, dpo_lr=1e-2,
    dpo_batch=4, beta=0.1, ppo_iterations=3, response_tokens=5, ppo_batch=8, minibatch=4, ppo_lr=1e-2, critic_lr=1e-2,
    grpo_lr=1e-2)


def tiny_reward_model(policy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RewardModel(policy).to(policy.dtype)


def tiny_heads(policy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return robust.GaussianHeads(policy, 3).to(policy.dtype)


def train(name, network, seed=0, checkpoint=None, reference=None, scorer=None, **changes):
    """
    Start the loop of this name. It trains `network` with settings that differ from SMALL by `changes`.

    reference: the policy's copy by default. scorer: a reward model of the reference by default.
    """
    config = Config(**{**SMALL, **changes})
    if name == "sft":
        return sft.train_sft(network, [(pair["prompt"], pair["chosen"]) for pair in PAIRS], config, seed, checkpoint)
    if name == "reward":
        return reward.train_reward_model(network, PAIRS, config, seed, checkpoint)
    if name == "heads":
        judge = tiny_reward_model(tiny_gpt(0, network.trunk.dtype))
        return robust.train_brme(network, judge, PAIRS, "mse", 0.7, config, seed, checkpoint)
    reference = copy.deepcopy(network).requires_grad_(False) if reference is None else reference
    if name == "dpo":
        return dpo.train_dpo(network, reference, PAIRS, config, seed, checkpoint)
    critic = tiny_reward_model(reference).requires_grad_(True)
    scorer = copy.deepcopy(critic).requires_grad_(False) if scorer is None else scorer
    if name == "grpo":
        return grpo.train_grpo(network, reference, scorer, PROMPTS, config, seed, checkpoint)
    return ppo.train_ppo(network, critic, reference, scorer, PROMPTS, config, seed, checkpoint)


MAKE = dict(sft=copy.deepcopy, reward=tiny_reward_model, dpo=copy.deepcopy, ppo=copy.deepcopy, grpo=copy.deepcopy,
            heads=tiny_heads)  # name of a loop -> how to make, from a GPT, the network that it trains
LOOPS = list(MAKE)
SAMPLERS = [("ppo", ppo), ("grpo", grpo)]


def stops(name, message, network=None, **options):
    """Assert that a loop is stopped by this canary, and before its first step."""
    network = MAKE[name](tiny_gpt(0)) if network is None else network
    before = weights(network)
    with pytest.raises(CanaryError, match=message):
        finish(train(name, network, **options))
    assert unchanged(network, before)


@pytest.mark.parametrize("name", LOOPS)
def test_no_canary_stops_a_healthy_run(name):
    """Bug: a false alarm in float32, with texts of all lengths, a temperature, or a last minibatch that is smaller."""
    network = MAKE[name](tiny_gpt(0, torch.float32))
    before = weights(network)
    rows = finish(train(name, network, minibatch=3, sft_batch=2, reward_batch=2, dpo_batch=2, temperature=0.6))
    assert not unchanged(network, before)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert all(list(row)[0] == "step" and isinstance(x, (int, float)) for row in rows for x in row.values())
    if name in ("ppo", "grpo"):
        assert rows[0]["kl_at_start"] == 0
        assert not any("kl_at_start" in row for row in rows[1:])
        assert all(0 <= row["ratio_error"] < 1e-4 for row in rows)


# ---- checkpoints and seeds -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_continues_from_a_checkpoint_with_the_same_bits(name, k):
    """Bug: a checkpoint without the optimizer, a network or a generator, or a loop that repeats or skips a step."""
    whole = MAKE[name](tiny_gpt(0))
    rows = finish(train(name, whole))
    checkpoint = None
    for metrics, parts, *_ in train(name, MAKE[name](tiny_gpt(0))):
        if metrics["step"] == k - 1:
            checkpoint = through_a_file(save_parts(parts, k))
            break
    torch.manual_seed(99)
    network = MAKE[name](tiny_gpt(1))  # all of it must come from the checkpoint
    later = finish(train(name, network, checkpoint=checkpoint, reference=tiny_gpt(0)))
    assert later == rows[k:]
    assert unchanged(network, weights(whole))


def test_load_parts_restores_every_part():
    """Bug: a part is forgotten, or a loop without a checkpoint does not begin with step 0."""
    def make(seed):
        network = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(network.parameters(), lr=seed + 1)
        return dict(network=network, optimizer=optimizer, generator=rng(seed))

    def step(parts):
        loss = parts["network"](torch.randn(3, generator=parts["generator"])).square().sum()
        parts["optimizer"].zero_grad()
        loss.backward()
        parts["optimizer"].step()

    old, new = make(0), make(1)
    assert load_parts(new, None) == 0
    step(old)
    assert load_parts(new, through_a_file(save_parts(old, 7))) == 7
    for parts in (old, new):
        step(parts)
    assert unchanged(new["network"], weights(old["network"]))
    assert torch.equal(new["generator"].get_state(), old["generator"].get_state())
    with pytest.raises(KeyError):
        load_parts(dict(critic=old["network"]), save_parts(old, 1))


@pytest.mark.parametrize("name", LOOPS)
def test_the_seed_decides_and_nothing_else(name):
    """Bug: a loop draws from the global generator, or its seed has no effect."""
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        network = MAKE[name](tiny_gpt(0))
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        states = torch.get_rng_state(), random.getstate()
        rows = finish(train(name, network, seed))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        results.append((rows, network))
    (rows, network), (same_rows, same), (_, other) = results
    assert same_rows == rows
    assert unchanged(same, weights(network))
    assert not unchanged(other, weights(network))


# ---- the checks in the loops -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, message", [("ppo", "before the first update, not 0"),
                                           ("grpo", "before the first update, not 0"),
                                           ("dpo", "before the first step, not 0")])
def test_another_reference_is_found(name, message):
    """Bug: a reference with other weights, such as a checkpoint of another run."""
    stops(name, message + ": the reference is not", reference=tiny_gpt(1))


def test_a_reference_that_differs_in_long_texts_only_is_found():
    """Bug: the KL is checked in one response, or on average. Only long texts have a position 7."""
    reference = tiny_gpt(0)
    with torch.no_grad():
        reference.wpe.weight[7] += 1e-3
    stops("ppo", "the reference is not the network", reference=reference, ppo_batch=32)


@pytest.mark.parametrize("name, module", SAMPLERS)
def test_a_kl_that_explodes_stops_the_run(name, module, monkeypatch):
    """Bug: the policy is hundreds of nats away, and the loop trains on."""
    original = module.rollout_metrics
    monkeypatch.setattr(module, "rollout_metrics", lambda *inputs: {**original(*inputs), "kl": 1e4})
    stops(name, "the training exploded")


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize("scorer, message", [
    (lambda batch: torch.zeros(1), r"got \(1,\)"), (lambda batch: torch.zeros(len(batch), 1), r"got \(8, 1\)"),
    (lambda batch: [0.0] * len(batch), "got list"), (lambda batch: batch.response_lens, "got torch.int64"),
    (lambda batch: batch.response_lens / 0.0, "NaN or infinite")])
def test_a_broken_scorer_is_found(name, scorer, message):
    """Bug: one score for all responses, no number, or an infinity trains a policy."""
    stops(name, message, scorer=scorer)


@pytest.mark.parametrize("name, module", SAMPLERS)
@pytest.mark.parametrize("wrong", ["other", "no temperature", "shifted"])
def test_a_scorer_that_disagrees_with_the_sampler_is_found(name, module, wrong, monkeypatch):
    """Bug: log-probs of another network, without the temperature that the sampler has, or of the next token."""
    def scorer(model, batch, temperature=1.0):
        logp = response_logprobs(model, batch, 1.0 if wrong == "no temperature" else temperature)
        changed = dict(other=logp + 0.01, shifted=logp.roll(1, dims=1)).get(wrong, logp)
        return torch.where(batch.mask, changed, 0.0)

    monkeypatch.setattr(module, "response_logprobs", scorer)
    stops(name, "sampling and scoring disagree", temperature=0.7)


def test_dropout_in_the_policy_is_found():
    """Bug: a policy with dropout has another KL in every forward pass."""
    policy = tiny_gpt(0)
    policy.h[0].mlp.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1, True))
    stops("ppo", "or dropout is on", policy, reference=tiny_gpt(0))


@pytest.mark.parametrize("name, module", [*SAMPLERS, ("dpo", dpo)])
def test_a_scorer_that_reads_pads_is_found(name, module, monkeypatch):
    """Bug: log-probs that depend on the ids in the padding."""
    def reads_pads(model, batch, temperature=1.0):
        logp = response_logprobs(model, batch, temperature)
        return torch.where(batch.mask, logp + 1e-6 * (batch.ids != PAD).sum(1, keepdim=True), 0.0)

    monkeypatch.setattr(module, "response_logprobs", reads_pads)
    stops(name, "the padding changes the result", ppo_batch=32)


@pytest.mark.parametrize("name, module", [("reward", reward), ("heads", robust)])
def test_a_score_of_the_last_column_is_found(name, module, monkeypatch):
    """Bug: the score is read in the last column, which is a pad in all but the longest row."""
    monkeypatch.setattr(module, "last_hidden", lambda trunk, batch: trunk.hidden(batch.ids, batch.start)[:, -1])
    stops(name, "the padding changes the result")


def test_shuffled_reference_log_probs_are_found(monkeypatch):
    """Bug: the reference's log-probs belong to other pairs."""
    original = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *inputs: original(*inputs).roll(1, dims=0))
    stops("dpo", "the margins are up to")


@pytest.mark.parametrize("name, rate, what", [
    ("ppo", "ppo_lr", "policy"), ("ppo", "critic_lr", "critic"), ("grpo", "grpo_lr", "policy"),
    ("dpo", "dpo_lr", "policy"), ("reward", "reward_lr", "reward model"), ("heads", "reward_lr", "heads"),
    ("sft", "sft_lr", "network")])
def test_training_that_cannot_train_is_said(name, rate, what):
    """Bug: a loop runs to its end on a frozen network, or at a rate of 0, and its curves seem to show a hard task."""
    stops(name, f"the learning rate of the {what} is 0", **{rate: 0.0})
    stops(name, "nothing of the .* can be trained", MAKE[name](tiny_gpt(0)).requires_grad_(False))


@pytest.mark.parametrize("beta", [50.0, 1e4])
def test_a_large_beta_of_dpo_is_no_fault(beta):
    """Bug: a false alarm. The rounding of a margin times beta is taken for another reference."""
    finish(train("dpo", tiny_gpt(0, torch.float32), dpo_beta=beta))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name, module, loss, message", [
    ("ppo", ppo, "policy_loss", "the PPO loss is .*diverged; lower --ppo-lr"),
    ("ppo", ppo, "value_loss", "the PPO loss is .*diverged; lower --ppo-lr"),
    ("grpo", grpo, "loss_mean", "the GRPO loss is .*diverged; lower --grpo-lr"),
    ("dpo", dpo, "dpo_loss", "the DPO loss is .*lower --dpo-lr or raise --dpo-beta"),
    ("reward", reward, "bradley_terry_loss", "the reward model's loss is .*lower --reward-lr"),
    ("heads", robust, "brme_loss", "the heads' loss is .*lower the learning rate"),
    ("sft", sft, "sft_loss", "the SFT loss is .*lower --sft-lr"),
])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(name, module, loss, message, value, monkeypatch):
    """Bug: a diverged run trains on with NaN weights, or the check comes after the optimizer's step."""
    original = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *inputs, **named: original(*inputs, **named) * value)
    stops(name, message)
