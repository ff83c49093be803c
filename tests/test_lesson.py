"""lesson.py: PPO, DPO and IPO find the solution that mdp.py computes; the command line."""

import itertools
import os
import runpy
import sys

import pytest
import torch
from helpers import close  # and one thread: the tensors are tiny

import mdp
from lesson import problem, taste
from mdp import draw_labels, kl, learn_dpo, learn_ppo, response_logp, solve, solve_ipo, win_probabilities


def test_taste_by_hand():
    """Bugs: very counts for more than the next word; a cut response loses no point; the prompt is scored."""
    for text, score in (("good .", 0.5), ("bad .", -0.5), ("very good .", 1.5), ("very good bad", 0.0), (".", 0.0),
                        ("very very bad", -2.5), ("very .", 0.0), ("good very bad", -2.0)):
        assert taste(("very", "bad"), text.split()) == score, text


@pytest.mark.parametrize("seed", [1, 2])
def test_ppo_and_dpo_find_pi_star(seed):
    """
    Bugs in token_rewards, gae, whiten, policy_loss, value_loss or dpo_loss that leave a gradient, but one that is 0
    at the wrong policy.
    """
    tree, ref, rewards, generator = problem(seed)
    best = solve(tree, ref, rewards, 0.5)
    policies = [logits for _, logits, _ in learn_ppo(tree, ref, rewards, 0.5, generator)]
    distances = [kl(tree, logits, best.logp).item() for logits in policies]
    assert len(policies) == 101
    assert distances[0] > 0.5 and distances[20] < 0.1 and distances[-1] < 0.01
    chosen, rejected = draw_labels(win_probabilities(rewards), 400, generator)
    policies = [logits for _, logits in learn_dpo(tree, ref, chosen, rejected, 0.5, generator)]
    distances = [kl(tree, logits, best.logp).item() for logits in policies]
    assert len(policies) == 201
    assert distances[0] > 0.5 and distances[50] < 0.1 and distances[-1] < 0.01


def test_certain_labels_drive_dpo_away_and_stop_ipo():
    """Bugs: a DPO loss that saturates or is clipped; an IPO loss that still pushes when its margin is reached."""
    tree, ref, rewards, generator = problem(0)
    best = solve(tree, ref, rewards, 0.5)
    wins = (torch.sign(rewards[:, None] - rewards) + 1) / 2  # the better response always wins
    ipo_optimum = solve_ipo(tree, ref, wins, 0.5)
    chosen, rejected = draw_labels(wins, 1, generator)
    assert (rewards[chosen] > rewards[rejected]).all()

    def margin(logits):
        f = response_logp(tree, logits) - response_logp(tree, ref)
        return (f[chosen] - f[rejected]).mean().item()

    dpo = [logits for _, logits in learn_dpo(tree, ref, chosen, rejected, 0.5, steps=400)]
    grown = [margin(dpo[i]) for i in (0, 50, 100, 200, 400)]
    assert all(a + 1 < b for a, b in itertools.pairwise(grown)) and grown[-1] > 10
    away = [kl(tree, best.logp, dpo[i]).item() for i in (50, 100, 200, 400)]
    assert all(a < b for a, b in itertools.pairwise(away)) and away[-1] > 2
    ipo = [logits for _, logits in learn_dpo(tree, ref, chosen, rejected, 0.5, kind="ipo", steps=400)]
    close(kl(tree, ipo[-1], ipo_optimum.logp), 0.0, 1e-6)
    close(margin(ipo[-1]), margin(ipo_optimum.logp), 1e-4)


def command_line(monkeypatch, *arguments):
    """`python mdp.py`, which is the lesson too, without another import of torch."""
    monkeypatch.setattr(sys, "argv", ["mdp.py", *arguments])
    runpy.run_path(mdp.__file__, run_name="__main__")


def test_the_lesson_from_the_command_line(monkeypatch, capsys):
    """Bug: a lesson that crashes half-way, or that misses the distance that it prints as its aim."""
    command_line(monkeypatch, "--seed", "0")
    out = capsys.readouterr().out
    last = " ".join(out.splitlines()[-2:])
    for name in ("PPO", "DPO", "IPO"):
        assert float(last.split(f"{name} ")[1].split()[0].rstrip(",;.")) < 0.01
    assert "nan" not in out
    assert [line[:2] for line in out.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5.", "6."]


@pytest.mark.parametrize("arguments", [["--sede", "1"], ["--seed", "one"], ["1"], ["--seed", str(10 ** 30)],
                                       ["--seed", "-1"]])
def test_a_wrong_command_line_gets_one_line(arguments, monkeypatch, capsys):
    """Bug: a traceback, a page of usage, or a flag that is silently ignored."""
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and arguments[-1] in err


def test_a_reader_that_leaves_early_sees_no_traceback(monkeypatch):
    """Bug: `python mdp.py | head` ends in a BrokenPipeError, or in a second one when Python flushes at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stdout:  # line by line, so the first line fails
        monkeypatch.setattr(sys, "stdout", stdout)
        command_line(monkeypatch)
        print("what Python flushes at exit")
