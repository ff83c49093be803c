"""Tests of dpo.py: the losses against formulas in plain float64 and known optima, the loop against a slow replay."""

import itertools
import math

import pytest
import torch
from helpers import (
    PAD,
    PAIRS,
    close,
    double,
    few,
    naive_logits,
    naive_response_logprobs,
    noise,
    tiny_gpt,
    unchanged,
    weights,
)
from hypothesis import example, given
from hypothesis import strategies as st

import dpo
from checks import CanaryError
from data import minibatches
from model import response_logprobs

KINDS = ("dpo", "ipo", "slic")  # the losses that are never negative


def slow_loss_of_pair(h, beta, kind, e):
    """The loss of one pair, in Python floats. Only for moderate h."""
    p = 1 / (1 + math.exp(-beta * h))
    if kind == "dpo":
        return -(1 - e) * math.log(p) - e * math.log(1 - p)
    if kind == "robust":
        return (-(1 - e) * math.log(p) + e * math.log(1 - p)) / (1 - 2 * e)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return max(0.0, 1 - beta * h)


def slow_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="dpo", e=0.0):
    total = 0.0
    for i in range(len(chosen)):
        h = (chosen[i] - ref_chosen[i]) - (rejected[i] - ref_rejected[i])
        total += slow_loss_of_pair(h.item(), beta, kind, e)
    return total / len(chosen)


