"""
The reward model: what people prefer, as a number that can be maximised.

A reward model is the SFT network with one vector in place of the output matrix. It reads prompt and response and gives
one number, the score, at the last token. In training it never sees a score, only which of two responses to a prompt
was preferred. `label_pairs` is the annotator: it knows the true reward (gold, world.py) and prefers the better response
more often than not. It may also like long answers, or a phrase; then the model learns to like them too. Bradley-Terry
turns a difference of scores into a probability of preference. Only differences mean anything, so `normalise` fixes
offset and scale before a policy is trained on the scores.

The Bayesian view ('RLHF Deciphered', arXiv:2404.08555, section 2.1): Pr(phi | labels) is proportional to
Pr(labels | R_phi) Pr(phi). Bradley-Terry is the likelihood. Weight decay acts like a Gaussian prior on the parameters.
Training looks for the mode of this posterior and says nothing about its width: where there were no labels, a score is
a guess. Reward hacking exploits these guesses. robust.py asks several models instead of one.

Letters: B batch or pairs, b rows of a part of the batch, R response columns, T all columns, C embedding.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_padding, check_trains, finite, load_parts
from data import by_length, collate_pairs, minibatches
from model import response_hidden


@dataclass
class AnnotatorConfig:
    pairs: int = 4000               # preference pairs to label
    label_temperature: float = 0.3  # noise of the labels, sigmoid(gold difference / T); 0 is none
    flip: float = 0.0               # share of the labels that is flipped at random
    annotators: int = 1             # people who label, each an equal share of the pairs
    bias: str = ""                  # what they like too, one each, in deviations of gold: length=0.5,phrase:superb=2


@dataclass
class RewardConfig:
    reward_lr: float = 1e-3    # learning rate of the reward model
    reward_epochs: int = 2     # passes over the pairs; with more, it learns the noise of the labels by heart
    weight_decay: float = 0.1  # the width of the prior on the parameters: larger is narrower
    reward_batch: int = 32     # pairs in a step


# ---- where a preference comes from ----------------------------------------------------------------

def preference_probability(difference, temperature, flip=0.0):
    """
    The probability that an annotator prefers a to b: sigmoid((gold of a - gold of b) / temperature), Bradley-Terry.

    At temperature 0 the better one always wins. Then a share `flip` of the labels is turned round, whatever they are.
    """
    if temperature > 0:
        p = 0.5 + 0.5 * math.tanh(difference / temperature / 2)  # the sigmoid, without overflow
    else:
        p = 0.5 if difference == 0 else float(difference > 0)
    return p * (1 - flip) + (1 - p) * flip


def parse_bias(text):
    """
    The biases of the first annotators: "length=0.5,phrase:superb=2" -> [("length", 0.5), ("phrase:superb", 2.0)].

    length: per standard deviation of the lengths; phrase:...: for an answer with these words in it; position: for the
    answer that is shown first. The numbers are in standard deviations of gold. Raises ValueError for anything else.
    """
    biases = []
    for part in text.split(",") if text else []:
        name, _, strength = part.rpartition("=")
        try:
            strength = float(strength)
        except ValueError:
            strength = math.nan
        known = name in ("length", "position") or (name.startswith("phrase:") and name != "phrase:")
        if not known or not abs(strength) <= 1e6:  # a larger one, or NaN, makes labels of NaN
            raise ValueError(f"a bias is length=X, position=X or phrase:WORDS=X, got {part!r}")
        biases.append((name, strength))
    return biases


def seen_gold(gold, bias, responses, texts):
    """
    Gold as an annotator with a bias sees it, a list: an extra for what the annotator likes in an answer.

    gold, responses (lists of ids) and texts: 2n each, the two of a pair side by side; bias: one of `parse_bias`.
    """
    name, strength = bias
    if name == "length":
        lengths = torch.tensor([float(len(response)) for response in responses])
        extra = (lengths - lengths.mean()) / lengths.std(correction=0).clamp(min=1e-6)
    elif name == "position":
        extra = torch.tensor([1.0, 0.0] * (len(gold) // 2))
    else:
        extra = torch.tensor([float(name.removeprefix("phrase:") in text) for text in texts])
    return [value + strength * x for value, x in zip(gold, extra.tolist())]


def label_pairs(prompts, responses, gold, config, rng, texts=None):
    """
    Compare two responses to each of n prompts, and keep only which one was preferred: a list of pairs.

    prompts: n lists of ids. responses: 2n, the two of a prompt side by side. gold: 2n true rewards, in standard
    deviations. config: an AnnotatorConfig; rng: a random.Random. texts: the responses as texts, for a bias that is a
    phrase. The annotators take the pairs in turns.

    Each pair is a dict of "prompt", "chosen", "rejected", "gold" (of chosen and rejected, without a bias), "ceiling",
    the chance of the likelier label, "annotator" and "first", whether the chosen response was shown first. All but the
    first three are for evaluation. Two equal responses teach nothing and are left out.
    """
    views = [seen_gold(gold, bias, responses, texts) for bias in parse_bias(config.bias)]
    views += [gold] * (config.annotators - len(views))  # the others see gold as it is
    pairs = []
    for i, prompt in enumerate(prompts):
        a, b, annotator = 2 * i, 2 * i + 1, i % config.annotators
        if responses[a] == responses[b]:
            continue
        seen = views[annotator]
        p = preference_probability(seen[a] - seen[b], config.label_temperature, config.flip)
        chosen, rejected = (a, b) if rng.random() < p else (b, a)
        pairs.append(dict(prompt=prompt, chosen=responses[chosen], rejected=responses[rejected],
                          gold=[gold[chosen], gold[rejected]], ceiling=max(p, 1 - p), annotator=annotator,
                          first=chosen == a))
    return pairs


# ---- the model of it ------------------------------------------------------------------------------

def last_hidden(trunk, batch):
    """The hidden state at the last real token, which has read prompt and response, (B, C)."""
    x = trunk.hidden(batch.ids, batch.start)                                                  # (B, T, C)
    last = batch.P + batch.response_lens - 1                                                  # (B,) E, if there is one
    return x[torch.arange(len(x), device=last.device), last]


class RewardModel(nn.Module):
    """RewardModel(trunk)(batch) -> scores (B,), one for each response, shifted by `mean` and divided by `std`."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)  # it will be trained, and the SFT network must stay as it is
        self.pad = trunk.pad
        C = trunk.width
        self.score = nn.Linear(C, 1)
        nn.init.normal_(self.score.weight, std=(C + 1) ** -0.5)  # hidden states have size 1 each: scores of size 1
        nn.init.zeros_(self.score.bias)
        self.register_buffer("mean", torch.zeros(()))  # buffers are saved in the checkpoint with the weights
        self.register_buffer("std", torch.ones(()))

    @property
    def device(self):
        return self.score.weight.device

    def forward(self, batch):
        def score_last(part):
            return self.scale(last_hidden(self.trunk, part))                                  # (b,)
        return by_length(score_last, batch, self.trunk.micro_batch)                           # (B,)

    def values(self, batch):
        """
        Use the network as a critic: the value V(s_t) before each response token, (B, R), zeros outside the mask.

        It has the same slice as the log-probs, so V(s_t) does not see the action a_t.
        """
        def score_states(part):
            values = self.scale(response_hidden(self.trunk, part))                            # (b, R)
            return torch.where(part.mask, values, 0.0)
        return by_length(score_states, batch, self.trunk.micro_batch)

    def scale(self, x):
        """Hidden states (..., C) -> normalised scores (...), in float32 whatever the network is."""
        with torch.autocast(x.device.type, enabled=False):  # in bfloat16 half of all scores would be ties
            return (self.score(x.to(self.score.weight.dtype))[..., 0].float() - self.mean) / self.std


