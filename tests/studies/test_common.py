"""What the studies with a GPT share, against plain loops and numbers by hand."""

import math

import pytest
import torch

from evaluate import sample_policy
from pipeline.config import parse_config
from pipeline.run import Run
from studies import common
from studies.lab import mean_se


@pytest.fixture(scope="module")
def run(tiny):
    """The tiny run, for reading."""
    return Run(parse_config(["--out", str(tiny), "--stages", "report"]))


# ---------------------------------------------------------------------------------------------------------------------
# labels and samples

def test_flipped_labels_are_turned_around_and_nothing_else(run):
    """Bugs: flips that change which pairs there are, or that forget the gold; a share that is not the one asked for."""
    clean = common.labelled(run, 150)
    noisy = common.labelled(run, 150, 3, 0.25)
    assert clean == run.pairs()[0][:150]
    assert len(noisy) == len(clean)
    turned = 0
    for before, after in zip(clean, noisy):
        if after != before:
            turned += 1
            assert after["chosen"] == before["rejected"]
            assert after["rejected"] == before["chosen"]
            assert after["gold"] == before["gold"][::-1]
            assert after["prompt"] == before["prompt"]
    assert abs(turned / 150 - 0.25) < 0.12  # three standard deviations


def test_reference_samples_are_n_in_a_row_for_each_prompt(run):
    """Bug: gold (M, N) whose rows mix the prompts, or a list of prompts that ends before M."""
    _, heldout = run.prompts()
    M = len(heldout) + 2  # more than there are
    rollouts, gold = common.reference_samples(run, M, 2, 0)
    assert gold.shape == (M, 2)
    prompts = []
    for rollout in rollouts:
        for ids, start in zip(rollout.ids.tolist(), rollout.start.tolist()):
            prompts.append(ids[start:rollout.P])
    assert prompts[0::2] == prompts[1::2] == heldout + heldout[:2]


def test_gold_accuracy_equals_a_loop(run):
    """Bug: a label that was flipped counts as right, or pairs of equal gold count."""
    pairs = common.labelled(run, 60, 1, 0.5)
    pairs.append(dict(pairs[0], gold=[1.0, 1.0]))
    model = run.load_network("reward")
    chosen, rejected = common.score_pairs(model, pairs, common.pad_id(run.tokenizer))
    right = []
    for pair, a, b in zip(pairs, chosen.tolist(), rejected.tolist()):
        if pair["gold"][0] != pair["gold"][1]:
            right.append((a > b) == (pair["gold"][0] > pair["gold"][1]))
    assert common.gold_accuracy(run, model, pairs) == pytest.approx(sum(right) / len(right))
    assert sum(right) / len(right) > 0.5


@pytest.mark.slow
def test_members_are_normalised_on_the_samples_of_sft(run):
    """Bug: an ensemble whose members differ by their offsets, so that UWO and WCO compare offsets."""
    members = common.fit_ensemble(run, common.labelled(run, 64), 2, 0)
    samples = sample_policy(run.load_network("sft"), run.prompts()[0][:512], run.config.response_tokens, 1.0, 0, "")
    for member in members:
        scores = torch.cat([member(batch) for batch in samples])
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert not torch.equal(members[0].score.weight, members[1].score.weight)


