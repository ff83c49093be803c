"""A run is a plain folder: the same command again, another one from it, over it or next to it, and damaged files."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import COMMAND, SMALLEST
from filelock import FileLock

import minirlhf
from pipeline import config, stages
from pipeline import folder as folder_module
from pipeline import run as run_module
from pipeline.config import Config, read_settings
from pipeline.errors import UserError
from pipeline.report import format_table
from pipeline.run import Run
from pipeline.stages import all_stages
from tokenizer import frequent_pieces


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("minirlhf: ")
    return error


@pytest.fixture
def ran(monkeypatch):
    """Within the test no stage trains: it writes its name into its files. Returns the list of those that ran."""
    names = []

    def make(function):
        def call(run, name, seed):
            """Write."""
            for file in all_stages(run.config)[name].files:
                run.write(file, f"{name} of {run.folder.name}")
            run.write_rows("watch.jsonl", [*run.rows("watch.jsonl"), dict(stage=name)])
            names.append(name)
            return "done"
        return call

    for name in [name for name in vars(stages) if name.startswith("run_")]:
        monkeypatch.setattr(stages, name, make(name))
    monkeypatch.setattr(folder_module, "make_data", lambda config, tokenizer: None)
    monkeypatch.setattr(minirlhf, "format_table", lambda report: "the table")
    monkeypatch.setattr(Run, "read", lambda run, name: {} if name == "report.json" else rows(run.folder, name))
    return names


ALL = "pretrain sft preferences reward dpo ppo_no_kl grpo report".split()


def command(folder, *flags):
    return minirlhf.main(["--policies", "dpo,ppo_no_kl,grpo", "--out", str(folder), *flags])


# ---- the same command again ----------------------------------------------------------------------------------------

def test_other_settings_are_refused(smallest, capsys):
    """Bug: a folder gets files of two settings, or the refusal does not say which, or what to do."""
    before = contents(smallest)
    assert minirlhf.main([*COMMAND, str(smallest), "--pairs", "25"]) == 2
    assert one_line(capsys) == (f"minirlhf: {smallest} was made with --pairs 40, not 25: repeat its options, or begin "
                                f"a new run from it with --from {smallest}\n")
    assert contents(smallest) == before
    assert minirlhf.main([*COMMAND, str(smallest)]) == 0


def test_a_finished_run_in_a_folder_that_may_only_be_read(smallest, capsys, monkeypatch):
    """Bug: a finished run is made again, or needs a lock or writes something before it shows its table."""
    def refuse(*inputs, **named):
        raise PermissionError(13, "Permission denied")

    for where, name in ((folder_module, "FileLock"), (run_module, "write_file"), (Path, "mkdir")):
        monkeypatch.setattr(where, name, refuse)
    before, table = contents(smallest), format_table(json.loads((smallest / "report.json").read_text()))
    capsys.readouterr()
    assert minirlhf.main([*COMMAND, str(smallest)]) == 0
    assert capsys.readouterr().out == f"{smallest} is finished.\n\n{table}\n\nopen {smallest}/report.html\n"
    assert contents(smallest) == before
    (smallest / "report.json").unlink()
    assert minirlhf.main([*COMMAND, str(smallest)]) == 2
    assert "cannot be the folder of a run (Permission denied)" in one_line(capsys)


def test_the_device_that_is_given(smallest, monkeypatch):
    """Bug: --device has no effect on a run that continues, or on what a finished run is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # so "cuda" would be taken, and fails here
    assert minirlhf.main(["--out", str(smallest), "--prompt", "hello", "--device", "cpu"]) == 0
    (smallest / "dpo.pt").unlink()
    assert minirlhf.main([*COMMAND, str(smallest), "--device", "cpu"]) == 0


def test_lost_settings_are_refused(smallest, capsys):
    """Bug: a stage continues after config.json was lost, with the settings of this command."""
    for path in smallest.iterdir():
        if path.name != "sft.pt":
            path.unlink()
    assert minirlhf.main([*COMMAND, str(smallest)]) == 2
    assert "and no config.json, so its settings are not known" in one_line(capsys)
    assert set(contents(smallest)) == {"sft.pt"}


def test_two_processes_in_one_folder(smallest, capsys):
    """Bug: two commands write into one folder, or half a run is compared."""
    (smallest / "report.json").unlink()
    with FileLock(smallest / ".lock"):
        for flags in ((), ("--overwrite",)):
            before = contents(smallest)
            assert minirlhf.main([*COMMAND, str(smallest), *flags]) == 2
            assert "is in use by another process" in one_line(capsys) and contents(smallest) == before
    assert minirlhf.main(["--compare", str(smallest)]) == 2 and "is not finished" in one_line(capsys)


