"""Tests of checks.py: every canary with its bug planted, by itself and in the training loops, and in healthy runs."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    PAD,
    PAIRS,
    VOCAB,
    is_pad,
    make_batch,
    random_batch,
    random_texts,
    rng,
    tiny_gpt,
    unchanged,
    weights,
)

import dpo
import grpo
import ppo
import reward
import robust
from checks import (
    CanaryError,
    canary,
    check_first_ratio,
    check_kl,
    check_padding,
    check_start_kl,
    check_start_margin,
    check_trains,
    finite,
)
from model import Rollout, generate, response_logprobs
from pipeline import stages
from reward import RewardModel

# ---- the checks by themselves ----------------------------------------------------------------------------------------

def test_a_canary_raises_only_when_it_fails():
    """A canary that never raises, always raises, or loses its message."""
    canary(True, "no")
    with pytest.raises(CanaryError, match="^the cause$"):
        canary(False, "the cause")
    assert issubclass(CanaryError, RuntimeError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_names_the_loss_and_the_advice(value):
    """A NaN or an infinity that passes, or a message without the loss or the advice."""
    with pytest.raises(CanaryError, match="the PPO loss is -?(nan|inf).*diverged; lower it"):
        finite(torch.tensor(value), "PPO", "lower it")


def test_check_kl_is_per_token():
    """A policy that lost the text is trained on, or a long healthy response is refused."""
    check_kl(7.9 * 40, 40.0)
    with pytest.raises(CanaryError, match="is 324 nats from the reference in 40 tokens.*lower the learning rate"):
        check_kl(8.1 * 40, 40.0)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_finite_returns_the_loss(value):
    """A healthy loss that is refused, or another number in the log."""
    assert finite(torch.tensor(value, dtype=torch.float64, requires_grad=True), "PPO", "lower it") == value


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
    """Pads that keep their ids: on one side, beside the real tokens, or all of them. 1e-12 is a leak too."""
    with pytest.raises(CanaryError, match="the padding changes the result"):
        check_padding(readers()[name], random_batch(0, R=8))


def test_check_padding_leaves_real_tokens_alone():
    """A false alarm: functions that read real tokens and lengths, and the real scorer, must pass."""
    batch = random_batch(0, min_response=0, P=8, R=9)
    check_padding(lambda batch: torch.where(is_pad(batch), 0, batch.ids), batch)
    check_padding(lambda batch: batch.prompt_lens * 100 + batch.response_lens, batch)
    check_padding(lambda batch: response_logprobs(tiny_gpt(), batch), batch)
    check_padding(lambda batch: batch.ids, make_batch([[1, 2], [3, 4]], [[5], [6]]))  # there are no pads


def test_check_padding_changes_all_pads_and_nothing_else():
    """The caller's batch changes, a rollout loses its log-probs, or the new ids are not in the vocabulary."""
    rollout = generate(tiny_gpt(), [[1, 2], [3]], 4, generator=rng())
    before = rollout.ids.clone()
    seen = []

    def logp(batch):
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
    pads = is_pad(rollout)
    differs = seen[0].ids != seen[1].ids
    assert pads.any()
    assert torch.equal(differs, pads)


def test_check_padding_keeps_no_graph():
    """A check that builds the graph of two forward passes for nothing."""
    grad_modes = []

    def mask(batch):
        grad_modes.append(torch.is_grad_enabled())
        return batch.mask

    check_padding(mask, random_batch())
    assert grad_modes == [False, False]


@pytest.mark.parametrize("kl", [[0.0, 1e-12], [-1e-12, 0.0], [0.0, math.nan]])
def test_check_start_kl_wants_exactly_zero(kl):
    """A tolerance, a mean that hides one response, a sign, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="before the first update, not 0: the reference is not the network"):
        check_start_kl(torch.tensor(kl, dtype=torch.float64))


def test_check_start_kl_returns_the_largest():
    """A false alarm, or a tensor in the log."""
    assert check_start_kl(torch.tensor([0.0, -0.0])) == 0
    with pytest.raises(CanaryError, match="is 0.25 nats"):
        check_start_kl(torch.tensor([0.0, -0.25, 0.125]))


@pytest.mark.parametrize("log_ratio", [2e-4, -2e-4, math.nan, math.inf, -math.inf])
def test_check_first_ratio_finds_one_wrong_token(log_ratio):
    """A mean that hides one token, one side of 1 only, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        check_first_ratio(torch.tensor([[0.0, 1e-7], [0.0, log_ratio]], dtype=torch.float64))