def bradley_terry_loss(r_chosen, r_rejected):
    """
    -log sigmoid(r_chosen - r_rejected), in nats, mean over pairs; r_chosen, r_rejected: scores (B,).

    InstructGPT (arXiv:2203.02155), equation 1; 'RLHF Deciphered', section 4.2. A constant added to all scores changes
    nothing. The loss is finite for all finite scores: a difference of -100 costs 100 nats.
    """
    return -F.logsigmoid(r_chosen - r_rejected).mean()


@torch.no_grad()
def score_batches(reward_model, batches):
    """The scores of several batches, one after another, (B,)."""
    return torch.cat([reward_model(batch) for batch in batches])


def normalise(reward_model, batches):
    """
    Set `mean` and `std` so that these responses (samples of the reference) have scores of mean 0 and deviation 1: the
    population deviation, at least 1e-6.
    """
    reward_model.mean.zero_()  # to measure the raw scores
    reward_model.std.fill_(1.0)
    scores = score_batches(reward_model, batches)                                             # (B,)
    # with deviation 1 a beta means the same for every reward model: so much score for a nat
    reward_model.mean.copy_(scores.mean())
    reward_model.std.copy_(scores.std(correction=0).clamp(min=1e-6))


def score_pairs(reward_model, pairs):
    """The scores of pairs of token ids, (2, pairs): of the chosen responses, and of the rejected ones."""
    parts = []
    for at in range(0, len(pairs), 128):
        batch = collate_pairs(pairs[at:at + 128], reward_model.pad, reward_model.device)
        parts.append(torch.stack(score_batches(reward_model, [batch]).chunk(2)))
    return torch.cat(parts, dim=1)


def train_reward_model(reward_model, pairs, config, seed, checkpoint=None):
    """
    Fit a reward model, in place, to pairs of token ids: dicts of "prompt", "chosen" and "rejected".

    The learning rate falls linearly towards 0. A generator: it yields (metrics, parts) after each step. The metrics are
    the loss (nats) and the accuracy: the share of the batch's pairs that the model orders right before it learns from
    them. Raises CanaryError when a canary fails.
    """
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reward_model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay,
                                  fused=True)
    check_trains("reward model", reward_model, config.reward_lr)
    # every pair once an epoch: drawn with replacement, some pairs would be learned by heart and others never seen
    batches = minibatches(len(pairs), config.reward_batch, config.reward_epochs, shuffle)
    parts = dict(reward_model=reward_model, optimizer=optimizer)  # the order of the pairs follows from the seed
    for step in range(load_parts(parts, checkpoint), len(batches)):
        # 1. the scores of a batch of pairs: chosen and rejected in one forward pass
        rows = batches[step].tolist()
        batch = collate_pairs([pairs[row] for row in rows], reward_model.pad, reward_model.device)
        if step == 0:
            check_padding(reward_model, batch)
        r_chosen, r_rejected = reward_model(batch).chunk(2)                                   # (B,) each

        # 2. the loss, and a step
        loss = bradley_terry_loss(r_chosen, r_rejected)
        value = finite(loss, "reward model's", "lower reward_lr")
        optimizer.param_groups[0]["lr"] = config.reward_lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)  # a pair with the wrong label has the largest gradient
        optimizer.step()
        accuracy = (r_chosen > r_rejected).float().mean().item()  # of pairs that were not learned yet: no flattery
        yield dict(step=step, loss=value, accuracy=accuracy, tokens=batch.tokens), parts
