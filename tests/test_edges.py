"""
Options at their edges, and terminals of every kind: a command leaves finite numbers, or is refused in one line.

The runs are as small as they can be. The whole sweep is slow; a part of it is not.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minirlhf
from pipeline import config
from pipeline.config import Config

ROOT = Path(__file__).parent.parent
SMALLEST = dict(n_layer=1, n_head=2, n_embd=16, block_size=40, response_tokens=16, documents=300, pretrain_steps=20,
                pretrain_lr=1e-2, demonstrations=40, sft_steps=10, sft_lr=1e-2, pairs=24, ppo_iterations=1, ppo_batch=8,
                minibatch=8, eval_prompts=6, best_of=2)


def make_smallest(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "QUICK", SMALLEST)
        assert minirlhf.main(["--quick", "--out", str(folder)]) == 0


@pytest.fixture
def smallest(shared, tmp_path, monkeypatch):
    """A copy of the smallest run, and --quick means one like it."""
    monkeypatch.setattr(config, "QUICK", SMALLEST)
    return shutil.copytree(shared("smallest", make_smallest), tmp_path / "run")


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def numbers_are_finite(folder):
    for path in folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    for name in ("metrics.jsonl", "preferences.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=no_constant)
    assert "nan" not in (folder / "report.md").read_text(encoding="utf-8").split()


# ---- every option ----------------------------------------------------------------------------------------------------

# the first stage that uses an option; of the others it is pretraining
FIRST = dict(sft_steps="sft", pairs="preferences", label_temperature="preferences", flip="preferences",
             held_out="preferences", reward_lr="reward", dpo_beta="dpo", dpo_lr="dpo", dpo_kind="dpo",
             label_smoothing="dpo", **dict.fromkeys("beta ppo_iterations ppo_batch minibatch ppo_epochs ppo_lr "
                                                    "critic_lr gamma lam clip".split(), "ppo"))
ORDER = ("pretrain", "sft", "preferences", "reward", "ppo", "dpo", "report")


def run_it(folder, flags, capsys):
    """Run a command from the first stage on that its options belong to. Returns its status, after looking at it."""
    names = [word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")]
    first = min((FIRST.get(name, "pretrain") for name in names), key=ORDER.index)
    stages = ORDER[ORDER.index(first):]
    if first == "dpo":
        stages = ("dpo", "report")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["--stages", ",".join(stages), "--out", str(folder), *flags.split()]
    capsys.readouterr()
    status = minirlhf.main(command + ["--quick"] * (first == "pretrain"))
    captured = capsys.readouterr()
    if status == 2:
        assert captured.err.count("\n") == 1 and captured.err.startswith("minirlhf: "), captured.err
        assert captured.out == "" and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    else:
        assert status == 0, captured.err[-300:]
        numbers_are_finite(folder)
    return status


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--dpo-beta 10000", "--dpo-beta 0.0001 --dpo-kind ipo", "--beta 10000", "--beta 1e-6", "--label-temperature 1e-300",
    "--clip 1000 --ppo-epochs 3", "--ppo-batch 1 --minibatch 1", "--reward-lr 1e-30"])
def test_an_edge_works(flags, smallest, capsys):
    """An option at its edge ends in a traceback, a false alarm of a canary, or NaN in a file."""
    assert run_it(smallest, flags, capsys) == 0


INTEGERS = "0 1 2 3 2000000000 99999999999999999999999 -1 nan word 1.5"
NUMBERS = "0 1e-300 0.005 1 50 1e300 -1 nan inf word"
PAIRS_OF_OPTIONS = [
    "--n-embd 2 --n-head 2", "--n-embd 2 --n-head 1 --n-layer 3", "--n-embd 7 --n-head 7", "--n-embd 1 --n-head 1",
    "--block-size 17 --response-tokens 4", "--block-size 20 --response-tokens 4",
    "--block-size 20 --response-tokens 5", "--response-tokens 4", "--response-tokens 4 --sft-steps 1",
    "--pretrain-steps 1 --sft-steps 1", "--response-tokens 1", "--batch-size 1 --pairs 1",
    "--batch-size 1 --pairs 3", "--batch-size 1000 --pairs 3", "--ppo-batch 1 --minibatch 1 --ppo-epochs 1",
    "--ppo-batch 9 --minibatch 8", "--ppo-batch 2000000000 --minibatch 1", "--label-temperature 0 --flip 1",
    "--label-temperature 1e6 --flip 0.5", "--beta 0 --ppo-lr 1", "--beta 10000 --ppo-lr 1", "--beta 1e-6 --clip 0",
    "--gamma 0 --lam 0", "--gamma 1 --lam 1 --critic-lr 1", "--critic-lr 1 --ppo-epochs 5",
    "--dpo-kind ipo --dpo-beta 10000", "--dpo-kind slic --dpo-beta 10000", "--dpo-lr 1 --dpo-beta 10000",
    "--dpo-kind robust --label-smoothing 0.499999 --dpo-beta 50 --dpo-lr 1",
    "--dpo-kind robust --label-smoothing 0.499999", "--reward-lr 1", "--seed 9007199254740992",
    "--seed 18446744073709551616", "--sft-steps 1 --pairs 2"]


def sweep():
    for field in dataclasses.fields(Config):
        if field.metadata and field.type in (int, float):
            for value in (INTEGERS if field.type is int else NUMBERS).split():
                yield f"--{field.name.replace('_', '-')} {value}"
    yield from PAIRS_OF_OPTIONS


@pytest.mark.slow
@pytest.mark.parametrize("flags", list(sweep()))
def test_every_option_at_every_edge(flags, smallest, capsys):
    """An option ends in a traceback, in a canary's false alarm, in NaN, or after minutes of work."""
    try:
        run_it(smallest, flags, capsys)
    except SystemExit as stop:
        raise AssertionError(f"left with {stop.code}") from None