# ---- --from --------------------------------------------------------------------------------------------------------

AGAIN = [  # options changed -> the stages that run again; test_minirlhf.py has all settings of all stages
    ("--seed 1", " ".join(ALL)), ("--pairs 30", " ".join(ALL[2:])), ("--reward-from gold", "ppo_no_kl grpo report"),
    ("--beta 0.05", "grpo report"),  # which PPO without KL does not use
    ("--policies rloo,ppo_no_kl --dpo-beta 1", "rloo report"), ("", "report")]


@pytest.mark.parametrize("flags, again", AGAIN, ids=[flags for flags, _ in AGAIN])
def test_what_is_taken_over(flags, again, tmp_path, ran):
    """Bug: a stage is taken over although a setting that it depends on changed, or made again although none did."""
    old, new = tmp_path / "old", tmp_path / "new"
    assert command(old) == 0
    old_contents = contents(old)
    ran.clear()
    assert minirlhf.main(["--from", str(old), "--out", str(new), *flags.split()]) == 0
    assert ran == again.split()
    stages_now = all_stages(Config(**read_settings(new)))
    for name, stage in stages_now.items():
        assert {(new / file).read_text() for file in stage.files} == {f"{name} of {'new' if name in ran else 'old'}"}
    taken = set(stages_now) - set(ran)
    for file in ("metrics.jsonl", "watch.jsonl"):
        kept, found = [[row for row in rows(folder, file) if row["stage"] in taken] for folder in (old, new)]
        assert sorted(found, key=str) == sorted(kept, key=str)
    ran.clear()
    assert minirlhf.main(["--from", str(old), "--out", str(new), *flags.split()]) == 0  # goes on, as any command
    assert ran == [] and contents(old) == old_contents


def test_a_run_begun_from_an_unfinished_one(tmp_path, ran):
    """Bug: a stage is taken over that the other run has not finished."""
    old = tmp_path / "old"
    assert command(old) == 0
    for name in ("ppo_no_kl_critic.pt", "report.json"):
        (old / name).unlink()
    (old / "checkpoint.pt").write_text("half of PPO")
    ran.clear()
    assert minirlhf.main(["--from", str(old), "--dpo-lr", "0.5", "--out", str(tmp_path / "new")]) == 0
    assert ran == ["dpo", "ppo_no_kl", "report"] and not (tmp_path / "new" / "checkpoint.pt").exists()
    assert (tmp_path / "new" / "sft.pt").read_text() == "sft of old"


# ---- --overwrite ---------------------------------------------------------------------------------------------------

def test_overwrite_removes_the_run_and_nothing_else(smallest, monkeypatch):
    """Bug: a file of the old run is taken for one of the new run, or a file of the user is removed."""
    (smallest / "notes.txt").write_text("mine")
    for name in ("rloo.pt", "ppo_no_kl_critic.pt", "checkpoint.pt"):
        (smallest / name).write_text("of an older run")
    left = []
    monkeypatch.setattr(minirlhf, "run_stages", lambda run: left.extend(path.name for path in run.folder.iterdir()))
    assert minirlhf.main([*COMMAND, str(smallest), "--overwrite", "--pairs", "30"]) == 0
    assert set(left) - {".lock"} == {"notes.txt", "config.json"}
    assert read_settings(smallest)["pairs"] == 30


@pytest.mark.parametrize("flags, name, content", [
    ("", "config.json", '{"model_type": "llama", "seed": 0}'),
    ("--data mine/preferences.jsonl", "preferences.jsonl", None)])