@pytest.mark.parametrize("log_ratio", [5e-5, -5e-5])
def test_check_first_ratio_returns_the_largest_distance_from_1(log_ratio):
    """Rounding in float32 that stops a run, or another number in the log."""
    error = check_first_ratio(torch.tensor([[0.0, 1e-5], [log_ratio, 0.0]], dtype=torch.float64, requires_grad=True))
    assert error == pytest.approx(abs(math.exp(log_ratio) - 1), rel=1e-9)


@pytest.mark.parametrize("margin", [2e-3, -2e-3, math.nan])
def test_check_start_margin_finds_one_wrong_pair(margin):
    """A mean that hides one pair, one sign only, or a NaN that compares as no difference."""
    with pytest.raises(CanaryError, match="before the first step, not 0: the reference is not the network"):
        check_start_margin(torch.tensor([0.0, margin, 0.0]), torch.tensor([-90.0, -30.0]))


def test_check_start_margin_allows_rounding():
    """A false alarm: policy and reference are scored in batches of other widths, so the margins are not exactly 0."""
    check_start_margin(torch.tensor([1e-4, -5e-4, 0.0]), torch.tensor([-30.0]))


def test_check_start_margin_allows_the_rounding_of_long_responses():
    """A false alarm: in float32 a sum of 1,000 nats has no digit below 1e-4; or a real margin passes."""
    check_start_margin(torch.tensor([4e-3, -4e-3]), torch.tensor([-3.0, -500.0]))
    with pytest.raises(CanaryError, match="up to 0.006 nats"):
        check_start_margin(torch.tensor([6e-3, 0.0]), torch.tensor([-3.0, -500.0]))


def test_check_trains_wants_a_parameter_that_learns():
    """A frozen network, an optimizer of another one, or a rate of 0 trains for minutes and learns nothing."""
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


# ---- the checks in the loops -----------------------------------------------------------------------------------------

PROMPTS, _ = random_texts(0, B=5)
CONFIG = SimpleNamespace(
    response_tokens=5, temperature=1.0, ppo_iterations=2, ppo_batch=8, minibatch=8, ppo_epochs=2, ppo_lr=1e-2,
    critic_lr=1e-2, beta=0.1, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, batch_size=4, dpo_epochs=1, dpo_beta=0.1,
    dpo_lr=1e-2, dpo_kind="dpo", label_smoothing=0.0, reward_epochs=1, reward_lr=1e-2, weight_decay=0.1,
    grpo_kind="rloo", group=4, grpo_lr=1e-2, grpo_kl="reward", grpo_mean="", grpo_ratio="token", grpo_clip_high=0.2)


def with_config(**settings):
    return SimpleNamespace(**{**vars(CONFIG), **settings})


