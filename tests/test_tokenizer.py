"""Tests of tokenizer.py: any text of any script survives, and a frequent word is one token."""

import random
import unicodedata

import pytest
import regex
from helpers import few
from hypothesis import example, given
from hypothesis import strategies as st

from tokenizer import END, PAD, PIECES, decode, end_id, every_nth, frequent_pieces, make_tokenizer

WORDS = [" the", " plot", " was", " good", " bad", " .", "the", "é", " été", "th"]
TOKENIZER = make_tokenizer(WORDS)
# any character, and often one of these; st.text() does the same, but builds a table of all characters first
common_characters = st.sampled_from(" \n\t.,'ath<|>éß好\u00a0\u2028\U0001f642\x00")
any_character = st.integers(0, 0xD7FF).map(chr) | st.integers(0xE000, 0x10FFFF).map(chr)  # all but surrogates
any_text = st.lists(common_characters | any_character).map("".join)


@few
@example(END)
@example(f"a{PAD} b")
@given(any_text)
def test_any_text_survives_the_tokenizer(text):
    """Bug: spaces are merged, signs are dropped, a text contains E, or the name of E in a text becomes E."""
    ids = TOKENIZER.encode_ordinary(text)
    assert decode(TOKENIZER, ids) == text
    assert decode(TOKENIZER, [*ids, end_id(TOKENIZER)]) == text
    assert all(0 <= token < end_id(TOKENIZER) for token in ids)


def test_ids_are_the_bytes_the_pieces_e_and_pad():
    """Bug: pieces are never used or have other ids; PAD equals E, or is not where the network expects it."""
    for n, piece in enumerate(WORDS):
        assert TOKENIZER.encode_ordinary(piece) == [256 + n]
    assert TOKENIZER.encode_ordinary("the plot was bad .") == [262, 257, 258, 260, 261]
    n = 256 + len(WORDS)
    assert (end_id(TOKENIZER), TOKENIZER.encode_single_token(PAD), TOKENIZER.n_vocab) == (n, n + 1, n + 2)
    assert TOKENIZER.decode([n, n + 1]) == END + PAD and decode(TOKENIZER, [n, n]) == END  # only the last E goes
    repeated = make_tokenizer([" a", " b", " a", "x"])  # a repeated piece, or a single byte, gets no second id
    assert repeated.encode_ordinary(" a b") == [256, 257] and end_id(repeated) == 258


def test_frequent_pieces_are_the_most_frequent_ones():
    """Bug: a vocabulary that changes from run to run, or that keeps rare pieces or single bytes."""
    texts = ["a the film was bad .", " film , the  film ...", "x the é the"]
    # by hand: ' the' 4 times; ' film' 3 times (the first of its two spaces is a piece of one byte); the others once,
    # and the letter of ' é' for itself
    expected = [" the", " film", " ,", " .", " ...", " bad", " was", " é", "é"]
    assert frequent_pieces(texts, 99) == expected
    assert frequent_pieces(texts, 3) == expected[:3]
    assert frequent_pieces(texts[::-1], 99) == expected
    # the space before a word is part of it, up to 32 blanks before that are one piece
    assert frequent_pieces(["b  \n\n  a_1b +?! 12" + 40 * " " + "x"], 9) == sorted(
        ["  \n\n ", " a_1b", " +?!", " 12", 32 * " ", 7 * " ", " x"])
    # é is one character, but two bytes; as a letter of words it comes five times. ü comes four times, not eight
    assert frequent_pieces(["éa"] * 3 + ["éb"] * 2 + ["ü,ü,ü,ü"], 9) == ["é", "ü", "éa", "éb"]


@pytest.mark.parametrize("words", [  # Persian, Hindi and emoji
    "می\u200cخواهم دیشب این فیلم کوچک را دیدم موسیقی خیلی خوب بود",
    "मैंने कल यह छोटी फ़िल्म देखी संगीत बहुत अच्छा था हिन्दी ज़िन्दगी क्\u200dष",
    "❤️ 👩\u200d🔬 👍🏽 🇩🇪 1️⃣ 🏳️\u200d🌈 😂"])
def test_a_frequent_word_of_any_script_is_one_token_and_a_rare_one_falls_to_letters(words):
    """Bug: marks and joiners end a word for one engine and not for the other: it falls to bytes, 14 for Hindi."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words.split(), k=10)) for _ in range(300)]
    tokenizer = make_tokenizer(frequent_pieces(texts, 2048))
    for word in words.split():
        assert len(tokenizer.encode_ordinary(" " + word)) == 1, word
    for text, most in ((texts[0], 11), (texts[0][::-1], len(texts[0]))):  # a first word without its space may be rare
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text and len(ids) <= most


@pytest.mark.parametrize("text", ["昨天晚上看了电影", "わたしはきのうみた", "レストランテレビ", "เมื่อวานฉันดูหนัง",
                                  "ຂ້ອຍມັກເພງຫຼາຍ", "ខ្ញុំចូលចិត្ត", "ကျွန်တော်ကြိုက်", "བཀྲཤིསབདེལེགས"])
def test_where_words_have_no_spaces_strings_of_letters_are_pieces(text):
    """Bug: a sentence of a script without spaces is one piece that no other text has: 12 to 18 tokens a word."""
    strings = {text[at:at + n] for n in range(1, 7) for at in range(len(text) - n + 1)}
    assert set(frequent_pieces([" " + text], 999)) == {" " + text, *strings}
    assert set(frequent_pieces([" музыка"], 999)) == {" музыка", *"музыка"}


def test_pieces_are_counted_as_tiktoken_splits():
    """Bug: the pieces that are counted are others than tiktoken looks up. Every 300th character, and every mark."""
    kinds = {chr(code): unicodedata.category(chr(code)) for code in range(0xE0200)}  # beyond, all is private
    assigned = [char for char, kind in kinds.items() if kind not in ("Cn", "Cs", "Co")]
    marks = [char for char, kind in kinds.items() if kind in ("Mn", "Mc", "Me", "Cf", "Zs", "Cc")]
    texts = [f"क{char}b" for char in assigned[::300] + marks]
    split = [regex.findall(PIECES, text) for text in texts]
    tokenizer = make_tokenizer(sorted({piece for pieces in split for piece in pieces}))  # each piece is a token
    for text, pieces in zip(texts, split):
        assert "".join(pieces) == text
        tokens = [tokenizer.decode_single_token_bytes(token) for token in tokenizer.encode_ordinary(text)]
        assert tokens == [piece.encode() for piece in pieces], ascii(text)


def test_a_million_blanks_are_encoded():
    """Bug: tiktoken's engine goes back over a run of blanks, and a long one overflows its stack."""
    text = "\n" * 10 ** 6 + " x"
    tokenizer = make_tokenizer(frequent_pieces([text], 100))
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_pieces_of_a_large_file_are_counted_in_all_its_parts(monkeypatch):
    """Bug: only the first rows are counted, or only the first kind of a file that alternates two kinds."""
    assert every_nth(["ab"] * 10, 100) == (["ab"] * 10, 1)
    texts = [f"{'left' if i % 2 else 'right'} {i:03}" for i in range(1000)]
    sample, n = every_nth(texts, 2800)  # 9,500 characters
    assert n == 5 and sample == texts[::5]
    assert sum("left" in text for text in sample) == 100
    # the same where 500 characters are many letters
    monkeypatch.setattr("tokenizer.every_nth", lambda items, most: every_nth(items, most // 1000))
    rare = [f"é{i:09}" for i in range(60)]  # their letter is counted in a third of them, three times each
    assert frequent_pieces([" the"] * 40 + rare, 2) == ["é", " the"]
