"""The folder of a run: whose options it holds, what is held out, who may write in it, and runs that were killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import SEED, TINY
from helpers import page_data

import minirlhf
from checks import CanaryError
from data import UserError
from pipeline import stages
from pipeline.config import OWNED, STAGES, Config, parse_config
from pipeline.folder import MADE_BY
from pipeline.progress import Stopped
from pipeline.run import Run

ROOT = Path(__file__).parent.parent.parent
NETWORKS = ("pretrained", "sft", "reward", "ppo", "critic", "grpo", "dpo")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read(folder, name):
    return json.loads((folder / name).read_text())


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---- options of a stage --------------------------------------------------------------------------------------------

@pytest.fixture
def instant(monkeypatch):
    """Within the test, every stage ends at once, unless its name is in the list, and then it is stopped."""
    stopped = []

    def make(stage):
        def function(run, log):
            """Do nothing."""
            if stage in stopped:
                raise Stopped(signal.SIGINT)
            return "done"
        return function

    monkeypatch.setattr(minirlhf, "FUNCTIONS", {stage: make(stage) for stage in STAGES})
    return stopped


@pytest.fixture
def ended(tmp_path, instant):
    """A folder as a run of all stages leaves it, with the names of the files in the place of results."""
    folder = tmp_path / "ended"
    assert minirlhf.main(["--quick", "--seed", SEED, "--stages", ",".join(STAGES), "--out", str(folder)]) == 0
    for name in (*MADE_BY, "report.md", "report.html", "samples.txt", "watch.jsonl"):
        (folder / name).write_text(name)
    return folder


def test_an_option_is_saved_when_its_stage_has_finished(tmp_path, instant):
    """A stage that was stopped leaves its options in config.json, where the next plain command finds them."""
    instant.append("ppo")
    command = ["--out", str(tmp_path), "--ppo-lr", "0.9", "--pairs", "7", "--seed", "4", "--dpo-beta", "0.9"]
    assert minirlhf.main(command) == 130
    saved = read(tmp_path, "config.json")
    assert saved == {**saved, "pairs": 7, "seed": 4, "ppo_lr": Config.ppo_lr, "dpo_beta": Config.dpo_beta}
    assert parse_config(["--stages", "ppo", "--out", str(tmp_path)]).ppo_lr == Config.ppo_lr
    assert parse_config(["--resume", "--out", str(tmp_path)]).ppo_lr == 0.9
    instant.clear()
    assert minirlhf.main(["--resume", "--out", str(tmp_path)]) == 0
    saved = read(tmp_path, "config.json")
    assert (saved["ppo_lr"], saved["dpo_beta"]) == (0.9, 0.9)


def test_a_command_that_is_refused_or_stopped_changes_no_setting(ended, instant):
    """A command that did nothing has already replaced config.json."""
    before = (ended / "config.json").read_bytes()
    instant.append("ppo")
    for command, status in (("ppo --beta -1", 2), ("report --sft-steps 9999", 2), ("ppo --beta 0.9", 130)):
        assert minirlhf.main(["--out", str(ended), "--stages", *command.split()]) == status
        assert (ended / "config.json").read_bytes() == before


def test_each_stage_records_what_it_used(ended, instant):
    """The seed of a stage is lost, or it becomes the seed of the run and of its split."""
    before = read(ended, "config.json")
    assert minirlhf.main(["--stages", "ppo", "--seed", "8", "--beta", "0.9", "--out", str(ended)]) == 0
    record = read(ended, "stages.json")
    assert list(record) == ["pretrain", "sft", "preferences", "reward", "grpo", "dpo", "report", "ppo"]
    assert [record[stage]["seed"] for stage in record] == [3, 3, 3, 3, 3, 3, 3, 8]
    for stage in STAGES:
        assert set(record[stage]["settings"]) == set(OWNED[stage])
    assert record["ppo"]["settings"] == {**{name: before[name] for name in OWNED["ppo"]}, "beta": 0.9}
    assert read(ended, "config.json") == {**before, "beta": 0.9}


def test_a_network_carries_its_settings(tiny):
    """Nobody can tell what a network was trained with."""
    settings = read(tiny, "config.json")
    for name in NETWORKS:
        saved = torch.load(tiny / f"{name}.pt", weights_only=True)["settings"]
        assert saved["seed"] == int(SEED)
        own = OWNED[MADE_BY[f"{name}.pt"]]
        assert {option: saved[option] for option in own} == {option: settings[option] for option in own}


def test_the_report_says_what_it_reports(tiny_copy):
    """A network stands under the options of another one: those of a command that was stopped, or of an older one."""
    settings = read(tiny_copy, "config.json")
    (tiny_copy / "config.json").write_text(json.dumps({**settings, "ppo_lr": 0.5, "gamma": 0.1, "sft_steps": 9999}))
    run = Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))
    for name in NETWORKS:
        run.load_network(name)
    assert run.saved_config() == settings


@pytest.mark.slow
def test_seeds_that_differ_are_in_the_report(tiny_copy):
    """A report shows one seed, and one of its networks was trained with another."""
    assert "seeds" not in read(tiny_copy, "report.json")
    assert minirlhf.main(["--stages", "dpo,report", "--seed", "4", "--out", str(tiny_copy)]) == 0
    report = read(tiny_copy, "report.json")
    assert report["seeds"] == dict(pretrain=3, sft=3, preferences=3, reward=3, ppo=3, grpo=3, dpo=4, report=4)
    assert report["config"]["seed"] == 3


# ---- the split -----------------------------------------------------------------------------------------------------

def fingerprint(items):
    found = {hashlib.sha256(json.dumps(item).encode()).digest() for item in items}
    return dict(count=len(found), sha256=hashlib.sha256(b"".join(sorted(found))).hexdigest())


def test_what_each_stage_saw(files):
    """A stage sees prompts or pairs of the other side, or the record of what it saw is that of something else."""
    sets = {stage: record["sets"] for stage, record in read(files.folder, "stages.json").items()}
    train, heldout = files.prompts()
    pairs = {split: [[row["prompt"], row["chosen"], row["rejected"]] for row in files.preferences(split)]
             for split in ("train", "heldout")}
    asked = {split: [pair[0] for pair in pairs[split]] for split in pairs}
    assert sets["preferences"] == {split: fingerprint(asked[split]) for split in asked}
    assert sets["reward"] == dict(train=fingerprint(pairs["train"]), heldout=fingerprint(pairs["heldout"]),
                                  normalise=fingerprint(train[:1024]))
    assert sets["ppo"] == sets["grpo"] == dict(prompts=fingerprint(train))
    assert sets["dpo"] == dict(pairs=fingerprint(pairs["train"]))
    assert sets["report"] == dict(prompts=fingerprint(files.heldout()))
    assert sets["sft"]["examples"]["count"] > 450 and sets["pretrain"]["texts"]["count"] > 590
    trained_on = {str(prompt) for prompt in train + asked["train"]}
    assert not trained_on & {str(prompt) for prompt in heldout + asked["heldout"]}


def write_data(path, n=40):
    path.parent.mkdir(exist_ok=True)
    rows = [dict(prompt=f"prompt {i} :", chosen=f" good {i}", rejected=f" bad {i}") for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path, monkeypatch, instant):
    """A finished run of my/train.jsonl in runs/train. Its stages do nothing, but for the split."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "my" / "train.jsonl")

    def split(run, log):
        """Split."""
        run.make_split()

    minirlhf.FUNCTIONS["pretrain"] = split
    assert minirlhf.main(["--data", "my/train.jsonl"]) == 0
    return tmp_path / "runs" / "train"


