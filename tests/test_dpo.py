"""
Tests of dpo.py: the losses against formulas in plain float64 and the known optimum, the loop against a slow replay.

A docstring names the bugs that its test catches. P1, P2, ... are the pitfalls that tests/mutants.py plants.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PAD,
    PAIRS,
    close,
    double,
    few,
    make_batch,
    naive_response_logprobs,
    noise,
    tiny_gpt,
    unchanged,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st

import dpo
from checks import CanaryError
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
    """Catches a wrong sign or factor, a missing reference or beta, and a sum over pairs in place of the mean."""
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four, beta, kind, e).item(), slow_loss(*four, beta, kind, e))


def test_losses_have_their_names():
    """Catches a loss without tests, and label smoothing offered where it does nothing."""
    assert dpo.LOSSES == (*KINDS, "robust")
    assert dpo.SMOOTHED == ("dpo", "robust")


def test_defaults():
    """Catches a changed default, which is a changed algorithm: beta is .1, the kind is dpo, without smoothing."""
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four).item(), slow_loss(*four, 0.1, "dpo", 0.0))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_the_start(kind, beta):
    """
    Catches a loss that cannot leave its start (P57).

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
    if kind == "dpo":
        close(dpo.dpo_loss(logp, logp - 1, logp, logp - 1, beta, kind, 0.3).item(), math.log(2), 1e-12)


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_gradient_equals_finite_differences(kind, e):
    """Catches a term that is detached or counted twice, in any of the four inputs."""
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


def test_swapping_chosen_and_rejected():
    """
    Catches labels in the wrong order (P50).

    -log sigmoid(x) + log sigmoid(-x) = -x. The two parabolas of IPO differ by 2h / beta. Smoothing mixes both orders.
    """
    h, beta = 1.7, 0.4
    close(at(h, beta) - at(-h, beta), -beta * h)
    close(at(h, beta, "ipo") - at(-h, beta, "ipo"), -2 * h / beta)
    close(at(h, beta, "slic"), 1 - beta * h)
    close(at(-h, beta, "slic"), 1 + beta * h)
    close(at(h, beta, e=0.2), 0.8 * at(h, beta) + 0.2 * at(-h, beta))
    assert at(h, beta) < at(-h, beta)


def test_loss_depends_on_the_reference():
    """
    Catches a reference that is ignored or has the wrong sign.

    A shift of a response's log-prob under both policy and reference changes nothing. A shift under one of them does.
    """
    chosen, rejected, ref_chosen, ref_rejected = [noise(seed, 5) for seed in range(4)]
    for kind in KINDS:
        loss = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.4, kind)
        close(dpo.dpo_loss(chosen + 3, rejected - 2, ref_chosen + 3, ref_rejected - 2, 0.4, kind), loss)
        assert (dpo.dpo_loss(chosen, rejected, ref_chosen + 1, ref_rejected, 0.4, kind) - loss).abs() > 1e-3


def test_hinge_stops_at_its_margin():
    """Catches a hinge that goes on after its margin, or below 0."""
    h = double([9.9, 10.1, 50.0]).requires_grad_()
    loss = at(h, 0.1, "slic")
    loss.backward()
    close(loss.item(), 0.01 / 3)
    close(h.grad, [-0.1 / 3, 0, 0])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("e", [0.05, 0.3])
def test_label_smoothing_has_its_minimum_where_sigmoid_is_1_minus_e(beta, e):
    """
    Catches the two weights exchanged, and a smoothed loss that still drives the margin to infinity (P59).

    The minimum is at h = log((1-e)/e) / beta.
    """
    best = math.log((1 - e) / e) / beta
    h = double([best]).requires_grad_()
    (gradient,) = torch.autograd.grad(at(h, beta, e=e), h)
    assert abs(gradient.item()) < 1e-12
    close(at(best, beta, e=e), -(1 - e) * math.log(1 - e) - e * math.log(e))  # the entropy of the labels
    assert at(best, beta, e=e) < min(at(best - 0.5, beta, e=e), at(best + 0.5, beta, e=e))


