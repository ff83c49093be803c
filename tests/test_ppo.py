"""Tests of ppo.py: the maths against double loops and closed forms, the loop against a slow replay, row by row."""

import math

import pytest
import slow
import torch
import torch.nn as nn
from helpers import PROMPTS, close, noise, rng, tiny_gpt, tiny_reward_model

import dpo
import grpo
import ppo

LENGTHS = [3, 0, 5, 1, 4]
MASK = torch.tensor([[t < n for t in range(6)] for n in LENGTHS])  # (B, R)


def poisoned(x):
    """x with NaN in the cells outside the mask."""
    return torch.where(MASK, x, math.nan)


def test_kl_estimates_by_formula():
    """Bug: a wrong factor or term, a KL of equal policies that is not exactly 0, or a k3 that rounds to below 0."""
    x = torch.cat([10 ** torch.linspace(-12, 1, 2000), -10 ** torch.linspace(-12, 1, 2000)]).float()
    ref = torch.zeros_like(x)
    found, exact = ppo.kl_estimates(x, ref), x.double()
    close(found["k1"], x)
    close(found["k2"], exact * exact / 2, 1e-6)
    assert (found["k3"] >= 0).all()
    large = x.abs() > 1e-3
    torch.testing.assert_close(found["k3"][large].double(), ((-exact).exp() - 1 + exact)[large], rtol=1e-3, atol=0)
    assert all((value == 0).all() for value in ppo.kl_estimates(x, x).values())


def slow_rewards(scores, logp, ref, lengths, beta):
    out = torch.zeros_like(logp)
    for i, n in enumerate(lengths):
        for t in range(n):
            out[i, t] = -beta * (logp[i, t] - ref[i, t])
            if t == n - 1:
                out[i, t] += scores[i]
    return out


def test_token_rewards_equal_a_double_loop():
    """Bug: a score one token early or late, at a pad or in a row without tokens; a KL of the wrong sign, or twice."""
    scores = noise(0, 5)
    scores[1] = math.nan  # row 1 has no tokens, so its score is paid to no token
    logp, ref = poisoned(noise(1, 5, 6)), poisoned(noise(2, 5, 6))
    close(ppo.token_rewards(scores, logp, ref, MASK, 0.3), slow_rewards(scores, logp, ref, LENGTHS, 0.3))


