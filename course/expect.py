"""
What the true code gives: python expect.py PROJECT SET SEED prints {key: {"cases": inputs, "expected": outputs}}.

Trusted: it runs our files only. make.py calls it for the visible cases, the grader for the hidden ones.
"""

import importlib
import json
import sys
from pathlib import Path


def expected(number, seed, problems):
    """{key: cases and outputs} of the problems of a set."""
    from draw import Draw
    from values import decode, encode

    module = importlib.import_module(f"set{number}")
    found = {}
    for problem in problems:
        cases = [encode(case) for case in getattr(module, f"draw_{problem.key}")(Draw(f"{seed} {problem.key}"))]
        run = getattr(module, f"run_{problem.key}")
        found[problem.key] = dict(cases=cases, expected=[encode(run(decode(case))) for case in cases])
    return found


def main():
    project, number, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(project).resolve())]
    import torch

    torch.set_num_threads(1)
    from problems import HUNTED, SETS

    json.dump(expected(number, seed, HUNTED if number == 6 else SETS[number].problems), sys.stdout)


if __name__ == "__main__":
    main()
