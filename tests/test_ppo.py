"""
Tests of ppo.py: the maths against double loops and numbers worked out by hand, the loop against a slow replay.

A docstring names the bugs that its test catches. P1, P2, ... are the pitfalls that tests/mutants.py plants.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from helpers import (
    PAD,
    VOCAB,
    close,
    double,
    few,
    make_batch,
    naive_hidden,
    naive_logits,
    naive_response_logprobs,
    noise,
    random_batch,
    rows_of,
    tiny_gpt,
    unchanged,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st

import ppo
from checks import CanaryError
from model import Rollout, generate, response_logprobs
from reward import RewardModel

NAN, INF = math.nan, math.inf


def ragged(lengths, R):
    """A mask (B, R) whose rows begin with the given numbers of True cells."""
    return torch.tensor([[t < n for t in range(R)] for n in lengths])


def poisoned(x, mask, value):
    """x with `value` in the cells outside the mask."""
    return torch.where(mask, x, torch.full_like(x, value))


def wider(x, columns, value):
    """x (B, R) with more columns on its right, all of them `value`."""
    return torch.cat([x, torch.full((len(x), columns), value, dtype=x.dtype)], dim=1)


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


# ---- masked mean -----------------------------------------------------------------------------------------------------

def test_masked_mean_is_one_mean_over_all_real_cells():
    """Catches a mean of row means and a mean over all 6 cells. Rows of 1 and 3 tokens tell the three apart."""
    x = double([[6.0, NAN, INF], [1.0, 2.0, 3.0]])
    close(ppo.masked_mean(x, ragged([1, 3], 3)), (6 + 1 + 2 + 3) / 4)


def test_masked_mean_of_nothing_is_zero():
    """Catches 0 / 0: a minibatch without real tokens has a mean of 0, not of NaN."""
    assert ppo.masked_mean(torch.full((2, 3), NAN), ragged([0, 0], 3)).item() == 0


# ---- KL estimates ----------------------------------------------------------------------------------------------------

def two_categoricals(K=6):
    return torch.log_softmax(noise(0, K), 0), torch.log_softmax(noise(1, K), 0)


def test_k1_and_k3_have_the_exact_kl_as_expectation():
    """Catches the KL in the other direction: on samples of the policy, E[k1] = E[k3] = KL(policy || reference)."""
    logp, ref = two_categoricals()
    p, q = logp.exp(), ref.exp()
    exact = sum(p[a] * math.log(p[a] / q[a]) for a in range(len(p)))
    estimates = ppo.kl_estimates(logp, ref)
    close((p * estimates["k1"]).sum(), exact)
    close((p * estimates["k3"]).sum(), exact)


def test_swapped_estimates_are_seen_to_be_wrong():
    """Shows that the test above has power: with the two arguments exchanged, both expectations are different."""
    logp, ref = two_categoricals()
    p = logp.exp()
    exact = (p * (logp - ref)).sum()
    swapped = ppo.kl_estimates(ref, logp)
    close((p * swapped["k1"]).sum(), -exact)
    close((p * swapped["k3"]).sum(), (p * (p / ref.exp())).sum() - 1 - exact)
    assert (p * swapped["k3"]).sum() > exact + 0.01


def test_kl_estimates_by_formula():
    """Catches a wrong factor in k2, a missing term in k3, and results of another shape."""
    logp, ref = noise(2, 4, 3), noise(3, 4, 3)
    estimates = ppo.kl_estimates(logp, ref)
    assert set(estimates) == {"k1", "k2", "k3"}
    assert all(estimate.shape == (4, 3) for estimate in estimates.values())
    for i in range(4):
        for t in range(3):
            x = (logp[i, t] - ref[i, t]).item()
            close(estimates["k1"][i, t], x)
            close(estimates["k2"][i, t], 0.5 * x * x)
            close(estimates["k3"][i, t], math.exp(-x) - 1 + x)


def test_kl_estimates_are_zero_for_equal_policies():
    """Catches a KL that is not exactly 0 before training. It would be noise in the first KL penalty."""
    logp = noise(0, 3, 3)
    assert all((value == 0).all() for value in ppo.kl_estimates(logp, logp).values())


def test_k3_is_never_negative_and_keeps_its_digits_in_float32():
    """Catches exp(x) - 1 + x. Near x = 0 it rounds to 0 or to a negative number in float32; expm1 does not."""
    x = torch.cat([10 ** torch.linspace(-12, 1, 2000), -10 ** torch.linspace(-12, 1, 2000)]).float()
    k3 = ppo.kl_estimates(x, torch.zeros_like(x))["k3"]
    assert (k3 >= 0).all()
    # real log-probs were rounded before they are subtracted
    shifted = ppo.kl_estimates(x - 3, torch.full_like(x, -3.0))["k3"]
    assert (shifted >= 0).all()
    large = x.abs() > 1e-3
    exact = torch.special.expm1(-x[large].double()) + x[large].double()
    torch.testing.assert_close(k3[large].double(), exact, rtol=1e-3, atol=0)


def test_gradients_of_the_kl_estimates():
    """
    Catches the belief that each estimate is a good loss (P21).

    On samples of the policy, k1 has the gradient 0, k2 that of KL(pi || ref), k3 that of KL(ref || pi).
    """
    theta = noise(4, 5).requires_grad_()
    ref = torch.log_softmax(noise(5, 5), 0)
    p = torch.log_softmax(theta, 0).exp().detach()

    def gradient(loss):
        return torch.autograd.grad(loss(torch.log_softmax(theta, 0)), theta)[0]

    def gradient_of(name):
        return gradient(lambda logp: (p * ppo.kl_estimates(logp, ref)[name]).sum())

    close(gradient_of("k1"), torch.zeros(5))
    close(gradient_of("k2"), gradient(lambda logp: (logp.exp() * (logp - ref)).sum()))
    close(gradient_of("k3"), p - ref.exp())


# ---- the exact KL ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def slow_kl(policy, reference, batch, temperature=1.0):
    """The KL of each response, one token and one word at a time."""
    out = []
    for prompt, response in rows_of(batch):
        total = 0.0
        for t in range(len(response)):
            p = torch.softmax(naive_logits(policy, prompt + response[:t])[-1] / temperature, 0).tolist()
            q = torch.softmax(naive_logits(reference, prompt + response[:t])[-1] / temperature, 0).tolist()
            total += sum(a * math.log(a / b) for a, b in zip(p, q))
        out.append(total)
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_exact_kl_equals_brute_force(temperature):
    """
    Catches the other direction, KL(reference || policy), the KL of the prompt (P4) or of pads, a missing temperature,
    and a mean over tokens.
    """
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    for batch in (random_batch(0, B=4, min_response=0), random_batch(1, B=3, P=8, R=9)):
        kl = ppo.exact_kl(policy, reference, batch, temperature)
        close(kl, slow_kl(policy, reference, batch, temperature))
        assert kl.shape == (len(batch),)
        assert not kl.requires_grad
        assert kl.max() > 0.1


def test_exact_kl_defaults_to_temperature_1():
    """Catches a default that differs from the sampler's."""
    batch = random_batch(0)
    close(ppo.exact_kl(tiny_gpt(0), tiny_gpt(1), batch), ppo.exact_kl(tiny_gpt(0), tiny_gpt(1), batch, 1.0))