def test_a_data_file_that_has_changed_is_refused(own, tmp_path, capsys):
    """A file that was edited between stages makes another split: training prompts are evaluated."""
    path = tmp_path / "my" / "train.jsonl"
    assert read(own, "data.json") == dict(path=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert minirlhf.main(["--stages", "ppo", "--out", str(own)]) == 0
    write_data(path, 41)
    capsys.readouterr()
    assert minirlhf.main(["--stages", "ppo", "--out", str(own)]) == 2
    assert "my/train.jsonl has changed since this run was begun" in one_line(capsys)
    path.unlink()  # a run can be moved without its file
    assert minirlhf.main(["--stages", "ppo", "--out", str(own)]) == 0


def test_two_files_of_one_name_do_not_share_a_folder(own, tmp_path, capsys):
    """A run destroys that of another file with the same name."""
    write_data(tmp_path / "other" / "train.jsonl")
    before = contents(own)
    capsys.readouterr()
    assert minirlhf.main(["--data", "other/train.jsonl"]) == 2
    assert one_line(capsys) == (f"minirlhf: runs/train holds a run of {tmp_path}/my/train.jsonl: name another folder "
                                "with --out, or begin it anew with --overwrite\n")
    assert minirlhf.main(["--data", "other/train.jsonl", "--stages", "ppo"]) == 2
    assert contents(own) == before
    assert minirlhf.main(["--data", "my/train.jsonl"]) == 0  # without a report it is not finished


# ---- who may write -------------------------------------------------------------------------------------------------

def test_a_finished_run_is_not_overwritten(ended, instant, capsys):
    """A finished run is destroyed by the same command, typed again."""
    before = contents(ended)
    assert minirlhf.main(["--out", str(ended)]) == 2
    assert one_line(capsys) == (f"minirlhf: {ended} holds a finished run: name another folder with --out, or "
                                "begin it anew with --overwrite\n")
    assert contents(ended) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_begun_anew_leaves_nothing_of_the_old_one(finished, ended, instant):
    """A run that is killed in pretraining has a new tokenizer beside old networks; or a user's own file is removed."""
    (ended / "notes.txt").write_text("mine")
    (ended / "ppo.pt.part").write_text("half")
    (ended / "metrics.jsonl").write_bytes(b'{"stage": "sft"}\n{"stage": "pp\xff')
    if not finished:
        (ended / "report.json").unlink()
    instant.append("pretrain")
    assert minirlhf.main(["--out", str(ended)] + ["--overwrite"] * finished) == 130
    assert set(contents(ended)) == {"notes.txt", "metrics.jsonl", "plan.json", ".lock"}
    assert (ended / "metrics.jsonl").read_text() == ""


def test_a_second_process_is_refused(ended, instant, capsys):
    """Two processes mix their networks in one folder."""
    before = contents(ended)
    command = ["--stages", "ppo", "--out", str(ended)]
    with Run(parse_config(command)).lock():
        assert minirlhf.main(command) == 2
        assert "is in use by another process: wait for it, or name another folder with --out" in one_line(capsys)
    assert contents(ended) == before
    assert minirlhf.main(command) == 0


def test_a_report_in_between_leaves_what_can_be_resumed(ended, instant):
    """A look at the report of an interrupted run ends its last chance to go on."""
    instant.append("ppo")
    assert minirlhf.main(["--stages", "ppo,dpo", "--out", str(ended)]) == 130
    (ended / "checkpoint.pt").write_text("precious")
    plan = (ended / "plan.json").read_bytes()
    assert minirlhf.main(["--stages", "report", "--out", str(ended)]) == 0
    assert (ended / "plan.json").read_bytes() == plan and (ended / "checkpoint.pt").exists()
    assert minirlhf.main(["--stages", "dpo", "--out", str(ended)]) == 0  # another command takes its place
    assert not (ended / "plan.json").exists() and not (ended / "checkpoint.pt").exists()


def test_nothing_to_resume_is_one_line(ended, capsys):
    """A finished command begins anew, or ends in a traceback."""
    assert minirlhf.main(["--resume", "--out", str(ended)]) == 2
    assert "nothing to resume" in one_line(capsys)


# ---- damaged files -------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGED = [("sft.pt", LFS), ("sft.pt", b"<!doctype html>"), ("sft.pt", b""), ("tokenizer.json", b'{"a": 1}'),
           ("tokenizer.json", b'[1, 2]'), ("tokenizer.json", b'["\\ud800"]'), ("tokenizer.json", b'[""]'),
           ("tokenizer.json", b"\xff\x00"), ("gold.json", b"[1, 2]"), ("gold.json", b'{"mean": null, "std": 1}'),
           ("gold.json", b'{"mean": NaN, "std": 1}'), ("split.jsonl", b'{"split": "train"}\n'),
           ("split.jsonl", b'{"split": "train", "prompt": "x"}\n'), ("split.jsonl", b"[]"), ("split.jsonl", b""),
           ("preferences.jsonl", b'{"split": "train", "prompt": [1], "chosen": [1], "rejected": [2]}\n{"split": "he'),
           ("preferences.jsonl", b'{"split": "train", "prompt": [1], "chosen": [1], "rejected": [2]}\n'
                                 b'{"split": "heldout", "prompt": [1], "chosen": [1], "rejected": [99999]}\n'),
           ("preferences.jsonl", b'{"split": "train", "prompt": [1], "chosen": [1], "rejected": [2]}\n'
                                 b'{"split": "heldout", "prompt": ["x"], "chosen": [1], "rejected": [9]}\n'),
           ("reward.json", b"[]"), ("reward.json", b'{"accuracy": null}'),
           ("report.json", b"[1]"), ("report.json", b'{"config": {}}')]


