"""
The game of set 7: a tree whose rewards nobody tells you, and a budget of labels.

    game.vocab, game.horizon   the tree is mdp.Tree(game.vocab, game.horizon): 5 tokens, 4 steps, 341 responses
    game.ref, game.beta        logits of the reference (S, V), and the price of a nat of KL
    game.compare(a, b, n)      n episodes of each of two policies (logits, (S, V)), and n labels: a list of n
                               (y of a, y of b, whether a was preferred); Bradley-Terry with the hidden rewards
    game.labels_left           300 at the start; an episode more costs nothing but its label

A player sees these names and no others. The score is the share of the optimum of E[reward] - beta KL(policy || ref).
The grader plays other games than `python check.py 7`: in these the rewards are in another process.
"""

import math
import random

from exact import Tree

VOCAB, HORIZON, LABELS = 5, 4, 300


class OverBudget(Exception):
    """More labels were asked for than are left."""


class Game:
    """A game with its rewards. `public` is what the player is told."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.vocab, self.horizon, self.labels_left = VOCAB, HORIZON, LABELS
        self.tree = Tree(VOCAB, HORIZON)
        self.beta = round(rng.uniform(0.3, 0.5), 3)
        self.ref = [[rng.gauss(0, 1) for _ in range(VOCAB)] for _ in range(self.tree.S)]
        words = [rng.gauss(0, 0.7) for _ in range(VOCAB)]
        pairs = [[rng.gauss(0, 0.7) for _ in range(VOCAB)] for _ in range(VOCAB)]
        self._rng = rng
        self._rewards = [sum(words[t] for t in y) + sum(pairs[a][b] for a, b in zip(y, y[1:])) + rng.gauss(0, 0.2)
                         for y in self.tree.leaves]

    def public(self):
        """What the player is told at the start."""
        return dict(vocab=self.vocab, horizon=self.horizon, beta=self.beta, ref=self.ref, labels_left=self.labels_left)

    def compare(self, a, b, n):
        """n labelled pairs of responses, by their numbers in mdp.Tree. Raises OverBudget, ValueError for no policy."""
        n = int(n)
        if not 0 <= n <= self.labels_left:
            raise OverBudget(f"{n} labels were asked for and {self.labels_left} are left")
        weights = [[math.exp(x) for x in self.tree.response_logp(plain(policy))] for policy in (a, b)]
        self.labels_left -= n
        drawn = [self._rng.choices(range(len(w)), w, k=n) for w in weights]
        wins = [self._rng.random() < 1 / (1 + math.exp(self._rewards[y] - self._rewards[x])) for x, y in zip(*drawn)]
        return list(zip(*drawn, wins))

    def share(self, logits):
        """The share of the optimum of a policy; -inf if it is none."""
        try:
            return self.tree.share(plain(logits), self.ref, self._rewards, self.beta)
        except (ValueError, TypeError, OverflowError):
            return -math.inf


class Seen:
    """A game as the player of the grader sees it: nothing but the names at the top of this file."""

    def __init__(self, game):
        self._compare = game.compare
        self.__dict__.update(game.public())

    def compare(self, a, b, n):
        labels = self._compare(a, b, n)
        self.labels_left -= len(labels)
        return labels


def plain(logits):
    """Logits as a list of lists, from a tensor too."""
    return logits.tolist() if hasattr(logits, "tolist") else logits
