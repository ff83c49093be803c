"""
Tests of ppo.py: the maths against double loops and closed forms, the loop against a slow replay.

In the replay there is no batch, no padding and no function of the lessons, only the textbook GPT and plain loops.
"""

import math

import pytest
import torch
import torch.nn as nn
from helpers import (
    E,
    close,
    double,
    naive_logits,
    naive_response_logprobs,
    naive_values,
    noise,
    poison,
    random_batch,
    rows_of,
    slow_step,
    tiny_gpt,
)

import grpo
import ppo
from data import minibatches
from model import generate
from reward import RewardModel

NAN, INF = math.nan, math.inf


def ragged(lengths, R):
    """A mask (B, R) whose rows begin with the given numbers of True cells."""
    return torch.tensor([[t < n for t in range(R)] for n in lengths])


def poisoned(x, mask, value):
    """x with `value` in the cells outside the mask."""
    return torch.where(mask, x, torch.full_like(x, value))


LENGTHS = [3, 0, 5, 1, 4]
MASK = ragged(LENGTHS, 6)


# ---- means and KL estimates ------------------------------------------------------------------------------------------

def test_masked_mean_is_one_mean_over_all_real_cells():
    """Bug: a mean of row means, a mean over padding, or 0 / 0 where no token is real."""
    x = double([[6.0, NAN, INF], [1.0, 2.0, 3.0]])
    close(ppo.masked_mean(x, ragged([1, 3], 3)), (6 + 1 + 2 + 3) / 4)
    assert ppo.masked_mean(torch.full((2, 3), NAN), ragged([0, 0], 3)).item() == 0


def test_kl_estimates_by_formula():
    """Bug: a wrong factor in k2, a missing term in k3, or a KL of equal policies that is not exactly 0."""
    logp, ref = noise(2, 4, 3), noise(3, 4, 3)
    estimates = ppo.kl_estimates(logp, ref)
    assert set(estimates) == {"k1", "k2", "k3"}
    for i in range(4):
        for t in range(3):
            x = (logp[i, t] - ref[i, t]).item()
            close(estimates["k1"][i, t], x)
            close(estimates["k2"][i, t], 0.5 * x * x)
            close(estimates["k3"][i, t], math.exp(-x) - 1 + x)
    assert all((value == 0).all() for value in ppo.kl_estimates(logp, logp).values())


