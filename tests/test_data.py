"""Tests of data.py: any text of any script survives the tokenizer, and the batch layout."""

import random
import re
import unicodedata
from collections import Counter

import pytest
import regex
import torch
from helpers import PAD as PAD_ID
from helpers import PAIRS as ID_PAIRS
from helpers import E, few, is_pad, make_batch, random_batch, rng, rows_of
from hypothesis import given
from hypothesis import strategies as st

import data
import world
from data import (
    END,
    PAD,
    Batch,
    by_length,
    collate,
    collate_pairs,
    decode,
    end_id,
    frequent_pieces,
    make_tokenizer,
    minibatches,
    pad_id,
    pad_prompts,
    printable,
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
    # by hand: ' the' 4 times; ' film' 3 times (the first of its two spaces is a piece of one byte); the others once,
    # and the letter of ' é' for itself
    expected = [" the", " film", " ,", " .", " ...", " bad", " was", " é", "é"]
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


# ---- scripts of the world --------------------------------------------------------------------------------------------

SCRIPTS = {  # words between blanks
    "hindi": "मैंने कल यह छोटी फ़िल्म देखी संगीत बहुत अच्छा था हिन्दी ज़िन्दगी क्\u200dष",
    "bengali": "আমি কাল এই ছোট ছবিটি দেখেছি সংগীত খুব ভালো ছিল কিন্তু গল্প",
    "tamil": "நான் நேற்று இந்த சிறிய படத்தைப் பார்த்தேன் இசை மிகவும் நன்றாக இருந்தது",
    "telugu": "నేను నిన్న ఈ చిన్న సినిమా చూశాను సంగీతం చాలా బాగుంది",
    "arabic": "شَاهَدْتُ هٰذَا الفِيلْمَ الصَّغِيرَ أَمْسِ كَانَتِ المُوسِيقَى جَمِيلَةً",
    "persian": "من دیشب این فیلم کوچک را دیدم می\u200cخواهم کتاب\u200cها",
    "hebrew": "רָאִיתִי אֶת הַסֶּרֶט הַקָּטָן הַזֶּה אֶתְמוֹל הַמּוּזִיקָה",
    "korean": "나는 어젯밤에 이 작은 영화를 보았다 음악은 좋았지만",
    "russian": "я посмотрел этот маленький фильм вчера музыка была хороша",
    "greek": "είδα αυτή τη μικρή ταινία χθες η μουσική ήταν πολύ καλή",
    "amharic": "ትናንት ማታ ይህን ትንሽ ፊልም አየሁ ሙዚቃው በጣም ጥሩ ነበር",
    "georgian": "მე გუშინ ვნახე ეს პატარა ფილმი მუსიკა ძალიან კარგი იყო",
    "armenian": "ես երեկ տեսա այս փոքրիկ ֆիլմը երաժշտությունը շատ լավ էր",
    "vietnamese": unicodedata.normalize("NFD", "tôi đã xem bộ phim nhỏ này tối qua âm nhạc rất hay"),
    "french": unicodedata.normalize("NFD", "été déjà vu où là ça né très côté"),
    "emoji": "❤️ 👩\u200d🔬 👍🏽 🇩🇪 1️⃣ 🏳️\u200d🌈 😂",
    "signs": "m² x₂ CO₂ № don",
    "thai": "ฉัน ดู หนัง เรื่อง เล็ก นี้ เมื่อคืน ดนตรี ไพเราะ มาก สวัสดี ครับ",
    "khmer": "ខ្ញុំ បាន មើល រឿង តូច នេះ យប់មិញ តន្ត្រី ល្អ ណាស់",
    "lao": "ຂ້ອຍ ໄດ້ ເບິ່ງ ຮູບເງົາ ນ້ອຍ ນີ້ ດົນຕີ ດີ ຫຼາຍ",
    "burmese": "ကျွန်တော် မနေ့က ဒီ ရုပ်ရှင် ကို ကြည့်ခဲ့တယ် သီချင်း အရမ်း ကောင်း",
    "chinese": "我 昨天 晚上 看 了 这部 小 电影 音乐 非常 好 为什么",
    "japanese": "私 は 昨日 の 夜 この 小さな 映画 を 見ました 音楽 が コーヒー",
}
UNSPACED = ("thai", "khmer", "lao", "burmese", "chinese", "japanese")


def texts_in(script, joint, seed):
    """300 texts of ten words of a script, joined by a text."""
    rng = random.Random(seed)
    return [joint.join(rng.choices(SCRIPTS[script].split(), k=10)) for _ in range(300)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_frequent_word_of_any_script_is_one_token(script):
    """Marks and joiners end a word for one engine and not for the other: it falls to bytes, 14 for Hindi."""
    tokenizer = make_tokenizer(frequent_pieces(texts_in(script, " ", 0), 2048))
    for word in SCRIPTS[script].split():
        if word.isascii() and len(word) < 2:
            continue
        assert len(tokenizer.encode_ordinary(" " + word)) == 1, word
    for text in texts_in(script, " ", 1):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 11  # ten words; the first one may be rare without its space


@pytest.mark.parametrize("script", UNSPACED)
def test_words_without_spaces_do_not_fall_to_bytes(script):
    """A sentence without spaces is one piece that no other text has: 12 to 18 tokens a word."""
    tokenizer = make_tokenizer(frequent_pieces(texts_in(script, "", 0), 2048))
    texts = texts_in(script, "", 1)
    n = sum(len(tokenizer.encode_ordinary(text)) for text in texts)
    assert n / 3000 < 1.4  # tokens a word
    assert all(tokenizer.decode(tokenizer.encode_ordinary(text)) == text for text in texts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rare_word_falls_to_its_letters(script):
    """A word that is not in the vocabulary becomes two or three tokens a letter."""
    texts = texts_in(script, " ", 0)
    tokenizer = make_tokenizer(frequent_pieces(texts, 2048))
    rare = texts[0][::-1]
    assert len(tokenizer.encode_ordinary(rare)) <= len(rare)
    assert tokenizer.decode(tokenizer.encode_ordinary(rare)) == rare


ASSIGNED = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]


@pytest.mark.parametrize("context", ["a{}b", " {} a", "!{}!", "क{}ष"])
def test_pieces_are_counted_as_tiktoken_splits(context):
    """
    The pieces that are counted are not those that tiktoken looks up. Every 30th character of Unicode, and every mark.

    Each piece is a token of its own here, so the tokens of a text must be its pieces.
    """
    marks = [char for char in ASSIGNED if unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf", "Zs", "Cc")]
    texts = [context.format(char) for char in ASSIGNED[::30] + marks]
    split = [regex.findall(data.PIECES, text) for text in texts]
    tokenizer = make_tokenizer(sorted({piece for pieces in split for piece in pieces}))
    for text, pieces in zip(texts, split):
        assert "".join(pieces) == text
        tokens = [tokenizer.decode_single_token_bytes(token) for token in tokenizer.encode_ordinary(text)]
        assert tokens == [piece.encode() for piece in pieces], ascii(text)


@pytest.mark.parametrize("text", [" " * 10 ** 6, "\n" * 10 ** 6 + " x", "a" * 10 ** 5, "!" * 10 ** 5, "ส" * 10 ** 5,
                                  " \t\n" * 10 ** 5])
def test_a_million_blanks_are_encoded(text):
    """tiktoken's engine goes back over a run of blanks, and a long one overflows its stack."""
    tokenizer = make_tokenizer(frequent_pieces([text], 100))
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_pieces_of_a_large_file_are_counted_in_all_its_parts():
    """The first rows stand for all, or only the first kind of a file that alternates two kinds."""
    assert data.every_nth(["ab"] * 10, 100) == (["ab"] * 10, 1)
    texts = [f"{'left' if i % 2 else 'right'} {i:03}" for i in range(1000)]
    sample, n = data.every_nth(texts, 2800)  # 9,500 characters
    assert n == 5 and sample == texts[::5]
    assert sum("left" in text for text in sample) == 100


def test_the_built_in_world_keeps_its_tokens():
    """The default run changes: letters, strings and marks must add nothing to plain English."""
    rng = random.Random(0)
    texts = [world.make_document(rng) for _ in range(300)]
    counts = Counter(piece for text in texts for piece in re.findall(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+", text))
    ranked = sorted((piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece))
    assert frequent_pieces(texts, 2048) == ranked
    tokenizer = make_tokenizer(ranked)
    assert tokenizer.n_vocab == 256 + len(ranked) + 2


def test_control_characters_are_spelt_out():
    """A text clears the reader's screen, rewrites a line or turns the reading order; or ordinary text is changed."""
    assert printable("a\x1b[2Jb\x07\r\x00\x9b\u202e\u2028") == r"a\x1b[2Jb\x07\r\x00\x9b\u202e\u2028"
    assert printable("\ud83d") == r"\ud83d"
    for text in [*SCRIPTS.values(), "two\nlines\tand ~ a tab", "\\x1b"]:
        assert printable(text) == text