def at(h, beta, kind="dpo", e=0.0):
    """The loss as a function of h alone."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return dpo.dpo_loss(h, zero, zero, zero, beta, kind, e)


# ---- the losses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.1), ("dpo", 0.49), ("ipo", 0.0), ("slic", 0.0),
                                     ("robust", 0.0), ("robust", 0.1), ("robust", 0.45)])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 3.0])
def test_loss_equals_its_formula(beta, kind, e):
    """
    Bug: a wrong sign or factor, a missing reference or beta, chosen and rejected exchanged, a sum over pairs and not
    their mean, or another default than beta 0.1 and dpo without smoothing.
    """
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four, beta, kind, e).item(), slow_loss(*four, beta, kind, e))
    close(dpo.dpo_loss(*four).item(), slow_loss(*four, 0.1, "dpo", 0.0))
    assert dpo.LOSSES == (*KINDS, "robust")


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_the_start(kind, beta):
    """
    Bug: a loss that cannot leave its start.

    With policy = reference the loss is exactly log 2, 1/(4 beta^2) or 1, and its gradient is not 0.
    """
    logp = -10 * noise(0, 4).abs()
    chosen, rejected = logp.clone().requires_grad_(), (logp - 1).requires_grad_()
    loss = dpo.dpo_loss(chosen, rejected, logp, logp - 1, beta, kind)
    loss.backward()
    close(loss.item(), {"dpo": math.log(2), "ipo": 1 / (4 * beta ** 2), "slic": 1.0}[kind], 1e-12)
    slope = {"dpo": -beta / 2, "ipo": -1 / beta, "slic": -beta}[kind]  # d loss / d h at h = 0
    close(chosen.grad, [slope / 4] * 4)
    close(rejected.grad, [-slope / 4] * 4)


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_gradient_equals_finite_differences(kind, e):
    """Bug: a term that is detached or counted twice, in any of the four inputs."""
    four = [2 * noise(seed, 5) for seed in range(4)]
    inputs = [x.clone().requires_grad_() for x in four]
    gradients = torch.autograd.grad(dpo.dpo_loss(*inputs, 0.4, kind, e), inputs)
    for n in range(4):
        for i in range(5):
            up, down = [x.clone() for x in four], [x.clone() for x in four]
            up[n][i] += 1e-6
            down[n][i] -= 1e-6
            close(gradients[n][i], (slow_loss(*up, 0.4, kind, e) - slow_loss(*down, 0.4, kind, e)) / 2e-6, 1e-7)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("e", [0.05, 0.3])
def test_label_smoothing_has_its_minimum_where_sigmoid_is_1_minus_e(beta, e):
    """Bug: a smoothed loss that still drives the margin to infinity. Its minimum is at h = log((1-e)/e) / beta."""
    best = math.log((1 - e) / e) / beta
    h = double([best]).requires_grad_()
    (gradient,) = torch.autograd.grad(at(h, beta, e=e), h)
    assert abs(gradient.item()) < 1e-12
    close(at(best, beta, e=e), -(1 - e) * math.log(1 - e) - e * math.log(e))  # the entropy of the labels
    assert at(best, beta, e=e) < min(at(best - 0.5, beta, e=e), at(best + 0.5, beta, e=e))


@pytest.mark.parametrize("e", [0.05, 0.3, 0.45])
def test_robust_loss_is_the_clean_loss_on_average_over_flips(e):
    """
    Bug: a wrong sign of the second term, or a missing 1 - 2e.

    Each label is flipped with probability e. Over all 2^5 ways to flip five labels, the robust loss has the plain loss
    of the true labels as its mean, with the same gradient. The smoothed loss has another mean.
    """
    beta, h = 0.7, noise(3, 5).requires_grad_()

    def mean_over_flips(kind):
        total = 0.0
        for flips in itertools.product((0, 1), repeat=5):
            signs = 1 - 2 * double(flips)
            probability = e ** sum(flips) * (1 - e) ** (5 - sum(flips))
            total = total + probability * at(signs * h, beta, kind, e)
        return total

    clean, robust = at(h, beta), mean_over_flips("robust")
    close(robust.item(), clean.item(), 1e-12)
    close(torch.autograd.grad(robust, h)[0], torch.autograd.grad(clean, h)[0], 1e-12)
    assert abs(mean_over_flips("dpo").item() - clean.item()) > 1e-3


def test_implicit_reward_of_the_optimum_is_the_reward():
    """Bug: another beta or sign: for pi = ref exp(r / beta) / Z, beta log pi/ref is r minus beta log Z."""
    beta, r, ref = 0.3, noise(0, 6), torch.log_softmax(noise(1, 6), 0)
    Z = (ref + r / beta).exp().sum()
    close(dpo.implicit_reward(torch.log_softmax(ref + r / beta, 0), ref, beta), r - beta * Z.log())


@pytest.mark.parametrize("arguments, message", [
    (dict(beta=0.0), "beta must be above 0"),
    (dict(beta=-1.0), "beta must be above 0"),
    (dict(kind="kto"), "unknown kind 'kto', choose from dpo, ipo, slic, robust"),
    (dict(label_smoothing=0.5), "label smoothing"),
    (dict(label_smoothing=-0.1), "label smoothing"),
    (dict(label_smoothing=0.1, kind="ipo"), "belongs to dpo and robust"),
    (dict(label_smoothing=0.1, kind="slic"), "label smoothing"),
    (dict(label_smoothing=0.5, kind="robust"), "label smoothing"),
])
def test_bad_arguments_are_refused(arguments, message):
    """Bug: a setting that has no effect, or that turns the loss around, without an error."""
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo.dpo_loss(x, x, x, x, **arguments)


four_log_probs = st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0))


@few
@example([(-1e4, 0.0, 0.0, 0.0), (0.0, -1e4, 0.0, 0.0)], 0.1, 0.0)
@given(st.lists(four_log_probs, min_size=1, max_size=5), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.0, 0.2]))
def test_losses_are_finite_and_not_negative(rows, beta, e):
    """
    Bug: log(sigmoid(x)), which is -inf for x = -1000; or log-probs for which a loss is NaN, infinite or negative, or
    makes the chosen response less likely.
    """
    chosen, rejected, ref_chosen, ref_rejected = double(rows).T
    chosen = chosen.clone().requires_grad_()
    for kind in KINDS:
        smoothing = e if kind == "dpo" else 0.0
        loss = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind, smoothing)
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert torch.isfinite(loss)
        assert loss >= 0
        assert torch.isfinite(gradient).all()
        if kind != "ipo" and e == 0:  # the others may lie past their minimum
            assert (gradient <= 0).all()


# ---- the loop --------------------------------------------------------------------------------------------------------

SETTINGS = dict(dpo_batch=3, dpo_lr=1e-3)


def loop(policy=None, reference=None, pairs=PAIRS, seed=0, checkpoint=None, **changes):
    """train_dpo on tiny networks, with changes to SETTINGS: the generator."""
    policy = policy or tiny_gpt(0)
    reference = reference or tiny_gpt(0)
    return dpo.train_dpo(policy, reference, pairs, dpo.DPOConfig(**{**SETTINGS, **changes}), seed, checkpoint)


def slow_sum(model, prompt, response):
    """log pi of a whole response by the textbook GPT."""
    logits = naive_logits(model, prompt + response)[len(prompt) - 1:-1]
    return torch.log_softmax(logits, dim=1)[range(len(response)), response].sum()


def slow_sums(model):
    """log pi of PAIRS, (pairs, 2): chosen and rejected, each response alone and token by token."""
    sums = torch.zeros(len(PAIRS), 2, dtype=torch.float64)
    with torch.no_grad():
        for i, pair in enumerate(PAIRS):
            for side, response in enumerate(("chosen", "rejected")):
                sums[i, side] = naive_response_logprobs(model, pair["prompt"], pair[response]).sum()
    return sums


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_reference_log_probs_are_sums_over_each_response_alone(size):
    """
    Bug: a mean over tokens, the prompt in the sum, an effect of the padding of the part in which a pair was computed,
    or chosen and rejected exchanged.
    """
    reference = tiny_gpt(3)
    logp = dpo.reference_logprobs(reference, PAIRS, size)
    close(logp, slow_sums(reference))
    assert not logp.requires_grad


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_loop_equals_a_slow_replay(monkeypatch, kind, e):
    """
    Bug: a beta, kind or smoothing that is not passed on, a mean over tokens, reference log-probs of other rows after
    the shuffle, one order for two epochs, gradients that are not cleared or not clipped, weights that decay, a learning
    rate that does not rise and fall, or a metric of the wrong quantity.

    Only the order of the pairs is recorded. All the rest is computed again, one response after the other.
    """
    beta, lr, steps = 0.3, 0.02, 12
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 2, 3)
        orders.extend(minibatches(n, size, epochs, generator))
        return orders

    monkeypatch.setattr(dpo, "minibatches", recorded)
    policy = tiny_gpt(0)
    rows = [metrics for metrics, _ in loop(policy, dpo_epochs=3, dpo_batch=2, dpo_beta=beta, dpo_lr=lr, dpo_kind=kind,
                                           label_smoothing=e)]
    assert len(orders) == len(rows) == steps
    epochs = [torch.cat(orders[at:at + 4]).tolist() for at in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(7)) != epochs[0]

    slow, ref = tiny_gpt(0), slow_sums(tiny_gpt(0))
    adam = torch.optim.AdamW(slow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        pairs = [PAIRS[i] for i in order]
        chosen = torch.stack([slow_sum(slow, pair["prompt"], pair["chosen"]) for pair in pairs])
        rejected = torch.stack([slow_sum(slow, pair["prompt"], pair["rejected"]) for pair in pairs])
        h = (chosen - ref[order, 0]) - (rejected - ref[order, 1])
        p = 1 / (1 + torch.exp(-beta * h))
        if kind == "dpo":
            losses = -(1 - e) * p.log() - e * (1 - p).log()
        elif kind == "robust":
            losses = (e * (1 - p).log() - (1 - e) * p.log()) / (1 - 2 * e)
        elif kind == "ipo":
            losses = (h - 0.5 / beta) ** 2
        else:
            losses = (1 - beta * h).clamp(min=0)
        loss = losses.mean()

        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((w.grad ** 2).sum().item() for w in slow.parameters() if w.grad is not None))
        norms.append(norm)
        for w in slow.parameters():
            w.grad /= max(1.0, norm)
        # a tenth of the steps is 1.2, so the rise ends in the second step
        adam.param_groups[0]["lr"] = lr * min((step + 1) / 2.2, (steps - step) / steps)
        adam.step()

        chosen_reward = beta * (chosen.detach() - ref[order, 0])
        rejected_reward = beta * (rejected.detach() - ref[order, 1])
        margin = chosen_reward - rejected_reward
        expected = dict(step=step, loss=loss.item(), margin=margin.mean().item(), chosen_logp=chosen.mean().item(),
                        rejected_logp=rejected.mean().item(), chosen_reward=chosen_reward.mean().item(),
                        rejected_reward=rejected_reward.mean().item())
        assert set(row) == {*expected, "accuracy"} and next(iter(row)) == "step"
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
        if step:  # before the first step the margins are rounding noise around 0
            assert row["accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert max(norms) > 1
    for name, w in policy.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_only_the_policy_learns():
    """Bug: a reference that is trained with the policy, or that collects gradients."""
    policy, reference, before = tiny_gpt(0), tiny_gpt(0), weights(tiny_gpt(0))
    for _ in loop(policy, reference):
        pass
    assert unchanged(reference, before)
    assert not unchanged(policy, before)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_margin_rises(kind):
    """Bug: a loop that does not learn, or learns the opposite. The policy's own log-probs are compared."""
    policy, reference = tiny_gpt(0, torch.float32), tiny_gpt(0, torch.float32)
    rows = [metrics for metrics, _ in loop(policy, reference, dpo_epochs=30, dpo_batch=7, dpo_lr=0.01, dpo_beta=0.2,
                                           dpo_kind=kind)]
    moved = slow_sums(policy.double()) - slow_sums(reference.double())
    assert (moved[:, 0] > moved[:, 1]).all()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["margin"] > rows[0]["margin"] + 0.3
    assert rows[-1]["accuracy"] == 1


