"""Tests of reward.py: Bradley-Terry against closed forms, the model's scores and values against the textbook GPT, the loop against a slow replay."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from helpers import PAD, PAIRS, VOCAB, E, close, double, few, make_batch, naive_hidden, noise, poison, random_batch, rows_of, tiny_gpt
from hypothesis import given
from hypothesis import strategies as st

import mdp
import reward
from evaluate import CanaryError
from reward import (
    Ensemble,
    GaussianHeads,
    RewardModel,
    RobustReward,
    aggregate,
    bradley_terry_loss,
    brme_loss,
    collate_pairs,
    contrastive,
    gaussian_nll,
    nominal,
    normalise,
    rating_loss,
    robust_reward,
    score_batches,
    score_pairs,
    train_brme,
    train_ensemble,
    train_reward_model,
)

SCORES = 2e-6  # scores are float32


def tiny_reward_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return RewardModel(tiny_gpt(seed)).to(dtype)


@torch.no_grad()
def slow_score(model, prompt, response):
    """The score of one text, without padding: the head's dot product with the last hidden state."""
    x = naive_hidden(model.trunk, list(prompt) + list(response))[-1]
    return ((x * model.score.weight[0]).sum() + model.score.bias[0] - model.mean) / model.std


# ---------------------------------------------------------------------------------------------------------------------
# Bradley-Terry

def test_loss_equals_its_formula():
    """A sign, the logarithm to another base, a sum in place of the mean."""
    a, b = noise(0, 6), noise(1, 6)
    close(bradley_terry_loss(a, b), sum(-math.log(1 / (1 + math.exp(y - x))) for x, y in zip(a.tolist(), b.tolist())) / 6)


def test_loss_of_equal_scores_is_log_2_with_gradient_a_half():
    """P47: a loss that is 0, or flat, where the model cannot tell two responses apart."""
    a, b = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(a, b)
    loss.backward()
    close(loss.item(), math.log(2), 1e-14)
    close(a.grad, [-0.5 / 4] * 4)
    close(b.grad, [0.5 / 4] * 4)


def test_swapping_the_two_responses():
    """P50: the label order. -log sigmoid(x) + log sigmoid(-x) = -x, and the right order costs less."""
    for x in (0.3, 2.0, -5.0, 30.0):
        there, back = bradley_terry_loss(double([x]), double([0.0])), bradley_terry_loss(double([0.0]), double([x]))
        close(there - back, -x)
        assert (there < back) == (x > 0)


def test_a_constant_added_to_all_scores_changes_nothing():
    """P51: scores that are not used as a difference only, such as a centring penalty left in."""
    a, b = noise(0, 6), noise(1, 6)
    close(bradley_terry_loss(a + 50, b + 50, 0.3), bradley_terry_loss(a, b, 0.3))


def test_margin_is_subtracted():
    """A margin added instead of subtracted: asking for more must cost more, as if the chosen score were lower by it."""
    a, b = noise(0, 6), noise(1, 6)
    close(bradley_terry_loss(a, b, 0.7), bradley_terry_loss(a - 0.7, b))
    assert bradley_terry_loss(a, b, 0.7) > bradley_terry_loss(a, b, 0.0)
    close(bradley_terry_loss(a, b), bradley_terry_loss(a, b, 0.0))
    close(bradley_terry_loss(a, b, double([1, 2, 3, 4, 5, 6])), bradley_terry_loss(a - double([1, 2, 3, 4, 5, 6]), b))  # one for each pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_of_minus_100_costs_100(dtype):
    """P47: log(sigmoid(-100)) is -inf in float32, and its gradient NaN."""
    a = torch.tensor([-100.0], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(1, dtype=dtype))
    loss.backward()
    close(loss.item(), 100)
    close(a.grad, [-1.0])


@few
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=6), st.floats(0, 10))
def test_loss_is_finite_and_bounded_by_the_hinge(pairs, margin):
    """Any finite scores that make it NaN, infinite or negative: max(0, -x) <= -log sigmoid(x) <= max(0, -x) + log 2."""
    a, b = (torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*pairs))
    loss = bradley_terry_loss(a, b, margin)
    gradients = torch.autograd.grad(loss, (a, b))
    hinge = (b - a + margin).clamp(min=0).mean().item()
    assert hinge - 1e-9 <= loss.item() <= hinge + math.log(2) + 1e-9
    assert all(torch.isfinite(g).all() for g in gradients) and (gradients[0] <= 0).all() and (gradients[1] >= 0).all()


