"""The settings and the command line: every option, every error line, the help, and which source of a setting wins."""

import dataclasses
import json
import re

import pytest
import torch

import minirlhf
import world
from data import UserError
from pipeline import config, limits
from pipeline.config import Config, check, parse_config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
OPTIONS = [name for name, field in FIELDS.items() if field.metadata]
CONSTANTS = [name for name in FIELDS if name not in OPTIONS]

# each option with a value that is not its default: (text on the command line, value in Config)
VALUES = dict(
    seed=("7", 7), out=("here", "here"), device=("cpu", "cpu"), stages=("pretrain,sft", "pretrain,sft"),
    data=("pairs.jsonl", "pairs.jsonl"), prompt=("hello you", "hello you"), n_layer=("3", 3), n_head=("2", 2),
    n_embd=("64", 64), block_size=("80", 80), response_tokens=("32", 32), pretrain_steps=("5", 5), sft_steps=("6", 6),
    batch_size=("8", 8), pairs=("9", 9), label_temperature=("0", 0.0), flip=("0.25", 0.25), held_out=("hotel", "hotel"),
    reward_lr=("1e-4", 1e-4), beta=("0", 0.0), ppo_iterations=("3", 3), ppo_batch=("128", 128), minibatch=("16", 16),
    ppo_epochs=("4", 4), ppo_lr=("2e-5", 2e-5), critic_lr=("3e-5", 3e-5), gamma=("0.9", 0.9), lam=("0.5", 0.5),
    clip=("0.1", 0.1), dpo_beta=("0.1", 0.1), dpo_lr=("4e-5", 4e-5), dpo_kind=("ipo", "ipo"),
    label_smoothing=("0.1", 0.1), reward_from=("gold", "gold"), grpo_kind=("grpo", "grpo"), group=("8", 8),
    grpo_lr=("5e-5", 5e-5), grpo_kl=("loss", "loss"))

GROUPS = {  # the help, as a reader sees it
    "the run": "--seed --out --device --stages --quick --data --prompt --resume --overwrite",
    "network": "--n-layer --n-head --n-embd --block-size --response-tokens",
    "pretraining and SFT": "--pretrain-steps --sft-steps --batch-size",
    "preferences": "--pairs --label-temperature --flip --held-out",
    "reward model": "--reward-lr",
    "PPO": "--reward-from --beta --ppo-iterations --ppo-batch --minibatch --ppo-epochs --ppo-lr --critic-lr --gamma "
           "--lam --clip",
    "GRPO": "--grpo-kind --group --grpo-lr --grpo-kl",
    "DPO": "--dpo-beta --dpo-lr --dpo-kind --label-smoothing",
}


VIEW = ["--stages", "sample"]


def flag(name):
    return "--" + name.replace("_", "-")


def write_pairs(path, n=1):
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * n)


