"""Tests of reward.py: Bradley-Terry against closed forms, the model's scores and values against the textbook GPT, the loop against a slow replay."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from helpers import PAD, VOCAB, E, few, make_batch, naive_hidden, poison, random_batch, rows_of, tiny_gpt
from hypothesis import given
from hypothesis import strategies as st

import reward
from evaluate import CanaryError
from reward import RewardModel, bradley_terry_loss, collate_pairs, normalise, score_batches, score_pairs, train_reward_model

SCORES = 2e-6  # scores are float32


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance)


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

PAIRS = [
    dict(prompt=[1, 2, 3], chosen=[4, 5, E], rejected=[6, E]),
    dict(prompt=[4], chosen=[E], rejected=[7, 7, 7, 7]),
    dict(prompt=[5, 6], chosen=[8, 0, 1, 2, E], rejected=[3]),
    dict(prompt=[7, 8, 0, 1], chosen=[2, E], rejected=[2, 2, E]),
    dict(prompt=[3, 3], chosen=[4], rejected=[1, 5, E]),
    dict(prompt=[0], chosen=[6, 1, E], rejected=[E]),
    dict(prompt=[2, 8, 8], chosen=[0, 0], rejected=[1, 1, E]),
]


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


def test_loop_equals_a_slow_replay(monkeypatch):
    """Labels turned round, pairs lost or repeated, gradients not cleared or clipped, a learning rate that does not fall, weight decay that is
    not passed on, an accuracy measured after the step. Only the order of the pairs is recorded."""
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
    rows = train(model, epochs=3, lr=0.01, weight_decay=0.3)
    assert len(orders) == 3 and len(rows) == 9

    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    step, norms = 0, []
    for epoch, order in enumerate(orders):
        for batch in order:
            some = [PAIRS[i] for i in batch.tolist()]
            sides = [slow(make_batch([pair["prompt"] for pair in some], [pair[side] for pair in some])) for side in ("chosen", "rejected")]
            loss = torch.log(1 + torch.exp(sides[1] - sides[0])).mean()
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
    assert min(norms) < 1 < max(norms)
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