def test_exact_kl_of_a_policy_with_itself_is_exactly_0():
    """Catches rounding noise in PPO's first canary. The policy is trained and the reference is frozen, as in a run."""
    policy = tiny_gpt(0, torch.float32)
    reference = tiny_gpt(0, torch.float32).requires_grad_(False)
    assert (ppo.exact_kl(policy, reference, random_batch(0)) == 0).all()


def test_mean_of_exact_kl_is_the_kl_of_whole_responses():
    """
    Catches a KL per token, or of one step only.

    All responses of up to two tokens are enumerated: E[exact_kl] is the sum of p(y) log p(y)/q(y).
    """
    policy, reference = tiny_gpt(0, vocab=3), tiny_gpt(1, vocab=3)
    prompt, end = [0, 2], 1
    responses = [[end]] + [[a, b] for a in (0, 2) for b in range(3)]
    batch = make_batch([prompt] * len(responses), responses, pad=2)
    with torch.no_grad():
        p = torch.stack([naive_response_logprobs(policy, prompt, response).sum() for response in responses])
        q = torch.stack([naive_response_logprobs(reference, prompt, response).sum() for response in responses])
    close(p.exp().sum(), 1)
    close((p.exp() * ppo.exact_kl(policy, reference, batch)).sum(), (p.exp() * (p - q)).sum())


