"""Tests of tokens.py: the columns of a run's texts, and pairs as token ids that fit."""

import pytest
import torch
from helpers import fitted

from data import UserError, end_id, make_tokenizer
from pipeline.tokens import KEYS, describe, encode_columns, is_encoded, pack, unpack

TOKENIZER = make_tokenizer([" the", " plot", " was", " good", " bad", " .", "the", "é", " été", "th"])


def test_pairs_are_encoded_with_one_e_each():
    """E is missing or doubled. Each response ends in exactly one E, and the prompt in none."""
    encoded, counts = fitted(TOKENIZER, [{"prompt": "the plot", "chosen": " was good", "rejected": ""}], 10, 10)
    end = end_id(TOKENIZER)
    assert encoded == [{"prompt": [262, 257], "chosen": [258, 259, end], "rejected": [end]}]
    assert counts == {"prompts_cut": 0, "responses_cut": 0, "identical_dropped": 0, "prompts_repeated": 0}


@pytest.mark.parametrize("rows", [[], [[]], [[], [70000, 3], [], [0]], [[1, 2, 3], [4], [5, 6]]])
def test_packed_ids_come_back(rows):
    """A row loses its last id, takes one of its neighbour, or is left out when it is empty."""
    ids, lengths = pack(iter(rows))
    assert ids.dtype == torch.int32 and list(unpack((ids, lengths))) == rows
    assert is_encoded({"prompt": (ids, lengths)}, 70001)
    assert all(not row or all(type(i) is int for i in row) for row in unpack((ids, lengths)))


@pytest.mark.parametrize("ids, lengths", [
    ([0, 9], [2]), ([-1, 0], [2]),                # no such id
    ([0, 1], [1]), ([0, 1], [3]), ([0], [2, -1]), ([], [1]),
])
def test_ids_that_pack_did_not_make(ids, lengths):
    """Ids of another vocabulary end in an index error, or the rows are shifted against each other."""
    assert not is_encoded({"prompt": (torch.tensor(ids), torch.tensor(lengths))}, 9)


def test_columns_that_do_not_fit_together():
    """The pairs end where the shortest column ends, and nobody is told."""
    pairs = [{"prompt": "the plot", "chosen": " good", "rejected": " was bad"}] * 2
    columns = encode_columns(pairs, TOKENIZER)
    assert is_encoded(columns, TOKENIZER.n_vocab) and is_encoded({"prompt": columns["prompt"]}, TOKENIZER.n_vocab)
    for name in columns:
        assert not is_encoded({**columns, name: encode_columns(pairs[:1], TOKENIZER)[name]}, TOKENIZER.n_vocab)
        assert not is_encoded({key: columns[key] for key in columns if key != name}, TOKENIZER.n_vocab)
    for name in ("identical", "repeated"):  # one number a row
        assert not is_encoded({**columns, name: columns["prompt"]}, TOKENIZER.n_vocab)
    assert not is_encoded({}, TOKENIZER.n_vocab)


def test_a_column_for_each_key():
    """The ids of chosen stand for those of rejected; or a world of prompts alone cannot be encoded."""
    texts = [{"prompt": "the plot", "chosen": " good", "rejected": " was bad"},
             {"prompt": "the", "chosen": " was  bad\n", "rejected": " was bad", "repeated": True}]
    columns = {key: list(unpack(column)) for key, column in encode_columns(texts, TOKENIZER).items()}
    assert columns == {"identical": [[0], [1]], "repeated": [[0], [1]],
                       **{key: [TOKENIZER.encode_ordinary(text[key]) for text in texts] for key in KEYS}}
    assert list(encode_columns([{"prompt": "the"}], TOKENIZER)) == ["prompt"]
    assert {key: list(unpack(column)) for key, column in encode_columns([], TOKENIZER).items()} == {
        "prompt": [], "chosen": [], "rejected": [], "identical": [], "repeated": []}


