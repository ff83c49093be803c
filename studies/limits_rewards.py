"""
The trees of limits_exact: their true rewards, and the reward models that are fitted to them.

Every response is listed, so a reward is a vector with one number for each response.

Letters: S states in which an action is taken, Y responses, V vocabulary, R horizon, F features.
"""

import torch

from lesson import VOCABULARY, taste
from mdp import Tree, win_probabilities


def tastes(tree):
    """Compute the taste of every response (Y,)."""
    scores = [taste((), [VOCABULARY[action] for action in response]) for response in tree.leaves]
    return torch.tensor(scores, dtype=torch.float64)


def tree_with_taste(seed, horizon, whim):
    """
    Make a tree of the VOCABULARY, a random reference (S, V), rewards (Y,) and the generator that made them.

    The rewards are `taste` plus whim * N(0, 1), which nothing can predict. Their mean is 0 and their variance 1.
    """
    tree = Tree(len(VOCABULARY), horizon)
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(tree.S, len(VOCABULARY), generator=generator, dtype=torch.float64)
    rewards = tastes(tree) + whim * torch.randn(tree.Y, generator=generator, dtype=torch.float64)
    return tree, ref, (rewards - rewards.mean()) / rewards.std(), generator


def ngram_counts(tree):
    """Count each word and each pair of neighbours in each response, (Y, V + V^2): what can generalise."""
    V = len(VOCABULARY)
    counts = torch.zeros(tree.Y, V + V * V, dtype=torch.float64)
    for i, response in enumerate(tree.leaves):
        for word in response:
            counts[i, word] += 1
        for first, second in zip(response, response[1:]):
            counts[i, V + V * first + second] += 1
    return counts


def fit_ratings(features, rewards, labelled):
    """
    Fit a reward (Y,) to the ratings of the labelled responses, exactly and with the smallest weights.

    Each of the `features` (Y, F) has a weight, and so has an indicator for each response. This is kernel regression
    without noise, K = F F' + 1:  r = K[:, labelled] K[labelled, labelled]^-1 rewards[labelled].
    """
    kernel = features @ features.T + torch.eye(len(features), dtype=features.dtype)        # (Y, Y)
    among_labelled = kernel[labelled][:, labelled]
    return kernel[:, labelled] @ torch.linalg.solve(among_labelled, rewards[labelled])


def fit_bradley_terry(wins, steps=20):
    """
    Fit rewards (Y,) of mean 0 by maximum likelihood, with Newton's method.

    In all pairs, equally frequent, a wins against b with probability wins[a, b].
    """
    r = torch.zeros(len(wins), dtype=wins.dtype)
    for _ in range(steps):
        p = win_probabilities(r)
        curvature = p * (1 - p)                                                            # (Y, Y)
        hessian = torch.diag(curvature.sum(dim=1)) - curvature
        hessian = hessian + 1 / len(wins)  # without this constant it is singular; it fixes the mean of r at 0
        r = r + torch.linalg.solve(hessian, (wins - p).sum(dim=1))
    return r


def shape_rewards(tree, rewards):
    """
    Compute potential-based shaping (Ng et al. 1999), F = Phi(s') - Phi(s) at every token: (Y, R).

    Phi(s) is the taste of the words so far, 0 at the root. At the end it is 0 again, so F sums to 0 over a
    response, and every return, the policy's objective and its optimum stay what they were.
    """
    taste_of = tastes(tree)
    centred = taste_of - taste_of.mean()
    scale = (centred @ rewards / (centred @ taste_of)).item()  # the rewards are tastes in other units: their slope

    def potential(state):
        words = [VOCABULARY[action] for action in state]
        return scale * taste((), [*words, VOCABULARY[0]])  # a period, so that the words do not count as cut

    shaping = torch.zeros(tree.mask.shape, dtype=torch.float64)
    for i, response in enumerate(tree.leaves):
        path = [*[potential(response[:t]) for t in range(len(response))], 0.0]  # 0 at the end
        shaping[i, :len(response)] = torch.tensor(path).diff()
    return shaping
