"""The settings and the command line: every option, every error line, the help, and which source of a setting wins."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY

import minirlhf
from pipeline import config
from pipeline.config import OPTIONS, POLICIES, Config, flag, parse_command
from pipeline.stages import make_data

ROOT = Path(config.__file__).parent.parent
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def write_run(folder, **settings):
    """A folder that holds nothing but the settings of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(Config(**settings))))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """No test here runs a stage: a mistake that is not noticed would start the default run."""
    monkeypatch.setattr(minirlhf, "run_stages", None)
    monkeypatch.chdir(tmp_path)


# ---- options -------------------------------------------------------------------------------------------------------

def test_the_split_of_the_built_in_world():
    """Bug: --held-out or --seed goes nowhere, or the split depends on how many prompts are asked."""
    def split(**changes):
        return make_data(Config(**TINY | dict(documents=50) | changes))[1]

    found = split(held_out="hotel")
    hotels = {side: sum("hotel" in row["prompt"] for row in found[side]) for side in found}
    assert hotels["train"] == 0 and hotels["heldout"] > 50
    assert split(held_out="hotel", eval_prompts=30000) == found
    assert split(seed=5) != split()


OLD = dict(pairs=5, best_of=3, annotators=3, bias="length=0.5")
INIT = {**config.WITH_INIT, **config.RATES}


@pytest.mark.parametrize("flags, expected", [
    ("--pairs 7 --quick --beta 0", {**config.QUICK, "pairs": 7, "beta": 0}),
    ("--quick --data my.jsonl --ppo-batch 8", {**config.WITH_DATA, **config.QUICK_WITH_DATA, "data": "my.jsonl",
                                               "ppo_batch": 8}),
    ("--init gpt --lora 8", {**INIT, **config.LORA_RATES, "init": "gpt", "lora": 8}),
    ("--init gpt --lora 0 --prompts my.jsonl --reward-from mine.py:reward", {
        **INIT, **config.WITH_PROMPTS, "init": "gpt", "prompts": "my.jsonl", "reward_from": "mine.py:reward"}),
    ("--from old --pairs 6", {**OLD, "pairs": 6}),
    ("--from old --data my.jsonl --out new", dict(data="my.jsonl", best_of=3))])  # annotators are the world's
def test_which_source_of_a_setting_wins(flags, expected, tmp_path):
    """Bug: --data beats --quick, one of them beats an option that was given, or --from forgets a setting."""
    write_run(tmp_path / "old", **OLD)
    settings = parse_command(flags.split())[1]
    assert settings == Config(**expected)
    assert all(type(value) is FIELDS[name].type for name, value in vars(settings).items())


@pytest.mark.parametrize("flags, folder", [
    ("", "runs/default"), ("--quick", "runs/quick"), ("--init my/gpt.v2", "runs/gpt.v2"),
    ("--data my/reviews.v2.jsonl --quick", "runs/reviews.v2"), ("--init my/gpt --data my/a.jsonl.gz", "runs/a"),
    ("--from runs/a --beta 0.5 --reward-from my/f.py:g", "runs/a_beta-0.5_reward-from-f.py:g"),
    ("--from . --beta 2", "{here}_beta-2.0"), ("--from runs/a/ --policies ppo,rloo", "runs/a_policies-ppo+rloo"),
    ("--from runs/a --beta 1 --out ~/x", "{home}/x")])
