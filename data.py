"""
The batch: the one layout of prompts and responses that all lessons use.

    ids   [ . . p p p | r r r E . . ]      prompts are padded on the left, responses on the right
                P-1 ^                      the logits at column P-1 predict the first response token

E (end of text, or EOS) closes a response. It is sampled, trained on and scored. PAD fills the rest. It has its own id,
but no code asks whether a token is PAD: masks and positions come from lengths. Prompt and response are tokenised
separately, so no token spans their border. Sampled ids are kept as they are and never decoded and encoded again.

Letters: B batch, b rows of a part of it, P prompt columns, R response columns, T = P + R.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint


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
    def tokens(self):
        """The number of real tokens, prompts included."""
        return int((self.prompt_lens + self.response_lens).sum())

    @property
    def mask(self):
        """True on real response tokens, up to and including E, (B, R)."""
        return torch.arange(self.R, device=self.ids.device) < self.response_lens[:, None]

    def select(self, rows):
        """The given rows of every tensor, in the given order. No column is removed. A Rollout stays a Rollout."""
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **tensors)

    def trim(self):
        """The rows without the columns that are padding in all of them: a plain Batch."""
        first = int(self.start.min())
        last = self.P + int(self.response_lens.max())
        return Batch(self.ids[:, first:last], self.prompt_lens, self.response_lens, self.P - first)

    def prompt_ids(self):
        """The prompts as lists of ids, without padding."""
        return [row[start:self.P] for row, start in zip(self.ids.tolist(), self.start.tolist())]

    def response_ids(self):
        """The real response tokens as lists of ids, E included where there is one."""
        return [row[:n] for row, n in zip(self.responses.tolist(), self.response_lens.tolist())]


def by_length(function, batch, micro_batch=0, size=16):
    """
    Compute function(batch), (B,) or (B, R), in parts of `size` rows of similar length, which need less padding.

    Rows come back in their order; columns that a part did not have are 0. A row's result must depend on that row alone.
    A GPU takes all rows at once: more calls cost it more than more padding.

    micro_batch: at most so many rows at a time, for a large network; 0 for no limit. No activations are kept then, and
    the backward pass computes each part once more. Gradients stay the same, because the loss still sees all rows.
    """
    if batch.ids.device.type != "cpu":
        size = len(batch)
    if micro_batch > 0:
        size = min(size, micro_batch)
    order = (batch.prompt_lens + batch.response_lens).argsort(stable=True)                    # (B,) shortest row first
    results = []
    for rows in order.split(size):
        part = batch.select(rows).trim()
        if micro_batch > 0:
            result = checkpoint(function, part, use_reentrant=False)                          # (b,) or (b, R or fewer)
        else:
            result = function(part)
        if result.dim() == 2:
            result = nn.functional.pad(result, (0, batch.R - result.shape[1]))                # (b, R)
        results.append(result)
    return torch.cat(results)[order.argsort()]  # the argsort of a permutation undoes it


def pad_prompts(prompts, pad, device="cpu"):
    """Lists of token ids -> ids (B, P), padded on the left, and lengths (B,). ValueError for none, or an empty one."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ValueError("an empty prompt: the first response token is predicted from the token before it")
    P = max(lengths)
    ids = [[pad] * (P - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)


def collate(prompts, responses, pad, device="cpu"):
    """Two lists of lists of token ids -> Batch. A response ends with its E, unless it was cut."""
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
    """
    The minibatches of several epochs over n rows, in random order: a list of index tensors of at most `size` rows.

    Their sizes differ by one at most: a small leftover would make a whole step, and a noisy one.
    """
    batches = []
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)                                        # (n,)
        batches += order.tensor_split(math.ceil(n / size))
    return batches
