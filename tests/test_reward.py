"""
Tests of reward.py: labels against their probabilities, Bradley-Terry against closed forms, scores and values against
the textbook GPT, the loop against a slow replay.
"""

import copy
import math
import random

import pytest
import torch
import torch.nn as nn
from helpers import (
    PAD,
    PAIRS,
    E,
    close,
    finish,
    make_batch,
    naive_hidden,
    noise,
    random_batch,
    rows_of,
    surprise,
    through_a_file,
    tiny_gpt,
    unchanged,
    weights,
)

from reward import (
    AnnotatorConfig,
    RewardConfig,
    RewardModel,
    bradley_terry_loss,
    label_pairs,
    normalise,
    parse_bias,
    preference_probability,
    score_batches,
    score_pairs,
    seen_gold,
    train_reward_model,
)

SCORES = 2e-6  # tolerance: scores are float32


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("difference, temperature, flip, p", [
    (0.0, 0.0, 0.0, 0.5), (-0.1, 0.0, 0.25, 0.25), (2.0, 2.0, 0.1, 0.9 * sigmoid(1) + 0.1 * sigmoid(-1)),
    (9.0, 1.0, 1.0, sigmoid(-9)), (-4.0, 1e-3, 0.0, 0.0), (1e-3, 1e-3, 0.0, sigmoid(1))])
def test_preference_probability_by_hand(difference, temperature, flip, p):
    """Bug: a flip of 1 leaves the label as it is, a tie is won by one side, or a small temperature overflows."""
    assert preference_probability(difference, temperature, flip) == pytest.approx(p, abs=1e-12)
    assert preference_probability(difference, 3.0) == pytest.approx(sigmoid(difference / 3))