def test_exact_kl_agrees_with_samples():
    """Catches a sampler of another distribution: log p/q of 2000 samples and exact_kl have the same mean."""
    policy, reference = tiny_gpt(0, std=0.2), tiny_gpt(1, std=0.2)
    rollout = generate(policy, [[1, 2, 3]] * 2000, 4, 0.8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = (rollout.logp - response_logprobs(reference, rollout, 0.8)).sum(dim=1)
    exact = ppo.exact_kl(policy, reference, rollout, 0.8)
    error = (samples - exact).std() / math.sqrt(2000)
    assert abs((samples - exact).mean()) < 4 * error
    assert exact.mean() > 10 * error
    assert exact.std() < samples.std()


# ---- rewards ---------------------------------------------------------------------------------------------------------

def slow_rewards(scores, logp, ref, lengths, beta):
    out = torch.zeros_like(logp)
    for i, n in enumerate(lengths):
        for t in range(n):
            out[i, t] = -beta * (logp[i, t] - ref[i, t])
            if t == n - 1:
                out[i, t] += scores[i]
    return out


@pytest.mark.parametrize("trash", [0.0, 7.0, NAN, INF, -INF])
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_token_rewards_equal_a_double_loop(beta, trash):
    """Catches a score one token early or late, a KL penalty of the wrong sign or with a gap, and a reward at a pad."""
    scores = noise(0, 5)
    logp = poisoned(noise(1, 5, 5), MASK, trash)
    ref = poisoned(noise(2, 5, 5), MASK, trash)
    rewards = ppo.token_rewards(scores, logp, ref, MASK, beta)
    close(rewards, slow_rewards(scores, logp, ref, LENGTHS, beta))
    assert (rewards[~MASK] == 0).all()


def test_token_rewards_sum_to_the_objective():
    """Catches a KL that is paid twice, or not at every token: a row sums to score - beta log pi/ref of the response."""
    scores, logp, ref = noise(0, 5), noise(1, 5, 5), noise(2, 5, 5)
    totals = ppo.token_rewards(scores, logp, ref, MASK, 0.7).sum(dim=1)
    for i, n in enumerate(LENGTHS):
        if n:
            close(totals[i], scores[i] - 0.7 * (logp[i, :n].sum() - ref[i, :n].sum()))


def test_score_is_paid_at_the_last_real_token():
    """Catches a score in the last column, after the response has ended, or in column -1 of a row without tokens."""
    zeros = torch.zeros(3, 4)
    rewards = ppo.token_rewards(torch.tensor([5.0, 6.0, 7.0]), zeros, zeros, ragged([2, 4, 0], 4), beta=1.0)
    assert rewards.tolist() == [[0, 5, 0, 0], [0, 0, 0, 6], [0, 0, 0, 0]]


def test_score_of_an_empty_response_is_paid_to_no_row():
    """Catches NaN, the score of a row without tokens, in another row or in this row's zeros."""
    zeros = torch.zeros(2, 2)
    rewards = ppo.token_rewards(torch.tensor([NAN, 6.0]), zeros, zeros, ragged([0, 1], 2), beta=1.0)
    assert rewards.tolist() == [[0, 0], [6, 0]]


# ---- generalised advantage estimation --------------------------------------------------------------------------------

def slow_deltas(rewards, values, i, n, gamma):
    """The n TD errors of row i. The value after the last token is 0."""
    deltas = []
    for t in range(n):
        next_value = values[i, t + 1] if t + 1 < n else 0
        deltas.append(rewards[i, t] + gamma * next_value - values[i, t])
    return deltas


def slow_gae(rewards, values, lengths, gamma, lam):
    """The definition of the advantage: the sum over l of (gamma lam)^l delta_{t+l}."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, n in enumerate(lengths):
        deltas = slow_deltas(rewards, values, i, n, gamma)
        for t in range(n):
            advantages[i, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0, 1.0])
def test_gae_equals_its_definition(gamma, lam):
    """Catches a missing gamma or lambda, a bootstrap from the value of a pad, and returns that are not A + V."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    expected = slow_gae(rewards, values, LENGTHS, gamma, lam)
    close(advantages, expected)
    close(returns, torch.where(MASK, expected + values, torch.zeros_like(values)))


def test_gae_defaults_are_gamma_1_and_lambda_095():
    """Catches a changed default, which is a changed algorithm."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    close(ppo.gae(rewards, values, MASK)[0], slow_gae(rewards, values, LENGTHS, 1.0, 0.95))


def test_gae_by_hand():
    """Catches a score one token late. V = (.1, .2, .3), a score of 1 at the end: the deltas are .1, .1 and .7."""
    advantages, returns = ppo.gae(double([[0, 0, 1]]), double([[0.1, 0.2, 0.3]]), ragged([3], 3), 1.0, 0.95)
    a2 = 1 - 0.3
    a1 = (0.3 - 0.2) + 0.95 * a2
    a0 = (0.2 - 0.1) + 0.95 * a1
    close(advantages, [[a0, a1, a2]])
    close(returns, [[a0 + 0.1, a1 + 0.2, 1.0]])


def test_gae_lambda_1_is_reward_to_go_and_lambda_0_is_the_td_error():
    """Catches the two ends of lambda exchanged, and returns at lambda 1 that are not the reward to go."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    advantages_1, returns = ppo.gae(rewards, values, MASK, 1.0, 1.0)
    advantages_0, _ = ppo.gae(rewards, values, MASK, 1.0, 0.0)
    for i, n in enumerate(LENGTHS):
        deltas = slow_deltas(rewards, values, i, n, 1.0)
        for t in range(n):
            to_go = rewards[i, t:n].sum()
            close(returns[i, t], to_go)
            close(advantages_1[i, t], to_go - values[i, t])
            close(advantages_0[i, t], deltas[t])


def test_gae_does_not_bootstrap_at_the_end_of_a_response():
    """Catches a bootstrap from the next column: the advantage of the last token, E or the cap, is r - V."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    advantages, _ = ppo.gae(rewards, values, MASK, 0.9, 0.8)
    for i, n in enumerate(LENGTHS):
        if n:
            close(advantages[i, n - 1], rewards[i, n - 1] - values[i, n - 1])


@pytest.mark.parametrize("trash", [NAN, INF, -INF, 1e9])
def test_gae_never_reads_a_pad(trash):
    """Catches pads in the recursion: their content and their number must not change the result by a bit."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    clean = ppo.gae(torch.where(MASK, rewards, 0.0), torch.where(MASK, values, 0.0), MASK, 0.9, 0.8)
    dirty = ppo.gae(poisoned(rewards, MASK, trash), poisoned(values, MASK, trash), MASK, 0.9, 0.8)
    wide = ppo.gae(wider(rewards, 3, trash), wider(values, 3, trash), ragged(LENGTHS, 8), 0.9, 0.8)
    for a, b, c in zip(clean, dirty, wide):
        assert torch.equal(a, b)
        assert torch.equal(a, c[:, :5])
        assert (a[~MASK] == 0).all()
        assert (c[:, 5:] == 0).all()


def test_gae_leaves_its_inputs_alone():
    """Catches a recursion that is written into the rewards or the values, which the loop still needs."""
    rewards, values = noise(0, 5, 5), noise(1, 5, 5)
    rewards_before, values_before = rewards.clone(), values.clone()
    ppo.gae(rewards, values, MASK)
    assert torch.equal(rewards, rewards_before)
    assert torch.equal(values, values_before)


# ---- whitening -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trash", [0.0, 9.0, NAN, INF])
def test_whiten_by_hand(trash):
    """Catches pads in the statistics, and the sample variance: 1, 2, 3 have mean 2 and population variance 2/3."""
    mask = ragged([2, 1], 3)
    x = poisoned(double([[1.0, 2, 0], [3, 0, 0]]), mask, trash)
    a = math.sqrt(3 / 2)
    close(ppo.whiten(x, mask), [[-a, 0, 0], [a, 0, 0]], 1e-7)
    close(ppo.whiten(x, mask, shift_mean=False), [[2 - a, 2, 0], [2 + a, 0, 0]], 1e-7)


def test_whiten_makes_mean_0_and_variance_1_over_real_tokens():
    """Catches whitening row by row or over pads: the statistics are those of all real tokens together."""
    x = 5 + 3 * noise(0, 5, 5)
    inside = ppo.whiten(x, MASK)[MASK]
    close(inside.mean(), 0, 1e-7)
    close(inside.var(correction=0), 1, 1e-7)
    unshifted = ppo.whiten(x, MASK, shift_mean=False)[MASK]
    close(unshifted.mean(), x[MASK].mean(), 1e-7)
    close(unshifted.var(correction=0), 1, 1e-7)
    close(inside, (x[MASK] - x[MASK].mean()) / x[MASK].std(correction=0), 1e-7)


def test_whiten_constants_and_single_tokens():
    """Catches 0 / 0: a constant, a single token or no token gives zeros, not NaN. Unshifted, x stays what it is."""
    for lengths in ([2, 3, 0], [1, 0, 0]):
        mask = ragged(lengths, 3)
        x = poisoned(torch.full((3, 3), 0.7, dtype=torch.float64), mask, NAN)
        close(ppo.whiten(x, mask), torch.zeros(3, 3))
        close(ppo.whiten(x, mask, shift_mean=False), 0.7 * mask.double())
    assert (ppo.whiten(torch.full((2, 2), NAN), ragged([0, 0], 2)) == 0).all()


def test_whiten_ignores_extra_columns():
    """Catches a scale that depends on how wide the batch is padded."""
    x = noise(0, 5, 5)
    wide = ppo.whiten(wider(x, 4, 1e9), ragged(LENGTHS, 9))
    close(wide[:, :5], ppo.whiten(x, MASK))
    assert (wide[:, 5:] == 0).all()


# ---- the losses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, ratio, surrogate, moves", [
    (2.0, 0.5, 2.0 * 0.5, True),
    (2.0, 1.0, 2.0 * 1.0, True),
    (2.0, 1.5, 2.0 * 1.2, False),    # rewarded and already past the clip: no gradient
    (-2.0, 0.5, -2.0 * 0.8, False),  # punished and already past the clip: no gradient
    (-2.0, 1.0, -2.0 * 1.0, True),
    (-2.0, 1.5, -2.0 * 1.5, True),
])
def test_policy_loss_six_cases(advantage, ratio, surrogate, moves):
    """
    Catches min for max, a lost sign, a clip on the wrong side.

    Value and gradient for both signs of A, with a ratio below, inside and above the clip range.
    """
    old = double([[-1.3]])
    logp = (old + math.log(ratio)).requires_grad_()
    loss = ppo.policy_loss(logp, old, double([[advantage]]), ragged([1], 1))
    loss.backward()
    close(loss.item(), -surrogate)
    if moves:
        close(logp.grad, [[-advantage * ratio]])  # d(-A exp(x)) / dx
    else:
        assert logp.grad.item() == 0


