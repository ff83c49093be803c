"""
Text in, tensors out: the tokenizer, and the one batch layout that every stage uses.

    ids   [ . . p p p | r r r E . . ]      prompts are padded on the left, responses on the right
                P-1 ^                      the logits at column P-1 predict the first response token

E (end of text, or EOS) closes a response. It is sampled, trained on and scored. PAD fills the rest. It has an id of its
own, but no code asks whether a token is PAD: masks and positions come from lengths. Prompt and response are tokenised
separately, so no token spans their border. Sampled ids are kept as they are and never decoded and encoded again.

Letters: B batch, b rows of a part of it, P prompt columns, R response columns, T = P + R.
"""

import re
from collections import Counter
from dataclasses import dataclass, fields

import regex  # comes with tiktoken and reads patterns as tiktoken does; Python's re has no \p{L}
import tiktoken
import torch
import torch.nn as nn

# A piece is a word or a run of symbols, with the space before it, or up to 32 blanks. Accents (\p{M}) and the two
# joiners stay with the word or the emoji that they are in.
PIECES = (r" ?[\p{L}\p{M}\p{N}_][\p{L}\p{M}\p{N}_\u200c\u200d]*| ?[^\p{L}\p{M}\p{N}_\s][^\p{L}\p{N}_\s]*"
          r"|\s{1,32}(?!\S)|\s")
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"  # no spaces between words
END = "<|end|>"
PAD = "<|pad|>"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # all but \t and \n


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""


# ---- the tokenizer --------------------------------------------------------------------------------

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
    """
    Build a tiktoken.Encoding. The order of ids: the 256 bytes, the pieces, E, PAD.

    A piece is one token. A single letter of several bytes brings its first bytes as tokens before it. Other text is
    split, down to bytes if needed, so every text can be encoded.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        code = piece.encode()
        if len(piece) == 1:
            for n in range(2, len(code)):  # tiktoken joins two tokens at a time: three bytes need the first two
                ranks.setdefault(code[:n], len(ranks))
        ranks.setdefault(code, len(ranks))
    special = {END: len(ranks), PAD: len(ranks) + 1}
    return tiktoken.Encoding("minirlhf", pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)


def end_id(tokenizer):
    return tokenizer.encode_single_token(END)


def pad_id(tokenizer):
    return tokenizer.encode_single_token(PAD)


def decode(tokenizer, ids):
    """The text of a list of token ids, without the E that may end it."""
    if ids and ids[-1] == end_id(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids)


def printable(text):
    """The text with its control characters spelt out, as \\x1b: raw, they could take over the reader's terminal."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


# ---- the batch ------------------------------------------------------------------------------------

@dataclass
class Batch:
    """B sequences `prompt | response` in the layout above."""
    ids: torch.Tensor            # (B, T) token ids, PAD where there is no token
    prompt_lens: torch.Tensor    # (B,) real tokens of each prompt
    response_lens: torch.Tensor  # (B,) real tokens of each response, E included
    P: int                       # prompt columns

    def __len__(self):
        return len(self.ids)

    @property
    def R(self):
        return self.ids.shape[1] - self.P

    @property
    def start(self):
        """Column of each row's first real token, (B,)."""
        return self.P - self.prompt_lens

    @property
    def responses(self):
        return self.ids[:, self.P:]  # (B, R)

    @property
    def mask(self):
        """True on real response tokens, up to and including E, (B, R)."""
        return torch.arange(self.R, device=self.ids.device) < self.response_lens[:, None]

    def select(self, rows):
        """The given rows of every tensor, in the given order. No column is removed."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device):
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function):
        # over all fields, so that a subclass with more tensors needs no code of its own
        values = [getattr(self, field.name) for field in fields(self)]
        return type(self)(*[function(value) if isinstance(value, torch.Tensor) else value for value in values])

    def trim(self):
        """The rows without the columns that are padding in all of them: a plain Batch."""
        first = int(self.start.min())
        last = self.P + int(self.response_lens.max())
        return Batch(self.ids[:, first:last], self.prompt_lens, self.response_lens, self.P - first)

    def response_ids(self):
        """The real response tokens as lists of ids, E included where there is one."""
        return [row[:n] for row, n in zip(self.responses.tolist(), self.response_lens.tolist())]


def by_length(function, batch, size=16):
    """
    Compute function(batch), (B,) or (B, R), in parts of `size` rows of similar length, which need less padding.

    Rows come back in their order; columns that a part did not have are 0. A row's result must depend on that row alone.
    A GPU takes all rows at once: more calls cost it more than more padding.
    """
    if batch.ids.device.type != "cpu":
        size = len(batch)
    order = (batch.prompt_lens + batch.response_lens).argsort(stable=True)                    # (B,) shortest row first
    results = []
    for rows in order.split(size):
        result = function(batch.select(rows).trim())                                          # (b,) or (b, R or fewer)
        if result.dim() == 2:
            result = nn.functional.pad(result, (0, batch.R - result.shape[1]))                # (b, R)
        results.append(result)
    return torch.cat(results)[order.argsort()]  # the argsort of a permutation undoes it


def pad_prompts(prompts, pad, device="cpu"):
    """Lists of token ids -> ids (B, P), padded on the left, and lengths (B,). ValueError for none, or an empty one."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise ValueError("no prompts: a batch has at least one row")
    if min(lengths) == 0:
        raise ValueError("an empty prompt: the first response token is predicted from the token before it")
    P = max(lengths)
    ids = [[pad] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


def collate(prompts, responses, pad, device="cpu"):
    """Two lists of lists of token ids -> Batch. A response ends with its E, unless it was cut."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    left, prompt_lens = pad_prompts(prompts, pad, device)                                     # (B, P)
    lengths = [len(response) for response in responses]
    R = max(lengths)
    ids = [list(response) + [pad] * (R - len(response)) for response in responses]
    right = torch.tensor(ids, dtype=torch.long, device=device).view(len(responses), R)        # (B, R) or (B, 0)
    return Batch(torch.cat([left, right], dim=1), prompt_lens, torch.tensor(lengths, device=device), left.shape[1])


def collate_pairs(pairs, pad, device="cpu"):
    """B pairs of token ids -> one Batch of 2B rows, all chosen responses first. `x.chunk(2)` splits a result again."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen = [pair["chosen"] for pair in pairs]
    rejected = [pair["rejected"] for pair in pairs]
    return collate(prompts + prompts, chosen + rejected, pad, device)


def minibatches(n, size, epochs, generator):
    """The minibatches of several epochs over n rows: a list of index tensors (size or fewer,), in random order."""
    batches = []
    for _ in range(epochs):
        batches += torch.randperm(n, generator=generator).split(size)
    return batches