def test_smoothed_loss_is_the_expectation_over_flipped_labels():
    """Catches smoothing by another share: it is the mean of the plain loss when each pair is swapped 3 times of 10."""
    h = noise(0, 10)
    flipped = torch.arange(10) < 3
    total = 0.0
    for k in range(10):
        total = total + at(torch.where(flipped.roll(k), -h, h), 0.5)
    close(at(h, 0.5, e=0.3), total / 10)
    assert (at(torch.where(flipped, -h, h), 0.5) - at(h, 0.5)).abs() > 1e-3


@pytest.mark.parametrize("e", [0.05, 0.3, 0.45])
def test_robust_loss_is_the_clean_loss_on_average_over_flips(e):
    """
    Catches a wrong sign of the second term, and a missing 1 - 2e (P59).

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
    clean_gradient = torch.autograd.grad(clean, h)[0]
    robust_gradient = torch.autograd.grad(robust, h)[0]
    close(robust_gradient, clean_gradient, 1e-12)
    assert abs(mean_over_flips("dpo").item() - clean.item()) > 1e-3


def test_robust_without_wrong_labels_is_dpo():
    """Catches a correction when nothing is wrong: with e = 0 the robust loss is the plain loss to the bit."""
    h = 5 * noise(0, 9)
    assert torch.equal(at(h, 0.3, "robust"), at(h, 0.3, "dpo"))


def test_robust_has_no_lower_bound_where_smoothing_turns_back():
    """
    Shows what the docstring of dpo_loss warns of.

    For a large margin the slope of the robust loss is -beta e / (1 - 2e), so the margin of a single pair grows without
    end. The smoothed loss rises again.
    """
    beta, e, h = 0.5, 0.2, double([60.0, 100.0]).requires_grad_()
    (slope,) = torch.autograd.grad(at(h, beta, "robust", e), h)
    close(2 * slope, [-beta * e / (1 - 2 * e)] * 2)
    assert at(100.0, beta, "robust", e) < 0
    (smoothed_slope,) = torch.autograd.grad(at(h, beta, "dpo", e), h)
    assert (smoothed_slope > 0).all()


def test_implicit_reward_of_the_optimum_is_the_reward():
    """Catches another beta or sign: for pi = ref exp(r / beta) / Z, beta log pi/ref is r minus beta log Z."""
    beta, r, ref = 0.3, noise(0, 6), torch.log_softmax(noise(1, 6), 0)
    Z = (ref + r / beta).exp().sum()
    close(dpo.implicit_reward(torch.log_softmax(ref + r / beta, 0), ref, beta), r - beta * Z.log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_probs_stay_finite(kind, dtype):
    """Catches log(sigmoid(x)), which is -inf for x < -90 and has the gradient NaN (P47)."""
    chosen = torch.tensor([-1e4, 0.0, -1e4, -5000.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, -1e4, -1.0], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(4, dtype=dtype)
    loss = dpo.dpo_loss(chosen, rejected, zeros, zeros, 0.1, kind)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients)
    if kind == "dpo":
        close(loss.item(), (1000 + 0 + math.log(2) + 499.9) / 4, 1e-6)
        close(gradients[0], [-0.1 / 4, 0, -0.05 / 4, -0.1 / 4], 1e-6)


@pytest.mark.parametrize("arguments, message", [
    (dict(beta=0.0), "beta must be above 0"),
    (dict(beta=-1.0), "beta must be above 0"),
    (dict(kind="kto"), "unknown kind 'kto', choose from dpo, ipo, slic, robust"),
    (dict(label_smoothing=0.5), "label smoothing"),
    (dict(label_smoothing=-0.1), "label smoothing"),
    (dict(label_smoothing=1.0), "label smoothing"),
    (dict(label_smoothing=0.1, kind="ipo"), "belongs to dpo and robust"),
    (dict(label_smoothing=0.1, kind="slic"), "label smoothing"),
    (dict(label_smoothing=0.5, kind="robust"), "label smoothing"),
])
def test_bad_arguments_are_refused(arguments, message):
    """Catches a setting that has no effect, or that turns the loss around, without an error."""
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo.dpo_loss(x, x, x, x, **arguments)


four_log_probs = st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(-1e4, 0))


@few
@given(st.lists(four_log_probs, min_size=1, max_size=5), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.0, 0.2]))
def test_losses_are_finite_and_not_negative(rows, beta, e):
    """Catches log-probs for which a loss is NaN, infinite or negative, or makes the chosen response less likely."""
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


# ---- the optimum, by enumeration -------------------------------------------------------------------------------------

def population_gradient(logits, ref, p, beta, kind="dpo", e=0.0):
    """
    The largest gradient, over the logits (K,) of a policy, of the expected loss of all ordered pairs of K responses.

    p[i, j] is the share of raters that prefer response i to response j.
    """
    logits = logits.clone().requires_grad_()
    logp = torch.log_softmax(logits, 0)
    total = 0.0
    for i, j in itertools.permutations(range(len(ref)), 2):
        loss = dpo.dpo_loss(logp[i:i + 1], logp[j:j + 1], ref[i:i + 1], ref[j:j + 1], beta, kind, e)
        total = total + p[i, j] * loss
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient.abs().max()


def test_dpo_is_solved_by_the_optimum_of_the_kl_regularised_objective():
    """
    Catches another optimum (P60).

    With Bradley-Terry labels from scores r, the gradient is 0 at ref exp(r / beta) / Z, and not at other factors of r.
    """
    K, beta = 5, 0.7
    scores, ref = noise(0, K), torch.log_softmax(noise(1, K), 0)
    p = torch.sigmoid(scores[:, None] - scores[None, :])
    assert population_gradient(ref + scores / beta, ref, p, beta) < 1e-12
    for factor in (0.0, beta, -1 / beta):
        assert population_gradient(ref + factor * scores, ref, p, beta) > 1e-3


def test_robust_dpo_is_solved_by_the_same_optimum_from_noisy_labels():
    """
    Catches a correction for another share of wrong labels (P59).

    A share e of the Bradley-Terry labels is flipped, and the gradient is still 0 at ref exp(r / beta) / Z. It is not 0
    for the plain loss, for the smoothed loss, or with another e.
    """
    K, beta, e = 5, 0.7, 0.2
    scores, ref = noise(0, K), torch.log_softmax(noise(1, K), 0)
    clean = torch.sigmoid(scores[:, None] - scores[None, :])
    noisy = (1 - e) * clean + e * (1 - clean)
    best = ref + scores / beta
    assert population_gradient(best, ref, noisy, beta, "robust", e) < 1e-12
    for kind, assumed in (("robust", 0.1), ("dpo", 0.0), ("dpo", e)):
        assert population_gradient(best, ref, noisy, beta, kind, assumed) > 1e-3


def test_ipo_is_solved_at_a_finite_margin():
    """Catches a target twice or half as large. If a response wins a share p of the time, h = (2p - 1) / (2 beta)."""
    beta, share = 0.7, 0.8
    ref = double([0.3, 0.7]).log()
    p = double([[0, share], [1 - share, 0]])
    best = ref + double([(2 * share - 1) / (2 * beta), 0.0])
    assert population_gradient(best, ref, p, beta, "ipo") < 1e-12


# ---- the loop --------------------------------------------------------------------------------------------------------

SETTINGS = dict(dpo_epochs=2, batch_size=3, dpo_beta=0.1, dpo_lr=1e-3, dpo_kind="dpo", label_smoothing=0.0)


def slow_sums(model):
    """Sums of the log-probs of PAIRS, (pairs, 2): chosen and rejected, each response alone and token by token."""
    sums = torch.zeros(len(PAIRS), 2, dtype=torch.float64)
    with torch.no_grad():
        for i, pair in enumerate(PAIRS):
            sums[i, 0] = naive_response_logprobs(model, pair["prompt"], pair["chosen"]).sum()
            sums[i, 1] = naive_response_logprobs(model, pair["prompt"], pair["rejected"]).sum()
    return sums


def train(policy=None, reference=None, pairs=PAIRS, seed=0, **changes):
    """Run train_dpo on tiny networks, with changes to SETTINGS. Returns the policy and the logged rows."""
    if policy is None:
        policy = tiny_gpt(0)
    if reference is None:
        reference = copy.deepcopy(policy)
    config = SimpleNamespace(**{**SETTINGS, **changes})
    rows = []
    dpo.train_dpo(policy, reference, pairs, PAD, config, seed, log=lambda **row: rows.append(row))
    return policy, rows


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_reference_log_probs_are_sums_over_each_response_alone(size):
    """
    Catches a mean over tokens (P53), the prompt in the sum, an effect of the padding of the part in which a pair was
    computed (P66), and chosen and rejected exchanged.
    """
    reference = tiny_gpt(3)
    logp = dpo.reference_logprobs(reference, PAIRS, PAD, "cpu", size)
    close(logp, slow_sums(reference))
    assert not logp.requires_grad


def test_policy_as_its_own_reference_is_refused():
    """Catches the same object passed twice: the margins would stay 0 for ever."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        train(policy, policy)


