"""The front door: the whole pipeline through its command line, small; every kind of bad input; a stage run again."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minirlhf
import world

ROOT = Path(__file__).parent.parent
TINY = ("--quick --n-embd 32 --documents 500 --pretrain-steps 15 --demonstrations 200 --sft-steps 10 --pairs 60 --ppo-iterations 2 --ppo-batch 16 "
        "--minibatch 8 --reward-epochs 1 --eval-prompts 12 --best-of 4").split()
PROMPT = "i saw this little film with my sister last night ."


def without_seconds(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report.pop("seconds")
    return report


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of --quick, end to end."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert minirlhf.main(["--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest run that goes through every stage, made twice."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("a", "b")]
    for folder in folders:
        assert minirlhf.main([*TINY, "--out", str(folder)]) == 0
    return folders


def test_quick_leaves_what_the_design_says(quick):
    """Report incomplete: a policy, the optimum or a file of the contract is missing, or a number is not a number."""
    for name in ("config.json metrics.jsonl samples.txt report.md report.json tokenizer.json preferences.jsonl pretrained.pt sft.pt reward.pt ppo.pt "
                 "critic.pt dpo.pt").split():
        assert (quick / name).stat().st_size > 0, name
    assert not list(quick.glob("*.part"))
    report = json.loads((quick / "report.json").read_text())
    assert set(report) == {"policies", "optimum", "reward_model", "seconds", "config", "device", "torch"}
    assert set(report["policies"]) == {"pretrained", "sft", "best_of_n", "dpo", "ppo"}
    for row in report["policies"].values():
        assert set(row) == {"gold", "gold_se", "score", "kl", "kl_se", "objective", "optimum_share", "win_rate", "length", "finished"}
        assert all(isinstance(x, float) and x == x for x in row.values())
        assert row["objective"] == pytest.approx(row["score"] - report["config"]["beta"] * row["kl"])
    assert set(report["optimum"]) == {"objective", "kl", "gold", "ess"}
    assert {"accuracy", "gold_accuracy", "label_ceiling", "pairs"} == set(report["reward_model"])
    assert set(report["seconds"]) == set(minirlhf.STAGES) - {"report"}
    sft = report["policies"]["sft"]
    assert sft["kl"] == 0 and abs(sft["optimum_share"]) < 1e-9
    assert report["policies"]["best_of_n"]["score"] > sft["score"]


def test_quick_learns(quick):
    """Nothing is learned: the loops run and change nothing, or move the policy away from the reward."""
    report = json.loads((quick / "report.json").read_text())
    rows = report["policies"]
    assert report["reward_model"]["accuracy"] > 0.55
    assert rows["ppo"]["score"] > rows["sft"]["score"] + 0.5 and rows["ppo"]["objective"] > rows["sft"]["objective"] + 0.3
    assert rows["dpo"]["score"] > rows["sft"]["score"]
    assert rows["ppo"]["objective"] < report["optimum"]["objective"] + 0.3


def test_metrics_start_clean(quick):
    """The first update is off policy: KL at the start is not 0, or the ratio on the first minibatch is not 1."""
    rows = [json.loads(line) for line in (quick / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["stage"] == "ppo")
    assert first["kl_at_start"] == 0 and first["ratio_error"] < 1e-5
    first = next(row for row in rows if row["stage"] == "dpo")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3) and first["margin"] == pytest.approx(0, abs=1e-4)


def test_two_runs_with_one_seed_are_the_same(tiny):
    """Hidden randomness: a set's order, the clock, or a generator that was not seeded decides a number."""
    a, b = map(without_seconds, tiny)
    assert a == b
    assert (tiny[0] / "samples.txt").read_text() == (tiny[1] / "samples.txt").read_text()


def test_a_stage_run_again_gives_the_same(tiny, tmp_path):
    """Resume: a stage run alone depends on what ran before it in the same process, or on flags that were not saved."""
    folder = tmp_path / "again"
    shutil.copytree(tiny[0], folder)
    for name in ("ppo.pt", "critic.pt", "dpo.pt", "report.json"):
        (folder / name).unlink()
    assert minirlhf.main(["--stages", "ppo,dpo,report", "--out", str(folder)]) == 0
    assert without_seconds(folder) == without_seconds(tiny[0])
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages.count("ppo") == 2 + 1  # two iterations and the stage's seconds, not twice that


def test_another_seed_gives_another_run(tiny, tmp_path):
    """The seed is ignored."""
    assert minirlhf.main([*TINY, "--seed", "1", "--stages", "pretrain,sft", "--out", str(tmp_path / "c")]) == 0
    mine, other = (torch.load(folder / "sft.pt", weights_only=True)["network"]["wte.weight"] for folder in (tmp_path / "c", tiny[0]))
    assert mine.shape != other.shape or not torch.equal(mine, other)