def test_overwrite_never_removes_what_is_not_a_run(flags, name, content, tmp_path, capsys, monkeypatch):
    """Bug: the config.json of a pretrained model, or the data of the user, is removed because a run has such a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minirlhf, "run_stages", lambda run: None)
    (tmp_path / "mine").mkdir()
    write_data(tmp_path / "mine" / name)
    if content:
        (tmp_path / "mine" / name).write_text(content)
    before = contents(tmp_path / "mine")
    for more in ([], ["--overwrite"]):
        assert minirlhf.main(["--out", "mine", *flags.split(), *more]) == 2
        error = one_line(capsys)
        assert name in error and (content is None or "--overwrite" not in error)  # a hint never destroys
        assert contents(tmp_path / "mine") == before
    with pytest.raises(UserError, match="which the run reads"):
        folder_module.remove_all(Run("mine", Config(prompts=f"mine/{name}")))


def write_data(path, n=80):
    lines = [dict(prompt=f"prompt {i} :", chosen=f" the good {i}", rejected=f" the bad {i}") for i in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_can_be_known_is_known_before_anything_is_removed(smallest, capsys):
    """Bug: the finished run is removed before the data file is read."""
    path, before = smallest.parent / "mine.jsonl", contents(smallest)
    flags = ["--data", str(path), "--overwrite", "--response-tokens"]
    for n, cap, message in ((17, "20", "15 pairs to train on"), (80, "1", "no pair of 72 is left")):
        write_data(path, n)
        assert minirlhf.main([*COMMAND, str(smallest), *flags, cap]) == 2
        assert message in one_line(capsys) and contents(smallest) == before


# ---- own data ------------------------------------------------------------------------------------------------------

def test_a_data_file_that_has_changed_is_another_setting(tmp_path, ran, capsys):
    """Bug: a file that was edited gives another split: training prompts are evaluated."""
    path = tmp_path / "mine.jsonl"
    write_data(path)
    flags = [tmp_path / "run", "--data", str(path)]
    assert command(*flags) == 0
    (tmp_path / "run" / "samples.txt").unlink()
    text = path.read_text()
    write_data(path, 81)
    capsys.readouterr()
    assert command(*flags) == 2
    assert f"{path} has changed since {tmp_path}/run was begun with it" in one_line(capsys)
    ran.clear()
    assert minirlhf.main(["--from", f"{tmp_path}/run", "--out", f"{tmp_path}/new"]) == 0 and ran == ALL
    path.write_text(text)
    assert command(*flags) == 0
    asked = config.parse_command(["--prompts", str(path), "--init", "gpt", "--reward-from", "a.py:f"])[1]
    assert asked.data_sha256 == read_settings(tmp_path / "run")["data_sha256"]
    path.unlink()  # a run can be moved without its file
    assert command(*flags) == 0
    assert config.parse_command(["--from", f"{tmp_path}/run", "--beta", "1"])[1].data_sha256 == asked.data_sha256


@pytest.fixture(scope="module")
def own(shared):
    """A finished run on own data, and its data file next to it: 120 pairs of 60 prompts, two of them over-long."""
    def make(folder):
        folder.mkdir()
        lines = [dict(prompt=f"how was number {i // 2} ?", chosen=f"a good {i}", rejected=f"a bad {i}")
                 for i in range(120)]
        long = dict(prompt="too" + " long" * 60, rejected="b " * 60)
        lines[8:10] = [dict(long, chosen="a " * 50 + "x"), dict(long, chosen="a " * 50 + "y")]
        lines[20] = dict(prompt="how was number 10 ?", chosen="same", rejected=" same ")
        (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "QUICK_WITH_DATA", SMALLEST)
            flags = ["--data", str(folder / "mine.jsonl"), "--policies", "ppo"]
            assert minirlhf.main([*COMMAND, str(folder / "run"), *flags]) == 0
    return shared("own", make)


def test_own_data_runs_to_the_end(own, monkeypatch):
    """Bug: the data path asks the oracle, invents a gold that is not there, or learns other texts than the user's."""
    folder = own / "run"
    run = Run(folder, Config(**read_settings(folder)))
    encode, end = run.tokenizer.encode_ordinary, run.tokenizer.n_vocab - 2
    known = {}  # the responses by the prompt, in ids
    for line in (own / "mine.jsonl").read_text().splitlines():
        row = json.loads(line)
        responses = [(encode(" " + row[side]) + [end])[:8] for side in ("chosen", "rejected")]
        known.setdefault(tuple(encode(row["prompt"])[-16:]), []).append(responses)
    train, heldout = run.pairs
    assert (len(train) + len(heldout), len({tuple(row["prompt"]) for row in heldout})) == (119, 6)
    assert not {tuple(row["prompt"]) for row in train} & {tuple(row["prompt"]) for row in heldout}
    for row in train + heldout:
        assert [row["chosen"], row["rejected"]] in known[tuple(row["prompt"])] and "gold" not in row
    report = run.read("report.json")
    assert all(row["gold"] is None and row["win_rate"] is None for row in report["policies"].values())
    assert report["reward_model"]["gold_accuracy"] is None and report["reward_model"]["pairs"] == len(train)
    assert not (folder / "gold.json").exists()
    assert not any("gold" in row for row in rows(folder))
    run.texts["train"] += run.texts["heldout"]
    monkeypatch.setattr(Run, "write", lambda *arguments: None)
    assert "; 100% of the held-out responses are trained on" in stages.run_preferences(run, "preferences", 0)


