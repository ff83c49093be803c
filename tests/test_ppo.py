"""Tests of ppo.py: the maths against double loops and hand numbers in float64, the loop against a slow replay of itself."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from helpers import PAD, VOCAB, close, double, few, naive_hidden, naive_response_logprobs, noise, rows_of, tiny_gpt, unchanged, weights
from hypothesis import given
from hypothesis import strategies as st

import ppo
from evaluate import CanaryError
from model import Rollout, generate, response_logprobs
from reward import Ensemble, RewardModel

NAN, INF = math.nan, math.inf


def ragged(lengths, R):
    """A mask (B, R) whose rows begin with the given numbers of True cells."""
    return torch.tensor([[t < n for t in range(R)] for n in lengths])


def poisoned(x, mask, value):
    return torch.where(mask, x, torch.full_like(x, value))


def slope(f, x, step=1e-6):
    """The gradient of a scalar function by central differences, one cell at a time."""
    grad = torch.zeros_like(x)
    for cell in range(x.numel()):
        up, down = x.clone(), x.clone()
        up.view(-1)[cell] += step
        down.view(-1)[cell] -= step
        grad.view(-1)[cell] = (f(up) - f(down)) / (2 * step)
    return grad


LENGTHS = [3, 0, 5, 1, 4]
MASK = ragged(LENGTHS, 5)


# ---------------------------------------------------------------------------------------------------------------------
# masked mean

def test_masked_mean_is_one_mean_over_all_real_cells():
    """A mean of row means: rows of 1 and 3 tokens tell it from the mean over tokens; a mean over all 6 cells is caught too."""
    x = torch.tensor([[6.0, NAN, INF], [1.0, 2.0, 3.0]], dtype=torch.float64)
    close(ppo.masked_mean(x, ragged([1, 3], 3)), (6 + 1 + 2 + 3) / 4)


def test_masked_mean_of_nothing_is_zero():
    """0 / 0: a part without real tokens must cost nothing instead of NaN."""
    assert ppo.masked_mean(torch.full((2, 3), NAN), ragged([0, 0], 3)).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# KL estimates

def two_categoricals(K=6):
    return torch.log_softmax(noise(0, K), 0), torch.log_softmax(noise(1, K), 0)


def test_k1_and_k3_have_the_exact_kl_as_expectation():
    """The direction of the KL: with samples of the policy, E[k1] = E[k3] = KL(policy || reference), by enumeration."""
    logp, ref = two_categoricals()
    p, q = logp.exp(), ref.exp()
    exact = sum(p[a] * math.log(p[a] / q[a]) for a in range(len(p)))
    estimates = ppo.kl_estimates(logp, ref)
    close((p * estimates["k1"]).sum(), exact)
    close((p * estimates["k3"]).sum(), exact)


def test_swapped_estimates_are_seen_to_be_wrong():
    """The arguments swapped (the sign of k1, ref/pi in k3): the enumeration above must be able to tell."""
    logp, ref = two_categoricals()
    p = logp.exp()
    exact, swapped = (p * (logp - ref)).sum(), ppo.kl_estimates(ref, logp)
    close((p * swapped["k1"]).sum(), -exact)
    close((p * swapped["k3"]).sum(), (p * (p / ref.exp())).sum() - 1 - exact)
    assert (p * swapped["k3"]).sum() > exact + 0.01


def test_kl_estimates_by_formula():
    """A wrong factor in k2 or a lost term in k3, value for value, and shapes kept."""
    logp, ref = noise(2, 4, 3), noise(3, 4, 3)
    estimates = ppo.kl_estimates(logp, ref)
    assert set(estimates) == {"k1", "k2", "k3"}
    for i in range(4):
        for t in range(3):
            x = (logp[i, t] - ref[i, t]).item()
            close([estimates[k][i, t].item() for k in ("k1", "k2", "k3")], [x, 0.5 * x * x, math.exp(-x) - 1 + x])


def test_kl_estimates_are_zero_for_equal_policies():
    """A KL that is not exactly 0 before training: noise in the very first penalty."""
    logp = noise(0, 3, 3)
    assert all((value == 0).all() for value in ppo.kl_estimates(logp, logp).values())


def test_k3_is_never_negative_and_keeps_its_digits_in_float32():
    """exp(x) - 1 + x rounds to negative numbers, or to 0, near x = 0 in float32; expm1 does not."""
    x = torch.cat([10 ** torch.linspace(-12, 1, 2000), -10 ** torch.linspace(-12, 1, 2000)]).float()
    k3 = ppo.kl_estimates(x, torch.zeros_like(x))["k3"]
    assert (k3 >= 0).all()
    shifted = ppo.kl_estimates(x - 3, torch.full_like(x, -3.0))["k3"]  # log-probs as they come, rounded before they are subtracted
    assert (shifted >= 0).all()
    some = x.abs() > 1e-3
    exact = torch.special.expm1(-x[some].double()) + x[some].double()
    torch.testing.assert_close(k3[some].double(), exact, rtol=1e-3, atol=0)


def test_gradients_of_the_kl_estimates():
    """An estimator as a loss (P21): on the policy's samples k1 teaches nothing, k2 has the gradient of KL(pi || ref), k3 of KL(ref || pi)."""
    theta, ref = noise(4, 5).requires_grad_(), torch.log_softmax(noise(5, 5), 0)
    p = torch.log_softmax(theta, 0).exp().detach()

    def gradient(f):
        return torch.autograd.grad(f(torch.log_softmax(theta, 0)), theta)[0]

    by_estimate = {k: gradient(lambda logp, k=k: (p * ppo.kl_estimates(logp, ref)[k]).sum()) for k in ("k1", "k2", "k3")}
    close(by_estimate["k1"], torch.zeros(5))
    close(by_estimate["k2"], gradient(lambda logp: (logp.exp() * (logp - ref)).sum()))
    close(by_estimate["k3"], p - ref.exp())