def test_policy_loss_clip_is_used_on_both_sides():
    """Catches a clip range that is always .2, or that has one side only."""
    old = torch.zeros(1, 1, dtype=torch.float64)
    for clip in (0.05, 0.3, 0.5):
        for advantage, ratio, bound in ((1.0, 3.0, 1 + clip), (-1.0, 0.1, 1 - clip)):
            loss = ppo.policy_loss(old + math.log(ratio), old, double([[advantage]]), ragged([1], 1), clip)
            close(loss, -advantage * bound)


def test_policy_loss_at_ratio_1_is_minus_the_mean_advantage():
    """
    Catches half a gradient, or none, where the two sides of the max are equal.

    At ratio 1 the gradient is that of the policy gradient, -A / n, even with clip 0.
    """
    old, advantages = noise(0, 5, 5), noise(1, 5, 5)
    for clip in (0.2, 0.0):
        logp = old.clone().requires_grad_()
        loss = ppo.policy_loss(logp, old, advantages, MASK, clip)
        loss.backward()
        close(loss.item(), -advantages[MASK].mean())
        close(logp.grad, torch.where(MASK, -advantages / MASK.sum(), 0.0))


def slow_policy_loss(logp, old, advantages, mask, clip=0.2):
    terms = [0 * logp.sum()]  # so that a minibatch in which every token is clipped has a gradient, of 0
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(logp[i, t] - old[i, t])
        clipped = min(max(ratio.item(), 1 - clip), 1 + clip)
        unclipped_term = -advantages[i, t] * ratio
        clipped_term = -advantages[i, t] * clipped
        terms.append(unclipped_term if unclipped_term >= clipped_term else clipped_term.detach())
    return sum(terms) / mask.sum()


def slow_value_loss(values, old, returns, mask, clip=0.2):
    terms = [0 * values.sum()]
    for i, t in mask.nonzero().tolist():
        clipped = min(max(values[i, t].item(), old[i, t].item() - clip), old[i, t].item() + clip)
        unclipped_term = (values[i, t] - returns[i, t]) ** 2
        clipped_term = (clipped - returns[i, t]) ** 2
        terms.append(unclipped_term if unclipped_term >= clipped_term else clipped_term.detach())
    return 0.5 * sum(terms) / mask.sum()


SLOW = {ppo.policy_loss: slow_policy_loss, ppo.value_loss: slow_value_loss}


@pytest.mark.parametrize("function", list(SLOW))
def test_losses_equal_a_double_loop_with_the_gradient_of_finite_differences(function):
    """Catches any wrong term, in the value or only in the gradient."""
    x, old, target = 0.4 * noise(0, 5, 5), 0.4 * noise(1, 5, 5), noise(2, 5, 5)
    for clip in (0.1, 0.2, 0.6):
        x = x.detach().requires_grad_()
        loss = function(x, old, target, MASK, clip)
        close(loss.item(), SLOW[function](x, old, target, MASK, clip).item())
        (gradient,) = torch.autograd.grad(loss, x)
        close(gradient, slope(lambda y, clip=clip: function(y, old, target, MASK, clip), x.detach()), 1e-7)
        assert (gradient[~MASK] == 0).all()
        assert 0 < (gradient != 0).sum() < MASK.sum()  # some tokens are clipped, some are not
    close(function(x, old, target, MASK).item(), SLOW[function](x, old, target, MASK, 0.2).item())  # the default clip


def test_policy_loss_takes_the_mean_over_tokens():
    """Catches a mean of row means: A = (4) and (0, 0, 4) have the mean 2 over tokens and 8/3 over rows."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    close(ppo.policy_loss(zeros, zeros, double([[4.0, 9, 9], [0, 0, 4]]), ragged([1, 3], 3)), -2.0)


def test_value_loss_takes_the_mean_over_tokens():
    """Catches the same in the critic's loss: errors of (2) and (0, 0, 2) cost half of 8/4."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    close(ppo.value_loss(zeros, zeros, double([[2.0, 9, 9], [0, 0, 2]]), ragged([1, 3], 3)), 1.0)


def test_negative_clip_is_refused():
    """Catches a clip below 0, which would exchange the two bounds of the clamp without any error."""
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip must be at least 0"):
        ppo.policy_loss(x, x, x, ragged([1], 1), clip=-0.1)


@pytest.mark.parametrize("value, target, loss, gradient", [
    (0.1, 1.0, 0.5 * 0.9 ** 2, -0.9),   # within the clip: the plain squared error
    (0.5, 1.0, 0.5 * 0.8 ** 2, 0.0),    # past the clip, towards the target: held at 0.2
    (-0.5, 1.0, 0.5 * 1.5 ** 2, -1.5),  # past the clip, away from the target: the larger error counts
    (0.5, 0.3, 0.5 * 0.2 ** 2, 0.2),    # past the clip and past the target
    (-0.1, -1.0, 0.5 * 0.9 ** 2, 0.9),
    (-0.5, -1.0, 0.5 * 0.8 ** 2, 0.0),
    (0.5, -1.0, 0.5 * 1.5 ** 2, 1.5),
    (-0.5, -0.3, 0.5 * 0.2 ** 2, -0.2),
])
def test_value_loss_table(value, target, loss, gradient):
    """Catches min for max, a missing 0.5, and a clip around 0 instead of around the old value, which is 3 here."""
    v = double([[3 + value]]).requires_grad_()
    result = ppo.value_loss(v, double([[3.0]]), double([[3 + target]]), ragged([1], 1))
    result.backward()
    close(result.item(), loss)
    close(v.grad.item(), gradient)


