"""lesson.py: PPO, DPO and IPO find the solution of mdp.py, and every printed number is computed again."""

import math
import re
import runpy
import signal
import sys

import pytest
import torch
from helpers import close, double, noise, rng

import estimators
import lesson
import mdp
from lesson import problem, taste
from mdp import (
    draw_labels,
    kl,
    learn_dpo,
    learn_ppo,
    objective,
    response_logp,
    solve,
    solve_ipo,
    win_probabilities,
)


def test_taste_by_hand():
    """Bug: very counts for more than the next word; a cut response loses no point; the prompt is scored."""
    for text, score in (("good .", 0.5), ("bad .", -0.5), ("very good .", 1.5), ("very good bad", 0.0), (".", 0.0),
                        ("very very bad", -2.5), ("very .", 0.0), ("good very bad", -2.0)):
        assert taste(("very", "bad"), text.split()) == score, text


def test_ppo_and_dpo_find_pi_star(monkeypatch):
    """Bug: learning rates or numbers of samples, labels and steps with which the loops do not come near pi*."""
    sizes, rollout, dpo_loss = [], mdp.rollout, mdp.dpo_loss
    monkeypatch.setattr(mdp, "rollout", lambda *inputs: sizes.append(inputs[2]) or rollout(*inputs))
    monkeypatch.setattr(mdp, "dpo_loss", lambda *inputs: sizes.append(len(inputs[0])) or dpo_loss(*inputs))
    tree, ref, rewards, generator = problem(1)
    best = solve(tree, ref, rewards, 0.5)
    policies = [logits for _, logits, _ in learn_ppo(tree, ref, rewards, 0.5, generator)]
    assert len(policies) == 101 and kl(tree, ref, best.logp) > 0.5
    assert kl(tree, policies[20], best.logp) < 0.03 and kl(tree, policies[-1], best.logp) < 0.01
    chosen, rejected = draw_labels(win_probabilities(rewards), 400, generator)
    policies = [logits for _, logits in learn_dpo(tree, ref, chosen, rejected, 0.5, generator)]
    assert len(policies) == 201
    assert kl(tree, policies[50], best.logp) < 0.03 and kl(tree, policies[-1], best.logp) < 0.01
    assert sizes == [1024] * 101 + [4096] * 200


def test_the_problem_is_drawn_from_its_seed():
    """Bug: another size of the noise, a score of another response, or a generator that begins again."""
    tree, ref, rewards, generator = problem(3)
    expected = rng(3)
    assert torch.equal(ref, torch.randn(13, 4, generator=expected, dtype=torch.float64)) and tree.Y == 40
    noise = torch.randn(40, generator=expected, dtype=torch.float64).tolist()
    words = [[".", "good", "bad", "very"][token] for leaf in tree.leaves for token in leaf]
    for leaf, reward, e in zip(tree.leaves, rewards.tolist(), noise):
        response, words = words[:len(leaf)], words[len(leaf):]
        close(reward, taste((), response) + 0.1 * e)
    assert torch.equal(generator.get_state(), expected.get_state())


# ---- every printed number --------------------------------------------------------------------------------------------

