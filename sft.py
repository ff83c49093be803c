"""
Supervised fine-tuning (SFT): the first of the three steps of RLHF. The network imitates demonstrations.

A demonstration is a prompt and a response that somebody wrote. SFT raises the log-probs of the response's tokens, good
and bad responses alike: it can be no better than its demonstrations. The result is where everything else begins. It
samples the responses that people compare (reward.py), it is the start of the reward model and of the policy, and it is
the reference that the policy pays KL to leave.

Pretraining is the same loop on any text: a text is a response to a prompt of one E, as if another text had just ended.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from checks import check_trains, finite, load_parts
from data import collate
from model import response_logprobs


@dataclass
class SFTConfig:
    sft_steps: int = 250   # steps of supervised fine-tuning
    sft_lr: float = 2e-3   # highest learning rate of SFT
    sft_batch: int = 32    # demonstrations in a step


def sft_loss(network, batch):
    """
    The mean of -log pi(token) over the response tokens of the batch, E included: a scalar, nats per token.

    Prompt tokens are not trained on: the network will never have to write a prompt.
    """
    return -response_logprobs(network, batch).sum() / batch.mask.sum()


def train_sft(network, examples, config, seed, checkpoint=None):
    """
    Maximise the likelihood of the responses, in place. examples: (prompt ids, response ids) of each demonstration.

    The learning rate rises for 20 steps and then falls linearly towards 0. A generator: it yields (metrics, parts)
    after each step, and begins from a checkpoint if there is one. Raises CanaryError when a loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)  # 0.95: the usual 0.999 averages over more steps than there are
    check_trains("network", network, config.sft_lr)  # a frozen network would learn nothing, silently
    parts = dict(network=network, optimizer=optimizer, generator=generator)
    for step in range(load_parts(parts, checkpoint), config.sft_steps):
        # 1. a batch of demonstrations, drawn with replacement
        picks = torch.randint(len(examples), (config.sft_batch,), generator=generator).tolist()
        prompts = [examples[i][0] for i in picks]
        responses = [examples[i][1] for i in picks]
        batch = collate(prompts, responses, network.pad, network.device)

        # 2. the loss, and a step; Adam's averages are empty at the start, so the first steps are small
        loss = sft_loss(network, batch)
        value = finite(loss, "SFT", "lower sft_lr or pretrain_lr")
        optimizer.param_groups[0]["lr"] = config.sft_lr * min((step + 1) / 20, 1 - step / config.sft_steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # one odd batch must not undo many steps
        optimizer.step()
        yield dict(step=step, loss=value, tokens=batch.tokens), parts