def write_run(folder, **settings):
    """A folder that holds nothing but the settings of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = dataclasses.asdict(Config(**settings))
    for name in config.COMMAND:
        del saved[name]
    (folder / "config.json").write_text(json.dumps(saved))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """No test here runs a stage: a mistake that is not noticed would start the default run."""
    def run_stages(run):
        raise AssertionError("the run has begun")

    monkeypatch.setattr(minirlhf, "run_stages", run_stages)
    monkeypatch.chdir(tmp_path)


# ---- options -------------------------------------------------------------------------------------------------------

def test_every_option_is_in_the_table():
    """A new option without a test."""
    assert set(VALUES) | {"quick", "resume", "overwrite"} == set(OPTIONS)


def with_grpo(name):
    """What an option of GRPO alone needs beside it, since the default run is without GRPO."""
    return ["--stages", ",".join(config.STAGES)] if name in ("grpo_kind", "group", "grpo_lr", "grpo_kl") else []


@pytest.mark.parametrize("name", VALUES)
def test_an_option_sets_its_field_and_no_other(name, tmp_path):
    """An option goes nowhere, to another field, or arrives as a text where a number is due."""
    text, value = VALUES[name]
    write_pairs(tmp_path / "pairs.jsonl")
    if name == "prompt":  # only a view of a run takes it
        write_run(tmp_path / "runs" / "default")
    with_it = VIEW if name == "prompt" else with_grpo(name)
    settings = dataclasses.asdict(parse_config([flag(name), text, *with_it]))
    expected = dataclasses.asdict(Config(out="runs/default", stages=with_it[1] if with_it else Config.stages))
    if name == "data":
        expected.update(block_size=192, response_tokens=64, ppo_iterations=40, ppo_batch=128, minibatch=32,
                        ppo_lr=2e-4, grpo_lr=2e-4, eval_prompts=200, out="runs/pairs")
    expected[name] = value
    assert settings == expected
    assert type(settings[name]) is FIELDS[name].type


def test_quick_sets_what_quick_says():
    """--quick changes nothing, or overrides an option that was given beside it."""
    changed = dict(n_embd=64, documents=4000, pretrain_steps=100, pretrain_lr=5e-3, demonstrations=1000, sft_steps=40,
                   pairs=400, ppo_iterations=8, ppo_batch=64, eval_prompts=64)
    expected = Config(quick=True, out="runs/quick", **changed)
    assert parse_config(["--quick"]) == expected
    assert parse_config(["--pairs", "7", "--quick"]) == dataclasses.replace(expected, pairs=7)


def test_own_data_gets_longer_texts(tmp_path):
    """The defaults of --data override an option that was given, or are lost beside --quick."""
    write_pairs(tmp_path / "pairs.jsonl")
    settings = parse_config("--data pairs.jsonl --quick --response-tokens 20".split())
    assert (settings.block_size, settings.response_tokens, settings.n_embd) == (192, 20, 64)


def test_the_defaults_are_a_run():
    """A default, or what --quick and --data set, does not pass the checks or is no field of Config."""
    check(Config())
    check(Config(**config.QUICK))
    check(Config(**config.WITH_DATA))
    assert Config().stages == ",".join(stage for stage in config.STAGES if stage != "grpo")


@pytest.mark.parametrize("flags, folder", [
    ("", "runs/default"), ("--quick", "runs/quick"), ("--data reviews.v1.jsonl", "runs/reviews.v1"),
    ("--data my/reviews.v2.jsonl --quick", "runs/reviews.v2"), ("--quick --out there", "there"),
    ("--data quick.jsonl", "runs/quick.jsonl"), ("--data default.jsonl", "runs/default.jsonl"),
    ("--data .jsonl", "runs/.jsonl"), ("--data ...jsonl", "runs/...jsonl"), ("--data .x.jsonl", "runs/.x.jsonl"),
    ("--data pairs", "runs/pairs")])
def test_the_folder_of_a_run(flags, folder, tmp_path):
    """Two kinds of run write into one folder, so that the second destroys the first; or a run leaves runs/."""
    (tmp_path / "my").mkdir()
    words = flags.split()
    if "--data" in words:
        write_pairs(tmp_path / words[words.index("--data") + 1])
    assert parse_config(words).out == folder


# ---- the settings that a run was made with -------------------------------------------------------------------------

def test_a_later_stage_keeps_the_settings_of_the_run(tmp_path):
    """A later stage runs with the defaults instead of the settings that the run was made with, constants too."""
    write_run(tmp_path / "run", seed=3, pairs=5, beta=0.7, quick=True, vocab_size=300, eval_prompts=9, best_of=3)
    settings = parse_config("--stages ppo,report --out run".split())
    expected = Config(seed=3, pairs=5, beta=0.7, quick=True, vocab_size=300, eval_prompts=9, best_of=3,
                      stages="ppo,report", out="run")
    assert settings == expected


def test_an_option_overrides_the_settings_of_the_run(tmp_path):
    """What was saved overrides what is typed now; or --quick overrides what was saved."""
    write_run(tmp_path / "run", quick=True, pairs=5, beta=0.7)
    settings = parse_config("--stages ppo --out run --beta 0.1 --quick".split())
    assert (settings.pairs, settings.beta, settings.quick) == (5, 0.1, True)


def test_a_new_run_forgets_the_old_one(tmp_path):
    """A run that begins with pretraining takes over the settings of another run in the same folder."""
    write_run(tmp_path / "run", pairs=5, n_layer=3)
    settings = parse_config("--stages pretrain,ppo --out run --beta 0.3".split())
    assert settings == Config(stages="pretrain,ppo", out="run", beta=0.3)


def test_a_default_folder_is_read_too(tmp_path):
    """The settings are read from the folder of --out only, so that `--quick --stages ppo` finds no run."""
    write_run(tmp_path / "runs" / "quick", pairs=11, quick=True)
    assert parse_config(["--quick", "--stages", "ppo"]).pairs == 11


def test_a_setting_of_another_version_is_left_out(tmp_path):
    """A run of an older version cannot be read any more, because it knows an option that is gone."""
    write_run(tmp_path / "run", pairs=5)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["grumpy"] = True
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert parse_config("--stages ppo --out run".split()).pairs == 5


@pytest.mark.parametrize("content", [
    "{", "3", "[1]", '"text"', "null", "\udcff", '{"beta": "lots"}', '{"pairs": null}', '{"pairs": 3.5}', '{"data": 1}',
    '{"quick": 1}', "[" * 100000])
def test_a_damaged_config_is_one_line(content, tmp_path, capsys):
    """A traceback when config.json is not what a run wrote."""
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert minirlhf.main(["--stages", "ppo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"minirlhf: {tmp_path}/config.json is damaged: begin the run anew with --stages pretrain\n"


def test_a_config_that_is_a_folder_is_one_line(tmp_path, capsys):
    """A traceback when config.json is a folder."""
    (tmp_path / "config.json").mkdir()
    assert minirlhf.main(["--stages", "ppo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("config.json is damaged: begin the run anew with --stages pretrain\n")


# ---- whose option it is --------------------------------------------------------------------------------------------

def test_every_setting_belongs_to_a_stage_or_to_the_command():
    """A new setting is never saved, or is saved by a stage that does not use it."""
    stages = [name for names in config.OWNED.values() for name in names]
    assert set(stages) | {"seed", *config.COMMAND} == set(FIELDS)
    assert not set(stages) & {"seed", *config.COMMAND} and set(config.OWNED) == set(config.STAGES)
    assert {name for name in stages if stages.count(name) > 1} == {"batch_size", *config.WITHIN_RL}


OF_A_STAGE = [(stage, name) for stage in config.STAGES for name in config.OWNED[stage] if name in VALUES]


@pytest.mark.parametrize("stage, name", OF_A_STAGE)
def test_an_option_of_a_stage_goes_with_that_stage_only(stage, name, tmp_path, capsys):
    """An option of a stage that is not run rewrites the settings that its network was trained with."""
    text, value = VALUES[name]
    write_pairs(tmp_path / "pairs.jsonl")
    write_run(tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = "report" if stage != "report" else "ppo"
    assert minirlhf.main(["--stages", other, flag(name), text, "--out", "run"]) == 2
    error = capsys.readouterr().err
    owner = "stages ppo, grpo" if name in config.WITHIN_RL else f"stage {stage}"
    if name == "batch_size":
        owner = "stages pretrain, sft, reward, dpo"
    assert error == f"minirlhf: {flag(name)} belongs to the {owner}, which this command does not run\n"
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    own = ["--stages", stage, flag(name), text, "--out", "run"]
    assert getattr(parse_config(own), name) == value
    write_run(tmp_path / "run", **{name: value})
    settings = parse_config(["--stages", other, flag(name), text, "--out", "run"])
    assert getattr(settings, name) == value  # it is so already


def test_the_seed_goes_with_every_stage(tmp_path):
    """A later stage cannot be run with another seed."""
    write_run(tmp_path / "run", seed=3)
    assert parse_config("--stages report --out run".split()).seed == 3
    assert parse_config("--stages report --out run --seed 4".split()).seed == 4


# ---- --resume ------------------------------------------------------------------------------------------------------

def write_plan(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    plan = {name: value for name, value in dataclasses.asdict(Config(**settings)).items() if name != "out"}
    (folder / "plan.json").write_text(json.dumps(dict(done=1, settings=plan)))


def test_resume_takes_the_settings_of_the_plan(tmp_path):
    """A command that goes on has other settings, other stages or another device than when it was interrupted."""
    write_plan(tmp_path / "run", pairs=5, stages="preferences,reward", beta=0.7, device="cpu")
    settings = parse_config("--resume --out run".split())
    assert settings == Config(pairs=5, stages="preferences,reward", beta=0.7, device="cpu", out="run", resume=True)
    write_plan(tmp_path / "runs" / "quick", quick=True, pairs=6)
    assert parse_config("--resume --quick --device cpu".split()).pairs == 6


@pytest.mark.parametrize("flags, message", [
    ("--resume --out nothing", "nothing to resume in nothing: no command was interrupted there"),
    ("--resume --out run --beta 0.1", "--beta goes without --resume"),
    ("--resume --out run --stages ppo", "--stages goes without --resume"),
    ("--resume --out run --overwrite", "--overwrite goes without --resume")])
def test_a_resume_that_cannot_be_is_one_line(flags, message, tmp_path, capsys):
    """A command that goes on is changed on the way, or a traceback where there is nothing to go on with."""
    write_plan(tmp_path / "run")
    assert minirlhf.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"minirlhf: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"done": 0, "settings": 3}', '{"settings": {"beta": "x"}}'])
def test_a_damaged_plan_is_one_line(content, tmp_path, capsys):
    """A traceback when plan.json is not what a run wrote."""
    (tmp_path / "plan.json").write_text(content)
    assert minirlhf.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "plan.json is damaged: begin the stages anew with --stages" in capsys.readouterr().err


# ---- error lines ---------------------------------------------------------------------------------------------------

NO_ROOM = "leaves no room for a prompt in --block-size"


def test_a_prompt_that_is_no_text(capsys):
    """Bytes of another encoding in a prompt are sampled from, as if they were text."""
    assert minirlhf.main(["--stages", "sample", "--prompt", "i saw \udcff\udcfe"]) == 2
    assert capsys.readouterr().err == "minirlhf: --prompt holds bytes that are no UTF-8 text: type it again\n"


@pytest.mark.parametrize("flags, message", [
    ("--betta 0.1", "unknown option --betta, did you mean --beta?"),
    ("--pair 3", "unknown option --pair, did you mean --pairs?"),  # an abbreviation breaks when an option is added
    ("--zzz", "unknown option --zzz, see --help"),
    ("--cuda-graphs", "unknown option --cuda-graphs"),
    ("word", "unrecognized arguments: word"),
    ("--beta", "argument --beta: expected one argument"),
    ("--beta lots", "argument --beta: invalid float value: 'lots'"),
    ("--pairs 1.5", "argument --pairs: invalid int value: '1.5'"),
    ("--seed -1", "--seed must be between 0 and 9,007,199,254,740,992, got -1"),
    ("--dpo-beta 0", "--dpo-beta must be between 0.0001 and 10,000, got 0.0"),
    ("--flip 1.5", "--flip must be between 0 and 1, got 1.5"),
    ("--lam 1.01", "--lam must be between 0 and 1, got 1.01"),
    ("--gamma 2", "--gamma must be between 0 and 1, got 2.0"),
    ("--n-embd 30 --n-head 4", "--n-embd 30 cannot be divided into --n-head 4 heads"),
    ("--response-tokens 64", f"--response-tokens 64 {NO_ROOM} 64"),
    ("--response-tokens 49", f"--response-tokens 49 {NO_ROOM} 64"),
    ("--data good.jsonl --response-tokens 192", f"--response-tokens 192 {NO_ROOM} 192"),
    ("--minibatch 257", "--minibatch 257 is larger than --ppo-batch 256"),
    ("--dpo-kind kto", "--dpo-kind must be one of dpo, ipo, slic, robust, got 'kto'"),
    ("--label-smoothing 0.5", "--label-smoothing must be below 0.5, got 0.5"),
    ("--label-smoothing 0.1 --dpo-kind ipo", "--label-smoothing belongs to --dpo-kind dpo and robust, got 'ipo'"),
    ("--label-smoothing 0.1 --dpo-kind slic", "--label-smoothing belongs to --dpo-kind dpo and robust, got 'slic'"),
    ("--held-out zoo", "--held-out must be one of film, restaurant, hotel, book, concert, got 'zoo'"),
    ("--device tpu", "--device is cpu, cuda or mps, got 'tpu'"),
    ("--device cpu:0", "--device is cpu, cuda or mps, got 'cpu:0'"),
    ("--stages pretrain,dance", "unknown stage 'dance' in --stages, choose from pretrain, sft, preferences, reward, "
                                "ppo, grpo, dpo, report, sample, trace"),
    ("--reward-from oracle", "--reward-from must be one of model, gold, got 'oracle'"),
    ("--data good.jsonl --reward-from gold",
     "--reward-from gold: the true reward is only known in the built-in world, without --data"),
    ("--stages pretrain,grpo --grpo-kind ppo",
     "--grpo-kind must be one of rloo, grpo, dr_grpo, reinforce++, got 'ppo'"),
    ("--stages pretrain,grpo --grpo-kl both", "--grpo-kl must be one of reward, loss, got 'both'"),
    ("--stages pretrain,grpo --group 1", "--group must be at least 2 for --grpo-kind rloo, got 1"),
    ("--stages pretrain,grpo --group 3", "--ppo-batch 256 cannot be divided into groups of --group 3"),
    ("--stages sample", "the stages sample and trace need a --prompt"),
    ("--stages trace", "the stages sample and trace need a --prompt"),
    ("--stages sample,ppo --prompt hello",
     "sample, trace and page look at a finished run: run them by themselves"),
    ("--stages sft,pretrain", "the stage pretrain begins a run anew: it comes first in --stages"),
    ("--stages pretrain --sft-steps 3", "--sft-steps belongs to the stage sft, which this command does not run"),
    ("--stages ppo", "runs/default holds no run: begin with --stages pretrain, or name another with --out"),
    ("--stages trace --prompt hello", "runs/default holds no run"),
    ("--prompt hello", "--prompt belongs to the stages sample and trace: leave it out, or name them with --stages"),
    ("--stages ppo,report --prompt hello --data good.jsonl", "runs/good holds no run"),
    *[(f"--data good.jsonl {words}", f"{words.split()[0]} belongs to the built-in world and has no effect beside --")
      for words in ("--flip 0.1", "--flip 0", "--pairs 4000", "--label-temperature 0.3", "--held-out film")],
    ("--beta 1e-9", "--beta is 0, or at least 1e-06, got 1e-09"),
    ("--response-tokens 3", "--response-tokens must be at least 4, which the shortest clause has, got 3"),
    ("--batch-size 1000000", "this takes about"), ("--n-embd 100000", "this takes about"),
    ("--n-layer 1000000", "this takes about"), ("--block-size 1000000", "this takes about"),
    ("--ppo-batch 10000000", "this takes about"), ("--pairs 10000000", "this takes about"),
    ("--minibatch 10000000 --ppo-batch 10000000", "this takes about"),
    ("--data nowhere.jsonl", "nowhere.jsonl: cannot be read (No such file or directory)"),
    ("--data broken.jsonl", 'broken.jsonl, line 2: the key "rejected" is missing'),
])
def test_a_mistake_is_one_line(flags, message, tmp_path, capsys):
    """A user's mistake ends in a traceback, in a wrong exit status, or after minutes of work."""
    write_pairs(tmp_path / "good.jsonl")
    good_line = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "broken.jsonl").write_text(good_line + '{"prompt": "a", "chosen": "b"}\n')
    before = sorted(tmp_path.iterdir())
    assert minirlhf.main(flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"minirlhf: {message}") and captured.err.count("\n") == 1
    assert captured.out == "" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [name for name in OPTIONS if FIELDS[name].type is int])
