"""Tests of data.py: the batch layout, against lists and loops."""

import pytest
import torch
from helpers import PAD, any_rows, few, random_batch, rng
from hypothesis import example, given
from hypothesis import strategies as st

from data import by_length, collate, minibatches


@few
@example([([1, 2], []), ([3], [])])  # no response column at all
@given(any_rows)
def test_collate_pads_prompts_left_and_responses_right(rows):
    """Bug: prompts do not end at column P-1, responses do not begin at P, or the mask comes from ids, not lengths."""
    prompts = [prompt for prompt, _ in rows]
    responses = [response for _, response in rows]
    batch = collate(prompts, responses, PAD)
    P = max(map(len, prompts))
    R = max(map(len, responses))
    assert (batch.P, batch.R, len(batch)) == (P, R, len(rows))
    assert batch.ids.dtype == torch.long
    for row, (prompt, response) in enumerate(rows):
        left, right = [PAD] * (P - len(prompt)), [PAD] * (R - len(response))
        assert batch.ids[row].tolist() == left + prompt + response + right
        assert batch.mask[row].tolist() == [t < len(response) for t in range(R)]
    assert batch.start.tolist() == [P - len(prompt) for prompt in prompts]
    assert batch.prompt_ids() == prompts
    assert batch.response_ids() == responses


@pytest.mark.parametrize("limits, sizes", [(dict(size=3), [3, 3, 2]), (dict(micro_batch=1), [1] * 8), ({}, [8])])
def test_by_length_puts_rows_and_columns_back(limits, sizes):
    """Bug: results in the wrong row or column, or parts of mixed lengths, which hold more padding than they need."""
    batch = random_batch(B=8, min_response=0)
    calls = []

    def responses(part):
        calls.append(part)
        return torch.where(part.mask, part.responses, 0)

    assert torch.equal(by_length(responses, batch, **limits), torch.where(batch.mask, batch.responses, 0))
    last = by_length(lambda part: part.ids[:, part.P - 1], batch, **limits)  # (B,), of the prompts
    assert torch.equal(last, batch.ids[:, batch.P - 1])
    assert [len(part) for part in calls] == sizes
    totals = torch.cat([part.prompt_lens + part.response_lens for part in calls])
    assert torch.equal(totals, (batch.prompt_lens + batch.response_lens).sort().values)
    for part in calls:
        assert (part.P, part.R) == (part.prompt_lens.max(), part.response_lens.max())


@few
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_minibatches_cover_each_row_once_in_an_epoch(n, size, epochs, seed):
    """Bug: an epoch leaves rows out or repeats them, or ends with a minibatch of one row, as noisy as one row is."""
    parts = minibatches(n, size, epochs, rng(seed))
    steps = -(-n // size)  # as few as possible
    assert len(parts) == steps * epochs
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    for at in range(0, len(parts), steps):
        assert sorted(torch.cat(parts[at:at + steps]).tolist()) == list(range(n))
