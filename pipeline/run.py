"""
What the stages of a run share: the tokenizer, the networks, the texts, prompts and pairs, and gold.

    tokenizer.json                                         the pieces
    split.jsonl, tokens.pt, data.json                      the texts that are trained on or held out; their token ids
    *.pt                                                   networks, loaded with weights_only, with their settings
    gold.json, preferences.jsonl                           the scale of gold; the labelled pairs
    watch.jsonl                                            what a policy answers in the course of its training
    reward.json, report.json, report.md, report.html, samples.txt    the results

The files themselves are the matter of folder.py.
"""

import dataclasses
import json
import math
import random
from functools import cached_property
from pathlib import Path

import torch

import world
from checks import CanaryError
from data import UserError, decode, end_id, make_tokenizer
from model import GPT, GPTConfig
from pipeline.config import OWNED, STAGES
from pipeline.folder import MADE_BY, Folder, file_hash
from pipeline.pairs import read_pairs, split_pairs
from pipeline.progress import all_finite
from pipeline.tokens import encode_columns, fit_pairs, is_encoded, unpack
from reward import RewardModel

SPLITS = ("train", "heldout")


def read_data(config):
    """The pairs of the data file, for a command that begins a run with it: a broken file is found before any work."""
    if config.data and "pretrain" in config.stages.split(",") and not config.resume:
        return read_pairs(config.data)
    return None