def test_a_count_has_limits(name):
    """A count of 0, or of billions, ends in a traceback somewhere in the middle of the run, or never."""
    least, most = limits.limits(FIELDS[name])
    assert least == dict(seed=0, n_embd=2).get(name, 1) and most <= (2 ** 53 if name == "seed" else 10 ** 7)
    for value in (least - 1, most + 1, 10 ** 100):
        message = f"{flag(name)} must be between {least} and {most:,}, got {value}"
        with pytest.raises(UserError, match=re.escape(message)):
            parse_config([flag(name), str(value), *with_grpo(name)])


@pytest.mark.parametrize("name", [name for name in OPTIONS if FIELDS[name].type is float])
@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "1e300"])
def test_a_number_has_limits(name, text):
    """A rate of NaN, or a negative or a huge one, destroys a network without a word."""
    with pytest.raises(UserError, match=f"^{flag(name)} must be between .*, got {re.escape(str(float(text)))}$"):
        parse_config([flag(name), text, *with_grpo(name)])


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=0.0), "--temperature must be between 0.1"),
    (dict(value_clip=0.0), "--value-clip must be between 1e-06"),
    (dict(documents=0), "--documents must be between 1"),
    (dict(pretrain_lr=0.0), "--pretrain-lr must be between 1e-30"),
    (dict(eval_prompts=0), "--eval-prompts must be between 1"), (dict(best_of=0), "--best-of must be between 1"),
    (dict(eval_prompts=8001), "--eval-prompts must be at most 8,000")])
