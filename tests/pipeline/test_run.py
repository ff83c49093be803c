"""The results that stages leave for each other in the folder of a run: rows, networks, prompts and pairs."""

import errno
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from checks import CanaryError
from model import GPT, GPTConfig
from pipeline import files as files_module
from pipeline import run as run_module
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.files import read_file, write_file
from pipeline.run import Run
from pipeline.stages import last_metrics


@pytest.fixture
def empty(tmp_path):
    """A run of small sizes in an empty folder, with a tokenizer."""
    run = Run(tmp_path, Config(n_embd=8, n_head=2, n_layer=1, block_size=24, response_tokens=20), "cpu")
    run.write("tokenizer.json", json.dumps([" é", "β"]))
    return run


# ---- files ---------------------------------------------------------------------------------------------------------

def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    """Bug: a full disk ends in a traceback, or leaves half a file: the old one must stay till the new one is whole."""
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "sft.pt"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", full)
        with pytest.raises(UserError, match="sft.pt cannot be written .No space left on device.: the old content is"):
            write_file(path, "new é")
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_file(path, "new é")
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["new é"]


def test_a_file_is_read_only_if_its_content_fits(tmp_path):
    """Bug: a traceback for what is not JSON or nested too deeply; NaN, a bool or half a character is taken over."""
    path, shape = tmp_path / "x.json", {"n": 0, "x": (0.0, None), "texts": [""], "*": 0.0}
    good = dict(n=1, x=None, texts=["é"], more=2)
    path.write_text(json.dumps(good))
    assert read_file(path, shape) == good
    for change in (dict(n=1.5), dict(n=True), dict(x="1"), dict(x=math.nan), dict(x=math.inf), dict(x=10 ** 400),
                   dict(x=2 ** 63), dict(texts="a"), dict(texts=["a", 1]), dict(texts=["\ud83d"]), dict(more=None),
                   dict(n=...)):
        path.write_text(json.dumps({key: x for key, x in {**good, **change}.items() if x is not ...}))
        assert read_file(path, shape) is None, change
    for content in (b"{", b"", b"[1]", b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        assert read_file(path, shape) is None and read_file(tmp_path, shape) is None


def test_what_is_not_finite_stops_the_run(empty):
    """Bug: NaN is written into a file that no reader of JSON can read, or saved as the policy after the last step."""
    with pytest.raises(CanaryError, match="sft: loss is nan: the training diverged"):
        empty.log("sft", dict(step=3, loss=math.nan))
    network = GPT(GPTConfig(**empty.kind))
    network.wte.weight.data[0, 0] = math.nan
    with pytest.raises(CanaryError, match="the weights of ppo are not finite after the last step"):
        empty.save_network("ppo", network)
    assert empty.rows() == [] and not empty.has(["ppo.pt"])


def test_a_result_is_the_mean_of_the_last_ten_steps(empty):
    """Bug: the line of a stage shows its first rows, all rows, its seconds, or another stage's rows."""
    for stage in ("dpo", "ppo"):
        for step in range(14):
            empty.log(stage, dict(step=step, loss=float(step ** 2), chosen_logp=-float(step), other=1.0))
        empty.log(stage, dict(stage_seconds=9.0))
    mean = sum(step ** 2 for step in range(4, 14)) / 10
    line = last_metrics(empty, "dpo", ["loss", "gold", "chosen_logp"])
    assert line == f"mean of the last 10 steps: loss {mean:.2f}, chosen logp -8.50"


# ---- training ------------------------------------------------------------------------------------------------------

def steps_of(total, then=lambda step: None, *rollout):
    """A training loop as the lessons have it. `then` is called within each step."""
    def loop(checkpoint):
        for step in range(checkpoint["step"] if checkpoint else 0, total):
            then(step)
            yield dict(step=step, loss=step / 2, tokens=8), {}, *rollout
    return loop


def test_a_checkpoint_is_never_nan(empty, capsys, monkeypatch):
    """Bug: a run continues from a network that has diverged, or PPO with the state of DPO; its bar never gets full."""
    network = torch.nn.Linear(1, 1)

    def loop(checkpoint):
        assert checkpoint is None
        for step in range(4):
            network.weight.data.fill_(math.nan if step == 2 else step)
            yield dict(step=step), dict(policy=network, critic=torch.nn.Linear(1, 1))

    monkeypatch.setattr(run_module, "SAVES", 0.0)
    empty.train("ppo", loop, 4)
    assert empty.checkpoint("ppo")["step"] == 2  # the last good one stays
    assert empty.checkpoint("dpo") is None
    empty.train("ppo", steps_of(4), 4)
    assert " 4/4 " in capsys.readouterr().err.split("\r")[-1]


def test_a_log_file_gets_few_lines(empty, capsys, monkeypatch):
    """Bug: a log file is full of redraws of a bar; or without a stream there is a traceback."""
    empty.train("ppo", steps_of(300), 300)
    assert len(capsys.readouterr().err.split("\r")) <= 4 and "tokens" not in empty.rows()[-1]
    monkeypatch.setattr(sys, "stderr", None)
    empty.train("sft", steps_of(3), 3)


def test_a_checkpoint_is_written_now_and_then(empty, capsys, monkeypatch):
    """Bug: a kill -9 loses the whole stage, or most of the time goes into checkpoints; responses are called tokens."""
    now, written = [0.0], []
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Run, "save_checkpoint", lambda run, stage, parts, step: written.append((stage, step)))
    rollout = SimpleNamespace(response_lens=torch.tensor([5, 4]))
    empty.train("sft", steps_of(65, lambda step: now.append(now.pop() + 1), rollout), 65)
    assert written == [("sft", 20), ("sft", 40), ("sft", 60)]
    assert {row["seconds"] for row in empty.rows()} == {1.0}
    assert ", 9 tok/s]" in capsys.readouterr().err