def tiny_reward_model(policy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RewardModel(policy).to(policy.wte.weight)


def train_ppo(policy, reference=None, **settings):
    reference = copy.deepcopy(policy) if reference is None else reference
    critic = tiny_reward_model(policy)
    reward_model = copy.deepcopy(critic).requires_grad_(False)
    ppo.train_ppo(policy, critic, reference, reward_model, PROMPTS, with_config(**settings), 0)


def train_grpo(policy, reference=None, **settings):
    reference = copy.deepcopy(policy) if reference is None else reference
    reward_model = tiny_reward_model(policy).requires_grad_(False)
    grpo.train_grpo(policy, reference, copy.deepcopy(reward_model), PROMPTS, with_config(**settings), 0)


def train_dpo(policy, reference=None, **settings):
    reference = copy.deepcopy(policy) if reference is None else reference
    dpo.train_dpo(policy, reference, PAIRS, PAD, with_config(**settings), 0)


def train_reward(reward_model, **settings):
    reward.train_reward_model(reward_model, PAIRS, PAD, with_config(**settings), 0)


def train_heads(heads, **settings):
    reward_model = tiny_reward_model(heads.trunk)
    robust.train_brme(heads, reward_model, PAIRS, PAD, "nll", 1.0, with_config(**settings), 0)


def train_sft(policy, peak_lr=1e-2, **settings):
    examples = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    stages.train_sft(policy, examples, 3, peak_lr, with_config(**settings), PAD, 0, "sft", lambda **row: None)


def make_heads(policy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return robust.GaussianHeads(policy, 3).to(policy.wte.weight)


LOOPS = dict(ppo=(train_ppo, lambda policy: policy), grpo=(train_grpo, lambda policy: policy),
             dpo=(train_dpo, lambda policy: policy),
             reward=(train_reward, tiny_reward_model), heads=(train_heads, make_heads),
             sft=(train_sft, lambda policy: policy))  # name -> (loop, what it trains, made from a policy)


@pytest.mark.parametrize("name", list(LOOPS))
def test_no_canary_stops_a_healthy_run(name):
    """False alarms: float32, texts of all lengths, minibatches of another width than the rollout, a temperature."""
    loop, make = LOOPS[name]
    network = make(tiny_gpt(0, torch.float32))
    before = weights(network)
    loop(network, minibatch=3, batch_size=2, temperature=0.6)
    assert not unchanged(network, before)


@pytest.mark.parametrize("loop, message", [(train_ppo, "before the first update, not 0: the reference is not"),
                                           (train_grpo, "before the first update, not 0: the reference is not"),
                                           (train_dpo, "before the first step, not 0: the reference is not")])
def test_another_reference_is_found(loop, message):
    """A reference with other weights, such as a checkpoint of another run."""
    policy = tiny_gpt(0)
    before = weights(policy)
    with pytest.raises(CanaryError, match=message):
        loop(policy, tiny_gpt(1))
    assert unchanged(policy, before)


def test_a_reference_that_differs_in_long_texts_only_is_found():
    """A KL that is checked in one response, or on average: only long texts have a position 7."""
    policy = tiny_gpt(0)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.wpe.weight[7] += 1e-3
    with pytest.raises(CanaryError, match="the reference is not the network"):
        train_ppo(policy, reference, ppo_batch=32)


@pytest.mark.parametrize("module, loop", [(ppo, train_ppo), (grpo, train_grpo)])
def test_a_kl_that_explodes_stops_the_run(module, loop, monkeypatch):
    """The policy is hundreds of nats away, and the loop trains on."""
    original = module.rollout_metrics
    monkeypatch.setattr(module, "rollout_metrics", lambda *inputs: {**original(*inputs), "kl": 1e4})
    policy = tiny_gpt(0)
    before = weights(policy)
    with pytest.raises(CanaryError, match="the training exploded"):
        loop(policy)
    assert unchanged(policy, before)


@pytest.mark.parametrize("module, loop", [(ppo, train_ppo), (grpo, train_grpo)])
def test_the_first_ratio_is_checked_in_the_loop(module, loop, monkeypatch):
    """Sampling and scoring disagree, and the loop does not look."""
    monkeypatch.setattr(module, "response_logprobs", lambda model, batch, temperature=1.0: torch.where(
        batch.mask, response_logprobs(model, batch, temperature) + 0.01, 0.0))
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        loop(tiny_gpt(0))


def test_dropout_in_the_policy_is_found():
    """P13: a policy with dropout has another KL in every forward pass."""
    policy = tiny_gpt(0)
    reference = copy.deepcopy(policy)
    policy.h[0].mlp.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1, True))
    with pytest.raises(CanaryError, match="or dropout is on"):
        train_ppo(policy, reference)


def test_a_scorer_at_another_temperature_is_found(monkeypatch):
    """P15: the sampler divides the logits by the temperature, the scorer forgets to."""
    def forgetful(model, batch, temperature=1.0):
        return response_logprobs(model, batch)

    monkeypatch.setattr(ppo, "response_logprobs", forgetful)
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        train_ppo(tiny_gpt(0), temperature=0.7)


def test_log_probs_off_by_one_are_found(monkeypatch):
    """P1: log-probs of the next token instead of this one's."""
    def shifted(model, batch, temperature=1.0):
        return torch.where(batch.mask, response_logprobs(model, batch, temperature).roll(1, dims=1), 0.0)

    monkeypatch.setattr(ppo, "response_logprobs", shifted)
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        train_ppo(tiny_gpt(0))


@pytest.mark.parametrize("module, loop", [(ppo, train_ppo), (grpo, train_grpo), (dpo, train_dpo)])
def test_a_scorer_that_reads_pads_is_found(module, loop, monkeypatch):
    """P5, P6, P66: log-probs that depend on the ids in the padding."""
    def reads_pads(model, batch, temperature=1.0):
        logp = response_logprobs(model, batch, temperature)
        return torch.where(batch.mask, logp + 1e-6 * (batch.ids != PAD).sum(1, keepdim=True), 0.0)

    monkeypatch.setattr(module, "response_logprobs", reads_pads)
    policy = tiny_gpt(0)
    before = weights(policy)
    with pytest.raises(CanaryError, match="the padding changes the result"):
        loop(policy, ppo_batch=32)
    assert unchanged(policy, before)


