"""Tests of data.py: any text survives the tokenizer, the batch layout, and every kind of bad preference file."""

import gzip
import json
import random

import pytest
import torch
from helpers import PAD as PAD_ID
from helpers import PAIRS as ID_PAIRS
from helpers import E, few, is_pad, make_batch, random_batch, rng, rows_of
from hypothesis import given
from hypothesis import strategies as st

import data
from data import (
    END,
    PAD,
    Batch,
    UserError,
    by_length,
    collate,
    collate_pairs,
    decode,
    encode_pairs,
    end_id,
    frequent_pieces,
    make_tokenizer,
    minibatches,
    pad_id,
    pad_prompts,
    parse_pair,
    read_pairs,
    split_pairs,
    split_transcripts,
)

PIECES = [" the", " plot", " was", " good", " bad", " .", "the", "é", " été", "th"]
TOKENIZER = make_tokenizer(PIECES)
# any character, and often one of these; st.text() does the same, but builds a table of all characters first
common_characters = st.sampled_from(" \n\t.,'ath<|>éß好\u00a0\u2028\U0001f642\x00")
any_character = st.integers(0, 0xD7FF).map(chr) | st.integers(0xE000, 0x10FFFF).map(chr)  # all but surrogates
any_text = st.lists(common_characters | any_character).map("".join)
token = st.integers(0, 10)  # PAD and E are among them: what a token is never decides whether it counts
a_row = st.tuples(st.lists(token, min_size=1, max_size=5), st.lists(token, max_size=5))
any_rows = st.lists(a_row, min_size=1, max_size=6)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

@few
@given(any_text)
def test_any_text_survives_the_tokenizer(text):
    """Text is lost: spaces are merged, signs are dropped, or rare characters become question marks."""
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text
    assert decode(TOKENIZER, ids) == text
    assert decode(TOKENIZER, [*ids, end_id(TOKENIZER)]) == text
    assert all(0 <= token < end_id(TOKENIZER) for token in ids)


@pytest.mark.parametrize("text", ["", " ", "\n\nHuman: hi\r\n\t x  y   ", "über 日本 🙂", END, f"a{PAD} b", "\x00\x7f",
                                  "the plot  was\ngood ."])
def test_awkward_text_survives_the_tokenizer(text):
    """The name of a special token in a user's text becomes E or PAD, or white space is normalised."""
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text
    assert end_id(TOKENIZER) not in ids
    assert pad_id(TOKENIZER) not in ids


def test_a_piece_is_one_token():
    """Pieces are never used. Each must become one token; their ids follow the 256 bytes in the order given."""
    for n, piece in enumerate(PIECES):
        assert TOKENIZER.encode_ordinary(piece) == [256 + n]
    assert TOKENIZER.encode_ordinary("the plot was bad .") == [262, 257, 258, 260, 261]
    assert TOKENIZER.encode_ordinary("z") == [ord("z")]
    assert len(TOKENIZER.encode_ordinary("xyzzy")) == 5


def test_e_and_pad_are_the_last_ids_and_differ():
    """PAD equals E. They must be two ids, the last two of the vocabulary, where `generate` expects them."""
    n = 256 + len(PIECES)
    assert (end_id(TOKENIZER), pad_id(TOKENIZER), TOKENIZER.n_vocab) == (n, n + 1, n + 2)
    assert TOKENIZER.decode([end_id(TOKENIZER), pad_id(TOKENIZER)]) == END + PAD
    assert END != PAD
    repeated = make_tokenizer([" a", " b", " a", "x"])  # a repeated piece, or a single byte, gets no second id
    assert repeated.encode_ordinary(" a b") == [256, 257]
    assert (end_id(repeated), pad_id(repeated)) == (258, 259)


