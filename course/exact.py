"""
The tree of mdp.py in plain Python: the share of the optimum of a policy, without torch and without the student's code.

The responses to an empty prompt are all strings of tokens that end with token 0, or have `horizon` tokens. States are
numbered as in mdp.Tree: by length, then in the order of their tokens.
"""

import itertools
import math


class Tree:
    def __init__(self, vocab, horizon):
        self.vocab = vocab
        inner = [state for t in range(horizon) for state in itertools.product(range(1, vocab), repeat=t)]
        self.index = {state: i for i, state in enumerate(inner)}
        children = [(*state, action) for state in inner for action in range(vocab)]
        self.leaves = [child for child in children if child not in self.index]
        self.S = len(inner)

    def response_logp(self, logits):
        """log pi(y) of every response, from logits (S, V), a list of lists. ValueError unless it is one of numbers."""
        if not (isinstance(logits, list) and len(logits) == self.S):
            raise ValueError(f"the logits have {self.S} rows, one for each state")
        rows = []
        for row in logits:
            numbers = isinstance(row, list) and all(type(x) in (int, float) and math.isfinite(x) for x in row)
            if not numbers or len(row) != self.vocab:
                raise ValueError(f"a row of logits is {self.vocab} finite numbers")
            top = max(row)
            total = top + math.log(sum(math.exp(x - top) for x in row))
            rows.append([x - total for x in row])
        return [sum(rows[self.index[leaf[:t]]][token] for t, token in enumerate(leaf)) for leaf in self.leaves]

    def objective(self, logp, ref_logp, rewards, beta):
        return sum(math.exp(a) * (r - beta * (a - b)) for a, b, r in zip(logp, ref_logp, rewards))

    def share(self, logits, ref, rewards, beta):
        """(J(pi) - J(ref)) / (J* - J(ref)): 0 for the reference, 1 for the optimum."""
        ref_logp = self.response_logp(ref)
        at_ref = self.objective(ref_logp, ref_logp, rewards, beta)
        exponents = [b + r / beta for b, r in zip(ref_logp, rewards)]
        top = max(exponents)
        best = beta * (top + math.log(sum(math.exp(x - top) for x in exponents)))  # J* = beta log Z
        return (self.objective(self.response_logp(logits), ref_logp, rewards, beta) - at_ref) / (best - at_ref)


def share_of(case, got):
    """The share of the optimum of the logits in the encoded outputs of a case; -inf if they are none."""
    try:
        tensors = [case["ref"]["tensor"], case["rewards"]["tensor"]]
        return Tree(case["vocab"], case["horizon"]).share(got["logits"]["tensor"], *tensors, case["beta"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return -math.inf
