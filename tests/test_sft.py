"""Tests of sft.py: the loss and the loop against a slow replay."""

import copy
import math

import pytest
import torch
from helpers import PAIRS, close, finish, naive_response_logprobs, tiny_gpt

from sft import SFTConfig, train_sft

EXAMPLES = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]


def slow_sft(network, steps, lr, batch_size, seed):
    """
    `train_sft` written again, in place: one example at a time, without padding.

    Returns the losses, the lengths of the gradients before clipping, and the picked rows of all steps.
    """
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    losses, norms, picks = [], [], []
    for step in range(steps):
        picks.append(torch.randint(len(EXAMPLES), (batch_size,), generator=generator).tolist())
        logp = torch.cat([naive_response_logprobs(network, *EXAMPLES[i]) for i in picks[-1]])  # of all tokens
        loss = -logp.sum() / len(logp)
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((w.grad ** 2).sum().item() for w in network.parameters()))
        for w in network.parameters():
            w.grad /= max(1.0, norm + 1e-6)  # clip_grad_norm_ adds 1e-6
        rising, falling = (step + 1) / 20, 1 - step / steps
        adam.param_groups[0]["lr"] = lr * min(rising, falling)
        adam.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, picks


def test_loop_equals_a_slow_replay():
    """
    Bug: the loss counts prompt tokens or padding or is a mean over rows, E is not trained, the gradient is not cleared
    or not clipped, the learning rate does not rise and fall, or every step has the same batch.
    """
    network = tiny_gpt(seed=1, layers=1)
    slow = copy.deepcopy(network)
    losses, norms, picks = slow_sft(slow, 30, 0.05, 6, seed=5)
    assert min(norms) < 1 < max(norms)
    assert all(a != b for a, b in zip(picks, picks[1:]))
    rows = finish(train_sft(network, EXAMPLES, SFTConfig(sft_steps=30, sft_lr=0.05, sft_batch=6), 5))
    assert [list(row) for row in rows] == [["step", "loss"]] * 30
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-8)
    for name, w in network.state_dict().items():
        close(w, slow.state_dict()[name], 1e-6)