def test_decode_drops_only_the_e_at_the_end():
    """E is part of the text that is judged, or a real token is lost. Only one E at the end is left out."""
    end = end_id(TOKENIZER)
    word = TOKENIZER.encode_ordinary(" good")
    assert decode(TOKENIZER, word) == " good"
    assert decode(TOKENIZER, [*word, end]) == " good"
    assert decode(TOKENIZER, [*word, end, end]) == " good" + END
    assert decode(TOKENIZER, [end, *word]) == END + " good"
    assert decode(TOKENIZER, []) == decode(TOKENIZER, [end]) == ""
    assert decode(TOKENIZER, [pad_id(TOKENIZER)]) == PAD
    ids = [*word, end]
    decode(TOKENIZER, ids)
    assert ids == [*word, end]  # the caller's list stays as it is


def test_frequent_pieces_are_the_most_frequent_ones():
    """A vocabulary that changes from run to run, or that keeps rare pieces or single bytes."""
    texts = ["a the film was bad .", " film , the  film ...", "x the é the"]
    # by hand: ' the' 4 times; ' film' 3 times (the first of its two spaces is a piece of one byte); the others once
    expected = [" the", " film", " ,", " .", " ...", " bad", " was", " é"]
    assert frequent_pieces(texts, 99) == expected
    assert frequent_pieces(texts, 3) == expected[:3]
    assert frequent_pieces(texts[::-1], 99) == expected
    assert frequent_pieces([], 5) == []
    assert frequent_pieces(["b  \n\n  the"], 9) == ["  \n\n ", " the"]  # white space before a word's space is one piece
    assert frequent_pieces(["éa"] * 2 + ["é"] * 3, 9) == ["é", "éa"]  # é is one character, but two bytes


# ---- the batch -------------------------------------------------------------------------------------------------------

@few
@given(any_rows)
def test_collate_pads_prompts_left_and_responses_right(rows):
    """A wrong layout: prompts end at column P-1, responses begin at column P, and the mask is True on real tokens."""
    prompts = [prompt for prompt, _ in rows]
    responses = [response for _, response in rows]
    batch = collate(prompts, responses, PAD_ID)
    P = max(map(len, prompts))
    R = max(map(len, responses))
    assert (batch.P, batch.R, len(batch)) == (P, R, len(rows))
    assert batch.ids.shape == (len(rows), P + R)
    assert batch.responses.shape == batch.mask.shape == (len(rows), R)
    assert batch.ids.dtype == torch.long
    assert batch.mask.dtype == torch.bool
    assert torch.equal(batch.ids, make_batch(prompts, responses, pad=PAD_ID).ids)
    for row, (prompt, response) in enumerate(rows):
        assert batch.ids[row].tolist() == ([PAD_ID] * (P - len(prompt)) + prompt + response
                                           + [PAD_ID] * (R - len(response)))
        assert batch.responses[row].tolist() == batch.ids[row, P:].tolist()
        assert batch.mask[row].tolist() == [t < len(response) for t in range(R)]
    assert batch.prompt_lens.tolist() == [len(prompt) for prompt in prompts]
    assert batch.response_lens.tolist() == [len(response) for response in responses]
    assert batch.response_ids() == responses
    left, lengths = pad_prompts(prompts, PAD_ID)
    assert torch.equal(left, batch.ids[:, :P])
    assert torch.equal(lengths, batch.prompt_lens)
    assert left.dtype == torch.long


def test_a_batch_of_empty_responses_keeps_its_rows():
    """Responses without tokens: the batch has no response columns, and it must still have its rows."""
    batch = collate([[1, 2], [3]], [[], []], 9)
    assert batch.ids.tolist() == [[1, 2], [9, 3]]
    assert batch.ids.dtype == torch.long
    assert batch.R == 0
    assert batch.mask.shape == (2, 0)
    assert batch.response_ids() == [[], []]


def test_the_mask_comes_from_lengths():
    """PAD equals E: a token that equals PAD, or an E in the middle, is a real token if the lengths say so."""
    batch = collate([[9, 1], [9]], [[9, 9, 5], [9]], 9)
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.response_ids() == [[9, 9, 5], [9]]


def test_start_is_the_column_of_the_first_real_token():
    """Off by one, or a prompt that begins with PAD's id is taken for padding: positions are counted from `start`."""
    batch = make_batch([[1, 2, 3], [4], [PAD_ID, 5]], [[6], [7, 8], []], P=5)
    assert batch.start.tolist() == [2, 4, 3]
    for row, (first, (prompt, _)) in enumerate(zip(batch.start.tolist(), rows_of(batch))):
        assert batch.ids[row, first] == prompt[0]
    assert make_batch([[1, 2]], [[3]]).start.tolist() == [0]


