"""
Tests of robust.py: ensembles and BRME against loops, closed forms and one reward model alone.

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
    PAIRS,
    E,
    close,
    naive_hidden,
    noise,
    poison,
    random_batch,
    rows_of,
    tiny_gpt,
    unchanged,
    weights,
)

import ppo
import robust
from checks import CanaryError
from data import collate_pairs
from reward import RewardModel, normalise, score_batches, score_pairs, train_reward_model
from robust import (
    Ensemble,
    GaussianHeads,
    RobustReward,
    aggregate,
    brme_loss,
    gaussian_nll,
    nominal,
    robust_reward,
    train_brme,
    train_ensemble,
)

ROUNDING = 2e-6  # scores are float32
SETTINGS = dict(reward_epochs=2, batch_size=3, reward_lr=1e-3, weight_decay=0.1)


def config(**changes):
    return SimpleNamespace(**{**SETTINGS, **changes})


def tiny_reward_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return RewardModel(tiny_gpt(seed)).to(dtype)


# ---- ensembles -------------------------------------------------------------------------------------------------------

def test_aggregate_equals_a_loop():
    """
    Catches the standard deviation or the sample variance for the population variance, a bonus for a penalty, the
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


def test_aggregate_is_conservative():
    """Catches an optimist: wco and uwo are never above the mean, and equal it where all members agree."""
    scores = noise(1, 5, 40)
    agreed = noise(2, 1, 40).expand(5, 40)
    for how in ("wco", "uwo"):
        assert (aggregate(scores, how) < aggregate(scores, "mean")).all()
        close(aggregate(agreed, how), agreed[0])


@pytest.mark.parametrize("how, lam", [("min", 0.5), ("uwo", -0.1)])
def test_aggregate_refuses_what_it_does_not_know(how, lam):
    """Catches a misspelt name that gives another aggregate, and a negative lam, which rewards disagreement."""
    with pytest.raises(ValueError, match="aggregated by mean, wco or uwo with lam at least 0"):
        aggregate(torch.zeros(2, 3), how, lam)


def test_ensemble_aggregates_members_in_their_own_units():
    """Catches one normalisation for all members, aggregation before it, and a `how` or `lam` that is not passed on."""
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


def test_ensemble_of_one_is_that_one():
    """Catches a correction where nobody disagrees: with one member every aggregate is its score to the bit."""
    member, batch = tiny_reward_model(), random_batch(0)
    normalise(member, [batch])
    for how in ("mean", "wco", "uwo"):
        assert torch.equal(Ensemble([member], how)(batch), member(batch))


