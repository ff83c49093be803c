"""
Tests of reward.py: Bradley-Terry against closed forms, scores and values against the textbook GPT, the loop against a
slow replay.

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
    VOCAB,
    E,
    close,
    double,
    few,
    make_batch,
    naive_hidden,
    noise,
    poison,
    random_batch,
    rows_of,
    tiny_gpt,
    unchanged,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st

import reward
from checks import CanaryError
from reward import RewardModel, bradley_terry_loss, normalise, score_batches, score_pairs, train_reward_model

SCORES = 2e-6  # tolerance: scores are float32


def tiny_reward_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return RewardModel(tiny_gpt(seed)).to(dtype)


@torch.no_grad()
def slow_score(model, prompt, response):
    """The score of one text, without padding: the head's dot product with the last hidden state."""
    x = naive_hidden(model.trunk, prompt + response)[-1]
    return (((x * model.score.weight[0]).sum() + model.score.bias[0] - model.mean) / model.std).item()


# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------

def test_loss_equals_its_formula():
    """Catches a wrong sign, another base of the logarithm, and a sum in place of the mean."""
    a, b = noise(0, 6), noise(1, 6)
    terms = [-math.log(1 / (1 + math.exp(y - x))) for x, y in zip(a.tolist(), b.tolist())]
    close(bradley_terry_loss(a, b), sum(terms) / 6)


def test_loss_of_equal_scores_is_log_2_with_gradient_a_half():
    """Catches a loss that is 0 or flat where the model cannot tell two responses apart (P47)."""
    a = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = bradley_terry_loss(a, b)
    loss.backward()
    close(loss.item(), math.log(2), 1e-14)
    close(a.grad, [-0.5 / 4] * 4)
    close(b.grad, [0.5 / 4] * 4)


def test_swapping_the_two_responses():
    """Catches labels in the wrong order (P50): -log sigmoid(x) + log sigmoid(-x) = -x. The right order costs less."""
    for x in (0.3, 2.0, -5.0, 30.0):
        right = bradley_terry_loss(double([x]), double([0.0]))
        swapped = bradley_terry_loss(double([0.0]), double([x]))
        close(right - swapped, -x)
        assert (right < swapped) == (x > 0)


def test_a_constant_added_to_all_scores_changes_nothing():
    """Catches a use of the scores beside their difference, such as a penalty on their mean (P51)."""
    a, b = noise(0, 6), noise(1, 6)
    close(bradley_terry_loss(a + 50, b + 50, 0.3), bradley_terry_loss(a, b, 0.3))


def test_margin_is_subtracted():
    """Catches a margin that is added: it must cost more, as if the chosen score were lower by it."""
    a, b = noise(0, 6), noise(1, 6)
    close(bradley_terry_loss(a, b, 0.7), bradley_terry_loss(a - 0.7, b))
    assert bradley_terry_loss(a, b, 0.7) > bradley_terry_loss(a, b, 0.0)
    close(bradley_terry_loss(a, b), bradley_terry_loss(a, b, 0.0))
    margins = double([1, 2, 3, 4, 5, 6])  # one for each pair
    close(bradley_terry_loss(a, b, margins), bradley_terry_loss(a - margins, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_of_minus_100_costs_100(dtype):
    """Catches log(sigmoid(-100)), which is -inf in float32 and has the gradient NaN (P47)."""
    a = torch.tensor([-100.0], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(1, dtype=dtype))
    loss.backward()
    close(loss.item(), 100)
    close(a.grad, [-1.0])


@few
@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)), min_size=1, max_size=6), st.floats(0, 10))
def test_loss_is_finite_and_close_to_the_hinge(pairs, margin):
    """
    Catches finite scores for which the loss is NaN, infinite or negative.

    max(0, -x) <= -log sigmoid(x) <= max(0, -x) + log 2 for every x.
    """
    a, b = [column.clone().requires_grad_() for column in double(pairs).T]
    loss = bradley_terry_loss(a, b, margin)
    a_gradient, b_gradient = torch.autograd.grad(loss, (a, b))
    hinge = (b - a + margin).clamp(min=0).mean().item()
    assert hinge - 1e-9 <= loss.item() <= hinge + math.log(2) + 1e-9
    assert torch.isfinite(a_gradient).all() and (a_gradient <= 0).all()
    assert torch.isfinite(b_gradient).all() and (b_gradient >= 0).all()


