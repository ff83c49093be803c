"""data.py: text that survives the tokenizer, the batch layout against a layout made by hand, and every kind of bad preference file."""

import gzip
import json
import random

import pytest
import torch
from helpers import few
from hypothesis import given
from hypothesis import strategies as st

import data
from data import (
    END,
    PAD,
    Batch,
    DataError,
    collate,
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
any_lists = st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=6)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

@few
@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    """Text lost on the way: blanks merged, signs dropped, characters outside the training text turned into question marks."""
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and decode(TOKENIZER, ids) == text and decode(TOKENIZER, [*ids, end_id(TOKENIZER)]) == text
    assert all(0 <= token < end_id(TOKENIZER) for token in ids)


@pytest.mark.parametrize("text", ["", " ", "\n\nHuman: hi\r\n\t x  y   ", "über 日本 🙂", END, f"a{PAD} b", "\x00\x7f", "the plot  was\ngood ."])
def test_awkward_text_survives_the_tokenizer(text):
    """The special tokens written out in a user's text must not become E or PAD, and no white space may be normalised."""
    ids = TOKENIZER.encode_ordinary(text)
    assert TOKENIZER.decode(ids) == text and end_id(TOKENIZER) not in ids and pad_id(TOKENIZER) not in ids


def test_a_piece_is_one_token():
    """Pieces that are never used: a frequent piece must come out as the one token that was made for it, in the order given, after the 256 bytes."""
    for n, piece in enumerate(PIECES):
        assert TOKENIZER.encode_ordinary(piece) == [256 + n]
    assert TOKENIZER.encode_ordinary("the plot was bad .") == [262, 257, 258, 260, 261]
    assert TOKENIZER.encode_ordinary("z") == [ord("z")] and len(TOKENIZER.encode_ordinary("xyzzy")) == 5


def test_e_and_pad_are_the_last_ids_and_differ():
    """PAD equals EOS: the two must have ids of their own, the last two of the vocabulary, where `generate` looks for them."""
    assert (end_id(TOKENIZER), pad_id(TOKENIZER)) == (256 + len(PIECES), 257 + len(PIECES)) and TOKENIZER.n_vocab == 258 + len(PIECES)
    assert TOKENIZER.decode([end_id(TOKENIZER), pad_id(TOKENIZER)]) == END + PAD and END != PAD
    doubled = make_tokenizer([" a", " b", " a", "x"])  # a piece named twice, or a single byte, takes no second id
    assert doubled.encode_ordinary(" a b") == [256, 257] and (end_id(doubled), pad_id(doubled)) == (258, 259)


def test_decode_drops_only_the_e_at_the_end():
    """E in the text that is judged, or a real token eaten: only one E, only at the end, is left out."""
    end, word = end_id(TOKENIZER), TOKENIZER.encode_ordinary(" good")
    assert decode(TOKENIZER, [*word, end]) == decode(TOKENIZER, word) == " good"
    assert decode(TOKENIZER, [*word, end, end]) == " good" + END and decode(TOKENIZER, [end, *word]) == END + " good"
    assert decode(TOKENIZER, []) == decode(TOKENIZER, [end]) == "" and decode(TOKENIZER, [pad_id(TOKENIZER)]) == PAD
    assert decode(TOKENIZER, torch.tensor([*word, end]).tolist()) == " good" and decode(TOKENIZER, iter([*word, end])) == " good"


def test_frequent_pieces_are_the_most_frequent_ones():
    """A vocabulary that changes from run to run, keeps rare pieces or single bytes: counted by hand, ties in alphabetical order."""
    texts = ["a the film was bad .", " film , the  film ...", "x the é the"]
    # by hand: ' the' 4; ' film' 3 (the first of its two blanks is a piece of one byte); the others 1, '.' before '...'
    expected = [" the", " film", " ,", " .", " ...", " bad", " was", " é"]
    assert frequent_pieces(texts, 99) == expected and frequent_pieces(texts, 3) == expected[:3]
    assert frequent_pieces(texts[::-1], 99) == expected and frequent_pieces([], 5) == []
    assert frequent_pieces(["b  \n\n  the"], 9) == ["  \n\n ", " the"]  # white space before a word's own blank is one piece
    assert frequent_pieces(["éa"] * 2 + ["é"] * 3, 9) == ["é", "éa"]  # longer than a byte, not than a character


