"""
The reward model: what people prefer, as a number that can be maximised.

A reward model is the SFT network with one vector in place of the output matrix. It reads prompt and response and gives
one number, the score, at the last token. In training it never sees a score, only which of two responses to a prompt
was preferred. Bradley-Terry turns a difference of scores into a probability of preference. Only differences mean
anything, so `normalise` fixes offset and scale before a policy is trained on the scores.

The Bayesian view ('RLHF Deciphered', arXiv:2404.08555, section 2.1): Pr(phi | labels) is proportional to
Pr(labels | R_phi) Pr(phi). Bradley-Terry is the likelihood. Weight decay acts like a Gaussian prior on the parameters.
Training looks for the mode of this posterior and says nothing about its width: where there were no labels, a score is
a guess. Reward hacking exploits these guesses. robust.py asks several models instead of one.

Left out: K-wise rankings (pairs are K = 2).

Letters: B batch or pairs, b rows of a part of the batch, R response columns, T all columns, C embedding.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from checks import check_padding, check_trains, finite
from data import by_length, collate_pairs, minibatches
from model import response_hidden
from pipeline.progress import ProgressBar


def last_hidden(trunk, batch):
    """The hidden state at the last real token, which has read prompt and response, (B, C)."""
    x = trunk.hidden(batch.ids, batch.start)                                                  # (B, T, C)
    last = batch.P + batch.response_lens - 1                                                  # (B,) E, if there is one
    return x[torch.arange(len(x), device=last.device), last]


class RewardModel(nn.Module):
    """RewardModel(trunk)(batch) -> scores (B,), one for each response, shifted by `mean` and divided by `std`."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        C = trunk.config.n_embd
        self.score = nn.Linear(C, 1)
        nn.init.normal_(self.score.weight, std=(C + 1) ** -0.5)  # scores of size about 1
        nn.init.zeros_(self.score.bias)
        self.register_buffer("mean", torch.zeros(()))  # buffers are saved in the checkpoint with the weights
        self.register_buffer("std", torch.ones(()))

    def forward(self, batch):
        return by_length(lambda part: self.scale(last_hidden(self.trunk, part)), batch)       # (B,)

    def values(self, batch):
        """
        Use the network as a critic: the value V(s_t) before each response token, (B, R), zeros outside the mask.

        The slice is that of the log-probs, so V(s_t) does not see the action a_t.
        """
        def score_states(part):
            values = self.scale(response_hidden(self.trunk, part))                            # (b, R)
            return torch.where(part.mask, values, 0.0)
        return by_length(score_states, batch)

    def scale(self, x):
        """Hidden states (..., C) -> normalised scores (...), in float32 whatever the network is."""
        return (self.score(x)[..., 0].float() - self.mean) / self.std


def bradley_terry_loss(r_chosen, r_rejected, margin=0.0):
    """
    -log sigmoid(r_chosen - r_rejected - margin), in nats, mean over pairs; r_chosen, r_rejected: scores (B,).

    InstructGPT (arXiv:2203.02155), equation 1, which has no margin; 'RLHF Deciphered', section 4.2. A constant added to
    all scores changes nothing. The loss is finite for all finite scores: a difference of -100 costs 100 nats.
    """
    return -F.logsigmoid(r_chosen - r_rejected - margin).mean()


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
    scores = score_batches(reward_model, batches)
    reward_model.mean.copy_(scores.mean())
    reward_model.std.copy_(scores.std(correction=0).clamp(min=1e-6))


def score_pairs(reward_model, pairs, pad, device="cpu", size=128):
    """The scores of the chosen and of the rejected responses, (pairs,) each."""
    chosen, rejected = [], []
    for at in range(0, len(pairs), size):
        scores = score_batches(reward_model, [collate_pairs(pairs[at:at + size], pad, device)])
        r_chosen, r_rejected = scores.chunk(2)
        chosen.append(r_chosen)
        rejected.append(r_rejected)
    return torch.cat(chosen), torch.cat(rejected)


def train_reward_model(reward_model, pairs, pad, config, seed, log=lambda **row: None, progress=ProgressBar):
    """
    Fit a reward model, in place, to pairs of token ids. The learning rate falls linearly towards 0.

    `log` gets the loss (nats) and the accuracy of every step: the share of the batch's pairs that the model orders
    right before it learns from them. Raises CanaryError when a canary fails.
    """
    device = reward_model.score.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reward_model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay,
                                  fused=True)
    check_trains("reward model", reward_model, optimizer, config.reward_lr)
    batches = minibatches(len(pairs), config.batch_size, config.reward_epochs, generator)
    bar = progress(len(batches), "reward model", "step", dict(model=reward_model, optimizer=optimizer))
    for step in bar:
        rows = batches[step]
        batch = collate_pairs([pairs[row] for row in rows.tolist()], pad, device)
        if step == 0:
            check_padding(reward_model, batch)
        r_chosen, r_rejected = reward_model(batch).chunk(2)                                   # (B,) each
        loss = bradley_terry_loss(r_chosen, r_rejected)
        value = finite(loss, "reward model's", "lower --reward-lr")
        optimizer.param_groups[0]["lr"] = config.reward_lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
        optimizer.step()
        accuracy = (r_chosen > r_rejected).float().mean().item()
        bar.set_postfix(loss=f"{value:.3f}", accuracy=f"{accuracy:.2f}")
        log(step=step, loss=value, accuracy=accuracy)
