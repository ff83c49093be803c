"""
The settings of a run, and the command line that changes them.

`Config` holds the settings of the reference run, once. Fields made by `option` are options of the command line; the
others are constants.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import world
from data import UserError, read_pairs
from dpo import LOSSES, SMOOTHED
from grpo import KINDS

STAGES = ("pretrain", "sft", "preferences", "reward", "ppo", "grpo", "dpo", "report")
DEFAULT_STAGES = tuple(stage for stage in STAGES if stage != "grpo")
VIEWS = ("sample", "trace")  # stages that only look at a finished run


def option(default, metavar, help):
    return dataclasses.field(default=default, metadata=dict(metavar=metavar, help=help))


@dataclass
class Config:
    # the run
    seed: int = option(0, "N", "every random number follows from it")
    out: str = option("", "FOLDER", "where the run is written; runs/default, or runs/ and the name of the data file")
    device: str = option("", "DEVICE", "cpu, cuda or mps (untested); by default cuda if there is one, else cpu")
    stages: str = option(",".join(DEFAULT_STAGES), "A,B,...", "stages to run, in this order; grpo, sample, trace too")
    quick: bool = option(False, None, "a small network and few steps: the whole pipeline in half a minute")
    data: str = option("", "FILE", "your preference pairs, .jsonl or .jsonl.gz, instead of the built-in world")
    prompt: str = option("", "TEXT", "the prompt for the stages sample and trace")
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
    ppo_iterations: int = option(60, "N", "rollouts")
    ppo_batch: int = option(256, "ROWS", "episodes of a rollout")
    minibatch: int = option(64, "ROWS", "episodes of an update")
    ppo_epochs: int = option(2, "N", "passes over a rollout")
    ppo_lr: float = option(5e-4, "LR", "learning rate of the policy")
    critic_lr: float = option(1e-3, "LR", "learning rate of the critic")
    gamma: float = option(1.0, "GAMMA", "discount; 1, because an episode is short")
    lam: float = option(0.95, "LAMBDA", "GAE: 0 has the most bias, 1 the most variance")
    clip: float = option(0.2, "CLIP", "how far the ratio is rewarded for moving away from 1")
    value_clip: float = 0.2  # how far a value may move in an iteration, in standard deviations of the score
    # GRPO: the rest as in PPO
    grpo_kind: str = option("rloo", "KIND", "advantage of a response in its group: rloo, grpo, dr_grpo or reinforce++")
    group: int = option(4, "G", "responses to a prompt")
    grpo_lr: float = option(5e-4, "LR", "learning rate of the policy")
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
WITH_DATA = dict(block_size=192, response_tokens=64)
FIXED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "data")  # fixed by pretraining


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


def flag(name):
    return "--" + name.replace("_", "-")


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
    stages = given.get("stages", Config.stages).split(",")
    check_stages(stages, given.get("prompt"))
    saved = {} if "pretrain" in stages else read_saved(folder)
    options = {**saved, **given, "out": folder}
    defaults = {}
    if options.get("data"):
        defaults.update(WITH_DATA)
    if options.get("quick"):
        defaults.update(QUICK)
    config = Config(**{**defaults, **options})
    check(config)
    for name in FIXED:
        if name in saved and saved[name] != getattr(config, name):
            raise UserError(f"{flag(name)} is {saved[name]!r} in the run in {folder}: "
                            "begin anew with --stages pretrain to change it")
    return config


def default_folder(given):
    if given.get("data"):
        return str(Path("runs", Path(given["data"]).name.split(".")[0]))
    return "runs/quick" if given.get("quick") else "runs/default"


def read_saved(folder):
    """The settings that the run in a folder was made with, by name."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    try:
        saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return {name: types[name](value) for name, value in saved.items() if name in types}
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: begin with --stages pretrain, or name another with --out") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{folder}/config.json is damaged: begin the run anew with --stages pretrain") from None


# ---- checks ---------------------------------------------------------------------------------------

def need(condition, message):
    if not condition:
        raise UserError(message)


def check_stages(stages, prompt):
    """Raise UserError unless these stages can be run together."""
    for stage in stages:
        need(stage in STAGES + VIEWS, f"unknown stage {stage!r} in --stages, choose from {', '.join(STAGES + VIEWS)}")
    views = [stage for stage in stages if stage in VIEWS]
    need(not views or views == stages, "the stages sample and trace look at a finished run: run them by themselves")
    need(not views or prompt, "the stages sample and trace need a --prompt")


def check(config):
    """Raise UserError for settings that cannot work."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            least = 0 if field.name == "seed" else 1
            need(value >= least, f"{flag(field.name)} is at least {least}, got {value}")
        if field.type is float:
            need(math.isfinite(value) and value >= 0, f"{flag(field.name)} is a number and not negative, got {value}")
    for name in ("dpo_beta", "temperature", "value_clip"):
        need(getattr(config, name) > 0, f"{flag(name)} is above 0, got {getattr(config, name)}")
    for name in ("flip", "lam", "gamma"):
        need(getattr(config, name) <= 1, f"{flag(name)} is between 0 and 1, got {getattr(config, name)}")
    need(config.n_embd % config.n_head == 0,
         f"--n-embd {config.n_embd} cannot be divided into --n-head {config.n_head} heads")
    longest_prompt = config.block_size - config.response_tokens
    need(longest_prompt >= (1 if config.data else 16),  # the built-in world's prompts have up to 16 tokens
         f"--response-tokens {config.response_tokens} leaves no room for a prompt in --block-size {config.block_size}")
    need(config.minibatch <= config.ppo_batch,
         f"--minibatch {config.minibatch} is larger than --ppo-batch {config.ppo_batch}")
    for name, choices in (("reward_from", ("model", "gold")), ("grpo_kind", KINDS), ("grpo_kl", ("reward", "loss"))):
        value = getattr(config, name)
        need(value in choices, f"{flag(name)} is one of {', '.join(choices)}, got {value!r}")
    need(not config.data or config.reward_from == "model",
         "--reward-from gold: the true reward is only known in the built-in world, without --data")
    if "grpo" in config.stages.split(","):
        need(config.group > 1 or config.grpo_kind == "reinforce++",
             f"--group is at least 2 for --grpo-kind {config.grpo_kind}, got {config.group}")
        need(config.ppo_batch % config.group == 0,
             f"--ppo-batch {config.ppo_batch} cannot be divided into groups of --group {config.group}")
    need(config.dpo_kind in LOSSES, f"--dpo-kind is one of {', '.join(LOSSES)}, got {config.dpo_kind!r}")
    need(config.label_smoothing < 0.5, f"--label-smoothing is below 0.5, got {config.label_smoothing}")
    need(config.label_smoothing == 0 or config.dpo_kind in SMOOTHED,
         f"--label-smoothing belongs to --dpo-kind {' and '.join(SMOOTHED)}, got {config.dpo_kind!r}")
    subjects = ", ".join(world.ASPECTS)
    need(config.held_out in ("", *world.ASPECTS), f"--held-out is one of {subjects}, got {config.held_out!r}")
    kind = config.device.split(":")[0]
    known = kind in ("", "cuda") or config.device in ("cpu", "mps")
    need(known, f"--device is cpu, cuda or mps, got {config.device!r}")
    need(kind != "cuda" or torch.cuda.is_available(), "--device cuda: this machine, or this torch, has no CUDA")
    need(kind != "mps" or torch.backends.mps.is_available(), "--device mps: this machine, or this torch, has no MPS")
    if config.data:
        read_pairs(config.data)  # a broken file is found before any work