def test_weight_decay_is_a_gaussian_prior():
    """
    Catches a sum taken for a mean, or a wrong sign: both move the mode of the posterior.

    With one weight w and scores w x, bisection finds the w at which the slope of N loss + w^2 / (2 s^2) is 0. Gradient
    descent on the loss must converge to it.
    """
    a, b, s = noise(0, 8), noise(1, 8), 0.7

    def slope(w):
        return sum(-d / (1 + math.exp(w * d)) for d in (a - b).tolist()) + w / s ** 2

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        if slope(middle) > 0:
            high = middle
        else:
            low = middle
    assert abs(low) > 0.05

    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        posterior = 8 * bradley_terry_loss(w * a, w * b) + w ** 2 / (2 * s ** 2)
        (gradient,) = torch.autograd.grad(posterior, w)
        w = (w - 0.1 * gradient).detach().requires_grad_()
    close(w.item(), low)


def test_labels_that_disagree_put_the_difference_at_the_log_odds():
    """Catches another likelihood: a response that is preferred 3 times out of 4 has a score that is log 3 higher."""
    difference = torch.tensor(math.log(3), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    chosen = torch.stack([difference, difference, difference, zero])
    rejected = torch.stack([zero, zero, zero, difference])
    (gradient,) = torch.autograd.grad(bradley_terry_loss(chosen, rejected), difference)
    assert abs(gradient.item()) < 1e-12


# ---- the model -------------------------------------------------------------------------------------------------------

def test_head_starts_with_a_standard_deviation_of_one_over_root_c_plus_1():
    """Catches PyTorch's own initialisation, uniform with 1/sqrt(3C), and 1/sqrt(C): with C = 3 the deviation is 0.5."""
    trunk = nn.Module()
    trunk.config = SimpleNamespace(n_embd=3)
    torch.manual_seed(0)
    heads = [RewardModel(trunk).score for _ in range(600)]
    drawn = torch.cat([head.weight.detach().flatten() for head in heads])
    assert heads[0].weight.shape == (1, 3)
    assert abs(drawn.mean()) < 0.05
    assert drawn.std().item() == pytest.approx(4 ** -0.5, rel=0.06)  # 3 standard errors; 1/sqrt(3) is 15% away
    assert drawn.abs().max() > 1.2  # normal, not uniform
    assert all((head.bias == 0).all() for head in heads)


def test_model_starts_unscaled_with_a_trunk_of_its_own():
    """Catches a trunk that is shared with the policy (P74), and scores that are scaled before `normalise`."""
    trunk = tiny_gpt(0)
    model = RewardModel(trunk)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in trunk.parameters()}
    assert unchanged(model.trunk, weights(trunk))
    assert model.mean.item() == 0
    assert model.std.item() == 1


def test_score_is_read_at_the_last_real_token():
    """
    Catches the score of a pad, of the token before, or of the last column (P46).

    The batches have pads on the left and on the right, no pads at all, and responses without tokens.
    """
    model = tiny_reward_model()
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    for batch in (
        random_batch(0, B=20),  # by_length reads this one in two parts
        random_batch(1, min_response=0),
        random_batch(2, P=9, R=10),
        make_batch([[1, 2]], [[3, E]]),
    ):
        scores = model(batch)
        assert scores.shape == (len(batch),)
        close(scores, [slow_score(model, *row) for row in rows_of(batch)], SCORES)
    assert model(random_batch(0)).std() > 0.01


def test_score_does_not_depend_on_the_batch():
    """Catches a score that changes with the other rows, or with the ids at the pads (P46)."""
    model, batch = tiny_reward_model(), random_batch(0, min_response=0)
    scores = model(batch)
    assert torch.equal(model(poison(batch)), scores)
    for row, (prompt, response) in enumerate(rows_of(batch)):
        alone = make_batch([prompt], [response], R=max(1, len(response)))
        close(model(alone), scores[row:row + 1], SCORES)


def test_a_real_token_with_the_pads_id_counts():
    """Catches lengths that are computed as ids != PAD (P6). A sampled token may have PAD's id."""
    model = tiny_reward_model()
    batch = make_batch([[1, 2], [1, 2], [PAD, 1]], [[PAD, 3, 4], [3, PAD], [3, 4]], R=5)
    close(model(batch), [slow_score(model, *row) for row in rows_of(batch)], SCORES)


def test_score_trains_the_whole_model():
    """Catches a trunk that is detached or frozen: every parameter gets a gradient."""
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
    """
    Catches values that are shifted by one (P2), and values at pads that are not 0.

    V(s_t) is the score of the prompt and the first t response tokens. The first value is read at the last prompt token.
    """
    model = tiny_reward_model()
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    nn.init.constant_(model.score.bias, 0.9)
    for batch in (random_batch(0, B=17), random_batch(1, min_response=0, R=10)):
        values = model.values(batch)
        close(values, slow_values(model, batch), SCORES)
        assert values.shape == batch.mask.shape
        assert (values[~batch.mask] == 0).all()
        assert (values[batch.mask] != 0).all()


