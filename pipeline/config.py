"""The settings of a run, of the lessons and of the program, and the command line. A setting's comment is its help."""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import world
from dpo import DPOConfig
from grpo import GRPOConfig
from pipeline.errors import UserError, need
from pipeline.files import read_file
from reward import AnnotatorConfig, RewardConfig, parse_bias
from robust import KINDS, RobustConfig
from sft import SFTConfig

VERSION = "0.3.0"
POLICIES = {  # name: its name in tables, the loop that trains it, the settings that make it what it is
    "dpo": ("DPO", "dpo", dict(dpo_kind="dpo")),
    "ipo": ("IPO", "dpo", dict(dpo_kind="ipo", label_smoothing=0.0)),
    "slic": ("SLiC", "dpo", dict(dpo_kind="slic", label_smoothing=0.0)),
    "robust_dpo": ("robust DPO", "dpo", dict(dpo_kind="robust")),
    "chipo": ("chi-PO", "dpo", dict(dpo_kind="chipo", label_smoothing=0.0)),
    "dpo_length": ("DPO, length", "dpo", dict(dpo_kind="dpo", length_penalty=0.05)),
    "dpo_sft": ("DPO + SFT", "dpo", dict(dpo_kind="dpo", sft_weight=1.0)),
    "online_dpo": ("online DPO", "online_dpo", {}),
    "ppo": ("PPO", "ppo", {}),
    "ppo_no_kl": ("PPO, no KL", "ppo", dict(beta=0.0)),
    "grpo": ("GRPO", "grpo", dict(kind="grpo")),
    "dr_grpo": ("Dr. GRPO", "grpo", dict(kind="dr_grpo")),
    "rloo": ("RLOO", "grpo", dict(kind="rloo")),
    "reinforce++": ("REINFORCE++", "grpo", dict(kind="reinforce++")),
}


@dataclass
class RunConfig:
    seed: int = 0               # random seed of everything
    policies: str = "dpo,ppo,ppo_no_kl"  # policies to train and compare, in this order
    reward_from: str = "model"  # the score to maximise: model, gold (the true reward), task, FILE.py:FUNCTION
    reward_sha256: str = ""     # of that file


@dataclass
class PretrainConfig:
    data: str = ""              # your preference pairs, .jsonl or .jsonl.gz, instead of the built-in world
    prompts: str = ""           # prompts alone, .jsonl, for a pretrained model and a reward of your own
    prompt_key: str = "prompt"  # the name of the prompt in the rows of these files
    data_sha256: str = ""       # of that file: another content is another setting
    held_out: str = ""          # film, restaurant, hotel, book or concert: no training prompt or label is about it
    n_layer: int = 2            # blocks of the network
    n_head: int = 4             # attention heads of a block
    n_embd: int = 128           # width of the network
    block_size: int = 64        # most tokens of prompt and response together; 192 with --data
    vocab_size: int = 2048      # most pieces that the tokenizer knows in addition to the 256 bytes
    documents: int = 16000      # texts to pretrain on
    pretrain_steps: int = 360   # steps of pretraining
    pretrain_lr: float = 3e-3   # highest learning rate of pretraining
    pretrain_batch: int = 32    # texts in a step


@dataclass
class InitConfig:
    init: str = ""          # a pretrained model to begin with: a folder of Hugging Face, or a name there
    lora: int = 0           # rank of LoRA, to train a few weights of a pretrained model; 0 trains all of them
    dtype: str = "float32"  # float32, or bfloat16 for what networks compute; trained weights and losses stay float32
    micro_batch: int = 0    # most rows of a step at a time, which saves memory and costs time; 0 for no limit


@dataclass
class DemonstrationConfig(SFTConfig):
    demonstrations: int = 4000  # reviews to imitate


@dataclass
class ReportConfig:
    eval_prompts: int = 512  # held-out prompts that every policy answers
    best_of: int = 16        # n of best-of-n


