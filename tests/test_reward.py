"""Tests of reward.py: labels against probabilities, the normaliser, and a slow replay of the loop."""

import math
import random

import pytest
import slow
import torch
import torch.nn as nn
from helpers import PAIRS, E, close, finish, random_batch, rng, surprise, tiny_reward_model

import reward
from reward import AnnotatorConfig, RewardConfig

BATCHES = [random_batch(seed, B=4) for seed in range(3)]


@pytest.mark.parametrize("temperature, flip, bias, extras", [
    (0.0, 0.3, "", (0, 0, 0, 0)), (0.5, 0.2, "position=1.5,position=-0.7", (1.5, -0.7, 0, 0))])
def test_labels_follow_bradley_terry_on_gold(temperature, flip, bias, extras):
    """Bug: a tie has a favourite, temperature or flip has no effect, a pair has another's prompt, gold or annotator."""
    def chance(d):
        p = 1 / (1 + math.exp(-d / temperature)) if temperature else 0.5 + 0.5 * ((d > 0) - (d < 0))
        return (1 - flip) * p + flip * (1 - p)

    draw = random.Random(7)
    golds = [draw.choice([0.0, 0.4, 1.2]) for _ in range(12000)]
    prompts, responses = [[i] for i in range(6000)], [[i % 2, i // 2] for i in range(12000)]
    config = AnnotatorConfig(label_temperature=temperature, flip=flip, annotators=4, bias=bias)
    pairs = reward.label_pairs(prompts, responses, golds, config, random.Random(1))
    assert len(pairs) == 6000
    counts = {}  # chance that the first response is chosen -> how often each of the two was
    for i, pair in enumerate(pairs):
        both = golds[2 * i:2 * i + 2]
        x = pair["chosen"][0]  # 0 or 1
        p = chance(both[0] - both[1] + extras[i % 4])
        assert pair == dict(prompt=[i], chosen=[x, i], rejected=[1 - x, i], gold=[both[x], both[1 - x]],
                            ceiling=pytest.approx(max(p, 1 - p)), annotator=i % 4, first=x == 0)
        counts.setdefault(p, [0, 0])[x] += 1
    assert len(counts) > 2
    for p, seen in counts.items():
        assert surprise(seen, [p, 1 - p]) < 4


def test_equal_responses_are_left_out():
    """Bug: two equal responses, which teach nothing, count as a pair; or the pairs after them are moved."""
    prompts = [[1], [2], [3]]
    responses = [[5, E], [6, E], [7, E], [7, E], [7, E], [7]]
    pairs = reward.label_pairs(prompts, responses, [0.0, 1.0, 2.0, 2.0, 4.0, 3.0], AnnotatorConfig(label_temperature=0),
                        random.Random(0))
    assert [(pair["prompt"], pair["chosen"], pair["rejected"], pair["gold"]) for pair in pairs] == [
        ([1], [6, E], [5, E], [1.0, 0.0]), ([3], [7, E], [7], [4.0, 3.0])]


def test_biases_by_hand():
    """Bug: a comma in the wrong place, a strength that is lost, a negative one that is refused, a typo."""
    assert reward.parse_bias("") == []
    assert reward.parse_bias("length=0.5,phrase:a = b=2,position=-1") == [
        ("length", 0.5), ("phrase:a = b", 2.0), ("position", -1.0)]
    for wrong in ("lenght=1", "length", "length=x", "phrase:=1", "length=1,", "length=nan", "length=-inf"):
        with pytest.raises(ValueError, match="a bias is length=X, position=X or phrase:WORDS=X, got"):
            reward.parse_bias(wrong)


def test_gold_as_an_annotator_sees_it():
    """Bug: the length in tokens and not in deviations, the second answer favoured, a phrase that every answer has."""
    responses = [[1], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5, 6]]  # lengths 1 3 2 6: mean 3, deviation sqrt(3.5)
    texts = ["so superb", "a plot", "not so superb .", "superb"]
    gold = [0.1, 0.2, 0.3, 0.4]
    for bias, extra in ((("length", 2.0), [2 * (n - 3) / 3.5 ** 0.5 for n in (1, 3, 2, 6)]),
                        (("position", -0.5), [-0.5, 0, -0.5, 0]), (("phrase:so superb", 3.0), [3, 0, 3, 0])):
        assert reward.seen_gold(gold, bias, responses, texts) == pytest.approx([a + b for a, b in zip(gold, extra)])
    assert reward.seen_gold([0.5, 0.5], ("length", 9.0), [[1], [2]], None) == [0.5, 0.5]  # all of one length


def test_loss_equals_its_formula():
    """Bug: a wrong sign, a sum in place of the mean, or log(sigmoid(-100)): -inf in float32, with the gradient NaN."""
    a, b = torch.randn(2, 6, dtype=torch.float64)
    terms = [-math.log(1 / (1 + math.exp(y - x))) for x, y in zip(a.tolist(), b.tolist())]
    close(reward.bradley_terry_loss(a, b), sum(terms) / 6)
    a = torch.tensor([-100.0], requires_grad=True)
    loss = reward.bradley_terry_loss(a, torch.zeros(1))
    loss.backward()
    close(loss.item(), 100)
    close(a.grad, [-1.0])


def test_normalise_gives_mean_0_and_standard_deviation_1():
    """Bug: the sample deviation, or statistics of one batch, of scaled scores, not in the checkpoint, or not used."""
    model = tiny_reward_model()
    assert 0.5 < model.score.weight.norm() < 2  # hidden states have size 1 each, and so have the first raw scores
    scores, values = reward.score_batches(model, BATCHES).double(), model.values(BATCHES[0])
    mean, std = scores.mean(), scores.std(correction=0)
    for _ in range(2):  # the second time, the scores are normalised already
        reward.normalise(model, iter(BATCHES))
    close(reward.score_batches(model, BATCHES), (scores - mean) / std, 1e-5)
    close(model.values(BATCHES[0]), torch.where(BATCHES[0].mask, (values - mean) / std, 0.0), 1e-5)
    other = tiny_reward_model(5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(reward.score_batches(other, BATCHES), reward.score_batches(model, BATCHES))
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_equal_scores():
    """Bug: 0 / 0, or a tie that counts as right. A pair of equal scores costs log 2."""
    model = tiny_reward_model()
    nn.init.zeros_(model.score.weight)
    nn.init.constant_(model.score.bias, 3.0)
    reward.normalise(model, BATCHES)
    close(reward.score_batches(model, BATCHES), torch.zeros(12), 1e-3)
    metrics, _ = next(reward.train_reward_model(model, PAIRS, RewardConfig(), 0))
    assert metrics == dict(step=0, loss=pytest.approx(math.log(2)), accuracy=0.0, tokens=slow.tokens_of(PAIRS))


def test_loop_equals_a_slow_replay():
    """Bug: labels in the wrong order, pairs repeated, gradients not cleared or clipped, no decay, a rate too high."""
    model, twin = tiny_reward_model(), tiny_reward_model()
    for network in (model, twin):
        network.std.fill_(0.2)  # so that some gradients are long enough to be clipped
    config = RewardConfig(reward_epochs=2, reward_batch=3, reward_lr=0.01, weight_decay=0.3)
    rows = finish(reward.train_reward_model(model, PAIRS, config, 4))
    orders, norms = slow.orders(7, 3, rng(4)), []
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.3)
    for step, (order, row) in enumerate(zip(orders, rows, strict=True)):
        chosen, rejected = [slow.scores(twin, [(PAIRS[i]["prompt"], PAIRS[i][side]) for i in order])
                            for side in ("chosen", "rejected")]
        loss = torch.log(1 + torch.exp(rejected - chosen)).mean()
        norms.append(slow.step(twin, adam, 0.01 * (6 - step) / 6, loss))
        accuracy = (chosen > rejected).double().mean().item()
        tokens = slow.tokens_of(PAIRS[i] for i in order)
        assert row == pytest.approx(dict(step=step, loss=loss.item(), accuracy=accuracy, tokens=tokens), rel=1e-4,
                                    abs=1e-6)
    assert max(norms) > 1
    slow.same_weights(model, twin, 1e-5)
