"""
The settings of a run, and the command line that changes them.

`Config` holds the settings of the reference run, once. Fields made by `option` are options of the command line; the
others are constants.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import world
from data import UserError, read_pairs
from dpo import LOSSES, SMOOTHED

STAGES = ("pretrain", "sft", "preferences", "reward", "ppo", "dpo", "report")
VIEWS = ("sample", "trace")  # stages that only look at a finished run


def option(default, metavar, help):
    return dataclasses.field(default=default, metadata=dict(metavar=metavar, help=help))


@dataclass
class Config:
    # the run
    seed: int = option(0, "N", "every random number follows from it")
    out: str = option("", "FOLDER", "where the run is written; runs/default, or runs/ and the name of the data file")
    device: str = option("", "DEVICE", "cpu, cuda or mps (untested); by default cuda if there is one, else cpu")
    stages: str = option(",".join(STAGES), "A,B,...", "which stages to run, in this order; or sample, or trace")
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
    beta: float = option(0.2, "BETA", "price of a nat of KL, in standard deviations of the score; of the objective too")
    ppo_iterations: int = option(60, "N", "rollouts; 40 with --data")
    ppo_batch: int = option(256, "ROWS", "episodes of a rollout; 128 with --data")
    minibatch: int = option(64, "ROWS", "episodes of an update; 32 with --data")
    ppo_epochs: int = option(2, "N", "passes over a rollout")
    ppo_lr: float = option(5e-4, "LR", "learning rate of the policy")
    critic_lr: float = option(1e-3, "LR", "learning rate of the critic")
    gamma: float = option(1.0, "GAMMA", "discount; 1, because an episode is short")
    lam: float = option(0.95, "LAMBDA", "GAE: 0 has the most bias, 1 the most variance")
    clip: float = option(0.2, "CLIP", "how far the ratio is rewarded for moving away from 1")
    value_clip: float = 0.2  # how far a value may move in an iteration, in standard deviations of the score
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
# rows of own data are long: fewer of them, so that a few thousand pairs take a quarter of an hour and not an hour
WITH_DATA = dict(block_size=192, response_tokens=64, ppo_iterations=40, ppo_batch=128, minibatch=32, eval_prompts=200)
WORLD = ("pairs", "label_temperature", "flip", "held_out")  # options of the built-in world, without effect on own data
FIXED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "data")  # fixed by pretraining


# ---- the command line -----------------------------------------------------------------------------

GROUPS = {"seed": "the run", "n_layer": "network", "pretrain_steps": "pretraining and SFT", "pairs": "preferences",
          "reward_lr": "reward model", "beta": "PPO", "dpo_beta": "DPO"}  # the first option of each group in --help


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
    check_given(config, given)
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


def check_given(config, given):
    """Raise UserError for options that were given and have no effect."""
    for name in WORLD:
        need(not config.data or name not in given,
             f"{flag(name)} belongs to the built-in world and has no effect beside --data: leave it out")
    need("prompt" not in given or config.stages.split(",")[0] in VIEWS,
         "--prompt belongs to the stages sample and trace: leave it out, or name them with --stages")


# (least, most) of a number. What is not here: 1 to 10,000,000 of a count, 0 to 1,000,000 of another number, and up to
# 1 of a learning rate. Within these limits nothing overflows, and no rounding is mistaken for a fault.
LIMITS = dict(seed=(0, 2 ** 53), n_embd=(2, 10 ** 5),  # a width of 1 is always 0 after a LayerNorm
              temperature=(0.1, 10), flip=(0, 1), gamma=(0, 1), lam=(0, 1), beta=(0, 10 ** 4), clip=(0, 1000),
              ppo_epochs=(1, 1000), reward_epochs=(1, 1000), dpo_epochs=(1, 1000),
              value_clip=(1e-6, 10 ** 4), weight_decay=(0, 100), dpo_beta=(1e-4, 10 ** 4))


def limits(field):
    usual = (1, 10 ** 7) if field.type is int else (1e-30, 1) if field.name.endswith("_lr") else (0, 10 ** 6)
    return LIMITS.get(field.name, usual)


def bytes_needed(config):
    """About how much memory the largest stage takes: networks, a step with its graph, a rollout, and lists of ids."""
    C, T, V = config.n_embd, config.block_size, config.vocab_size + 258
    weights = (V + T) * C + 12 * config.n_layer * C * C
    rows = max(2 * config.batch_size, config.minibatch)  # of a step; a pair has two
    step = rows * T * (20 * config.n_layer * C + 3 * V + T)
    cache = max(256, config.ppo_batch) * T * 2 * config.n_layer * C
    texts = 2 * config.pairs + config.ppo_batch + config.eval_prompts * (config.best_of + 4) + config.documents
    return 4 * (10 * weights + step + cache) + 50 * texts * T  # 10: four networks, and two with gradients and Adam


def check(config):
    """Raise UserError for settings that cannot work."""
    for field in dataclasses.fields(config):
        if field.type in (int, float):
            value, (least, most) = getattr(config, field.name), limits(field)
            need(least <= value <= most, f"{flag(field.name)} is between {least:,} and {most:,}, got {value}")
    need(config.beta == 0 or config.beta >= 1e-6, f"--beta is 0, or at least 1e-06, got {config.beta}")
    need(config.n_embd % config.n_head == 0,
         f"--n-embd {config.n_embd} cannot be divided into --n-head {config.n_head} heads")
    longest_prompt = config.block_size - config.response_tokens
    need(longest_prompt >= (1 if config.data else 16),  # the built-in world's prompts have up to 16 tokens
         f"--response-tokens {config.response_tokens} leaves no room for a prompt in --block-size {config.block_size}")
    need(config.data or config.response_tokens >= 4,
         f"--response-tokens is at least 4, which the shortest clause has, got {config.response_tokens}")
    need(config.data or config.eval_prompts <= 8000, f"--eval-prompts is at most 8,000, got {config.eval_prompts}")
    need(config.minibatch <= config.ppo_batch,
         f"--minibatch {config.minibatch} is larger than --ppo-batch {config.ppo_batch}")
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
    needed = bytes_needed(config)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    need(needed <= there, f"this takes about {needed / 2 ** 30:,.0f} GiB of memory of {there / 2 ** 30:,.0f}: "
         "lower --n-embd, --n-layer, --block-size, --batch-size, --ppo-batch or --pairs")
    if config.data:
        read_pairs(config.data)  # a broken file is found before any work