# ---------------------------------------------------------------------------------------------------------------------
# rewards

def slow_rewards(scores, logp, ref, lengths, beta):
    out = torch.zeros_like(logp)
    for i, n in enumerate(lengths):
        for t in range(n):
            out[i, t] = -beta * (logp[i, t] - ref[i, t]) + (scores[i] if t == n - 1 else 0)
    return out


@pytest.mark.parametrize("trash", [0.0, 7.0, NAN, INF, -INF])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_token_rewards_equal_a_double_loop(beta, trash):
    """The score one token early or late (on the first pad), a KL penalty of the wrong sign or with a hole, anything at pads."""
    scores, logp, ref = noise(0, 5), poisoned(noise(1, 5, 5), MASK, trash), poisoned(noise(2, 5, 5), MASK, trash)
    rewards = ppo.token_rewards(scores, logp, ref, MASK, beta)
    close(rewards, slow_rewards(scores, logp, ref, LENGTHS, beta))
    assert (rewards[~MASK] == 0).all()


def test_token_rewards_sum_to_the_objective():
    """The KL counted twice, or not at every token: a row's sum is score - beta log pi/ref of the response."""
    scores, logp, ref = noise(0, 5), noise(1, 5, 5), noise(2, 5, 5)
    totals = ppo.token_rewards(scores, logp, ref, MASK, 0.7).sum(1)
    for i, n in enumerate(LENGTHS):
        if n:
            close(totals[i], scores[i] - 0.7 * (logp[i, :n].sum() - ref[i, :n].sum()))


def test_score_sits_on_the_last_real_token():
    """A score at the cap's column instead of the response's end, or at column -1 for a response of no tokens."""
    rewards = ppo.token_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.zeros(3, 4), torch.zeros(3, 4), ragged([2, 4, 0], 4), beta=1.0)
    assert rewards.tolist() == [[0, 5, 0, 0], [0, 0, 0, 6], [0, 0, 0, 0]]


