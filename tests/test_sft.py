"""Tests of sft.py: the loss and the loop against a slow replay."""

import pytest
import slow
import torch
from helpers import PAIRS, finish, rng, tiny_gpt

from sft import SFTConfig, train_sft

EXAMPLES = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]


def test_loop_equals_a_slow_replay():
    """Bug: the loss of other tokens, a mean over rows, gradients not cleared or clipped, a rate that does not fall."""
    network, twin = tiny_gpt(seed=1, layers=1), tiny_gpt(seed=1, layers=1)
    rows = finish(train_sft(network, EXAMPLES, SFTConfig(sft_steps=12, sft_lr=0.1, sft_batch=18), 5))
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator, norms = rng(5), []
    for step, row in enumerate(rows):
        picks = torch.randint(len(EXAMPLES), (18,), generator=generator).tolist()
        logp = torch.cat([slow.logprobs(twin, *EXAMPLES[i]) for i in picks])  # of all tokens
        loss = -logp.sum() / len(logp)
        norms.append(slow.step(twin, adam, 0.1 * min((step + 1) / 20, 1 - step / 12), loss))
        assert row.pop("tokens") == sum(len(prompt + response) for prompt, response in (EXAMPLES[i] for i in picks))
        assert row == pytest.approx(dict(step=step, loss=loss.item()), rel=0, abs=1e-8)
    assert len(rows) == 12 and min(norms) < 1 < max(norms)
    slow.same_weights(network, twin, 1e-6)
