"""
The true code's values: python expect.py PROJECT SET SEED prints {key: {"cases": inputs, "expected": outputs}}.

Trusted: it runs our files only. make.py calls it for the visible cases, the grader for the hidden ones.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path


def expected(number, seed):
    """{key: cases and outputs} of the problems of a set."""
    from draw import Draw, runner
    from problems import SETS
    from values import decode, encode

    module = importlib.import_module(f"set{number}")
    found = {}
    for problem in SETS[number].problems:
        cases = [encode(case) for case in getattr(module, f"draw_{problem.key}")(Draw(f"{seed} {problem.key}"))]
        run = runner(module, problem.key)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[problem.key] = dict(cases=cases, expected=[encode(run(decode(case))) for case in cases])
    return found


def main():
    project, number, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(project).resolve())]
    import torch

    torch.set_num_threads(1)
    json.dump(expected(number, seed), sys.stdout)


if __name__ == "__main__":
    main()