def test_weight_decay_is_a_gaussian_prior():
    """The MAP view: a sum taken for a mean, or a wrong sign, moves the mode. One weight, scores w x: bisection finds where the slope of
    N loss + w^2 / (2 s^2) vanishes, and descent on the loss must end there."""
    a, b, s = noise(0, 8), noise(1, 8), 0.7

    def slope(w):
        return sum(-d / (1 + math.exp(w * d)) for d in (a - b).tolist()) + w / s ** 2

    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(8 * bradley_terry_loss(w * a, w * b) + w ** 2 / (2 * s ** 2), w)
        w = (w - 0.05 * gradient).detach().requires_grad_()
    assert abs(low) > 0.05
    close(w.item(), low)


def test_two_labels_that_disagree_leave_the_score_at_the_log_odds():
    """The likelihood: preferred 3 times out of 4, a response earns log 3 more than the other."""
    difference = torch.tensor(math.log(3), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    loss = bradley_terry_loss(torch.stack([difference, difference, difference, zero]), torch.stack([zero, zero, zero, difference]))
    (gradient,) = torch.autograd.grad(loss, difference)
    assert abs(gradient.item()) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# ratings, and rewards relative to a baseline

def test_rating_loss_equals_its_formula():
    """A half, a sum, a root; and (B,) against (B, 1), which broadcasts to B^2 differences in silence."""
    a, b = noise(0, 6), noise(1, 6)
    close(rating_loss(a, b), sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist())) / 6)
    with pytest.raises(ValueError, match=r"every score has a rating, got shapes \(6,\) and \(6, 1\)"):
        rating_loss(a, b[:, None])


def test_contrastive_by_hand():
    """A mean over the batch in place of the prompt's own, a sum, or a sign."""
    close(contrastive(double([1, 2]), double([[0, 3, 6], [1, 1, 4]])), [-2, 0])
    for baseline in (torch.zeros(3), torch.zeros(3, 2), torch.zeros(())):
        with pytest.raises(ValueError, match="k scores for each of 2 prompts"):
            contrastive(torch.zeros(2), baseline)


def test_contrastive_leaves_the_optimum_of_every_prompt():
    """A baseline that depends on the response: on the tree, solved exactly, the best policy is the same and J* falls by the baseline's mean."""
    tree = mdp.Tree(3, 3)
    for prompt in range(2):
        ref, rewards, baseline = noise(prompt, tree.S, 3), noise(10 + prompt, tree.Y), 3 * prompt + noise(20 + prompt, 4)
        plain, relative = (mdp.solve(tree, ref, r, 0.4) for r in (rewards, contrastive(rewards, baseline.expand(tree.Y, 4))))
        close(relative.logp, plain.logp)
        close(relative.J, plain.J - sum(baseline.tolist()) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# the model

def test_head_starts_with_a_standard_deviation_of_one_over_root_c_plus_1():
    """A head of standard initialisation (1/sqrt(3C), uniform) or 1/sqrt(C): over 600 heads of C = 3 the spread is 0.5, and every bias is 0."""
    trunk = nn.Module()
    trunk.config = SimpleNamespace(n_embd=3)
    torch.manual_seed(0)
    heads = [RewardModel(trunk).score for _ in range(600)]
    drawn = torch.cat([head.weight.detach().flatten() for head in heads])
    assert heads[0].weight.shape == (1, 3) and abs(drawn.mean()) < 0.05
    assert drawn.std().item() == pytest.approx(4 ** -0.5, rel=0.06)  # 3 standard errors; 1/sqrt(3) is 15% away
    assert drawn.abs().max() > 1.2  # normal, not uniform
    assert all((head.bias == 0).all() for head in heads)


def test_model_starts_unscaled_with_a_trunk_of_its_own():
    """P74: a trunk shared with the policy, that the reward's training would change; a normalisation that is on before it was measured."""
    trunk = tiny_gpt(0)
    model = RewardModel(trunk)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in trunk.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(model.trunk.parameters(), trunk.parameters()))
    assert model.mean.item() == 0 and model.std.item() == 1