# ---- networks ------------------------------------------------------------------------------------------------------

def test_a_network_of_another_run_is_refused(empty):
    """Bug: a network with another number of heads fits its file and answers nonsense."""
    sizes = dict(empty.kind, n_head=4)
    other = GPT(GPTConfig(**sizes))
    empty.write("sft.pt", dict(config=sizes, network=other.state_dict()))
    with pytest.raises(UserError, match="sft.pt cannot be read"):
        empty.load_network("sft")


# ---- prompts, pairs and gold ---------------------------------------------------------------------------------------

def test_long_prompts_lose_their_left(empty):
    """Bug: a prompt is cut on its right: the policy answers to the beginning of the text."""
    rows = [dict(split=side, prompt=f"abcdef{i}") for i, side in enumerate(["train", "heldout", "train", "heldout"])]
    empty.write_rows("split.jsonl", rows)
    assert empty.prompts == [[list(b"def0"), list(b"def2")], [list(b"def1"), list(b"def3")]]


def test_pairs_are_those_of_their_split(empty):
    """Bug: held-out pairs are trained on, or a token that the vocabulary does not have ends in a traceback."""
    rest = dict(chosen=[1] * 23, rejected=[2], gold=[0.5, 1], ceiling=0.7, first=True, annotator=0)
    rows = [dict(rest, split=side, prompt=[i]) for i, side in enumerate("heldout train train heldout train".split())]
    empty.write_rows("preferences.jsonl", rows)
    assert empty.pairs == [[rows[1], rows[2], rows[4]], [rows[0], rows[3]]]
    for change in (dict(prompt=[]), dict(chosen=[empty.tokenizer.n_vocab]), dict(rejected=[-1]), dict(gold="x"),
                   dict(chosen=[1] * 24), dict(split="train")):
        vars(empty).pop("pairs", None)
        empty.write_rows("preferences.jsonl", [row | change if row["split"] == "heldout" else row for row in rows])
        with pytest.raises(UserError, match="preferences.jsonl cannot be read"):
            print(empty.pairs)