def test_members_have_seeds_of_their_own():
    """
    Catches members that are copies, that share a head, an order or a trunk, and a use of the caller's random numbers.

    Each member is the reward model that its seed gives alone. Ensembles with other seeds share no member with it.
    """
    trunk, rows = tiny_gpt(0).requires_grad_(False), []
    settings = config(reward_epochs=1)
    before, state = weights(trunk), torch.get_rng_state()
    members = train_ensemble(trunk, PAIRS, PAD, 3, settings, seed=2, log=lambda **row: rows.append(row))
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(trunk, before)
    assert [row["member"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    for i, member in enumerate(members):
        torch.manual_seed(6 + i)
        alone = RewardModel(trunk).double().requires_grad_(True)
        train_reward_model(alone, PAIRS, PAD, settings, seed=6 + i)
        assert unchanged(member, weights(alone))
    others = train_ensemble(trunk, PAIRS, PAD, 3, settings, seed=1)
    assert len({tuple(member.score.weight.flatten().tolist()) for member in members + others}) == 6


def test_an_ensemble_can_reward_ppo():
    """Catches a reward that PPO cannot use. An ensemble of one gives the policy that its member gives, to the bit."""
    member = tiny_reward_model(7)
    settings = SimpleNamespace(ppo_iterations=2, ppo_batch=8, minibatch=8, ppo_epochs=1, ppo_lr=1e-2, critic_lr=1e-2,
                               beta=0.2, gamma=1.0, lam=0.95, clip=0.2, value_clip=0.2, temperature=1.0,
                               response_tokens=5)

    def train(reward_model):
        policy, critic = tiny_gpt(0), copy.deepcopy(member)
        ppo.train_ppo(policy, critic, tiny_gpt(0), reward_model, [[1, 2, 3], [4], [5, 6]], settings, seed=0)
        return policy

    policy = train(Ensemble([member], "wco"))
    assert unchanged(policy, weights(train(member)))
    assert not unchanged(policy, weights(tiny_gpt(0)))


# ---- BRME: heads with a mean and a standard deviation ----------------------------------------------------------------

def tiny_heads(k=3, dtype=torch.float64):
    torch.manual_seed(0)
    return GaussianHeads(tiny_gpt(0), k).to(dtype)


def test_heads_are_linear_in_the_last_hidden_state():
    """
    Catches means and stds exchanged or interleaved, a std that is not positive, a hidden state that is read at a pad,
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
    Catches noise that is not scaled by the std, and a target for each head. Shows the trap of the loss.

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
    """Catches a variance for a std, and a missing half or logarithm: it is PyTorch's Gaussian without its constant."""
    means, stds, target = noise(0, 3, 5), noise(1, 3, 5).abs() + 0.1, noise(2, 5)
    log_prob = torch.distributions.Normal(means, stds).log_prob(target)
    close(gaussian_nll(means, stds, target), -log_prob.mean() - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_mse_drives_every_std_to_0_and_likelihood_finds_the_spread(kind):
    """
    Shows the trap of BRME, and that the likelihood avoids it.

    Two heads of one mean and one std each learn rewards of spread 0.7 around 0.4. With the squared error the std goes
    to 0, though the error of the mean stays 0.7. With the likelihood it converges to the spread.
    """
    target, generator = 0.4 + 0.7 * noise(0, 400), torch.Generator().manual_seed(0)
    mean = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    raw = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([mean, raw], lr=0.1)
    for _ in range(250):
        means, stds = mean.expand(2, 400), nn.functional.softplus(raw).expand(2, 400)
        if kind == "mse":
            loss = brme_loss(means, stds, target, torch.randn(2, 400, dtype=torch.float64, generator=generator))
        else:
            loss = gaussian_nll(means, stds, target)
        adam.zero_grad()
        loss.backward()
        adam.step()
    close(mean[:, 0].detach(), [target.mean()] * 2, 0.05)
    std = nn.functional.softplus(raw).detach()
    if kind == "mse":
        assert std.max() < 0.05
    else:
        close(std[:, 0], [target.std(correction=0)] * 2, 0.01)


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_heads_learn_their_own_pairs_and_the_scores_of_those(monkeypatch, kind):
    """
    Catches targets of other responses (P44), the same pairs for all heads, a subset that is drawn again in every epoch,
    a pair that no head learns from, chosen without rejected, and a wrong metric.

    With frozen weights, every (mean, std, target) that reaches the loss is looked up among the outputs of the heads and
    of the reward model.
    """
    heads, model = tiny_heads(3), tiny_reward_model(1)
    batch = collate_pairs(PAIRS, PAD)  # 14 responses, the partner of each is 7 rows away
    normalise(model, [batch])
    with torch.no_grad():
        means, stds = heads(batch)
        scores = model(batch)
    name = "brme_loss" if kind == "mse" else "gaussian_nll"
    original, seen, rows = getattr(robust, name), [], []

    def spy(mean, std, target, *noises):
        found = set()
        for m, s, t in zip(mean.tolist(), std.tolist(), target.tolist()):
            head, response = divmod((means - m).abs().argmin().item(), 14)
            close([m, s, t], [means[head, response], stds[head, response], scores[response]], 1e-5)
            found.add((head, response))
        assert len(found) == len(mean)
        assert all((head, (response + 7) % 14) in found for head, response in found)  # both sides of each pair
        loss = original(mean, std, target, *noises)
        error = (mean - target).square().mean().sqrt()
        seen.append((found, dict(loss=loss.item(), std=std.mean().item(), error=error.item())))
        return loss

    monkeypatch.setattr(robust, name, spy)
    train_brme(heads, model, PAIRS, PAD, kind, 0.4, config(reward_lr=1e-30), seed=1, log=lambda **row: rows.append(row))
    assert len(seen) == len(rows) == 6
    for step, (row, (_, metrics)) in enumerate(zip(rows, seen)):
        assert row == pytest.approx(dict(step=step, **metrics))
    first_epoch = set().union(*[found for found, _ in seen[:3]])
    second_epoch = set().union(*[found for found, _ in seen[3:]])
    assert first_epoch == second_epoch
    assert {response for _, response in first_epoch} == set(range(14))
    subsets = [{response for head, response in first_epoch if head == i} for i in range(3)]
    assert all(0 < len(subset) < 14 for subset in subsets)
    assert subsets[0] != subsets[1] != subsets[2] != subsets[0]


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_training_of_heads_equals_a_slow_replay(monkeypatch, kind):
    """
    Catches the other kind of loss, a share that is not passed on, heads that learn from what they should not, noise
    without effect or the same in every step, a learning rate that does not fall, gradients that are not cleared or not
    clipped, weight decay that is not passed on, and metrics after the step.

    The order of the pairs is recorded, and the random numbers are drawn again. All the rest is computed in float64,
    one head and one response at a time.
    """
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 3, 2)
        for _ in range(epochs):
            orders.extend(torch.randperm(n, generator=generator).split(size))
        return orders

    monkeypatch.setattr(robust, "minibatches", recorded)
    k, share, seed = 3, 0.8, 5
    model = tiny_reward_model(1)
    normalise(model, [collate_pairs(PAIRS, PAD)])
    heads = tiny_heads(k)
    with torch.no_grad():
        heads.heads.bias[k:] = 1.0  # noise of this size moves the loss
    slow, rows = copy.deepcopy(heads), []
    settings = config(reward_lr=0.01, weight_decay=0.3)
    train_brme(heads, model, PAIRS, PAD, kind, share, settings, seed, log=lambda **row: rows.append(row))
    assert len(orders) == len(rows) == 6

    generator = torch.Generator().manual_seed(seed)
    learns = (torch.rand(k, 7, generator=generator) < share).tolist()
    for pair, head in enumerate(torch.randint(k, (7,), generator=generator).tolist()):
        learns[head][pair] = True
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
        assert set(row) == {"step", "loss", "std", "error"}
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        assert row["std"] == pytest.approx(sum(stds) / len(stds), rel=1e-4)
        assert row["error"] == pytest.approx(math.sqrt(sum(errors) / len(errors)), rel=1e-4)
    assert max(norms) > 1
    for name, w in heads.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def preferences(n):
    """Pairs of random texts. The chosen response is the one with the token 3."""
    generator = torch.Generator().manual_seed(0)

    def tokens():
        n = int(torch.randint(1, 4, (), generator=generator))
        return torch.randint(4, 9, (n,), generator=generator).tolist()

    return [dict(prompt=tokens(), chosen=[*tokens(), 3, E], rejected=[*tokens(), E]) for _ in range(n)]


@pytest.mark.slow
def test_heads_learn_the_scores():
    """Catches heads that do not learn, and a reward model that is trained too. "mse" leaves lower stds than "nll"."""
    model, pairs, std_by_error = tiny_reward_model(1, torch.float32), preferences(40), {}
    batch = collate_pairs(pairs, PAD)
    normalise(model, [batch])
    before = weights(model)
    settings = config(reward_epochs=20, batch_size=20, reward_lr=0.01)
    for kind in ("mse", "nll"):
        heads, rows = tiny_heads(2, torch.float32), []
        train_brme(heads, model, pairs, PAD, kind, 0.5, settings, seed=0, log=lambda rows=rows, **row: rows.append(row))
        assert [row["step"] for row in rows] == list(range(40))
        assert rows[-1]["error"] < 0.5 * rows[0]["error"]
        assert rows[-1]["loss"] < rows[0]["loss"]
        std_by_error[kind] = rows[-1]["std"] / rows[-1]["error"]
        means, _ = heads(batch)
        target = torch.cat(score_pairs(model, pairs, PAD))
        assert (means - target).square().mean().sqrt() < 0.7  # the scores have a standard deviation of 1
    assert unchanged(model, before)
    assert std_by_error["mse"] < std_by_error["nll"]


def test_heads_are_seeded():
    """Catches draws that the seed does not decide: one seed gives one result, and another seed gives another."""
    results = []
    for seed in (0, 0, 1):
        heads = tiny_heads()
        train_brme(heads, tiny_reward_model(), PAIRS, PAD, "mse", 0.5, config(reward_epochs=1), seed)
        results.append(heads)
    assert unchanged(results[1], weights(results[0]))
    assert not unchanged(results[2], weights(results[0]))


@pytest.mark.parametrize("kind, share", [("mae", 0.5), ("mse", 0.0), ("nll", 1.2)])
def test_heads_refuse_other_losses_and_shares(kind, share):
    """Catches a misspelt loss that falls through to the likelihood, and heads that learn from nothing."""
    with pytest.raises(ValueError, match='"mse" or "nll" on a share in'):
        train_brme(tiny_heads(), tiny_reward_model(), PAIRS, PAD, kind, share, config(), seed=0)


def test_canary_for_heads_that_read_pads(monkeypatch):
    """Catches the hidden state of the last column, which is a pad in all rows but the longest."""
    monkeypatch.setattr(robust, "last_hidden", lambda trunk, batch: trunk.hidden(batch.ids, batch.start)[:, -1])
    with pytest.raises(CanaryError, match="the padding changes the result"):
        train_brme(tiny_heads(), tiny_reward_model(), PAIRS, PAD, "nll", 1.0, config(), seed=0)


@pytest.mark.parametrize("kind", ["mse", "nll"])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, kind):
    """Catches a diverged run that goes on with NaN. The canary comes before the step, so the weights are not lost."""
    heads, name = tiny_heads(), "brme_loss" if kind == "mse" else "gaussian_nll"
    original, before = getattr(robust, name), weights(heads)
    monkeypatch.setattr(robust, name, lambda *inputs: original(*inputs) * math.nan)
    with pytest.raises(CanaryError, match="heads' loss is nan.*lower the learning rate"):
        train_brme(heads, tiny_reward_model(), PAIRS, PAD, kind, 1.0, config(), seed=0)
    assert unchanged(heads, before)


def test_nominal_and_robust_reward_equal_a_loop():
    """
    Catches the head with the highest std, one head for the whole batch, the mean or the maximum of the means for their
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
    for lam in (-0.1, 1.1):
        with pytest.raises(ValueError, match="lam must be between 0 and 1"):
            robust_reward(means, stds, lam)


def test_the_worst_case_of_each_response_is_below_that_of_the_batch():
    """
    Catches min E[r] for E[min r].

    What is maximised is a lower bound of the paper's worst case. They are equal where one head is always the lowest.
    """
    means, stds = noise(0, 4, 50), torch.ones(4, 50, dtype=torch.float64)
    assert robust_reward(means, stds, 0.0).mean() < means.mean(dim=1).min() - 0.1
    ordered = noise(1, 1, 50) + torch.arange(4)[:, None]
    close(robust_reward(ordered, stds, 0.0).mean(), ordered.mean(dim=1).min())


def test_robust_reward_module_is_its_formula():
    """Catches a lam that is not passed on."""
    heads, batch = tiny_heads(3), random_batch(0)
    for lam in (0.0, 0.4, 1.0):
        close(RobustReward(heads, lam)(batch), robust_reward(*heads(batch), lam))
    assert score_batches(RobustReward(heads, 0.4), [batch, batch]).shape == (2 * len(batch),)
