"""Preference files: every form, every kind of bad line, the split by prompt, and pairs as token ids that fit."""

import gzip
import json
import random
import re
import unicodedata

import pytest
from helpers import few
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.pairs import describe, fit_pair, parse_pair, parse_prompt, read_pairs, split_pairs
from tokenizer import end_id, make_tokenizer

TOKENIZER = make_tokenizer([" the", " plot", " was", " good", " bad", " .", "the", "é", " été", "th"])
END = end_id(TOKENIZER)


# ---- preference files: what is read ----------------------------------------------------------------------------------

def write(path, *rows):
    """Write a preference file. A row is a dict, or a text that is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


GOOD = {"prompt": "how was it ?", "chosen": "fine .", "rejected": "bad ."}
READ = {"prompt": "how was it ?", "chosen": " fine .", "rejected": " bad ."}


def test_pairs_are_read_in_order(tmp_path):
    """Bug: chosen and rejected exchanged, blank lines or other keys refused, .gz not known, a mark of Windows kept."""
    other = {"id": 7, "rejected": "Ñ \u2028 ", "chosen": " 好", "prompt": "é\r\n"}
    lines = ["\ufeff" + json.dumps(GOOD), "", "   ", json.dumps(other, ensure_ascii=False), GOOD]
    path = write(tmp_path / "pairs.jsonl", *lines)
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(path.read_bytes()))  # a file is known by its content
    for name in ("pairs.jsonl", "a.jsonl"):
        assert read_pairs(tmp_path / name) == [READ, {"prompt": "é\n", "chosen": " 好", "rejected": "Ñ \u2028 "}, READ]


def test_one_space_stands_between_prompt_and_response():
    """Bug: a response without its space, or with a second one, becomes tokens that the model sees nowhere else."""
    for prompt, texts, expected in (("q:", ["yes", "no"], [" yes", " no"]), ("q:", ["\nyes", ""], ["\nyes", " "]),
                                    ("q:\n", ["yes", "no"], ["yes", "no"])):
        pair = parse_pair(json.dumps({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}))
        assert [pair["prompt"], pair["chosen"], pair["rejected"]] == [prompt, *expected]


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (f"{H} hi{A} yes{H} and now{A}", " this", " that"),     # several turns are shared
    (f"{H} hi{A}", " no", f" yes{H} sure{A} no"),           # the rejected text has one more turn
    (f"{H} hi{A}", " hello", f" hello{H} thanks{A} bye")])  # one is the beginning of the other
def test_transcripts_are_split_at_their_last_shared_turn(prompt, chosen, rejected):
    """Bug: HH transcripts cut at the first turn that they share, or at one that only one of the two texts has."""
    for first, second in ((chosen, rejected), (rejected, chosen)):
        pair = parse_pair(json.dumps({"chosen": prompt + first, "rejected": prompt + second}))
        assert pair == {"prompt": prompt, "chosen": first, "rejected": second}


# ---- preference files: what is refused -------------------------------------------------------------------------------

def refusal(path):
    """The one line with which a file is refused, its own name first."""
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize("line, fault", [
    ('{"prompt": "a",', "not JSON .* write each pair on its own line"),
    ("[1, 2]", "found list"), ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    ({**GOOD, "chosen": 3}, '"chosen" should be a text, found int'), ({**GOOD, "prompt": " \n "}, "prompt is empty"),
    ({"question": "how ?", "chosen": "b", "rejected": "c"}, "found question, chosen, rejected: .* with --prompt-key"),
    ({**GOOD, "chosen": [{"from": "human", "value": "x"}]}, '"chosen" should be a text or a list'),
    ({**GOOD, "rejected": [{"role": "wizard", "content": "x"}]}, "with the roles system, user, assistant"),
    ({**GOOD, "chosen": "b\ud83d"}, "it holds half a character")], ids=range(9))
def test_a_bad_line_is_named_with_its_number_and_its_fault(line, fault, tmp_path):
    """Bug: a traceback instead of one line with the file, the line number (blank lines count) and the fault."""
    path = write(tmp_path / "pairs.jsonl", GOOD, "", GOOD, line, GOOD)
    assert re.search(f"^{path}, line 4: .*{fault}", refusal(path))


def test_a_bad_file_is_named_with_its_fault(tmp_path):
    """Bug: a traceback: the file is missing, empty, not UTF-8, or cut short."""
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-20])
    (tmp_path / "blank.jsonl").write_text("\n")
    for name, fault in (("missing.jsonl", "is not there"), ("blank.jsonl", "no lines in it"),
                        ("half.jsonl.gz", "cannot be read"), ("latin.jsonl", "line 2: not UTF-8 text")):
        assert fault in refusal(tmp_path / name)


# ---- the split ----------------------------------------------------------------------------------------------------

@few
@given(st.integers(10, 30), st.integers(1, 4), st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 9))
def test_no_prompt_is_on_both_sides_of_a_split(n_prompts, each, share, seed):
    """Bug: a held-out prompt was seen in training, in this or another spelling; pairs are lost, or another share."""
    spellings = [lambda text: text, lambda text: unicodedata.normalize("NFD", text), lambda text: f" {text}\n"]
    pairs = [dict(prompt=spellings[k % 3](f"café {n}"), chosen=f" {k}", rejected=" x")
             for k in range(each) for n in range(n_prompts)]
    train, heldout = split_pairs(pairs, share, random.Random(seed))
    assert sorted(train + heldout, key=str) == sorted(pairs, key=str)
    sides = [{unicodedata.normalize("NFC", pair["prompt"]).strip() for pair in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(heldout) == each * max(1, round(share * n_prompts))
    assert split_pairs(pairs, share, random.Random(seed)) == (train, heldout)  # the seed decides
    assert len(heldout) < 9 or heldout != [pair for pair in pairs if pair in heldout]  # a file sorted by topic is mixed


@pytest.mark.parametrize("n_prompts", [1, 9, 10])
def test_few_prompts_are_split_pair_by_pair(n_prompts):
    """Bug: "accuracy 0.97 on held-out pairs", where most of them are training pairs that are in the file twice."""
    pairs = []
    for i in range(300):
        good, bad = f" good {i % 5}", f" bad {i % 7}"
        chosen, rejected = (good, bad) if i % 2 else (bad + "\n", good)  # in any order and spelling
        pairs.append(dict(prompt=f"prompt {i % n_prompts}", chosen=chosen, rejected=rejected))
    train, heldout = split_pairs(pairs, 0.1, random.Random(0))
    sides = [{(pair["prompt"], *sorted([pair["chosen"].strip(), pair["rejected"].strip()])) for pair in side}
             for side in (train, heldout)]
    assert len(train) + len(heldout) == 300 and heldout and not sides[0] & sides[1]
    if n_prompts < 10:
        assert {pair["prompt"] for pair in train} & {pair["prompt"] for pair in heldout}
        assert len(sides[1]) == round(0.1 * len(sides[0] | sides[1]))


def test_the_share_of_responses_that_were_trained_on():
    """Bug: held-out answers that were trained on in other pairs, and nobody is told."""
    train = [dict(prompt="a", chosen=" yes", rejected=" no"), dict(prompt="b", chosen=" x", rejected=" caf\u00e9")]
    heldout = [dict(prompt="c", chosen="yes ", rejected=" ?"), dict(prompt="d", chosen=" cafe\u0301", rejected=" NO")]
    told = describe(dict(train=train, heldout=heldout), dict(train=[], heldout=[]), TOKENIZER, 5)
    assert told.endswith("; 50% of the held-out responses are trained on, in other pairs")


# ---- token ids -------------------------------------------------------------------------------------------------------

def test_pairs_are_encoded_with_one_e_each():
    """Bug: E is missing or doubled, the prompt has one, or a token spans the border: "t" + "he" would be "the"."""
    pair = fit_pair({"prompt": "the plot", "chosen": " was good", "rejected": ""}, TOKENIZER, 10, 10)
    assert pair == {"prompt": [262, 257], "chosen": [258, 259, END], "rejected": [END]}
    pair = fit_pair({"prompt": "t", "chosen": "he", "rejected": "x"}, TOKENIZER, 9, 9)
    assert pair == {"prompt": [ord("t")], "chosen": [ord("h"), ord("e"), END], "rejected": [ord("x"), END]}


@pytest.mark.parametrize("p, r", [(4, 6), (4, 5), (3, 4)])
def test_long_prompts_lose_their_left_and_long_responses_their_right(p, r):
    """Bug: cut at the wrong end, one token too many, or an E after a response that was cut."""
    pair = {"prompt": "abcd", "chosen": "vwxyz", "rejected": "123"}
    ids = {key: TOKENIZER.encode_ordinary(text) for key, text in pair.items()}
    row = fit_pair(pair, TOKENIZER, p, r)
    assert row["prompt"] == ids["prompt"][max(0, 4 - p):]
    assert row["chosen"] == (ids["chosen"] + [END])[:r] and row["rejected"] == (ids["rejected"] + [END])[:r]


def test_identical_pairs_are_dropped_and_all_is_said():
    """Bug: two responses that are equal, before or after the cut, are a pair; or what was changed is not said."""
    pairs = [
        {"prompt": "abcde", "chosen": "same", "rejected": "same"},     # the longest prompt that is not cut
        {"prompt": "abcdef", "chosen": "12345", "rejected": "12367"},  # the first three tokens are equal
        {"prompt": "abcdef", "chosen": "1 2", "rejected": "1  2\n"},
        {"prompt": "a", "chosen": "12", "rejected": "123"},            # E against a token
        {"prompt": "b", "chosen": "124", "rejected": "2"}]
    fitted = [fit_pair(pair, TOKENIZER, 5, 3) for pair in pairs]
    assert fitted[:3] == [None] * 3 and [pair["prompt"] for pair in fitted[3:]] == [[ord("a")], [ord("b")]]
    texts = dict(train=[pairs[1], pairs[4]], heldout=[pairs[0], pairs[2], pairs[3]])
    kept = dict(train=[fitted[4]], heldout=[fitted[3]])
    assert describe(texts, kept, TOKENIZER, 5) == (
        "1 pairs to train on, 1 held out; 2 prompts cut on the left, 2 responses cut on the right, 3 pairs dropped "
        "because their two responses are the same")
    assert fit_pair(pairs[1], TOKENIZER, 5, 4) is not None


# ---- other people's forms --------------------------------------------------------------------------------------------

def message(role, content):
    return {"role": role, "content": content}


HI, BYE, QUESTION = message("assistant", "hi"), message("assistant", "bye"), message("user", "how ?")
SYSTEM, ASKED = message("system", "be kind"), f"{H} how ?{A}"


@pytest.mark.parametrize("row, expected", [
    ({"chosen": [QUESTION, HI], "rejected": [QUESTION, BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": "how ?", "chosen": [HI], "rejected": [BYE]}, (ASKED, " hi", " bye")),
    ({"prompt": [QUESTION], "chosen": "hi", "rejected": "bye"}, (ASKED, " hi", " bye")),
    ({"prompt": "how ?", "chosen": [SYSTEM, QUESTION, HI], "rejected": [SYSTEM, QUESTION, BYE]},
     (f"\n\nSystem: be kind{ASKED}", " hi", " bye")),
    ({"prompt": [SYSTEM], "chosen": [QUESTION, HI], "rejected": [QUESTION, BYE]},
     (f"\n\nSystem: be kind{ASKED}", " hi", " bye")),
    ({"prompt": [QUESTION, HI, message("user", "and\r\nnow ?")], "chosen": [BYE], "rejected": [HI]},
     (f"{ASKED} hi{H} and\nnow ?{A}", " bye", " hi")),
    ({"prompt": [QUESTION], "chosen": [QUESTION, HI], "rejected": [dict(QUESTION, id=3), BYE]},
     (ASKED, " hi", " bye"))])
def test_messages_become_transcripts(row, expected):
    """Bug: messages as TRL writes them are refused, the prompt appears twice, or a role is lost."""
    assert parse_pair(json.dumps(row)) == dict(zip(("prompt", "chosen", "rejected"), expected))


@pytest.mark.parametrize("row, words", [
    ({"prompt": []}, "the prompt is empty"), ({"prompt": [QUESTION, HI]}, "leave the answer out"),
    ({"text": "how ?", "label": 1}, "found text, label: name the key")])
def test_a_prompt_that_is_none_is_refused(row, words):
    """Bug: all prompts are the same empty turn, the answer is in the prompt, or a traceback later."""
    with pytest.raises(ValueError, match=words):
        parse_prompt(json.dumps(row), "prompt")


def test_a_number_that_is_unknown_is_read():
    """Bug: a traceback when the row is written down again, because JSON has no NaN."""
    assert parse_prompt('{"prompt": "how ?", "answer": NaN}', "prompt")["row"] == {"prompt": "how ?", "answer": None}


@pytest.mark.parametrize("prompt, chosen, rejected, expected", [
    ("how ?", "how ? fine", " how ?bad", (" fine", " bad")),
    ("\n\nHuman: hi\n\nAssistant:", "Human: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no", (" yes", " no")),
    ("how ?", "how ? fine", "go", (" how ? fine", " go")),               # one may begin so by chance
    ("go", "gone", "good", (" gone", " good"))])                         # not a word of its own
def test_a_repeated_prompt_is_cut_off(prompt, chosen, rejected, expected):
    """Bug: the prompt is learned as part of the answer; or the beginning of an answer is cut off."""
    pair = parse_pair(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    assert pair == dict(prompt=prompt, chosen=expected[0], rejected=expected[1])