def test_value_loss_clip_is_used_on_both_sides():
    """Catches a value clip that is always .2, or that has one side only. Far targets hold the value at old +- clip."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for clip in (0.05, 0.5):
        for sign in (1, -1):
            loss = ppo.value_loss(zero + sign * 2, zero, zero + sign * 10, ragged([1], 1), clip)
            close(loss, 0.5 * (10 - clip) ** 2)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("trash", [NAN, INF, -INF, 1e9])
@pytest.mark.parametrize("function", list(SLOW))
def test_pads_never_reach_a_loss_or_its_gradient(function, trash, which):
    """
    Catches a dropped mask, and 0 * NaN (P9).

    Whatever stands at the pads of an input, the loss and its gradient stay the same to the bit, and are 0 at pads.
    """
    inputs = [0.4 * noise(seed, 5, 5) for seed in range(3)]

    def loss_and_gradient(value):
        x = list(inputs)
        x[which] = poisoned(inputs[which], MASK, value)
        x[0] = x[0].clone().requires_grad_()
        loss = function(*x, MASK)
        return loss.detach(), torch.autograd.grad(loss, x[0])[0]

    clean, clean_gradient = loss_and_gradient(0.0)
    dirty, dirty_gradient = loss_and_gradient(trash)
    assert torch.isfinite(dirty)
    assert torch.equal(clean, dirty)
    assert torch.equal(clean_gradient, dirty_gradient)
    assert (dirty_gradient[~MASK] == 0).all()


# ---- properties, over shapes, lengths and extreme log-probs ----------------------------------------------------------

@st.composite
def ragged_batches(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    R = max([*lengths, 1]) + draw(st.integers(0, 2))
    scale = draw(st.sampled_from([1e-6, 1.0, 100.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    logp = -scale * torch.rand(len(lengths), R, generator=generator, dtype=torch.float64)
    ref = -scale * torch.rand(len(lengths), R, generator=generator, dtype=torch.float64)
    return lengths, R, logp, ref, draw(st.sampled_from([0.0, NAN, INF, 1e9]))


@few
@given(ragged_batches())
def test_rewards_advantages_and_whitening_are_finite_and_ignore_pads(case):
    """Catches a combination of lengths, width and extreme log-probs that gives NaN, or in which a pad has an effect."""
    lengths, R, logp, ref, trash = case
    mask, scores = ragged(lengths, R), noise(0, len(lengths))

    def chain(logp, ref, mask):
        rewards = ppo.token_rewards(scores, logp, ref, mask, 0.1)
        advantages, returns = ppo.gae(rewards, logp, mask, 0.99, 0.9)
        whitened = ppo.whiten(advantages, mask)
        return rewards, advantages, returns, whitened, ppo.whiten(rewards, mask, shift_mean=False)

    clean = chain(logp, ref, mask)
    dirty_logp = wider(poisoned(logp, mask, trash), 2, trash)
    dirty_ref = wider(poisoned(ref, mask, trash), 2, trash)
    wide = chain(dirty_logp, dirty_ref, ragged(lengths, R + 2))
    for a, b in zip(clean, wide):
        assert torch.isfinite(a).all()
        assert (a[~mask] == 0).all()
        assert (b[:, R:] == 0).all()
        close(a, b[:, :R])
    close(clean[0], slow_rewards(scores, logp, ref, lengths, 0.1))
    close(clean[1], slow_gae(clean[0], logp, lengths, 0.99, 0.9))


@few
@given(ragged_batches())
def test_losses_are_finite_and_ignore_pads(case):
    """Catches NaN from log-probs down to -1e4, from rows without tokens, and from batches of pads only."""
    lengths, R, logp, _, trash = case
    mask = ragged(lengths, R)
    old, advantages = -noise(1, len(lengths), R).abs(), noise(2, len(lengths), R)
    for function, slow in SLOW.items():
        x = logp.clone().requires_grad_()
        loss = function(x, old, advantages, mask)
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert (gradient[~mask] == 0).all()
        dirty = [poisoned(tensor, mask, trash) for tensor in (logp, old, advantages)]
        close(function(*dirty, mask), loss.item())
        if mask.any():
            close(loss.item(), slow(logp, old, advantages, mask).item())
        else:
            assert loss.item() == 0


# ---- the loop --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]
SETTINGS = dict(ppo_iterations=2, ppo_batch=8, minibatch=8, ppo_epochs=2, ppo_lr=1e-2, critic_lr=1e-2, beta=0.2,
                gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, temperature=1.0, response_tokens=5)


def tiny_reward_model(seed=7):
    torch.manual_seed(seed)
    model = RewardModel(tiny_gpt(seed)).double()
    nn.init.constant_(model.score.bias, 0.1)  # not 0, so that a step of 1e-30 is none
    return model


def train(policy=None, reference=None, reward_model=None, critic=None, seed=0, gold_fn=None, **changes):
    """Run train_ppo on tiny networks, with changes to SETTINGS. Returns policy, critic and the logged rows."""
    if policy is None:
        policy = tiny_gpt(0)
    if reference is None:
        reference = copy.deepcopy(policy)
    if reward_model is None:
        reward_model = tiny_reward_model()
    if critic is None:
        critic = copy.deepcopy(reward_model).requires_grad_(True)
    config = SimpleNamespace(**{**SETTINGS, **changes})
    rows = []
    ppo.train_ppo(policy, critic, reference, reward_model, PROMPTS, config, seed,
                  log=lambda **row: rows.append(row), gold_fn=gold_fn)
    return policy, critic, rows


def a_rollout(policy, temperature=1.0):
    """A rollout of 8 responses of mixed lengths. Some ended with E and some were cut."""
    for seed in range(20):
        rollout = generate(policy, (PROMPTS * 2)[:8], 6, temperature, torch.Generator().manual_seed(seed))
        lengths = set(rollout.response_lens.tolist())
        if rollout.finished.any() and not rollout.finished.all() and len(lengths) > 2:
            return rollout
    raise AssertionError("no such rollout")


def experience(rollout, policy, reference, reward_model, critic, **changes):
    """
    What the loop computes from a given rollout before the first update: a dict of tensors.

    The reference is another network than the policy here, so the canary that would stop the run is switched off.
    """
    seen = {}
    token_rewards, gae = ppo.token_rewards, ppo.gae

    def spy_token_rewards(scores, logp, ref_logp, mask, beta):
        seen.update(scores=scores, old_logp=logp, ref_logp=ref_logp)
        seen["rewards"] = token_rewards(scores, logp, ref_logp, mask, beta)
        return seen["rewards"]

    def spy_gae(rewards, values, mask, gamma, lam):
        assert rewards is seen["rewards"]
        seen["values"] = values
        seen["advantages"], seen["returns"] = gae(rewards, values, mask, gamma, lam)
        return seen["advantages"], seen["returns"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "generate", lambda *arguments: rollout)
        patch.setattr(ppo, "check_start_kl", lambda kl: 0.0)
        patch.setattr(ppo, "token_rewards", spy_token_rewards)
        patch.setattr(ppo, "gae", spy_gae)
        train(policy, reference, reward_model, critic, ppo_iterations=1, ppo_epochs=1, **changes)
    return seen


def test_experience_by_hand():
    """
    Catches scores of another model or token, log-probs at another temperature, critic and reward model exchanged,
    values one token late, a sign of the KL, and a graph that is kept where no gradient is wanted (P17).
    """
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    reward_model, critic = tiny_reward_model(2), tiny_reward_model(3)
    reward_model.mean.fill_(0.3)
    reward_model.std.fill_(2.0)
    rollout = a_rollout(policy, 0.7)
    found = experience(rollout, policy, reference, reward_model, copy.deepcopy(critic), beta=0.4, gamma=0.9, lam=0.8,
                       temperature=0.7)

    lengths = rollout.response_lens.tolist()
    scores = torch.zeros(len(lengths), dtype=torch.float64)
    ref_logp, values = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(rows_of(rollout)):
            n, p = len(response), len(prompt)
            scores[i] = (reward_model.score(naive_hidden(reward_model.trunk, prompt + response)[-1]) - 0.3) / 2.0
            ref_logp[i, :n] = naive_response_logprobs(reference, prompt, response, 0.7)
            states = naive_hidden(critic.trunk, prompt + response)[p - 1:p - 1 + n]
            values[i, :n] = critic.score(states).squeeze(-1)
    rewards = slow_rewards(scores, rollout.logp, ref_logp, lengths, 0.4)
    advantages = slow_gae(rewards, values, lengths, 0.9, 0.8)
    expected = dict(scores=scores, old_logp=rollout.logp, ref_logp=ref_logp, rewards=rewards, values=values,
                    advantages=advantages, returns=advantages + values)
    assert set(found) == set(expected)
    for name in expected:
        close(found[name], expected[name], 1e-5)  # scores and values are float32
        assert not found[name].requires_grad, name


def same_experience(rollout, other):
    """Whether the loop computes the same tensors, to the bit, from two rollouts of tiny_gpt(0)."""
    results = []
    for each in (rollout, other):
        results.append(experience(each, tiny_gpt(0), tiny_gpt(1), tiny_reward_model(2), tiny_reward_model(3)))
    a, b = results
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_cut_response_is_an_ended_response():
    """Catches a bootstrap at the cap. The horizon is part of the MDP: whether a row ended with E changes nothing."""
    rollout = a_rollout(tiny_gpt(0))
    other = Rollout(**{**vars(rollout), "finished": ~rollout.finished})
    assert same_experience(rollout, other)


def test_experience_ignores_what_stands_after_the_end():
    """Catches tokens after E that change scores, rewards or advantages (P7)."""
    rollout = a_rollout(tiny_gpt(0))
    after = torch.arange(rollout.ids.shape[1]) >= rollout.P + rollout.response_lens[:, None]
    other = Rollout(**{**vars(rollout), "ids": torch.where(after, 4, rollout.ids)})
    assert not torch.equal(other.ids, rollout.ids)
    assert same_experience(rollout, other)


def test_policy_as_its_own_reference_is_refused():
    """Catches the same object passed twice: the KL would stay 0 for ever."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        train(policy, policy)