def test_constants_are_checked_too(settings, message):
    """A study sets a constant to what cannot work, and nobody notices."""
    with pytest.raises(UserError, match=message):
        check(Config(**settings))


@pytest.mark.parametrize("flags", [
    "--flip 1", "--flip 0", "--lam 0", "--lam 1", "--gamma 0", "--beta 0", "--clip 0", "--seed 0", "--minibatch 256",
    "--response-tokens 48", "--label-smoothing 0.49", "--label-smoothing 0.1 --dpo-kind robust", "--held-out film",
    "--label-temperature 0", "--data good.jsonl --response-tokens 191", "--response-tokens 4",
    "--seed 9007199254740992", "--n-embd 2 --n-head 1",
    "--ppo-lr 1", "--ppo-lr 1e-30", "--beta 1e-6", "--beta 10000", "--dpo-beta 0.0001",
    "--dpo-beta 10000", "--label-temperature 1e6", "--clip 1000", "--pretrain-steps 10000000"])
def test_the_last_value_that_is_allowed(flags, tmp_path):
    """A check is off by one and refuses what works."""
    write_pairs(tmp_path / "good.jsonl")
    parse_config(flags.split())


def test_own_data_of_a_saved_run_has_no_world_either(tmp_path):
    """A later stage of a run on own data takes --flip and does nothing with it."""
    write_pairs(tmp_path / "pairs.jsonl")
    write_run(tmp_path / "run", data="pairs.jsonl", **config.WITH_DATA)
    with pytest.raises(UserError, match="--flip belongs to the built-in world"):
        parse_config("--stages preferences --out run --flip 0.1".split())
    assert parse_config("--stages preferences --out run".split()).pairs == Config.pairs


