"""The answers to one prompt, and an episode token by token: every number of the trace, computed a second time."""

import io
import random
import re

import pytest
from helpers import page_data

import minirlhf
from pipeline.report import NAMES, number, wrapped


def test_the_trace_is_the_mdp(files, tiny, capsys, monkeypatch):
    """Bug: an answer is another policy's, a column has another one's numbers, a sum is not the sum; a talk errs."""
    prompt, episodes = files.heldout()[0], page_data(tiny)[0]["episodes"]  # which test_page.py recomputes
    assert minirlhf.main(["--prompt", files.text(prompt), "--out", str(tiny)]) == 0
    out, e = capsys.readouterr().out, episodes["ppo"][0]
    answers = [wrapped(NAMES[name], episodes[name][0]["text"]) for name in ("pretrained", "sft", *files.policies)]
    assert out.startswith("\n".join([files.text(prompt), *answers]) + "\n\nPPO's answer as an episode.")
    columns = [e[name] for name in ("logp", "ref_logp", "kl_terms", "rewards", "values", "advantages")]
    sums = [sum(column) for column in columns[:4]]
    expected = [*sum(zip(*columns), ()), *sums, e["score"], sums[0] - sums[1], sums[3]]
    found = [float(x) for x in re.findall(r"-?\d+\.\d{3}\b", out[out.index("log pi"):])]
    assert found == pytest.approx(expected, abs=1.5e-3) and max(map(len, out.splitlines())) < 80
    assert ("; cut at the cap" in " ".join(out.split())) != e["finished"]
    lines = iter([files.text(prompt), ""])
    monkeypatch.setattr("builtins.input", lambda ask: next(lines))
    assert minirlhf.main(["--chat", str(tiny)]) == 0
    told = f"[score {number(e['score'])}, log pi/ref {number(sums[0] - sums[1])}, gold {number(e['gold'])}]"
    assert told in " ".join(capsys.readouterr().out.split())


def test_prompts_that_fit_and_prompts_that_do_not(tiny, files, smallest, capsys, monkeypatch):
    """Bug: the check of the room is off by one, a talk drops the end of a long line, or a look at a run changes it."""
    words = random.Random(0).choices([" the", " plot", " was", " bad"], k=20)
    assert len(files.tokenizer.encode_ordinary("".join(words))) == 20
    assert minirlhf.main(["--prompt", "".join(words) + " bad", "--out", str(tiny)]) == 2
    assert "has 21 tokens, and there is room for 20" in capsys.readouterr().err
    assert minirlhf.main(["--prompt", "".join(words), "--out", str(tiny)]) == 0
    lines, answers = iter(["".join(words), " bad" + "".join(words), ""]), len(files.policies) + 1
    monkeypatch.setattr("builtins.input", lambda ask: next(lines))
    capsys.readouterr()
    assert minirlhf.main(["--chat", str(tiny)]) == 0
    told = re.split(r"\n(?=  \w)", capsys.readouterr().out.strip())[1:]
    assert told[:answers] == told[answers:] and len(told) == 2 * answers
    (smallest / "ppo.pt").unlink()  # an unfinished run answers with what it has
    before = {path.name: path.read_bytes() for path in smallest.iterdir()}
    capsys.readouterr()
    assert minirlhf.main(["--prompt", "hello \udcff\x1b[2J", "--out", str(smallest)]) == 0
    out = capsys.readouterr().out
    assert "  SFT  " in out and "PPO" not in out and "\x1b" not in out
    assert {path.name: path.read_bytes() for path in smallest.iterdir()} == before


def test_the_end_of_a_talk(smallest, capsys, monkeypatch):
    """Bug: a talk ends in a traceback, or a finished run is said to be unfinished: it has no such policy."""
    for stdin in (io.TextIOWrapper(io.BytesIO(b"a caf\xe9\n"), encoding="utf-8"), None):  # a file in Latin-1; no stdin
        monkeypatch.setattr("sys.stdin", stdin)
        capsys.readouterr()
        assert minirlhf.main(["--chat", str(smallest)]) == 0
        assert ("PPO  " in capsys.readouterr().out) == (stdin is not None)
    assert minirlhf.main(["--chat", str(smallest), "--policies", "ppo,rloo"]) == 2
    assert "has no policy rloo: leave it out of --policies" in capsys.readouterr().err
