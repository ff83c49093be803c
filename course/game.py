"""
The game of set 7: a tree whose rewards nobody tells you, and a budget of labels.

    game.vocab, game.horizon   the tree is mdp.Tree(game.vocab, game.horizon): 5 tokens, 4 steps, 341 responses
    game.ref, game.beta        logits of the reference (S, V), and the price of a nat of KL
    game.compare(a, b, n)      n episodes of each of two policies (logits, (S, V)), and n labels: a list of n
                               (y of a, y of b, whether a was preferred); Bradley-Terry with the hidden rewards
    game.labels_left           300 at the start; an episode more costs nothing but its label

A player sees these names and no others. The score is the share of the optimum of E[reward] - beta KL(policy || ref).
The grader plays other games than `python check.py 7`: in these the rewards are in another process, and `python game.py`
is the player's, which asks for labels over its standard streams.
"""

import json
import math
import os
import random
import sys

import torch

import mdp

VOCAB, HORIZON, LABELS = 5, 4, 300
POINTS, LOW, HIGH = 20, 0.30, 0.85  # shares of the optimum: points begin, and are all there


class OverBudget(Exception):
    """More labels were asked for than are left."""


def points(share):
    return round(POINTS * min(1.0, max(0.0, (share - LOW) / (HIGH - LOW))), 1)


class Game:
    """A game with its rewards. `public` is what the player is told."""

    def __init__(self, seed):
        def generator(purpose):  # one for each purpose: numbers that a player sees tell nothing about the others
            return random.Random(f"{seed} {purpose}")

        self.vocab, self.horizon, self.labels_left = VOCAB, HORIZON, LABELS
        self._tree = mdp.Tree(VOCAB, HORIZON)
        self.beta = round(generator("beta").uniform(0.3, 0.5), 3)
        rng = generator("reference")
        self.ref = [[rng.gauss(0, 1) for _ in range(VOCAB)] for _ in range(self._tree.S)]
        rng = generator("rewards")
        words = [rng.gauss(0, 0.7) for _ in range(VOCAB)]
        pairs = [[rng.gauss(0, 0.7) for _ in range(VOCAB)] for _ in range(VOCAB)]
        self._rewards = [sum(words[t] for t in y) + sum(pairs[a][b] for a, b in zip(y, y[1:])) + rng.gauss(0, 0.2)
                         for y in self._tree.leaves]
        self._episodes, self._labels = generator("episodes"), generator("labels")

    def public(self):
        """The rules that the player is told at the start."""
        return dict(vocab=self.vocab, horizon=self.horizon, beta=self.beta, ref=self.ref, labels_left=self.labels_left)

    def compare(self, a, b, n):
        """n labelled pairs of responses, by their numbers in mdp.Tree. Raises OverBudget, ValueError for no policy."""
        n = int(n)
        if not 1 <= n <= self.labels_left:
            raise OverBudget(f"{n} labels were asked for and {self.labels_left} are left")
        logits = [torch.tensor(plain(policy), dtype=torch.float64).view(self._tree.S, VOCAB) for policy in (a, b)]
        weights = [mdp.response_logp(self._tree, policy).exp().tolist() for policy in logits]
        self.labels_left -= n
        drawn = [self._episodes.choices(range(len(w)), w, k=n) for w in weights]
        wins = [self._labels.random() < 1 / (1 + math.exp(self._rewards[y] - self._rewards[x])) for x, y in zip(*drawn)]
        return list(zip(*drawn, wins))


def share(game, logits):
    """The share of J* - J(ref) of a policy, at most 1; -inf if it is none."""
    ref, rewards = (torch.tensor(x, dtype=torch.float64) for x in (game.ref, game._rewards))
    try:
        policy = torch.tensor(plain(logits), dtype=torch.float64).view(ref.shape)
        at_ref, at_policy = (mdp.objective(game._tree, x, ref, rewards, game.beta) for x in (ref, policy))
        found = float((at_policy - at_ref) / (mdp.solve(game._tree, ref, rewards, game.beta).J - at_ref))
    except Exception:
        return -math.inf
    return min(1.0, found) if math.isfinite(found) else -math.inf


def plain(logits):
    """Logits as a list of lists, from a tensor too."""
    return logits.tolist() if hasattr(logits, "tolist") else logits


class Remote:
    """The game in the player's process: {"compare": [a, b, n]} asks for labels."""

    def __init__(self, write):
        self._write = write
        self.__dict__.update(json.loads(sys.stdin.readline()))

    def compare(self, a, b, n):
        self._write.write(json.dumps({"compare": [plain(a), plain(b), int(n)]}) + "\n")
        self._write.flush()
        answer = json.loads(sys.stdin.readline())
        if "error" in answer:
            raise OverBudget(answer["error"])
        self.labels_left = answer["labels_left"]
        return [tuple(row) for row in answer["labels"]]


def main():
    write = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a player's print must not mix with the messages
    sys.modules["game"] = sys.modules[__name__]  # so that a player can catch game.OverBudget
    torch.manual_seed(0)
    random.seed(0)
    try:
        import open_end

        answer = json.dumps({"logits": plain(open_end.train(Remote(write)))})
    except BaseException as fault:
        answer = json.dumps({"error": type(fault).__name__})
    write.write(answer + "\n")
    write.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
