"""Tests of dpo.py: the losses against formulas in plain float64 and the known optimum, the loop against a slow replay of itself."""

import copy
import itertools
import math

import pytest
import torch
from helpers import PAD, PAIRS, close, few, make_batch, naive_response_logprobs, noise, tiny_gpt, unchanged, weights
from hypothesis import given
from hypothesis import strategies as st

import dpo
from evaluate import CanaryError
from model import response_logprobs

KINDS = ("dpo", "ipo", "slic")


def slow_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, kind="dpo", e=0.0):
    """One pair at a time, in Python floats; only for moderate numbers."""
    total = 0.0
    for c, r, rc, rr in zip(chosen.tolist(), rejected.tolist(), ref_chosen.tolist(), ref_rejected.tolist()):
        h = (c - rc) - (r - rr)
        p = 1 / (1 + math.exp(-beta * h))
        total += {"dpo": -(1 - e) * math.log(p) - e * math.log(1 - p), "ipo": (h - 1 / (2 * beta)) ** 2, "slic": max(0.0, 1 - beta * h),
                  "robust": (-(1 - e) * math.log(p) + e * math.log(1 - p)) / (1 - 2 * e)}[kind]
    return total / len(chosen)


def at(h, beta, kind="dpo", e=0.0):
    """The loss as a function of h alone."""
    h = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(h)
    return dpo.dpo_loss(h, zero, zero, zero, beta, kind, e)


# ---------------------------------------------------------------------------------------------------------------------
# the losses

@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.1), ("dpo", 0.49), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.0), ("robust", 0.1), ("robust", 0.45)])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 3.0])
def test_loss_equals_its_formula(beta, kind, e):
    """A sign, a factor, a lost reference or a lost beta; a sum over pairs in place of the mean."""
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four, beta, kind, e).item(), slow_loss(*four, beta, kind, e))


def test_defaults():
    """A changed default is a changed algorithm: beta .1, kind dpo, no smoothing are the contract."""
    four = [3 * noise(seed, 7) for seed in range(4)]
    close(dpo.dpo_loss(*four).item(), slow_loss(*four, 0.1, "dpo", 0.0))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_the_start(kind, beta):
    """P57: with policy = reference the loss is log 2, 1/(4 beta^2) or 1, exactly, and the gradient is not 0: a loss that cannot leave its start."""
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
    """A term that is detached, or counted twice, in any of the four inputs."""
    four = [2 * noise(seed, 5) for seed in range(4)]
    inputs = [x.clone().requires_grad_() for x in four]
    gradients = torch.autograd.grad(dpo.dpo_loss(*inputs, 0.4, kind, e), inputs)
    for n in range(4):
        for i in range(5):
            up, down = ([x.clone() for x in four] for _ in range(2))
            up[n][i] += 1e-6
            down[n][i] -= 1e-6
            close(gradients[n][i], (slow_loss(*up, 0.4, kind, e) - slow_loss(*down, 0.4, kind, e)) / 2e-6, 1e-7)
    assert gradients[0].abs().sum() > 0


def test_swapping_chosen_and_rejected():
    """P50: the label order. -log sigmoid(x) + log sigmoid(-x) = -x, the two parabolas differ by 2h / beta, and smoothing mixes the two orders."""
    h, beta = 1.7, 0.4
    close(at(h, beta) - at(-h, beta), -beta * h)
    close(at(h, beta, "ipo") - at(-h, beta, "ipo"), -2 * h / beta)
    close([at(h, beta, "slic"), at(-h, beta, "slic")], [1 - beta * h, 1 + beta * h])
    close(at(h, beta, e=0.2), 0.8 * at(h, beta) + 0.2 * at(-h, beta))
    assert at(h, beta) < at(-h, beta)


def test_loss_depends_on_the_reference():
    """A reference that is ignored, or has the wrong sign: shifting a response under policy and reference alike changes nothing."""
    four = [noise(seed, 5) for seed in range(4)]
    for kind in KINDS:
        loss = dpo.dpo_loss(*four, 0.4, kind)
        close(dpo.dpo_loss(four[0] + 3, four[1] - 2, four[2] + 3, four[3] - 2, 0.4, kind), loss)
        assert (dpo.dpo_loss(four[0], four[1], four[2] + 1, four[3], 0.4, kind) - loss).abs() > 1e-3


def test_hinge_stops_at_its_margin():
    """A hinge that goes on past its margin, or below 0."""
    h = torch.tensor([9.9, 10.1, 50.0], dtype=torch.float64, requires_grad=True)
    loss = at(h, 0.1, "slic")
    loss.backward()
    close(loss.item(), 0.01 / 3)
    close(h.grad, [-0.1 / 3, 0, 0])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("e", [0.05, 0.3])
