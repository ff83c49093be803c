"""
The settings of a run, and the command line that changes them.

`Config` holds the settings of the reference run, once. Fields made by `option` are options of the command line; the
others are constants.
"""

import argparse
import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from data import UserError
from pipeline.limits import check, flag, need

STAGES = ("pretrain", "sft", "preferences", "reward", "ppo", "grpo", "dpo", "report")
DEFAULT_STAGES = tuple(stage for stage in STAGES if stage != "grpo")
VIEWS = ("sample", "trace", "page")  # stages that only look at a finished run
PROMPTED = ("sample", "trace")


def option(default, metavar, help):
    return dataclasses.field(default=default, metadata=dict(metavar=metavar, help=help))


@dataclass
class Config:
    # the run
    seed: int = option(0, "N", "every random number of the stages that run; the split is fixed by pretraining")
    out: str = option("", "FOLDER", "where the run is written; runs/default, or runs/ and the name of the data file")
    device: str = option("", "DEVICE", "cpu, cuda or mps (untested); by default cuda if there is one, else cpu")
    stages: str = option(",".join(DEFAULT_STAGES), "A,B,...", "stages in this order; also grpo, sample, trace, page")
    quick: bool = option(False, None, "a small network and few steps: the whole pipeline in half a minute")
    data: str = option("", "FILE", "your preference pairs, .jsonl or .jsonl.gz, instead of the built-in world")
    prompt: str = option("", "TEXT", "the prompt for the stages sample and trace")
    resume: bool = option(False, None, "go on with the command that was interrupted in the folder")
    overwrite: bool = option(False, None, "begin a finished run anew: what it left is removed")
    # network
    n_layer: int = option(2, "N", "blocks")
    n_head: int = option(4, "N", "attention heads of a block")
    n_embd: int = option(128, "N", "width")
    block_size: int = option(64, "TOKENS", "most tokens of prompt and response together; 192 with --data")
    response_tokens: int = option(48, "TOKENS", "most tokens of a response; 64 with --data")
    vocab_size: int = 2048  # most pieces that the tokenizer knows beside the 256 bytes
    temperature: float = 1.0  # of sampling, and of the log-probs and the KL of PPO and the report
    # pretraining and SFT
    pretrain_steps: int = option(360, "STEPS", "steps of pretraining")
    sft_steps: int = option(250, "STEPS", "steps of supervised fine-tuning")
    batch_size: int = option(32, "ROWS", "texts, or pairs of the reward model and DPO, in a step")
    documents: int = 16000  # texts to pretrain on
    pretrain_lr: float = 3e-3  # highest learning rate
    demonstrations: int = 4000  # reviews to imitate
    sft_lr: float = 2e-3  # highest learning rate
    # preferences
    pairs: int = option(4000, "PAIRS", "preference pairs to label")
    label_temperature: float = option(0.3, "T", "noise of the labels, sigmoid(gold difference / T); 0 is none")
    flip: float = option(0.0, "SHARE", "share of the labels that is flipped at random")
    held_out: str = option("", "SUBJECT", "film, restaurant, hotel, book or concert: only evaluation sees it")
    # reward model
    reward_lr: float = option(1e-3, "LR", "learning rate of the reward model")
    reward_epochs: int = 2  # passes over the pairs
    weight_decay: float = 0.1  # the width of the prior on the parameters: larger is narrower
    # PPO
    reward_from: str = option("model", "SOURCE", "what PPO and GRPO maximise: model, or gold, the true reward")
    beta: float = option(0.2, "BETA", "price of a nat of KL, in standard deviations of the score; of the objective too")
    ppo_iterations: int = option(60, "N", "rollouts; 40 with --data")
    ppo_batch: int = option(256, "ROWS", "episodes of a rollout; 128 with --data")
    minibatch: int = option(64, "ROWS", "episodes of an update; 32 with --data")
    ppo_epochs: int = option(2, "N", "passes over a rollout")
    ppo_lr: float = option(5e-4, "LR", "learning rate of the policy; 2e-4 with --data")
    critic_lr: float = option(1e-3, "LR", "learning rate of the critic")
    gamma: float = option(1.0, "GAMMA", "discount; 1, because an episode is short")
    lam: float = option(0.95, "LAMBDA", "GAE: 0 has the most bias, 1 the most variance")
    clip: float = option(0.2, "CLIP", "how far the ratio is rewarded for moving away from 1")
    value_clip: float = 0.2  # how far a value may move in an iteration, in standard deviations of the score
    # GRPO: the rest as in PPO
    grpo_kind: str = option("rloo", "KIND", "advantage of a response in its group: rloo, grpo, dr_grpo or reinforce++")
    group: int = option(4, "G", "responses to a prompt")
    grpo_lr: float = option(5e-4, "LR", "learning rate of the policy; 2e-4 with --data")
    grpo_kl: str = option("reward", "PLACE", "where the KL is paid: reward, or loss (the k3 of GRPO's paper)")
    grpo_mean: str = ""  # of token losses: response, token or constant; "" is that of the kind's paper
    grpo_ratio: str = "token"  # pi/pi_old: token, gspo (of a response) or cispo (a clipped weight)
    grpo_clip_high: float = 0.2  # upper clip, beside the lower --clip; DAPO has 0.28
    # DPO
    dpo_beta: float = option(0.5, "BETA", "beta of DPO, in the units of the labels and not of the score")
    dpo_lr: float = option(2e-4, "LR", "highest learning rate of DPO")
    dpo_kind: str = option("dpo", "LOSS", "dpo, ipo, slic or robust")
    label_smoothing: float = option(0.0, "SHARE", "share of wrong labels that dpo and robust assume")
    dpo_epochs: int = 2  # passes over the pairs
    # report
    eval_prompts: int = 512  # held-out prompts
    best_of: int = 16  # n of best-of-n