def test_score_is_read_at_the_last_real_token():
    """P46: the score of a pad, of the column before, or of the last column, in batches with pads left and right, none, and responses of no tokens."""
    model = tiny_reward_model()
    model.mean.fill_(0.4), model.std.fill_(1.7)
    for batch in (random_batch(0), random_batch(1, min_response=0), random_batch(2, P=9, R=10), make_batch([[1, 2]], [[3, E]])):
        scores = model(batch)
        assert scores.shape == (len(batch),)
        close(scores, [slow_score(model, *row).item() for row in rows_of(batch)], SCORES)
        assert scores.std(correction=0) > 0.01 or len(batch) == 1


def test_score_does_not_depend_on_the_batch():
    """P46: a response is worth the same alone, beside longer ones, and whatever stands in its padding."""
    model, batch = tiny_reward_model(), random_batch(0, min_response=0)
    scores = model(batch)
    assert torch.equal(model(poison(batch)), scores)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        close(model(make_batch([prompt], [response], R=max(1, len(response)))), scores[row:row + 1], SCORES)


def test_a_real_token_with_the_pads_id_counts():
    """P6: lengths taken from ids != pad. A response whose first, or last, token has PAD's id is read to its real end."""
    model = tiny_reward_model()
    batch = make_batch([[1, 2], [1, 2], [PAD, 1]], [[PAD, 3, 4], [3, PAD], [3, 4]], R=5)
    close(model(batch), [slow_score(model, *row).item() for row in rows_of(batch)], SCORES)


def test_score_trains_the_whole_model():
    """A trunk that is detached or frozen: the gradient reaches every parameter that the texts touch."""
    model = tiny_reward_model()
    model(random_batch(0)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def slow_values(model, batch):
    out = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        for t in range(len(response)):
            out[row, t] = slow_score(model, prompt, response[:t])
    return out


def test_values_are_scores_of_the_text_before_each_token():
    """P2: a value shifted by one. V(s_t) is the score of prompt and the first t response tokens, so the first is read at the last prompt token;
    it is 0 at pads, bias or not."""
    model = tiny_reward_model()
    model.mean.fill_(0.4), model.std.fill_(1.7), nn.init.constant_(model.score.bias, 0.9)
    for batch in (random_batch(0), random_batch(1, min_response=0, R=10)):
        values = model.values(batch)
        close(values, slow_values(model, batch), SCORES)
        assert values.shape == batch.mask.shape and (values[~batch.mask] == 0).all() and (values[batch.mask] != 0).all()


def test_value_does_not_see_the_action():
    """P2: a critic that knows what will be sampled. Another token at t leaves V_0 .. V_t as they are and moves V_{t+1}."""
    model = tiny_reward_model()
    batch = make_batch([[1, 2, 3], [4]], [[5, 6, 7, 8], [1, 2, 3, 4]])
    values = model.values(batch)
    for t in range(4):
        other = make_batch([[1, 2, 3], [4]], rows_with(batch, t))
        moved = (model.values(other) - values).abs() > 1e-4
        assert not moved[:, :t + 1].any() and moved[:, t + 1:t + 2].all()


def rows_with(batch, t):
    """The responses with another token at column t."""
    return [response[:t] + [(response[t] + 1) % (VOCAB - 2)] + response[t + 1:] for _, response in rows_of(batch)]


def test_values_ignore_padding_and_train_the_critic():
    """P7: values that read what stands in the padding; a critic whose trunk is detached."""
    model, batch = tiny_reward_model(), random_batch(0, R=9)
    assert torch.equal(model.values(poison(batch)), model.values(batch))
    model.values(batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# normalisation

BATCHES = [random_batch(seed, B=4) for seed in range(3)]


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """P25: the sample standard deviation, statistics of the first batch only, shift and scale in the wrong order."""
    model = tiny_reward_model()
    raw = score_batches(model, BATCHES).double()
    normalise(model, BATCHES)
    scores = score_batches(model, BATCHES).double()
    close([scores.mean(), ((scores - scores.mean()) ** 2).mean().sqrt()], [0, 1], 1e-5)
    close(scores, (raw - raw.mean()) / raw.std(correction=0), 1e-5)
    assert torch.equal(scores.argsort(), raw.argsort())


def test_normalise_twice_is_normalise_once():
    """P25: statistics measured on scores that are normalised already, mean 0 and std 1, so that the second call undoes the first."""
    model = tiny_reward_model()
    normalise(model, BATCHES)
    once = score_batches(model, BATCHES)
    kept = model.mean.item(), model.std.item()
    normalise(model, BATCHES)
    close(score_batches(model, BATCHES), once, 1e-6)
    assert (model.mean.item(), model.std.item()) == pytest.approx(kept)
    assert abs(kept[0]) > 1e-3 and abs(kept[1] - 1) > 1e-3


def test_normalisation_reaches_values_and_survives_a_checkpoint(tmp_path):
    """P26: statistics that are not in the checkpoint, or that the critic does not use."""
    model = tiny_reward_model()
    before = model.values(BATCHES[0])
    normalise(model, BATCHES)
    mean, std = model.mean.item(), model.std.item()
    close(model.values(BATCHES[0]), torch.where(BATCHES[0].mask, (before - mean) / std, 0.0), 1e-5)
    torch.save(model.state_dict(), tmp_path / "reward.pt")
    other = tiny_reward_model(5)
    other.load_state_dict(torch.load(tmp_path / "reward.pt", weights_only=True))
    assert torch.equal(score_batches(other, BATCHES), score_batches(model, BATCHES)) and other.std.item() == std != 1
    assert not any(name in ("mean", "std") for name, _ in model.named_parameters())  # measured, not trained


def test_normalise_of_constant_scores_is_finite():
    """0 / 0: a reward model without any opinion."""
    model = tiny_reward_model()
    nn.init.zeros_(model.score.weight), nn.init.constant_(model.score.bias, 3.0)
    normalise(model, BATCHES)
    scores = score_batches(model, BATCHES)
    assert torch.isfinite(scores).all() and scores.abs().max() < 1e-3


def test_score_batches_keeps_the_order():
    """Batches in another order, or without the last; and a graph kept for nothing."""
    model = tiny_reward_model()
    scores = score_batches(model, BATCHES)
    close(scores, [slow_score(model, *row).item() for batch in BATCHES for row in rows_of(batch)], SCORES)
    assert not scores.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# pairs

def test_collate_pairs_puts_the_chosen_first():
    """P50: rows interleaved, or the rejected first, where the losses cut the batch in halves; a prompt beside another's response."""
    batch = collate_pairs(PAIRS, PAD)
    assert rows_of(batch) == [(pair["prompt"], pair["chosen"]) for pair in PAIRS] + [(pair["prompt"], pair["rejected"]) for pair in PAIRS]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 128])
