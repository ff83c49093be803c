"""
The texts of a run as token ids: encoded once, kept in columns of four bytes an id, and cut to fit for the stages.

    columns  {"prompt": (ids, lengths), ...}    as tokens.pt holds them, uncut
    pairs    [{"prompt": ids, "chosen": ids, "rejected": ids}, ...]    as the training loops read them
"""

from array import array

import numpy as np
import torch

from data import UserError

KEYS = ("prompt", "chosen", "rejected")


def same(a, b):
    """Whether two texts differ in nothing but white space."""
    return a == b or a.split() == b.split()


def pack(rows):
    """Lists of token ids -> all ids in one tensor, and the length of each list. 4 bytes for an id; a list takes 8."""
    ids, lengths = array("i"), []
    for row in rows:
        ids.extend(row)
        lengths.append(len(row))
    return torch.from_numpy(np.array(ids, dtype=np.int32)), torch.tensor(lengths, dtype=torch.int64)


def is_encoded(columns, n_vocab):
    """Whether these are columns as `encode_columns` makes them, of a vocabulary of this size."""
    names = set(columns)
    good = names == {"prompt"} or names == {*KEYS, "identical", "repeated"}
    for name, (ids, lengths) in columns.items():
        in_range = len(ids) == 0 or 0 <= ids.min() <= ids.max() < n_vocab
        good = good and in_range and (lengths >= 0).all() and lengths.sum() == len(ids)
        good = good and len(lengths) == len(columns["prompt"][1])
        good = good and (name in ("prompt", *KEYS) or (lengths == 1).all())
    return bool(good)


def unpack(packed):
    """Yield the lists of token ids again, one at a time: a large file is never in memory as uncut lists."""
    ids, lengths = packed
    numbers = list(range(int(ids.max()) + 1 if len(ids) else 0))  # one object for each id: new ones would take 32 bytes
    at = 0
    for length in lengths.tolist():
        yield [numbers[i] for i in ids[at:at + length].tolist()]
        at += length


def encode_columns(texts, tokenizer):
    """
    Rows of texts -> {"prompt": packed ids}. For pairs also "chosen" and "rejected", and two columns with a 0 or 1 for
    each row: "identical", whether the responses differ in white space alone, and "repeated", as parse_pair says it.
    """
    keys = KEYS if not texts or "chosen" in texts[0] else ("prompt",)
    columns = {key: pack(tokenizer.encode_ordinary(text[key]) for text in texts) for key in keys}
    if keys == KEYS:
        columns["identical"] = pack([int(same(text["chosen"], text["rejected"]))] for text in texts)
        columns["repeated"] = pack([int(text.get("repeated", False))] for text in texts)
    return columns


def fit_pairs(columns, end, prompt_tokens, response_tokens):
    """
    The columns of pairs -> (pairs of token ids that fit, counts of what was changed).

    A prompt that is too long loses its beginning, a response its end, and with it its E. A pair whose responses are
    equal after that, or but for white space, teaches nothing and is dropped. UserError when no pair is left.
    """
    pairs, counts = [], dict(prompts_cut=0, responses_cut=0, identical_dropped=0, prompts_repeated=0)
    names = (*KEYS, "identical", "repeated")
    for prompt, chosen, rejected, (identical,), (repeated,) in zip(*[unpack(columns[name]) for name in names]):
        chosen.append(end)
        rejected.append(end)
        counts["prompts_repeated"] += repeated
        if identical or chosen[:response_tokens] == rejected[:response_tokens]:
            counts["identical_dropped"] += 1
            continue
        counts["prompts_cut"] += len(prompt) > prompt_tokens
        counts["responses_cut"] += (len(chosen) > response_tokens) + (len(rejected) > response_tokens)
        pairs.append(dict(prompt=prompt[-prompt_tokens:], chosen=chosen[:response_tokens],
                          rejected=rejected[:response_tokens]))
    n = len(columns["prompt"][1])
    if n and not pairs:
        raise UserError(f"no pair of {n} is left for training or for evaluation: their two responses are the "
                        f"same within {response_tokens} tokens; raise --response-tokens, or add pairs that differ")
    return pairs, counts


def describe(counts):
    """What fit_pairs changed, in words."""
    text = (f"{counts['prompts_cut']:,} prompts cut on the left, "
            f"{counts['responses_cut']:,} responses cut on the right, "
            f"{counts['identical_dropped']:,} pairs dropped because their two responses are the same")
    if counts["prompts_repeated"]:
        text += f"; in {counts['prompts_repeated']:,} pairs a response repeated the prompt, which was cut off"
    return text