def test_score_of_an_empty_response_is_not_given_to_anyone():
    """NaN, the score of a row that has no tokens, leaking into other rows or into the zeros of its own."""
    rewards = ppo.token_rewards(torch.tensor([NAN, 6.0]), torch.zeros(2, 2), torch.zeros(2, 2), ragged([0, 1], 2), beta=1.0)
    assert rewards.tolist() == [[0, 0], [6, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# generalised advantage estimation

def slow_gae(rewards, values, lengths, gamma, lam):
    """The sum over l of (gamma lam)^l delta_{t+l}, written as it is defined."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, n in enumerate(lengths):
        delta = [rewards[i, t] + (gamma * values[i, t + 1] if t + 1 < n else 0) - values[i, t] for t in range(n)]
        for t in range(n):
            advantages[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0, 1.0])
def test_gae_equals_its_definition(gamma, lam):
    """A lost gamma or lambda, a bootstrap from a pad's value, returns that are not A + V."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    expected = slow_gae(rewards, values, LENGTHS, gamma, lam)
    close(advantages, expected)
    close(returns, torch.where(MASK, expected + values, torch.zeros_like(values)))


def test_gae_defaults_are_gamma_1_and_lambda_095():
    """A changed default is a changed algorithm: these two are the contract."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    close(ppo.gae(rewards, values, MASK)[0], slow_gae(rewards, values, LENGTHS, 1.0, 0.95))


def test_gae_by_hand():
    """The score one token too late: with V = (.1, .2, .3), a score of 1 at the end and lambda .95, the deltas are .1, .1, .7."""
    advantages, returns = ppo.gae(double([[0, 0, 1]]), double([[0.1, 0.2, 0.3]]), ragged([3], 3), 1.0, 0.95)
    a2 = 1 - 0.3
    a1 = (0.3 - 0.2) + 0.95 * a2
    a0 = (0.2 - 0.1) + 0.95 * a1
    close(advantages, [[a0, a1, a2]])
    close(returns, [[a0 + 0.1, a1 + 0.2, 1.0]])


def test_gae_lambda_1_is_reward_to_go_and_lambda_0_is_the_td_error():
    """The two ends of lambda exchanged; returns made of anything but the reward to go at lambda 1."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    far, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
    near, _ = ppo.gae(rewards, values, MASK, 1.0, 0.0)
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            to_go = rewards[i, t:n].sum()
            close(returns[i, t], to_go)
            close(far[i, t], to_go - values[i, t])
            close(near[i, t], rewards[i, t] + (values[i, t + 1] if t + 1 < n else 0) - values[i, t])


def test_nothing_is_bootstrapped_at_the_end_of_a_response():
    """The last real token, E or the cap: its advantage is r - V, whatever the value in the column after it."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    advantages, _ = ppo.gae(rewards, values, MASK, 0.9, 0.8)
    for i, n in enumerate(LENGTHS):
        if n:
            close(advantages[i, n - 1], rewards[i, n - 1] - values[i, n - 1])


@pytest.mark.parametrize("trash", [NAN, INF, -INF, 1e9])
def test_gae_never_reads_a_pad(trash):
    """Pads that take part in the recursion: whatever stands there, and however many there are, the result is the same to the last bit."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    clean = ppo.gae(torch.where(MASK, rewards, 0.0), torch.where(MASK, values, 0.0), MASK, 0.9, 0.8)
    dirty = ppo.gae(poisoned(rewards, MASK, trash), poisoned(values, MASK, trash), MASK, 0.9, 0.8)
    pads = torch.full((5, 3), trash, dtype=torch.float64)
    wide = ppo.gae(torch.cat([rewards, pads], 1), torch.cat([values, pads], 1), ragged(LENGTHS, 8), 0.9, 0.8)
    for a, b, c in zip(clean, dirty, wide):
        assert torch.equal(a, b) and torch.equal(a, c[:, :5])
        assert (a[~MASK] == 0).all() and (c[:, 5:] == 0).all()


def test_gae_leaves_its_inputs_alone():
    """A recursion written into the rewards or the values that the loop still needs."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    kept = rewards.clone(), values.clone()
    ppo.gae(rewards, values, MASK)
    assert torch.equal(rewards, kept[0]) and torch.equal(values, kept[1])


# ---------------------------------------------------------------------------------------------------------------------
# whitening

@pytest.mark.parametrize("trash", [0.0, 9.0, NAN, INF])
def test_whiten_by_hand(trash):
    """Pads in the statistics, or the sample variance: 1, 2, 3 have mean 2 and population variance 2/3."""
    mask = ragged([2, 1], 3)
    x = poisoned(double([[1.0, 2, 0], [3, 0, 0]]), mask, trash)
    a = math.sqrt(3 / 2)
    close(ppo.whiten(x, mask), [[-a, 0, 0], [a, 0, 0]], 1e-7)
    close(ppo.whiten(x, mask, shift_mean=False), [[2 - a, 2, 0], [2 + a, 0, 0]], 1e-7)


def test_whiten_makes_mean_0_and_variance_1_over_real_tokens():
    """Whitening row by row, or over pads: the statistics are those of all real tokens together."""
    x = 5 + 3 * noise(0, 5, 5)
    inside = ppo.whiten(x, MASK)[MASK]
    close([inside.mean(), ((inside - inside.mean()) ** 2).mean()], [0, 1], 1e-7)
    kept = ppo.whiten(x, MASK, shift_mean=False)[MASK]
    close([kept.mean(), ((kept - kept.mean()) ** 2).mean()], [x[MASK].mean(), 1], 1e-7)
    close(inside, (x[MASK] - x[MASK].mean()) / x[MASK].std(correction=0), 1e-7)


def test_whiten_constants_and_single_tokens():
    """0 / 0: constant advantages, a single token or none at all must give zeros, not NaN; unshifted they stay what they are."""
    for lengths in ([2, 3, 0], [1, 0, 0]):
        mask = ragged(lengths, 3)
        x = poisoned(torch.full((3, 3), 0.7, dtype=torch.float64), mask, NAN)
        close(ppo.whiten(x, mask), torch.zeros(3, 3))
        close(ppo.whiten(x, mask, shift_mean=False), 0.7 * mask.double())
    assert (ppo.whiten(torch.full((2, 2), NAN), ragged([0, 0], 2)) == 0).all()


def test_whiten_ignores_extra_columns():
    """A scale that depends on how wide the batch was padded."""
    x = noise(0, 5, 5)
    wide = ppo.whiten(torch.cat([x, torch.full((5, 4), 1e9).double()], 1), ragged(LENGTHS, 9))
    close(wide[:, :5], ppo.whiten(x, MASK))
    assert (wide[:, 5:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# the losses

@pytest.mark.parametrize("advantage, ratio, surrogate, moves", [
    (2.0, 0.5, 2.0 * 0.5, True),
    (2.0, 1.0, 2.0 * 1.0, True),
    (2.0, 1.5, 2.0 * 1.2, False),   # rewarded and already far: stop
    (-2.0, 0.5, -2.0 * 0.8, False),  # punished and already far: stop
    (-2.0, 1.0, -2.0 * 1.0, True),
    (-2.0, 1.5, -2.0 * 1.5, True),
])
def test_policy_loss_six_cases(advantage, ratio, surrogate, moves):
    """min for max, a lost sign, or a clip on the wrong side: value and gradient for both signs of A on three sides of the clip."""
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    loss = ppo.policy_loss(logp, old, double([[advantage]]), ragged([1], 1))
    loss.backward()
    close(loss.item(), -surrogate)
    if moves:
        close(logp.grad, [[-advantage * ratio]])  # d(-A exp(x)) / dx
    else:
        assert logp.grad.item() == 0


def test_policy_loss_clip_is_used_on_both_sides():
    """A clip range that is fixed at .2, or that has only one side."""
    old = torch.zeros(1, 1, dtype=torch.float64)
    for clip in (0.05, 0.3, 0.5):
        for advantage, ratio, bound in ((1.0, 3.0, 1 + clip), (-1.0, 0.1, 1 - clip)):
            loss = ppo.policy_loss(old + math.log(ratio), old, torch.full_like(old, advantage), ragged([1], 1), clip)
            close(loss, -advantage * bound)


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage():
    """Half a gradient, or none, where the two branches of the max tie: at ratio 1 the gradient is the policy gradient's, -A / n, even with clip 0."""
    old, advantages = noise(0, 5, 5), noise(1, 5, 5)
    for clip in (0.2, 0.0):
        logp = old.clone().requires_grad_()
        loss = ppo.policy_loss(logp, old, advantages, MASK, clip)
        loss.backward()
        close(loss.item(), -advantages[MASK].mean())
        close(logp.grad, torch.where(MASK, -advantages / MASK.sum(), 0.0))


def slow_policy_loss(logp, old, advantages, mask, clip=0.2):
    terms = []
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(logp[i, t] - old[i, t])
        bounded = min(max(ratio.item(), 1 - clip), 1 + clip)
        a = advantages[i, t]
        terms.append(-a * ratio if -a * ratio >= -a * bounded else (-a * bounded).detach())
    return sum(terms) / len(terms)


def slow_value_loss(values, old, returns, mask, clip=0.2):
    terms = []
    for i, t in mask.nonzero().tolist():
        free = (values[i, t] - returns[i, t]) ** 2
        near = min(max(values[i, t].item(), old[i, t].item() - clip), old[i, t].item() + clip)
        held = (near - returns[i, t]) ** 2
        terms.append(free if free >= held else held.detach())
    return 0.5 * sum(terms) / len(terms)


@pytest.mark.parametrize("fast, slow", [(ppo.policy_loss, slow_policy_loss), (ppo.value_loss, slow_value_loss)])
def test_losses_equal_a_double_loop_with_the_gradient_of_finite_differences(fast, slow):
    """Any wrong term, in the value or only in the gradient."""
    x, old, target = 0.4 * noise(0, 5, 5), 0.4 * noise(1, 5, 5), noise(2, 5, 5)
    for clip in (0.1, 0.2, 0.6):
        x = x.detach().requires_grad_()
        loss = fast(x, old, target, MASK, clip)
        close(loss.item(), slow(x, old, target, MASK, clip).item())
        (gradient,) = torch.autograd.grad(loss, x)
        close(gradient, slope(lambda y, clip=clip: fast(y, old, target, MASK, clip), x.detach()), 1e-7)
        assert (gradient[~MASK] == 0).all() and 0 < (gradient != 0).sum() < MASK.sum()  # some tokens clipped, some not
    close(fast(x, old, target, MASK).item(), slow(x, old, target, MASK, 0.2).item())  # the default clip


def test_policy_loss_takes_the_mean_over_tokens():
    """A mean of row means: rows of 1 and 3 tokens with A = (4; 0, 0, 4) average 2 over tokens, 8/3 over rows."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    close(ppo.policy_loss(zeros, zeros, double([[4.0, 9, 9], [0, 0, 4]]), ragged([1, 3], 3)), -2.0)


def test_value_loss_takes_the_mean_over_tokens():
    """As above for the critic: errors (2; 0, 0, 2) cost half of 8/4."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    close(ppo.value_loss(zeros, zeros, double([[2.0, 9, 9], [0, 0, 2]]), ragged([1, 3], 3)), 1.0)


def test_negative_clip_is_refused():
    """A clip below 0 turns the clamp inside out without any error."""
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip is at least 0"):
        ppo.policy_loss(x, x, x, ragged([1], 1), clip=-0.1)


@pytest.mark.parametrize("value, target, loss, gradient", [
    (0.1, 1.0, 0.5 * 0.9 ** 2, -0.9),   # within the clip: the plain squared error
    (0.5, 1.0, 0.5 * 0.8 ** 2, 0.0),    # beyond the clip, towards the target: held at 0.2
    (-0.5, 1.0, 0.5 * 1.5 ** 2, -1.5),  # beyond the clip, away from the target: the larger error counts
    (0.5, 0.3, 0.5 * 0.2 ** 2, 0.2),    # beyond the clip and past the target
    (-0.1, -1.0, 0.5 * 0.9 ** 2, 0.9),
    (-0.5, -1.0, 0.5 * 0.8 ** 2, 0.0),
    (0.5, -1.0, 0.5 * 1.5 ** 2, 1.5),
    (-0.5, -0.3, 0.5 * 0.2 ** 2, -0.2),
])
def test_value_loss_table(value, target, loss, gradient):
    """min for max, a missing half, or a clip around 0 instead of around the old value (here 3): value and gradient by hand."""
    v = torch.tensor([[3 + value]], dtype=torch.float64, requires_grad=True)
    result = ppo.value_loss(v, double([[3.0]]), double([[3 + target]]), ragged([1], 1))
    result.backward()
    close(result.item(), loss)
    close(v.grad.item(), gradient)


def test_value_loss_clip_is_used_on_both_sides():
    """A value clip that is fixed at .2, or that has only one side: targets far away hold the value at old +- clip."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for clip in (0.05, 0.5):
        for sign in (1, -1):
            close(ppo.value_loss(zero + sign * 2, zero, zero + sign * 10, ragged([1], 1), clip), 0.5 * (10 - clip) ** 2)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("trash", [NAN, INF, -INF, 1e9])
@pytest.mark.parametrize("function", [ppo.policy_loss, ppo.value_loss])
def test_pads_never_reach_a_loss_or_its_gradient(function, trash, which):
    """0 * NaN: whatever stands at a pad in any input, the loss and its gradient stay the same to the last bit, 0 at the pad."""
    inputs = [0.4 * noise(seed, 5, 5) for seed in range(3)]
    results = []
    for value in (0.0, trash):
        x = list(inputs)
        x[which] = poisoned(inputs[which], MASK, value)
        x[0] = x[0].clone().requires_grad_()
        loss = function(*x, MASK)
        results.append((loss.detach(), torch.autograd.grad(loss, x[0])[0]))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert torch.isfinite(dirty) and torch.equal(clean, dirty)
    assert torch.equal(clean_gradient, dirty_gradient) and (dirty_gradient[~MASK] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# properties, over shapes, lengths and extreme log-probs

@st.composite
def ragged_batches(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    R = max(lengths + [1]) + draw(st.integers(0, 2))
    scale = draw(st.sampled_from([1e-6, 1.0, 100.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    logp, ref = (-scale * torch.rand(len(lengths), R, generator=generator, dtype=torch.float64) for _ in range(2))
    return lengths, R, logp, ref, draw(st.sampled_from([0.0, NAN, INF, 1e9]))


@few
@given(ragged_batches())
def test_rewards_advantages_and_whitening_are_finite_and_inert_at_pads(case):
    """Any combination of lengths (0, 1, all columns), width and extreme log-probs that makes a NaN, or lets a pad speak."""
    lengths, R, logp, ref, trash = case
    mask, scores = ragged(lengths, R), noise(0, len(lengths))

    def chain(logp, ref, mask):
        rewards = ppo.token_rewards(scores, logp, ref, mask, 0.1)
        advantages, returns = ppo.gae(rewards, logp, mask, 0.99, 0.9)
        return rewards, advantages, returns, ppo.whiten(advantages, mask), ppo.whiten(rewards, mask, shift_mean=False)

    clean = chain(logp, ref, mask)
    pads = torch.full((len(lengths), 2), trash, dtype=torch.float64)
    wide = chain(torch.cat([poisoned(logp, mask, trash), pads], 1), torch.cat([poisoned(ref, mask, trash), pads], 1), ragged(lengths, R + 2))
    for a, b in zip(clean, wide):
        assert torch.isfinite(a).all() and (a[~mask] == 0).all() and (b[:, R:] == 0).all()
        close(a, b[:, :R])
    close(clean[0], slow_rewards(scores, logp, ref, lengths, 0.1))
    close(clean[1], slow_gae(clean[0], logp, lengths, 0.99, 0.9))


@few
@given(ragged_batches())
def test_losses_are_finite_and_inert_at_pads(case):
    """A policy that has lost all faith in a token (log-probs down to -1e4), rows of no tokens, batches of only pads."""
    lengths, R, logp, _, trash = case
    mask, old, advantages = ragged(lengths, R), -noise(1, len(lengths), R).abs(), noise(2, len(lengths), R)
    for function in (ppo.policy_loss, ppo.value_loss):
        x = logp.clone().requires_grad_()
        loss = function(x, old, advantages, mask)
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all() and (gradient[~mask] == 0).all()
        close(function(poisoned(logp, mask, trash), poisoned(old, mask, trash), poisoned(advantages, mask, trash), mask), loss.item())
        if mask.any():
            close(loss.item(), (slow_policy_loss if function is ppo.policy_loss else slow_value_loss)(logp, old, advantages, mask).item())
        else:
            assert loss.item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# experience

def tiny_reward_model(seed=7):
    torch.manual_seed(seed)
    return RewardModel(tiny_gpt(seed)).double()


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]


def a_rollout(policy, temperature=1.0, n=8):
    """A rollout of mixed lengths, in which some responses ended and some were cut."""
    for seed in range(20):
        rollout = generate(policy, (PROMPTS * n)[:n], 6, temperature, torch.Generator().manual_seed(seed))
        if rollout.finished.any() and not rollout.finished.all() and len(set(rollout.response_lens.tolist())) > 2:
            return rollout
    raise AssertionError("no such rollout")


def test_experience_by_hand():
    """Scores of another model or token, log-probs at another temperature, the critic and the reward model exchanged, values one token late."""
    policy, reference, reward_model, critic = tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2), tiny_reward_model(3)
    reward_model.mean.fill_(0.3), reward_model.std.fill_(2.0)
    rollout = a_rollout(policy, 0.7)
    lesson = ppo.experience(rollout, reference, reward_model, critic, beta=0.4, gamma=0.9, lam=0.8, temperature=0.7)
    lengths = rollout.response_lens.tolist()

    scores, ref_logp, values = torch.zeros(len(lengths)).double(), torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(rows_of(rollout)):
            n, p = len(response), len(prompt)
            scores[i] = (reward_model.score(naive_hidden(reward_model.trunk, prompt + response)[-1]) - 0.3) / 2.0
            ref_logp[i, :n] = naive_response_logprobs(reference, prompt, response, 0.7)
            values[i, :n] = critic.score(naive_hidden(critic.trunk, prompt + response)[p - 1:p - 1 + n]).squeeze(-1)
    rewards = slow_rewards(scores, rollout.logp, ref_logp, lengths, 0.4)
    advantages = slow_gae(rewards, values, lengths, 0.9, 0.8)
    expected = dict(scores=scores, ref_logp=ref_logp, rewards=rewards, values=values, advantages=advantages, returns=advantages + values)
    assert set(lesson) == set(expected)
    for name in expected:
        close(lesson[name], expected[name], 1e-5)  # scores and values are float32
        assert not lesson[name].requires_grad, name


def test_a_cut_response_is_an_ended_response():
    """A bootstrap at the cap: the horizon is part of the MDP, so whether a row ended with E changes nothing."""
    rollout = a_rollout(tiny_gpt(0))
    other = Rollout(**{**vars(rollout), "finished": ~rollout.finished})
    models = tiny_gpt(1), tiny_reward_model(2), tiny_reward_model(3)
    a, b = ppo.experience(rollout, *models, 0.4), ppo.experience(other, *models, 0.4)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_experience_ignores_what_stands_after_the_end():
    """Tokens after E that change scores, rewards or advantages (P7)."""
    rollout = a_rollout(tiny_gpt(0))
    junk = torch.where(torch.arange(rollout.ids.shape[1]) >= rollout.P + rollout.response_lens[:, None], 4, rollout.ids)
    assert not torch.equal(junk, rollout.ids)
    models = tiny_gpt(1), tiny_reward_model(2), tiny_reward_model(3)
    a, b = ppo.experience(rollout, *models, 0.4), ppo.experience(Rollout(**{**vars(rollout), "ids": junk}), *models, 0.4)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def train(policy=None, reference=None, reward_model=None, **settings):
    """train_ppo on something tiny; returns (policy, critic, logged rows)."""
    policy = tiny_gpt(0) if policy is None else policy
    reference = copy.deepcopy(policy) if reference is None else reference
    rows = []
    arguments = dict(iterations=2, batch_size=8, minibatch_size=8, epochs=2, lr=1e-2, critic_lr=1e-2, max_new_tokens=5)
    critic = ppo.train_ppo(policy, reference, tiny_reward_model() if reward_model is None else reward_model, PROMPTS,
                           **{**arguments, **settings}, log=lambda **row: rows.append(row))
    return policy, critic, rows


def test_policy_as_its_own_reference_is_refused():
    """The same object twice: the KL would stay 0 for ever."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        ppo.train_ppo(policy, policy, tiny_reward_model(), PROMPTS)


def test_only_policy_and_critic_learn():
    """A reference or reward model that drifts along, a critic that is the reward model itself, gradients that pile up on frozen models."""
    reward_model, policy = tiny_reward_model(), tiny_gpt(0)
    reference = copy.deepcopy(policy)
    before = weights(policy), weights(reward_model)
    _, critic, _ = train(policy, reference, reward_model)
    assert unchanged(reference, before[0]) and unchanged(reward_model, before[1])
    assert not unchanged(policy, before[0]) and not unchanged(critic, before[1])
    assert all(p.grad is None for model in (reference, reward_model) for p in model.parameters())
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in reward_model.parameters()}


def test_critic_of_a_frozen_reward_model_learns():
    """A reward model with requires_grad off, copied as it is: the critic would never move."""
    reward_model = tiny_reward_model().requires_grad_(False)
    _, critic, _ = train(reward_model=reward_model)
    assert not unchanged(critic, weights(reward_model)) and not any(p.requires_grad for p in reward_model.parameters())
    changed = {name for name, w in critic.named_parameters() if not torch.equal(w, dict(reward_model.named_parameters())[name])}
    assert changed == {name for name, _ in critic.named_parameters()}


def test_critic_starts_where_it_is_told():
    """A critic that is ignored, or that is the caller's own and changes under the caller: at rate 0 the returned one is the given one, which is not
    the reward model; with training the given one, frozen or not, stays as it was."""
    reward_model, given = tiny_reward_model(7), tiny_reward_model(8).requires_grad_(False)
    before = weights(given)
    _, critic, _ = train(reward_model=reward_model, critic=given, critic_lr=0.0)
    assert unchanged(critic, before) and not unchanged(reward_model, before)
    _, critic, _ = train(reward_model=reward_model, critic=given)
    assert unchanged(given, before) and not any(p.requires_grad for p in given.parameters()) and not unchanged(critic, before)
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in given.parameters()}