def use(run, name):
    """What a stage does with a file."""
    if name.endswith(".pt"):
        return run.load_network(name.removesuffix(".pt"))
    reads = {"tokenizer.json": lambda: run.tokenizer, "split.jsonl": run.texts, "preferences.jsonl": run.pairs}
    return reads.get(name, lambda: run.read(name))()


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_its_stage(name, content, tiny_copy):
    """What is not what a stage wrote ends in a traceback, or is used."""
    (tiny_copy / name).write_bytes(content)
    run = Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))
    with pytest.raises(UserError, match=f"{name} is damaged: run --stages {MADE_BY[name]} again"):
        use(run, name)
    (tiny_copy / name).unlink()
    (tiny_copy / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is damaged"):
        use(Run(run.config), name)


def test_a_network_that_cannot_be_used_is_refused(tiny_copy):
    """Weights that are NaN, or of another vocabulary, end in an index error or in nonsense."""
    run = Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))
    saved = torch.load(tiny_copy / "ppo.pt", weights_only=True)
    saved["network"]["wpe.weight"][3, 2] = float("nan")
    torch.save(saved, tiny_copy / "ppo.pt")
    with pytest.raises(UserError, match="ppo.pt is damaged: run --stages ppo again"):
        run.load_network("ppo")
    pieces = read(tiny_copy, "tokenizer.json")
    (tiny_copy / "tokenizer.json").write_text(json.dumps(pieces[:-1]))
    with pytest.raises(UserError, match="sft.pt has another vocabulary than tokenizer.json: run --stages sft again"):
        Run(run.config).load_network("sft")