def table_of(text, first):
    """A printed table as its headers and {label: numbers}, read by the place of each column under its header."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line[:17].strip() == first)
    places = range(17, len(lines[at]), 12)
    headers = [lines[at][place:place + 12].strip() for place in places]
    rows = {}
    for line in lines[at + 1:]:
        if not line.strip():
            break
        assert len(line) == len(lines[at])
        rows[line[:17].strip()] = [float(line[place:place + 12]) for place in places]
    return headers, rows


def test_every_printed_number_is_computed_again(monkeypatch, capsys):
    """
    Bug: columns that are exchanged; a wrong row label; a KL with its roles exchanged; DPO shown for IPO, or certain
    labels for noisy ones; the optimum of other labels; a policy under another name; a beta that is not passed on.

    Nothing is learned: the loops yield policies that are drawn at random. The quantities of mdp.py are enumerated in
    test_mdp.py, its loops replayed.
    """
    tree, ref, rewards, _ = problem(1)
    beta, runs, labels = 0.4, {}, []

    def pretend(name, steps):
        """A run of random policies, the reference first."""
        runs[name] = [ref, *(ref + 0.5 * noise(100 * len(runs) + step, 13, 4) for step in range(1, steps + 1))]
        return enumerate(runs[name])

    def pretend_ppo(tree, its_ref, its_rewards, its_beta, generator):
        assert torch.equal(its_ref, ref) and torch.equal(its_rewards, rewards)
        assert its_beta == beta and isinstance(generator, torch.Generator)
        for i, logits in pretend("PPO", 100):
            yield i, logits, double(i - 1e-5)

    def pretend_dpo(tree, its_ref, chosen, rejected, its_beta, generator, kind, training):
        assert torch.equal(its_ref, ref) and its_beta == beta and isinstance(generator, torch.Generator)
        certain = len(chosen) == 780
        labels.append((kind, training.steps, chosen, rejected))
        assert training[1:] == (4096, 0.2, 2)
        return pretend("certain_" * certain + kind.upper(), training.steps)

    monkeypatch.setattr(mdp, "learn_ppo", pretend_ppo)
    monkeypatch.setattr(mdp, "learn_dpo", pretend_dpo)
    final = lesson.lesson(1, beta)
    out = capsys.readouterr().out
    sections = [None, *re.split(r"^\d\. ", out, flags=re.M)[1:]]
    best = solve(tree, ref, rewards, beta)
    wins = win_probabilities(rewards)
    own = {"IPO": solve_ipo(tree, ref, wins, beta).logp,
           "certain_IPO": solve_ipo(tree, ref, (wins > 0.5) + 0.5 * (wins == 0.5), beta).logp}

    def log_ratio(logits):
        return response_logp(tree, logits) - response_logp(tree, ref)

    def near(numbers, expected, digits=4):
        for number, value in zip(numbers, expected, strict=True):
            assert abs(number - float(value)) <= 0.5000001 * 10 ** -digits, (numbers, expected)

    # 1. and 2. an episode and the solution
    assert [line.strip() for line in sections[1].splitlines() if line.startswith("   state [")] == [
        "state [the film was]  action [very]  reward 0.0  done False",
        "state [the film was very]  action [good]  reward 0.0  done False",
        "state [the film was very good]  action [.]  reward 1.5  done True"]
    assert sections[2].startswith("The solution: 13 inner states, 40 responses, score taste + noise, beta 0.4\n")
    J_ref, gap = objective(tree, ref, ref, rewards, beta), kl(tree, best.logp, ref)
    first, second = [[float(x) for x in re.findall(r"= (-?\d+\.\d+)", line)] for line in sections[2].splitlines()[2:4]]
    near(first, [J_ref, best.J, gap])
    near(second, [best.J - J_ref, beta * kl(tree, ref, best.logp)], 6)
    # 3. PPO
    assert sections[3].startswith("PPO on 1024 sampled responses")
    headers, rows = table_of(sections[3], "iteration")
    assert headers == ["sampled J", "exact J", "J*", "KL(pi||pi*)"]
    assert list(rows) == ["0", "5", "10", "20", "50", "100"]
    for i, numbers in rows.items():
        logits = runs["PPO"][int(i)]
        J = objective(tree, logits, ref, rewards, beta)
        near(numbers, [int(i) - 1e-5, J, best.J, kl(tree, logits, best.logp)])
    assert "-0.0000" not in out
    # 4. and 5. DPO and IPO
    for section, prefix, (_, _, chosen, rejected) in ((4, "", labels[0]), (5, "certain_", labels[2])):
        headers, rows = table_of(sections[section], "step")
        assert headers == ["DPO mean h", "KL(pi||pi*)", "KL(pi*||pi)", "IPO mean h", "KL(pi||pi*)", "KL(pi||own)"]
        assert list(rows) == ["0", "10", "20", "50", "100", "200", "500"][:7 if prefix else 6]
        for step, numbers in rows.items():
            dpo, ipo = [runs[prefix + kind][int(step)] for kind in ("DPO", "IPO")]
            near(numbers, [(log_ratio(dpo)[chosen] - log_ratio(dpo)[rejected]).mean(), kl(tree, dpo, best.logp),
                           kl(tree, best.logp, dpo), (log_ratio(ipo)[chosen] - log_ratio(ipo)[rejected]).mean(),
                           kl(tree, ipo, best.logp), kl(tree, ipo, own[prefix + "IPO"])])
    assert "h = 1 / (2 beta) = 1.2 in every pair" in sections[5]
    assert [(kind, steps) for kind, steps, _, _ in labels] == [("dpo", 200), ("ipo", 200), ("dpo", 500), ("ipo", 500)]
    assert all(torch.equal(x, y) for at in (0, 2) for x, y in zip(labels[at][2:], labels[at + 1][2:]))
    check_labels(*labels[0][2:], *labels[2][2:], rewards)
    # 6. probabilities
    shown = {"ref": ref, "pi*": best.logp, **{name: runs[name][-1] for name in (
        "PPO", "DPO", "IPO", "certain_DPO", "certain_IPO")}}
    headers, rows = table_of(sections[6], "response")
    assert headers == ["score", *shown]
    order = response_logp(tree, best.logp).argsort(descending=True)[:8].tolist()
    assert list(rows) == [" ".join((".", "good", "bad", "very")[token] for token in tree.leaves[y]) for y in order]
    for y, numbers in zip(order, rows.values()):
        near(numbers, [rewards[y], *(response_logp(tree, logits)[y].exp() for logits in shown.values())])
    assert final == pytest.approx({name.lower(): kl(tree, runs[name][-1], own.get(name, best.logp)).item()
                                   for name in runs})


def check_labels(chosen, rejected, better, worse, rewards):
    """400 labels of each pair, chosen as often as the scores say; and one of each pair, the better response."""
    assert (rewards[better] > rewards[worse]).all() and len({frozenset(pair) for pair in zip(
        better.tolist(), worse.tolist())}) == 780
    counts = torch.bincount(chosen * 40 + rejected, minlength=1600).view(40, 40)
    a, b = torch.triu_indices(40, 40, 1)
    assert (counts[a, b] + counts[b, a] == 400).all()
    p = torch.sigmoid(rewards[a] - rewards[b])
    chi_square = ((counts[a, b] - 400 * p) ** 2 / (400 * p * (1 - p))).sum()
    assert abs(chi_square - 780) < 4 * math.sqrt(2 * 780)


@pytest.mark.slow
def test_the_lesson_as_it_is(capsys):
    """Bug: a policy that ends away from its optimum, so that the lesson's text is not so."""
    final = lesson.lesson(1)
    assert max(final[name] for name in ("ppo", "dpo", "ipo")) < 0.01 < final["certain_dpo"]
    assert final["certain_ipo"] < 0.05 and "-0.0000" not in capsys.readouterr().out