def test_the_folder_of_a_run(flags, folder, tmp_path, monkeypatch):
    """Bug: two kinds of run write into one folder, or "~" is a folder's name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_run(tmp_path)
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "home" / "a")
    assert parse_command(flags.split())[0].out == folder.format(here=tmp_path, home=tmp_path / "home")
    assert parse_command(["--data=~/x.jsonl"])[1].data == str(tmp_path / "home" / "x.jsonl")
    assert parse_command(["--reward-from=~/x.py:f"])[1].reward_from == str(tmp_path / "home" / "x.py:f")
    assert parse_command(["--chat=~/a"])[0].chat == str(tmp_path / "home" / "a")


# ---- error lines ---------------------------------------------------------------------------------------------------

REFUSED = [
    ("--betta 0.1", "unknown option --betta, did you mean --beta?"),
    ("--pair 3", "unknown option --pair, did you mean --pairs?"),  # an abbreviation breaks when an option is added
    ("--overwrit", "unknown option --overwrit, did you mean --version?"),  # a hint never destroys
    ("--pairs 0", "--pairs must be between 1 and 10,000,000, got 0"), ("--ppo-lr 0", "--ppo-lr must be"),
    ("--label-smoothing 0.5", "--label-smoothing must be between 0 and 0.49, got 0.5"),
    ("--beta nan", "--beta must be between 0 and 10,000, got nan"), ("--beta 1e-7", "--beta is 0, or at least 1e-06"),
    # settings that do not go together
    ("--n-embd 30", "--n-embd 30 cannot be divided into 4 attention heads"),
    ("--response-tokens 49", "--response-tokens 49 leaves no room for a prompt in --block-size 64"),
    ("--data my.jsonl --response-tokens 192", "--response-tokens 192 leaves no room for a prompt in --block-size 192"),
    ("--policies ppo,reinforce++ --ppo-batch 30", "--ppo-batch 30 cannot be divided into groups of --group 4"),
    ("--policies rloo,grpo --group 1", "--group 1 leaves rloo,grpo nothing to compare an answer with"),
    ("--policies ppo,online_dpo --beta 0", "--policies online_dpo needs a --beta above 0"),
    ("--policies ppo,gspo", "unknown policy 'gspo' in --policies, choose from dpo, ipo"),
    ("--reward-from me", "--reward-from must be model, gold, task or FILE.py:FUNCTION, got 'me'"),
    ("--held-out house", "--held-out must be one of film, restaurant, hotel, book, concert, got 'house'"),
    ("--data my.jsonl --flip 0.1", "--flip belongs to the built-in world and has no effect on your own data"),
    ("--data my.jsonl --reward-from gold", "--reward-from gold is known in the built-in world only"),
    ("--prompts b.jsonl", "--prompts has no text to learn a language from"),
    ("--device tpu", "--device tpu cannot be used: give cpu, cuda or mps\n"),
    ("--device cuda:99", "--device cuda:99 cannot be used: "),
    ("--from old --quick", "--quick is a set of settings"),
    ("--from old --out ./old/../old", "--from and --out name the same folder"),
    ("--from old", "--from old: the new run needs a folder: change a setting, such as --beta 0.05, or name a folder"),
    ("--data=", "--data is empty: give it a path, or leave it out"), ("--compare old nothing", "nothing holds no run"),
    ("--chat old --beta 3", "old was made with --beta 0.2, not 3.0: leave it out"),
    ("--bias lenght=1", "--bias: a bias is length=X, position=X or phrase:WORDS=X, got 'lenght=1'"),
    ("--bias length=1,position=1", "--bias names 2 biases, one annotator each: raise --annotators"),
    ("--annotators 9 --pairs 8", "--annotators 9 cannot share 8 pairs: raise --pairs"),
    ("--data nothing.jsonl", "nothing.jsonl is not there"),
    # a config.json that is not what a run wrote
    ("--from damaged --out new", "damaged/config.json cannot be read: begin the run again with --overwrite, or"),
    ("--out changed", "changed/config.json was changed (--gamma must be between 0 and 1, got 1.1): begin")]


@pytest.mark.parametrize("flags, message", REFUSED, ids=[flags for flags, _ in REFUSED])
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tmp_path, capsys):
    """Bug: a traceback, a usage text, another exit status, an empty folder, or a run with settings that are guessed."""
    write_run(tmp_path / "old")
    write_run(tmp_path / "damaged", beta="lots")
    write_run(tmp_path / "changed", gamma=1.1)  # which is no option
    before = sorted(tmp_path.rglob("*"))
    assert minirlhf.main(flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"minirlhf: {message}") and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_the_last_value_that_is_allowed():
    """Bug: a check is off by one and refuses what works."""
    for flags in ("--beta 0", "--beta 1e-6", "--beta 10000", "--seed 0", "--response-tokens 48", "--response-tokens 1",
                  "--ppo-lr 1", "--policies reinforce++ --group 1", "--data my.jsonl --response-tokens 191",
                  f"--policies {','.join(POLICIES)}"):
        parse_command(flags.split())


def test_a_gpu_is_used_if_there_is_one(monkeypatch):
    """Bug: a GPU that is there is not used, or is used although the CPU was asked for."""
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert minirlhf.Run(".", Config()).device.type == ("cuda" if there else "cpu")
        assert minirlhf.Run(".", Config(), "cpu").device.type == "cpu"


def test_messages_name_options_that_exist():
    """Bug: advice names an option that the program does not have."""
    others = {ROOT / "mdp.py", ROOT / "estimators.py"}  # arrows, and a program with another option
    files = {*ROOT.glob("*.py"), *ROOT.glob("pipeline/*.py")} - others
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*(?![a-z-])", text))
    assert {"--group", "--ppo-iterations"} < named <= set(config.make_parser("")._option_string_actions)


# ---- the help ------------------------------------------------------------------------------------------------------

def test_the_help_shows_every_option(monkeypatch, capsys):
    """Bug: an option has no help, or another default."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        minirlhf.main(["--help"])
    text = re.sub(r"\n {10,}", "  ", capsys.readouterr().out)
    shown = dict(re.findall(r"^  (--[\w-]+)(?: [A-Z]\S*(?: \[.*\])?)? {2,}(\S.*)$", text, re.M))
    assert stop.value.code == 0
    for name in OPTIONS:
        default = FIELDS[name].default
        assert shown[flag(name)].endswith(f" ({default})" if default != "" else "")
    assert all(policy in shown["--policies"] for policy in POLICIES)