# ---------------------------------------------------------------------------------------------------------------------
# the batch

@few
@given(any_lists)
def test_collate_pads_prompts_left_and_responses_right(rows):
    """The layout: prompts must end at column P-1 and responses begin at column P, with lengths and mask that say which columns are real."""
    prompts, responses = [p for p, _ in rows], [r for _, r in rows]
    batch = collate(prompts, responses, 99)
    P, R = max(len(p) for p in prompts), max(len(r) for r in responses)
    assert (batch.P, batch.R, len(batch)) == (P, R, len(rows)) and batch.ids.dtype == torch.long
    assert batch.ids.shape == (len(rows), P + R) and batch.responses.shape == batch.mask.shape == (len(rows), R)
    assert batch.mask.dtype == torch.bool
    for row, (prompt, response) in enumerate(rows):
        for column in range(P + R):
            i, j = column - (P - len(prompt)), column - P
            expected = prompt[i] if 0 <= i < len(prompt) else response[j] if 0 <= j < len(response) else 99
            assert batch.ids[row, column] == expected
            if j >= 0:
                assert batch.responses[row, j] == expected and batch.mask[row, j] == (j < len(response))
    assert batch.prompt_lens.tolist() == [len(p) for p in prompts] and batch.response_lens.tolist() == [len(r) for r in responses]
    assert batch.response_ids() == responses
    left, lengths = pad_prompts(prompts, 99)
    assert torch.equal(left, batch.ids[:, :P]) and torch.equal(lengths, batch.prompt_lens) and left.dtype == torch.long


def test_a_batch_of_empty_responses_keeps_its_rows():
    """Zero-length responses: a batch without response columns must still have its rows, in the right shape."""
    batch = collate([[1, 2], [3]], [[], []], 9)
    assert batch.ids.tolist() == [[1, 2], [9, 3]] and batch.ids.dtype == torch.long and batch.R == 0 and batch.mask.shape == (2, 0) and batch.response_ids() == [[], []]


def test_the_mask_comes_from_lengths():
    """PAD equals EOS: a token that is equal to PAD, or an E in the middle, is a real token as long as the lengths say so."""
    batch = collate([[9, 1], [9]], [[9, 9, 5], [9]], 9)
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.response_ids() == [[9, 9, 5], [9]]


def test_collate_refuses_unequal_lists():
    """Rows silently dropped by zip when a response is missing."""
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        collate([[1], [2]], [[1]], 0)


def test_collate_builds_on_the_asked_device():
    """A tensor left on the CPU, which nobody without a GPU would notice: 'meta' is a device that every machine has."""
    batch, (left, lengths) = collate([[1, 2], [3]], [[4], []], 0, device="meta"), pad_prompts([[1, 2], [3]], 0, device="meta")
    assert {x.device.type for x in (batch.ids, batch.prompt_lens, batch.response_lens, batch.mask, left, lengths)} == {"meta"}


def test_select_and_to_keep_what_belongs_to_a_row_together():
    """Rows out of step: after a selection the lengths must still be those of the same row; every tensor carries its row's number here."""
    batch = Batch(torch.arange(5)[:, None].expand(5, 7).clone(), torch.arange(5), torch.arange(5), 3)
    for rows in (torch.tensor([4, 0, 2]), torch.tensor([1, 1]), [3, 2], torch.tensor([True, False, False, True, True]), slice(1, 3)):
        part, wanted = batch.select(rows), torch.arange(5)[rows]
        assert torch.equal(part.prompt_lens, wanted) and torch.equal(part.response_lens, wanted)
        assert torch.equal(part.ids, wanted[:, None].expand(-1, 7)) and part.P == 3 and part.R == 4 and len(part) == len(wanted)
    moved = batch.to("meta")
    assert {x.device.type for x in (moved.ids, moved.prompt_lens, moved.response_lens)} == {"meta"} and moved.P == 3
    assert torch.equal(batch.to("cpu").ids, batch.ids)