def test_a_policy_is_trained_on_the_reward_and_only_measured_by_gold(run):
    """Bug: PPO of the SFT network itself, or one that is trained on gold. A reward of 0 leaves score and KL at 0."""
    class Nothing(torch.nn.Module):
        def forward(self, batch):
            return torch.zeros(len(batch))

    sft = run.load_network("sft")
    before = {name: value.clone() for name, value in sft.state_dict().items()}
    policy, rows = common.optimise(run, Nothing(), 0.1, 2, 0, critic=run.load_network("reward"))
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["score"] == 0 for row in rows)
    assert any(row["gold"] != 0 for row in rows)
    for name, value in run.load_network("sft").state_dict().items():
        assert torch.equal(value, before[name])
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_sft_judged_against_itself_is_at_distance_0(run):
    """Bug: a KL, a win rate or a length of something else than the policy's answers."""
    sft = run.load_network("sft")
    rollouts, gold = common.answers(run, sft, 40, 3)
    lengths = torch.cat([rollout.response_lens for rollout in rollouts])
    row = common.judge(run, sft, sft, gold, 3, run.load_network("reward"))  # the same seed: the same answers
    assert row["gold"] == pytest.approx(gold.mean().item())
    assert row["gold_se"] == pytest.approx(gold.std().item() / math.sqrt(40))
    assert row["length"] == pytest.approx(lengths.float().mean().item())
    assert (row["kl"], row["d"], row["wins"]) == (0, 0, 0.5)
    assert math.isfinite(row["score"])


# ---------------------------------------------------------------------------------------------------------------------
# curves

def test_peak_and_fall():
    """
    Bugs: the peak of one seed instead of the mean's; the fall from each seed's own luckiest point.

    From there, noise alone would fall by two deviations.
    """
    curves = [[0.0, 2.0, 1.0], [0.0, 1.0, 1.5]]
    # the other seed has its peak at 2 for the first seed, and at 1 for the second
    assert common.peak_and_fall(curves) == (1, *mean_se([0.0, -0.5]))
    assert common.peak_and_fall([[0.0, 3.0, 1.0]]) == (1, 2.0, 0.0)
    noise = torch.randn(300, 3, 8, generator=torch.Generator().manual_seed(0)).tolist()
    falls = [common.peak_and_fall(curves)[1] for curves in noise]
    assert abs(mean_se(falls)[0]) < 0.12  # three standard errors; 0.9 if a seed helps to choose its own peak


def test_windows_and_interpolation():
    """Bugs: a window that mixes two, a last one that is divided by the full size, a line through the wrong points."""
    rows = [dict(x=float(i)) for i in range(7)]
    assert common.windows(rows, "x", 3) == [1.0, 4.0, 6.0]
    points = [-1, 0, 0.5, 1, 1.5, 2, 9]
    values = [common.interpolate(x, [2.0, 0.0, 1.0], [5.0, 1.0, 2.0]) for x in points]
    assert values == [1.0, 1.0, 1.5, 2.0, 3.5, 5.0, 5.0]
    assert common.powers(16) == [1, 2, 4, 8, 16]


def test_curves_by_seed_and_their_mean():
    """Bug: rows of another setting, or two seeds in one curve."""
    rows = [
        dict(seed=0, beta=0.1, gold=1.0), dict(seed=1, beta=0.1, gold=2.0),
        dict(seed=0, beta=None, gold=9.0), dict(seed=0, beta=0.1, gold=3.0), dict(seed=1, beta=0.1, gold=6.0),
    ]
    curves = common.curves_by_seed(rows, "gold", 2, beta=0.1)
    assert curves == [[1.0, 3.0], [2.0, 6.0]]
    means, errors = common.mean_curve(curves)
    assert means == [1.5, 4.5]
    assert errors == pytest.approx([0.5, 1.5])
    assert common.select(rows, beta=None) == [rows[2]]
    assert common.select(rows, beta=None, missing=None) == []


# ---------------------------------------------------------------------------------------------------------------------
# verdicts

def test_together():
    """Bug: a study counts as reproduced although a part of it failed, or could not be judged."""
    assert common.together([True, True]) is True
    assert common.together([True, None]) is None
    assert common.together([None, False, True]) is False


def test_a_small_pass_rules_nothing():
    """Bug: a verdict from a quick pass, or from two seeds."""
    assert common.ruled(True, True, "w") == "not tested here: w"
    assert common.ruled(False, False, "w") == "not reproduced: w"
    assert common.ruled(False, None, "w") == "not tested here: w"