# ---- the loop calls its canaries -------------------------------------------------------------------------------------

def stops(message, **arguments):
    """The loop stops with a CanaryError, and no weight of the policy has changed."""
    policy = arguments.pop("policy", None) or tiny_gpt(0)
    before = weights(policy)
    with pytest.raises(CanaryError, match=message):
        next(loop(policy, **arguments))
    assert unchanged(policy, before)


def test_the_first_margins_are_measured_in_nats_with_whole_responses(monkeypatch):
    """Bug: margins times beta, or a tolerance from log-probs of tokens, which makes a fault of long responses."""
    seen = []
    monkeypatch.setattr(dpo, "check_start_margin", lambda h, logp: seen.append((h, logp)))
    policy = tiny_gpt(1)
    reference = slow_sums(tiny_gpt(0))
    for _ in loop(policy, dpo_batch=len(PAIRS), dpo_epochs=1, dpo_beta=0.3):
        pass
    (h, logp), = seen
    logps = slow_sums(tiny_gpt(1))
    moved = logps - reference
    assert sorted(h.tolist()) == pytest.approx(sorted((moved[:, 0] - moved[:, 1]).tolist()), abs=1e-5)
    assert sorted(logp.tolist()) == pytest.approx(sorted(logps.flatten().tolist()), abs=1e-5)


def test_the_canaries_watch_dpo(monkeypatch):
    """Bug: a loop that forgets one of its canaries, or looks after the step, when the weights are lost."""
    policy, original = tiny_gpt(0), dpo.dpo_loss
    with pytest.raises(ValueError, match="same object"):
        next(loop(policy, policy))
    stops("before the first step, not 0: the reference is not the network", reference=tiny_gpt(1))
    stops("nothing of the policy can be trained", policy=tiny_gpt(0).requires_grad_(False))
    stops("learning rate of the policy is 0", dpo_lr=0.0)
    for value in (math.nan, math.inf):
        monkeypatch.setattr(dpo, "dpo_loss", lambda *inputs, value=value: original(*inputs) * value)
        stops("DPO loss is (nan|inf).*lower --dpo-lr or raise --dpo-beta")
    monkeypatch.setattr(dpo, "dpo_loss", original)

    def reads_pads(model, batch):
        has_pad = (batch.ids == PAD).any().double()
        return torch.where(batch.mask, response_logprobs(model, batch) + 1e-6 * has_pad, 0.0)

    monkeypatch.setattr(dpo, "response_logprobs", reads_pads)
    stops("the padding changes the result")