def test_only_policy_and_critic_learn():
    """Catches a reference or a reward model that is trained too, and gradients that pile up on them (P45)."""
    policy, reward_model = tiny_gpt(0), tiny_reward_model()
    reference = copy.deepcopy(policy)
    policy_before, reward_model_before = weights(policy), weights(reward_model)
    _, critic, _ = train(policy, reference, reward_model)
    assert unchanged(reference, policy_before)
    assert unchanged(reward_model, reward_model_before)
    assert all(p.grad is None for model in (reference, reward_model) for p in model.parameters())
    assert not unchanged(policy, policy_before)
    for name, w in critic.named_parameters():
        assert not torch.equal(w, reward_model_before[name]), name


def test_critic_starts_where_the_caller_says():
    """Catches a critic that is ignored or replaced by a copy of the reward model (P45). It is trained in place."""
    given = tiny_reward_model(8)
    before = weights(given)
    _, _, rows = train(critic=given, critic_lr=1e-30)
    assert unchanged(given, before)
    _, _, others = train(critic=tiny_reward_model(9), critic_lr=1e-30)
    assert rows[0]["value_loss"] != others[0]["value_loss"]
    train(critic=given)
    assert not unchanged(given, before)


def test_nothing_moves_at_learning_rate_0():
    """
    Catches a ratio that is not 1 before any step (P12).

    With frozen weights no token is clipped, and the policy's loss is minus the mean of whitened advantages, which is 0.
    """
    policy, reward_model = tiny_gpt(0), tiny_reward_model()
    before = weights(policy)
    _, critic, rows = train(policy, reward_model=reward_model, ppo_iterations=1, ppo_epochs=3, ppo_lr=1e-30,
                            critic_lr=1e-30, temperature=0.7)
    (row,) = rows
    assert unchanged(policy, before)
    assert unchanged(critic, weights(reward_model))
    assert row["ratio_error"] < 1e-5
    assert row["clip_fraction"] == 0
    assert row["kl_at_start"] == 0
    assert abs(row["approx_kl"]) < 1e-9
    assert abs(row["policy_loss"]) < 1e-6
    assert abs(row["kl"]) < 1e-9


def test_policy_and_critic_have_a_learning_rate_each():
    """Catches one rate for both, or the two rates exchanged."""
    reward_model, start = tiny_reward_model(), weights(tiny_gpt(0))
    policy, critic, _ = train(reward_model=reward_model, ppo_lr=1e-30)
    assert unchanged(policy, start)
    assert not unchanged(critic, weights(reward_model))
    policy, critic, _ = train(reward_model=reward_model, critic_lr=1e-30)
    assert not unchanged(policy, start)
    assert unchanged(critic, weights(reward_model))


def test_old_log_probs_are_frozen(monkeypatch):
    """Catches old log-probs that are computed again in every epoch (P17). The ratio would then always be 1."""
    original, seen = ppo.policy_loss, []

    def spy(logp, old_logp, *rest):
        seen.append((logp.detach(), old_logp))
        return original(logp, old_logp, *rest)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    _, _, (row,) = train(ppo_iterations=1, ppo_epochs=3, ppo_lr=0.03)
    logp, old_logp = seen[-1]  # the last epoch, after the policy has moved
    assert (logp - old_logp).abs().max() > 1e-3
    assert not old_logp.requires_grad
    assert row["approx_kl"] > 1e-4
    assert row["clip_fraction"] > 0
    assert row["ratio_error"] < 1e-5


