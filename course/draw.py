"""
Random inputs for the cases of the problems. Everything follows from a text, the seed: the same text, the same cases.

A variant belongs to a course and a student. It decides beta, rewards and words here, and the bugs of the hunt.
"""

import hashlib

import torch

from data import Batch, collate
from model import GPT, GPTConfig

WORDS = "good bad very fine dull warm cold loud slow rich".split()
E, PAD, VOCAB = 9, 10, 11  # of the tiny networks


class Draw:
    """Numbers that follow from a text."""

    def __init__(self, text):
        digest = hashlib.sha256(text.encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low, high):
        """An integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def between(self, low, high):
        return round(low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64)), 3)

    def beta(self):
        return self.between(0.2, 0.9)

    def words(self, n):
        order = torch.randperm(len(WORDS), generator=self.generator).tolist()
        return [WORDS[i] for i in order[:n]]

    def lengths(self, B, R):
        """Lengths of B responses: 1, R, and others between."""
        return torch.tensor([1, R, *(self.integer(1, R) for _ in range(B - 2))])

    def mask(self, B, R):
        """A mask (B, R) of responses of mixed lengths."""
        return torch.arange(R) < self.lengths(B, R)[:, None]

    def texts(self, B=5, prompt=5, response=6):
        """B prompts and responses as ids, mixed lengths, every other response ends with E."""
        prompts, responses = [], []
        for row in range(B):
            p = (prompt, 1)[row] if row < 2 else self.integer(1, prompt)
            r = (2, response)[row] if row < 2 else self.integer(1, response)
            prompts.append([self.integer(0, E - 1) for _ in range(p)])
            responses.append([self.integer(0, E - 1) for _ in range(r)])
            if row % 2:
                responses[-1][-1] = E
        return dict(prompts=prompts, responses=responses)


def batch_of(texts):
    return collate(texts["prompts"], texts["responses"], PAD)


def network(seed, block=24, embd=8, heads=2, vocab=VOCAB, std=0.3):
    """A tiny GPT in float64 whose weights follow from the seed."""
    with torch.random.fork_rng():
        model = GPT(GPTConfig(vocab, block, 2, heads, embd)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


class Trunk:
    """Stands for a GPT whose hidden states are known: `hidden` returns them, whatever it reads."""

    def __init__(self, states):
        self.states = states

    def hidden(self, ids, start=None, caches=None):
        return self.states


def raised(function, *args, **options):
    """The name of the exception that a call raises, "" if none."""
    try:
        function(*args, **options)
    except NotImplementedError:
        raise
    except Exception as fault:
        return type(fault).__name__
    return ""


def with_gradient(function, x):
    """(value, d value / d x) of a scalar function of a tensor."""
    x = x.clone().requires_grad_()
    value = function(x)
    value.backward()
    return dict(value=value, gradient=x.grad)


__all__ = ["Batch", "Draw", "E", "PAD", "Trunk", "VOCAB", "batch_of", "network", "raised", "with_gradient"]