def test_k3_is_never_negative_and_keeps_its_digits_in_float32():
    """Bug: exp(x) - 1 + x. Near x = 0 it rounds to 0 or to a negative number in float32; expm1 does not."""
    x = torch.cat([10 ** torch.linspace(-12, 1, 2000), -10 ** torch.linspace(-12, 1, 2000)]).float()
    k3 = ppo.kl_estimates(x, torch.zeros_like(x))["k3"]
    assert (k3 >= 0).all()
    large = x.abs() > 1e-3
    exact = torch.special.expm1(-x[large].double()) + x[large].double()
    torch.testing.assert_close(k3[large].double(), exact, rtol=1e-3, atol=0)


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
    Bug: KL(reference || policy), the KL of the prompt or of pads, a missing temperature, a mean over tokens, or a
    default that is not temperature 1.
    """
    policy, reference = tiny_gpt(0), tiny_gpt(1)
    for batch in (random_batch(0, B=4, min_response=0), random_batch(1, B=3, P=8, R=9)):
        arguments = () if temperature == 1 else (temperature,)
        kl = ppo.exact_kl(policy, reference, batch, *arguments)
        close(kl, slow_kl(policy, reference, batch, temperature))
        assert torch.equal(ppo.exact_kl(policy, reference, poison(batch), *arguments), kl)
        assert not kl.requires_grad
        assert kl.max() > 0.1


# ---- rewards and advantages ------------------------------------------------------------------------------------------

def slow_rewards(scores, logp, ref, lengths, beta):
    out = torch.zeros_like(logp)
    for i, n in enumerate(lengths):
        for t in range(n):
            out[i, t] = -beta * (logp[i, t] - ref[i, t])
            if t == n - 1:
                out[i, t] += scores[i]
    return out


@pytest.mark.parametrize("trash", [7.0, NAN, INF])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_token_rewards_equal_a_double_loop(beta, trash):
    """
    Bug: a score one token early or late, at a pad or in the last column, or in column -1 of a row without tokens; a KL
    penalty of the wrong sign, with a gap, or paid twice.
    """
    scores = noise(0, 5)
    scores[1] = NAN  # row 1 has no tokens, so its score is paid to no token
    logp = poisoned(noise(1, 5, 6), MASK, trash)
    ref = poisoned(noise(2, 5, 6), MASK, trash)
    rewards = ppo.token_rewards(scores, logp, ref, MASK, beta)
    close(rewards, slow_rewards(scores, logp, ref, LENGTHS, beta))
    assert (rewards[~MASK] == 0).all()


def slow_gae(rewards, values, lengths, gamma, lam):
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


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.9, 0.0)])
def test_gae_equals_its_definition(gamma, lam):
    """Bug: a missing gamma or lambda, a bootstrap from a pad, or returns that are not A + V."""
    rewards, values = poisoned(noise(0, 5, 6), MASK, NAN), poisoned(noise(1, 5, 6), MASK, NAN)
    advantages, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    expected = slow_gae(rewards, values, LENGTHS, gamma, lam)
    close(advantages, expected)
    close(returns, torch.where(MASK, expected + values, 0.0))
    if (gamma, lam) == (1.0, 0.95):
        close(ppo.gae(rewards, values, MASK)[0], advantages)  # the defaults


@pytest.mark.parametrize("trash", [9.0, NAN])
def test_whiten_uses_the_population_of_all_real_tokens(trash):
    """Bug: whitening row by row or over pads, the sample variance, or a scale that depends on the padding."""
    x = 5 + 3 * noise(0, 5, 6)
    inside = x[MASK].tolist()
    mean = sum(inside) / len(inside)
    deviation = math.sqrt(sum((cell - mean) ** 2 for cell in inside) / len(inside))
    white = ppo.whiten(poisoned(x, MASK, trash), MASK)
    close(white[MASK], [(cell - mean) / deviation for cell in inside], 1e-7)
    assert (white[~MASK] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.24, 0.1, 1000.1, -3.3])  # eight of them have a mean that is rounded
def test_whiten_makes_exactly_0_of_equal_values(value, dtype):
    """Bug: the rounding of the mean, divided by next to nothing: noise of the size of an advantage; or 0 / 0."""
    for lengths in ([3, 3, 2], [1, 0, 0], [0, 0, 0]):
        mask = ragged(lengths, 3)
        x = poisoned(torch.full((3, 3), value, dtype=dtype), mask, NAN)
        assert (ppo.whiten(x, mask) == 0).all()


# ---- the losses ------------------------------------------------------------------------------------------------------

def slow_policy_loss(logp, old, advantages, mask, clip=0.2):
    terms = [0 * logp[mask].sum()]  # so that a minibatch in which every token is clipped has a gradient, of 0
    for i, t in mask.nonzero().tolist():
        ratio = torch.exp(logp[i, t] - old[i, t])
        clipped = min(max(ratio.item(), 1 - clip), 1 + clip)
        unclipped_term = -advantages[i, t] * ratio
        clipped_term = -advantages[i, t] * clipped
        terms.append(unclipped_term if unclipped_term >= clipped_term else clipped_term.detach())
    return sum(terms) / mask.sum()


def slow_value_loss(values, old, returns, mask, clip=0.2):
    terms = [0 * values[mask].sum()]
    for i, t in mask.nonzero().tolist():
        clipped = min(max(values[i, t].item(), old[i, t].item() - clip), old[i, t].item() + clip)
        unclipped_term = (values[i, t] - returns[i, t]) ** 2
        clipped_term = (clipped - returns[i, t]) ** 2
        terms.append(unclipped_term if unclipped_term >= clipped_term else clipped_term.detach())
    return 0.5 * sum(terms) / mask.sum()


@pytest.mark.parametrize("function, slow", [(ppo.policy_loss, slow_policy_loss), (ppo.value_loss, slow_value_loss)])
def test_losses_equal_a_double_loop_with_the_gradient_of_finite_differences(function, slow):
    """Bug: any wrong term, in the value or only in the gradient; a mean of row means; a clip that is always 0.2."""
    x, old, target = [poisoned(scale * noise(seed, 5, 6), MASK, NAN) for seed, scale in enumerate((0.4, 0.4, 1.0))]
    x[0, 0] = old[0, 0]  # where the two sides of the min are equal, half a gradient would be wrong
    for clip in (0.1, 0.2, 0.6):
        x = x.detach().requires_grad_()
        loss = function(x, old, target, MASK, clip)
        close(loss.item(), slow(x, old, target, MASK, clip).item())
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.autograd.gradcheck(lambda y, clip=clip: function(y, old, target, MASK, clip), x)
        assert (gradient[~MASK] == 0).all()
        assert 0 < (gradient != 0).sum() < MASK.sum()  # some tokens are clipped, some are not
    close(function(x, old, target, MASK).item(), slow(x, old, target, MASK, 0.2).item())  # the default clip
    each = [ppo.clipped_surrogate(x, old, target, MASK, *clip)[MASK] for clip in ((), (0.2,))]
    assert torch.equal(*each)


def test_a_clip_that_is_not_positive_is_refused():
    """Bug: a clip of 0, which leaves no gradient, without any error."""
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip must be above 0, got 0.0"):
        ppo.policy_loss(x, x, x, ragged([1], 1), clip=0.0)


# ---- the loop --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 0, 1, 2], [3, 3]]
SETTINGS = dict(ppo_iterations=2, ppo_batch=12, minibatch=12, group=3, ppo_lr=1e-2, critic_lr=1e-2, grpo_lr=1e-2,
                response_tokens=5)


def tiny_reward_model(seed=7):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RewardModel(tiny_gpt(seed)).double()
    nn.init.constant_(model.score.bias, 0.1)
    return model


def loop(name="ppo", policy=None, reference=None, reward_model=None, critic=None, seed=0, prompts=PROMPTS, **changes):
    """train_ppo or train_grpo on tiny networks, with changes to SETTINGS: the generator."""
    policy = policy or tiny_gpt(0)
    reference = reference or tiny_gpt(0)
    reward_model = reward_model or tiny_reward_model()
    config = grpo.GRPOConfig(**{**SETTINGS, **changes})
    if name == "grpo":
        return grpo.train_grpo(policy, reference, reward_model, prompts, config, seed)
    return ppo.train_ppo(policy, critic or tiny_reward_model(), reference, reward_model, prompts, config, seed)


def padded(rows, R):
    return torch.stack([nn.functional.pad(row, (0, R - len(row))) for row in rows])


def test_loop_equals_a_slow_replay(monkeypatch):
    """
    Bug: rows of one tensor paired with other rows of another, a setting that is not passed on, scores or log-probs of
    another network, token or temperature, a bootstrap at the cap, whitening by minibatch, old log-probs that are
    computed again in every epoch, gradients that are not cleared or not clipped, weights that decay, a learning rate
    that does not fall, one random number for two iterations, or a metric of the wrong quantity.

    Only the rollouts and the order of the rows are recorded. All the rest is computed again, row by row.
    """
    beta, gamma, lam, clip, value_clip, temperature = 0.3, 0.97, 0.8, 0.1, 0.02, 0.8
    policy_lr, critic_lr = 0.03, 0.02
    rollouts, orders, generators = [], [], []

    def recorded_generate(policy, prompts, cap, temperature_of_sampling, generator):
        generators.append(generator)
        assert (len(prompts), cap, temperature_of_sampling) == (9, 5, temperature)
        rollouts.append((prompts, generate(policy, prompts, cap, temperature_of_sampling, generator)))
        return rollouts[-1][1]

    def recorded_minibatches(n, size, epochs, generator):
        assert (n, size, epochs) == (9, 4, 2)
        orders.append(minibatches(n, size, epochs, generator))
        return orders[-1]

    monkeypatch.setattr(ppo, "generate", recorded_generate)
    monkeypatch.setattr(ppo, "minibatches", recorded_minibatches)
    reward_model, policy, critic = tiny_reward_model(), tiny_gpt(0), tiny_reward_model(8)
    reward_model.mean.fill_(0.3)
    reward_model.std.fill_(2.0)
    yielded = list(loop("ppo", policy, None, reward_model, critic, seed=3, ppo_iterations=3, ppo_batch=9, minibatch=4,
                        ppo_lr=policy_lr, critic_lr=critic_lr, beta=beta, gamma=gamma, lam=lam, clip=clip,
                        value_clip=value_clip, temperature=temperature))
    assert len(yielded) == len(rollouts) == len(orders) == 3
    assert all(parts["sampler"] is its for (_, parts, _), its in zip(yielded, generators))
    assert len({str(prompts) for prompts, _ in rollouts}) == 3
    assert len({str(order) for order in orders}) == 3

    slow_policy, slow_critic, reference = tiny_gpt(0), tiny_reward_model(8), tiny_gpt(0)
    adam = dict(betas=(0.9, 0.99), eps=1e-5, weight_decay=0.0)
    policy_adam = torch.optim.AdamW(slow_policy.parameters(), **adam)
    critic_adam = torch.optim.AdamW(slow_critic.parameters(), **adam)
    norms, endings = [], []
    for iteration, (picked, rollout) in enumerate(rollouts):
        mask, lengths = rollout.mask, rollout.response_lens.tolist()
        texts = rows_of(rollout)
        assert [prompt for prompt, _ in texts] == picked
        assert all(prompt in PROMPTS for prompt in picked)
        endings += [response[-1] == E for _, response in texts]

        # the rollout, its rewards and its advantages
        with torch.no_grad():
            old = padded([naive_response_logprobs(slow_policy, *text, temperature) for text in texts], rollout.R)
            ref = padded([naive_response_logprobs(reference, *text, temperature) for text in texts], rollout.R)
            scores = torch.stack([naive_values(reward_model, *text)[1] for text in texts])
            old_values = padded([naive_values(slow_critic, *text)[0] for text in texts], rollout.R)
        close(old, rollout.logp, 1e-5)  # the rollout came from the policy as it was then
        rewards = slow_rewards(scores, old, ref, lengths, beta)
        advantages = slow_gae(rewards, old_values, lengths, gamma, lam)
        returns = torch.where(mask, advantages + old_values, 0.0)
        inside = advantages[mask]
        white = (advantages - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()

        # the updates
        left = (3 - iteration) / 3
        measured = []
        for batch in orders[iteration]:
            m = mask[batch]
            logp = padded([naive_response_logprobs(slow_policy, *texts[i], temperature) for i in batch], rollout.R)
            values = padded([naive_values(slow_critic, *texts[i])[0] for i in batch], rollout.R)
            pg = slow_policy_loss(logp, old[batch], white[batch], m, clip)
            vf = slow_value_loss(values, old_values[batch], returns[batch], m, value_clip)
            norms.append(slow_step(slow_policy, policy_adam, policy_lr * left, pg))
            norms.append(slow_step(slow_critic, critic_adam, critic_lr * left, vf))
            x = (logp - old[batch])[m].detach()
            clipped = ((x.exp() - 1).abs() > clip).double().mean().item()
            measured.append([pg.item(), vf.item(), clipped, (x.exp() - 1 - x).mean().item()])

        # the metrics
        metrics, _, its_rollout = yielded[iteration]
        assert its_rollout is rollout
        score, kl = scores.mean().item(), (old - ref).sum(dim=1).mean().item()
        pg, vf, clipped, approx_kl = torch.tensor(measured).mean(dim=0).tolist()
        unexplained = (returns - old_values)[mask].var(correction=0) / returns[mask].var(correction=0)
        finished = sum(response[-1] == E for _, response in texts)
        expected = dict(
            step=iteration, score=score, kl=kl, objective=score - beta * kl, length=sum(lengths) / 9,
            finished=finished / 9, policy_loss=pg, value_loss=vf, clip_fraction=clipped, approx_kl=approx_kl,
            entropy=-old[mask].mean().item(), explained_variance=1 - unexplained.item())
        if iteration == 0:
            expected["kl_at_start"] = 0
        assert set(metrics) == {*expected, "ratio_error"} and next(iter(metrics)) == "step"
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (iteration, name)
        assert metrics["ratio_error"] < 1e-5
    assert max(norms) > 1 and set(endings) == {True, False}
    assert yielded[-1][0]["clip_fraction"] > 0 and yielded[-1][0]["kl"] != 0
    # the bugs that this test is for move the weights by about a learning rate
    for fast, slow in ((policy, slow_policy), (critic, slow_critic)):
        for name, w in fast.state_dict().items():
            close(w, slow.state_dict()[name], 1e-4)


def run(name, seed=0, **changes):
    """Run a loop to its end: the metrics, the sampled tokens, the weights of policy and critic."""
    policy, critic = tiny_gpt(0), tiny_reward_model()
    rows, tokens = [], []
    for metrics, _, rollout in loop(name, policy, critic=critic, seed=seed, **changes):
        rows.append(metrics)
        tokens.append(rollout.ids.tolist())
    return rows, tokens, [w.tolist() for w in [*policy.parameters(), *critic.parameters()]]


BOTH = pytest.mark.parametrize("name", ["ppo", "grpo"])


@BOTH
def test_the_seed_decides_prompts_and_tokens(name):
    """Bug: a seed without effect on the prompts or on the tokens, or a sampler that is seeded in every iteration."""
    picked = [{row[0] for row in run(name, seed, prompts=[[1], [2], [3], [4]], ppo_batch=48, ppo_iterations=1)[1][0]}
              for seed in (0, 5)]
    assert picked == [{1, 2, 3, 4}] * 2  # every prompt has its turn
    prompts = [[row[0] for row in run(name, seed, prompts=[[1], [2], [3], [4]])[1][0]] for seed in (0, 5)]
    assert prompts[0] != prompts[1]
    answers = [run(name, seed, prompts=[[1, 2]], ppo_lr=1e-30, grpo_lr=1e-30)[1] for seed in (0, 5)]
    assert len({str(ids) for iterations in answers for ids in iterations}) == 4  # only the draws can differ


@BOTH
def test_pads_do_not_change_a_bit_of_a_run(name, monkeypatch):
    """Bug: tokens after E, or pads on the left, that change a score, a value, an advantage or a gradient."""
    clean = run(name)
    for module in (ppo, grpo):
        monkeypatch.setattr(module, "generate", lambda *arguments: poison(generate(*arguments)))
    poisoned_run = run(name)
    assert poisoned_run[1] != clean[1]
    assert poisoned_run[0] == clean[0] and poisoned_run[2] == clean[2]


@BOTH
def test_policy_as_its_own_reference_is_refused(name):
    """Bug: the same object passed twice: the KL would stay 0 for ever."""
    policy = tiny_gpt()
    with pytest.raises(ValueError, match="same object"):
        next(loop(name, policy, policy))
