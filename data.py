"""
Text in, tensors out: the tokenizer, preference files, and the one batch layout that every stage uses.

    ids   [ . . p p p | r r r E . . ]      prompt padded on the left, response padded on the right
                  P-1 ^                    the logits at column P-1 predict the first response token

E ends a text and belongs to the response: it is sampled, trained on and scored. PAD has an id of its own, and nothing here or later asks whether
a token *is* the pad: masks and positions come from lengths. Prompt and response are tokenised separately and concatenated, so the boundary
between them is always a token boundary; sampled ids are kept as they are and never decoded and encoded again.

Letters: B batch, P prompt columns, R response columns, T = P + R.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, fields

import tiktoken
import torch

WORDS = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"  # a piece is a word or a run of signs with the blank before it
END, PAD = "<|end|>", "<|pad|>"


class DataError(ValueError):
    """A fault in the user's data, told in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer

def frequent_pieces(texts, limit):
    """The `limit` most frequent pieces of the texts that are longer than a byte; ties are broken alphabetically, so the result is reproducible."""
    counts = Counter(piece for text in texts for piece in re.findall(WORDS, text) if len(piece.encode()) > 1)
    return [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def make_tokenizer(pieces):
    """
    A tiktoken.Encoding of the 256 bytes, the given pieces as whole tokens, E and PAD, in this order.

    What is not a piece falls back to smaller pieces and in the end to bytes, so every text survives encode and decode unchanged.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece in pieces:
        ranks.setdefault(piece.encode(), len(ranks))
    return tiktoken.Encoding("minirlhf", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: len(ranks), PAD: len(ranks) + 1})


def end_id(tokenizer):
    return tokenizer.encode_single_token(END)


def pad_id(tokenizer):
    return tokenizer.encode_single_token(PAD)


def decode(tokenizer, ids):
    """The text of a list of token ids, without the E that may end it."""
    ids = list(ids)
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == end_id(tokenizer) else ids)


# ---------------------------------------------------------------------------------------------------------------------
# the batch

@dataclass
class Batch:
    """B sequences `prompt | response` in the one layout. The response mask runs up to and including E."""

    ids: torch.Tensor            # (B, T) token ids, PAD where there is no token
    prompt_lens: torch.Tensor    # (B,) real prompt tokens
    response_lens: torch.Tensor  # (B,) real response tokens, E included
    P: int                       # prompt columns

    def __len__(self):
        return len(self.ids)

    @property
    def R(self):
        return self.ids.shape[1] - self.P

    @property
    def responses(self):
        return self.ids[:, self.P:]  # (B, R)

    @property
    def mask(self):
        return torch.arange(self.R, device=self.ids.device) < self.response_lens[:, None]  # (B, R), True on real response tokens

    def select(self, rows):
        """The given rows, in the given order, with everything that belongs to them; columns are kept."""
        return self._map(lambda x: x[rows])

    def to(self, device):
        return self._map(lambda x: x.to(device))

    def _map(self, function):
        values = [getattr(self, field.name) for field in fields(self)]
        return type(self)(*[function(value) if isinstance(value, torch.Tensor) else value for value in values])

    def response_ids(self):
        """The real response tokens as lists of ids, E included where there is one."""
        return [row[:n] for row, n in zip(self.responses.tolist(), self.response_lens.tolist())]


def pad_prompts(prompts, pad, device="cpu", P=0):
    """Lists of token ids -> ids (B, P or more) padded on the left, lengths (B,). Raises ValueError when there are none, or when one is empty."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise ValueError("no prompts: a batch has at least one row")
    if min(lengths) == 0:
        raise ValueError("an empty prompt: the first response token needs a token before it to be predicted from")
    width = max(P, *lengths)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids, dtype=torch.long, device=device).view(len(prompts), width), torch.tensor(lengths, device=device)


