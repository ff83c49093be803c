"""lesson.py: PPO, DPO and IPO find the solution of mdp.py, and every printed number is computed again."""

import itertools
import re

import pytest
import torch
from helpers import close, double, near, noise, rng

import estimators
import lesson
import mdp
from lesson import problem, taste
from mdp import draw_labels, kl, objective, response_logp, solve, solve_ipo, win_probabilities


def test_taste_by_hand():
    """Bug: very counts for more than the next word; a cut response loses no point; the prompt is scored."""
    for text, score in (("good .", 0.5), ("bad .", -0.5), ("very good .", 1.5), ("very good bad", 0.0), (".", 0.0),
                        ("very very bad", -2.5), ("very .", 0.0), ("good very bad", -2.0)):
        assert taste(("very", "bad"), text.split()) == score, text


def test_the_problem_is_drawn_from_its_seed():
    """Bug: another size of the noise, a score of another response, or a generator that begins again."""
    tree, ref, rewards, generator = problem(3)
    expected = rng(3)
    assert torch.equal(ref, torch.randn(13, 4, generator=expected, dtype=torch.float64)) and tree.Y == 40
    errors = torch.randn(40, generator=expected, dtype=torch.float64).tolist()
    for leaf, reward, error in zip(tree.leaves, rewards.tolist(), errors):
        close(reward, taste((), [[".", "good", "bad", "very"][token] for token in leaf]) + 0.1 * error)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.slow
def test_the_lesson_as_it_is():
    """Bug: a policy that ends away from its optimum, so that the lesson's text is not so."""
    final = lesson.lesson(1)
    assert max(final[name] for name in ("ppo", "dpo", "ipo")) < 0.01 < final["certain_dpo"]
    assert final["certain_ipo"] < 0.05


def rows_below(text, header):
    """{label: numbers} of the rows of a printed table."""
    lines = text.splitlines()
    at = [line.split() for line in lines].index(header.split()) + 1
    rows = itertools.takewhile(str.strip, lines[at:])  # up to an empty line
    return {row[:17].strip(): [float(x) for x in row[17:].split()] for row in rows}