def test_a_network_that_diverged_in_its_last_step_is_not_saved(tiny_copy):
    """Weights that are not finite replace the last good network."""
    run = Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))
    network = run.load_network("ppo")
    before = (tiny_copy / "ppo.pt").read_bytes()
    network.wpe.weight.data[0, 0] = float("inf")
    with pytest.raises(CanaryError, match="the weights of ppo are not finite after the last step"):
        run.save_network("ppo", network)
    assert (tiny_copy / "ppo.pt").read_bytes() == before


def test_metrics_of_any_kind_are_no_end(tiny_copy):
    """A line that was cut, or that is no row, breaks every later command."""
    run = Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))
    (tiny_copy / "metrics.jsonl").write_bytes(b'{"stage": "sft", "step": 0}\n[1]\n{"a": 1}\n\xff\xfe\n{"stage": "pp')
    assert run.metrics() == [dict(stage="sft", step=0)]
    run.begin_metrics("ppo")(step=0)
    assert (tiny_copy / "metrics.jsonl").read_text() == (
        '{"stage": "sft", "step": 0}\n{"stage": "ppo", "step": 0}\n')


def test_a_stage_that_ended_twice_has_one_row(tmp_path):
    """A stage that is killed between its last row and its end says twice that it ended, or loses its steps."""
    run = Run(Config(out=str(tmp_path)))
    run.write("metrics.jsonl", '{"stage": "ppo", "step": 0}\n{"stage": "ppo", "stage_seconds": 1.0}\n')
    run.resumed = True
    run.begin_metrics("ppo")(stage_seconds=2.0)
    assert run.metrics() == [dict(stage="ppo", step=0), dict(stage="ppo", stage_seconds=2.0)]


def test_a_folder_that_vanishes_is_one_line(ended, instant, capsys):
    """The folder is removed while the run writes in it: a traceback."""
    def vanish(run, log):
        """Vanish."""
        for path in run.folder.iterdir():
            path.unlink()
        run.folder.rmdir()
        log(step=0)

    minirlhf.FUNCTIONS["dpo"] = vanish
    assert minirlhf.main(["--stages", "dpo", "--out", str(ended)]) == 2
    assert "metrics.jsonl cannot be written (No such file or directory)" in one_line(capsys)


def test_a_training_that_explodes_names_the_step_and_the_last_good_checkpoint(tiny_copy, capsys, monkeypatch):
    """A run that diverged says neither when nor what is left."""
    train_dpo = stages.train_dpo

    def diverge(policy, reference, pairs, pad, config, seed, log, progress):
        def log_and_break(**row):
            if row["step"] == 2:
                policy.wpe.weight.data.fill_(float("nan"))
        train_dpo(policy, reference, pairs, pad, config, seed, log_and_break, progress)

    monkeypatch.setattr(stages, "train_dpo", diverge)
    monkeypatch.setattr("pipeline.progress.SAVES", 0.0)
    before = (tiny_copy / "dpo.pt").read_bytes()
    assert minirlhf.main(["--stages", "dpo", "--out", str(tiny_copy)]) == 1
    error = capsys.readouterr().err
    assert "stopped: the DPO loss is nan: the training diverged; lower --dpo-lr or raise --dpo-beta. It was in step 3 "
    assert "of the stage dpo; the last good checkpoint is after step" in error
    assert (tiny_copy / "dpo.pt").read_bytes() == before


