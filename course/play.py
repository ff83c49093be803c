"""
The player's process: python play.py FOLDER. It speaks with the grader in lines of JSON, over its standard streams.

It is told what Game.public says, asks {"compare": [a, b, n]}, and ends with {"logits": ...} or {"error": ...}.
"""

import json
import os
import random
import sys

from game import OverBudget, plain


class Remote:
    """The game, seen from the player's process: what Game.public says, and compare."""

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
    import torch

    torch.set_num_threads(1)
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
