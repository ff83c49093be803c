"""The exact part of `limits`: fitted rewards and shaping, compared with closed forms and plain loops."""

import pytest
import torch

from mdp import kl, objective, response_logp, solve, win_probabilities
from studies import limits_rewards


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ratings_are_fitted_by_the_smallest_weights():
    """
    Bug: the kernel's rows of labelled responses are used in the place of its columns.

    Oracle: the solution by the pseudo-inverse, with the indicators written out.
    """
    tree, _, rewards, generator = limits_rewards.tree_with_taste(0, 3, 0.5)
    features = limits_rewards.ngram_counts(tree)
    labelled = torch.randperm(tree.Y, generator=generator)[:9]
    all_features = torch.cat([features, torch.eye(tree.Y, dtype=torch.float64)], dim=1)
    weights = torch.linalg.pinv(all_features[labelled]) @ rewards[labelled]
    learned = limits_rewards.fit_ratings(features, rewards, labelled)
    assert torch.allclose(learned, all_features @ weights, atol=1e-9)
    assert torch.allclose(learned[labelled], rewards[labelled], atol=1e-9)


def test_bradley_terry_finds_the_rewards_that_made_the_labels():
    """Bug: a wrong sign or a transposed gradient. Two opposite annotators must leave no preference."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wins = win_probabilities(rewards)
    assert torch.allclose(limits_rewards.fit_bradley_terry(wins), rewards - rewards.mean(), atol=1e-9)
    pooled = (wins + win_probabilities(-rewards)) / 2
    assert limits_rewards.fit_bradley_terry(pooled).abs().max() < 1e-9


def solve_token_rewards(tree, ref, token_rewards, beta):
    """Soft value iteration with a reward at every token (Y, R). Returns log pi* (S, V) and J*."""
    reward_of = {}  # state after the token -> reward
    for i, response in enumerate(tree.leaves):
        for t in range(len(response)):
            reward_of[response[:t + 1]] = token_rewards[i, t]
    ref_logp = ref.log_softmax(-1)
    value = {response: 0.0 for response in tree.leaves}
    logp = torch.zeros_like(ref)
    for s in reversed(range(tree.S)):
        state = tree.states[s]
        q = torch.stack([reward_of[(*state, a)] + value[(*state, a)] for a in range(ref.shape[1])])
        z = ref_logp[s] + q / beta
        value[state] = beta * z.logsumexp(0)
        logp[s] = z.log_softmax(0)
    return logp, value[()]


def test_shaping_changes_no_return_and_no_optimum():
    """
    Bug: the potential is not taken back at the end, so that writing itself is paid.

    Oracle: soft value iteration with the shaped rewards, token by token.
    """
    tree, ref, rewards, _ = limits_rewards.tree_with_taste(0, 3, 0.1)
    shaping = limits_rewards.shape_rewards(tree, rewards)                                     # (Y, R)
    assert shaping.sum(dim=1).abs().max() < 1e-9
    assert shaping.abs().max() > 0.1
    assert (shaping[~tree.mask] == 0).all()

    shaped = shaping.clone()
    for i, response in enumerate(tree.leaves):
        shaped[i, len(response) - 1] += rewards[i]
    logp, J = solve_token_rewards(tree, ref, shaped, 0.2)
    best = solve(tree, ref, rewards, 0.2)
    assert torch.allclose(logp, best.logp, atol=1e-9)
    assert abs(J - best.J) < 1e-9


def test_objective_of_the_reference_on_the_trees_of_the_study():
    """Bug: rewards that are not in the order of the responses. For the reference J = J* - beta KL(ref || pi*)."""
    tree, ref, rewards, _ = limits_rewards.tree_with_taste(1, 4, 0.5)
    best = solve(tree, ref, rewards, 0.3)
    expected = best.J - 0.3 * kl(tree, ref, best.logp)
    assert abs(expected - objective(tree, ref, ref, rewards, 0.3)) < 1e-9
    assert response_logp(tree, ref).exp().sum().item() == pytest.approx(1)

    without_whim = limits_rewards.tree_with_taste(1, 4, 0.0)[2]
    good = tree.leaves.index((1, 0))  # "good ."
    bad = tree.leaves.index((2, 0))  # "bad ."
    assert without_whim[good] > without_whim[bad]