QUICK = dict(n_embd=64, documents=4000, pretrain_steps=100, pretrain_lr=5e-3, demonstrations=1000, sft_steps=40,
             pairs=400, ppo_iterations=8, ppo_batch=64, eval_prompts=64)
# rows of own data are long: fewer of them, so that a few thousand pairs take a quarter of an hour and not an hour; and
# smaller steps, because the advantages of a smaller rollout over a larger vocabulary are noisier
WITH_DATA = dict(block_size=192, response_tokens=64, ppo_iterations=40, ppo_batch=128, minibatch=32, ppo_lr=2e-4,
                 grpo_lr=2e-4, eval_prompts=200)
WORLD = ("pairs", "label_temperature", "flip", "held_out")  # options of the built-in world, without effect on own data

# The stage that a setting belongs to. A setting of the run is replaced when its stage has finished with another value.
# What several stages use belongs to the first of them, but for the batch size and what PPO and GRPO share.
WITHIN_RL = "reward_from beta ppo_iterations ppo_batch minibatch ppo_epochs clip".split()
OWNED = dict(
    pretrain="quick data n_layer n_head n_embd block_size vocab_size pretrain_steps batch_size documents pretrain_lr "
             "held_out".split(),
    sft="response_tokens sft_steps batch_size demonstrations sft_lr".split(),
    preferences="temperature pairs label_temperature flip".split(),
    reward="batch_size reward_lr reward_epochs weight_decay".split(),
    ppo=[*WITHIN_RL, *"ppo_lr critic_lr gamma lam value_clip".split()],
    grpo=[*WITHIN_RL, *"grpo_kind group grpo_lr grpo_kl grpo_mean grpo_ratio grpo_clip_high".split()],
    dpo="batch_size dpo_beta dpo_lr dpo_kind label_smoothing dpo_epochs".split(),
    report="eval_prompts best_of".split())
COMMAND = ("out", "device", "stages", "prompt", "resume", "overwrite")  # of the command alone, and not of the run


# ---- the command line -----------------------------------------------------------------------------

GROUPS = {"seed": "the run", "n_layer": "network", "pretrain_steps": "pretraining and SFT", "pairs": "preferences",
          "reward_lr": "reward model", "reward_from": "PPO", "grpo_kind": "GRPO",
          "dpo_beta": "DPO"}  # the first option of each group in --help


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with a suggestion for a misspelt option."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            message = f"unknown option {unknown[1]}, {hint}"
        raise UserError(message)