# ---- kills ---------------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys, torch
import minirlhf
from pipeline import config, progress
torch.set_num_threads(1)
config.QUICK = json.loads(sys.argv[1])
progress.SAVES = 0.1
sys.exit(minirlhf.main(sys.argv[2:]))
"""


def start(*flags):
    command = [sys.executable, "-c", PROCESS, json.dumps(TINY), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def rows_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill(folder, number, flags, rows, seconds):
    """Start a command, and send it a signal some seconds after metrics.jsonl has so many rows. Returns its status."""
    process = start(*flags)
    deadline = time.monotonic() + 120
    while process.poll() is None and rows_of(folder) < rows and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    if process.poll() is None:
        process.send_signal(number)
    error = process.communicate()[1]
    if process.returncode == 128 + number:
        assert error.endswith(f"stopped by {signal.Signals(number).name}: go on with --resume --out {folder}\n")
    else:
        assert process.returncode in (0, -number), error  # it was done, or killed by SIGKILL
    assert not list(folder.glob("*.part")) or number == signal.SIGKILL
    return process.returncode


def metrics_without_seconds(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def assert_same_run(folder, other):
    for name in ("tokenizer.json", "split.jsonl", "gold.json", "preferences.jsonl", "reward.json", "samples.txt",
                 "watch.jsonl", "config.json", *[f"{network}.pt" for network in NETWORKS]):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    reports = [{**read(path, "report.json"), "seconds": None} for path in (folder, other)]
    assert reports[0] == reports[1]
    assert metrics_without_seconds(folder) == metrics_without_seconds(other)
    pages = [page_data(path) for path in (folder, other)]
    for page in pages:
        page["run"] = page["report"]["seconds"] = None
        for row in sum(page["metrics"].values(), []):
            row["seconds"] = None
    assert pages[0] == pages[1]
    assert not (folder / "plan.json").exists() and not (folder / "checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stages, last", [
    ("ppo,report", "report"), ("reward,ppo,grpo,report", "report"), (",".join(STAGES), "sft"), ("sft,ppo", "sft")])
def test_the_tiny_run_of_a_planted_bug_without_the_bug(stages, last, tiny, tmp_path, monkeypatch):
    """A test sees that some stages ran again, and not the bug: it kills whatever is planted."""
    monkeypatch.setenv("TINY_RUN", str(tiny))
    monkeypatch.setenv("TINY_STAGES", stages)
    (tmp_path / "run").mkdir()
    conftest.make_tiny(tmp_path / "run", last)
    assert_same_run(tmp_path / "run", tiny)
    for name in ("metrics.jsonl", "watch.jsonl"):
        rows = [json.loads(line)["stage"] for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert rows == sorted(rows, key=STAGES.index)
    assert list(read(tmp_path / "run", "stages.json")) == list(STAGES)


def kill_and_resume(folder, tiny, kills, seed):
    """Kill the tiny run at these numbers of rows in metrics.jsonl, resume it each time, and compare it at the end."""
    rng = random.Random(seed)
    flags = ["--quick", "--seed", SEED, "--stages", ",".join(STAGES), "--out", str(folder)]
    for rows in kills:
        number = rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        if kill(folder, number, flags, rows, rng.uniform(0, 0.3)) == 0:
            break
        if (folder / "plan.json").exists():
            flags = ["--resume", "--out", str(folder)]
    process = start(*flags)
    assert process.wait() == 0 or "nothing to resume" in process.stderr.read()
    assert_same_run(folder, tiny)


@pytest.mark.slow
def test_kills_over_all_stages(tiny, tmp_path):
    """A stage cannot be resumed: its optimizer, its generators or its order of data are not in the checkpoint."""
    kills = int(os.environ.get("KILLS", 4))  # KILLS=20 pytest -m slow tests/pipeline/test_folder.py
    total = rows_of(tiny)
    kill_and_resume(tmp_path / "run", tiny, [1 + i * total // kills for i in range(kills)], 1)


@pytest.mark.slow
def test_two_processes_do_not_mix(tiny, tmp_path):
    """Of two processes in one folder, both write."""
    first = start("--quick", "--seed", SEED, "--stages", "pretrain,sft", "--out", str(tmp_path / "run"))
    while first.poll() is None and not (tmp_path / "run" / "plan.json").exists():
        time.sleep(0.02)
    second = start("--quick", "--seed", "9", "--out", str(tmp_path / "run"))
    assert second.wait() == 2 and "is in use by another process" in second.stderr.read()
    assert first.wait() == 0
    for name in ("config.json", "split.jsonl", "tokenizer.json", "pretrained.pt", "sft.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (tiny / name).read_bytes(), name