SECTIONS = {"the run": RunConfig, "data and pretraining": PretrainConfig, "a pretrained model": InitConfig,
            "SFT": DemonstrationConfig, "preferences": AnnotatorConfig, "reward model": RewardConfig,
            "robust reward": RobustConfig, "PPO, GRPO and their relatives": GRPOConfig,
            "DPO and its relatives": DPOConfig, "report": ReportConfig}


@dataclass
class Config(ReportConfig, DPOConfig, GRPOConfig, RobustConfig, RewardConfig, AnnotatorConfig, DemonstrationConfig,
             InitConfig, PretrainConfig, RunConfig):
    """All settings of a run."""

    @property
    def in_world(self):
        """Whether the texts are the built-in world's, whose true reward is known."""
        return not self.data and not self.prompts

    @property
    def room(self):
        """Tokens that a prompt may have."""
        return self.block_size - self.response_tokens

    @property
    def robust_members(self):
        """The members of the robust reward: an ensemble has one for each annotator, if there are several."""
        return self.annotators if self.annotators > 1 and self.reward_model != "brme" else self.members


def policy_config(config, name):
    """The settings of a stage: the run's, except for the few that define a policy."""
    if name not in POLICIES:
        return config
    config = dataclasses.replace(config, **POLICIES[name][2])
    if name == "ppo_no_kl":  # enough to see the reward model exploited; later the text falls apart
        config.ppo_iterations = max(1, config.ppo_iterations // 3)
    return config


# The settings that are options too. To change another one, edit its default.
OPTIONS = """seed policies reward_from data prompts prompt_key held_out init lora dtype micro_batch n_layer n_embd
    block_size response_tokens temperature pretrain_steps sft_steps pairs label_temperature flip annotators bias
    reward_model robust_lambda beta ppo_iterations ppo_batch ppo_lr group grpo_lr redraws dpo_beta dpo_lr
    label_smoothing eval_prompts""".split()
# One layer and large batches are cheap, so there is time for enough SFT, pairs and updates that PPO nears its optimum.
QUICK = dict(n_layer=1, n_embd=64, documents=8000, pretrain_steps=110, pretrain_lr=5e-3, pretrain_batch=64,
             demonstrations=8000, sft_steps=220, sft_lr=4e-3, sft_batch=64, pairs=3000, reward_lr=2e-3, dpo_epochs=1,
             dpo_lr=1e-3, ppo_iterations=36, ppo_batch=64, minibatch=16, ppo_lr=1e-3, eval_prompts=64)
# Rows of own data are long: fewer of them, so that a few thousand pairs take a quarter of an hour and not an hour. The
# advantages of a smaller rollout over a larger vocabulary are noisier, so the steps are smaller.
WITH_DATA = dict(block_size=192, response_tokens=64, ppo_iterations=40, ppo_batch=128, minibatch=32, ppo_lr=2e-4,
                 grpo_lr=2e-4, eval_prompts=200)
QUICK_WITH_DATA = dict(n_embd=64, pretrain_steps=260, pretrain_lr=5e-3, sft_steps=160, sft_lr=4e-3, ppo_iterations=12,
                       ppo_batch=64, eval_prompts=64)
# A pretrained model is large and knows much already: few rows, small steps. LoRA trains few weights, in larger steps.
WITH_INIT = dict(block_size=512, response_tokens=64, sft_steps=100, sft_batch=8, reward_batch=8, ppo_iterations=20,
                 ppo_batch=32, minibatch=8, dpo_batch=8, dpo_beta=0.1, beta=0.05, eval_prompts=32, best_of=4,
                 policies="dpo,ppo")
RATES = dict.fromkeys(("sft_lr", "reward_lr", "ppo_lr", "critic_lr", "grpo_lr", "dpo_lr"), 2e-5)
LORA_RATES = {**dict.fromkeys(RATES, 2e-4), "ppo_lr": 5e-4, "grpo_lr": 5e-4}
WITH_PROMPTS = dict(sft_steps=0, policies="rloo")
# Options of the built-in world, without effect on own data
WORLD = ("pairs", "label_temperature", "flip", "annotators", "bias", "held_out")
PATHS = ("data", "prompts", "init", "reward_from")
METAVARS = {int: "N", float: "X", str: "NAME", "data": "FILE", "prompts": "FILE", "init": "FOLDER"}


# ---- the command line -----------------------------------------------------------------------------

def flag(name):
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with a suggestion for a misspelt option."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            harmless = [option for option in self._option_string_actions if option != "--overwrite"]
            close = difflib.get_close_matches(unknown[1].split("=")[0], harmless, 1)
            message = f"unknown option {unknown[1]}, {f'did you mean {close[0]}?' if close else 'see --help'}"
        raise UserError(message)


@functools.cache
def comments(section):
    """The comment of each field of a dataclass and of the dataclasses that it inherits from: {name: comment}."""
    found = {}
    for owner in section.__mro__[:-1]:
        found.update(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(owner), re.M))
    return found