@few
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 9))
def test_minibatches_cover_each_row_once(n, size, seed):
    """Rows left out or seen twice in an epoch: a last minibatch that is dropped, or draws with replacement."""
    parts = minibatches(n, size, rng(seed))
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert [len(part) for part in parts] == [size] * (n // size) + [n % size] * (n % size > 0)


def test_minibatches_are_shuffled_by_their_generator():
    """The same order in every epoch, an order that the seed does not decide, or one that draws on the global state."""
    generator = rng(1)
    first, second = (torch.cat(minibatches(50, 8, generator)).tolist() for _ in range(2))
    torch.manual_seed(99)
    assert torch.cat(minibatches(50, 8, rng(1))).tolist() == first
    assert first != second and first != list(range(50))


# ---------------------------------------------------------------------------------------------------------------------
# preference files: what is read

def write(path, *rows):
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(lines)
    return path


GOOD = {"prompt": "how was it ?", "chosen": "fine .", "rejected": "bad ."}
READ = {"prompt": "how was it ?", "chosen": " fine .", "rejected": " bad ."}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_pairs_are_read_in_order(name, tmp_path):
    """Chosen and rejected swapped, blank lines taken for faults, other keys refused, non-ASCII text broken, gz not understood."""
    other = {"id": 7, "rejected": "Ñ \u2028 ", "chosen": " 好", "prompt": "é\n"}
    path = write(tmp_path / name, GOOD, "", "   ", json.dumps(other, ensure_ascii=False), GOOD)
    assert read_pairs(path) == [READ, {"prompt": "é\n", "chosen": " 好", "rejected": "Ñ \u2028 "}, READ] == read_pairs(str(path))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_files_are_utf8_on_every_machine(name, tmp_path, monkeypatch):
    """Text garbled on Windows only: here is a machine whose files are latin-1 unless the encoding is named."""
    path = write(tmp_path / name, json.dumps({"prompt": "é", "chosen": " 好", "rejected": " ñ"}, ensure_ascii=False))
    gzip_open = gzip.open
    monkeypatch.setattr(data, "open", lambda *a, **k: open(*a, **{"encoding": "latin-1", **k}), raising=False)
    monkeypatch.setattr(gzip, "open", lambda *a, **k: gzip_open(*a, **{"encoding": "latin-1", **k}))
    assert read_pairs(path) == [{"prompt": "é", "chosen": " 好", "rejected": " ñ"}]


@pytest.mark.parametrize("prompt, response, expected", [
    ("q:", "yes", " yes"), ("q:", " yes", " yes"), ("q:", "\nyes", "\nyes"), ("q:", "  yes", "  yes"),
    ("q: ", "yes", "yes"), ("q:\n", "yes", "yes"), ("q: ", " yes", " yes"), ("q:", "", " "), ("q: ", "", ""),
])
def test_one_blank_stands_between_prompt_and_response(prompt, response, expected):
    """The boundary: a response without its blank is tokenised into words that the model never sees elsewhere; a second blank is as bad."""
    for pair in ({"chosen": response, "rejected": "no"}, {"chosen": "no", "rejected": response}):
        read = parse_pair(json.dumps({"prompt": prompt, **pair}))
        assert expected in (read["chosen"], read["rejected"]) and read["prompt"] == prompt
        assert read["chosen" if pair["chosen"] == response else "rejected"] == expected


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (f"{H} hi{A}", " hello", " go away"),
    (f"{H} hi{A} yes{H} and now{A}", " this", " that"),                    # several turns are shared
    (f"{H} hi{A}", " I think so", " I think not"),                         # the responses share their first words
    (f"{H} hi{A}", " no", f" yes{H} sure{A} no"),                          # the rejected text goes on with a turn of its own
    (f"{H} hi{A}", f" one{H} more{A} no", f" two{H} more{A} no"),          # both go on, after they have parted
    (f"{H} hi{A}", "", " go away"),                                        # nothing was said
    (f"{H} hi{A}", " hello", f" hello{H} thanks{A} bye"),                  # one is the beginning of the other
    (f"{H} hi{A}", " x\n\nAs I said", f" x{H} y{A} z"),                    # they part inside something that looks like a new turn
    (f"{H} hi{A} a{H} b{A}", " same", " same"),
])
def test_transcripts_split_where_their_shared_beginning_last_asks_the_assistant(prompt, chosen, rejected):
    """HH transcripts cut at the wrong turn: the last 'Assistant:' of one text alone, or the first of many, would put a response into the prompt."""
    assert split_transcripts(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)
    assert split_transcripts(prompt + rejected, prompt + chosen) == (prompt, rejected, chosen)
    row = parse_pair(json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}))
    assert row["prompt"] == prompt and row["chosen"].strip() == chosen.strip() and row["rejected"].strip() == rejected.strip()