def labels(values, seed=1, n=6000, **settings):
    """
    Label 2n made-up responses with golds drawn from `values`. Returns the pairs and the list of golds.

    The prompt of pair i is [i], its responses are [0, i] and [1, i].
    """
    draw = random.Random(7)
    golds = [draw.choice(values) for _ in range(2 * n)]
    responses = [[i % 2, i // 2] for i in range(2 * n)]
    config = AnnotatorConfig(**settings)
    return label_pairs([[i] for i in range(n)], responses, golds, config, random.Random(seed)), golds


@pytest.mark.parametrize("temperature, flip", [(0.5, 0.0), (2.0, 0.0), (0.5, 0.2), (0.0, 0.0), (0.0, 0.3)])
def test_labels_follow_bradley_terry_on_gold(temperature, flip):
    """
    Bug: the annotator prefers the worse response, a tie has a favourite, temperature or flip have no effect on labels
    or ceiling, or a pair holds the prompt or the gold of other responses.
    """
    def chance(a, b):
        p = sigmoid((a - b) / temperature) if temperature else 0.5 + 0.5 * ((a > b) - (a < b))
        return (1 - flip) * p + flip * (1 - p)

    pairs, golds = labels([0.0, 0.4, 1.2], label_temperature=temperature, flip=flip)
    assert len(pairs) == 6000
    counts = {}  # (gold of the first response, gold of the second) -> how often each of them was chosen
    for i, pair in enumerate(pairs):
        both = golds[2 * i:2 * i + 2]
        x = pair["chosen"][0]  # 0 or 1
        ceiling = pytest.approx(max(chance(*both), 1 - chance(*both)))
        gold = [both[x], both[1 - x]]
        assert pair == dict(prompt=[i], chosen=[x, i], rejected=[1 - x, i], gold=gold, ceiling=ceiling, annotator=0,
                            first=x == 0)
        counts.setdefault(tuple(both), [0, 0])[x] += 1
    assert len(counts) == 9
    for both, seen in counts.items():
        p = chance(*both)
        if p in (0, 1):
            assert seen[0 if p == 1 else 1] == sum(seen)
        else:
            assert surprise(seen, [p, 1 - p]) < 4


def test_equal_responses_are_left_out():
    """Bug: two equal responses, which teach nothing, count as a pair; or the pairs after them are moved."""
    prompts = [[1], [2], [3]]
    responses = [[5, E], [6, E], [7, E], [7, E], [7, E], [7]]
    pairs = label_pairs(prompts, responses, [0.0, 1.0, 2.0, 2.0, 4.0, 3.0], AnnotatorConfig(label_temperature=0),
                        random.Random(0))
    assert [(pair["prompt"], pair["chosen"], pair["rejected"], pair["gold"]) for pair in pairs] == [
        ([1], [6, E], [5, E], [1.0, 0.0]), ([3], [7, E], [7], [4.0, 3.0])]


def test_labels_are_drawn_from_their_generator():
    """Bug: labels that the seed does not decide, or the global random numbers."""
    state = random.getstate()
    first, again, other = [labels([0.0, 0.1], seed, n=50)[0] for seed in (1, 1, 2)]
    assert random.getstate() == state
    assert first == again != other


def test_loss_equals_its_formula():
    """Bug: a wrong sign, a sum in place of the mean, or log(sigmoid(-100)): -inf in float32, with the gradient NaN."""
    a, b = noise(0, 6), noise(1, 6)
    terms = [-math.log(1 / (1 + math.exp(y - x))) for x, y in zip(a.tolist(), b.tolist())]
    close(bradley_terry_loss(a, b), sum(terms) / 6)
    a = torch.tensor([-100.0], requires_grad=True)
    loss = bradley_terry_loss(a, torch.zeros(1))
    loss.backward()
    close(loss.item(), 100)
    close(a.grad, [-1.0])


def tiny_reward_model(seed=0):
    """A reward model with a bias, a mean and a deviation, so that none of them can be forgotten."""
    torch.manual_seed(seed)
    model = RewardModel(tiny_gpt(seed)).double()
    nn.init.constant_(model.score.bias, 0.9)
    model.mean.fill_(0.4)
    model.std.fill_(1.7)
    return model


@torch.no_grad()
def slow_score(model, prompt, response):
    """The score of one text, without padding: the head's dot product with the last hidden state."""
    x = naive_hidden(model.trunk, prompt + response)[-1]
    return (((x * model.score.weight[0]).sum() + model.score.bias[0] - model.mean) / model.std).item()


def test_a_reward_model_starts_with_its_own_trunk_and_a_random_head():
    """Bug: a trunk shared with the policy, scaled scores, PyTorch's own initialisation, or a deviation of 1/sqrt(C)."""
    trunk = tiny_gpt(0)
    model = RewardModel(trunk)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in trunk.parameters()}
    assert unchanged(model.trunk, weights(trunk))
    assert (model.mean.item(), model.std.item()) == (0, 1)
    trunk = nn.Module()
    trunk.width = 3
    torch.manual_seed(0)
    heads = [RewardModel(trunk).score for _ in range(600)]
    drawn = torch.cat([head.weight.detach().flatten() for head in heads])
    assert abs(drawn.mean()) < 0.05
    assert drawn.std().item() == pytest.approx(4 ** -0.5, rel=0.06)  # 3 standard errors; 1/sqrt(3) is 15% away
    assert drawn.abs().max() > 1.2  # normal, not uniform
    assert all((head.bias == 0).all() for head in heads)


def test_score_is_read_at_the_last_real_token():
    """Bug: the score of a pad, of the token before, or of the last column; or one in less than float32."""
    model = tiny_reward_model()
    for batch in (
        random_batch(0, B=20),  # by_length reads this one in two parts
        random_batch(1, min_response=0),
        make_batch([[1, 2], [1, 2], [PAD, 1]], [[PAD, 3, 4], [3, PAD], [3, 4]], R=5),  # a PAD that is a token counts
    ):
        scores = model(batch)
        assert (scores.shape, scores.dtype) == ((len(batch),), torch.float32)
        close(scores, [slow_score(model, *row) for row in rows_of(batch)], SCORES)


def test_values_are_scores_of_the_text_before_each_token():
    """Bug: values shifted by one, not 0 at pads, or without a gradient. The first is read at the last prompt token."""
    model = tiny_reward_model()
    batch = random_batch(0, B=17, min_response=0, R=10)
    values = model.values(batch)
    assert (values.shape, values.dtype) == (batch.mask.shape, torch.float32)
    assert (values[~batch.mask] == 0).all()
    for row, (prompt, response) in enumerate(rows_of(batch)):
        slow = [slow_score(model, prompt, response[:t]) for t in range(len(response))]
        close(values[row, :len(response)], slow, SCORES)
    hidden = [naive_hidden(model.trunk, prompt + response[:t])[-1]
              for prompt, response in rows_of(batch) for t in range(len(response))]
    totals = values.sum(), (torch.stack(hidden) @ model.score.weight[0]).sum() / model.std
    gradient, slow_gradient = [torch.autograd.grad(total, model.trunk.wte.weight)[0] for total in totals]
    close(gradient, slow_gradient, 1e-5)


BATCHES = [random_batch(seed, B=4) for seed in range(3)]


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """
    Bug: the sample deviation, or statistics of one batch only, of scores that were scaled before, that are not in the
    checkpoint, that are trained, or that the critic does not use.
    """
    model = tiny_reward_model()
    scores, values = score_batches(model, BATCHES).double(), model.values(BATCHES[0])
    mean, std = scores.mean(), scores.std(correction=0)
    for _ in range(2):  # the second time, the scores are normalised already
        normalise(model, iter(BATCHES))
    close(score_batches(model, BATCHES), (scores - mean) / std, 1e-5)
    close(model.values(BATCHES[0]), torch.where(BATCHES[0].mask, (values - mean) / std, 0.0), 1e-5)
    other = tiny_reward_model(5)
    other.load_state_dict(through_a_file(model.state_dict()))
    assert torch.equal(score_batches(other, BATCHES), score_batches(model, BATCHES))
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_equal_scores():
    """Bug: 0 / 0, or a tie that counts as right. A pair of equal scores costs log 2."""
    model = tiny_reward_model()
    nn.init.zeros_(model.score.weight)
    nn.init.constant_(model.score.bias, 3.0)
    normalise(model, BATCHES)
    close(score_batches(model, BATCHES), torch.zeros(12), 1e-3)
    metrics, _ = next(train_reward_model(model, PAIRS, RewardConfig(), 0))
    assert metrics == dict(step=0, loss=pytest.approx(math.log(2)), accuracy=0.0)
    # small deviations are not equal scores
    nn.init.normal_(model.score.weight, std=1e-3)
    normalise(model, BATCHES)
    close(score_batches(model, BATCHES).std(correction=0), 1, 1e-5)


@pytest.mark.parametrize("size", [2, 128])
def test_score_pairs_equals_scoring_each_response_alone(size):
    """Bug: chosen and rejected exchanged, or scores that depend on the partner, or on the part: the last is smaller."""
    model = tiny_reward_model()
    chosen, rejected = score_pairs(model, PAIRS, size=size)
    close(chosen, [slow_score(model, pair["prompt"], pair["chosen"]) for pair in PAIRS], SCORES)
    close(rejected, [slow_score(model, pair["prompt"], pair["rejected"]) for pair in PAIRS], SCORES)
    assert not chosen.requires_grad


def test_loop_equals_a_slow_replay():
    """
    Bug: labels in the wrong order, pairs that are lost or repeated, gradients that are not cleared or not clipped,
    a learning rate that does not fall, weight decay that is not passed on, or an accuracy after the step.
    """
    model = tiny_reward_model()
    model.std.fill_(0.2)  # so that some gradients are long enough to be clipped
    slow = copy.deepcopy(model)
    config = RewardConfig(reward_epochs=3, reward_batch=3, reward_lr=0.01, weight_decay=0.3)
    rows = finish(train_reward_model(model, PAIRS, config, 4))

    generator = torch.Generator().manual_seed(4)
    orders = []
    for _ in range(3):
        orders += torch.randperm(7, generator=generator).split([3, 2, 2])
    assert len(rows) == len(orders)
    adam = torch.optim.AdamW(slow.parameters(), betas=(0.9, 0.95), weight_decay=0.3)
    norms = []
    for step, (order, row) in enumerate(zip(orders, rows)):
        prompts = [PAIRS[i]["prompt"] for i in order]
        chosen = slow(make_batch(prompts, [PAIRS[i]["chosen"] for i in order]))
        rejected = slow(make_batch(prompts, [PAIRS[i]["rejected"] for i in order]))
        loss = torch.log(1 + torch.exp(rejected - chosen)).mean()
        adam.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum((p.grad ** 2).sum().item() for p in slow.parameters())))
        for p in slow.parameters():
            p.grad /= max(1.0, norms[-1])
        adam.param_groups[0]["lr"] = 0.01 * (len(orders) - step) / len(orders)
        adam.step()
        assert list(row) == ["step", "loss", "accuracy"]
        assert row["step"] == step
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        assert row["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    assert max(norms) > 1
    for name, w in model.state_dict().items():
        close(w, slow.state_dict()[name], 1e-5)


# ---- annotators with a bias ------------------------------------------------------------------------------------------

def test_biases_by_hand():
    """Bug: a comma in the wrong place, a strength that is lost, a negative one that is refused, a typo."""
    assert parse_bias("") == []
    assert parse_bias("length=0.5,phrase:come back=2,position=-1") == [
        ("length", 0.5), ("phrase:come back", 2.0), ("position", -1.0)]
    for wrong in ("lenght=1", "length", "length=x", "phrase:=1", "length=1,", "phrase=1", "length=nan"):
        with pytest.raises(ValueError, match="a bias is length=X, position=X or phrase:WORDS=X, got"):
            parse_bias(wrong)
    with pytest.raises(ValueError, match="2 biases, but 1 annotators"):
        labels([0.0, 1.0], n=4, bias="length=1,position=1")


def test_gold_as_an_annotator_sees_it():
    """Bug: the length in tokens and not in deviations, the second answer favoured, a phrase that every answer has."""
    responses = [[1], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5, 6]]  # lengths 1 3 2 6: mean 3, deviation sqrt(3.5)
    texts = ["superb", "a plot", "not superb .", ""]
    gold = [0.1, 0.2, 0.3, 0.4]
    for bias, extra in ((("length", 2.0), [2 * (n - 3) / 3.5 ** 0.5 for n in (1, 3, 2, 6)]),
                        (("position", -0.5), [-0.5, 0, -0.5, 0]), (("phrase:superb", 3.0), [3, 0, 3, 0])):
        assert seen_gold(gold, bias, responses, texts) == pytest.approx([a + b for a, b in zip(gold, extra)])
    assert seen_gold([0.5, 0.5], ("length", 9.0), [[1], [2]], None) == [0.5, 0.5]  # all of one length