def make_parser(about):
    parser = OneLineParser(prog="minirlhf.py", description=about, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_argument_group("the command")
    alone = command.add_mutually_exclusive_group()
    command.add_argument("--out", metavar="FOLDER", help="the folder of the run; runs/default, runs/quick, or runs/ "
                         "and the name of the data or the model")
    command.add_argument("--quick", action="store_true", help="a small network, few steps: all in under a minute")
    alone.add_argument("--from", dest="source", metavar="FOLDER", help="begin a new run with the settings of another "
                       "one, changed; stages with equal settings are taken over")
    alone.add_argument("--compare", nargs="+", metavar="FOLDER", help="show several finished runs side by side")
    alone.add_argument("--prompt", metavar="TEXT", help="each policy of a finished run answers TEXT; PPO's answer "
                       "token by token")
    alone.add_argument("--chat", metavar="FOLDER", help="talk to the policies of a finished run")
    alone.add_argument("--export", metavar="FOLDER", help="save a finished run's networks, tokenizer, pairs and "
                       "prompts for other libraries, as Hugging Face has them")
    command.add_argument("--overwrite", action="store_true", help="delete the run in the folder and start over")
    command.add_argument("--device", metavar="DEVICE", help="cpu, cuda or mps; by default cuda if there is one")
    command.add_argument("--version", action="version", version=f"minirlhf {VERSION}, torch {torch.__version__}")
    for heading, section in SECTIONS.items():
        group, helps = parser.add_argument_group(heading), comments(section)
        for field in dataclasses.fields(section):
            if field.name in OPTIONS:
                default = f" ({field.default})" if field.default != "" else ""
                names = f": {', '.join(POLICIES)}" if field.name == "policies" else ""
                group.add_argument(flag(field.name), type=field.type, default=argparse.SUPPRESS,
                                   metavar=METAVARS.get(field.name, METAVARS[field.type]),
                                   help=helps.get(field.name, "") + names + default)
    return parser


def parse_command(argv=None, about=None):
    """
    Read the command line: (what to do, Config). Raises UserError.

    A later source overrides an earlier one: the defaults, --data's, --quick's, --init's, --prompts', the settings of
    the run of --from, the options given.
    """
    command = make_parser(about).parse_args(argv)
    command.given = given = {name: value for name, value in vars(command).items() if name in OPTIONS}
    for names, paths in ((vars(command), ("out", "source", "chat", "export")), (given, PATHS)):
        for name in [name for name in paths if names.get(name) is not None]:
            need(names[name], f"{flag('from' if name == 'source' else name)} is empty: give it a path, or leave it out")
            names[name] = str(Path(names[name]).expanduser())
    if command.source or command.chat:
        need(not command.quick, "--quick is a set of settings, and --from and --chat take those of a run: leave it out")
        settings = read_settings(command.source or command.chat)
    else:
        rates = LORA_RATES if given.get("lora") else RATES
        quick = QUICK_WITH_DATA if given.get("data") else QUICK
        settings = {**(WITH_DATA if given.get("data") else {}), **(quick if command.quick else {}),
                    **({**WITH_INIT, **rates} if given.get("init") else {}),
                    **(WITH_PROMPTS if given.get("prompts") else {})}
    config = Config(**{**settings, **given})
    config.data_sha256 = sha256(config.data or config.prompts) or config.data_sha256
    config.reward_sha256 = sha256(config.reward_from.rpartition(":")[0])
    for name in WORLD:
        need(config.in_world or name not in given,
             f"{flag(name)} belongs to the built-in world and has no effect on your own data: leave it out")
    if not config.in_world:  # a run of the built-in world has them, and --from gives them
        config = dataclasses.replace(config, **{name: getattr(Config(), name) for name in WORLD})
    check(config)
    check_device(command.device, getattr(torch, config.dtype))
    command.out = command.out or default_folder(command, given)
    need(not command.source or Path(command.source).resolve() != Path(command.out).resolve(),
         "--from and --out name the same folder: name another one with --out")
    return command, config


def sha256(path):
    """The SHA-256 of a file, "" if there is none."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and Path(path).is_file() else ""


def default_folder(command, given):
    """runs/default, runs/quick, or runs/ and the name of the data or the model; with --from that and the changes."""
    if command.source:
        # a name and not "." or "..", so that the new folder lies next to the other one
        source = command.source if Path(command.source).name not in ("", "..") else str(Path(command.source).resolve())
        changes = [f"{name.replace('_', '-')}-{Path(str(value)).name}" for name, value in given.items()
                   if name != "data"]
        need(changes, f"--from {command.source}: the new run needs a folder: change a setting, such as --beta 0.05, or "
             "name a folder with --out")
        return "_".join([source, *changes]).replace(",", "+")
    for name in ("data", "prompts", "init"):
        if given.get(name):
            return "runs/" + re.sub(r"\.jsonl(\.gz)?$", "", Path(given[name]).name)
    return "runs/quick" if command.quick else "runs/default"


def check_owner(folder):
    """Raise UserError if config.json is another program's, such as a pretrained model's: it must not be removed."""
    path = Path(folder, "config.json")
    saved = read_file(path, {})
    need(saved is None or {"seed", "beta"} <= saved.keys(),
         f"{path} belongs to another program: name another folder with --out")


def read_settings(folder):
    """The settings of the run in a folder, by name. Raises UserError when they cannot be read."""
    path = Path(folder, "config.json")
    check_owner(folder)
    need(path.exists(), f"{folder} holds no run: there is no config.json in it")
    saved = read_file(path, vars(Config()))
    advice = "begin the run again with --overwrite, or name another folder with --out"
    need(saved, f"{path} cannot be read: {advice}")
    settings = {name: saved[name] for name in vars(Config())}
    try:
        check(Config(**settings))
    except UserError as fault:
        raise UserError(f"{path} was changed ({fault}): {advice}") from None
    return settings


# ---- which settings can work ----------------------------------------------------------------------

# (least, most) of a number. Others: 1 to 10,000,000 of a count, 0 to 1,000,000 of a number, up to 1 of a learning rate
LIMITS = dict(seed=(0, 2 ** 40), redraws=(0, 100), lora=(0, 1024), micro_batch=(0, 10 ** 7), sft_steps=(0, 10 ** 7),
              n_layer=(1, 1000), n_embd=(2, 10 ** 4), flip=(0, 1), label_smoothing=(0, 0.49), temperature=(0.1, 10),
              gamma=(0, 1), lam=(0, 1), beta=(0, 10 ** 4), clip=(1e-6, 1000), value_clip=(1e-6, 10 ** 4),
              dpo_beta=(1e-4, 10 ** 4), robust_lambda=(0, 1), head_share=(0.01, 1))


def check(config):
    """Raise UserError for settings that cannot work."""
    for field in dataclasses.fields(config):
        if field.type in (int, float):
            usual = (1, 10 ** 7) if field.type is int else (1e-30, 1) if field.name.endswith("_lr") else (0, 10 ** 6)
            value, (least, most) = getattr(config, field.name), LIMITS.get(field.name, usual)
            need(least <= value <= most, f"{flag(field.name)} must be between {least:,} and {most:,}, got {value}")
    need(config.beta == 0 or config.beta >= 1e-6, f"--beta is 0, or at least 1e-06, got {config.beta}")
    need(config.n_embd % config.n_head == 0,
         f"--n-embd {config.n_embd} cannot be divided into {config.n_head} attention heads")
    need(config.room >= (16 if config.in_world else 1),  # the built-in world's prompts have up to 16 tokens
         f"--response-tokens {config.response_tokens} leaves no room for a prompt in --block-size {config.block_size}")
    policies = config.policies.split(",")
    for policy in policies:
        need(policy in POLICIES, f"unknown policy {policy!r} in --policies, choose from {', '.join(POLICIES)}")
    grouped = [policy for policy in policies if POLICIES[policy][1] == "grpo"]
    need(not grouped or config.ppo_batch % config.group == 0,
         f"--ppo-batch {config.ppo_batch} cannot be divided into groups of --group {config.group}")
    grouped = [policy for policy in grouped if policy != "reinforce++"]
    need(config.group >= 2 or not grouped, f"--group 1 leaves {','.join(grouped)} nothing to compare an answer with: "
         "raise it")
    need(config.beta > 0 or "online_dpo" not in policies,
         "--policies online_dpo needs a --beta above 0: at 0 no margin is large enough")
    need(config.reward_from in ("model", "gold", "task") or ".py:" in config.reward_from,
         f"--reward-from must be model, gold, task or FILE.py:FUNCTION, got {config.reward_from!r}")
    need(config.in_world or config.reward_from not in ("gold", "task"),
         f"--reward-from {config.reward_from} is known in the built-in world only, without --data and --prompts")
    need(config.dtype in ("float32", "bfloat16"), f"--dtype must be float32 or bfloat16, got {config.dtype!r}")
    need(config.init or not config.lora, "--lora is for a pretrained model: name one with --init")
    need(not (config.data and config.prompts), "--data holds prompts too: give it or --prompts, not both")
    if config.prompts:
        need(config.init, "--prompts has no text to learn a language from: name a pretrained model with --init")
        need(".py:" in config.reward_from, "--prompts has no preferences, so there is no reward model: name a reward "
             "with --reward-from FILE.py:FUNCTION")
        need(config.sft_steps == 0, "--prompts has no responses to imitate: leave --sft-steps out")
        pairwise = [policy for policy in policies if POLICIES[policy][1] == "dpo"]
        need(not pairwise, f"--policies {','.join(pairwise)} learns from pairs, and --prompts has none")
    need(config.reward_model in ("single", *KINDS),
         f"--reward-model must be single, {', '.join(KINDS)}, got {config.reward_model!r}")
    try:
        biases = len(parse_bias(config.bias))
    except ValueError as fault:
        raise UserError(f"--bias: {fault}") from None
    need(biases <= config.annotators, f"--bias names {biases} biases, one annotator each: raise --annotators")
    need(config.annotators <= config.pairs, f"--annotators {config.annotators} cannot share {config.pairs} pairs: "
         "raise --pairs")
    need(config.reward_model == "single" or not config.init, f"--reward-model {config.reward_model} has members with "
         "other last blocks, which only the built-in GPT has: leave --init out")
    subjects = ", ".join(world.ASPECTS)
    need(config.held_out in ("", *world.ASPECTS), f"--held-out must be one of {subjects}, got {config.held_out!r}")


def check_device(device, dtype):
    need(not device or device.partition(":")[0] in ("cpu", "cuda", "mps"),
         f"--device {device} cannot be used: give cpu, cuda or mps")
    try:
        torch.empty(1, device=device or "cpu", dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as fault:
        raise UserError(f"--device {device} cannot be used: {str(fault).splitlines()[0]}") from None