def test_an_ensemble_rewards_and_one_member_is_the_critic():
    """A reward without values cannot be copied into a critic. An ensemble of one, with its member as the critic, is that reward model to the bit."""
    member, start = tiny_reward_model(), tiny_gpt(0)
    policies = [train(copy.deepcopy(start), reward_model=reward_model, critic=critic)[0]
                for reward_model, critic in ((Ensemble([member], "wco"), member), (member, None))]
    assert unchanged(policies[0], weights(policies[1])) and not unchanged(policies[0], weights(start))


def test_nothing_moves_at_learning_rate_0():
    """P12: a ratio that is not 1 before any step. With frozen weights nothing is clipped, the policy's loss is minus the mean of whitened
    advantages, 0, and the critic is the reward model."""
    policy, reward_model = tiny_gpt(0), tiny_reward_model()
    before = weights(policy)
    _, critic, rows = train(policy, reward_model=reward_model, iterations=1, epochs=3, lr=0.0, critic_lr=0.0, temperature=0.7)
    assert unchanged(policy, before) and unchanged(critic, weights(reward_model))
    (row,) = rows
    assert row["ratio_error"] < 1e-5 and row["clip_fraction"] == 0 and abs(row["approx_kl"]) < 1e-9
    assert abs(row["policy_loss"]) < 1e-6 and row["kl_at_start"] == 0 and abs(row["kl"]) < 1e-9


