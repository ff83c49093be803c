"""
A run and its folder: what one stage leaves for the next one, and for the reader.

    config.json, tokenizer.json, gold.json, preferences.jsonl      the settings, and the data that was made
    pretrained.pt sft.pt reward.pt ppo.pt critic.pt grpo.pt dpo.pt networks, loaded with weights_only
    metrics.jsonl                                                  a line per step, and one per finished stage
    reward.json, report.json, report.md, samples.txt               the results
"""

import dataclasses
import json
import math
import os
import random
from functools import cached_property
from pathlib import Path

import torch

import world
from data import UserError, decode, make_tokenizer, read_pairs, split_pairs
from model import GPT, GPTConfig
from reward import RewardModel

MADE_BY = {"tokenizer.json": "pretrain", "pretrained.pt": "pretrain", "sft.pt": "sft", "gold.json": "preferences",
           "preferences.jsonl": "preferences", "reward.json": "reward", "reward.pt": "reward",
           "ppo.pt": "ppo", "critic.pt": "ppo", "grpo.pt": "grpo", "dpo.pt": "dpo"}  # file -> stage


class Run:
    """The folder of a run, and what the stages share: settings, tokenizer, networks, metrics, prompts and gold."""

    def __init__(self, config):
        self.config = config
        self.folder = Path(config.out)
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"{self.folder} cannot be the folder of a run ({fault.strerror}): "
                            "name another one with --out") from None

    def write(self, name, content):
        """Write a text, or anything else with torch.save. An interrupted write leaves the old file whole."""
        part = self.folder / (name + ".part")
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            torch.save(content, part)
        os.replace(part, self.folder / name)

    def path(self, name):
        """The path of a file that a stage has made. Raises UserError when it is missing."""
        if not (self.folder / name).exists():
            raise UserError(f"{self.folder / name} is missing: run --stages {MADE_BY[name]} first")
        return self.folder / name

    def damaged(self, name):
        return UserError(f"{self.folder / name} is damaged: run --stages {MADE_BY[name]} again")

    def read(self, name):
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except ValueError:
            raise self.damaged(name) from None

    def save_network(self, name, network):
        trunk = getattr(network, "trunk", network)  # the GPT of a RewardModel
        self.write(f"{name}.pt", dict(config=dataclasses.asdict(trunk.config), network=network.state_dict()))

    def load_network(self, name):
        """Load a GPT, or a RewardModel for 'reward' and 'critic'. It is frozen."""
        path = self.path(f"{name}.pt")
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            network = GPT(GPTConfig(**saved["config"]))
            if name in ("reward", "critic"):
                network = RewardModel(network)
            network.load_state_dict(saved["network"])
        except Exception:  # torch.load has no exception of its own for a damaged file
            raise self.damaged(f"{name}.pt") from None
        return network.to(self.device).requires_grad_(False).eval()

    @cached_property
    def tokenizer(self):
        return make_tokenizer(self.read("tokenizer.json"))

    def saved_config(self):
        """The settings, without those of the command alone."""
        command = ("out", "stages", "prompt", "device")
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in command}

    def begin_metrics(self, stage):
        """Drop this stage's old rows, and return the function that logs new ones."""
        path = self.folder / "metrics.jsonl"
        rows = self.metrics() if path.exists() else []
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows if row["stage"] != stage))

        def log(**row):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(stage=stage, **row)) + "\n")
        return log

    def metrics(self):
        """All logged rows, as dicts."""
        rows = []
        for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # half a line, from a run that was killed while it wrote
                continue
        return rows

    def last_metrics(self, stage, names):
        """The means of a stage's last ten logged rows, as one line."""
        rows = [row for row in self.metrics() if row["stage"] == stage and "step" in row][-10:]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names if name in rows[-1]}
        return ", ".join(f"{name.replace('_', ' ')} {mean:.2f}" for name, mean in means.items())

    def seconds(self):
        """The seconds of each finished stage, in the order in which the stages ended."""
        return {row["stage"]: round(row["stage_seconds"], 1) for row in self.metrics() if "stage_seconds" in row}

    def texts(self):
        """(training, held-out) pairs of texts, from the data file. In the built-in world they have only a "prompt"."""
        config = self.config
        if not config.data:
            n_heldout = max(config.eval_prompts, 512)
            train, heldout = world.make_prompts(config.seed, 4000, n_heldout, held_out=config.held_out)
            return [{"prompt": text} for text in train], [{"prompt": text} for text in heldout]
        train, heldout = split_pairs(read_pairs(config.data), 0.1, random.Random(config.seed))
        if len(train) < 16:
            raise UserError(f"{config.data}: {len(train)} pairs to train on, at least 16 are needed")
        return train, heldout

    def prompts(self):
        """(training, held-out) prompts as token ids, cut on the left to fit; eval_prompts held out, repeated if few."""
        room = self.config.block_size - self.config.response_tokens
        sides = []
        for texts in self.texts():
            ids = self.tokenizer.encode_ordinary_batch([text["prompt"] for text in texts])
            sides.append([prompt[-room:] for prompt in ids])
        train, heldout = sides
        return train, [heldout[i % len(heldout)] for i in range(self.config.eval_prompts)]

    def pairs(self):
        """(training, held-out) labelled pairs, as the preferences stage left them."""
        text = self.path("preferences.jsonl").read_text(encoding="utf-8")
        try:
            rows = [json.loads(line) for line in text.splitlines()]
        except ValueError:
            raise self.damaged("preferences.jsonl") from None
        return [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "heldout"]

    def raw_gold(self, prompts, responses):
        """Gold of responses (lists of ids) in the points of world.gold, (n,). NaN with --data, which has no oracle."""
        if self.config.data:
            return torch.full((len(prompts),), math.nan)
        points = []
        for prompt, response in zip(prompts, responses):
            points.append(world.gold(decode(self.tokenizer, prompt), decode(self.tokenizer, response)))
        return torch.tensor(points)

    def gold(self, prompts, responses):
        """Gold of responses in standard deviations of the SFT policy's, around its mean, (n,). NaN with --data."""
        raw = self.raw_gold(prompts, responses)
        if self.config.data:
            return raw
        scale = self.read("gold.json")
        return (raw - scale["mean"]) / scale["std"]

    def rollout_gold(self, prompts, rollout):
        return self.gold(prompts, rollout.response_ids())

    def scorer(self):
        """What the policies maximise, a function of a batch -> (B,): the reward model, or gold (--reward-from gold)."""
        if self.config.reward_from == "model":
            return self.load_network("reward")

        def oracle(batch):
            prompts = [ids[start:batch.P] for ids, start in zip(batch.ids.tolist(), batch.start.tolist())]
            return self.gold(prompts, batch.response_ids()).to(batch.ids.device)
        return oracle