def test_label_smoothing_has_its_minimum_where_sigmoid_is_1_minus_e(beta, e):
    """P59: the two weights exchanged, or a smoothed loss that still drives the margin to infinity: the minimum is at log((1-e)/e) / beta."""
    best = math.log((1 - e) / e) / beta
    h = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(at(h, beta, e=e), h)
    assert abs(gradient.item()) < 1e-12
    close(at(best, beta, e=e), -(1 - e) * math.log(1 - e) - e * math.log(e))  # the entropy of the labels
    assert at(best, beta, e=e) < min(at(best - 0.5, beta, e=e), at(best + 0.5, beta, e=e))


def test_smoothed_loss_is_the_expectation_over_flipped_labels():
    """Smoothing of the wrong share: with a share e of the pairs swapped, the plain loss is the smoothed one."""
    h = noise(0, 10)
    swapped = torch.where(torch.arange(10) < 3, -h, h)
    every = sum(at(torch.where(torch.arange(10).roll(k) < 3, -h, h), 0.5) for k in range(10)) / 10  # each pair is swapped 3 times out of 10
    close(at(h, 0.5, e=0.3), every)
    assert (at(swapped, 0.5) - at(h, 0.5)).abs() > 1e-3


@pytest.mark.parametrize("e", [0.05, 0.3, 0.45])
def test_robust_loss_is_the_clean_loss_on_average_over_flips(e):
    """P59: the sign of the second term, or a lost 1 - 2e. Over all 2^5 ways of flipping labels, each as likely as independent coins that flip a share e,
    the mean of the robust loss is the plain loss of the true labels, with its gradient; the smoothed loss has another mean."""
    beta, h = 0.7, noise(3, 5).requires_grad_()

    def mean_over_flips(kind):
        total = 0.0
        for flips in itertools.product((0, 1), repeat=5):
            sides = torch.tensor([-1.0 if flip else 1.0 for flip in flips], dtype=torch.float64)
            total = total + e ** sum(flips) * (1 - e) ** (5 - sum(flips)) * at(sides * h, beta, kind, e)
        return total

    clean, robust = at(h, beta), mean_over_flips("robust")
    close(robust.item(), clean.item(), 1e-12)
    close(*(torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in (robust, clean)), 1e-12)
    assert abs(mean_over_flips("dpo").item() - clean.item()) > 1e-3


def test_robust_without_wrong_labels_is_dpo():
    """A kind of its own where there is nothing to correct: with e = 0 it is the plain loss to the bit."""
    h = 5 * noise(0, 9)
    assert torch.equal(at(h, 0.3, "robust"), at(h, 0.3, "dpo"))