def test_value_does_not_see_the_action():
    """Catches a critic that sees what was sampled (P2): another token at t moves V_{t+1}, and none of V_0 .. V_t."""
    model = tiny_reward_model()
    prompts, responses = [[1, 2, 3], [4]], [[5, 6, 7, 8], [1, 2, 3, 4]]
    values = model.values(make_batch(prompts, responses))
    for t in range(4):
        others = copy.deepcopy(responses)
        for response in others:
            response[t] = (response[t] + 1) % (VOCAB - 2)
        moved = (model.values(make_batch(prompts, others)) - values).abs() > 1e-4
        assert not moved[:, :t + 1].any()
        assert moved[:, t + 1:t + 2].all()


def test_values_ignore_padding_and_train_the_critic():
    """Catches values that depend on the ids at the pads (P7), and a critic whose trunk is detached."""
    model, batch = tiny_reward_model(), random_batch(0, R=9)
    assert torch.equal(model.values(poison(batch)), model.values(batch))
    model.values(batch).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- normalisation ---------------------------------------------------------------------------------------------------

BATCHES = [random_batch(seed, B=4) for seed in range(3)]


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """Catches the sample deviation, statistics of one batch only, and shift and scale in the wrong order (P25)."""
    model = tiny_reward_model()
    raw = score_batches(model, BATCHES).double()
    normalise(model, BATCHES)
    scores = score_batches(model, BATCHES).double()
    close(scores.mean(), 0, 1e-5)
    close(scores.std(correction=0), 1, 1e-5)
    close(scores, (raw - raw.mean()) / raw.std(correction=0), 1e-5)


def test_normalise_twice_is_normalise_once():
    """Catches statistics of scores that are normalised already (P25): 0 and 1, so a second call undoes the first."""
    model = tiny_reward_model()
    normalise(model, BATCHES)
    once = score_batches(model, BATCHES)
    mean, std = model.mean.item(), model.std.item()
    normalise(model, BATCHES)
    close(score_batches(model, BATCHES), once, 1e-6)
    assert (model.mean.item(), model.std.item()) == pytest.approx((mean, std))
    assert abs(mean) > 1e-3
    assert abs(std - 1) > 1e-3


def test_normalisation_reaches_values_and_survives_a_checkpoint(tmp_path):
    """Catches statistics that are not in the checkpoint, that are trained, or that the critic does not use (P26)."""
    model = tiny_reward_model()
    before = model.values(BATCHES[0])
    normalise(model, BATCHES)
    mean, std = model.mean.item(), model.std.item()
    assert std != 1
    close(model.values(BATCHES[0]), torch.where(BATCHES[0].mask, (before - mean) / std, 0.0), 1e-5)
    torch.save(model.state_dict(), tmp_path / "reward.pt")
    other = tiny_reward_model(5)
    other.load_state_dict(torch.load(tmp_path / "reward.pt", weights_only=True))
    assert torch.equal(score_batches(other, BATCHES), score_batches(model, BATCHES))
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_normalise_of_constant_scores_is_finite():
    """Catches 0 / 0 when all scores are equal."""
    model = tiny_reward_model()
    nn.init.zeros_(model.score.weight)
    nn.init.constant_(model.score.bias, 3.0)
    normalise(model, BATCHES)
    scores = score_batches(model, BATCHES)
    assert torch.isfinite(scores).all()
    assert scores.abs().max() < 1e-3


def test_score_batches_keeps_the_order():
    """Catches batches in another order or without the last one, and a graph that nobody needs."""
    model = tiny_reward_model()
    scores = score_batches(model, BATCHES)
    close(scores, [slow_score(model, *row) for batch in BATCHES for row in rows_of(batch)], SCORES)
    assert not scores.requires_grad


@pytest.mark.parametrize("size", [1, 2, 3, 7, 128])
def test_score_pairs_equals_scoring_each_response_alone(size):
    """
    Catches scores that depend on the partner or on the part (P11), chosen and rejected exchanged (P50), and rows that
    are mixed where the last part is smaller.
    """
    model = tiny_reward_model()
    chosen, rejected = score_pairs(model, PAIRS, PAD, size=size)
    close(chosen, [slow_score(model, pair["prompt"], pair["chosen"]) for pair in PAIRS], SCORES)
    close(rejected, [slow_score(model, pair["prompt"], pair["rejected"]) for pair in PAIRS], SCORES)


