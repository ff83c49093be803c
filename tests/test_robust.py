"""Tests of robust.py: ensembles and BRME against loops, closed forms and one reward model alone."""

import copy
import math

import pytest
import torch
from helpers import PAD, PAIRS, close, naive_hidden, noise, poison, random_batch, rows_of, tiny_gpt, unchanged, weights

import robust
from data import collate_pairs, minibatches
from reward import RewardConfig, RewardModel, normalise, score_batches, train_reward_model
from robust import (
    Ensemble,
    GaussianHeads,
    RobustReward,
    aggregate,
    brme_loss,
    gaussian_nll,
    make_members,
    nominal,
    robust_reward,
    train_brme,
    train_ensemble,
)

ROUNDING = 2e-6  # scores are float32


def config(**changes):
    return RewardConfig(**{**dict(reward_batch=3), **changes})


def tiny_reward_model(seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RewardModel(tiny_gpt(seed)).to(dtype)


def end(loop):
    """Run a loop to its end. Returns the metrics of its steps."""
    return [metrics for metrics, _ in loop]


# ---- ensembles -------------------------------------------------------------------------------------------------------

def test_aggregate_equals_a_loop():
    """
    Bug: the standard deviation or the sample variance for the population variance, a bonus for a penalty, the
    maximum for the minimum, and a mean over responses instead of members.
    """
    scores = 2 * noise(0, 4, 6)
    for lam in (0.0, 0.1, 0.5, 2.0):
        for b, column in enumerate(scores.T.tolist()):
            mean = sum(column) / 4
            variance = sum((r - mean) ** 2 for r in column) / 4
            close(aggregate(scores, "mean", lam)[b], mean)
            close(aggregate(scores, "wco", lam)[b], sorted(column)[0])
            close(aggregate(scores, "uwo", lam)[b], mean - lam * variance)
    close(aggregate(scores, "uwo"), aggregate(scores, "uwo", 0.5))


@pytest.mark.parametrize("how, lam", [("min", 0.5), ("uwo", -0.1)])
def test_aggregate_refuses_what_it_does_not_know(how, lam):
    """Bug: a misspelt name that gives another aggregate, and a negative lam, which rewards disagreement."""
    with pytest.raises(ValueError, match="aggregated by mean, wco or uwo with lam at least 0"):
        aggregate(torch.zeros(2, 3), how, lam)


def test_ensemble_aggregates_members_in_their_own_units():
    """Bug: one normalisation for all members, aggregation before it, and a `how` or `lam` that is not passed on."""
    batches = [random_batch(seed, B=4) for seed in range(3)]
    members = [tiny_reward_model(seed) for seed in range(3)]
    slow = []
    for member in members:
        normalise(member, batches)
        scores = []
        for prompt, response in rows_of(batches[0]):
            with torch.no_grad():
                raw = member.score(naive_hidden(member.trunk, prompt + response)[-1])
            scores.append((raw.item() - member.mean.item()) / member.std.item())
        slow.append(scores)
    slow = torch.tensor(slow, dtype=torch.float64)  # (k, B)
    for how, lam in (("mean", 0.5), ("wco", 0.5), ("uwo", 0.5), ("uwo", 2.0)):
        ensemble = Ensemble(members, how, lam)
        close(ensemble(batches[0]), aggregate(slow, how, lam), 1e-5)
        close(score_batches(ensemble, batches)[:4], aggregate(slow, how, lam), 1e-5)


def test_members_differ_by_their_seeds():
    """
    Bug: members that are copies, that share a head, an order or a trunk, or a use of the caller's random numbers.

    Each member is the reward model that its seed gives alone. Ensembles with other seeds share no member with it.
    """
    trunk, settings = tiny_gpt(0, torch.float32).requires_grad_(False), config(reward_epochs=1)
    before, state = weights(trunk), torch.get_rng_state()
    members = make_members(trunk, 3, seed=2)
    rows = end(train_ensemble(members, PAIRS, settings, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(trunk, before)
    assert [(row["member"], row["step"]) for row in rows] == [(i, step) for i in range(3) for step in range(3)]
    for i, member in enumerate(members):
        torch.manual_seed(6 + i)
        alone = RewardModel(trunk).requires_grad_(True)
        metrics = end(train_reward_model(alone, PAIRS, settings, seed=6 + i))
        assert unchanged(member, weights(alone))
        assert [dict(member=i, **row) for row in metrics] == rows[3 * i:3 * i + 3]
    others = make_members(trunk, 3, seed=1)
    assert len({tuple(member.score.weight.flatten().tolist()) for member in members + others}) == 6


# ---- BRME: heads with a mean and a standard deviation ----------------------------------------------------------------

def tiny_heads(k=3, dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GaussianHeads(tiny_gpt(seed), k).to(dtype)


def test_heads_are_linear_in_the_last_hidden_state():
    """
    Bug: means and stds exchanged or interleaved, a std that is not positive, a hidden state that is read at a pad,
    and a trunk that is shared with the caller's.
    """
    heads, batch = tiny_heads(3), random_batch(0)
    means, stds = heads(batch)
    assert means.shape == stds.shape == (3, len(batch))
    assert (stds > 0).all()
    with torch.no_grad():
        for b, (prompt, response) in enumerate(rows_of(batch)):
            out = heads.heads.weight @ naive_hidden(heads.trunk, prompt + response)[-1] + heads.heads.bias
            close(means[:, b], out[:3], ROUNDING)
            close(stds[:, b], [math.log(1 + math.exp(x)) + 1e-4 for x in out[3:].tolist()], ROUNDING)
    assert all(torch.equal(a, b) for a, b in zip(heads(poison(batch)), (means, stds)))
    trunk = tiny_gpt(0)
    assert not {p.data_ptr() for p in GaussianHeads(trunk, 2).parameters()} & {p.data_ptr() for p in trunk.parameters()}
    with torch.no_grad():
        heads.heads.bias[3:] = -1e4
    assert (heads(batch)[1] > 0).all()  # a std of 0 would make the likelihood infinite


def test_brme_loss_by_hand_and_on_average():
    """
    Bug: noise that is not scaled by the std, and a target for each head. Shows the trap of the loss.

    Noise of +1 and -1 has mean 0 and variance 1. Over both, the loss is the mean of (mean - target)^2 + std^2.
    """
    means, stds, target, noises = noise(0, 3, 5), noise(1, 3, 5).abs(), noise(2, 5), noise(3, 3, 5)
    by_hand, expectation = 0.0, 0.0
    for i in range(3):
        for b in range(5):
            by_hand += (means[i, b] + stds[i, b] * noises[i, b] - target[b]) ** 2 / 15
            expectation += ((means[i, b] - target[b]) ** 2 + stds[i, b] ** 2) / 15
    close(brme_loss(means, stds, target, noises), by_hand)
    ones = torch.ones(3, 5, dtype=torch.float64)
    close((brme_loss(means, stds, target, ones) + brme_loss(means, stds, target, -ones)) / 2, expectation)


def test_gaussian_nll_is_the_density():
    """Bug: a variance for a std, and a missing half or logarithm: it is PyTorch's Gaussian without its constant."""
    means, stds, target = noise(0, 3, 5), noise(1, 3, 5).abs() + 0.1, noise(2, 5)
    log_prob = torch.distributions.Normal(means, stds).log_prob(target)
    close(gaussian_nll(means, stds, target), -log_prob.mean() - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_training_of_heads_equals_a_slow_replay(monkeypatch, kind):
    """
    Bug: the other kind of loss, a share that is not passed on, heads that learn from what they should not, noise
    without effect or the same in every step, a learning rate that does not fall, gradients that are not cleared or not
    clipped, weight decay that is not passed on, and metrics after the step.

    The order of the pairs is recorded, and the random numbers are drawn again. All the rest is computed in float64,
    one head and one response at a time.
    """
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 3, 2)
        orders.extend(minibatches(n, size, epochs, generator))
        return orders

    monkeypatch.setattr(robust, "minibatches", recorded)
    k, share, seed = 3, 0.5, 5
    model = tiny_reward_model(1)
    normalise(model, [collate_pairs(PAIRS, PAD)])
    heads = tiny_heads(k)
    with torch.no_grad():
        heads.heads.bias[k:] = 1.0  # noise of this size moves the loss
    slow, before = copy.deepcopy(heads), weights(model)
    rows = end(train_brme(heads, model, PAIRS, kind, share, config(reward_lr=0.01, weight_decay=0.3), seed))
    assert len(orders) == len(rows) == 6 and unchanged(model, before)
    assert str(orders[:3]) != str(orders[3:])

    generator = torch.Generator().manual_seed(seed)
    learns = (torch.rand(k, 7, generator=generator) < share).tolist()
    for pair, head in enumerate(torch.randint(k, (7,), generator=generator).tolist()):
        learns[head][pair] = True
    assert all(0 < sum(row) < 7 for row in learns) and len({str(row) for row in learns}) == k
    for _ in range(2):
        torch.randperm(7, generator=generator)
    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        noises = torch.randn(k, 2 * len(order), generator=generator).tolist()
        losses, stds, errors = [], [], []
        for side, response in enumerate(("chosen", "rejected")):
            for place, pair in enumerate(order.tolist()):
                text = PAIRS[pair]["prompt"] + PAIRS[pair][response]
                out = slow.heads.weight @ naive_hidden(slow.trunk, text)[-1] + slow.heads.bias
                with torch.no_grad():
                    target = model.score(naive_hidden(model.trunk, text)[-1])[0]
                    target = ((target - model.mean) / model.std).item()
                for head in range(k):
                    if not learns[head][pair]:
                        continue
                    mean = out[head]
                    std = torch.log(1 + torch.exp(out[k + head])) + 1e-4
                    if kind == "mse":
                        losses.append((mean + std * noises[head][side * len(order) + place] - target) ** 2)
                    else:
                        losses.append(0.5 * ((target - mean) / std) ** 2 + torch.log(std))
                    stds.append(std.item())
                    errors.append((mean.item() - target) ** 2)
        loss = sum(losses) / len(losses)
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in slow.parameters() if p.grad is not None))
        norms.append(norm)
        for p in slow.parameters():
            if p.grad is not None:
                p.grad /= max(1.0, norm)
        adam.param_groups[0]["lr"] = 0.01 * (6 - step) / 6
        adam.step()
        assert list(row) == ["step", "loss", "std", "error"]
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        assert row["std"] == pytest.approx(sum(stds) / len(stds), rel=1e-4)
        assert row["error"] == pytest.approx(math.sqrt(sum(errors) / len(errors)), rel=1e-4)
    assert max(norms) > 1
    for name, w in heads.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


@pytest.mark.parametrize("kind, share", [("mae", 0.5), ("mse", 0.0)])
def test_heads_refuse_other_losses_and_shares(kind, share):
    """Bug: a misspelt loss that falls through to the likelihood, and heads that learn from nothing."""
    with pytest.raises(ValueError, match='"mse" or "nll" on a share in'):
        next(train_brme(tiny_heads(), tiny_reward_model(), PAIRS, kind, share, config(), seed=0))


def test_nominal_and_robust_reward_equal_a_loop():
    """
    Bug: the head with the highest std, one head for the whole batch, the mean or the maximum of the means for their
    minimum, and the two ends of lam exchanged.
    """
    means, stds = noise(0, 4, 9), noise(1, 4, 9).abs()
    for b in range(9):
        surest = stds[:, b].tolist().index(min(stds[:, b].tolist()))
        close(nominal(means, stds)[b], means[surest, b])
        for lam in (0.0, 0.3, 1.0):
            expected = lam * means[surest, b] + (1 - lam) * min(means[:, b].tolist())
            close(robust_reward(means, stds, lam)[b], expected)
    assert len(set(stds.argmin(dim=0).tolist())) > 1
    with pytest.raises(ValueError, match="lam must be between 0 and 1"):
        robust_reward(means, stds, 1.1)


def test_robust_reward_module_is_its_formula():
    """Bug: a lam that is not passed on."""
    heads, batch = tiny_heads(3), random_batch(0)
    for lam in (0.0, 0.4, 1.0):
        close(RobustReward(heads, lam)(batch), robust_reward(*heads(batch), lam))
    assert score_batches(RobustReward(heads, 0.4), [batch, batch]).shape == (2 * len(batch),)