def test_transcripts_whose_marker_is_only_half_shared():
    """The shared beginning ends inside the marker: what is not shared by both is no part of the prompt."""
    with pytest.raises(ValueError, match="share no turn"):
        split_transcripts(f"{H} hi\n\nAssistant: x", f"{H} hi\n\nAssistance: x")
    with pytest.raises(ValueError, match="share no turn"):
        split_transcripts(f"{H} hi\n\nAssistant", f"{H} hi\n\nAssistant")
    assert split_transcripts(A + "a", A + "b") == (A, "a", "b")


def test_transcripts_that_differ_in_one_letter():
    """The shared beginning measured one letter wrong: wherever two transcripts part, the prompt ends at the last marker that is whole in both."""
    text = f"{H} a{A} b{H} c{A} d{H} e{A} f"
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(A)]
    for at in range(len(text)):
        other = text[:at] + "#" + text[at + 1:]
        whole = [end for end in ends if end <= at]
        if whole:
            assert split_transcripts(text, other) == (text[:whole[-1]], text[whole[-1]:], other[whole[-1]:])
        else:
            with pytest.raises(ValueError, match="share no turn"):
                split_transcripts(text, other)


# ---------------------------------------------------------------------------------------------------------------------
# preference files: what is refused

def is_told_in_one_line(error):
    """No line break, and no second traceback above the first."""
    return "\n" not in str(error) and error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


@pytest.mark.parametrize("line, fault", [
    ("{'prompt': 1}", "not JSON"),
    ('{"prompt": "a", "chosen"', "not JSON"),
    ("[" * 100_000, "brackets within brackets"),
    ("[1, 2]", "expected an object.* list"),
    ('"text"', "expected an object.* str"),
    ("null", "expected an object.* NoneType"),
    ({"prompt": "a", "rejected": "b"}, '"chosen" is missing'),
    ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    ({**GOOD, "prompt": None}, '"prompt" should be a text, found NoneType'),
    ({**GOOD, "chosen": 3}, '"chosen" should be a text, found int'),
    ({**GOOD, "rejected": ["x"]}, '"rejected" should be a text, found list'),
    ({**GOOD, "prompt": ""}, "the prompt is empty"),
    ({**GOOD, "prompt": " \n "}, "the prompt is empty"),
    ({"chosen": "hello", "rejected": "go away"}, "share no turn"),
])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_a_bad_line_is_named_with_its_number_and_its_fault(line, fault, name, tmp_path):
    """A traceback instead of an explanation: file, line number (blank lines counted) and fault belong into one line."""
    path = write(tmp_path / name, GOOD, "", GOOD, line, GOOD)
    with pytest.raises(DataError, match=fault) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 4: ") and is_told_in_one_line(caught.value)