def test_score_pairs_equals_scoring_each_response_alone(size):
    """P11: scores that depend on the partner or on the part; chosen and rejected exchanged, or mixed where the last part is smaller."""
    model = tiny_reward_model()
    chosen, rejected = score_pairs(model, PAIRS, PAD, size=size)
    close(chosen, [slow_score(model, pair["prompt"], pair["chosen"]).item() for pair in PAIRS], SCORES)
    close(rejected, [slow_score(model, pair["prompt"], pair["rejected"]).item() for pair in PAIRS], SCORES)


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def train(model, pairs=PAIRS, **settings):
    rows = []
    train_reward_model(model, pairs, PAD, **{**dict(epochs=2, batch_size=3, lr=1e-3), **settings}, log=lambda **row: rows.append(row))
    return rows


RATED = [dict(pair, gold=rating) for pair, rating in zip(PAIRS, noise(9, 7, 2).tolist())]


@pytest.mark.parametrize("fitted_to", ["bradley_terry", "ratings"])
def test_loop_equals_a_slow_replay(monkeypatch, fitted_to):
    """Labels turned round, ratings of other responses, pairs lost or repeated, gradients not cleared or clipped, a learning rate that does not fall,
    weight decay that is not passed on, an accuracy measured after the step. Only the order of the pairs is recorded."""
    orders = []

    def recorded(n, size, generator):
        assert (n, size) == (7, 3)
        orders.append(list(torch.randperm(n, generator=generator).split(size)))
        return orders[-1]

    monkeypatch.setattr(reward, "minibatches", recorded)
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight *= 6  # gradients long enough to be clipped
    slow = copy.deepcopy(model)
    rows = train(model, RATED, epochs=3, lr=0.01, weight_decay=0.3, loss=fitted_to)
    assert len(orders) == 3 and len(rows) == 9

    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    step, norms = 0, []
    for epoch, order in enumerate(orders):
        for batch in order:
            some = [RATED[i] for i in batch.tolist()]
            sides = [slow(make_batch([pair["prompt"] for pair in some], [pair[side] for pair in some])) for side in ("chosen", "rejected")]
            loss = torch.log(1 + torch.exp(sides[1] - sides[0])).mean()
            if fitted_to == "ratings":
                loss = sum((sides[s][i] - pair["gold"][s]) ** 2 for i, pair in enumerate(some) for s in (0, 1)) / (2 * len(some))
            adam.zero_grad()
            loss.backward()
            norms.append(math.sqrt(sum((p.grad ** 2).sum().item() for p in slow.parameters())))
            for p in slow.parameters():
                p.grad /= max(1.0, norms[-1])
            adam.param_groups[0]["lr"] = 0.01 * (9 - step) / 9
            adam.step()
            wins = sum((c > r) + 0.5 * (c == r) for c, r in zip(*[side.tolist() for side in sides]))
            assert set(rows[step]) == {"step", "epoch", "loss", "accuracy"} and (rows[step]["step"], rows[step]["epoch"]) == (step, epoch)
            assert rows[step]["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
            assert rows[step]["accuracy"] == pytest.approx(wins / len(some))
            step += 1
    assert max(norms) > 1 and (min(norms) < 1 or fitted_to == "ratings")
    for name, w in model.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_loop_is_seeded():
    """A seed that is not used: the same seed gives the same weights, another seed others, and epochs differ in their order."""
    models = [tiny_reward_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        train(model, seed=seed)
    a, b, c = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c)


def preferences(seed, n=24):
    """Pairs in which the response with the 3 in it is preferred."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(n):
        prompt, a, b = (torch.randint(4, 9, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist() for _ in range(3))
        pairs.append(dict(prompt=prompt, chosen=a + [3, E], rejected=b + [E]))
    return pairs


def test_model_learns_a_preference():
    """P50: a model that learns the opposite or nothing; on pairs that it has not seen the chosen response scores higher."""
    model = tiny_reward_model(0, torch.float32)
    rows = train(model, preferences(0), epochs=12, batch_size=12, lr=0.01)
    assert rows[-1]["loss"] < 0.1 < 0.4 < rows[0]["loss"] and rows[-1]["accuracy"] == 1
    chosen, rejected = score_pairs(model, preferences(1), PAD)
    assert (chosen > rejected).double().mean() > 0.95


@pytest.mark.parametrize("pairs, fitted_to", [(RATED, "mse"), (PAIRS, "ratings"), (RATED[:3] + PAIRS[3:], "ratings")])
def test_unknown_losses_and_missing_ratings_are_refused(pairs, fitted_to):
    """Bradley-Terry in place of a loss that was misspelt, or a traceback in the middle of the training."""
    with pytest.raises(ValueError, match='"ratings" of pairs with "gold"'):
        train(tiny_reward_model(), pairs, loss=fitted_to)


def test_canary_for_a_model_that_reads_pads(monkeypatch):
    """P46 planted: the score of the last column, a pad for all but the longest."""
    def last_column(model, batch):
        return model.score(model.trunk.hidden(batch.ids, batch.prompt_lens, None, batch.P)[:, -1]).squeeze(-1)

    model = tiny_reward_model()
    before = model.score.weight.detach().clone()
    monkeypatch.setattr(RewardModel, "forward", last_column)
    with pytest.raises(CanaryError, match="what stands in the padding"):
        train(model)
    assert torch.equal(model.score.weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, value):
    """A diverged run that goes on with NaN weights."""
    model = tiny_reward_model()
    before = model.score.weight.detach().clone()
    monkeypatch.setattr(reward, "bradley_terry_loss", lambda *inputs: bradley_terry_loss(*inputs) * value)
    with pytest.raises(CanaryError, match="reward model's loss is (nan|inf).*lower --reward-lr"):
        train(model)
    assert torch.equal(model.score.weight, before)


# ---------------------------------------------------------------------------------------------------------------------
# ensembles

def test_aggregate_equals_a_loop():
    """The standard deviation or the sample variance for the population variance, a bonus for a penalty, the maximum for the minimum, a mean over
    responses for one over members."""
    scores = 2 * noise(0, 4, 6)
    for lam in (0.0, 0.1, 0.5, 2.0):
        for b, column in enumerate(scores.T.tolist()):
            m = sum(column) / 4
            for how, expected in (("mean", m), ("wco", sorted(column)[0]), ("uwo", m - lam * sum((r - m) ** 2 for r in column) / 4)):
                close(aggregate(scores, how, lam)[b], expected)
    close(aggregate(scores, "uwo"), aggregate(scores, "uwo", 0.5))


def test_aggregate_is_conservative():
    """A pessimist who hopes: the worst case and the penalised mean are never above the mean, and are the mean where all members agree."""
    scores = noise(1, 5, 40)
    mean = aggregate(scores, "mean")
    agreed = noise(2, 1, 40).expand(5, 40)
    for how in ("wco", "uwo"):
        assert (aggregate(scores, how) < mean).all()
        close(aggregate(agreed, how), agreed[0])


@pytest.mark.parametrize("how, lam", [("min", 0.5), ("uwo", -0.1)])
def test_aggregate_refuses_what_it_does_not_know(how, lam):
    """A misspelt name that falls through to the mean, a negative lam that rewards dispute."""
    with pytest.raises(ValueError, match="aggregated by mean, wco or uwo with lam at least 0"):
        aggregate(torch.zeros(2, 3), how, lam)


def test_ensemble_aggregates_members_in_their_own_units():
    """Members with the normalisation of one of them, or aggregated before they are normalised; an aggregation or a lam that is not passed on."""
    members = [tiny_reward_model(seed) for seed in range(3)]
    for member in members:
        normalise(member, BATCHES)
    slow = torch.stack([torch.stack([slow_score(member, *row) for row in rows_of(BATCHES[0])]) for member in members])  # (k, B)
    close(Ensemble(members).member_scores(BATCHES[0]), slow, 1e-5)
    for how, lam in (("mean", 0.5), ("wco", 0.5), ("uwo", 0.5), ("uwo", 2.0)):
        close(Ensemble(members, how, lam)(BATCHES[0]), aggregate(slow, how, lam), 1e-5)
        close(score_batches(Ensemble(members, how, lam), BATCHES)[:4], aggregate(slow, how, lam), 1e-5)


def test_ensemble_of_one_is_that_one():
    """A correction that is on where nobody disagrees: with one member every aggregation is its score to the bit."""
    member = tiny_reward_model()
    normalise(member, BATCHES)
    for how in ("mean", "wco", "uwo"):
        assert torch.equal(Ensemble([member], how)(BATCHES[0]), member(BATCHES[0]))


def test_members_have_seeds_of_their_own():
    """Members that are copies, or that share a head or an order; one trunk that all of them train; the caller's random numbers moved on. Every member
    is the reward model that its seed gives alone, and ensembles with other seeds have none in common."""
    trunk, rows, settings = tiny_gpt(0).requires_grad_(False), [], dict(epochs=1, batch_size=3, lr=1e-3)
    before, state = copy.deepcopy(trunk.state_dict()), torch.get_rng_state()
    members = train_ensemble(trunk, PAIRS, PAD, k=3, seed=2, log=lambda **row: rows.append(row), **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[name]) for name, w in trunk.state_dict().items())
    assert [row["member"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    for i, member in enumerate(members):
        torch.manual_seed(6 + i)
        alone = RewardModel(trunk).double().requires_grad_(True)
        train_reward_model(alone, PAIRS, PAD, seed=6 + i, **settings)
        assert all(torch.equal(w, alone.state_dict()[name]) for name, w in member.state_dict().items())
    others = train_ensemble(trunk, PAIRS, PAD, k=3, seed=1, **settings)
    assert len({tuple(member.score.weight.flatten().tolist()) for member in members + others}) == 6


# ---------------------------------------------------------------------------------------------------------------------
# heads that say how sure they are

def tiny_heads(k=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return GaussianHeads(tiny_gpt(seed), k).to(dtype)


def test_heads_are_linear_in_the_last_hidden_state():
    """Means and stds exchanged or interleaved, a std that is negative, a score read at a pad, a trunk that is shared with the caller's."""
    heads, batch = tiny_heads(3), random_batch(0)
    means, stds = heads(batch)
    assert means.shape == stds.shape == (3, len(batch)) and (stds > 0).all()
    with torch.no_grad():
        for b, (prompt, response) in enumerate(rows_of(batch)):
            out = heads.heads.weight @ naive_hidden(heads.trunk, prompt + response)[-1] + heads.heads.bias
            close(means[:, b], out[:3], SCORES)
            close(stds[:, b], [math.log(1 + math.exp(x)) + 1e-4 for x in out[3:].tolist()], SCORES)
    assert all(torch.equal(a, b) for a, b in zip(heads(poison(batch)), (means, stds)))
    trunk = tiny_gpt(0)
    assert not {p.data_ptr() for p in GaussianHeads(trunk, 2).parameters()} & {p.data_ptr() for p in trunk.parameters()}
    with torch.no_grad():
        heads.heads.bias[3:] = -1e4
    assert (heads(batch)[1] > 0).all()  # however sure, the likelihood stays finite


def test_brme_loss_by_hand_and_on_average():
    """Noise that is not scaled by the std, a target for each head; and the trap: noise of +1 and -1 has mean 0 and variance 1, and over both the loss
    is the mean of (mean - target)^2 + std^2."""
    means, stds, target, noises = noise(0, 3, 5), noise(1, 3, 5).abs(), noise(2, 5), noise(3, 3, 5)
    close(brme_loss(means, stds, target, noises), sum((means[i, b] + stds[i, b] * noises[i, b] - target[b]) ** 2 for i in range(3) for b in range(5)) / 15)
    one = torch.ones(3, 5, dtype=torch.float64)
    average = (brme_loss(means, stds, target, one) + brme_loss(means, stds, target, -one)) / 2
    close(average, sum((means[i, b] - target[b]) ** 2 + stds[i, b] ** 2 for i in range(3) for b in range(5)) / 15)


def test_gaussian_nll_is_the_density():
    """A variance for a std, a lost half or logarithm: torch's own Gaussian, without its constant."""
    means, stds, target = noise(0, 3, 5), noise(1, 3, 5).abs() + 0.1, noise(2, 5)
    close(gaussian_nll(means, stds, target), -torch.distributions.Normal(means, stds).log_prob(target).mean() - 0.5 * math.log(2 * math.pi))


def test_mse_drives_every_std_to_0_and_likelihood_finds_the_spread():
    """The trap of BRME. Two heads of one mean and one std each see rewards of spread 0.7 around 0.4: by MSE the std goes to 0 though the error stays
    0.7, by likelihood it is the spread of the sample."""
    target, generator = 0.4 + 0.7 * noise(0, 400), torch.Generator().manual_seed(0)
    for sampled in (True, False):
        mean, raw = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True), torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([mean, raw], lr=0.1)
        for _ in range(250):
            means, stds = mean.expand(2, 400), nn.functional.softplus(raw).expand(2, 400)
            draws = torch.randn(2, 400, dtype=torch.float64, generator=generator)
            loss = brme_loss(means, stds, target, draws) if sampled else gaussian_nll(means, stds, target)
            adam.zero_grad()
            loss.backward()
            adam.step()
        close(mean[:, 0].detach(), [target.mean()] * 2, 0.05)
        std = nn.functional.softplus(raw).detach()
        if sampled:
            assert std.max() < 0.05
        else:
            close(std[:, 0], [target.std(correction=0)] * 2, 0.01)