@few
@given(any_rows, st.integers(0, 3), st.integers(0, 3))
def test_trim_drops_the_columns_that_are_padding_in_every_row(rows, left, right):
    """A column too many costs time; a column too few cuts a token, or moves prompts against responses."""
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
    assert torch.equal(narrow.trim().ids, narrow.ids)
    assert torch.equal(wide.ids, before)


def test_trim_keeps_a_column_that_is_real_in_one_row():
    """The longest prompt and the longest response may be in different rows; ids that equal PAD are still tokens."""
    batch = make_batch([[1, 2, 3, 4], [PAD_ID]], [[], [5, 6, PAD_ID]], P=6, R=5)
    narrow = batch.trim()
    assert narrow.ids.tolist() == [[1, 2, 3, 4, PAD_ID, PAD_ID, PAD_ID], [PAD_ID] * 4 + [5, 6, PAD_ID]]
    assert (narrow.P, narrow.R) == (4, 3)
    assert torch.equal(is_pad(narrow), is_pad(batch)[:, 2:9])


def test_collate_refuses_unequal_lists():
    """Rows that zip drops in silence when a response is missing."""
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        collate([[1], [2]], [[1]], 0)


def test_collate_refuses_what_has_no_first_token():
    """After an empty prompt the first response token would be predicted from a pad."""
    for prompts in ([[]], [[1], []]):
        with pytest.raises(ValueError, match="empty prompt"):
            collate(prompts, [[2]] * len(prompts), 9)
    with pytest.raises(ValueError, match="no prompts"):
        collate([], [], 9)


def test_collate_pairs_puts_the_chosen_first():
    """Chosen and rejected exchanged or interleaved, a prompt with another's response, an E added to a cut response."""
    batch = collate_pairs(ID_PAIRS, PAD_ID)
    chosen = [(pair["prompt"], pair["chosen"]) for pair in ID_PAIRS]
    rejected = [(pair["prompt"], pair["rejected"]) for pair in ID_PAIRS]
    assert rows_of(batch) == chosen + rejected
    assert (batch.ids[is_pad(batch)] == PAD_ID).all()
    first, second = batch.response_lens.chunk(2)
    assert first.tolist() == [len(pair["chosen"]) for pair in ID_PAIRS]
    assert second.tolist() == [len(pair["rejected"]) for pair in ID_PAIRS]
    assert (batch.P, batch.R) == (4, 5)


def test_collate_pairs_ignores_what_else_a_pair_holds():
    """Pairs of a run also hold their gold, their texts and their split; one pair alone is a batch of two rows."""
    pair = {**ID_PAIRS[0], "gold": [1.0, 0.0], "text": ["a", "b", "c"], "split": "train"}
    assert rows_of(collate_pairs([pair], PAD_ID)) == [([1, 2, 3], [4, 5, E]), ([1, 2, 3], [6, E])]


@pytest.mark.parametrize("rows", [torch.tensor([4, 0, 2]), torch.tensor([1, 1]), [3, 2], slice(1, 3),
                                  torch.tensor([True, False, False, True, True])])
def test_select_keeps_the_fields_of_a_row_together(rows):
    """Ids of one row with the lengths of another. Every field holds the number of its row here."""
    batch = Batch(torch.arange(5)[:, None].expand(5, 7).clone(), torch.arange(5), torch.arange(5), 3)
    part = batch.select(rows)
    expected = torch.arange(5)[rows]
    assert torch.equal(part.prompt_lens, expected)
    assert torch.equal(part.response_lens, expected)
    assert torch.equal(part.ids, expected[:, None].expand(-1, 7))
    assert (part.P, part.R, len(part)) == (3, 4, len(expected))


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
    """Results in the wrong row, or in the wrong column: the ids of the responses must come back where they were."""
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