def test_policy_and_critic_have_a_learning_rate_each():
    """One rate for both, or the two exchanged."""
    reward_model, start = tiny_reward_model(), weights(tiny_gpt(0))
    policy, critic, _ = train(reward_model=reward_model, lr=0.0)
    assert unchanged(policy, start) and not unchanged(critic, weights(reward_model))
    policy, critic, _ = train(reward_model=reward_model, critic_lr=0.0)
    assert not unchanged(policy, start) and unchanged(critic, weights(reward_model))


def test_old_log_probs_are_frozen(monkeypatch):
    """Old log-probs that are recomputed in every epoch (P17): the ratio would stay 1 and nothing would ever be clipped."""
    original, seen = ppo.policy_loss, []

    def spy(logp, old_logp, *rest):
        seen.append((logp.detach(), old_logp))
        return original(logp, old_logp, *rest)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    _, _, rows = train(iterations=1, epochs=3, lr=0.03)
    logp, old_logp = seen[-1]  # the last epoch, after the policy has moved
    assert (logp - old_logp).abs().max() > 1e-3 and not old_logp.requires_grad
    assert rows[0]["approx_kl"] > 1e-4 and rows[0]["clip_fraction"] > 0 and rows[0]["ratio_error"] < 1e-5


def test_learning_rates_fall_linearly_to_0():
    """A rate that stays, falls within an iteration, or ends below 0; both networks' rates fall."""
    seen, original = [], torch.optim.AdamW

    class Spy(original):
        def step(self, *args, **kwargs):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Spy)
        train(iterations=4, epochs=2, minibatch_size=4, lr=0.01, critic_lr=0.02)
    close(seen, [[0.01 * left, 0.02 * left] for left in (1.0, 0.75, 0.5, 0.25) for _ in range(4)])