def test_learning_rates_fall_linearly_to_0(monkeypatch):
    """Catches a rate that stays, falls within an iteration, falls below 0, or falls for one network only (P42)."""
    seen, original = [], torch.optim.AdamW

    class Spy(original):
        def step(self, *args, **kwargs):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    train(ppo_iterations=4, ppo_epochs=2, minibatch=4, ppo_lr=0.01, critic_lr=0.02)
    updates = 4  # of an iteration: 2 epochs of 2 minibatches
    close(seen, [[0.01 * left, 0.02 * left] for left in (1.0, 0.75, 0.5, 0.25) for _ in range(updates)])


def test_weights_that_are_not_used_do_not_decay():
    """
    Catches weight decay, which pulls the policy away from the reference for no reward.

    Positions that no text reaches keep their embedding to the bit.
    """
    policy, reward_model = tiny_gpt(0), tiny_reward_model()
    before = policy.wpe.weight.detach().clone()
    _, critic, _ = train(policy, reward_model=reward_model)
    longest = max(map(len, PROMPTS)) + SETTINGS["response_tokens"]
    assert torch.equal(policy.wpe.weight[longest:], before[longest:])
    assert torch.equal(critic.trunk.wpe.weight[longest:], reward_model.trunk.wpe.weight[longest:])
    assert not torch.equal(policy.wpe.weight[0], before[0])


def slow_update(model, adam, lr, loss):
    """One step of an optimiser with the gradient clipped to length 1. Returns the length before."""
    adam.param_groups[0]["lr"] = lr
    adam.zero_grad()
    loss.backward()
    norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in model.parameters()))
    for p in model.parameters():
        p.grad /= max(1.0, norm)
    adam.step()
    return norm


