"""lesson.py: PPO, DPO and IPO find the solution of mdp.py, and every printed number is enumerated."""

import itertools
import math
import runpy
import signal
import sys

import pytest
import torch

import estimators
import lesson
import mdp
from lesson import problem, taste
from mdp import draw_labels, kl, learn_dpo, learn_ppo, solve, win_probabilities


def test_taste_by_hand():
    """Bug: very counts for more than the next word; a cut response loses no point; the prompt is scored."""
    for text, score in (("good .", 0.5), ("bad .", -0.5), ("very good .", 1.5), ("very good bad", 0.0), (".", 0.0),
                        ("very very bad", -2.5), ("very .", 0.0), ("good very bad", -2.0)):
        assert taste(("very", "bad"), text.split()) == score, text


def test_ppo_and_dpo_find_pi_star():
    """Bug: learning rates or numbers of samples, labels and steps with which the loops do not come near pi*."""
    tree, ref, rewards, generator = problem(1)
    best = solve(tree, ref, rewards, 0.5)
    policies = [logits for _, logits, _ in learn_ppo(tree, ref, rewards, 0.5, generator)]
    assert len(policies) == 101 and kl(tree, ref, best.logp) > 0.5
    assert kl(tree, policies[20], best.logp) < 0.03 and kl(tree, policies[-1], best.logp) < 0.01
    chosen, rejected = draw_labels(win_probabilities(rewards), 400, generator)
    policies = [logits for _, logits in learn_dpo(tree, ref, chosen, rejected, 0.5, generator)]
    assert len(policies) == 201
    assert kl(tree, policies[50], best.logp) < 0.03 and kl(tree, policies[-1], best.logp) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# every number that the lesson prints, by enumeration. Nothing of mdp.py is used but the logits that its loops yield.

WORDS = (".", "good", "bad", "very")  # token 0 ends a response


def all_responses():
    """The 40 responses as tuples of tokens, short ones first: all that end in 0, or have 3 tokens."""
    found = []
    for n in (1, 2, 3):
        for tokens in itertools.product(range(4), repeat=n):
            if 0 not in tokens[:-1] and (n == 3 or tokens[-1] == 0):
                found.append(tokens)
    return found


def all_states():
    """The 13 states in which a token is chosen, short ones first."""
    found = []
    for n in (0, 1, 2):
        found += itertools.product((1, 2, 3), repeat=n)
    return found


def all_probabilities(logits):
    """The probability of each response under logits (13, 4): the product over its tokens, in Python floats."""
    table = dict(zip(all_states(), logits.tolist()))
    found = []
    for response in all_responses():
        p = 1.0
        for t, token in enumerate(response):
            row = table[response[:t]]
            p *= math.exp(row[token]) / sum(math.exp(z) for z in row)
        found.append(p)
    return found


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def tilted(p, rewards, beta):
    """p exp(reward / beta) / Z over whole responses, and beta log Z."""
    weights = [a * math.exp(r / beta) for a, r in zip(p, rewards)]
    Z = sum(weights)
    return [w / Z for w in weights], beta * math.log(Z)


def score_by_hand(response):
    """Two clauses of the taste: good and bad are worth a half, or one and a half after very; no end costs one."""
    score = 0.0
    for t, token in enumerate(response):
        size = 1.5 if t > 0 and response[t - 1] == 3 else 0.5
        if token == 1:
            score += size
        if token == 2:
            score -= size
    if response[-1] != 0:
        score -= 1.0
    return score


def stretched(run, steps):
    """What a run yields, and then its last row again, up to `steps`."""
    for row in run:
        yield row
    for step in range(row[0] + 1, steps + 1):
        yield step, *row[1:]