# ---- the loop --------------------------------------------------------------------------------------------------------

SETTINGS = dict(reward_epochs=2, batch_size=3, reward_lr=1e-3, weight_decay=0.1)


def train(model, pairs=PAIRS, seed=0, **changes):
    """Run train_reward_model with changes to SETTINGS. Returns the logged rows."""
    config = SimpleNamespace(**{**SETTINGS, **changes})
    rows = []
    train_reward_model(model, pairs, PAD, config, seed, log=lambda **row: rows.append(row))
    return rows


def test_loop_equals_a_slow_replay(monkeypatch):
    """
    Catches labels in the wrong order (P50), pairs that are lost or repeated, gradients that are not cleared or not
    clipped, a learning rate that does not fall, weight decay that is not passed on, and an accuracy after the step.

    Only the order of the pairs is recorded. All the rest is computed again.
    """
    orders = []

    def recorded(n, size, epochs, generator):
        assert (n, size, epochs) == (7, 3, 3)
        for _ in range(epochs):
            orders.extend(torch.randperm(n, generator=generator).split(size))
        return orders

    monkeypatch.setattr(reward, "minibatches", recorded)
    model = tiny_reward_model()
    with torch.no_grad():
        model.score.weight *= 6  # so that some gradients are long enough to be clipped
    slow = copy.deepcopy(model)
    rows = train(model, reward_epochs=3, reward_lr=0.01, weight_decay=0.3)
    assert len(orders) == len(rows) == 9

    adam = torch.optim.AdamW(slow.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        prompts = [PAIRS[i]["prompt"] for i in order]
        chosen = slow(make_batch(prompts, [PAIRS[i]["chosen"] for i in order]))
        rejected = slow(make_batch(prompts, [PAIRS[i]["rejected"] for i in order]))
        loss = torch.log(1 + torch.exp(rejected - chosen)).mean()
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad ** 2).sum().item() for p in slow.parameters()))
        norms.append(norm)
        for p in slow.parameters():
            p.grad /= max(1.0, norm)
        adam.param_groups[0]["lr"] = 0.01 * (9 - step) / 9
        adam.step()
        assert set(row) == {"step", "loss", "accuracy"}
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert row["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert min(norms) < 1 < max(norms)
    for name, w in model.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


def test_loop_is_seeded():
    """Catches a seed that is not used: one seed gives one result, and another seed gives another."""
    models = [tiny_reward_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        train(model, seed=seed)
    assert unchanged(models[1], weights(models[0]))
    assert not unchanged(models[2], weights(models[0]))


def preferences(seed, n=24):
    """Pairs of random texts. The chosen response is the one with the token 3."""
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        n = int(torch.randint(1, 4, (), generator=generator))
        return torch.randint(4, 9, (n,), generator=generator).tolist()

    return [dict(prompt=tokens(), chosen=[*tokens(), 3, E], rejected=[*tokens(), E]) for _ in range(n)]


def test_model_learns_a_preference():
    """Catches a model that learns nothing or the opposite (P50). It is tested on pairs that it has not seen."""
    model = tiny_reward_model(0, torch.float32)
    rows = train(model, preferences(0), reward_epochs=12, batch_size=12, reward_lr=0.01)
    assert rows[0]["loss"] > 0.4
    assert rows[-1]["loss"] < 0.1
    assert rows[-1]["accuracy"] == 1
    chosen, rejected = score_pairs(model, preferences(1), PAD)
    assert (chosen > rejected).double().mean() > 0.95


# ---- the loop calls its canaries -------------------------------------------------------------------------------------

def test_canary_for_a_model_that_reads_pads(monkeypatch):
    """Catches the score of the last column, which is a pad in all rows but the longest (P46)."""
    def last_column(model, batch):
        return model.score(model.trunk.hidden(batch.ids, batch.start)[:, -1]).squeeze(-1)

    model = tiny_reward_model()
    before = weights(model)
    monkeypatch.setattr(RewardModel, "forward", last_column)
    with pytest.raises(CanaryError, match="the padding changes the result"):
        train(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_canary_for_a_loss_that_is_not_finite(monkeypatch, value):
    """Catches a diverged run that goes on with NaN. The canary comes before the step, so the weights are not lost."""
    model = tiny_reward_model()
    before = weights(model)
    monkeypatch.setattr(reward, "bradley_terry_loss", lambda *inputs: bradley_terry_loss(*inputs) * value)
    with pytest.raises(CanaryError, match="reward model's loss is (nan|inf).*lower --reward-lr"):
        train(model)
    assert unchanged(model, before)
