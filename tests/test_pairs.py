"""Tests of pairs.py: every form of a preference file, every kind of bad one, and pairs as token ids."""

import gzip
import json
import random

import pytest
from helpers import few
from hypothesis import given
from hypothesis import strategies as st

import pairs
from data import UserError, end_id, make_tokenizer
from pairs import encode_pairs, parse_pair, read_pairs, split_pairs, split_transcripts

TOKENIZER = make_tokenizer([" the", " plot", " was", " good", " bad", " .", "the", "é", " été", "th"])

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

    def latin(path, mode="r", **named):
        return open(path, mode, **(named if "b" in mode else {"encoding": "latin-1", **named}))

    monkeypatch.setattr(pairs, "open", latin, raising=False)
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
    ({**GOOD, "rejected": ["x"]}, '"rejected" should be a text or a list of {"role"'),
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
    lines = [json.dumps({**GOOD, "n": random.Random(n).random()}) for n in range(200)]
    whole = gzip.compress("\n".join(lines).encode())
    half = folder / "half.jsonl.gz"
    half.write_bytes(whole[:len(whole) // 2])
    flipped = folder / "flipped.jsonl.gz"
    flipped.write_bytes(whole[:100] + bytes(255 - b for b in whole[100:200]) + whole[200:])
    return {
        folder / "missing.jsonl": "No such file",
        folder: "is a folder: join its files with cat",
        write(folder / "empty.jsonl"): "no pairs in it",
        write(folder / "blank.jsonl", "", "  "): "no pairs in it",
        write(folder / "empty.jsonl.gz"): "no pairs in it",
        latin: r"latin.jsonl, line 2: not UTF-8 \(invalid start byte at byte 1\): convert the file with iconv",
        half: "ended|cannot be read",
        flipped: "cannot be read",
    }


def test_a_bad_file_is_named_with_its_fault(tmp_path):
    """A traceback instead of one line: the file is missing, a folder, empty, not UTF-8, not gzip, or cut short."""
    for path, fault in bad_files(tmp_path).items():
        with pytest.raises(UserError, match=fault) as caught:
            read_pairs(path)
        assert str(caught.value).startswith(str(path))
        assert is_one_line(caught.value)


# ---- pairs as token ids ----------------------------------------------------------------------------------------------

def test_pairs_are_encoded_with_one_e_each():
    """E is missing or doubled. Each response ends in exactly one E, and the prompt in none."""
    encoded, counts = encode_pairs([{"prompt": "the plot", "chosen": " was good", "rejected": ""}], TOKENIZER, 10, 10)
    end = end_id(TOKENIZER)
    assert encoded == [{"prompt": [262, 257], "chosen": [258, 259, end], "rejected": [end]}]
    assert counts == {"prompts_cut": 0, "responses_cut": 0, "identical_dropped": 0, "prompts_repeated": 0}


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
    encoded, counts = encode_pairs(pairs, TOKENIZER, 5, 3)
    assert [TOKENIZER.decode(pair["prompt"]) for pair in encoded] == ["a", "b"]
    assert counts == {"prompts_cut": 0, "responses_cut": 1, "identical_dropped": 3, "prompts_repeated": 0}
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