class Recorded:
    """What the loops of mdp.py yielded while the lesson ran. limit: nothing is learned after so many steps."""

    def __init__(self, monkeypatch, limit=None):
        self.ppo = {}     # iteration -> (probabilities, sampled J)
        self.labels = []  # of each call of learn_dpo: (kind, steps, chosen, rejected)
        self.pairs = []   # of each call of learn_dpo: {step: probabilities}
        self.betas = set()
        self.samples = set()  # sizes of rollouts
        learn_ppo, learn_dpo, rollout = mdp.learn_ppo, mdp.learn_dpo, mdp.rollout

        def spy_ppo(tree, ref, rewards, beta, generator):
            self.betas.add(beta)
            for i, logits, J in stretched(learn_ppo(tree, ref, rewards, beta, generator, limit or 100), 100):
                if i in (0, 5, 10, 20, 50, 100):
                    self.ppo[i] = (all_probabilities(logits), float(J))
                yield i, logits, J

        def spy_dpo(tree, ref, chosen, rejected, beta, generator, kind, steps):
            self.betas.add(beta)
            self.labels.append((kind, steps, chosen, rejected))
            track = {}
            self.pairs.append(track)
            run = learn_dpo(tree, ref, chosen, rejected, beta, generator, kind, limit or steps)
            for step, logits in stretched(run, steps):
                if step in (0, 10, 20, 50, 100, 200, 500):
                    track[step] = all_probabilities(logits)
                yield step, logits

        def spy_rollout(tree, logits, B, generator):
            self.samples.add(B)
            return rollout(tree, logits, B, generator)

        monkeypatch.setattr(mdp, "rollout", spy_rollout)
        monkeypatch.setattr(mdp, "learn_ppo", spy_ppo)
        monkeypatch.setattr(mdp, "learn_dpo", spy_dpo)

    def run_of(self, kind, certain):
        """{step: probabilities} of DPO or IPO on noisy or certain labels, and how often a was chosen over b."""
        for (its_kind, _, chosen, rejected), track in zip(self.labels, self.pairs):
            if its_kind == kind and certain == (len(chosen) == 780):
                counts = torch.bincount(chosen * 40 + rejected, minlength=1600).view(40, 40).tolist()
                return track, counts
        raise AssertionError(f"no run of {kind} with certain={certain}")


def sections_of(out):
    """{number of the section: its lines}."""
    found = {}
    for line in out.splitlines():
        if line[:1].isdigit() and line[1] == ".":
            found[int(line[0])] = []
        if found:
            found[max(found)].append(line)
    return found


def table_of(lines, first):
    """A printed table as its headers and {label: numbers}, read by the place of each column under its header."""
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


def numbers_in(line, *names):
    return [float(line.split(f"{name} = ")[1].split()[0]) for name in names]


def mean_margin(p, ref, counts):
    """The mean difference of log pi/ref between chosen and rejected, over all labels."""
    total, labels = 0.0, 0
    for a, row in enumerate(counts):
        for b, n in enumerate(row):
            if n:
                total += n * (math.log(p[a] / ref[a]) - math.log(p[b] / ref[b]))
                labels += n
    return total / labels


