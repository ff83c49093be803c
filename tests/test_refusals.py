"""What the functions of the lessons refuse. The settings of a run are checked before; other code calls them too."""

import pytest
import torch
from helpers import PAD, double, tiny_gpt, tiny_reward_model

from data import collate
from dpo import dpo_loss
from evaluate import best_of_n, optimum
from grpo import group_advantages
from mdp import Tree, solve
from model import generate
from ppo import clipped_surrogate
from robust import RobustReward

X = torch.zeros(2, 8)
TREE = Tree(2, 1)


@pytest.mark.parametrize("call, message", [
    (lambda: clipped_surrogate(X, X, X, X > -1, clip=0.0), "clip must be above 0, got 0.0"),
    (lambda: collate([[1], []], [[2], [2]], PAD), "empty prompt"),
    (lambda: dpo_loss(X, X, X, X, 0.0), "beta must be above 0"),
    (lambda: dpo_loss(X, X, X, X, 0.1, "kto"), "unknown kind 'kto'"),
    (lambda: dpo_loss(X, X, X, X, 0.1, "ipo", 0.1), "with 'ipo'"),
    (lambda: dpo_loss(X, X, X, X, 0.1, "robust", double([0.1, 0.5])), "with 'robust'"),
    (lambda: group_advantages(torch.zeros(6), 3, "grpo "), "kind must be one of grpo"),
    (lambda: group_advantages(torch.zeros(6), 4, "rloo"), "rloo needs rewards .B,. in groups of at least 2"),
    (lambda: optimum(X, 0.0), "beta must be above 0"),
    (lambda: solve(TREE, torch.zeros(TREE.S, 2), torch.zeros(TREE.Y), 0.0), "beta must be above 0"),
    (lambda: best_of_n(X, X, 9), "best of 9 cannot be estimated from 8 samples"),
    (lambda: best_of_n(X, X, 0), "best of 0 cannot"),
    (lambda: generate(tiny_gpt(0), [[1]], 0), "max_new_tokens must be at least 1"),
    (lambda: generate(tiny_gpt(0), [[1], [1] * 22], 3), "22 prompt columns and 3 new .* fit.* 24"),
    (lambda: generate(tiny_gpt(0), [[1]], 3, 0), "the temperature must be above 0"),
    (lambda: RobustReward([tiny_reward_model()], "mean", 0.5), "a kind of ensemble"),
    (lambda: RobustReward([tiny_reward_model()], "brme", 1.5), "a kind of ensemble")])
def test_what_would_train_to_something_wrong_is_refused(call, message):
    """Bug: a value that cannot be meant gives numbers all the same, or a message of torch."""
    with pytest.raises(ValueError, match=message):
        call()