@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_heads_learn_their_own_pairs_and_the_scores_of_those(monkeypatch, loss):
    """P44: targets of other responses, all heads on the same pairs, a subset that is drawn anew in every epoch, a pair that no head sees, chosen and
    rejected apart. With frozen weights every (mean, target) that reaches the loss is looked up among what the heads and the reward model say."""
    heads, model = tiny_heads(3), tiny_reward_model(1)
    normalise(model, BATCHES)
    batch = collate_pairs(PAIRS, PAD)
    with torch.no_grad():
        (means, stds), scores, seen = heads(batch), model(batch), []

    def spy(mean, std, target, *draws):
        found = set()
        for m, s, t in zip(mean.tolist(), std.tolist(), target.tolist()):
            head, response = divmod((means - m).abs().argmin().item(), 14)
            close([m, s, t], [means[head, response], stds[head, response], scores[response]], 1e-5)
            found.add((head, response))
        assert len(found) == len(mean) and all(((head, (response + 7) % 14) in found) for head, response in found)  # both sides of a pair
        seen.append(found)
        return (brme_loss if loss == "mse" else gaussian_nll)(mean, std, target, *draws)

    monkeypatch.setattr(reward, "brme_loss" if loss == "mse" else "gaussian_nll", spy)
    train_brme(heads, model, PAIRS, PAD, loss, share=0.4, epochs=2, batch_size=3, lr=0.0, seed=1)
    first, second = set().union(*seen[:3]), set().union(*seen[3:])
    assert len(seen) == 6 and first == second and {response for _, response in first} == set(range(14))
    subsets = [{response for head, response in first if head == i} for i in range(3)]
    assert all(0 < len(subset) < 14 for subset in subsets) and subsets[0] != subsets[1] != subsets[2] != subsets[0]