def test_weights_that_are_not_used_do_not_decay():
    """Weight decay pulls the policy away from the reference for no reward: positions that are never reached keep their embedding to the last bit."""
    policy = tiny_gpt(0)
    before = policy.wpe.weight.detach().clone()
    reward_model = tiny_reward_model()
    _, critic, _ = train(policy, reward_model=reward_model, iterations=3)
    longest = max(map(len, PROMPTS)) + 5
    assert torch.equal(policy.wpe.weight[longest:], before[longest:])
    assert torch.equal(critic.trunk.wpe.weight[longest:], reward_model.trunk.wpe.weight[longest:])
    assert not torch.equal(policy.wpe.weight[0], before[0])


def test_loop_equals_a_slow_replay(monkeypatch):
    """Rows of one tensor paired with another's (P44), a temperature, beta or clip not passed on, whitening by minibatch, gradients not cleared
    or clipped, targets of the wrong rollout, a metric of the wrong thing. Rollouts and the order of rows are recorded; the rest is done again."""
    settings = dict(iterations=3, batch_size=9, minibatch_size=4, epochs=2, beta=0.3, lr=0.03, critic_lr=0.02, gamma=0.97, lam=0.8, clip=0.1,
                    value_clip=0.02, temperature=0.8, max_new_tokens=5, seed=3)
    rollouts, orders = [], []

    def recorded_generate(*args):
        rollouts.append((args[1], generate(*args)))
        return rollouts[-1][1]

    def recorded_minibatches(n, size, generator):
        assert (n, size) == (9, 4)
        order = torch.randperm(n, generator=generator)
        orders.append([order[:4], order[4:8], order[8:]])
        return orders[-1]

    monkeypatch.setattr(ppo, "generate", recorded_generate)
    monkeypatch.setattr(ppo, "minibatches", recorded_minibatches)
    reward_model = tiny_reward_model()
    reward_model.mean.fill_(0.3), reward_model.std.fill_(2.0)
    policy, critic, rows = train(reward_model=reward_model, judge=lambda prompts, rollout: 2.0 * rollout.response_lens, **settings)
    assert len(rollouts) == 3 and len(orders) == 6

    slow_policy, reference, slow_critic = tiny_gpt(0), tiny_gpt(0), copy.deepcopy(reward_model)
    groups = [(slow_policy, 0.03), (slow_critic, 0.02)]
    adams = [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0) for model, lr in groups]
    clipped_somewhere = 0
    for iteration, (picked, rollout) in enumerate(rollouts):
        mask, lengths = rollout.mask, rollout.response_lens.tolist()
        assert all(prompt in PROMPTS for prompt in picked) and [row[0] for row in rows_of(rollout)] == picked
        with torch.no_grad():
            old = response_logprobs(slow_policy, rollout, 0.8)
            close(old, rollout.logp, 1e-4)  # the rollout came from the policy as it was then
            ref = response_logprobs(reference, rollout, 0.8)
            scores, old_values = reward_model(rollout).double(), slow_critic.values(rollout).double()
        rewards = slow_rewards(scores, old, ref, lengths, 0.3)
        advantages = slow_gae(rewards, old_values, lengths, 0.97, 0.8)
        returns = torch.where(mask, advantages + old_values, 0.0)
        inside = advantages[mask]
        white = (advantages - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()
        measured = []
        for order in orders[2 * iteration:2 * iteration + 2]:
            for batch in order:
                part, m = rollout.select(batch), mask[batch]
                logp, values = response_logprobs(slow_policy, part, 0.8), slow_critic.values(part)
                pg, vf = slow_policy_loss(logp, old[batch], white[batch], m, 0.1), slow_value_loss(values, old_values[batch], returns[batch], m, 0.02)
                for (model, lr), adam, loss in zip(groups, adams, (pg, vf)):
                    adam.param_groups[0]["lr"] = lr * (3 - iteration) / 3
                    adam.zero_grad()
                    loss.backward()
                    norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
                    for p in model.parameters():
                        p.grad /= max(1.0, norm)
                    clipped_somewhere += norm > 1
                for adam in adams:
                    adam.step()
                x = (logp - old[batch])[m].detach()
                measured.append([pg.item(), vf.item(), ((x.exp() - 1).abs() > 0.1).double().mean().item(), (x.exp() - 1 - x).mean().item()])
        row, means = rows[iteration], torch.tensor(measured).mean(0).tolist()
        kl = (old - ref).sum(1).mean().item()
        target = returns[mask]
        expected = dict(
            step=iteration, score=scores.mean().item(), kl=kl, objective=scores.mean().item() - 0.3 * kl, length=sum(lengths) / 9,
            finished=sum(r[-1] == VOCAB - 2 for r in rollout.response_ids()) / 9, gold=2 * sum(lengths) / 9,
            policy_loss=means[0], value_loss=means[1], clip_fraction=means[2], approx_kl=means[3],
            entropy=-old[mask].mean().item(),
            explained_variance=1 - ((target - old_values[mask]).var(correction=0) / target.var(correction=0)).item())
        if iteration == 0:
            assert row["kl_at_start"] == 0
        assert set(row) == set(expected) | {"ratio_error", "seconds"} | ({"kl_at_start"} if iteration == 0 else set())
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (iteration, name)
        assert row["ratio_error"] < 1e-5 and row["seconds"] > 0
    assert clipped_somewhere and rows[-1]["clip_fraction"] > 0 and rows[-1]["kl"] != 0
    for fast, slow in ((policy, slow_policy), (critic, slow_critic)):
        for name, w in fast.state_dict().items():
            close(w, slow.state_dict()[name], 1e-4)
    # the mistakes looked for move the weights by about the learning rate
    assert max((a - b).abs().max().item() for a, b in zip(policy.parameters(), slow_policy.parameters())) < 1e-4


def test_rollouts_are_sized_and_seeded(monkeypatch):
    """A batch size, cap or temperature that is not the one asked for; a sampler that starts again in every iteration; a seed that is not used."""
    def sampled(seed):
        seen = []

        def spy(policy, prompts, max_new_tokens, temperature, generator):
            seen.append(generate(policy, prompts, max_new_tokens, temperature, generator))
            assert (len(prompts), max_new_tokens, temperature) == (16, 4, 0.9)
            return seen[-1]

        monkeypatch.setattr(ppo, "generate", spy)
        train(batch_size=16, max_new_tokens=4, temperature=0.9, seed=seed, lr=0.0, critic_lr=0.0)
        return [rows_of(rollout) for rollout in seen]

    one, again, other = sampled(0), sampled(0), sampled(1)
    assert one == again and one != other and one[0] != one[1]
    assert [[p for p, _ in rollout] for rollout in one] != [[p for p, _ in rollout] for rollout in other]  # other prompts, too
    assert {tuple(p) for p, _ in one[0] + one[1]} == {tuple(p) for p in PROMPTS}  # every prompt can be drawn


def test_judge_is_logged_and_never_trained_on():
    """Gold reward that leaks into training: the weights are the same with a judge and without; and the judge is asked about its own rows."""
    seen = []

    def judge(prompts, rollout):
        seen.append(([row[0] for row in rows_of(rollout)], prompts))
        return rollout.response_lens.double() * 100

    (plain, _, without), (judged, _, rows), (_, _, others) = train(), train(judge=judge), train(judge=lambda p, r: -r.response_lens.double())
    assert unchanged(plain, weights(judged)) and len(seen) == len(rows) == 2
    assert all(prompts == of_rollout for of_rollout, prompts in seen)
    for a, b, c in zip(without, rows, others):
        assert "gold" not in a and b["gold"] == pytest.approx(100 * b["length"]) and c["gold"] == pytest.approx(-c["length"])
        assert all(a[key] == b[key] == c[key] for key in a if key != "seconds")


class Pays(nn.Module):
    """A reward model that pays for the share of one token in the response, and a critic that is one number."""

    def __init__(self, token):
        super().__init__()
        self.token = token
        self.v = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        hits = (batch.responses == self.token) & batch.mask
        return hits.sum(1).float() / batch.response_lens

    def values(self, batch):
        return torch.where(batch.mask, self.v, 0.0)


def test_score_rises_and_beta_holds_the_policy_back():
    """A loop that runs and logs and does not learn, or learns to avoid the reward; a KL penalty that has no effect or the wrong sign."""
    settings = dict(iterations=20, batch_size=48, minibatch_size=24, epochs=2, lr=0.02, critic_lr=0.05, max_new_tokens=4)
    _, _, free = train(tiny_gpt(0, torch.float32), reward_model=Pays(3), beta=0.0, **settings)
    _, _, held = train(tiny_gpt(0, torch.float32), reward_model=Pays(3), beta=1.0, **settings)
    assert free[0]["score"] < 0.3 and free[-1]["score"] > 0.8
    assert free[-1]["kl"] > 1 and -0.2 < held[-1]["kl"] < 0.5 * free[-1]["kl"]


# ---------------------------------------------------------------------------------------------------------------------
# the canaries, each with its bug planted

def test_canary_sings_for_no_healthy_run():
    """Canaries that cry wolf: float32 weights, prompts of all lengths, several minibatches, a temperature."""
    train(tiny_gpt(0, torch.float32), reward_model=tiny_reward_model().float(), minibatch_size=3, temperature=0.6)


def test_canary_for_another_reference():
    """A reference with other weights, such as a checkpoint of another run."""
    with pytest.raises(CanaryError, match="before the first update, not 0: the reference is not the network"):
        train(tiny_gpt(0), reference=tiny_gpt(1))


def test_canary_for_a_reference_that_differs_in_long_texts_only():
    """A KL that is looked at in one response, or only on average: another embedding of position 7 is seen by the long texts alone."""
    policy = tiny_gpt(0)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.wpe.weight[7] += 1e-3
    with pytest.raises(CanaryError, match="the reference is not the network"):
        train(policy, reference, batch_size=32)


def test_canary_for_a_scorer_at_another_temperature(monkeypatch):
    """P15: the sampler divides the logits by the temperature, the scorer forgets to."""
    monkeypatch.setattr(ppo, "response_logprobs", lambda model, batch, temperature=1.0: response_logprobs(model, batch))
    with pytest.raises(CanaryError, match="the sampler and the scorer disagree"):
        train(temperature=0.7)


def test_canary_for_log_probs_off_by_one(monkeypatch):
    """P1: log-probs of the next token in place of this one's."""
    monkeypatch.setattr(ppo, "response_logprobs", lambda model, batch, temperature=1.0: torch.where(
        batch.mask, response_logprobs(model, batch, temperature).roll(1, dims=1), 0.0))
    with pytest.raises(CanaryError, match="the sampler and the scorer disagree"):
        train()


def test_canary_for_a_scorer_that_reads_pads(monkeypatch):
    """P5, P6: a scorer whose result depends on what stands in the padding."""
    def reads_pads(model, batch, temperature=1.0):
        logp = response_logprobs(model, batch, temperature)
        return torch.where(batch.mask, logp + 1e-6 * (batch.ids != PAD).sum(1, keepdim=True), 0.0)

    monkeypatch.setattr(ppo, "response_logprobs", reads_pads)
    with pytest.raises(CanaryError, match="what stands in the padding"):
        train()


def test_canary_for_a_dropped_mask_in_the_policy_loss(monkeypatch):
    """P9: the mean over all cells instead of over the real tokens."""
    original = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda logp, old, a, mask, clip: original(logp, old, a, torch.ones_like(mask), clip))
    with pytest.raises(CanaryError, match="a mask was dropped"):
        train()


