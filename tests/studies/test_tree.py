"""The study `tree`: many policies side by side, compared with one policy at a time in plain loops."""

import itertools

import pytest
import torch

from studies import tree


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def probability_alone(weights, trajectory):
    """p of one trajectory under one policy, state by state: a row of the table, or a step of the RNN at a time."""
    probability = 1.0
    row = 0  # of the table's states at this depth
    hidden = None
    for t, action in enumerate(trajectory):
        if "logits" in weights:
            first = (0, 1, 4)[t]
            logits = weights["logits"][first + row]
            row = 3 * row + action
        else:
            if t == 0:
                before = weights["embed"][3] + weights["bias"][0]
            else:
                before = weights["embed"][trajectory[t - 1]] + hidden @ weights["recur"] + weights["bias"][0]
            hidden = torch.tanh(before)
            logits = hidden @ weights["out"] + weights["out_bias"][0]
        probability = probability * torch.softmax(logits, dim=0)[action]
    return probability


def draw_policies(policy):
    """Three policies: a list of their weights, and the same weights stacked."""
    drawn = [tree.draw_weights(policy, torch.Generator().manual_seed(seed), H=4) for seed in range(3)]
    stacked = {}
    for name in drawn[0]:
        stacked[name] = torch.stack([weights[name] for weights in drawn]).requires_grad_()
    return drawn, stacked


@pytest.mark.parametrize("policy", ["rnn", "table"])
def test_trajectory_probabilities_equal_a_loop_over_states(policy):
    """Bug: states are numbered in another order than trajectories, or one policy's weights leak into another's."""
    drawn, stacked = draw_policies(policy)
    logp = tree.trajectory_logp(stacked)
    for n, y in itertools.product(range(3), range(27)):
        alone = probability_alone(drawn[n], tree.TRAJECTORIES[y].tolist())
        assert logp[n, y].exp().item() == pytest.approx(alone.item(), abs=1e-12)
    assert torch.allclose(logp.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("policy", ["rnn", "table"])
def test_policies_trained_side_by_side_are_policies_trained_alone(policy):
    """Bug: one policy's loss leaks into another's gradient."""
    drawn, stacked = draw_policies(policy)
    target = tree.TRAJECTORIES[5].tolist()
    *_, together = tree.descend(stacked, lambda logp: (logp[:, 5] ** 2).sum(), 3, 0.1)
    for n in range(3):
        alone = {name: x.clone().requires_grad_() for name, x in drawn[n].items()}
        optimizer = torch.optim.Adam(alone.values(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (probability_alone(alone, target).log() ** 2).backward()
            optimizer.step()
        assert together[n, 5].exp().item() == pytest.approx(probability_alone(alone, target).item(), abs=1e-9)


def test_a_seed_is_the_same_in_any_number_of_seeds():
    """Bug: the numbers of all seeds come from one stream, or the loss is a mean over seeds and not a sum."""
    few = tree.tree_job("rnn", "dpo", 0.1, 1, 20)
    many = tree.tree_job("rnn", "dpo", 0.1, 3, 20)
    for cell, p in few.items():
        assert abs(p[:, 0] - many[cell][:, 0]).max() < 1e-8
        assert abs(p.sum(axis=2) - 1).max() < 1e-9


def test_only_the_fitted_reference_prefers_the_chosen_trajectory():
    """Bug: the two references are swapped, or the fit reaches the random ones too."""
    found = tree.tree_job("table", "dpo", 0.1, 2, 60)
    for pair in tree.PAIRS:
        random_start = found[pair, "random"][0, :, 0]
        for seed in range(2):
            weights = tree.draw_weights("table", torch.Generator().manual_seed(seed))
            logp = tree.trajectory_logp({"logits": weights["logits"][None]})
            assert (abs(logp.exp() - random_start[seed]) < 1e-9).any()
        assert (found[pair, "fitted to the chosen"][0, :, 0] > random_start).all()


def test_pairs_differ_where_they_should():
    """Bug: a pair of one trajectory with itself, or one kind of pair in place of the other."""
    generator = torch.Generator().manual_seed(0)
    for pair, apart in (("one token apart", 1), ("all tokens apart", 3)):
        for _ in range(50):
            chosen, rejected = tree.TRAJECTORIES[tree.draw_pair(pair, generator)]
            assert (chosen != rejected).sum() == apart