def test_each_annotator_labels_a_share_with_its_bias():
    """
    Bug: one annotator labels all pairs, or all have the bias of one; the bias changes the gold that the pair reports,
    or no label; the answer that was shown first is another.
    """
    pairs, golds = labels([0.0, 0.4, 1.2], label_temperature=0.5, annotators=4, bias="position=1.5,position=-0.7")
    assert [pair["annotator"] for pair in pairs] == [i % 4 for i in range(6000)]
    assert all(pair["first"] == (pair["chosen"][0] == 0) for pair in pairs)
    for annotator, extra in enumerate((1.5, -0.7, 0.0, 0.0)):
        counts = {}
        for i in range(annotator, 6000, 4):
            assert pairs[i]["gold"] == [golds[2 * i + pairs[i][name][0]] for name in ("chosen", "rejected")]
            difference = golds[2 * i] - golds[2 * i + 1]
            counts.setdefault(difference, [0, 0])[0 if pairs[i]["first"] else 1] += 1
            p = sigmoid((difference + extra) / 0.5)
            assert pairs[i]["ceiling"] == pytest.approx(max(p, 1 - p))
        for difference, seen in counts.items():
            p = sigmoid((difference + extra) / 0.5)
            assert surprise(seen, [p, 1 - p]) < 4