def test_by_length_makes_parts_of_16_rows():
    """A default that changed by accident: larger parts hold more padding, smaller ones cost more calls."""
    sizes = []

    def lengths(part):
        sizes.append(len(part))
        return part.response_lens

    by_length(lengths, random_batch(B=50))
    assert sizes == [16, 16, 16, 2]


def test_rows_of_equal_length_keep_their_order():
    """An order that is not stable: two runs of the same seed could round differently."""
    batch = length_batch([(1, 2), (2, 1), (1, 1)] * 30)
    seen = []

    def first_ids(part):
        ids = part.ids.gather(1, part.start[:, None])[:, 0]
        seen.extend(ids.tolist())
        return ids

    ids = by_length(first_ids, batch).tolist()
    lengths = [3, 3, 2] * 30
    short = [first for first, n in zip(ids, lengths) if n == 2]
    long = [first for first, n in zip(ids, lengths) if n == 3]
    assert seen == short + long


@few
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_minibatches_cover_each_row_once_in_an_epoch(n, size, epochs, seed):
    """Rows that an epoch leaves out or repeats: the last minibatch is dropped, or rows are drawn with replacement."""
    parts = minibatches(n, size, epochs, rng(seed))
    lengths = [size] * (n // size) + [n % size] * (n % size > 0)
    assert [len(part) for part in parts] == lengths * epochs
    for epoch in range(epochs):
        rows = torch.cat(list(parts[epoch * len(lengths):(epoch + 1) * len(lengths)]))
        assert sorted(rows.tolist()) == list(range(n))


def test_minibatches_are_shuffled_by_their_generator():
    """The same order in every epoch, an order that the seed does not decide, or one that uses the global generator."""
    order = torch.cat(list(minibatches(50, 8, 2, rng(1)))).tolist()
    torch.manual_seed(99)
    assert torch.cat(list(minibatches(50, 8, 2, rng(1)))).tolist() == order
    assert torch.cat(list(minibatches(50, 8, 2, rng(2)))).tolist() != order
    assert order[:50] != order[50:]
    assert order[:50] != list(range(50))


# ---- preference files: what is read ----------------------------------------------------------------------------------

def write(path, *rows):
    """Write a preference file. A row is a dict, or a text that is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return path


GOOD = {"prompt": "how was it ?", "chosen": "fine .", "rejected": "bad ."}
READ = {"prompt": "how was it ?", "chosen": " fine .", "rejected": " bad ."}
both_suffixes = pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])


@both_suffixes
def test_pairs_are_read_in_order(name, tmp_path):
    """Chosen and rejected exchanged, blank lines or other keys refused, other scripts garbled, .gz not understood."""
    other = {"id": 7, "rejected": "Ñ \u2028 ", "chosen": " 好", "prompt": "é\n"}
    path = write(tmp_path / name, GOOD, "", "   ", json.dumps(other, ensure_ascii=False), GOOD)
    assert read_pairs(path) == [READ, {"prompt": "é\n", "chosen": " 好", "rejected": "Ñ \u2028 "}, READ]
    assert read_pairs(str(path)) == read_pairs(path)


@both_suffixes
def test_files_are_utf8_on_every_machine(name, tmp_path, monkeypatch):
    """Text is garbled on Windows only. This test plays a machine that reads latin-1 unless the encoding is named."""
    pair = {"prompt": "é", "chosen": " 好", "rejected": " ñ"}
    path = write(tmp_path / name, json.dumps(pair, ensure_ascii=False))
    gzip_open = gzip.open
    monkeypatch.setattr(data, "open", lambda *a, **k: open(*a, **{"encoding": "latin-1", **k}), raising=False)
    monkeypatch.setattr(gzip, "open", lambda *a, **k: gzip_open(*a, **{"encoding": "latin-1", **k}))
    assert read_pairs(path) == [pair]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    """A file saved by a Windows editor is refused at its first line, or the mark becomes part of a text."""
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert read_pairs(path) == [READ]


@pytest.mark.parametrize("prompt, response, expected", [
    ("q:", "yes", " yes"), ("q:", " yes", " yes"), ("q:", "\nyes", "\nyes"), ("q:", "  yes", "  yes"),
    ("q: ", "yes", "yes"), ("q:\n", "yes", "yes"), ("q: ", " yes", " yes"), ("q:", "", " "), ("q: ", "", ""),
])
def test_one_space_stands_between_prompt_and_response(prompt, response, expected):
    """A response without its space becomes tokens that the model sees nowhere else. A second space does the same."""
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        pair = parse_pair(json.dumps({"prompt": prompt, key: response, other: "no"}))
        assert pair["prompt"] == prompt
        assert pair[key] == expected


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (f"{H} hi{A}", " hello", " go away"),
    (f"{H} hi{A} yes{H} and now{A}", " this", " that"),              # several turns are shared
    (f"{H} hi{A}", " I think so", " I think not"),                   # the responses share their first words
    (f"{H} hi{A}", " no", f" yes{H} sure{A} no"),                    # the rejected text has one more turn
    (f"{H} hi{A}", f" one{H} more{A} no", f" two{H} more{A} no"),    # both have one more turn, after they differ
    (f"{H} hi{A}", "", " go away"),                                  # an empty response
    (f"{H} hi{A}", " hello", f" hello{H} thanks{A} bye"),            # one is the beginning of the other
    (f"{H} hi{A}", " x\n\nAs I said", f" x{H} y{A} z"),              # they differ in what looks like a new turn
    (f"{H} hi{A} a{H} b{A}", " same", " same"),
])
def test_transcripts_are_split_at_their_last_shared_turn(prompt, chosen, rejected):
    """HH transcripts cut at the wrong turn: at the first shared one, or at one that only one of the two texts has."""
    assert split_transcripts(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)
    assert split_transcripts(prompt + rejected, prompt + chosen) == (prompt, rejected, chosen)
    row = parse_pair(json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}))
    assert row["prompt"] == prompt
    assert row["chosen"].strip() == chosen.strip()
    assert row["rejected"].strip() == rejected.strip()


def test_transcripts_whose_marker_is_only_half_shared():
    """The shared beginning ends inside the marker. A marker that is not in both texts does not end the prompt."""
    with pytest.raises(ValueError, match="share no"):
        split_transcripts(f"{H} hi\n\nAssistant: x", f"{H} hi\n\nAssistance: x")
    with pytest.raises(ValueError, match="share no"):
        split_transcripts(f"{H} hi\n\nAssistant", f"{H} hi\n\nAssistant")
    assert split_transcripts(A + "a", A + "b") == (A, "a", "b")


def test_transcripts_that_differ_in_one_letter():
    """Off by one letter: wherever two transcripts differ, the prompt ends at the last marker that is whole in both."""
    text = f"{H} a{A} b{H} c{A} d{H} e{A} f"
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(A)]
    for at in range(len(text)):
        other = text[:at] + "#" + text[at + 1:]
        whole = [end for end in ends if end <= at]
        if whole:
            cut = whole[-1]
            assert split_transcripts(text, other) == (text[:cut], text[cut:], other[cut:])
        else:
            with pytest.raises(ValueError, match="share no"):
                split_transcripts(text, other)


# ---- preference files: what is refused -------------------------------------------------------------------------------

def is_one_line(error):
    """The message has no line break, and no other traceback is printed above it."""
    context_is_hidden = error.__context__ is None or error.__suppress_context__
    return "\n" not in str(error) and error.__cause__ is None and context_is_hidden


@pytest.mark.parametrize("line, fault", [
    ("{'prompt': 1}", "not JSON"),
    ('{"prompt": "a", "chosen"', "not JSON"),
    ("[" * 100_000, "brackets are nested too deeply"),
    ("[1, 2]", 'expected {"prompt".*, found list'),
    ('"text"', 'expected {"prompt".*, found str'),
    ("null", 'expected {"prompt".*, found NoneType'),
    ({"prompt": "a", "rejected": "b"}, '"chosen" is missing'),
    ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    ({**GOOD, "prompt": None}, '"prompt" should be a text, found NoneType'),
    ({**GOOD, "chosen": 3}, '"chosen" should be a text, found int'),
    ({**GOOD, "rejected": ["x"]}, '"rejected" should be a text, found list'),
    ({**GOOD, "prompt": ""}, "the prompt is empty"),
    ({**GOOD, "prompt": " \n "}, "the prompt is empty"),
    ({"chosen": "hello", "rejected": "go away"}, "share no"),
], ids=range(14))
@both_suffixes
def test_a_bad_line_is_named_with_its_number_and_its_fault(line, fault, name, tmp_path):
    """A traceback instead of one line with the file, the line number (blank lines count) and the fault."""
    path = write(tmp_path / name, GOOD, "", GOOD, line, GOOD)
    with pytest.raises(UserError, match=fault) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    assert is_one_line(caught.value)


def bad_files(folder):
    """Files that cannot be read: {path: pattern of the fault}."""
    latin = folder / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    not_gzip = folder / "plain.jsonl.gz"
    not_gzip.write_text(json.dumps(GOOD))
    lines = [json.dumps({**GOOD, "n": random.Random(n).random()}) for n in range(200)]
    whole = gzip.compress("\n".join(lines).encode())
    half = folder / "half.jsonl.gz"
    half.write_bytes(whole[:len(whole) // 2])
    flipped = folder / "flipped.jsonl.gz"
    flipped.write_bytes(whole[:100] + bytes(255 - b for b in whole[100:200]) + whole[200:])
    return {
        folder / "missing.jsonl": "No such file",
        folder: "directory",
        write(folder / "empty.jsonl"): "no pairs in it",
        write(folder / "blank.jsonl", "", "  "): "no pairs in it",
        write(folder / "empty.jsonl.gz"): "no pairs in it",
        latin: "utf-8",
        not_gzip: "gzip",
        half: "ended|cannot be read",
        flipped: "cannot be read",
    }


def test_a_bad_file_is_named_with_its_fault(tmp_path):
    """A traceback instead of one line: the file is missing, a folder, empty, not UTF-8, not gzip, or cut short."""
    for path, fault in bad_files(tmp_path).items():
        with pytest.raises(UserError, match=fault) as caught:
            read_pairs(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert is_one_line(caught.value)


# ---- pairs as token ids ----------------------------------------------------------------------------------------------

def test_pairs_are_encoded_with_one_e_each():
    """E is missing or doubled. Each response ends in exactly one E, and the prompt in none."""
    encoded, counts = encode_pairs([{"prompt": "the plot", "chosen": " was good", "rejected": ""}], TOKENIZER, 10, 10)
    end = end_id(TOKENIZER)
    assert encoded == [{"prompt": [262, 257], "chosen": [258, 259, end], "rejected": [end]}]
    assert counts == {"prompts_cut": 0, "responses_cut": 0, "identical_dropped": 0}


def test_prompt_and_response_are_tokenised_separately():
    """A token that spans the border: 't' + 'he' in one piece would be the token 'the'."""
    (pair,), _ = encode_pairs([{"prompt": "t", "chosen": "he", "rejected": "x"}], TOKENIZER, 9, 9)
    assert pair["prompt"] == [ord("t")]
    assert pair["chosen"] == [ord("h"), ord("e"), end_id(TOKENIZER)]


@pytest.mark.parametrize("p, r", [(9, 9), (5, 6), (4, 6), (4, 5), (3, 4), (2, 3), (1, 1)])
def test_long_prompts_lose_their_left_and_long_responses_their_right(p, r):
    """Cut at the wrong end, one token too many, an E after a response that was cut, or cuts that are not counted."""
    end = end_id(TOKENIZER)
    pair = {"prompt": "abcd", "chosen": "vwxyz", "rejected": "123"}
    ids = {key: TOKENIZER.encode_ordinary(text) for key, text in pair.items()}
    (row,), counts = encode_pairs([pair], TOKENIZER, p, r)
    assert row["prompt"] == ids["prompt"][max(0, 4 - p):]
    assert row["chosen"] == (ids["chosen"] + [end])[:r]
    assert row["rejected"] == (ids["rejected"] + [end])[:r]
    assert counts == {"prompts_cut": int(p < 4), "responses_cut": (r < 6) + (r < 4), "identical_dropped": 0}


def test_identical_pairs_are_dropped_and_counted():
    """Pairs of two responses that are equal, before or after the cut, teach nothing. Others must stay."""
    pairs = [
        {"prompt": "abcdef", "chosen": "same", "rejected": "same"},
        {"prompt": "abcdef", "chosen": "12345", "rejected": "12367"},  # the first three tokens are equal
        {"prompt": "abcdef", "chosen": "123", "rejected": "1234"},     # equal when the E is cut off
        {"prompt": "a", "chosen": "12", "rejected": "123"},            # E against a token
        {"prompt": "b", "chosen": "1", "rejected": "2"},
    ]
    encoded, counts = encode_pairs(pairs, TOKENIZER, 5, 3)
    assert [TOKENIZER.decode(pair["prompt"]) for pair in encoded] == ["a", "b"]
    assert counts == {"prompts_cut": 0, "responses_cut": 1, "identical_dropped": 3}
    assert len(encode_pairs(pairs, TOKENIZER, 5, 9)[0]) == 4
    assert encode_pairs([], TOKENIZER, 5, 3)[0] == []


@few
@given(st.integers(10, 30), st.integers(1, 4), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 9))
def test_no_prompt_is_on_both_sides_of_a_split(n_prompts, each, share, seed):
    """Held-out prompts that were seen in training, pairs that are lost, or an order that the split changes."""
    pairs = [{"prompt": [n % n_prompts, 1], "chosen": [n], "rejected": [0]} for n in range(n_prompts * each)]
    train, heldout = split_pairs(pairs, share, random.Random(seed))
    train_numbers = [pair["chosen"][0] for pair in train]
    heldout_numbers = [pair["chosen"][0] for pair in heldout]
    assert train_numbers == sorted(train_numbers)
    assert heldout_numbers == sorted(heldout_numbers)
    assert sorted(train_numbers + heldout_numbers) == list(range(len(pairs)))
    assert not {tuple(pair["prompt"]) for pair in train} & {tuple(pair["prompt"]) for pair in heldout}
    assert len(heldout) == each * max(1, round(share * n_prompts))
    assert all(pair in pairs for pair in train + heldout)
    assert split_pairs(pairs, share, random.Random(seed)) == (train, heldout)  # the seed decides


def pairs_of_few_prompts(n_prompts):
    """80 pairs; the first prompt has all that the others leave."""
    return [{"prompt": [max(0, n - 80 + n_prompts)], "chosen": [n], "rejected": []} for n in range(80)]


@pytest.mark.parametrize("n_prompts", [1, 2, 9, 10, 11])
def test_few_prompts_are_split_pair_by_pair(n_prompts):
    """With nine prompts or fewer, whole prompts cannot be split in good shares, so pairs are. Ten are enough."""
    pairs = pairs_of_few_prompts(n_prompts)
    assert len({tuple(pair["prompt"]) for pair in pairs}) == n_prompts
    on_both_sides = 0
    for seed in range(20):
        train, heldout = split_pairs(pairs, 0.25, random.Random(seed))
        assert sorted(pair["chosen"][0] for pair in train + heldout) == list(range(80))
        assert n_prompts >= 10 or len(heldout) == 20
        shared = {tuple(pair["prompt"]) for pair in train} & {tuple(pair["prompt"]) for pair in heldout}
        on_both_sides += bool(shared)
    assert on_both_sides == (20 if n_prompts < 10 else 0)


def test_at_least_one_pair_is_held_out():
    """A small share of few pairs is rounded to nothing."""
    train, heldout = split_pairs(pairs_of_few_prompts(11)[-3:], 0.05, random.Random(0))
    assert (len(train), len(heldout)) == (2, 1)


def test_different_seeds_hold_out_different_prompts():
    """A split that ignores the generator: always the first or the last prompts."""
    pairs = [{"prompt": [n], "chosen": [1], "rejected": []} for n in range(40)]
    splits = set()
    for seed in range(10):
        _, heldout = split_pairs(pairs, 0.25, random.Random(seed))
        splits.add(tuple(pair["prompt"][0] for pair in heldout))
    assert len(splits) == 10