def test_reference_is_not_trained():
    """Catches a reference that is trained with the policy, or that collects gradients (P45)."""
    policy = tiny_gpt(0)
    reference, before = copy.deepcopy(policy), weights(policy)
    train(policy, reference)
    assert unchanged(reference, before)
    assert not unchanged(policy, before)
    assert all(p.grad is None for p in reference.parameters())


def test_every_row_meets_its_own_reference(monkeypatch):
    """
    Catches reference log-probs paired with other rows after the shuffle (P44).

    With frozen weights they equal the policy's, row by row, in every epoch. An epoch sees every pair once, and the next
    one in another order, which the seed decides.
    """
    original = dpo.dpo_loss

    def chosen_of_a_run(seed):
        seen = []

        def spy(chosen, rejected, ref_chosen, ref_rejected, *rest):
            close(chosen.detach(), ref_chosen)
            close(rejected.detach(), ref_rejected)
            seen.extend(chosen.tolist())
            return original(chosen, rejected, ref_chosen, ref_rejected, *rest)

        monkeypatch.setattr(dpo, "dpo_loss", spy)
        _, rows = train(dpo_lr=1e-30, dpo_epochs=2, seed=seed)
        assert [row["step"] for row in rows] == list(range(6))
        return seen

    seen = chosen_of_a_run(0)
    first, second = seen[:7], seen[7:]
    in_order = slow_sums(tiny_gpt(0))[:, 0].tolist()
    close(sorted(first), sorted(in_order))
    close(sorted(second), sorted(in_order))
    assert first != second
    assert first != in_order
    assert chosen_of_a_run(0) == seen
    assert chosen_of_a_run(1) != seen


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_loop_equals_a_slow_replay(monkeypatch, kind, e):
    """
    Catches a beta, kind or smoothing that is not passed on, a mean over tokens (P53), gradients that are not cleared or
    not clipped, a learning rate that does not rise and fall, and a metric of the wrong quantity.

    Only the order of the pairs is recorded. All the rest is computed again.
    """
    beta, lr, steps = 0.3, 0.02, 12
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 2, 3)
        for _ in range(epochs):
            orders.extend(torch.randperm(n, generator=generator).split(size))
        return orders

    monkeypatch.setattr(dpo, "minibatches", recorded)
    policy, rows = train(dpo_epochs=3, batch_size=2, dpo_beta=beta, dpo_lr=lr, dpo_kind=kind, label_smoothing=e)
    assert len(orders) == len(rows) == steps

    slow, ref = tiny_gpt(0), slow_sums(tiny_gpt(0))
    adam = torch.optim.AdamW(slow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        sums = []
        for side in ("chosen", "rejected"):
            batch = make_batch([PAIRS[i]["prompt"] for i in order], [PAIRS[i][side] for i in order])
            sums.append(response_logprobs(slow, batch).sum(dim=1))
        h = (sums[0] - ref[order, 0]) - (sums[1] - ref[order, 1])
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
        norm = math.sqrt(sum((w.grad ** 2).sum().item() for w in slow.parameters()))
        norms.append(norm)
        for w in slow.parameters():
            w.grad /= max(1.0, norm)
        # a tenth of the steps is 1.2, so the rise ends in the second step
        adam.param_groups[0]["lr"] = lr * min((step + 1) / 2.2, (steps - step) / steps)
        adam.step()

        chosen, rejected = sums[0].detach(), sums[1].detach()
        chosen_reward, rejected_reward = beta * (chosen - ref[order, 0]), beta * (rejected - ref[order, 1])
        margin = chosen_reward - rejected_reward
        expected = dict(step=step, loss=loss.item(), margin=margin.mean().item(), chosen_logp=chosen.mean().item(),
                        rejected_logp=rejected.mean().item(), chosen_reward=chosen_reward.mean().item(),
                        rejected_reward=rejected_reward.mean().item())
        assert set(row) == {*expected, "accuracy"}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
        if step:  # before the first step the margins are rounding noise around 0
            assert row["accuracy"] == pytest.approx((margin > 0).double().mean().item())
    assert max(norms) > 1
    for name, w in policy.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_learning_rate_rises_and_falls(monkeypatch):
    """
    Catches a first step of rate 0, a rise that never ends, and a rate that is not near 0 at the end.

    Of 20 steps the first 2 rise.
    """
    seen, original = [], torch.optim.AdamW

    class Spy(original):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train(pairs=PAIRS[:4], dpo_epochs=20, batch_size=4, dpo_lr=1.0, dpo_kind="slic")
    rise = [(step + 1) / 3 for step in range(2)]
    fall = [1 - step / 20 for step in range(2, 20)]
    assert seen == pytest.approx(rise + fall)


def test_weights_that_are_not_used_do_not_decay():
    """
    Catches weight decay, which pulls the policy away from the reference for no preference.

    Positions that no text reaches keep their embedding to the bit.
    """
    before = tiny_gpt(0)
    policy, _ = train(dpo_lr=0.01)
    longest = max(len(pair["prompt"]) for pair in PAIRS) + 5
    assert torch.equal(policy.wpe.weight[longest:], before.wpe.weight[longest:])
    assert not torch.equal(policy.wpe.weight[0], before.wpe.weight[0])


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_margin_rises(kind):
    """Catches a loop that does not learn, or learns the opposite. The policy's own log-probs are compared."""
    policy, rows = train(tiny_gpt(0, torch.float32), dpo_epochs=30, batch_size=7, dpo_lr=0.01, dpo_beta=0.2,
                         dpo_kind=kind)
    moved = slow_sums(policy.double()) - slow_sums(tiny_gpt(0, torch.float32).double())
    assert (moved[:, 0] > moved[:, 1]).all()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["margin"] > rows[0]["margin"] + 0.3
    assert rows[-1]["accuracy"] == 1


# ---- the loop calls its canaries -------------------------------------------------------------------------------------

def test_no_canary_stops_a_healthy_run():
    """Catches a false alarm: float32, pairs of all lengths, batches of another width than the reference's."""
    train(tiny_gpt(0, torch.float32), batch_size=2)


def test_the_first_margins_are_measured_beside_whole_responses(monkeypatch):
    """The tolerance grows with the log-probs of tokens, so that long responses, which round by more, are a fault."""
    seen = []
    monkeypatch.setattr(dpo, "check_start_margin", lambda h, logp: seen.append((h, logp)))
    train(batch_size=len(PAIRS), dpo_epochs=1, dpo_beta=0.3)
    (h, logp), = seen
    assert h.shape == (len(PAIRS),) and h.abs().max() < 1e-5
    assert sorted(logp.tolist()) == pytest.approx(sorted(slow_sums(tiny_gpt(0)).flatten().tolist()), abs=1e-5)


def test_canary_for_another_reference():
    """Catches a reference with other weights."""
    with pytest.raises(CanaryError, match="before the first step, not 0: the reference is not the network"):
        train(tiny_gpt(0), tiny_gpt(1))


def test_canary_for_shuffled_reference_log_probs(monkeypatch):
    """Catches the reference's log-probs in another order than the pairs (P44)."""
    original = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *inputs: original(*inputs).roll(1, dims=0))
    with pytest.raises(CanaryError, match="the margins are up to"):
        train()


def test_canary_for_a_scorer_that_reads_pads(monkeypatch):
    """Catches log-probs that depend on the ids at the pads (P66)."""
    def reads_pads(model, batch):
        has_pad = (batch.ids == PAD).any().double()
        return torch.where(batch.mask, response_logprobs(model, batch) + 1e-6 * has_pad, 0.0)

    monkeypatch.setattr(dpo, "response_logprobs", reads_pads)
    with pytest.raises(CanaryError, match="the padding changes the result"):
        train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, value):
    """Catches a diverged run that goes on with NaN. The canary comes before the step, so the weights are not lost."""
    original, policy = dpo.dpo_loss, tiny_gpt(0)
    before = weights(policy)
    monkeypatch.setattr(dpo, "dpo_loss", lambda *inputs: original(*inputs) * value)
    with pytest.raises(CanaryError, match="DPO loss is (nan|inf).*lower --dpo-lr or raise --dpo-beta"):
        train(policy)
    assert unchanged(policy, before)
