"""Tests of examples/: the rewards are right, and TRL continues from an exported run."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import close

import minirlhf
from data import collate
from pipeline.config import Config, read_settings
from pipeline.run import Run
from tokenizer import decode

EXAMPLES = Path(__file__).parent.parent / "examples"
TRL_CONTINUE = EXAMPLES / "trl_continue.py"
rewards = runpy.run_path(EXAMPLES / "rewards.py")


def test_the_rewards_by_hand():
    """Bug: an empty response divides by 0, a long sentence counts; a digit of another number, or the first number."""
    for response, score in (("", 0), ("One. Two!", 1), ("a b c d e f g h", 1), ("a b c d e f g h i? j k l.", 0.25)):
        assert rewards["short_sentences"]("x", response, more=1) == pytest.approx(score)
    for response, score in (("3 + 4 = 7.", 1), ("7 is not 8", 0), ("17", 0), ("seven", 0)):
        assert rewards["arithmetic"]("x", response, answer=7, more=1) == score


def test_the_file_of_sums():
    """Bug: arithmetic.jsonl is not what its command prints, or an answer is wrong."""
    printed = subprocess.run([sys.executable, EXAMPLES / "rewards.py"], capture_output=True, text=True).stdout
    assert printed == (EXAMPLES / "arithmetic.jsonl").read_text() and printed.count("\n") == 64
    for row in map(json.loads, printed.splitlines()):
        assert row["answer"] == sum(map(int, re.findall(r"\d+", row["prompt"])))


def test_a_function_as_trl_calls_it(tmp_path):
    """Bug: a column reaches the function whole, TRL's own arguments reach it, or a neighbour is not found."""
    (tmp_path / "near.py").write_text("def equal(a, b):\n    return a == str(b)\n")
    (tmp_path / "own.py").write_text("import near\n\ndef own(prompt, response, answer):\n"
                                     "    return near.equal(response, answer)\n")
    score = runpy.run_path(TRL_CONTINUE)["function_score"](f"{tmp_path / 'own.py'}:own")
    got = score(prompts=["a", "b", "c"], completions=["1", "2", "3"], completion_ids=[[1], [2], [3]],
                response=["x", "x", "x"], answer=[1, 3, 3], trainer_state=object(), log_metric=print)
    assert got == [1, 0, 1]


@pytest.fixture
def exported(smallest, tmp_path):
    """(the smallest run, its exported folder)"""
    pytest.importorskip("transformers")
    assert minirlhf.main(["--out", str(smallest), "--export", str(tmp_path / "hf")]) == 0
    return Run(smallest, Config(**read_settings(smallest)), "cpu"), tmp_path / "hf"


def test_the_reward_model_as_trl_calls_it(exported):
    """Bug: E is lost, a row is scored at a PAD, the prompt is left out; the pairs or a policy are not the run's."""
    import transformers
    run, folder = exported
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    score = runpy.run_path(TRL_CONTINUE)["model_score"](
        model, transformers.AutoTokenizer.from_pretrained(folder / "reward"))
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{key: decode(run.tokenizer, pair[key]) for key in (
        "prompt", "chosen", "rejected")} for pair in run.pairs[0]]
    pairs = run.pairs[0][:8]
    prompts, responses = [pair["prompt"] for pair in pairs], [pair["chosen"][:5 + i] for i, pair in enumerate(pairs)]
    responses[0][-1] = run.make_network().end
    expected = run.load_network("reward")(collate(prompts, responses, pad=run.make_network().pad))
    got = score(prompts=[decode(run.tokenizer, ids) for ids in prompts], completion_ids=responses, completions=None)
    close(torch.tensor(got), expected, 1e-5)
    for name in ("sft", "dpo", "ppo"):
        policy = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        close(policy.transformer.wte.weight.detach(), run.load_network(name).wte.weight.detach())


@pytest.mark.slow
@pytest.mark.xdist_group("trl")  # TRL is imported once for both trainers that run in this process
@pytest.mark.parametrize("trainer, processes", [("dpo", 1), ("reward", 1), ("grpo", 2)])
def test_trl_continues(trainer, processes, exported, tmp_path, monkeypatch, capsys):
    """Bug: TRL cannot read what was exported, starts from other weights, or two processes do not know each other."""
    pytest.importorskip("trl")
    import transformers
    folder = exported[1]
    arguments = [folder, trainer, tmp_path / "out", "--steps", "2", "--batch", "4", "--response-tokens", "6",
                 "--lr", "1e-3"]
    if processes == 1:
        monkeypatch.setattr(sys, "argv", [str(TRL_CONTINUE), *map(str, arguments)])
        runpy.run_path(TRL_CONTINUE, run_name="__main__")
        shown = capsys.readouterr().out
        room = 24 - max(map(len, exported[0].prompts[0]))
        sys.argv[2], sys.argv[-3] = "grpo", str(room + 1)
        with pytest.raises(SystemExit):
            runpy.run_path(TRL_CONTINUE, run_name="__main__")
        assert f"leaves room for {room} tokens" in capsys.readouterr().err
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", TRL_CONTINUE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        shown = done.stdout
    assert shown.count(f"{processes} processes on ") == 1
    steps = [dict(re.findall(r"'(\S+)': '(\S+)'", line)) for line in re.findall("{'loss.*?}", shown)]
    assert len(steps) == 2
    if trainer == "dpo":  # the policy still is the reference
        assert float(steps[0]["loss"]) == pytest.approx(math.log(2), abs=1e-3)
    if trainer == "grpo":
        assert float(steps[0]["kl"]) == 0 and 0 < float(steps[0]["completions/mean_length"]) <= 6
    start = folder / ("reward" if trainer == "reward" else "sft")
    kind = transformers.AutoModelForSequenceClassification if trainer == "reward" else transformers.AutoModelForCausalLM
    before, after = kind.from_pretrained(start).state_dict(), kind.from_pretrained(tmp_path / "out").state_dict()
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 1e-5 < moved < 1e-2


def test_a_mistake_is_one_line():
    """Bug: a traceback, or a page of help."""
    done = subprocess.run([sys.executable, TRL_CONTINUE, "nowhere", "dpo", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--export nowhere" in done.stderr
