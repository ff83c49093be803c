"""Tests of pairs.py: every form of a preference file, every kind of bad one, and pairs as token ids."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
import time

import pytest
from helpers import few, fitted
from hypothesis import given
from hypothesis import strategies as st

from data import UserError, make_tokenizer
from pipeline import pairs
from pipeline.pairs import parse_pair, read_pairs, split_pairs, split_transcripts

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


# ---- the split ----------------------------------------------------------------------------------------------------

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


# ---- other people's forms --------------------------------------------------------------------------------------------

def message(role, content):
    return {"role": role, "content": content}


HI, BYE, QUESTION = message("assistant", "hi"), message("assistant", "bye"), message("user", "how ?")
SYSTEM, ASKED = message("system", "be kind"), f"{H} how ?{A}"


@pytest.mark.parametrize("row, expected", [
    ({"prompt": [QUESTION], "chosen": [HI], "rejected": [BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": [QUESTION], "chosen": [QUESTION, HI], "rejected": [QUESTION, BYE]}, (ASKED, " hi", " bye")),
    ({"chosen": [QUESTION, HI], "rejected": [QUESTION, BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": "how ?", "chosen": [QUESTION, HI], "rejected": [QUESTION, BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": "how ?", "chosen": [HI], "rejected": [BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": [QUESTION], "chosen": "hi", "rejected": "bye"}, (ASKED, " hi", " bye")),
    ({"prompt": "how ?", "chosen": [SYSTEM, QUESTION, HI], "rejected": [SYSTEM, QUESTION, BYE]},
     (f"\n\nSystem: be kind{ASKED}", " hi", " bye")),
    ({"prompt": [QUESTION, HI, message("user", "and\r\nnow ?")], "chosen": [BYE], "rejected": [HI]},
     (f"{ASKED} hi{H} and\nnow ?{A}", " bye", " hi")),
    ({"chosen": [QUESTION, HI, QUESTION, HI], "rejected": [QUESTION, HI, QUESTION, BYE]},
     (f"{ASKED} hi{ASKED}", " hi", " bye")),
    ({"chosen": [QUESTION, HI], "rejected": [QUESTION, BYE, QUESTION, HI]}, (ASKED, " hi", f" bye{ASKED} hi")),
    ({"prompt": [dict(QUESTION, name="ann")], "chosen": [QUESTION, HI], "rejected": [dict(QUESTION, id=3), BYE]},
     (ASKED, " hi", " bye")),
])
def test_messages_become_transcripts(row, expected):
    """Messages as TRL writes them are refused, the prompt stands twice, or a role is lost."""
    assert parse_pair(json.dumps(row)) == dict(zip(("prompt", "chosen", "rejected"), expected))


@pytest.mark.parametrize("value", [["x"], [{"role": "user"}], [{"role": ["user"], "content": "x"}], [None],
                                   [{"role": "user", "content": None}], [{"from": "human", "value": "x"}],
                                   [{"role": "wizard", "content": "x"}], [{"role": "user", "content": ["x"]}]])
def test_messages_of_another_kind_are_refused(value):
    """A traceback, or text that is lost, for messages in a form that is not known."""
    for key in ("prompt", "chosen", "rejected"):
        with pytest.raises(ValueError, match=f'"{key}" should be a text or a list of .*system, user, assistant$'):
            parse_pair(json.dumps({"prompt": [QUESTION], "chosen": [HI], "rejected": [BYE], key: value}))


LONG = "tell me about the weather"


@pytest.mark.parametrize("prompt, chosen, rejected, expected", [
    ("how ?", "how ? fine", " how ?bad", (" fine", " bad")),             # both repeat it
    ("\n\nHuman: hi\n\nAssistant:", "Human: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no", (" yes", " no")),
    ("how ?", "how ?", "how ? bad", (" ", " bad")),                      # nothing is left
    ("hello", "hello you", "go", None),                                  # a short one may be by chance
    (LONG, f"{LONG} : sunny", " rain", (" : sunny", " rain")),           # a long one may not
    (LONG, " sun", f"{LONG} : rainy", (" sun", " : rainy")),
    ("go", "gone", "good", None),                                        # not a word of its own
    ("how ?", "fine how ?", "bad how ?", None),                          # not at the start
])
def test_a_repeated_prompt_is_cut_off(prompt, chosen, rejected, expected):
    """The prompt is learned as part of the answer; or the beginning of an answer is cut off."""
    pair = parse_pair(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    cut = pair.pop("repeated", None)
    expected_pair = expected or tuple(text if text[0].isspace() else " " + text for text in (chosen, rejected))
    assert (pair["chosen"], pair["rejected"]) == expected_pair
    assert cut is (None if expected is None else True)
    assert pair["prompt"] == prompt


def test_windows_line_ends_become_line_breaks():
    """A transcript of a Windows machine has no turn that is known."""
    row = {"chosen": f"{H} hi{A} yes\n.".replace("\n", "\r\n"), "rejected": f"{H} hi{A} no".replace("\n", "\r\n")}
    assert parse_pair(json.dumps(row)) == {"prompt": f"{H} hi{A}", "chosen": " yes\n.", "rejected": " no"}


def test_long_transcripts_are_compared_fast():
    """Letter by letter in Python: 160,000 transcripts take a minute."""
    text = H + " x" * 10 ** 6 + A
    started = time.process_time()
    for _ in range(20):
        assert split_transcripts(text + " a", text + " b") == (text, " a", " b")
    assert time.process_time() - started < 2


def test_files_are_known_by_their_content(tmp_path):
    """A gzip file without .gz, or a plain file with it, is refused."""
    write(tmp_path / "a.gz", GOOD).rename(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", GOOD).rename(tmp_path / "b.jsonl.gz")
    assert read_pairs(tmp_path / "a.jsonl") == read_pairs(tmp_path / "b.jsonl.gz") == [READ]


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    assert is_one_line(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["array", "pretty array", "csv", "csv with a mark", "tsv", "utf-16", "utf-16 be",
                                    "folder", "bz2", "lzma"])
def test_the_command_in_the_message_converts_the_file(layout, tmp_path, monkeypatch):
    """Files of other kinds end in `not JSON`, or the advice does not work."""
    rows = [GOOD, {"prompt": "é, \"q\"\n", "chosen": "好", "rejected": "ñ"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "my data.jsonl"
    if "array" in layout:
        path.write_text(json.dumps(rows, indent=1 if "pretty" in layout else None), encoding="utf-8")
    elif "sv" in layout:
        with open(path, "w", encoding="utf-8-sig" if "mark" in layout else "utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], delimiter="\t" if layout == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif layout == "folder":
        path.mkdir()
        for i, row in enumerate(rows):
            write(path / f"{i}.jsonl", row)
    elif layout in ("bz2", "lzma"):
        with dict(bz2=bz2, lzma=lzma)[layout].open(path, "wt", encoding="utf-8") as file:
            file.write(lines)
    else:
        path.write_bytes((b"\xff\xfe" if layout == "utf-16" else b"\xfe\xff")
                         + lines.encode("utf-16-le" if layout == "utf-16" else "utf-16-be"))
    text = refusal(path)
    assert text.startswith(str(path))
    command = text.split(" with ", 1)[1].replace("python -c", f"{sys.executable} -c")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_pairs(tmp_path / command.split("> ")[-1]) == read_pairs(write(tmp_path / "direct.jsonl", *rows))


@pytest.mark.parametrize("start, kind", [
    (b"PAR1\x15\x04", "read_parquet"), (b"PK\x03\x04\x14", "read_excel"), (b"ARROW1\0\0\xff", "read_feather"),
    (b"\x28\xb5\x2f\xfd\x24", "zstd -dc"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")])
def test_tables_are_refused_with_a_command(start, kind, tmp_path):
    """A Parquet, Excel or compressed file is `not UTF-8`, and the pointer to a file is `not JSON`."""
    path = tmp_path / "table.jsonl"
    path.write_bytes(start + bytes(range(256)))
    assert kind in refusal(path) and ("converted.jsonl" in refusal(path) or "git" in kind)


def test_a_pipe_is_refused(tmp_path):
    """The check at the start reads a pipe, and the run finds it empty; or waits for ever."""
    os.mkfifo(tmp_path / "fifo")
    read, write_end = os.pipe()
    for path in ("/dev/null", "-", f"/dev/fd/{read}", tmp_path / "fifo"):
        assert "is a pipe or a device" in refusal(path)
    os.close(read)
    os.close(write_end)


@pytest.mark.parametrize("line, fault", [
    ('{"prompt": "a", "chosen": "b\\ud83d", "rejected": "c"}', r'"chosen" holds half a character, \\ud83d: write'),
    ('{"prompt": "a", "chosen": "b", "chosen": "x", "rejected": "c"}', "it has a key twice"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "n": ' + "9" * 5000 + "}", "limit"),
    ('{"prompt": "a",', "write each pair on a line of its own"),
])
def test_what_cannot_be_meant_is_refused(line, fault, tmp_path):
    """Half a character becomes a question mark, and one of two values is lost, in silence."""
    assert re.search(f"line 2: .*{fault}", refusal(write(tmp_path / "a.jsonl", GOOD, line)))


def test_awkward_texts_are_read_as_they_are(tmp_path):
    """Text is changed: NUL, escape codes, special tokens, an emoji in two halves, a row of 100 kB."""
    for text in ["a\x00b", "\x1b[2J", "<|end|>", "\U0001f642", "x y " * 25_000, " " * 10 ** 6 + "x", "```\n# a"]:
        path = write(tmp_path / "a.jsonl", {"prompt": "p ", "chosen": text, "rejected": "n"})
        assert read_pairs(path)[0]["chosen"] == text
        (row,), _ = fitted(TOKENIZER, read_pairs(path), 9, 10 ** 6 + 9)
        assert TOKENIZER.decode(row["chosen"][:-1]) == text


def test_a_file_without_any_difference_is_refused(tmp_path):
    """Work is done on a file that can teach nothing: all pairs have twice the same response, but for white space."""
    same = {"prompt": "p", "chosen": "a b", "rejected": " a  b\n"}
    assert "the same in every pair" in refusal(write(tmp_path / "a.jsonl", *[same] * 30))
    assert len(read_pairs(write(tmp_path / "b.jsonl", *[same] * 30, GOOD))) == 31


# ---- fuzz ------------------------------------------------------------------------------------------------------------

VALUES = [None, True, 0, -1.5, 10 ** 400, "", " ", "x", "\x00", "<|end|>", "\ud83d", "\u2028", "é" * 50, [], {}, ["x"],
          [QUESTION], [HI], [QUESTION, HI], [{"role": "user"}], [[]], [{"role": {}, "content": 1}], {"prompt": "x"}]
SEEDS = [GOOD, {"prompt": "how ?", "chosen": "how ? a", "rejected": "how ? b"},
         {"chosen": f"{H} hi{A} yes", "rejected": f"{H} hi{A} no"}, {"chosen": [QUESTION, HI], "rejected": [QUESTION]},
         {"prompt": [QUESTION], "chosen": [HI], "rejected": [BYE]}]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000, "{" * 2000, '"\\ud800"', '"\\u0000"', "}"]


def fuzzed(rng):
    """The bytes of a line that may be anything from a good pair to rubbish."""
    row = dict(rng.choice(SEEDS))
    for _ in range(rng.choice([0, 0, 1, 2])):
        row[rng.choice(["prompt", "chosen", "rejected", "id"])] = rng.choice(VALUES)
    for _ in range(rng.choice([0, 0, 0, 1])):
        row.pop(rng.choice(list(row)), None)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    kind = rng.randrange(6)
    if kind == 0:  # bytes
        line = bytearray(line)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(line))
            line[at:at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    elif kind == 1:  # a value
        parts = re.split(rb'("[^"]*")', line)
        parts[rng.randrange(len(parts))] = rng.choice(LITERALS).encode()
        line = b"".join(parts)
    elif kind == 2:  # a key twice, half a line, two lines in one
        line = rng.choice([line[:-1] + b', "chosen": "y"}', line[:rng.randrange(len(line))], line + line])
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


def fuzz(n, folder, seed=0):
    """Read n fuzzed lines, each in a file of its own behind a good one. Returns how many were accepted."""
    rng, accepted = random.Random(seed), 0
    path = folder / "fuzz.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    for _ in range(n):
        line = fuzzed(rng)
        path.write_bytes(good + line)
        try:
            pairs = read_pairs(path)
        except UserError as fault:
            assert "\n" not in str(fault) and str(fault).startswith(f"{path}, line 2: "), line
            continue
        for pair in pairs[1:]:
            accepted += 1
            assert set(pair) - {"repeated"} == {"prompt", "chosen", "rejected"}
            for key in ("prompt", "chosen", "rejected"):
                assert TOKENIZER.decode(TOKENIZER.encode_ordinary(pair[key])) == pair[key]
        fitted(TOKENIZER, pairs, 20, 20)
    return accepted


def test_fuzzed_lines_are_read_or_refused(tmp_path):
    """A traceback for a line that nobody thought of, or a pair of something else than texts."""
    assert 100 < fuzz(1000, tmp_path) < 900
