"""
Text in, tensors out: the tokenizer, the one batch layout that every stage uses, and preference files.

    ids   [ . . p p p | r r r E . . ]      prompts are padded on the left, responses on the right
                  P-1 ^                    the logits at column P-1 predict the first response token

E (end of text, or EOS) closes a response. It is sampled, trained on and scored. PAD fills the rest. It has an id of its
own, but no code asks whether a token is PAD: masks and positions come from lengths. Prompt and response are tokenised
separately, so no token spans their border. Sampled ids are kept as they are and never decoded and encoded again.

Letters: B batch, b rows of a part of it, P prompt columns, R response columns, T = P + R.
"""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, fields

import tiktoken
import torch
import torch.nn as nn

PIECES = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"  # a piece is a word or a run of signs, with the space before it
END = "<|end|>"
PAD = "<|pad|>"


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""


# ---- the tokenizer --------------------------------------------------------------------------------

def frequent_pieces(texts, limit):
    """The `limit` most frequent pieces that are longer than a byte; ties in alphabetical order."""
    counts = Counter()
    for text in texts:
        counts.update(piece for piece in re.findall(PIECES, text) if len(piece.encode()) > 1)
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    return ranked[:limit]


def make_tokenizer(pieces):
    """
    Build a tiktoken.Encoding of the 256 bytes, the given pieces, E and PAD, in this order of ids.

    A piece is one token. Other text is split, down to bytes if needed, so every text can be encoded.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
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


# ---- preference files -----------------------------------------------------------------------------

ASSISTANT = "\n\nAssistant:"
PAIR_FORM = '{"prompt": ..., "chosen": ..., "rejected": ...}'


def read_pairs(path):
    """
    Read preference pairs from a .jsonl or .jsonl.gz file: a list of dicts of texts, "prompt", "chosen" and "rejected".

    A line without a "prompt" holds two whole HH-RLHF transcripts. UserError names the file, the line and the fault.
    """
    open_file = gzip.open if str(path).endswith(".gz") else open
    pairs = []
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:  # -sig: without a byte order mark
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    pairs.append(parse_pair(line))
                except ValueError as fault:
                    raise UserError(f"{path}, line {number}: {fault}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if not pairs:
        raise UserError(f"{path}: no pairs in it; each line should be {PAIR_FORM}")
    return pairs


def parse_pair(line):
    """One line of a preference file -> a dict of three texts. ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise ValueError(f"not JSON ({fault.msg} at column {fault.colno})") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply to read") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected {PAIR_FORM}, found {type(row).__name__}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f'the key "{key}" is missing')
    for key in ("prompt", "chosen", "rejected"):
        if key in row and not isinstance(row[key], str):
            raise ValueError(f'"{key}" should be a text, found {type(row[key]).__name__}')
    if "prompt" in row:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    else:
        prompt, chosen, rejected = split_transcripts(row["chosen"], row["rejected"])
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not prompt[-1].isspace():  # a word's token includes the space before it
        chosen = chosen if chosen[:1].isspace() else " " + chosen
        rejected = rejected if rejected[:1].isspace() else " " + rejected
    return dict(prompt=prompt, chosen=chosen, rejected=rejected)


def split_transcripts(chosen, rejected):
    """Two HH-RLHF transcripts -> (prompt, chosen, rejected): the prompt ends with the last ASSISTANT they share."""
    shared = os.path.commonprefix([chosen, rejected])
    at = shared.rfind(ASSISTANT)
    if at < 0:
        raise ValueError("it has no \"prompt\", and the two transcripts share no '\\n\\nAssistant:'")
    cut = at + len(ASSISTANT)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def encode_pairs(pairs, tokenizer, prompt_tokens, response_tokens):
    """
    Pairs of texts -> (pairs of token ids that fit, counts of what was changed).

    A prompt that is too long loses its beginning, a response its end, and with it its E. A pair of two equal
    responses teaches nothing and is dropped.
    """
    end = end_id(tokenizer)
    encoded, counts = [], dict(prompts_cut=0, responses_cut=0, identical_dropped=0)
    for pair in pairs:
        prompt = tokenizer.encode_ordinary(pair["prompt"])
        chosen = tokenizer.encode_ordinary(pair["chosen"]) + [end]
        rejected = tokenizer.encode_ordinary(pair["rejected"]) + [end]
        if chosen[:response_tokens] == rejected[:response_tokens]:
            counts["identical_dropped"] += 1
            continue
        counts["prompts_cut"] += len(prompt) > prompt_tokens
        counts["responses_cut"] += (len(chosen) > response_tokens) + (len(rejected) > response_tokens)
        encoded.append(dict(prompt=prompt[-prompt_tokens:], chosen=chosen[:response_tokens],
                            rejected=rejected[:response_tokens]))
    return encoded, counts


def split_pairs(pairs, share, rng):
    """
    Split pairs into (training, held-out) lists; about `share` of the prompts are held out, with all their pairs.

    With fewer than ten different prompts, pairs are split one by one.
    """
    keys = [tuple(pair["prompt"]) for pair in pairs]
    groups = sorted(set(keys))
    if len(groups) < 10:
        keys = list(range(len(pairs)))
        groups = keys
    heldout_keys = set(rng.sample(groups, max(1, round(share * len(groups)))))
    train = [pair for pair, key in zip(pairs, keys) if key not in heldout_keys]
    heldout = [pair for pair, key in zip(pairs, keys) if key in heldout_keys]
    return train, heldout
