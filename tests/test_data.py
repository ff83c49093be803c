"""Tests of data.py: the batch layout, against lists and loops."""

import pytest
import torch
from helpers import PAD, PAIRS, E, few, is_pad, make_batch, rng, rows_of
from hypothesis import given
from hypothesis import strategies as st

from data import Batch, by_length, collate, collate_pairs, minibatches, pad_prompts

token = st.integers(0, 10)  # PAD and E are among them: what a token is never decides whether it counts
a_row = st.tuples(st.lists(token, min_size=1, max_size=5), st.lists(token, max_size=5))
any_rows = st.lists(a_row, min_size=1, max_size=6)


# ---- the layout ------------------------------------------------------------------------------------------------------

@few
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
    assert batch.mask.dtype == torch.bool
    assert batch.responses.shape == batch.mask.shape == (len(rows), R)
    for row, (prompt, response) in enumerate(rows):
        left, right = [PAD] * (P - len(prompt)), [PAD] * (R - len(response))
        assert batch.ids[row].tolist() == left + prompt + response + right
        assert batch.responses[row].tolist() == response + right
        assert batch.mask[row].tolist() == [t < len(response) for t in range(R)]
    assert batch.prompt_lens.tolist() == [len(prompt) for prompt in prompts]
    assert batch.response_lens.tolist() == [len(response) for response in responses]
    assert batch.start.tolist() == [P - len(prompt) for prompt in prompts]
    assert batch.prompt_ids() == prompts
    assert batch.response_ids() == responses
    ids, lengths = pad_prompts(prompts, PAD)
    assert ids.dtype == torch.long
    assert torch.equal(ids, batch.ids[:, :P])
    assert torch.equal(lengths, batch.prompt_lens)


def test_a_batch_of_empty_responses_keeps_its_rows():
    """Bug: a batch without response columns has no rows, or ids that are floats."""
    batch = collate([[1, 2], [3]], [[], []], 9)
    assert batch.ids.tolist() == [[1, 2], [9, 3]]
    assert batch.ids.dtype == torch.long
    assert batch.mask.shape == (2, 0)
    assert batch.response_ids() == [[], []]


def test_collate_refuses_what_makes_no_batch():
    """Bug: zip drops a row whose response is missing, or the first response token is predicted from a pad."""
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        collate([[1], [2]], [[1]], 0)
    for prompts in ([[]], [[1], []]):
        with pytest.raises(ValueError, match="empty prompt"):
            collate(prompts, [[2]] * len(prompts), 9)
    with pytest.raises(ValueError, match="no prompts"):
        collate([], [], 9)


def test_collate_pairs_puts_the_chosen_first():
    """Bug: chosen and rejected exchanged or interleaved, a response under another prompt, an E after a cut response."""
    batch = collate_pairs(PAIRS, PAD)
    chosen = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    rejected = [(pair["prompt"], pair["rejected"]) for pair in PAIRS]
    assert rows_of(batch) == chosen + rejected
    assert (batch.ids[is_pad(batch)] == PAD).all()
    more = {**PAIRS[0], "gold": [1.0, 0.0]}  # the pairs of a run hold more than ids
    assert rows_of(collate_pairs([more], PAD)) == [([1, 2, 3], [4, 5, E]), ([1, 2, 3], [6, E])]


@few
@given(any_rows, st.integers(0, 3), st.integers(0, 3))
def test_trim_drops_the_columns_that_are_padding_in_every_row(rows, left, right):
    """Bug: a column too many, which costs time; or one too few, which cuts a token or moves prompts and responses."""
    prompts = [prompt for prompt, _ in rows]
    responses = [response for _, response in rows]
    wide = make_batch(prompts, responses, max(map(len, prompts)) + left, max(map(len, responses)) + right)
    before = wide.ids.clone()
    narrow = wide.trim()
    expected = make_batch(prompts, responses)
    assert torch.equal(narrow.ids, expected.ids)
    assert narrow.P == expected.P
    assert torch.equal(narrow.prompt_lens, wide.prompt_lens)
    assert torch.equal(narrow.response_lens, wide.response_lens)
    assert torch.equal(wide.ids, before)