@pytest.mark.parametrize("name, module", [("reward", reward), ("heads", robust)])
def test_a_score_of_the_last_column_is_found(name, module, monkeypatch):
    """P46: the score is read in the last column, which is a pad in all but the longest row."""
    def last_column(trunk, batch):
        return trunk.hidden(batch.ids, batch.start)[:, -1]

    monkeypatch.setattr(module, "last_hidden", last_column)
    loop, make = LOOPS[name]
    network = make(tiny_gpt(0))
    before = weights(network)
    with pytest.raises(CanaryError, match="the padding changes the result"):
        loop(network)
    assert unchanged(network, before)


def test_shuffled_reference_log_probs_are_found(monkeypatch):
    """P44: the reference's log-probs are those of other pairs."""
    original = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *inputs: original(*inputs).roll(1, dims=0))
    with pytest.raises(CanaryError, match="the margins are up to"):
        train_dpo(tiny_gpt(0))


@pytest.mark.parametrize("name, rate, what", [
    ("ppo", "ppo_lr", "policy"), ("ppo", "critic_lr", "critic"), ("grpo", "grpo_lr", "policy"),
    ("dpo", "dpo_lr", "policy"),
    ("reward", "reward_lr", "reward model"), ("heads", "reward_lr", "heads"), ("sft", None, "sft network")])
def test_training_that_cannot_train_is_said(name, rate, what):
    """A loop runs to its end on a frozen network, or at a rate of 0, and its curves look like those of a hard task."""
    loop, make = LOOPS[name]
    frozen = make(tiny_gpt(0)).requires_grad_(False)
    if rate != "critic_lr":
        with pytest.raises(CanaryError, match="nothing of the .* can be trained"):
            loop(frozen)
    with pytest.raises(CanaryError, match=f"the learning rate of the {what} is 0"):
        loop(make(tiny_gpt(0)), **({rate: 0.0} if rate else {"peak_lr": 0.0}))


@pytest.mark.parametrize("beta", [50.0, 1e4])
def test_a_large_beta_of_dpo_is_no_fault(beta):
    """A false alarm: the rounding of a margin times beta is taken for another reference."""
    policy = tiny_gpt(0, dtype=torch.float32)
    reference = copy.deepcopy(policy)
    pairs = [dict(pair, prompt=pair["prompt"] * 2) for pair in PAIRS]
    dpo.train_dpo(policy, reference, pairs, PAD, with_config(dpo_beta=beta), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name, module, loss, message", [
    ("ppo", ppo, "policy_loss", "the PPO loss is .*diverged; lower --ppo-lr"),
    ("ppo", ppo, "value_loss", "the PPO loss is .*diverged; lower --ppo-lr"),
    ("grpo", grpo, "loss_mean", "the GRPO loss is .*diverged; lower --grpo-lr"),
    ("dpo", dpo, "dpo_loss", "the DPO loss is .*lower --dpo-lr or raise --dpo-beta"),
    ("reward", reward, "bradley_terry_loss", "the reward model's loss is .*lower --reward-lr"),
    ("heads", robust, "gaussian_nll", "the heads' loss is .*lower the learning rate"),
    ("sft", stages, "response_logprobs", "the sft loss is .*lower its learning rate"),
])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(name, module, loss, message, value,
                                                                               monkeypatch):
    """A diverged run that goes on with NaN weights, or a check that comes after the optimizer's step."""
    original = getattr(module, loss)
    monkeypatch.setattr(module, loss, lambda *inputs, **named: original(*inputs, **named) * value)
    loop, make = LOOPS[name]
    network = make(tiny_gpt(0))
    before = weights(network)
    with pytest.raises(CanaryError, match=message):
        loop(network)
    assert unchanged(network, before)


def test_the_numbers_of_the_checks_are_logged():
    """The log says 0 whatever the checks found."""
    rows = []
    policy = tiny_gpt(0)
    critic = tiny_reward_model(policy)
    ppo.train_ppo(policy, critic, copy.deepcopy(policy), copy.deepcopy(critic), PROMPTS, CONFIG, 0,
                  lambda **row: rows.append(row))
    assert rows[0]["kl_at_start"] == 0
    assert all("kl_at_start" not in row for row in rows[1:])
    assert all(0 <= row["ratio_error"] < 1e-9 for row in rows)