def test_canary_for_a_dropped_mask_in_the_value_loss(monkeypatch):
    """P9 for the critic."""
    original = ppo.value_loss
    monkeypatch.setattr(ppo, "value_loss", lambda v, old, returns, mask, clip: original(v, old, returns, torch.ones_like(mask), clip))
    with pytest.raises(CanaryError, match="a mask was dropped"):
        train()


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_canary_for_a_term_without_a_mask(monkeypatch, name):
    """A bonus added to a loss as a plain .mean(): its gradient stands at pads."""
    original = getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda x, *rest: original(x, *rest) + 1e-3 * x.mean())
    with pytest.raises(CanaryError, match="a mask was dropped"):
        train()


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, name, value):
    """A diverged run that goes on for hours with NaN weights."""
    original = getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *inputs: original(*inputs) * value)
    with pytest.raises(CanaryError, match="PPO loss is (nan|-?inf).*the training diverged; lower --ppo-lr"):
        train()


def test_nan_is_seen_before_it_reaches_the_weights(monkeypatch):
    """A canary that sings after the optimiser's step: the weights are then already lost."""
    original, policy = ppo.policy_loss, tiny_gpt(0)
    before = weights(policy)
    monkeypatch.setattr(ppo, "policy_loss", lambda *inputs: original(*inputs) * NAN)
    with pytest.raises(CanaryError):
        train(policy)
    assert unchanged(policy, before)