@pytest.mark.parametrize("rows", [torch.tensor([4, 0, 2]), torch.tensor([1, 1]), [3, 2], slice(1, 3),
                                  torch.tensor([True, False, False, True, True])])
def test_select_keeps_the_fields_of_a_row_together(rows):
    """Bug: the ids of one row with the lengths of another. Every field holds the number of its row here."""
    batch = Batch(torch.arange(5)[:, None].expand(5, 7).clone(), torch.arange(5), torch.arange(5), 3)
    part = batch.select(rows)
    expected = torch.arange(5)[rows]
    assert torch.equal(part.prompt_lens, expected)
    assert torch.equal(part.response_lens, expected)
    assert torch.equal(part.ids, expected[:, None].expand(-1, 7))
    assert (part.P, part.R, len(part)) == (3, 4, len(expected))


# ---- parts of similar length -----------------------------------------------------------------------------------------

def length_batch(lengths, P=4, R=6):
    """A batch with the given (prompt, response) lengths. All its ids are different, so a row can be recognised."""
    prompts, responses, first = [], [], 100
    for p, r in lengths:
        prompts.append(list(range(first, first + p)))
        responses.append(list(range(first + p, first + p + r)))
        first += p + r
    return make_batch(prompts, responses, P, R)


LENGTHS = [(2, 3), (1, 1), (4, 6), (3, 2), (1, 4), (2, 0), (4, 1), (1, 0)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16])
def test_by_length_puts_rows_and_columns_back(size):
    """Bug: results in the wrong row or column, or parts of mixed lengths, which hold more padding than they need."""
    batch = length_batch(LENGTHS)
    calls = []

    def responses(part):
        calls.append(part)
        return torch.where(part.mask, part.responses, 0)

    result = by_length(responses, batch, size)
    assert torch.equal(result, torch.where(batch.mask, batch.responses, 0))
    assert torch.equal(by_length(lambda part: part.response_lens, batch, size), batch.response_lens)
    assert torch.equal(by_length(lambda part: part.ids[:, part.P - 1], batch, size), batch.ids[:, batch.P - 1])

    n = len(LENGTHS)
    assert [len(part) for part in calls] == [size] * (n // size) + [n % size] * (n % size > 0)
    totals = [part.prompt_lens + part.response_lens for part in calls]
    assert torch.cat(totals).tolist() == sorted(p + r for p, r in LENGTHS)
    for part in calls:
        assert part.P == part.prompt_lens.max()
        assert part.R == part.response_lens.max()


def test_by_length_makes_parts_of_16_rows_in_a_fixed_order():
    """Bug: a default that changed by accident, or a sort that is not stable: two runs of a seed round differently."""
    sizes, seen = [], []

    def first_ids(part):
        sizes.append(len(part))
        ids = part.ids.gather(1, part.start[:, None])[:, 0]
        seen.extend(ids.tolist())
        return ids

    ids = by_length(first_ids, length_batch([(1, 2), (2, 1), (1, 1)] * 30)).tolist()
    assert sizes == [16] * 5 + [10]
    short = ids[2::3]
    long = [first for i, first in enumerate(ids) if i % 3 < 2]
    assert seen == short + long


# ---- minibatches -----------------------------------------------------------------------------------------------------

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


def test_minibatches_are_shuffled_by_their_generator():
    """Bug: the same order in every epoch, an order that the seed does not decide, or the global generator."""
    order = torch.cat(minibatches(50, 8, 3, rng(1))).tolist()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.cat(minibatches(50, 8, 3, rng(1))).tolist() == order
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cat(minibatches(50, 8, 3, rng(2))).tolist() != order
    epochs = [order[:50], order[50:100], order[100:], list(range(50))]
    assert len(set(map(tuple, epochs))) == 4