def test_the_texts_of_own_data(own, tmp_path, monkeypatch):
    """Bug: pretraining or SFT reads held-out texts or rejected responses; the split depends on other settings."""
    folder, given = own / "run", {}
    run = Run(folder, Config(**read_settings(folder)))
    monkeypatch.setattr(Run, "write", lambda *arguments: None)
    monkeypatch.setattr(stages, "last_metrics", lambda *arguments: "")
    monkeypatch.setattr(stages, "train_sft", lambda network, examples, *rest: given.update(examples=examples))
    monkeypatch.setattr(Run, "train", lambda run, name, loop, steps: loop(None))
    stages.run_sft(run, "sft", 0)
    assert given["examples"] == [(row["prompt"], row["chosen"]) for row in run.pairs[0]]
    stages.run_pretrain(run, "pretrain", 0)
    end = run.tokenizer.n_vocab - 2
    texts = [row["prompt"] + row[side] for row in run.texts["train"] for side in ("chosen", "rejected")]
    assert given["examples"] == [([end], [*run.tokenizer.encode_ordinary(text), end][:23]) for text in texts]
    other = stages.make_data(Config(**vars(run.config) | dict(eval_prompts=100, response_tokens=7)))
    assert other[0] == frequent_pieces(texts, run.config.vocab_size)
    assert other[1] == {side: [{k: x for k, x in row.items() if k != "split"} for row in run.texts[side]]
                        for side in ("train", "heldout")}
    assert stages.make_data(Config(**vars(run.config) | dict(seed=9)))[1] != other[1]
    few, lines = tmp_path / "few.jsonl", (own / "mine.jsonl").read_text().splitlines(True)[::2]  # a pair of each prompt
    few.write_text("".join(lines[:18]))  # of which two are held out
    assert len(stages.make_data(Config(**vars(run.config) | dict(data=str(few))))[1]["train"]) == 16
    few.write_text("".join(lines[:17]))
    with pytest.raises(UserError, match="15 pairs to train on, at least 16 are needed"):
        stages.make_data(Config(**vars(run.config) | dict(data=str(few))))


def test_a_cap_that_leaves_no_pair_is_known_before_anything_is_done(own, tmp_path, capsys):
    """Bug: --from takes over the split, and only SFT finds that no held-out pair differs within the smaller cap."""
    flags = ["--from", str(own / "run"), "--out", str(tmp_path / "new"), "--response-tokens", "1"]
    assert minirlhf.main(flags) == 2
    assert "no pair of 12 is left" in one_line(capsys) and not (tmp_path / "new").exists()


# ---- damaged files -------------------------------------------------------------------------------------------------

class Intruder:
    def __reduce__(self):
        return print, ("code from a file of a run is run",)


def changed(old, new):
    """Replace what is found first."""
    return lambda path: path.write_text(re.sub(old, new, path.read_text(), count=1))


def nan_weights(path):
    saved = torch.load(path, weights_only=True)
    saved["network"]["wte.weight"][0] = float("nan")
    torch.save(saved, path)


DAMAGES = [  # test_run.py has the ways in which a content may not fit
    ("split.jsonl", changed('"prompt": ".*?"', '"prompt": ""')), ("gold.json", changed('"std": [^}]*', '"std": 0.0')),
    ("split.jsonl", lambda path: path.write_text(path.read_text().replace('"heldout"', '"train"'))),
    ("report.json", changed('"policies"', '"policy"')), ("sft.pt", nan_weights),
    ("metrics.jsonl", changed('"ppo", "step": 2', r'\g<0>, "kl_at_start": 0.0')),
    ("reward.pt", lambda path: torch.save(Intruder(), path)),
    ("checkpoint.pt", lambda path: torch.save(dict(stage="ppo", step="1"), path))]


@pytest.mark.parametrize("name, damage", DAMAGES, ids=[name for name, _ in DAMAGES])
def test_a_damaged_file_is_one_line(name, damage, smallest, capsys):
    """Bug: a traceback, or code that a file holds is run, or the line does not name the file and what to do."""
    if name != "report.json":  # a stage that reads the file runs again
        (smallest / ("ppo.pt" if name == "checkpoint.pt" else "samples.txt")).unlink()
    damage(smallest / name)
    capsys.readouterr()
    assert minirlhf.main([*COMMAND, str(smallest)]) == 2
    captured = capsys.readouterr()
    assert "code from a file" not in captured.out and "Traceback" not in captured.err
    assert captured.err.split("minirlhf: ")[-1] == (
        f"{smallest / name} cannot be read: remove it, and the same command makes it again\n")