def test_loop_equals_a_slow_replay(monkeypatch):
    """
    Catches rows of one tensor paired with other rows of another (P44), a setting that is not passed on, whitening by
    minibatch, a mask that is dropped (P9), gradients that are not cleared or not clipped, returns of another rollout,
    and a metric of the wrong quantity.

    Only the rollouts and the order of the rows are recorded. All the rest is computed again, with plain loops.
    """
    beta, gamma, lam, clip, value_clip, temperature = 0.3, 0.97, 0.8, 0.1, 0.02, 0.8
    policy_lr, critic_lr = 0.03, 0.02
    rollouts, orders = [], []

    def recorded_generate(*arguments):
        rollouts.append((arguments[1], generate(*arguments)))
        return rollouts[-1][1]

    def recorded_minibatches(n, size, epochs, generator):
        assert (n, size, epochs) == (9, 4, 2)
        batches = []
        for _ in range(epochs):
            order = torch.randperm(n, generator=generator)
            batches += [order[:4], order[4:8], order[8:]]
        orders.append(batches)
        return batches

    monkeypatch.setattr(ppo, "generate", recorded_generate)
    monkeypatch.setattr(ppo, "minibatches", recorded_minibatches)
    reward_model = tiny_reward_model()
    reward_model.mean.fill_(0.3)
    reward_model.std.fill_(2.0)
    slow_critic = tiny_reward_model(8)
    policy, critic, rows = train(
        reward_model=reward_model, critic=copy.deepcopy(slow_critic), seed=3,
        gold_fn=lambda prompts, rollout: 2.0 * rollout.response_lens, ppo_iterations=3, ppo_batch=9, minibatch=4,
        ppo_epochs=2, ppo_lr=policy_lr, critic_lr=critic_lr, beta=beta, gamma=gamma, lam=lam, clip=clip,
        value_clip=value_clip, temperature=temperature)
    assert len(rows) == len(rollouts) == len(orders) == 3

    slow_policy, reference = tiny_gpt(0), tiny_gpt(0)
    adam = dict(betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    policy_adam = torch.optim.AdamW(slow_policy.parameters(), **adam)
    critic_adam = torch.optim.AdamW(slow_critic.parameters(), **adam)
    norms = []
    for iteration, (picked, rollout) in enumerate(rollouts):
        mask, lengths = rollout.mask, rollout.response_lens.tolist()
        assert [prompt for prompt, _ in rows_of(rollout)] == picked
        assert all(prompt in PROMPTS for prompt in picked)

        # the rollout, its rewards and its advantages
        with torch.no_grad():
            old = response_logprobs(slow_policy, rollout, temperature)
            ref = response_logprobs(reference, rollout, temperature)
            scores = reward_model(rollout).double()
            old_values = slow_critic.values(rollout).double()
        close(old, rollout.logp, 1e-4)  # the rollout came from the policy as it was then
        rewards = slow_rewards(scores, old, ref, lengths, beta)
        advantages = slow_gae(rewards, old_values, lengths, gamma, lam)
        returns = torch.where(mask, advantages + old_values, 0.0)
        inside = advantages[mask]
        white = (advantages - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()

        # the updates
        left = (3 - iteration) / 3
        measured = []
        for batch in orders[iteration]:
            part, m = rollout.select(batch), mask[batch]
            logp = response_logprobs(slow_policy, part, temperature)
            values = slow_critic.values(part)
            pg = slow_policy_loss(logp, old[batch], white[batch], m, clip)
            vf = slow_value_loss(values, old_values[batch], returns[batch], m, value_clip)
            norms.append(slow_update(slow_policy, policy_adam, policy_lr * left, pg))
            norms.append(slow_update(slow_critic, critic_adam, critic_lr * left, vf))
            x = (logp - old[batch])[m].detach()
            clipped = ((x.exp() - 1).abs() > clip).double().mean().item()
            measured.append([pg.item(), vf.item(), clipped, (x.exp() - 1 - x).mean().item()])

        # the metrics
        row = rows[iteration]
        score, kl = scores.mean().item(), (old - ref).sum(dim=1).mean().item()
        pg, vf, clipped, approx_kl = torch.tensor(measured).mean(dim=0).tolist()
        unexplained = (returns - old_values)[mask].var(correction=0) / returns[mask].var(correction=0)
        finished = sum(response[-1] == VOCAB - 2 for response in rollout.response_ids())
        expected = dict(
            step=iteration, score=score, kl=kl, objective=score - beta * kl, length=sum(lengths) / 9,
            finished=finished / 9, gold=2 * sum(lengths) / 9, policy_loss=pg, value_loss=vf, clip_fraction=clipped,
            approx_kl=approx_kl, entropy=-old[mask].mean().item(), explained_variance=1 - unexplained.item())
        if iteration == 0:
            expected["kl_at_start"] = 0
        assert set(row) == {*expected, "ratio_error", "seconds"}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (iteration, name)
        assert row["ratio_error"] < 1e-5
        assert row["seconds"] > 0
    assert max(norms) > 1
    assert rows[-1]["clip_fraction"] > 0
    assert rows[-1]["kl"] != 0
    # the bugs that this test is for move the weights by about a learning rate
    for fast, slow in ((policy, slow_policy), (critic, slow_critic)):
        for name, w in fast.state_dict().items():
            close(w, slow.state_dict()[name], 1e-4)


def test_rollouts_are_sized_and_seeded(monkeypatch):
    """Catches another batch size, cap or temperature, a sampler that is seeded in every iteration, an unused seed."""
    def sampled(seed):
        seen = []

        def spy(policy, prompts, max_new_tokens, temperature, generator):
            assert (len(prompts), max_new_tokens, temperature) == (16, 4, 0.9)
            rollout = generate(policy, prompts, max_new_tokens, temperature, generator)
            seen.append(rows_of(rollout))
            return rollout

        monkeypatch.setattr(ppo, "generate", spy)
        train(ppo_batch=16, response_tokens=4, temperature=0.9, seed=seed, ppo_epochs=1, ppo_lr=1e-30, critic_lr=1e-30)
        return seen

    def prompts_of(rollouts):
        return [prompt for rollout in rollouts for prompt, _ in rollout]

    one, again, other = sampled(0), sampled(0), sampled(1)
    assert one == again
    assert one != other
    assert one[0] != one[1]
    assert prompts_of(one) != prompts_of(other)
    assert {tuple(prompt) for prompt in prompts_of(one)} == {tuple(prompt) for prompt in PROMPTS}  # all can be drawn


def test_gold_is_logged_and_never_trained_on():
    """Catches gold of other prompts, and gold that leaks into training: the weights are the same without it."""
    seen = []

    def gold_fn(prompts, rollout):
        seen.append(prompts)
        assert [prompt for prompt, _ in rows_of(rollout)] == prompts
        return rollout.response_lens.double() * 100

    plain, _, without = train()
    judged, _, rows = train(gold_fn=gold_fn)
    _, _, others = train(gold_fn=lambda prompts, rollout: -rollout.response_lens.double())
    assert unchanged(plain, weights(judged))
    assert len(seen) == len(rows) == 2
    for a, b, c in zip(without, rows, others):
        assert "gold" not in a
        assert b["gold"] == pytest.approx(100 * b["length"])
        assert c["gold"] == pytest.approx(-c["length"])
        assert all(a[key] == b[key] == c[key] for key in a if key != "seconds")


class Pays(nn.Module):
    """A reward model that pays for the share of one token in the response. As a critic it is a single number."""

    def __init__(self, token):
        super().__init__()
        self.token = token
        self.v = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        hits = (batch.responses == self.token) & batch.mask
        return hits.sum(dim=1).float() / batch.response_lens

    def values(self, batch):
        return torch.where(batch.mask, self.v, 0.0)


def test_score_rises_and_beta_holds_the_policy_back():
    """Catches a loop that logs and does not learn, or learns the opposite, and a KL penalty without effect."""
    settings = dict(ppo_iterations=16, ppo_batch=32, minibatch=32, ppo_epochs=2, ppo_lr=0.03, critic_lr=0.05,
                    response_tokens=4)
    _, _, free = train(tiny_gpt(0, torch.float32), reward_model=Pays(3), beta=0.0, **settings)
    _, _, held = train(tiny_gpt(0, torch.float32), reward_model=Pays(3), beta=1.0, **settings)
    assert free[0]["score"] < 0.3
    assert free[-1]["score"] > 0.8
    assert free[-1]["kl"] > 1
    assert -0.2 < held[-1]["kl"] < 0.5 * free[-1]["kl"]


# ---- the loop calls its canaries -------------------------------------------------------------------------------------

def test_no_canary_stops_a_healthy_run():
    """Catches a false alarm: float32 weights, prompts of all lengths, several minibatches, a temperature."""
    train(tiny_gpt(0, torch.float32), reward_model=tiny_reward_model().float(), minibatch=3, temperature=0.6)


def test_canary_for_another_reference():
    """Catches a reference with other weights, such as the checkpoint of another run."""
    with pytest.raises(CanaryError, match="before the first update, not 0: the reference is not the network"):
        train(tiny_gpt(0), reference=tiny_gpt(1))


def test_canary_for_a_reference_that_differs_in_long_texts_only():
    """Catches a canary that looks at one response, or at the mean: only long texts reach the changed position 7."""
    policy = tiny_gpt(0)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.wpe.weight[7] += 1e-3
    with pytest.raises(CanaryError, match="the reference is not the network"):
        train(policy, reference, ppo_batch=32)


def test_canary_for_a_scorer_at_another_temperature(monkeypatch):
    """Catches log-probs that are computed without the temperature of sampling (P15)."""
    monkeypatch.setattr(ppo, "response_logprobs", lambda model, batch, temperature: response_logprobs(model, batch))
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        train(temperature=0.7)


def test_canary_for_log_probs_off_by_one(monkeypatch):
    """Catches log-probs that belong to the token before (P1)."""
    def off_by_one(model, batch, temperature):
        return torch.where(batch.mask, response_logprobs(model, batch, temperature).roll(1, dims=1), 0.0)

    monkeypatch.setattr(ppo, "response_logprobs", off_by_one)
    with pytest.raises(CanaryError, match="sampling and scoring disagree"):
        train()


def test_canary_for_a_scorer_that_reads_pads(monkeypatch):
    """Catches log-probs that depend on the ids at the pads (P5, P6)."""
    def reads_pads(model, batch, temperature):
        not_pad = (batch.ids != PAD).sum(dim=1, keepdim=True)
        return torch.where(batch.mask, response_logprobs(model, batch, temperature) + 1e-6 * not_pad, 0.0)

    monkeypatch.setattr(ppo, "response_logprobs", reads_pads)
    with pytest.raises(CanaryError, match="the padding changes the result"):
        train()


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, name, value):
    """Catches a diverged run that goes on with NaN. The canary comes before the step, so the weights are not lost."""
    original, policy = getattr(ppo, name), tiny_gpt(0)
    before = weights(policy)
    monkeypatch.setattr(ppo, name, lambda *inputs: original(*inputs) * value)
    with pytest.raises(CanaryError, match="PPO loss is (nan|-?inf).*the training diverged; lower --ppo-lr"):
        train(policy)
    assert unchanged(policy, before)
