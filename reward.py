"""
The reward model: what people prefer, as a number that can be maximised.

A reward model is the SFT network with its output matrix replaced by one vector: it reads prompt and response and says a scalar at the last token.
It never sees a score, only which of two responses to a prompt was preferred; Bradley-Terry turns differences of scores into probabilities of
preference. So only differences mean anything: training leaves the offset free and the scale to the labels' noise, and `normalise` fixes both
before a policy is trained on it.

The Bayesian view ('RLHF Deciphered', arXiv:2404.08555, section 2.1): Pr(phi | labels) is proportional to Pr(labels | R_phi) Pr(phi). Bradley-Terry is
the likelihood; weight decay is a Gaussian prior on the parameters; minimising their sum finds the posterior's mode and says nothing of its width.

Left out: K-wise rankings (pairs are K = 2), the centring penalty on scores (normalising does it once and exactly).

Letters: B batch, P prompt columns, R response columns, T = P + R, C embedding.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import collate, minibatches
from evaluate import finite, pads_are_inert, win_rate
from model import response_hidden, spread


class RewardModel(nn.Module):
    """RewardModel(trunk)(batch) -> scores (B,): one scalar for each response, read at its last real token, in units of `std` around `mean`."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = copy.deepcopy(trunk)
        C = trunk.config.n_embd
        self.score = nn.Linear(C, 1)
        nn.init.normal_(self.score.weight, std=(C + 1) ** -0.5)  # scores of the untrained model have a spread of about 1
        nn.init.zeros_(self.score.bias)
        self.register_buffer("mean", torch.zeros(()))  # buffers, so that a checkpoint carries its normalisation with it
        self.register_buffer("std", torch.ones(()))

    def forward(self, batch):
        x = self.trunk.hidden(batch.ids, batch.prompt_lens, batch.response_lens, batch.P)      # (B, T, C)
        last = batch.P + batch.response_lens - 1                                               # (B,) from lengths: E included, pads never
        return self._scale(x[torch.arange(len(batch), device=last.device), last])              # (B,)

    def values(self, batch):
        """
        The same network as a critic: V(s_t) for the state before each response token, (B, R), zeros outside the mask.

        The slice is the log-probs' own, so the value of a state never sees the action that is taken in it.
        """
        return spread(self._scale(response_hidden(self.trunk, batch)), batch.mask)             # (B, R)

    def _scale(self, x):
        return (self.score(x).squeeze(-1).float() - self.mean) / self.std


def bradley_terry_loss(r_chosen, r_rejected, margin=0.0):
    """
    -log sigmoid(r_chosen - r_rejected - margin), in nats, mean over pairs ('RLHF Deciphered', section 4.2; InstructGPT, equation 1).

    r_chosen, r_rejected: scores (B,). The sum of a constant and both scores changes nothing. Finite for any finite scores: a difference of -100
    costs 100 nats.
    """
    return -F.logsigmoid(r_chosen - r_rejected - margin).mean()


@torch.no_grad()
def score_batches(reward_model, batches):
    """Scores of the responses of several batches, one after another (B,)."""
    return torch.cat([reward_model(batch) for batch in batches])


def normalise(reward_model, batches):
    """Set `mean` and `std` so that the scores of these responses (samples of the reference policy) have mean 0 and standard deviation 1."""
    reward_model.mean.zero_()
    reward_model.std.fill_(1.0)
    scores = score_batches(reward_model, batches)
    reward_model.mean.copy_(scores.mean())
    reward_model.std.copy_(scores.std(correction=0).clamp(min=1e-6))


def collate_pairs(pairs, pad, device="cpu"):
    """Pairs of token ids -> one Batch of 2B rows, the chosen responses first: both sides in one forward pass, with the same padding."""
    prompts = [pair["prompt"] for pair in pairs]
    return collate(prompts + prompts, [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs], pad, device)


def score_pairs(reward_model, pairs, pad, device="cpu", size=128):
    """Scores of the chosen and of the rejected responses, (B,) each."""
    batches = [collate_pairs(pairs[at:at + size], pad, device) for at in range(0, len(pairs), size)]
    sides = [scores.chunk(2) for scores in score_batches(reward_model, batches).split([len(batch) for batch in batches])]
    return torch.cat([chosen for chosen, _ in sides]), torch.cat([rejected for _, rejected in sides])


def train_reward_model(reward_model, pairs, pad, epochs=2, batch_size=64, lr=5e-4, weight_decay=0.1, seed=0, log=lambda **row: None):
    """
    Fit a reward model to pairs of token ids by Bradley-Terry, in place.

    The learning rate falls linearly to 0. `log` is called once a step with the loss in nats and the share of the batch's pairs that the model
    orders right before it learns from them. Raises CanaryError when the loss is not finite.
    """
    device = reward_model.score.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    steps = epochs * -(-len(pairs) // batch_size)
    bar = tqdm(total=steps, desc="reward model", unit="step", dynamic_ncols=True)
    step, right = 0, []
    for epoch in range(epochs):
        for rows in minibatches(len(pairs), batch_size, generator):
            batch = collate_pairs([pairs[row] for row in rows.tolist()], pad, device)
            if step == 0:
                pads_are_inert(reward_model, batch)
            r_chosen, r_rejected = reward_model(batch).chunk(2)                                # (B,) each
            loss = bradley_terry_loss(r_chosen, r_rejected)
            finite(loss, "reward model's", "lower --reward-lr")
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reward_model.parameters(), 1.0)
            optimizer.step()
            right = (right + [win_rate(r_chosen, r_rejected)])[-20:]
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{sum(right) / len(right):.2f}")
            log(step=step, epoch=epoch, loss=loss.item(), accuracy=right[-1])
            bar.update()
            step += 1
    bar.close()