def slow_gae(rewards, values, lengths, gamma=1.0, lam=0.95):
    """The definition: the sum over l of (gamma lam)^l delta_{t+l}. The value after the last token is 0."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, n in enumerate(lengths):
        deltas = []
        for t in range(n):
            next_value = values[i, t + 1] if t + 1 < n else 0
            deltas.append(rewards[i, t] + gamma * next_value - values[i, t])
        for t in range(n):
            advantages[i, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
    return advantages


@pytest.mark.parametrize("gamma_and_lam", [(), (0.9, 0.5)])
def test_gae_equals_its_definition(gamma_and_lam):
    """Bug: a missing gamma or lambda, other defaults, a bootstrap from a pad, or returns that are not A + V."""
    rewards, values = poisoned(noise(0, 5, 6)), poisoned(noise(1, 5, 6))
    advantages, returns = ppo.gae(rewards, values, MASK, *gamma_and_lam)
    expected = slow_gae(rewards, values, LENGTHS, *gamma_and_lam)
    close(advantages, expected)
    close(returns, torch.where(MASK, expected + values, 0.0))


def test_whiten_uses_the_population_of_all_real_tokens():
    """Bug: whitening row by row or over pads, the sample variance, or a scale that depends on the padding."""
    x = 5 + 3 * noise(0, 5, 6)
    inside = x[MASK].tolist()
    mean = sum(inside) / len(inside)
    deviation = math.sqrt(sum((cell - mean) ** 2 for cell in inside) / len(inside))
    white = ppo.whiten(poisoned(x), MASK)
    close(white[MASK], [(cell - mean) / deviation for cell in inside], 1e-7)
    assert (white[~MASK] == 0).all()


def test_whiten_makes_exactly_0_of_equal_values():
    """Bug: the rounding of the mean, divided by next to nothing: noise of the size of an advantage; or 0 / 0."""
    for mask in (MASK, MASK & ~MASK):
        assert (ppo.whiten(poisoned(torch.full((5, 6), 1000.1)), mask) == 0).all()  # their mean is rounded


def slow_policy_loss(logp, old, advantages, mask, clip=0.2):
    terms = []
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(logp[i, t] - old[i, t])
        terms.append(-torch.min(advantages[i, t] * ratio, advantages[i, t] * ratio.clamp(1 - clip, 1 + clip)))
    return sum(terms) / len(terms)


def slow_value_loss(values, old, returns, mask, clip=0.2):
    terms = []
    for i, t in mask.nonzero().tolist():
        clipped = values[i, t].clamp(old[i, t] - clip, old[i, t] + clip)
        terms.append(torch.max((values[i, t] - returns[i, t]) ** 2, (clipped - returns[i, t]) ** 2))
    return 0.5 * sum(terms) / len(terms)


@pytest.mark.parametrize("function, slow", [(ppo.policy_loss, slow_policy_loss), (ppo.value_loss, slow_value_loss)])
def test_losses_equal_a_double_loop_with_the_gradient_of_finite_differences(function, slow):
    """Bug: any wrong term, in the value or only in the gradient; a mean of row means; a clip that is always 0.2."""
    x, old, target = [poisoned(scale * noise(seed, 5, 6)) for seed, scale in enumerate((0.4, 0.4, 1.0))]
    x[0, 0] = old[0, 0]  # where the two sides of the min are equal, half a gradient would be wrong
    for clip in (0.1, 0.6):
        x = x.detach().requires_grad_()
        loss = function(x, old, target, MASK, clip)
        close(loss.item(), slow(x, old, target, MASK, clip).item())
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.autograd.gradcheck(lambda y, clip=clip: function(y, old, target, MASK, clip), x)
        assert (gradient[~MASK] == 0).all()
        assert 0 < (gradient != 0).sum() < MASK.sum()  # some tokens are clipped, some are not
    close(function(x, old, target, MASK).item(), slow(x, old, target, MASK).item())  # the default clip
    assert function(x, old, target, MASK & ~MASK) == 0  # and not 0 / 0


def padded(rows, R):
    return torch.stack([nn.functional.pad(row, (0, R - len(row))) for row in rows])


def test_loop_equals_a_slow_replay():
    """
    Bug: rows paired with other rows, another setting, network, token or temperature, whitening by minibatch, old
    log-probs computed again in every epoch, gradients not cleared or clipped, or a metric of the wrong quantity.
    """
    beta, gamma, lam, clip, value_clip, temperature = 0.3, 0.97, 0.8, 0.1, 0.02, 0.8
    config = ppo.PPOConfig(ppo_iterations=2, ppo_batch=7, minibatch=4, response_tokens=5, ppo_lr=0.03, critic_lr=0.02,
                           beta=beta, gamma=gamma, lam=lam, clip=clip, value_clip=value_clip, temperature=temperature)
    policy, critic, reward_model = tiny_gpt(0), tiny_reward_model(8), tiny_reward_model(7)
    slow_policy, slow_critic, reference = tiny_gpt(0), tiny_reward_model(8), tiny_gpt(0)
    for network in (critic, slow_critic):
        network.std.fill_(0.2)  # so that some of its gradients are clipped too
    adam = dict(betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    policy_adam = torch.optim.AdamW(slow_policy.parameters(), **adam)
    critic_adam = torch.optim.AdamW(slow_critic.parameters(), **adam)
    shuffle, sampler, norms, finished = rng(3), rng(3), [], []
    loop = ppo.train_ppo(policy, critic, tiny_gpt(0), reward_model, PROMPTS, config, seed=3)
    for iteration, (metrics, _, rollout) in enumerate(loop):
        # the rollout, its rewards and its advantages
        prompts = [PROMPTS[i] for i in torch.randint(5, (7,), generator=shuffle)]
        texts, *rows = slow.sample(rollout, slow_policy, reference, prompts, config, sampler)
        mask, lengths, R = rollout.mask, rollout.response_lens.tolist(), rollout.R
        with torch.no_grad():
            scores = slow.scores(reward_model, texts)
            old_values = padded([slow.values(slow_critic, *text)[0] for text in texts], R)
        old, ref = padded(rows[0], R), padded(rows[1], R)
        advantages = slow_gae(slow_rewards(scores, old, ref, lengths, beta), old_values, lengths, gamma, lam)
        returns = torch.where(mask, advantages + old_values, 0.0)
        inside = advantages[mask]
        white = (advantages - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()
        unexplained = (returns - old_values)[mask].var(correction=0) / returns[mask].var(correction=0)

        # the updates
        left = (2 - iteration) / 2
        updates = []
        for batch in slow.orders(7, 2, shuffle):
            m = mask[batch]
            logp = padded([slow.logprobs(slow_policy, *texts[i], temperature) for i in batch], R)
            values = padded([slow.values(slow_critic, *texts[i])[0] for i in batch], R)
            pg = slow_policy_loss(logp, old[batch], white[batch], m, clip)
            vf = slow_value_loss(values, old_values[batch], returns[batch], m, value_clip)
            norms.append((slow.step(slow_policy, policy_adam, 0.03 * left, pg),
                          slow.step(slow_critic, critic_adam, 0.02 * left, vf)))
            updates.append(dict(policy_loss=pg.item(), value_loss=vf.item(),
                                **slow.update_metrics(logp[m], old[batch][m], clip)))
        expected = dict(explained_variance=1 - unexplained.item(), **slow.metrics(texts, scores, *rows, beta, updates))
        slow.same_metrics(metrics, expected, iteration)
        finished.append(metrics["finished"])
        # the bugs that this test is for move the weights by about a learning rate
        slow.same_weights(policy, slow_policy, 1e-4)
        slow.same_weights(critic, slow_critic, 1e-4)
    assert min(map(max, zip(*norms))) > 1 and metrics["clip_fraction"] > 0 and 0 < max(finished) < 1
    assert iteration == 1


def test_policy_as_its_own_reference_is_refused():
    """Bug: the same object passed twice: the KL would stay 0 for ever."""
    policy = tiny_gpt()
    for loop in (ppo.train_ppo(policy, None, policy, None, None, None, 0),
                 grpo.train_grpo(policy, policy, None, None, None, 0),
                 dpo.train_dpo(policy, policy, None, None, 0),
                 dpo.train_online_dpo(policy, policy, None, None, None, 0)):
        with pytest.raises(ValueError, match="same object"):
            next(loop)