def test_robust_goes_on_where_smoothing_stops():
    """What the docstring warns of: one pair pulls its margin without end, at a slope of -beta e / (1 - 2e), where the smoothed loss turns back."""
    beta, e, h = 0.5, 0.2, torch.tensor([60.0, 100.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(at(h, beta, "robust", e), h)
    close(2 * slope, [-beta * e / (1 - 2 * e)] * 2)
    assert at(100.0, beta, "robust", e) < 0 < torch.autograd.grad(at(h, beta, "dpo", e), h)[0].min()


def test_implicit_reward_of_the_optimum_is_the_reward():
    """Another beta, or a sign: for pi = ref exp(r / beta) / Z, beta log pi/ref is r - beta log Z, the same constant for every response."""
    beta, r, ref = 0.3, noise(0, 6), torch.log_softmax(noise(1, 6), 0)
    Z = sum(math.exp(a + b / beta) for a, b in zip(ref.tolist(), r.tolist()))
    close(dpo.implicit_reward(torch.log_softmax(ref + r / beta, 0), ref, beta), r - beta * math.log(Z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_probs_stay_finite(kind, dtype):
    """P47: log(sigmoid(x)) is -inf at x < -90, and its gradient NaN."""
    chosen = torch.tensor([-1e4, 0.0, -1e4, -5000.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, -1e4, -1e4, -1.0], dtype=dtype, requires_grad=True)
    loss = dpo.dpo_loss(chosen, rejected, torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype), 0.1, kind)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)
    if kind == "dpo":
        close(loss.item(), (1000 + 0 + math.log(2) + 499.9) / 4, 1e-6)
        close(gradients[0], [-0.1 / 4, 0, -0.05 / 4, -0.1 / 4], 1e-6)


@pytest.mark.parametrize("arguments, message", [
    (dict(beta=0.0), "beta is above 0"), (dict(beta=-1.0), "beta is above 0"),
    (dict(kind="kto"), "unknown kind 'kto', choose from dpo, ipo, slic, robust"),
    (dict(label_smoothing=0.5), "label smoothing"), (dict(label_smoothing=-0.1), "label smoothing"), (dict(label_smoothing=1.0), "label smoothing"),
    (dict(label_smoothing=0.1, kind="ipo"), "belongs to dpo and robust"), (dict(label_smoothing=0.1, kind="slic"), "label smoothing"),
    (dict(label_smoothing=0.5, kind="robust"), "label smoothing"),
])
def test_bad_arguments_are_refused(arguments, message):
    """A setting that silently does nothing, or turns the loss around."""
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo.dpo_loss(x, x, x, x, **arguments)


@few
@given(st.lists(st.tuples(*[st.floats(-1e4, 0)] * 4), min_size=1, max_size=5), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.0, 0.2]))
def test_losses_are_finite_and_not_negative(rows, beta, e):
    """Any four log-probs between -1e4 and 0 that make a loss NaN, infinite or negative, or give the chosen response the wrong direction."""
    four = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows)]
    chosen = four[0].requires_grad_()
    for kind in KINDS:
        loss = dpo.dpo_loss(chosen, *four[1:], beta, kind, e if kind == "dpo" else 0.0)
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(gradient).all()
        assert kind == "ipo" or e or (gradient <= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# the optimum, by enumeration

def population_loss(theta, ref, p, beta, kind="dpo", e=0.0):
    """The expected loss over all ordered pairs of K responses; p[i, j] is the share of raters that prefer i to j."""
    logp = torch.log_softmax(theta, 0)
    total = 0.0
    for i in range(len(theta)):
        for j in range(len(theta)):
            if i != j:
                total = total + p[i, j] * dpo.dpo_loss(logp[i:i + 1], logp[j:j + 1], ref[i:i + 1], ref[j:j + 1], beta, kind, e)
    return total


def test_dpo_is_solved_by_the_optimum_of_the_kl_regularised_objective():
    """P60: an optimum elsewhere. With Bradley-Terry labels from scores r the gradient vanishes at ref exp(r / beta) / Z, not at another beta."""
    K, beta = 5, 0.7
    scores, ref = noise(0, K), torch.log_softmax(noise(1, K), 0)
    p = torch.sigmoid(scores[:, None] - scores[None, :])
    for share, solves in ((1 / beta, True), (0.0, False), (beta, False), (-1 / beta, False)):
        theta = (ref + share * scores).requires_grad_()
        (gradient,) = torch.autograd.grad(population_loss(theta, ref, p, beta), theta)
        assert (gradient.abs().max() < 1e-12) == solves


def test_robust_dpo_is_solved_by_the_same_optimum_from_noisy_labels():
    """P59: what it is for. A share e of the Bradley-Terry labels is flipped, and the gradient still vanishes at ref exp(r / beta) / Z, which is not so
    for the plain and for the smoothed loss, nor with another e."""
    K, beta, e = 5, 0.7, 0.2
    scores, ref = noise(0, K), torch.log_softmax(noise(1, K), 0)
    p = torch.sigmoid(scores[:, None] - scores[None, :])
    noisy = (1 - e) * p + e * (1 - p)
    for kind, told, solves in (("robust", e, True), ("robust", 0.1, False), ("dpo", 0.0, False), ("dpo", e, False)):
        theta = (ref + scores / beta).requires_grad_()
        (gradient,) = torch.autograd.grad(population_loss(theta, ref, noisy, beta, kind, told), theta)
        assert (gradient.abs().max() < 1e-12) == solves


def test_ipo_is_solved_at_a_finite_margin():
    """IPO's target twice or half as large: for two responses of which the first wins a share p of the time, h = (2p - 1) / (2 beta)."""
    beta, share = 0.7, 0.8
    ref = torch.log(torch.tensor([0.3, 0.7], dtype=torch.float64))
    p = torch.tensor([[0, share], [1 - share, 0]], dtype=torch.float64)
    theta = (ref + torch.tensor([(2 * share - 1) / (2 * beta), 0.0], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(population_loss(theta, ref, p, beta, "ipo"), theta)
    assert gradient.abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def slow_sums(model, pairs=PAIRS):
    """Sums of the log-probs (pairs, 2), chosen and rejected, each response alone and token by token."""
    with torch.no_grad():
        return torch.stack([torch.stack([naive_response_logprobs(model, pair["prompt"], pair[side]).sum() for side in ("chosen", "rejected")])
                            for pair in pairs])


def train(policy=None, reference=None, pairs=PAIRS, **settings):
    policy = tiny_gpt(0) if policy is None else policy
    reference = copy.deepcopy(policy) if reference is None else reference
    rows = []
    dpo.train_dpo(policy, reference, pairs, PAD, **{**dict(epochs=2, batch_size=3, lr=1e-3), **settings}, log=lambda **row: rows.append(row))
    return policy, rows


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_reference_log_probs_are_sums_over_each_response_alone(size):
    """P53, P66: a mean over tokens, the prompt in the sum, the padding of the part in which a pair was computed, chosen and rejected exchanged."""
    reference = tiny_gpt(3)
    logp = dpo.reference_logprobs(reference, PAIRS, PAD, "cpu", size)
    close(logp, slow_sums(reference))
    assert not logp.requires_grad


def test_policy_as_its_own_reference_is_refused():
    """The same object twice: the margins would stay 0 for ever."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        dpo.train_dpo(policy, policy, PAIRS, PAD)


def test_reference_is_not_trained():
    """P45: a reference that drifts with the policy, or collects gradients."""
    policy = tiny_gpt(0)
    reference, before = copy.deepcopy(policy), weights(policy)
    train(policy, reference)
    assert unchanged(reference, before) and not unchanged(policy, before)
    assert all(p.grad is None for p in reference.parameters())


def test_every_row_meets_its_own_reference(monkeypatch):
    """P44: reference log-probs paired with other rows after the shuffle. With frozen weights they equal the policy's, row by row, in every epoch;
    and an epoch sees every pair once, in another order."""
    seen, original = [], dpo.dpo_loss

    def spy(chosen, rejected, ref_chosen, ref_rejected, *rest):
        close(chosen.detach(), ref_chosen)
        close(rejected.detach(), ref_rejected)
        seen.extend(chosen.tolist())
        return original(chosen, rejected, ref_chosen, ref_rejected, *rest)

    monkeypatch.setattr(dpo, "dpo_loss", spy)
    _, rows = train(lr=0.0, epochs=2)
    expected = slow_sums(tiny_gpt(0))[:, 0]
    assert len(rows) == 6 and [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1] and [row["step"] for row in rows] == list(range(6))
    close(sorted(seen[:7]), sorted(expected.tolist()))
    close(sorted(seen[7:]), sorted(expected.tolist()))
    assert seen[:7] != seen[7:] and seen[:7] != expected.tolist()
    first = list(seen)
    for seed, same in ((0, True), (1, False)):
        seen.clear()
        train(lr=0.0, epochs=2, seed=seed)
        assert (seen == first) == same


@pytest.mark.parametrize("kind, e", [("dpo", 0.0), ("dpo", 0.2), ("ipo", 0.0), ("slic", 0.0), ("robust", 0.2)])
def test_loop_equals_a_slow_replay(monkeypatch, kind, e):
    """Beta, kind or smoothing not passed on, a mean over tokens (P53), gradients not cleared or clipped, a learning rate without its rise and
    fall, a metric of the wrong thing. The order of the rows is recorded, everything else is done again."""
    orders = []

    def recorded(n, size, generator):
        assert (n, size) == (7, 2)
        orders.append(list(torch.randperm(n, generator=generator).split(size)))
        return orders[-1]

    monkeypatch.setattr(dpo, "minibatches", recorded)
    beta, lr, steps = 0.3, 0.02, 12
    policy, rows = train(tiny_gpt(0), epochs=3, batch_size=2, beta=beta, lr=lr, kind=kind, label_smoothing=e)
    assert len(orders) == 3 and len(rows) == steps

    slow, ref = tiny_gpt(0), slow_sums(tiny_gpt(0))
    adam = torch.optim.AdamW(slow.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    step, clipped = 0, 0
    for epoch, order in enumerate(orders):
        for batch in order:
            some = [PAIRS[i] for i in batch.tolist()]
            sums = torch.stack([response_logprobs(slow, make_batch([pair["prompt"] for pair in some], [pair[side] for pair in some])).sum(1)
                                for side in ("chosen", "rejected")], 1)
            h = (sums[:, 0] - ref[batch, 0]) - (sums[:, 1] - ref[batch, 1])
            p = 1 / (1 + torch.exp(-beta * h))
            loss = {"dpo": -(1 - e) * p.log() - e * (1 - p).log(), "ipo": (h - 0.5 / beta) ** 2, "slic": (1 - beta * h).clamp(min=0),
                    "robust": (e * (1 - p).log() - (1 - e) * p.log()) / (1 - 2 * e)}[kind].mean()
            adam.zero_grad()
            loss.backward()
            norm = math.sqrt(sum((w.grad ** 2).sum().item() for w in slow.parameters() if w.grad is not None))
            clipped += norm > 1
            for w in slow.parameters():
                w.grad /= max(1.0, norm)
            # a tenth of the steps is 1.2, so the rise ends in the second one
            adam.param_groups[0]["lr"] = lr * min((step + 1) / 2.2, (steps - step) / steps)
            adam.step()
            reward = beta * (sums.detach() - ref[batch])
            margin = reward[:, 0] - reward[:, 1]
            expected = dict(step=step, epoch=epoch, loss=loss.item(), margin=margin.mean().item(), chosen_logp=sums[:, 0].mean().item(),
                            rejected_logp=sums[:, 1].mean().item(), chosen_reward=reward[:, 0].mean().item(),
                            rejected_reward=reward[:, 1].mean().item())
            assert set(rows[step]) == set(expected) | {"accuracy"}
            for name, value in expected.items():
                assert rows[step][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (step, name)
            if step:  # before the first step the margins are rounding noise around 0
                assert rows[step]["accuracy"] == pytest.approx((margin > 0).double().mean().item())
            step += 1
    assert clipped
    for name, w in policy.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_learning_rate_rises_and_falls(monkeypatch):
    """A first step of rate 0 (nothing learned), a rise that never ends, a rate that is not near 0 at the end: 40 steps, a rise over the first 4."""
    seen, original = [], torch.optim.AdamW

    class Spy(original):
        def step(self, *args, **kwargs):
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train(pairs=PAIRS[:4], epochs=40, batch_size=4, lr=1.0, beta=0.1, kind="slic")
    rise = [(n + 1) / 5 for n in range(4)]
    assert seen[:4] == pytest.approx(rise) and seen[4:] == pytest.approx([1 - n / 40 for n in range(4, 40)])


def test_weights_that_are_not_used_do_not_decay():
    """Weight decay pulls the policy off the reference for no preference: positions that are never reached keep their embedding to the bit."""
    before = tiny_gpt(0)
    policy, _ = train(lr=0.01)
    longest = max(len(pair["prompt"]) for pair in PAIRS) + 5
    assert torch.equal(policy.wpe.weight[longest:], before.wpe.weight[longest:]) and not torch.equal(policy.wpe.weight[0], before.wpe.weight[0])


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_margin_rises(kind):
    """A loop that runs and does not learn, or learns to prefer the rejected responses; judged from outside, by the policy's own log-probs."""
    policy, rows = train(tiny_gpt(0, torch.float32), epochs=40, batch_size=7, lr=0.01, beta=0.2, kind=kind)
    moved = slow_sums(policy.double()) - slow_sums(tiny_gpt(0, torch.float32).double())
    assert (moved[:, 0] > moved[:, 1]).all()
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["margin"] > rows[0]["margin"] + 0.3 and rows[-1]["accuracy"] == 1


def test_canary_sings_for_no_healthy_run():
    """A canary that cries wolf: float32, pairs of all lengths, parts of other widths than the reference was computed in."""
    train(tiny_gpt(0, torch.float32), batch_size=2)


def test_canary_for_another_reference():
    """A reference with other weights."""
    with pytest.raises(CanaryError, match="before the first step, not 0: the reference is not the network"):
        train(tiny_gpt(0), tiny_gpt(1))


def test_canary_for_shuffled_reference_log_probs(monkeypatch):
    """P44 planted: the reference's rows in another order."""
    original = dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *inputs: original(*inputs).roll(1, dims=0))
    with pytest.raises(CanaryError, match="the margins are up to"):
        train()


def test_canary_for_a_scorer_that_reads_pads(monkeypatch):
    """P66: log-probs that depend on what stands in the padding."""
    def reads_pads(model, batch):
        logp = response_logprobs(model, batch)
        return torch.where(batch.mask, logp + 1e-6 * (batch.ids == PAD).any().double(), 0.0)

    monkeypatch.setattr(dpo, "response_logprobs", reads_pads)
    with pytest.raises(CanaryError, match="what stands in the padding"):
        train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, value):
    """A diverged run that goes on with NaN weights."""
    original, policy = dpo.dpo_loss, tiny_gpt(0)
    before = weights(policy)
    monkeypatch.setattr(dpo, "dpo_loss", lambda *inputs: original(*inputs) * value)
    with pytest.raises(CanaryError, match="DPO loss is (nan|inf).*lower --dpo-lr or raise --dpo-beta"):
        train(policy)
    assert unchanged(policy, before)
