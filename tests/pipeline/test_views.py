"""The answers to one prompt, and an episode token by token: every number of the trace, computed a second time."""

import random
import re

import pytest

import minirlhf
from data import printable

NAMES = dict(pretrained="pretrained", sft="SFT", best_of_n="best of n", dpo="DPO", ppo="PPO", grpo="GRPO")
PROMPT = "i saw this little film with my sister last night ."


def test_sample_shows_each_policys_answer(files, tiny, capsys):
    """A policy answers under another one's name, or with another seed or temperature."""
    assert minirlhf.main(["--stages", "sample", "--prompt", PROMPT, "--out", str(tiny)]) == 0
    ids = files.tokenizer.encode_ordinary(PROMPT)
    lines = [PROMPT]
    for name, label in (("pretrained", "pretrained"), ("sft", "SFT"), ("dpo", "DPO"), ("ppo", "PPO"),
                        ("grpo", "GRPO")):
        response = files.sample(name, [ids], files.config["seed"])[0]
        lines.append("  " + label.ljust(12) + printable(files.text(response).strip()))
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


def test_sample_and_trace_together_change_nothing(tiny_copy, capsys):
    """A look at a finished run writes into its folder, or a policy that was not trained ends it."""
    (tiny_copy / "dpo.pt").unlink()
    before = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    assert minirlhf.main(["--stages", "sample,trace", "--prompt", PROMPT, "--out", str(tiny_copy)]) == 0
    out = capsys.readouterr().out
    assert "\n  PPO " in out and "\n  DPO " not in out and "\nsum " in out
    assert {path.name: path.read_bytes() for path in tiny_copy.iterdir()} == before


def traced(out):
    """The rows of a trace as (t, state, action, numbers), and the numbers of the sum."""
    rows, total = [], None
    for line in out.splitlines():
        match = re.fullmatch(r" *(\d+|sum)  ((?:'.*'|\".*\") +)?((?: +-?\d+\.\d{3})+)", line)
        if match:
            numbers = [float(x) for x in match[3].split()]
            if match[1] == "sum":
                total = numbers
            else:
                rows.append((int(match[1]), match[2], numbers))
    return rows, total


def seed_whose_answer(files, finished):
    """A seed with which the PPO policy's answer to PROMPT ends before the cap, or does not, and this answer."""
    ids = files.tokenizer.encode_ordinary(PROMPT)
    for seed in range(100):
        response = files.sample("ppo", [ids], seed)[0]
        if len(response) > 3 and (response[-1] == files.end) == finished:
            return seed, ids, response


@pytest.mark.parametrize("finished", [False, True])
def test_the_trace_is_the_mdp(files, tiny, capsys, finished):
    """
    The reward model is shown for the critic, a KL term has its sign turned, an advantage another gamma or lambda,
    a state has seen its action, or a sum is not the sum.
    """
    seed, prompt, response = seed_whose_answer(files, finished)
    config, beta = files.config, files.config["beta"]
    flags = ["--stages", "trace", "--prompt", PROMPT, "--seed", str(seed), "--out", str(tiny)]
    assert minirlhf.main(flags) == 0
    out = capsys.readouterr().out
    rows, total = traced(out)
    logp = files.logprobs("ppo", prompt, response)
    ref_logp = files.logprobs("sft", prompt, response)
    values = files.scores("critic", prompt + response)[len(prompt) - 1:-1]
    score = files.scores("reward", prompt + response)[-1]

    expected = []
    for t, token in enumerate(response):
        pi, ref = float(logp[t, token]), float(ref_logp[t, token])
        reward = -beta * (pi - ref) + (score if t == len(response) - 1 else 0.0)
        expected.append([pi, ref, -beta * (pi - ref), reward, values[t]])
    for t, row in enumerate(expected):  # the advantage by its definition, a discounted sum of TD errors
        advantage = 0.0
        for later in range(t, len(expected)):
            next_value = values[later + 1] if later + 1 < len(expected) else 0.0
            delta = expected[later][3] + config["gamma"] * next_value - values[later]
            advantage += (config["gamma"] * config["lam"]) ** (later - t) * delta
        row.append(advantage)

    assert [t for t, _, _ in rows] == list(range(len(response)))
    for (t, texts, numbers), row in zip(rows, expected):
        assert numbers == pytest.approx(row, abs=1.5e-3)
        state = files.tokenizer.decode(prompt + response[:t])[-30:]
        assert texts.split() == f"{state!r} {files.tokenizer.decode([response[t]])!r}".split()
    sums = [sum(column) for column in zip(*expected)]
    assert total == pytest.approx(sums[:4], abs=1.5e-3)
    assert sums[3] == pytest.approx(score - beta * (sums[0] - sums[1]), abs=1e-5)

    last = out.splitlines()[-1]
    *numbers, gold = re.search(r"= (\S+) - (\S+) \* (\S+) = (\S+); gold (-?\d+\.\d\d)", last).groups()
    assert [float(x) for x in numbers] == pytest.approx([score, beta, sums[0] - sums[1], sums[3]], abs=1.5e-3)
    assert float(gold) == pytest.approx(files.gold(prompt, response), abs=0.006)
    assert last.endswith("; cut at the cap, the horizon of the MDP") == (not finished)


@pytest.mark.parametrize("stage", ["sample", "trace"])
def test_a_prompt_longer_than_the_block(tiny, capsys, stage):
    """A prompt that does not fit ends in a traceback out of the network."""
    assert minirlhf.main(["--stages", stage, "--prompt", "very " * 60, "--out", str(tiny)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"--prompt has \d+ tokens, and there is room for 20 in a block of 40", error)
    assert error.count("\n") == 1


def test_the_longest_prompt_that_fits(tiny, files, capsys):
    """The check of the prompt's length is off by one."""
    words = random.Random(0).choices([" the", " plot", " was", " bad"], k=20)
    assert len(files.tokenizer.encode_ordinary("".join(words))) == 20
    assert minirlhf.main(["--stages", "sample", "--prompt", "".join(words), "--out", str(tiny)]) == 0