def test_every_printed_number_is_computed_again(monkeypatch, capsys):
    """Bug: columns, labels or roles of a KL are exchanged; DPO for IPO, certain labels for noisy ones, a lost state."""
    tree, ref, rewards, _ = problem(1)
    beta, runs, drawn = 0.4, {}, []

    def draw(*inputs):
        drawn.append((*inputs[:2], *draw_labels(*inputs)))
        return drawn[-1][2:]

    def pretend(name, steps):  # random policies, the reference first: test_mdp.py replays the loops
        runs[name] = [ref, *(ref + 0.5 * noise(100 * len(runs) + step, 13, 4) for step in range(1, steps + 1))]
        return enumerate(runs[name])

    def pretend_ppo(tree, its_ref, its_rewards, its_beta, generator):
        assert torch.equal(its_ref, ref) and torch.equal(its_rewards, rewards)
        assert its_beta == beta and isinstance(generator, torch.Generator)
        for i, logits in pretend("PPO", 100):
            yield i, logits, double(i - 1e-5)

    def pretend_dpo(tree, its_ref, chosen, rejected, its_beta, generator, kind, training):
        assert torch.equal(its_ref, ref) and its_beta == beta and isinstance(generator, torch.Generator)
        assert torch.equal(chosen, drawn[-1][2]) and torch.equal(rejected, drawn[-1][3])
        certain = len(drawn) == 2
        assert training == mdp.FOR_DPO._replace(steps=500 if certain else 200)
        return pretend("certain_" * certain + kind.upper(), training.steps)

    monkeypatch.setattr(mdp, "draw_labels", draw)
    monkeypatch.setattr(mdp, "learn_ppo", pretend_ppo)
    monkeypatch.setattr(mdp, "learn_dpo", pretend_dpo)
    final, run = {}, lesson.lesson
    monkeypatch.setattr(lesson, "lesson", lambda seed: final.update(run(seed, beta)) or final)
    lesson.main(["--seed", "1"])
    out = capsys.readouterr().out
    sections = [None, *re.split(r"^\d\. ", out, flags=re.M)[1:]]
    best, wins = solve(tree, ref, rewards, beta), win_probabilities(rewards)
    certain = (wins > 0.5) + 0.5 * (wins == 0.5)
    own = {"IPO": solve_ipo(tree, ref, wins, beta).logp, "certain_IPO": solve_ipo(tree, ref, certain, beta).logp}

    # 1. an episode
    assert sections[1].count("reward 0.0  done False") == 2
    assert "state [the film was very good]  action [.]  reward 1.5  done True" in sections[1]
    # 2. the solution
    assert "13 inner states, 40 responses, score taste + noise, beta 0.4" in sections[2]
    J_ref = objective(tree, ref, ref, rewards, beta)
    first, second = [[float(x) for x in re.findall(r"= (-?\d+\.\d+)", line)] for line in sections[2].splitlines()[2:4]]
    near(first, [J_ref, best.J, kl(tree, best.logp, ref)])
    near(second, [best.J - J_ref, beta * kl(tree, ref, best.logp)], 6)
    # 3. PPO
    rows = rows_below(sections[3], "iteration sampled J exact J J* KL(pi||pi*)")
    assert list(rows) == ["0", "5", "10", "20", "50", "100"]
    for i, numbers in rows.items():
        logits = runs["PPO"][int(i)]
        J = objective(tree, logits, ref, rewards, beta)
        near(numbers, [int(i) - 1e-5, J, best.J, kl(tree, logits, best.logp)])
    # 4. and 5. DPO and IPO
    for section, prefix, labels in ((4, "", drawn[0]), (5, "certain_", drawn[1])):
        its_wins, n, chosen, rejected = labels
        close(its_wins, certain if prefix else wins)
        assert n == (1 if prefix else 400)
        rows = rows_below(sections[section],
                          "step DPO mean h KL(pi||pi*) KL(pi*||pi) IPO mean h KL(pi||pi*) KL(pi||own)")
        assert list(rows) == ["0", "10", "20", "50", "100", "200", "500"][:7 if prefix else 6]
        for step, numbers in rows.items():
            dpo, ipo = [runs[prefix + kind][int(step)] for kind in ("DPO", "IPO")]
            f, g = [response_logp(tree, logits) - response_logp(tree, ref) for logits in (dpo, ipo)]
            near(numbers, [(f[chosen] - f[rejected]).mean(), kl(tree, dpo, best.logp), kl(tree, best.logp, dpo),
                           (g[chosen] - g[rejected]).mean(), kl(tree, ipo, best.logp),
                           kl(tree, ipo, own[prefix + "IPO"])])
    assert "h = 1 / (2 beta) = 1.2 in every pair" in sections[5]
    # 6. probabilities
    shown = {"ref": ref, "pi*": best.logp, **{name: policies[-1] for name, policies in runs.items()}}
    rows = rows_below(sections[6], "response score ref pi* PPO DPO IPO certain_DPO certain_IPO")
    order = response_logp(tree, best.logp).argsort(descending=True)[:8].tolist()
    assert list(rows) == [" ".join((".", "good", "bad", "very")[token] for token in tree.leaves[y]) for y in order]
    for y, numbers in zip(order, rows.values()):
        near(numbers, [rewards[y], *(response_logp(tree, logits)[y].exp() for logits in shown.values())])
    assert final == pytest.approx({name.lower(): kl(tree, runs[name][-1], own.get(name, best.logp)).item()
                                   for name in runs})
    assert f"PPO {final['ppo']:.4f} nats, DPO {final['dpo']:.4f}." in out
    assert f"own optimum: IPO {final['ipo']:.4f}. Seed 1." in out


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
