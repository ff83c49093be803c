"""
A run and its folder: what one stage leaves for the next, and what it leaves for the reader.

    config.json, tokenizer.json, gold.json, preferences.jsonl      what was asked for, and the data that came of it
    pretrained.pt sft.pt reward.pt ppo.pt critic.pt dpo.pt         networks, loaded with weights_only
    metrics.jsonl                                                  a line per step and stage
    report.json, report.md, samples.txt                            what came out
"""

import dataclasses
import json
import os
import random
from functools import cached_property
from pathlib import Path

import torch

import world
from data import decode, make_tokenizer, read_pairs, split_pairs
from model import GPT, GPTConfig
from reward import RewardModel


class UserError(Exception):
    """Something that the user can put right, told in one line."""


class Run:
    """The folder of a run, and what the stages share: configuration, tokenizer, networks by name, metrics, prompts and gold."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.out)
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"{self.folder}: cannot be a folder of a run ({fault.strerror}), name another with --out") from None

    def saved_config(self):
        """The configuration without what only says where, how and which."""
        left_out = ("out", "stages", "prompt", "device", "cuda_graphs")
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in left_out}

    def write(self, name, content):
        """Write a file whole or not at all: a run that is stopped never leaves half a file in a good one's place."""
        part = self.folder / (name + ".part")
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            torch.save(content, part)
        os.replace(part, self.folder / name)

    def need(self, name, stage):
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{path} is missing: run --stages {stage} first")
        return path

    def read(self, name, stage):
        try:
            return json.loads(self.need(name, stage).read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise UserError(f"{self.folder / name} is damaged: run --stages {stage} again") from None

    def save_network(self, name, network):
        trunk = getattr(network, "trunk", network)
        self.write(f"{name}.pt", dict(config=dataclasses.asdict(trunk.config), network=network.state_dict()))

    def load_network(self, name, stage):
        """A GPT, or for 'reward' and 'critic' a RewardModel, frozen."""
        try:
            saved = torch.load(self.need(f"{name}.pt", stage), map_location=self.device, weights_only=True)
            network = GPT(GPTConfig(**saved["config"]))
            network = RewardModel(network) if name in ("reward", "critic") else network
            network.load_state_dict(saved["network"])
        except (RuntimeError, KeyError, TypeError, EOFError, OSError, ValueError) as fault:
            raise UserError(f"{self.folder / name}.pt is damaged ({type(fault).__name__}): run --stages {stage} again") from None
        return network.to(self.device).requires_grad_(False).eval()

    @cached_property
    def tokenizer(self):
        return make_tokenizer(self.read("tokenizer.json", "pretrain"))

    def begin_metrics(self, stage):
        """Drop what an earlier pass of this stage logged, and return the function that logs a row of it."""
        path = self.folder / "metrics.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        self.write("metrics.jsonl", "".join(row for row in rows if json.loads(row)["stage"] != stage))

        def log(**row):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(stage=stage, **row)) + "\n")
        return log

    def metrics(self):
        """All rows logged so far, as dicts."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def seconds(self):
        return {row["stage"]: round(row["stage_seconds"], 1) for row in self.metrics() if "stage_seconds" in row}

    def texts(self):
        """(training, held-out) pairs of texts of the user's file; for the built-in world, prompts without responses."""
        config = self.config
        if config.data:
            train, heldout = split_pairs(read_pairs(config.data), 0.1, random.Random(config.seed))
            if len(train) < 16:
                raise UserError(f"{config.data}: {len(train)} pairs to train on, at least 16 are needed")
            return train, heldout
        train, heldout = world.make_prompts(config.seed, 4000, max(config.eval_prompts, 512), held_out=config.held_out)
        return [{"prompt": text} for text in train], [{"prompt": text} for text in heldout]

    def prompts(self):
        """(training, held-out) prompts as token ids, cut on the left to what the block has room for; as many held-out ones as evaluation wants."""
        room = self.config.block_size - self.config.response_tokens
        train, heldout = ([ids[-room:] for ids in self.tokenizer.encode_ordinary_batch([pair["prompt"] for pair in side])]
                          for side in self.texts())
        return train, [heldout[i % len(heldout)] for i in range(self.config.eval_prompts)]

    def pairs(self):
        """(training, held-out) labelled pairs, as the preferences stage left them."""
        lines = self.need("preferences.jsonl", "preferences").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "heldout"]

    def raw_gold(self, prompts, responses, taste=1.0):
        """Raw gold of responses, lists of token ids; None where the data has no oracle."""
        if self.config.data:
            return None
        tokenizer = self.tokenizer
        return torch.tensor([world.gold(decode(tokenizer, p), decode(tokenizer, r), taste) for p, r in zip(prompts, responses)])

    def gold(self, prompts, responses):
        """Gold in standard deviations of the SFT policy's, around its mean."""
        gold = self.raw_gold(prompts, responses)
        if gold is not None:
            scale = self.read("gold.json", "preferences")
            gold = (gold - scale["mean"]) / scale["std"]
        return gold