def test_heads_learn_the_scores():
    """A second stage that does not learn, learns with another seed's draws, or changes the reward model; the logged error is that of the means, and
    under MSE the stds end lower than under likelihood."""
    model, pairs, final = tiny_reward_model(1, torch.float32), preferences(0, 40), {}
    normalise(model, [collate_pairs(pairs, PAD)])
    before = copy.deepcopy(model.state_dict())
    for loss in ("mse", "nll"):
        heads, twin, rows = tiny_heads(2, 0, torch.float32), tiny_heads(2, 0, torch.float32), []
        for some in (heads, twin):
            train_brme(some, model, pairs, PAD, loss, epochs=20, batch_size=20, lr=0.01, log=lambda rows=rows, **row: rows.append(row))
        assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), twin.parameters()))
        assert rows[39]["error"] < 0.5 * rows[0]["error"] and rows[39]["loss"] < rows[0]["loss"] and len(rows) == 80
        assert (rows[39]["step"], rows[39]["epoch"]) == (39, 19)
        final[loss] = rows[39]["std"] / rows[39]["error"]
        means, _ = heads(collate_pairs(pairs, PAD))
        target = torch.cat(score_pairs(model, pairs, PAD))
        assert (means - target).square().mean().sqrt() < 0.7  # the scores have a standard deviation of 1
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert final["mse"] < final["nll"]