# ---- terminals -------------------------------------------------------------------------------------------------------

PROGRAM = f"import sys, minirlhf; from pipeline import config; config.QUICK = {SMALLEST!r}; sys.exit(minirlhf.main())"


def shell(folder, line, flags="--stages report", **environment):
    """Make a report, or another run, in a real shell: `line` has PY where the program stands."""
    (folder / "report.json").unlink()
    (folder.parent / "program.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}\n")
    line = line.replace("PY", f"{sys.executable} program.py --out run {flags}")
    return subprocess.run(["bash", "-c", line], cwd=folder.parent, capture_output=True,
                          env={**os.environ, "PYTHONUNBUFFERED": "", **environment})


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


C_LOCALE = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


@pytest.mark.parametrize("environment, sign", [
    pytest.param(C_LOCALE, b"+-", id="C locale", marks=pytest.mark.slow),
    slow(dict(PYTHONIOENCODING="cp1252"), "±".encode("cp1252")),
    slow(dict(PYTHONIOENCODING="cp437:strict"), "±".encode("cp437")), slow(dict(PYTHONIOENCODING="koi8-r"), b"+-")])
def test_a_terminal_that_is_not_utf_8(environment, sign, smallest):
    """After all the work the table ends in a UnicodeEncodeError, or the files are not in UTF-8."""
    done = shell(smallest, "PY", **environment)
    assert done.returncode == 0, done.stderr[-500:]
    assert b" " + sign + b"0." in done.stdout and b"Traceback" not in done.stderr
    assert "±" in (smallest / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_whole_run_on_an_ascii_stream(smallest):
    """Another stage than the report prints what the stream cannot show."""
    done = shell(smallest, "PY", "--quick", **dict(C_LOCALE, PYTHONIOENCODING="ascii"))
    assert done.returncode == 0, done.stderr[-500:]
    assert b"accuracy 0." in done.stdout and b" +-0." in done.stdout


@pytest.mark.parametrize("line, status", [
    pytest.param("PY | true; exit ${PIPESTATUS[0]}", 141, id="nobody reads", marks=pytest.mark.slow),
    pytest.param("PY >&- 2>&- <&-", 0, id="all closed", marks=pytest.mark.slow), slow("PY >&-", 0), slow("PY 2>&-", 0),
    slow("PY 2>&1 | true; exit ${PIPESTATUS[0]}", 141), slow("PY <&-", 0), slow("PY > /dev/null 2>&1 < /dev/null", 0)])
def test_streams_that_are_closed(line, status, smallest):
    """A run dies with a traceback because nobody reads, or because a stream is not there."""
    done = shell(smallest, line)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert done.returncode == status
    assert (smallest / "report.json").exists() == (status == 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--stages sample --prompt hello", "--stages report"])
def test_an_output_that_is_full(flags, smallest):
    """The disk of a log file is full: a traceback."""
    done = shell(smallest, "PY > /dev/full", flags)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(b"minirlhf: the output cannot be used (No space left on device)")


@pytest.mark.slow
def test_a_view_that_nobody_reads(smallest):
    """What is printed last is written after the end of the program, where nothing catches the error."""
    done = shell(smallest, "PY | true; exit ${PIPESTATUS[0]}", "--stages sample --prompt hello")
    assert done.returncode == 141 and b"Exception ignored" not in done.stderr
