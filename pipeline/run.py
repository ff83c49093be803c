"""
A run is a plain folder. docs/design.md has its rules.

    config.json                                   the settings, written first
    tokenizer.json, split.jsonl                   the pieces; the texts that are trained on or held out
    *.pt                                          networks, and checkpoint.pt while a loop runs
    gold.json, preferences.jsonl, reward.json     the scale of gold; the labelled pairs; how good the reward model is;
                                                  robust.json says it of a robust reward
    metrics.jsonl, watch.jsonl                    a row for each step; answers of a policy during training
    report.json, report.html, samples.txt         the results
"""

import copy
import json
import math
import sys
import time
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from checks import canary, save_parts
from evaluate import sample_policy
from model import GPT, GPTConfig
from pipeline.errors import need
from pipeline.files import fits, read_file, write_file
from pipeline.own import load_model
from pipeline.pairs import encode_prompt
from reward import RewardModel
from robust import GaussianReward, RobustReward
from tokenizer import make_tokenizer

SAVES = 20.0  # seconds between two checkpoints
SHOWN = 8     # held-out prompts that are answered on the page
AT_BAR = ("score", "gold", "kl", "loss", "accuracy")  # the first two of these that a loop logs, at its bar
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # 79 columns leave a bar
SPLITS = ("train", "heldout")
MAYBE = (0.0, None)
ROBUST = {"accuracy": 0.0, "accuracy_se": 0.0, "pairs": 0, "at_chance": True, "*": MAYBE}
REWARD = {**ROBUST, "reliability": [{"*": 0.0}]}
ROW = dict.fromkeys("gold gold_se score score_se kl kl_se objective objective_se optimum_share optimum_share_se "
                    "win_rate win_rate_se length finished".split(), MAYBE)
SHAPES = {  # what must be in a file, by an example: see `fits`
    "tokenizer.json": [""],
    "split.jsonl": [{"split": "", "prompt": ""}],
    "gold.json": {"mean": 0.0, "std": 0.0},
    "preferences.jsonl": [{"split": "", "prompt": [0], "chosen": [0], "rejected": [0]}],
    "reward.json": REWARD, "robust.json": ROBUST,
    "metrics.jsonl": [{"stage": "", "*": 0.0}],
    "watch.jsonl": [{"stage": "", "step": 0, "texts": [""], "score": [MAYBE], "gold": [MAYBE]}],
    "report.json": {"policies": {"sft": ROW, "*": ROW}, "warnings": [""], "optimum": ({"*": MAYBE}, None),
                    "config": {"beta": 0.0, "best_of": 0, "eval_prompts": 0},
                    "reward_model": (REWARD, ROBUST, {"accuracy": None}),
                    "frontier": {"optimum": [{"kl": 0.0}], "best_of_n": [{"kl": 0.0}]}, "diagnosis": [""],
                    "seconds": {"*": 0.0}, "torch": "", "device": ""}}
TEXT_PAIR = {"split": "", "prompt": "", "chosen": "", "rejected": ""}
GOLD_PAIR = {"gold": [0.0], "ceiling": 0.0, "first": True, "annotator": 0}  # what a pair of the built-in world has too


def all_finite(weights):
    return all(bool(weight.isfinite().all()) for weight in weights.values())