def test_the_last_lines_name_each_distance(monkeypatch, capsys):
    """Bug: the KL of another policy, the certain labels for the noisy ones, a seed that is not shown."""
    monkeypatch.setattr(lesson, "lesson", lambda seed: dict(ppo=0.11, dpo=0.22, ipo=0.33, certain_dpo=0.44,
                                                            certain_ipo=0.55))
    lesson.main(["--seed", "7"])
    assert capsys.readouterr().out.split("\n") == [
        "", "KL from pi*: PPO 0.1100 nats, DPO 0.2200. Both aim below 0.01.",
        "KL from its own optimum: IPO 0.3300. Seed 7.", ""]


# ---- the command lines of both lessons -------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [lesson, estimators])
@pytest.mark.parametrize("arguments, seed", [([], 0), (["--seed", "7"], 7)])
def test_the_seed_is_the_option_and_beta_a_half(arguments, seed, script, monkeypatch):
    """Bug: a seed without effect, another default seed, or another beta than that of the figures in docs/."""
    seen = []
    monkeypatch.setattr(script, "problem", lambda seed: seen.append(seed) or (None, None, None, None))
    monkeypatch.setattr(mdp, "solve", lambda *inputs: seen.append(inputs[-1]) or 1 / 0)  # no need to run on
    with pytest.raises(ZeroDivisionError):
        script.main(arguments)
    assert seen == [seed, 0.5]


@pytest.mark.parametrize("script", [lesson, estimators])
@pytest.mark.parametrize("arguments", [["--sede", "1"], ["--seed", "one"], ["--seed", "-1"], ["--seed", str(10 ** 30)]])
def test_a_wrong_command_line_gets_one_line(arguments, script, monkeypatch, capsys):
    """Bug: a traceback, a page of usage, or a flag that is silently ignored; a traceback after `| head`."""
    handlers = []
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *handler: handlers.append(handler))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and arguments[-1] in err
    assert handlers == [(signal.SIGPIPE, signal.SIG_DFL)]
