"""The planted bugs of tests/planted.py as slices of text: which function each one is in, what it replaces by what."""

import ast
import sys

import cut
from project import path_of

# In the hunt's functions, but no number shows them: two need a GPU, one a coincidence, and one only moves a tolerance.
UNSEEN = ("a GPU gets a few rows at a time", "a minibatch's rows stay on the CPU",
          "many pairs of few prompts prove a reward model", "the first margins are measured beside tokens")


def all_bugs(root, files, problems):
    """
    [{name, place, path, start, end, wrong}, ...]: the planted bugs that lie in a function of these problems.

    text[start:end] of the file at `path` becomes `wrong`.
    """
    sys.path.insert(0, str(root / "tests"))
    import mutants

    found = []
    for problem in problems:
        path = path_of(files, problem.place)
        text = files[path]
        first, last = cut.lines_of(cut.find(ast.parse(text), problem.place)[0])
        for mutant in mutants.MUTANTS + mutants.PIPELINE:
            if mutants.source(mutant)[0] != path or mutant.name in UNSEEN:
                continue
            places = mutants.places(mutant, text)
            if len(places) != 1:
                continue
            start, end = places[0]
            if first <= mutants.line_of(text, start) and mutants.line_of(text, end) <= last:
                found.append(dict(name=mutant.name, place=problem.place, path=path, start=start, end=end,
                                  wrong=mutant.wrong.strip()))
    return found