def make_parser(about):
    parser = OneLineParser(prog="minirlhf.py", description=about, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        if not field.metadata:
            continue
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        help, metavar = field.metadata["help"], field.metadata["metavar"]
        if field.type is bool:
            group.add_argument(flag(field.name), action="store_true", help=help)
        else:
            default = "" if field.default == "" else f" ({field.default})"
            group.add_argument(flag(field.name), type=field.type, metavar=metavar, help=help + default)
    return parser


def parse_config(argv=None, about=None):
    """
    Read the command line into a checked Config. Raises UserError.

    A later source overrides an earlier one: the defaults; those of --data and --quick; for a command without the
    stage pretrain, the settings that the run was made with; the options given.
    """
    given = vars(make_parser(about).parse_args(argv))
    folder = given.get("out") or default_folder(given)
    if given.get("resume"):
        return resumed_config(folder, given)
    stages = given.get("stages", Config.stages).split(",")
    check_stages(stages, given.get("prompt"))
    saved = {} if "pretrain" in stages else read_saved(folder)
    if saved.get("data") and given.get("data") and Path(saved["data"]).resolve() == Path(given["data"]).resolve():
        given["data"] = saved["data"]
    for name, value in given.items():
        owners = [stage for stage, names in OWNED.items() if name in names]
        if not owners or set(owners) & set(stages) or (saved and saved[name] == value):
            continue
        stage = f"stage {owners[0]}" if len(owners) == 1 else f"stages {', '.join(owners)}"
        raise UserError(f"{flag(name)} belongs to the {stage}, which this command does not run")
    config = Config(**{**first_settings(given), **saved, **given, "out": folder})
    check_given(config, given)
    check(config)
    return config


def first_settings(given):
    """The settings that a run begins with: the defaults, those of --data and those of --quick."""
    settings = dataclasses.asdict(Config())
    if given.get("data"):
        settings.update(WITH_DATA)
    if given.get("quick"):
        settings.update(QUICK)
    return {name: value for name, value in settings.items() if name not in COMMAND}


def resumed_config(folder, given):
    """The settings of the command that was interrupted in a folder, as its plan has them."""
    others = sorted(set(given) - {"resume", "out", "quick", "data", "device"})
    need(not others, f"{flag(others[0]) if others else ''} goes without --resume, which keeps the settings of the "
                     "interrupted command")
    damaged = f"{folder}/plan.json is damaged: begin the stages anew with --stages"
    nothing = f"nothing to resume in {folder}: no command was interrupted there"
    plan = read_json(Path(folder, "plan.json"), nothing, damaged)
    settings = typed(plan.get("settings"), dataclasses.asdict(Config()), damaged)
    settings.update(out=folder, resume=True)
    if "device" in given:
        settings["device"] = given["device"]
    config = Config(**settings)
    check(config)
    return config


RESERVED = ("", "default", "quick", "studies", "race")  # folders of runs/ that are no user's data


def default_folder(given):
    """runs/default, runs/quick, or runs/ and the name of the data file without its .jsonl or .jsonl.gz."""
    if not given.get("data"):
        return "runs/quick" if given.get("quick") else "runs/default"
    name = Path(given["data"]).name
    stem = re.sub(r"\.jsonl(\.gz)?$", "", name)
    return str(Path("runs", name if stem in RESERVED or stem.startswith(".") else stem))


def read_json(path, missing, damaged):
    """The dict in a JSON file. UserError says `missing` or `damaged`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (OSError, ValueError, RecursionError):
        raise UserError(damaged) from None
    need(isinstance(content, dict), damaged)
    return content


def read_saved(folder):
    """The settings that the run in a folder was made with, by name."""
    damaged = f"{folder}/config.json is damaged: begin the run anew with --stages pretrain"
    saved = read_json(Path(folder, "config.json"), f"{folder} holds no run: begin with --stages pretrain, or name "
                      "another with --out", damaged)
    return typed(saved, first_settings(saved), damaged)


def typed(saved, defaults, damaged):
    """The saved settings, with defaults for those that are not there. UserError for one of another type."""
    need(isinstance(saved, dict), damaged)
    settings = {}
    for name, default in defaults.items():
        value = saved.get(name, default)
        need(type(value) is type(default) or type(value) is int and type(default) is float, damaged)
        settings[name] = type(default)(value)
    return settings


# ---- checks ---------------------------------------------------------------------------------------

def check_stages(stages, prompt):
    """Raise UserError unless these stages can be run together."""
    for stage in stages:
        need(stage in STAGES + VIEWS, f"unknown stage {stage!r} in --stages, choose from {', '.join(STAGES + VIEWS)}")
    need("pretrain" not in stages[1:], "the stage pretrain begins a run anew: it comes first in --stages")
    views = [stage for stage in stages if stage in VIEWS]
    need(not views or views == stages, "sample, trace and page look at a finished run: run them by themselves")
    need(prompt or not set(PROMPTED) & set(stages), "the stages sample and trace need a --prompt")
    need(not re.search("[\ud800-\udfff]", prompt or ""), "--prompt holds bytes that are no UTF-8 text: type it again")


def check_given(config, given):
    """Raise UserError for options that were given and have no effect."""
    for name in WORLD:
        need(not config.data or name not in given,
             f"{flag(name)} belongs to the built-in world and has no effect beside --data: leave it out")
    need("prompt" not in given or set(PROMPTED) & set(config.stages.split(",")),
         "--prompt belongs to the stages sample and trace: leave it out, or name them with --stages")