def test_what_is_out_of_date_is_told(tiny, tmp_path, capsys):
    """A stage is run again and networks that were built on its old result are reported as if they were built on the new one."""
    folder = tmp_path / "stale"
    shutil.copytree(tiny[0], folder)
    assert minirlhf.main(["--stages", "reward", "--out", str(folder)]) == 0
    assert "out of date, because what they are built on is newer: go on with --stages ppo,report" in capsys.readouterr().out
    assert minirlhf.main(["--stages", "dpo", "--out", str(folder)]) == 0
    assert "go on with --stages ppo,report" in capsys.readouterr().out
    assert minirlhf.main(["--stages", "ppo,report", "--out", str(folder)]) == 0
    assert "out of date" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_a_damaged_config_is_one_line(tiny, tmp_path, capsys, content):
    """A traceback when config.json is not what a run wrote."""
    (tmp_path / "config.json").write_text(content)
    assert minirlhf.main(["--stages", "ppo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json is damaged" in error


def test_missing_stage_is_named(tiny, tmp_path, capsys):
    """A traceback instead of a hint when an earlier stage has not run."""
    folder = tmp_path / "cut"
    shutil.copytree(tiny[0], folder)
    (folder / "reward.pt").unlink()
    before = (folder / "ppo.pt").read_bytes()
    assert minirlhf.main(["--stages", "ppo", "--out", str(folder)]) == 2
    assert "reward.pt is missing: run --stages reward first" in capsys.readouterr().err
    assert (folder / "ppo.pt").read_bytes() == before


def test_damaged_checkpoint_is_one_line(tiny, tmp_path, capsys):
    """A half-written checkpoint ends in a traceback."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny[0], folder)
    (folder / "sft.pt").write_bytes((folder / "sft.pt").read_bytes()[:1000])
    assert minirlhf.main(["--stages", "ppo", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sft.pt is damaged" in error


def test_canary_stops_the_run_and_keeps_the_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    """A broken invariant is trained on silently, or the stop destroys what was good."""
    folder = tmp_path / "canary"
    shutil.copytree(tiny[0], folder)
    before = (folder / "ppo.pt").read_bytes()
    exact = minirlhf.train_ppo.__globals__["response_logprobs"]
    monkeypatch.setitem(minirlhf.train_ppo.__globals__, "response_logprobs", lambda model, batch, temperature=1.0: exact(model, batch, 0.7))
    assert minirlhf.main(["--stages", "ppo", "--out", str(folder)]) == 1
    assert "ratio on the first minibatch" in capsys.readouterr().err
    assert (folder / "ppo.pt").read_bytes() == before


def test_sample_and_trace(quick, capsys):
    """The trace does not add up: the rewards of the rows are not score - beta * log pi/ref."""
    assert minirlhf.main(["--stages", "sample,trace", "--prompt", PROMPT, "--out", str(quick)]) == 0
    out = capsys.readouterr().out
    for name in ("pretrained", "SFT", "DPO", "PPO"):
        assert f"\n  {name}" in out
    lines = out.splitlines()
    total = next(line for line in lines if line.startswith("sum")).split()
    rows = [line for line in lines if line[:3].strip().isdigit()]
    assert len(rows) >= 1
    rewards = [float(row.split()[-3]) for row in rows]
    assert sum(rewards) == pytest.approx(float(total[-1]), abs=0.001 * len(rows) + 0.001)
    assert sum(float(row.split()[-6]) for row in rows) == pytest.approx(float(total[1]), abs=0.001 * len(rows) + 0.001)


@pytest.mark.parametrize("flags, said", [
    ("--betta 0.1", "unknown flag --betta, did you mean --beta?"),
    ("--beta -0.1", "--beta is a number that is not negative, got -0.1"),
    ("--beta nan", "--beta is a number"),
    ("--beta lots", "invalid float value: 'lots'"),
    ("--dpo-beta 0", "--dpo-beta is above 0"),
    ("--temperature 0", "--temperature is above 0"),
    ("--n-embd 30 --n-head 4", "--n-embd 30 cannot be divided into --n-head 4 heads"),
    ("--response-tokens 64", "leaves no room for a prompt"),
    ("--pairs 0", "--pairs is at least 1, got 0"),
    ("--seed -1", "--seed is not negative"),
    ("--flip 1.5", "--flip is between 0 and 1"),
    ("--minibatch 512", "--minibatch 512 is larger than --ppo-batch"),
    ("--dpo-kind kto", "--dpo-kind is one of dpo, ipo, slic, robust, got 'kto'"),
    ("--dpo-label-smoothing 0.5", "--dpo-label-smoothing is below 0.5"),
    ("--dpo-label-smoothing 0.1 --dpo-kind ipo", "--dpo-label-smoothing belongs to --dpo-kind dpo and robust, got 'ipo'"),
    ("--held-out zoo", "--held-out is one of film"),
    ("--device tpu", "--device is cpu, cuda or mps"),
    ("--device cpu --cuda-graphs", "--cuda-graphs needs CUDA"),
    ("--stages pretrain,dance", "unknown stage 'dance'"),
    ("--stages sample", "need a --prompt"),
    ("--stages sample,ppo --prompt hello", "run them by themselves"),
    ("--stages ppo", "holds no run: begin with --stages pretrain"),
    ("--data nowhere.jsonl", "nowhere.jsonl: cannot be read"),
])
def test_bad_flags_are_one_line(flags, said, tmp_path, monkeypatch, capsys):
    """A user's mistake ends in a traceback, in a wrong exit status, or after minutes of work."""
    monkeypatch.chdir(tmp_path)
    assert minirlhf.main(flags.split()) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.err.startswith("minirlhf: ")
    assert captured.out == "" and not list(tmp_path.iterdir())


def test_out_that_is_a_file(tmp_path, capsys):
    """A folder that cannot be made ends in a traceback, or the file in its place is lost."""
    (tmp_path / "runs").write_text("mine")
    assert minirlhf.main(["--quick", "--out", str(tmp_path / "runs")]) == 2
    assert "cannot be a folder of a run" in capsys.readouterr().err and (tmp_path / "runs").read_text() == "mine"


def test_exit_status_and_silence_in_a_real_shell(tmp_path):
    """The one line and the status 2 exist only inside the tests' process."""
    done = subprocess.run([sys.executable, str(ROOT / "minirlhf.py"), "--n-head", "7"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_prompt_longer_than_the_block(tiny, capsys):
    """A prompt that does not fit ends in a traceback out of the network."""
    assert minirlhf.main(["--stages", "sample", "--prompt", "very " * 60, "--out", str(tiny[0])]) == 2
    error = capsys.readouterr().err
    assert "tokens, and a block of 64 has room for 16" in error and error.count("\n") == 1


def test_network_flags_cannot_change_in_mid_run(tiny, capsys):
    """A later stage with another size of network loads the old one and says nothing."""
    assert minirlhf.main(["--stages", "sft", "--n-layer", "3", "--out", str(tiny[0])]) == 2
    assert "--n-layer is 2 in the run in" in capsys.readouterr().err


def test_every_flag_has_a_help(capsys):
    """A field of Config without a comment has no help."""
    with pytest.raises(SystemExit) as stop:
        minirlhf.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in minirlhf.dataclasses.fields(minirlhf.Config):
        assert f"--{field.name.replace('_', '-')} " in text
    assert "price of one nat of KL" in text and "Read in this order: mdp.py" in text


# ---------------------------------------------------------------------------------------------------------------------
# the user's own preference files

def write_pairs(path, n, layout):
    rng = random.Random(0)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        for prompt in world.make_prompts(0, n, 1)[0]:
            good, bad = (world.make_review(rng, world.subject_of(prompt), mood, 2) for mood in (1.0, 0.0))
            if layout == "hh":
                talk = f"\n\nHuman: {prompt}\n\nAssistant:"
                file.write(json.dumps({"chosen": f"{talk} {good}", "rejected": f"{talk} {bad}"}) + "\n")
            else:
                file.write(json.dumps({"prompt": prompt, "chosen": good, "rejected": bad}) + "\n")
        file.write(json.dumps({"prompt": "twice", "chosen": "same", "rejected": "same"}) + "\n" if layout == "plain" else "\n")
    return path


@pytest.mark.parametrize("layout, name", [("plain", "pairs.jsonl"), ("hh", "talks.jsonl.gz")])
def test_own_data_runs_to_the_end(layout, name, tmp_path, capsys):
    """The data path ends in the oracle of the built-in world, or invents a gold reward that is not there."""
    path = write_pairs(tmp_path / name, 80, layout)
    assert minirlhf.main([*TINY, "--data", str(path), "--out", str(tmp_path / "run"), "--block-size", "100", "--response-tokens", "40"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(row["gold"] is None and row["win_rate"] is None for row in report["policies"].values())
    assert report["optimum"]["gold"] is None and 0 <= report["reward_model"]["accuracy"] <= 1
    assert report["reward_model"]["gold_accuracy"] is None
    assert "this data has no oracle" in out
    if layout == "plain":
        assert "1 pairs dropped because their two responses are the same" in out


def test_broken_data_keeps_what_was_good(tiny, tmp_path, capsys):
    """A broken line is found after the old run's files were overwritten."""
    folder = tmp_path / "kept"
    shutil.copytree(tiny[0], folder)
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    before = (folder / "config.json").read_bytes()
    assert minirlhf.main([*TINY, "--data", str(path), "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f'{path}, line 2: the key "rejected" is missing' in error
    assert (folder / "config.json").read_bytes() == before


@pytest.mark.parametrize("seed", [0, 2])
def test_no_demonstration_is_longer_than_the_block(seed, tmp_path):
    """A demonstration that does not fit the block ends the run in a traceback, for one seed in three."""
    flags = [*TINY, "--stages", "pretrain,sft", "--demonstrations", "4000", "--response-tokens", "24", "--block-size", "40", "--seed", str(seed)]
    assert minirlhf.main([*flags, "--out", str(tmp_path / "run")]) == 0