def test_collate_refuses_what_has_no_first_token():
    """Silent nonsense: the first response token of an empty prompt is scored from a pad, at 1 / V."""
    for prompts in ([[]], [[1], []]):
        with pytest.raises(ValueError, match="empty prompt"):
            collate(prompts, [[2]] * len(prompts), 9)
    with pytest.raises(ValueError, match="no prompts"):
        collate([], [], 9)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    """A file that an editor of Windows saved is refused at its first line, or the mark becomes part of a text."""
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert read_pairs(path) == read_pairs(write(tmp_path / "plain.jsonl", GOOD))


def test_a_bad_file_is_named_with_its_fault(tmp_path):
    """A traceback instead of an explanation: missing, a directory, empty, only blank lines, not UTF-8, not gzip, a gzip that breaks off."""
    bad = {tmp_path / "missing.jsonl": "No such file", tmp_path: "directory"}
    bad[write(tmp_path / "empty.jsonl")] = bad[write(tmp_path / "blank.jsonl", "", "  ")] = bad[write(tmp_path / "empty.jsonl.gz")] = "no pairs in it"
    latin, plain, broken, flipped = (tmp_path / name for name in ("latin.jsonl", "plain.jsonl.gz", "broken.jsonl.gz", "flipped.jsonl.gz"))
    latin.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    plain.write_text(json.dumps(GOOD))
    whole = gzip.compress(("\n".join(json.dumps({**GOOD, "n": random.Random(n).random()}) for n in range(200))).encode())
    broken.write_bytes(whole[:len(whole) // 2])
    flipped.write_bytes(whole[:100] + bytes(255 - b for b in whole[100:200]) + whole[200:])
    bad |= {latin: "utf-8", plain: "gzip", broken: "ended|cannot be read", flipped: "cannot be read"}
    for path, fault in bad.items():
        with pytest.raises(DataError, match=fault) as caught:
            read_pairs(path)
        assert str(caught.value).startswith(f"{path}: ") and is_told_in_one_line(caught.value)
    assert issubclass(DataError, ValueError)


# ---------------------------------------------------------------------------------------------------------------------
# pairs as token ids

def test_pairs_are_encoded_with_one_e_each():
    """EOS missing or doubled: prompt and responses are tokenised separately, each response ends in exactly one E, the prompt in none."""
    encoded, counts = encode_pairs([{"prompt": "the plot", "chosen": " was good", "rejected": ""}], TOKENIZER, 10, 10)
    assert encoded == [{"prompt": [262, 257], "chosen": [258, 259, end_id(TOKENIZER)], "rejected": [end_id(TOKENIZER)]}]
    assert counts == {"prompts_cut": 0, "responses_cut": 0, "identical_dropped": 0}
    # 'the' + 'the' would be other tokens if the two were tokenised in one piece
    assert encode_pairs([{"prompt": "t", "chosen": "he", "rejected": "x"}], TOKENIZER, 9, 9)[0][0]["prompt"] == [ord("t")]


def test_long_prompts_lose_their_left_and_long_responses_their_right():
    """Cut at the wrong end, one token too many, E kept on a response that was cut, or cuts that nobody hears of."""
    end = end_id(TOKENIZER)
    pair = {"prompt": "abcd", "chosen": "vwxyz", "rejected": "123"}
    ids = {key: TOKENIZER.encode_ordinary(text) for key, text in pair.items()}
    for p, r in [(9, 9), (5, 6), (4, 6), (4, 5), (3, 4), (2, 3), (1, 1)]:
        (row,), counts = encode_pairs([pair], TOKENIZER, p, r)
        assert row["prompt"] == ids["prompt"][max(0, 4 - p):]
        assert row["chosen"] == (ids["chosen"] + [end] if r >= 6 else ids["chosen"][:r])
        assert row["rejected"] == (ids["rejected"] + [end] if r >= 4 else ids["rejected"][:r])
        assert counts == {"prompts_cut": int(p < 4), "responses_cut": (r < 6) + (r < 4), "identical_dropped": 0}


def test_identical_pairs_are_dropped_and_counted():
    """Pairs that teach nothing: responses that are the same, or the same after the cut, leave a loss of ln 2; a pair that differs must stay."""
    pairs = [
        {"prompt": "abcdef", "chosen": "same", "rejected": "same"},
        {"prompt": "abcdef", "chosen": "12345", "rejected": "12367"},  # the same in the first three tokens
        {"prompt": "abcdef", "chosen": "123", "rejected": "1234"},     # the same once the E is cut off
        {"prompt": "a", "chosen": "12", "rejected": "123"},            # E against a token
        {"prompt": "b", "chosen": "1", "rejected": "2"},
    ]
    encoded, counts = encode_pairs(pairs, TOKENIZER, 5, 3)
    assert [TOKENIZER.decode(pair["prompt"]) for pair in encoded] == ["a", "b"]
    assert counts == {"prompts_cut": 0, "responses_cut": 1, "identical_dropped": 3}
    assert len(encode_pairs(pairs, TOKENIZER, 5, 9)[0]) == 4 and encode_pairs([], TOKENIZER, 5, 3)[0] == []


@few
@given(st.integers(10, 30), st.integers(1, 4), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 9))
def test_no_prompt_is_on_both_sides_of_a_split(prompts, each, share, seed):
    """Validation prompts seen in training: the two sides share no prompt, lose no pair, keep their order, and the seed decides."""
    pairs = [{"prompt": [n % prompts, 1], "chosen": [n], "rejected": [0]} for n in range(prompts * each)]
    train, held_out = split_pairs(pairs, share, random.Random(seed))
    numbers = [[pair["chosen"][0] for pair in side] for side in (train, held_out)]
    assert sorted(numbers[0] + numbers[1]) == list(range(len(pairs))) and all(side == sorted(side) for side in numbers)
    assert not {tuple(pair["prompt"]) for pair in train} & {tuple(pair["prompt"]) for pair in held_out}
    assert len(held_out) == each * max(1, round(share * prompts))
    assert all(pair in pairs for pair in train + held_out)
    assert split_pairs(pairs, share, random.Random(seed)) == (train, held_out)


def test_few_prompts_are_split_pair_by_pair():
    """Nine prompts or fewer: whole prompts cannot be held out evenly, so pairs are; ten are enough; at least one pair is always held out."""
    for prompts in (1, 2, 9, 10, 11):
        pairs = [{"prompt": [max(0, n - 80 + prompts)], "chosen": [n], "rejected": []} for n in range(80)]  # one prompt has most of the pairs
        assert len({tuple(pair["prompt"]) for pair in pairs}) == prompts
        both = 0
        for seed in range(20):
            train, held_out = split_pairs(pairs, 0.25, random.Random(seed))
            assert sorted(pair["chosen"][0] for pair in train + held_out) == list(range(80))
            assert prompts >= 10 or len(held_out) == 20
            both += bool({tuple(pair["prompt"]) for pair in train} & {tuple(pair["prompt"]) for pair in held_out})
        assert both == (20 if prompts < 10 else 0)
    train, held_out = split_pairs(pairs[-3:], 0.05, random.Random(0))
    assert (len(train), len(held_out)) == (2, 1)


def test_different_seeds_hold_out_different_prompts():
    """A split that ignores the generator: always the first or the last prompts."""
    pairs = [{"prompt": [n], "chosen": [1], "rejected": []} for n in range(40)]
    assert len({tuple(p["prompt"][0] for p in split_pairs(pairs, 0.25, random.Random(seed))[1]) for seed in range(10)}) == 10