def collate(prompts, responses, pad, device="cpu"):
    """Two lists of lists of token ids -> Batch. A response carries its own E, or none when it was cut."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    left, prompt_lens = pad_prompts(prompts, pad, device)
    lengths = [len(response) for response in responses]
    width = max(lengths)
    right = torch.tensor([list(response) + [pad] * (width - len(response)) for response in responses], dtype=torch.long, device=device)
    return Batch(torch.cat([left, right.view(len(responses), width)], dim=1), prompt_lens, torch.tensor(lengths, device=device), left.shape[1])


def minibatches(n, size, generator):
    """One pass over n rows in a random order: index tensors of at most `size` rows each."""
    return torch.randperm(n, generator=generator).split(size)


# ---------------------------------------------------------------------------------------------------------------------
# preference files

ASSISTANT = "\n\nAssistant:"


def split_transcripts(chosen, rejected):
    """(prompt, chosen, rejected) of two whole HH-RLHF transcripts: the prompt is what they share, up to its last '\\n\\nAssistant:'."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    at = chosen.rfind(ASSISTANT, 0, shared)
    if at < 0:
        raise ValueError("the two transcripts share no turn that ends in '\\n\\nAssistant:', and there is no \"prompt\"")
    cut = at + len(ASSISTANT)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def read_pairs(path):
    """
    Preference pairs from a .jsonl or .jsonl.gz file: a list of dicts with the texts "prompt", "chosen" and "rejected".

    A line holds these three keys, or only "chosen" and "rejected" as whole HH-RLHF transcripts. A response that does not begin with white space is
    given a blank where the prompt does not end with one, because the words of a text carry the blank before them.
    Raises DataError, in one line that names the file, the line and the fault.
    """
    pairs = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        pairs.append(parse_pair(line))
                    except ValueError as fault:
                        raise DataError(f"{path}, line {number}: {fault}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as fault:
        raise DataError(f"{path}: cannot be read ({getattr(fault, 'strerror', None) or fault})") from None
    if not pairs:
        raise DataError(f'{path}: no pairs in it; each line should be {{"prompt": ..., "chosen": ..., "rejected": ...}}')
    return pairs


def parse_pair(line):
    """One line of a preference file as a dict of three texts; ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise ValueError(f"not JSON ({fault.msg} at column {fault.colno})") from None
    except RecursionError:
        raise ValueError("not a preference pair but brackets within brackets, too deep to read") from None
    if not isinstance(row, dict):
        raise ValueError(f'expected an object with "prompt", "chosen" and "rejected", found {type(row).__name__}')
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ValueError(f'the key "{key}" is missing')
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f'"{key}" should be a text, found {type(row[key]).__name__}')
    if "prompt" in row:
        prompt, responses = row["prompt"], (row["chosen"], row["rejected"])
    else:
        prompt, *responses = split_transcripts(row["chosen"], row["rejected"])
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if not prompt[-1].isspace():
        responses = [text if text[:1].isspace() else " " + text for text in responses]
    return {"prompt": prompt, "chosen": responses[0], "rejected": responses[1]}


def encode_pairs(pairs, tokenizer, prompt_tokens, response_tokens):
    """
    Texts -> token ids that fit: a list of dicts with "prompt", "chosen" and "rejected" as lists of ids, and a dict of counts.

    A prompt that is too long loses its left, a response its right (and with it the E: it is cut, not ended). Pairs whose two responses are the same,
    before or after that, teach nothing and are dropped. Nothing is lost in silence: the counts are "prompts_cut", "responses_cut", "identical_dropped".
    """
    encoded, counts = [], dict(prompts_cut=0, responses_cut=0, identical_dropped=0)
    end = end_id(tokenizer)
    for pair in pairs:
        prompt = tokenizer.encode_ordinary(pair["prompt"])
        chosen, rejected = (tokenizer.encode_ordinary(pair[key]) + [end] for key in ("chosen", "rejected"))
        if chosen[:response_tokens] == rejected[:response_tokens]:
            counts["identical_dropped"] += 1
            continue
        counts["prompts_cut"] += len(prompt) > prompt_tokens
        counts["responses_cut"] += (len(chosen) > response_tokens) + (len(rejected) > response_tokens)
        encoded.append(dict(prompt=prompt[-prompt_tokens:], chosen=chosen[:response_tokens], rejected=rejected[:response_tokens]))
    return encoded, counts


def split_pairs(pairs, share, rng):
    """
    (training, held-out) pairs, about `share` of them held out. Whole prompts are held out, so that no prompt is on both sides; a file with fewer
    than ten different prompts cannot be split so and is split pair by pair.
    """
    keys = [tuple(pair["prompt"]) for pair in pairs]
    groups = sorted(set(keys))
    if len(groups) < 10:
        keys = groups = list(range(len(pairs)))
    held_out = set(rng.sample(groups, max(1, round(share * len(groups)))))
    return ([pair for pair, key in zip(pairs, keys) if key not in held_out], [pair for pair, key in zip(pairs, keys) if key in held_out])
