"""The answers to one prompt, and an episode token by token: every number of the trace, computed a second time."""

import random
import re

import pytest
from conftest import SEED

import minirlhf
from pipeline.report import NAMES, wrapped

PROMPT = "i saw this little film with my sister last night ."


def test_each_policy_answers(files, tiny, capsys):
    """Bug: a policy answers under another one's name, or with another seed or temperature."""
    assert minirlhf.main(["--prompt", PROMPT, "--out", str(tiny)]) == 0
    ids = files.tokenizer.encode_ordinary(PROMPT)
    lines = [PROMPT]
    for name in ("pretrained", "sft", *files.policies):
        lines.append(wrapped(NAMES[name], files.text(files.sample(name, [ids], SEED + sum(ids))[0])))
    out = capsys.readouterr().out
    assert out.startswith("\n".join(lines) + "\n\nPPO's answer as an episode.")


def traced(out):
    """The rows of a trace as (t, action, numbers), and the numbers of the sum."""
    found, total = [], None
    for line in out.splitlines():
        match = re.fullmatch(r" *(\d+|sum)  ((?:'.*'|\".*\") +)?((?: +-?\d+\.\d{3})+)", line)
        if match:
            numbers = [float(x) for x in match[3].split()]
            if match[1] == "sum":
                total = numbers
            else:
                found.append((int(match[1]), match[2].strip(), numbers))
    return found, total


def seed_whose_answer(files, finished):
    """A seed with which the PPO policy's answer to PROMPT ends before the cap, or does not, and this answer."""
    ids = files.tokenizer.encode_ordinary(PROMPT)
    for seed in range(100):
        response = files.sample("ppo", [ids], seed + sum(ids))[0]
        if len(response) > 3 and (response[-1] == files.end) == finished:
            return seed, ids, response


@pytest.mark.parametrize("finished", [False, True])
def test_the_trace_is_the_mdp(files, tiny, capsys, finished, monkeypatch):
    """
    Bug: the reward model is shown for the critic, a KL term has its sign turned, an advantage another gamma or lambda,
    or a sum is not the sum.
    """
    seed, prompt, response = seed_whose_answer(files, finished)
    config, beta = files.config, files.config["beta"]
    monkeypatch.setattr(minirlhf, "read_settings", lambda folder: {**config, "seed": seed})
    assert minirlhf.main(["--prompt", PROMPT, "--out", str(tiny)]) == 0
    out = capsys.readouterr().out
    found, total = traced(out)
    logp, ref_logp = files.logprobs("ppo", prompt, response), files.logprobs("sft", prompt, response)
    values = files.scores("ppo_critic", prompt + response)[len(prompt) - 1:-1]
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

    assert [t for t, _, _ in found] == list(range(len(response)))
    for (t, action, numbers), row in zip(found, expected):
        assert numbers == pytest.approx(row, abs=1.5e-3) and action == repr(files.tokenizer.decode([response[t]]))
    sums = [sum(column) for column in zip(*expected)]
    assert total == pytest.approx(sums[:4], abs=1.5e-3)
    assert sums[3] == pytest.approx(score - beta * (sums[0] - sums[1]), abs=1e-5)

    last = out.splitlines()[-1]
    *numbers, gold = re.search(r"= (\S+) - (\S+) \* (\S+) = (\S+); gold (-?\d+\.\d\d)", last).groups()
    assert [float(x) for x in numbers] == pytest.approx([score, beta, sums[0] - sums[1], sums[3]], abs=1.5e-3)
    assert float(gold) == pytest.approx(files.gold(prompt, response), abs=0.006)
    assert last.endswith("; cut at the cap, the horizon of the MDP") == (not finished)


def test_prompts_that_fit_and_prompts_that_do_not(tiny, files, smallest, capsys):
    """Bug: a prompt that does not fit ends in a traceback, the check is off by one, or a look at a run changes it."""
    words = random.Random(0).choices([" the", " plot", " was", " bad"], k=20)
    assert len(files.tokenizer.encode_ordinary("".join(words))) == 20
    for prompt, message in (("".join(words) + " bad", "--prompt has 21 tokens, and there is room for 20: shorten it"),
                            ("", "--prompt is empty: type some words")):
        assert minirlhf.main(["--prompt", prompt, "--out", str(tiny)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"minirlhf: {message}") and error.count("\n") == 1
    assert minirlhf.main(["--prompt", "".join(words), "--out", str(tiny)]) == 0
    (smallest / "ppo.pt").unlink()  # an unfinished run answers with what it has
    before = {path.name: path.read_bytes() for path in smallest.iterdir()}
    capsys.readouterr()
    assert minirlhf.main(["--prompt", "hello \udcff\x1b[2J", "--out", str(smallest)]) == 0
    out = capsys.readouterr().out
    assert "  SFT  " in out and "PPO" not in out and "\x1b" not in out
    assert {path.name: path.read_bytes() for path in smallest.iterdir()} == before


def test_an_empty_answer_is_said(tiny, capsys, monkeypatch):
    """Bug: a policy that answers nothing leaves its line empty, as if it had not been asked."""
    monkeypatch.setattr("pipeline.episode.decode", lambda tokenizer, ids: " \n")
    assert minirlhf.main(["--prompt", PROMPT, "--out", str(tiny)]) == 0
    assert "\n  SFT         (empty)\n" in capsys.readouterr().out