def test_prompt_and_response_are_tokenised_separately():
    """A token that spans the border: 't' + 'he' in one piece would be the token 'the'."""
    (pair,), _ = fitted(TOKENIZER, [{"prompt": "t", "chosen": "he", "rejected": "x"}], 9, 9)
    assert pair["prompt"] == [ord("t")]
    assert pair["chosen"] == [ord("h"), ord("e"), end_id(TOKENIZER)]


@pytest.mark.parametrize("p, r", [(9, 9), (5, 6), (4, 6), (4, 5), (3, 4), (2, 3), (1, 1)])
def test_long_prompts_lose_their_left_and_long_responses_their_right(p, r):
    """Cut at the wrong end, one token too many, an E after a response that was cut, or cuts that are not counted."""
    end = end_id(TOKENIZER)
    pair = {"prompt": "abcd", "chosen": "vwxyz", "rejected": "123"}
    ids = {key: TOKENIZER.encode_ordinary(text) for key, text in pair.items()}
    (row,), counts = fitted(TOKENIZER, [pair], p, r)
    assert row["prompt"] == ids["prompt"][max(0, 4 - p):]
    assert row["chosen"] == (ids["chosen"] + [end])[:r]
    assert row["rejected"] == (ids["rejected"] + [end])[:r]
    assert counts == {"prompts_cut": int(p < 4), "responses_cut": (r < 6) + (r < 4), "identical_dropped": 0,
                      "prompts_repeated": 0}


def test_identical_pairs_are_dropped_and_counted():
    """Pairs of two responses that are equal, before or after the cut, teach nothing. Others must stay."""
    pairs = [
        {"prompt": "abcdef", "chosen": "same", "rejected": "same"},
        {"prompt": "abcdef", "chosen": "12345", "rejected": "12367"},  # the first three tokens are equal
        {"prompt": "abcdef", "chosen": "123", "rejected": "1234"},     # equal when the E is cut off
        {"prompt": "a", "chosen": "12", "rejected": "123"},            # E against a token
        {"prompt": "b", "chosen": "1", "rejected": "2"},
    ]
    encoded, counts = fitted(TOKENIZER, pairs, 5, 3)
    assert [TOKENIZER.decode(pair["prompt"]) for pair in encoded] == ["a", "b"]
    assert counts == {"prompts_cut": 0, "responses_cut": 1, "identical_dropped": 3, "prompts_repeated": 0}
    assert len(fitted(TOKENIZER, pairs, 5, 9)[0]) == 4
    assert fitted(TOKENIZER, [], 5, 3)[0] == []


def test_what_was_cut_is_said():
    """Counts that are wrong or not printed."""
    pair = {"prompt": "was it good ?", "chosen": " fine .", "rejected": " no ."}
    texts = [{**pair, "repeated": True}, pair, {**pair, "repeated": True}, {**pair, "rejected": " fine\n. "}]
    encoded, counts = fitted(TOKENIZER, texts, 90, 90)
    assert len(encoded) == 3
    assert counts == {"prompts_cut": 0, "responses_cut": 0, "identical_dropped": 1, "prompts_repeated": 2}
    assert describe(counts) == (
        "0 prompts cut on the left, 0 responses cut on the right, 1 pairs dropped because their two responses are the "
        "same; in 2 pairs a response repeated the prompt, which was cut off")
    assert "repeated" not in describe({**counts, "prompts_repeated": 0})


def test_nothing_is_left_after_the_cut():
    """All responses begin alike: a traceback of a stage that finds no pair."""
    texts = [{"prompt": "p", "chosen": " abcd", "rejected": " abcx"}] * 3
    with pytest.raises(UserError, match="no pair of 3 is left .* the same within 4 tokens; raise --response-tokens"):
        fitted(TOKENIZER, texts, 9, 4)
    assert len(fitted(TOKENIZER, texts, 9, 5)[0]) == 3