def test_memory_is_that_of_the_machine(monkeypatch):
    """What fits one machine is refused on it, or what fits none is tried; or a machine that cannot be asked fails."""
    need = limits.bytes_needed(Config())
    assert 1e8 < need < 2e9  # the default run has been seen to take under 1 GB
    monkeypatch.setattr(limits.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, need // 4096 + 1))
    check(Config())
    with pytest.raises(UserError, match="about .* GiB of memory of .*: lower --n-embd"):
        check(Config(n_embd=256))
    monkeypatch.delattr(limits.os, "sysconf")
    check(Config(n_embd=256))


def test_a_missing_device_is_one_line(monkeypatch, capsys):
    """A GPU that is not there ends in a traceback out of torch, or the run goes on without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, name in (("cuda", "CUDA"), ("mps", "MPS"), ("cuda:1", "CUDA")):
        assert minirlhf.main(["--device", device]) == 2
        expected = f"minirlhf: --device {name.lower()}: this machine, or this torch, has no {name}\n"
        assert capsys.readouterr().err == expected


def test_a_device_that_is_there_is_taken(monkeypatch):
    """The check of the device refuses one that exists."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for device in ("cuda", "cuda:1", "mps"):
        assert parse_config(["--device", device]).device == device


def test_groups_matter_to_grpo_only():
    """A batch of PPO has to be a multiple of a group that it does not have, or REINFORCE++ has to have groups."""
    assert parse_config(["--ppo-batch", "257"]).ppo_batch == 257
    assert parse_config("--stages pretrain,grpo --group 1 --grpo-kind reinforce++".split()).group == 1


# ---- the help ------------------------------------------------------------------------------------------------------

@pytest.fixture
def help_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        minirlhf.main(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_help_is_grouped_by_stage(help_text):
    """An option stands in a group where nobody looks for it, or in none."""
    found = {}
    for line in help_text.splitlines():
        title = re.fullmatch(r"(\w.*):", line)
        if title:
            found[title[1]] = []
            options = found[title[1]]
        name = re.match(r"  (--[\w-]+)", line)
        if name:
            options.append(name[1])
    assert {group: " ".join(found[group]) for group in GROUPS} == GROUPS


def test_every_option_has_a_help_and_a_metavar_that_means_something(help_text):
    """An option has no help, does not show its default, or has a metavar cut out of its name, like '--best-of OF'."""
    metavars = ("N FOLDER DEVICE A,B,... FILE TEXT TOKENS STEPS ROWS PAIRS T SHARE SUBJECT LR BETA GAMMA LAMBDA CLIP "
                "LOSS SOURCE KIND G PLACE").split()
    one_line_each = re.sub(r"\n {10,}", "  ", help_text)
    for name in OPTIONS:
        match = re.search(rf"^  {flag(name)}( \S+)?  +(\S.*)$", one_line_each, re.MULTILINE)
        metavar, text = match[1], match[2]
        assert FIELDS[name].metadata["help"] in text
        if FIELDS[name].type is bool:
            assert metavar is None
        else:
            assert metavar.strip() in metavars
        if FIELDS[name].type is not bool and FIELDS[name].default != "":
            assert text.endswith(f" ({FIELDS[name].default})")
        else:
            assert text == FIELDS[name].metadata["help"]


def test_constants_are_no_options(help_text):
    """The command line grows back to options that nobody needs."""
    assert len(OPTIONS) == 41 and len(CONSTANTS) == 15
    for name in CONSTANTS:
        assert flag(name) + " " not in help_text
        with pytest.raises(UserError, match=f"unknown option {flag(name)}"):
            parse_config([flag(name), "1"])


def test_the_help_begins_with_the_commands_and_the_reading_order(help_text):
    """The help does not say what the program is."""
    assert help_text.startswith("usage: minirlhf.py [-h] [--seed N] [--out FOLDER]")
    text = " ".join(help_text.split())
    assert "python minirlhf.py --quick" in text and "Read in this order: data.py, model.py" in text
    assert "price of a nat of KL" in text


def test_a_held_out_subject_is_a_subject_of_the_world():
    """The help names other subjects than the world has."""
    words = re.findall(r"\w+", FIELDS["held_out"].metadata["help"].split(":")[0])
    assert set(words) - {"or"} == set(world.ASPECTS)