@pytest.mark.parametrize("settings", [dict(loss="mae"), dict(share=0.0), dict(share=1.2)])
def test_heads_refuse_other_losses_and_shares(settings):
    """A misspelt loss that falls through to likelihood, heads that learn from nothing."""
    with pytest.raises(ValueError, match='loss "mse" or "nll" on a share in'):
        train_brme(tiny_heads(), tiny_reward_model(), PAIRS, PAD, **settings)


def test_nominal_and_robust_reward_equal_a_loop():
    """The head with the highest std, or one head for the whole batch; the mean of the means or their maximum for the minimum; the two ends of lam
    exchanged."""
    means, stds = noise(0, 4, 9), noise(1, 4, 9).abs()
    for b in range(9):
        surest = min(range(4), key=lambda i: stds[i, b])
        close(nominal(means, stds)[b], means[surest, b])
        for lam in (0.0, 0.3, 1.0):
            close(robust_reward(means, stds, lam)[b], lam * means[surest, b] + (1 - lam) * min(means[:, b].tolist()))
    assert len(set(stds.argmin(0).tolist())) > 1
    for lam in (-0.1, 1.1):
        with pytest.raises(ValueError, match="lam is between 0 and 1"):
            robust_reward(means, stds, lam)


def test_the_worst_case_of_each_response_is_below_that_of_the_batch():
    """The second trap, E[min] for min E: what is maximised is a lower bound of the paper's worst case, equal to it where one head is always lowest."""
    means, stds = noise(0, 4, 50), torch.ones(4, 50, dtype=torch.float64)
    assert robust_reward(means, stds, 0.0).mean() < min(means.mean(1)) - 0.1
    ordered = noise(1, 1, 50) + torch.arange(4)[:, None]
    close(robust_reward(ordered, stds, 0.0).mean(), min(ordered.mean(1)))


def test_robust_reward_module_is_its_formula():
    """A lam that is not passed on."""
    heads, batch = tiny_heads(3), random_batch(0)
    for lam in (0.0, 0.4, 1.0):
        close(RobustReward(heads, lam)(batch), robust_reward(*heads(batch), lam))
    assert score_batches(RobustReward(heads, 0.4), [batch, batch]).shape == (2 * len(batch),)