def check_the_printed_numbers(out, seed, beta, recorded):
    """Compare every number of the lesson with enumeration."""
    sections = sections_of(out)
    responses = all_responses()
    generator = torch.Generator().manual_seed(seed)
    ref = all_probabilities(torch.randn(13, 4, generator=generator, dtype=torch.float64))
    noise = torch.randn(40, generator=generator, dtype=torch.float64).tolist()
    rewards = [score_by_hand(response) + 0.1 * e for response, e in zip(responses, noise)]
    best, J_best = tilted(ref, rewards, beta)
    assert recorded.betas == {beta}

    def J(p):
        return sum(a * r for a, r in zip(p, rewards)) - beta * divergence(p, ref)

    def near(number, expected, digits=4):
        assert abs(number - expected) <= 0.5000001 * 10 ** -digits, (number, expected)

    # 1. the episode
    assert [line.strip() for line in sections[1] if line.startswith("   state [")] == [
        "state [the film was]  action [very]  reward 0.0  done False",
        "state [the film was very]  action [good]  reward 0.0  done False",
        "state [the film was very good]  action [.]  reward 1.5  done True"]
    # 2. the solution
    assert f"13 inner states, 40 responses, score taste + noise, beta {beta}" in sections[2][0]
    first = next(line for line in sections[2] if "J(ref) = " in line)
    for number, expected in zip(numbers_in(first, "J(ref)", "J*", "KL(pi*||ref)"),
                                [J(ref), J_best, divergence(best, ref)]):
        near(number, expected)
    second = next(line for line in sections[2] if "J* - J(ref) = " in line)
    for number in numbers_in(second, "J* - J(ref)", "beta KL(ref||pi*)"):
        near(number, J_best - J(ref), 6)
        near(number, beta * divergence(ref, best), 6)
    # 3. PPO
    assert "on 1024 sampled responses" in sections[3][0] and recorded.samples == {1024}
    headers, rows = table_of(sections[3], "iteration")
    assert headers == ["sampled J", "exact J", "J*", "KL(pi||pi*)"]
    assert rows.keys() == {str(i) for i in recorded.ppo} == {"0", "5", "10", "20", "50", "100"}
    for i, (p, sampled) in recorded.ppo.items():
        expected = [sampled, J(p), J_best, divergence(p, best)]
        for number, value in zip(rows[str(i)], expected):
            near(number, value)
        assert abs(sampled - J(p)) < 0.15  # 1024 samples: about four standard errors
    # 4. and 5. DPO and IPO
    optima, ends = {}, {}
    for section, certain in ((4, False), (5, True)):
        wins = []
        for r in rewards:
            if certain:
                wins.append(sum((r > other) + 0.5 * (r == other) for other in rewards) / 40)
            else:
                wins.append(sum(1 / (1 + math.exp(other - r)) for other in rewards) / 40)
        optima[certain], _ = tilted(ref, wins, beta)
        dpo, counts = recorded.run_of("dpo", certain)
        ipo, ipo_counts = recorded.run_of("ipo", certain)
        assert counts == ipo_counts
        check_labels(counts, rewards, certain)
        headers, rows = table_of(sections[section], "step")
        assert headers == ["DPO mean h", "KL(pi||pi*)", "KL(pi*||pi)", "IPO mean h", "KL(pi||pi*)", "KL(pi||own)"]
        assert rows.keys() == {str(step) for step in dpo} == {str(step) for step in ipo}
        for step in dpo:
            expected = [
                mean_margin(dpo[step], ref, counts), divergence(dpo[step], best), divergence(best, dpo[step]),
                mean_margin(ipo[step], ref, counts), divergence(ipo[step], best),
                divergence(ipo[step], optima[certain]),
            ]
            for number, value in zip(rows[str(step)], expected):
                near(number, value)
        ends["dpo", certain] = dpo[max(dpo)]
        ends["ipo", certain] = ipo[max(ipo)]
    assert any(f"h = 1 / (2 beta) = {1 / (2 * beta):.1f} in every pair" in line for line in sections[5])
    # 6. probabilities
    policies = {"ref": ref, "pi*": best, "PPO": recorded.ppo[max(recorded.ppo)][0], "DPO": ends["dpo", False],
                "IPO": ends["ipo", False], "certain_DPO": ends["dpo", True], "certain_IPO": ends["ipo", True]}
    headers, rows = table_of(sections[6], "response")
    assert headers == ["score", *policies]
    order = sorted(range(40), key=lambda y: -best[y])[:8]
    assert list(rows) == [" ".join(WORDS[token] for token in responses[y]) for y in order]
    for y, row in zip(order, rows.values()):
        near(row[0], rewards[y])
        for number, p in zip(row[1:], policies.values()):
            near(number, p[y])
    return {
        "ppo": divergence(policies["PPO"], best), "dpo": divergence(policies["DPO"], best),
        "ipo": divergence(policies["IPO"], optima[False]), "certain_dpo": divergence(policies["certain_DPO"], best),
        "certain_ipo": divergence(policies["certain_IPO"], optima[True]),
    }


def check_labels(counts, rewards, certain):
    """Every pair is labelled once, with the better one chosen; or 400 times, chosen as often as its score says."""
    z = []
    for a, b in itertools.combinations(range(40), 2):
        n = counts[a][b] + counts[b][a]
        if certain:
            assert n == 1
            assert counts[a][b] == (rewards[a] > rewards[b])
        else:
            assert n == 400
            p = 1 / (1 + math.exp(rewards[b] - rewards[a]))
            z.append((counts[a][b] - n * p) / math.sqrt(n * p * (1 - p)))
    if z:
        chi_square = sum(x * x for x in z)  # its mean is 780, its standard deviation 39
        assert abs(chi_square - len(z)) < 4 * math.sqrt(2 * len(z))


@pytest.mark.parametrize("beta, limit", [(0.4, 10), pytest.param(0.5, None, marks=pytest.mark.slow)])
def test_every_printed_number_is_enumerated(beta, limit, monkeypatch, capsys):
    """
    Bug: columns that are exchanged; a wrong row label; a KL with its roles exchanged; DPO shown for IPO, or certain
    labels for noisy ones; the optimum of other labels; a policy under another name; a beta that is not passed on.

    Short runs with another beta, or the lesson as it is.
    """
    recorded, state = Recorded(monkeypatch, limit), torch.get_rng_state()
    final = lesson.lesson(1, beta)
    out = capsys.readouterr().out
    expected = check_the_printed_numbers(out, 1, beta, recorded)
    assert torch.equal(torch.get_rng_state(), state)  # all random numbers come from the problem's generator
    assert "-0.0000" not in out
    assert final == pytest.approx(expected, abs=1e-9)
    assert limit or max(final["ppo"], final["dpo"], final["ipo"]) < 0.01
    assert [(kind, steps) for kind, steps, _, _ in recorded.labels] == [
        ("dpo", 200), ("ipo", 200), ("dpo", 500), ("ipo", 500)]


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