class Run(Folder):
    """A run: its folder and its settings. given: the pairs of its data file, when they are read already."""

    def __init__(self, config, given=None):
        super().__init__(config)
        self.given = given
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # ---- networks

    @cached_property
    def tokenizer(self):
        pieces = self.read("tokenizer.json")
        try:
            return make_tokenizer(pieces)
        except ValueError:  # half a character
            raise self.damaged("tokenizer.json") from None

    def save_network(self, name, network):
        """Save a network with the settings that it was trained with. Raises CanaryError for one that diverged."""
        if not all_finite(network.state_dict()):
            raise CanaryError(f"the weights of {name} are not finite after the last step: lower its learning rate")
        trunk = getattr(network, "trunk", network)  # the GPT of a RewardModel
        stage = MADE_BY[f"{name}.pt"]
        so_far = [option for other in STAGES[:STAGES.index(stage) + 1] for option in OWNED[other]]
        settings = {option: value for option, value in self.settings(stage).items() if option in so_far}
        settings["seed"] = self.config.seed
        self.write(f"{name}.pt", dict(config=dataclasses.asdict(trunk.config), network=network.state_dict(),
                                      settings=settings))

    def load_network(self, name):
        """
        Load a GPT, or a RewardModel for 'reward' and 'critic'. It is frozen.

        The options of its stage are set to what it was trained with, even if config.json was lost or is older.
        """
        path, stage = self.path(f"{name}.pt"), MADE_BY[f"{name}.pt"]
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            network = GPT(GPTConfig(**saved["config"]))
            if name in ("reward", "critic"):
                network = RewardModel(network)
            network.load_state_dict(saved["network"])
            good = all_finite(saved["network"])
            trained = dict(saved.get("settings", {}))
        except Exception:  # torch.load has no exception of its own for a damaged file
            raise self.damaged(f"{name}.pt") from None
        if not good:
            raise self.damaged(f"{name}.pt")
        if (self.folder / "tokenizer.json").exists() and saved["config"]["vocab_size"] != self.tokenizer.n_vocab:
            raise UserError(f"{path} has another vocabulary than tokenizer.json: run --stages {stage} again")
        self.use(stage, trained)
        return network.to(self.device).requires_grad_(False).eval()

    def use(self, stage, trained):
        """Replace the settings that belong to this stage alone by those that its network was trained with."""
        others = [name for other, names in OWNED.items() if other != stage for name in names]
        changed = {}
        for name in OWNED[stage]:
            if name not in others and name in trained and trained[name] != getattr(self.config, name):
                changed[name] = trained[name]
        if changed:
            self.config = dataclasses.replace(self.config, **changed)

    # ---- texts, prompts and pairs

    def make_split(self):
        """
        Write down which prompts, or pairs of the data file, are trained on, and which are held out.

        All later stages read split.jsonl, so that no option and no change of the file moves a prompt to the other side.
        The order is random: the first n are a sample of all. Texts of the built-in world have only a "prompt".
        """
        config = self.config
        rng = random.Random(config.seed)
        if config.data:
            sides = split_pairs(self.given or read_pairs(config.data), 0.1, rng)
            self.given = None  # a large file: from here on its pairs are read in split.jsonl
            if len(sides[0]) < 16:
                raise UserError(f"{config.data}: {len(sides[0])} pairs to train on, at least 16 are needed")
            for side in sides:
                rng.shuffle(side)
            self.write("data.json", json.dumps(dict(path=str(Path(config.data).resolve()),
                                                    sha256=file_hash(config.data))))
        else:
            n_heldout = max(config.eval_prompts, 512)
            sides = world.make_prompts(config.seed, 4000, n_heldout, held_out=config.held_out)
            sides = [[{"prompt": text} for text in side] for side in sides]
        rows = (dict(split=split, **text) for split, side in zip(SPLITS, sides) for text in side)
        self.write("split.jsonl", (json.dumps(row) + "\n" for row in rows))
        self.remove("tokens.pt")  # of an older split

    def sides(self, name):
        """(training, held-out) rows of split.jsonl or preferences.jsonl."""
        rows = self.read(name)
        return [row for row in rows if row["split"] == "train"], [row for row in rows if row["split"] == "heldout"]

    def texts(self):
        """(training, held-out) pairs of texts, as pretraining split them. In the built-in world only a "prompt"."""
        sides = self.sides("split.jsonl")
        for text in sides[0] + sides[1]:
            del text["split"]
        return sides

    def encode(self):
        """The token ids of the texts of split.jsonl: {"train" or "heldout": columns}, as encode_columns makes them."""
        return {split: encode_columns(texts, self.tokenizer) for split, texts in zip(SPLITS, self.texts())}

    def tokens(self):
        """The same from tokens.pt, where pretraining left it: to read and encode a large file again takes seconds."""
        if not (self.folder / "tokens.pt").exists():  # removed by somebody, or a run of an older version
            return self.encode()
        try:
            tokens = torch.load(self.folder / "tokens.pt", map_location="cpu", weights_only=True)
            good = all(is_encoded(tokens[split], self.tokenizer.n_vocab) for split in SPLITS)
        except Exception:  # as in load_network
            raise self.damaged("tokens.pt") from None
        if not good:
            raise self.damaged("tokens.pt")
        return tokens

    def prompts(self):
        """(training, held-out) prompts as token ids, cut on the left to fit; eval_prompts held out, repeated if few."""
        room = self.config.block_size - self.config.response_tokens
        tokens = self.tokens()
        train, heldout = [[prompt[-room:] for prompt in unpack(tokens[split]["prompt"])] for split in SPLITS]
        return train, [heldout[i % len(heldout)] for i in range(self.config.eval_prompts)]

    def own_pairs(self, split):
        """The user's pairs of one split as token ids that fit, and counts of what was changed: `fit_pairs`."""
        config, columns = self.config, self.tokens()[split]
        if "chosen" not in columns:
            raise self.damaged("tokens.pt")
        return fit_pairs(columns, end_id(self.tokenizer), config.block_size - config.response_tokens,
                         config.response_tokens)

    def pairs(self):
        """(training, held-out) labelled pairs, as the preferences stage left them."""
        train, heldout = self.sides("preferences.jsonl")
        try:
            good = all(0 <= min(row[name]) and max(row[name]) < self.tokenizer.n_vocab
                       for row in train + heldout for name in ("prompt", "chosen", "rejected"))
        except TypeError:  # an id that is no number
            good = False
        if not good:
            raise self.damaged("preferences.jsonl")
        return train, heldout

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
