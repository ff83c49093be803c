"""
The player's process: python play.py FOLDER READ WRITE. It speaks with the grader in lines of JSON.

It is told what Game.public says, asks {"compare": [a, b, n]}, and ends with {"logits": ...} or {"error": ...}.
"""

import json
import os
import random
import sys


class Remote:
    """The game, seen from the player's process: what Game.public says, and compare."""

    def __init__(self, read, write):
        self._read, self._write = read, write
        self.__dict__.update(json.loads(read.readline()))

    def compare(self, a, b, n):
        from game import OverBudget, plain

        self._write.write(json.dumps({"compare": [plain(a), plain(b), int(n)]}) + "\n")
        self._write.flush()
        answer = json.loads(self._read.readline())
        if "error" in answer:
            raise OverBudget(answer["error"])
        self.labels_left = answer["labels_left"]
        return [tuple(row) for row in answer["labels"]]


def main():
    folder = os.path.realpath(sys.argv[1])
    sys.path[:0] = [folder]
    with open(int(sys.argv[2]), encoding="utf-8") as read, open(int(sys.argv[3]), "w", encoding="utf-8") as write:
        import torch
        from child import say
        from game import plain

        torch.set_num_threads(1)
        torch.manual_seed(0)
        random.seed(0)
        try:
            import open_end

            answer = {"logits": plain(open_end.train(Remote(read, write)))}
            line = json.dumps(answer)
        except BaseException as fault:
            line = json.dumps({"error": say(fault, folder)})
        write.write(line + "\n")


if __name__ == "__main__":
    main()