def bar(steps, name, start=0, leave=True):
    """A tqdm bar on stderr. In a log file it is a line now and then."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(initial=start, total=steps, desc=name, leave=leave, ncols=79, bar_format=BAR, file=sys.stderr,
                mininterval=0.1 if terminal else 10, disable=sys.stderr is None)


class Run:
    """A run: its folder, its settings, and the texts, networks and numbers in it."""

    def __init__(self, folder, config, device=""):
        self.folder = Path(folder)
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.data = None  # of --data: the pieces and the split, if they are made but not written yet

    # ---- files

    def has(self, names):
        return all((self.folder / name).exists() for name in names)

    def remove(self, names):
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def write(self, name, content):
        write_file(self.folder / name, content)

    def write_rows(self, name, rows):
        self.write(name, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def need_readable(self, good, name):
        path = self.folder / name
        need(good or path.exists(), f"{path} is not there: the run is not finished, so give its command again")
        need(good, f"{path} cannot be read: remove it, and the same command makes it again")

    def read(self, name, shape=None):
        """The content of a .json file, the rows of a .jsonl file. One error for any file that cannot be read."""
        content = read_file(self.folder / name, shape or SHAPES[name])
        self.need_readable(content is not None, name)
        return content

    def rows(self, name="metrics.jsonl"):
        """The rows of metrics.jsonl or watch.jsonl as dicts; none if the file is not there."""
        return self.read(name) if (self.folder / name).exists() else []

    # ---- networks

    @cached_property
    def pretrained(self):
        """(network, tokenizer) of --init. Networks with LoRA share it, others are copies of it."""
        return load_model(self.config, self.device if self.config.lora else torch.device("cpu"))

    @cached_property
    def tokenizer(self):
        return self.pretrained[1] if self.config.init else make_tokenizer(self.read("tokenizer.json"))

    @property
    def kind(self):
        """What all networks of the run have in common: the rank of LoRA, or the sizes of a GPT."""
        config = self.config
        if config.init:
            return dict(rank=config.lora)
        return dict(vocab_size=self.tokenizer.n_vocab, block_size=config.block_size, n_layer=config.n_layer,
                    n_head=config.n_head, n_embd=config.n_embd)

    def make_network(self):
        """A network of this run's kind: the pretrained one, or a new GPT."""
        network = copy.deepcopy(self.pretrained[0]) if self.config.init else GPT(GPTConfig(**self.kind))
        network.micro_batch = self.config.micro_batch
        return network

    def save_network(self, name, network):
        """Save a network. Raises CanaryError for one that diverged."""
        canary(all_finite(network.state_dict()), f"the weights of {name} are not finite after the last step: lower its "
                                                 "learning rate")
        self.write(f"{name}.pt", dict(config=self.kind, network=network.state_dict()))

    def load(self, name, check):
        """Read a file of torch.save; no code in it is run. check(saved): whether the content is as it should be."""
        try:
            saved = torch.load(self.folder / name, map_location="cpu", weights_only=True)
            good = check(saved)
        except Exception:  # torch.load raises no special exception for a damaged file
            good = False
        self.need_readable(good, name)
        return saved

    def load_network(self, name):
        """Load a network, frozen: a RewardModel, a critic, the robust reward, or else a policy."""
        network = self.make_network()
        if name == "pretrained" and self.config.init:
            return network.to(self.device)
        if name == "reward" or name.endswith("_critic"):
            network = RewardModel(network)
        if name == "robust":
            make = GaussianReward if self.config.reward_model == "brme" else RewardModel
            members = [make(network) for _ in range(self.config.robust_members)]
            network = RobustReward(members, self.config.reward_model, self.config.robust_lambda)

        def check(saved):
            network.load_state_dict(saved["network"])
            return all_finite(saved["network"]) and saved["config"] == self.kind

        self.load(f"{name}.pt", check)
        return network.to(self.device).requires_grad_(False).eval()

    # ---- texts, prompts and pairs

    @cached_property
    def texts(self):
        """{"train" or "heldout": rows}: a "prompt", with --data "chosen" and "rejected", with --prompts "row" too."""
        rows = self.read("split.jsonl", [TEXT_PAIR] if self.config.data else None)
        texts = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
        self.need_readable(all(texts.values()) and all(row["prompt"] for row in rows), "split.jsonl")
        return texts

    @cached_property
    def prompts(self):
        """(training, held-out) prompts as token ids, cut on the left to fit."""
        room = self.config.room
        return [[self.encode_prompt(row["prompt"])[-room:] for row in self.texts[split]] for split in SPLITS]

    def encode_prompt(self, text):
        """A prompt as token ids. Those of the built-in world are texts to continue, for a chat model too."""
        if self.config.in_world:
            return self.tokenizer.encode_ordinary(text)
        return encode_prompt(self.tokenizer, text)

    @cached_property
    def pairs(self):
        """(training, held-out) labelled pairs, as the stage preferences left them."""
        shape = SHAPES["preferences.jsonl"][0]
        rows = self.read("preferences.jsonl", [shape if self.config.data else {**shape, **GOLD_PAIR}])
        pairs = [[row for row in rows if row["split"] == split] for split in SPLITS]
        texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
        known = all(0 <= token < self.tokenizer.n_vocab for ids in texts for token in ids)
        whole = all(row["prompt"] and row["chosen"] and row["rejected"] and len(row.get("gold", "ab")) == 2
                    for row in rows)
        good = known and whole and all(pairs) and max(map(len, texts)) <= self.config.block_size
        self.need_readable(good, "preferences.jsonl")
        return pairs

    # ---- sampling and training

    def sample(self, name, policy, prompts, seed):
        """Yield the policy's rollouts of all prompts, with a progress bar that vanishes."""
        config = self.config
        with bar(len(prompts), name, leave=False) as progress:
            for rollout in sample_policy(policy, prompts, config.response_tokens, config.temperature, seed):
                yield rollout
                progress.update(len(rollout))

    def train(self, stage, loop, steps, observe=lambda metrics, rollout=None: None):
        """
        Run the training loop of a stage to its end: a bar, a row of metrics.jsonl for each step, checkpoints.

        loop(checkpoint) makes the loop. observe(metrics, rollout) sees each step and may add metrics; None, None comes
        before the first one. After the last step nothing is saved: the stage writes its results then.
        """
        checkpoint = self.checkpoint(stage)
        start = checkpoint["step"] if checkpoint else 0
        for name in ("metrics.jsonl", "watch.jsonl"):  # an earlier try may have gone further than its checkpoint
            self.write_rows(name, [row for row in self.rows(name)
                                   if row["stage"] != stage or checkpoint and row.get("step", steps) < start])
        if checkpoint is None:
            observe(None, None)
        saved = clock = time.perf_counter()
        with bar(steps, stage, start) as progress:
            for metrics, parts, *rollout in loop(checkpoint):
                metrics["seconds"] = time.perf_counter() - clock
                read = metrics.pop("tokens", 0)  # for the bar alone
                tokens = rollout[0].response_lens.sum().item() if rollout else read
                observe(metrics, *rollout)
                self.log(stage, metrics)
                shown = [f"{key} {metrics[key]:.2f}" for key in AT_BAR if key in metrics][:2]
                shown.append(f"{tokens / metrics['seconds']:.0f} tok/s")
                progress.set_postfix_str(", ".join(shown), refresh=False)
                progress.update()
                done, clock = metrics["step"] + 1, time.perf_counter()
                if done < steps and clock - saved >= SAVES:
                    self.save_checkpoint(stage, parts, done)
                    saved = clock = time.perf_counter()

    def save_checkpoint(self, stage, parts, step):
        networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        if all(all_finite(network.state_dict()) for network in networks):  # else the last good one stays
            self.write("checkpoint.pt", dict(stage=stage, **save_parts(parts, step)))

    def checkpoint(self, stage):
        """The checkpoint of an interrupted loop, None if this stage has none."""
        if not self.has(["checkpoint.pt"]):
            return None
        saved = self.load("checkpoint.pt", lambda saved: fits(saved, {"stage": "", "step": 0}))
        return saved if saved["stage"] == stage else None

    def log(self, stage, row):
        """Add a row to metrics.jsonl. Raises CanaryError for a number that is not finite."""
        for name, value in row.items():
            canary(not isinstance(value, float) or math.isfinite(value),
                   f"{stage}: {name} is {value}: the training diverged; lower its learning rate")
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(stage=stage, **row), allow_nan=False) + "\n")
