"""
The tokenizer: texts become token ids, and back.

A frequent word is one token, a rare one falls to letters, and in the end to bytes. So every text can be encoded, in any
script. The vocabulary is made from the texts of the run: nothing is downloaded. The two last ids are E, which ends a
response, and PAD, which is never part of a text.
"""

from collections import Counter

import regex  # reads patterns as tiktoken does; Python's re has no \p{L}
import tiktoken

# A piece is a word or a run of symbols, with the space before it, or up to 32 blanks. Accents (\p{M}) and the two
# joiners stay with the word or the emoji that they are in.
PIECES = (r" ?[\p{L}\p{M}\p{N}_][\p{L}\p{M}\p{N}_\u200c\u200d]*| ?[^\p{L}\p{M}\p{N}_\s][^\p{L}\p{N}_\s]*"
          r"|\s{1,32}(?!\S)|\s")
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"  # no spaces between words
END = "<|end|>"
PAD = "<|pad|>"


def every_nth(items, most):
    """Every n-th text, and n: a sample of about `most` characters. n is odd, because a file may alternate two kinds."""
    n = sum(map(len, items)) // most + 1
    n += n % 2 == 0
    return items[::n], n


def frequent_pieces(texts, limit):
    """
    The `limit` most frequent pieces that are longer than a byte; ties in alphabetical order.

    Letters outside ASCII count as pieces too: a rare word falls to its letters, not to bytes. Where words have no
    spaces between them, so do strings of two to six letters. Of more than 20 million characters a sample is counted.
    """
    counts, parts = Counter(), Counter()
    for text in every_nth(texts, 20_000_000)[0]:
        counts.update(regex.findall(PIECES, text))
    sample, n = every_nth([piece for piece in counts if not piece.isascii()], 500_000)
    for piece in sample:
        letters = piece.strip()
        for size in range(1, 7 if regex.search(UNSPACED, letters) else 2):
            for at in range(len(letters) - size + 1):
                parts[letters[at:at + size]] += n * counts[piece]
    counts |= parts  # the larger count of both
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return [piece for piece in ranked if len(piece.encode()) > 1][:limit]


def make_tokenizer(pieces):
    """Build a tiktoken.Encoding. The order of ids: the 256 bytes, the pieces, E, PAD."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        code = piece.encode()
        if len(piece) == 1:  # a letter. tiktoken joins two tokens at a time: three bytes need the first two
            for n in range(2, len(code)):
                ranks.setdefault(code[:n], len(ranks))
        ranks.setdefault(code, len(ranks))
    special = {END: len(ranks), PAD: len(ranks) + 1}
    return tiktoken.Encoding("minirlhf", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)


def end_id(tokenizer):
    return tokenizer.encode_single_token(END)


def decode(tokenizer, ids):
    """The text of a list of token ids, without the E that may end it."""
    if ids and ids[-1] == end_id(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids)
