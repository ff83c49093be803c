"""
The proof that the course grades right: python course/make.py --prove

For every set: stubs get 0 points and the solution all; zeros, ones and the first argument get nothing; every planted bug
that touches an emptied function costs the points of that problem, and no other is graded with other files; the same
submission gives the same bytes. grade.py is what Gradescope runs; where only one function is in question, the values
come from a fork of this process, which is faster and otherwise the same.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import types
import warnings

import cut
from judge import verdict
from problems import HUNTED, PROBLEMS, SETS
from project import emptied, path_of, with_student, write

HELPERS = ("draw.py", "set1.py", "set2.py", "set3.py", "set4.py", "set5.py", "set6.py")


def fill(value, number):
    """A value of the same kind, made of zeros or ones."""
    if isinstance(value, types.GeneratorType):
        return [fill(item, number) for item in value]
    if isinstance(value, dict):
        return {name: fill(item, number) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[fill(item, number) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(fill(item, number) for item in value)
    if dataclasses.is_dataclass(value):
        parts = {field.name: fill(getattr(value, field.name), number) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if hasattr(value, "new_full"):
        return value.detach().clone().fill_(number)
    return type(value)(number) if isinstance(value, (bool, int, float)) else value


def copied(args):
    found = []
    for arg in args:
        try:
            found.append(copy.deepcopy(arg))
        except Exception:  # a generator of random numbers
            found.append(arg)
    return found


def fakes(true):
    """{name: function}: the wrong functions that must get nothing."""
    import torch

    made = {
        "zeros": lambda *args, **options: fill(true(*copied(args), **options), 0),
        "ones": lambda *args, **options: fill(true(*copied(args), **options), 1),
        "a zero": lambda *args, **options: torch.zeros(()),
        "a one": lambda *args, **options: 1.0,
        "its first argument": lambda *args, **options: args[0],
        "its second argument": lambda *args, **options: args[1] if len(args) > 1 else None,
        "nothing": lambda *args, **options: None,
    }
    return made


def replace_function(place, make):
    """Put make(function) in the place of a function that has been imported."""
    file, names = cut.split(place)
    name = file.removesuffix(".py")
    owner = next(sys.modules[n] for n in (name, f"pipeline.{name}") if n in sys.modules)
    for part in names[:-1]:
        owner = getattr(owner, part)
    true = getattr(owner, names[-1])
    setattr(owner, names[-1], make(true))
    return lambda: setattr(owner, names[-1], true)


def values(work):
    """In a fork: the outputs of a problem in these files; with `faked`, {name: outputs} of the wrong functions."""
    here, files, problem, cases, faked = work
    import child

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write(folder, {**files, **{name: (here / name).read_text(encoding="utf-8") for name in HELPERS}})
        os.chdir(folder)
        sys.path[:] = [folder, *[path for path in sys.path if path not in ("", str(here), str(here.parent))]]
        module = f"set{problem.set}"
        if not faked:
            return child.outputs(module, problem.key, cases, folder)
        importlib.import_module(module)
        found = {}
        for name in fakes(None):
            undo = replace_function(problem.place, lambda true, name=name: fakes(true)[name])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = child.outputs(module, problem.key, cases, folder)
            undo()
        return found


def in_forks(works, processes=1):
    """The values of each of the works, every one in a process that has imported torch and nothing of the project."""
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch, once
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap(values, works, 1)


def prove_functions(here, files, bugs, seed, numbers=(1, 2, 3, 4, 5, 6)):
    """
    [(kind, what, problem, message), ...] of everything that is graded: kind is solution, stub, fake or bug.

    Only for solution may the message be empty.
    """
    from grade import hidden_cases

    works, labels, cases = [], [], {}
    for number in numbers:
        cases.update({(number, key): case for key, case in hidden_cases(number, seed).items()})
    for problem in [p for p in (*PROBLEMS, *HUNTED) if p.set in numbers]:
        everything = PROBLEMS if problem.set < 6 else ()
        case = cases[problem.set, problem.key]
        true = with_student(files, problem, files, everything)
        works.append((here, true, problem, case["cases"], False))
        labels.append(("solution", "", problem))
        if problem.set < 6:
            works.append((here, with_student(files, problem, emptied(files), everything), problem, case["cases"], False))
            labels.append(("stub", "", problem))
            works.append((here, true, problem, case["cases"], True))
            labels.append(("fake", "", problem))
        for bug in [bug for bug in bugs if bug["place"] == problem.place]:
            wrong = with_bug(files, bug)
            works.append((here, with_student(files, problem, wrong, everything), problem, case["cases"], False))
            labels.append(("bug", bug["name"], problem))
    rows = []
    for (kind, what, problem), got in zip(labels, in_forks(works)):
        board = SETS[problem.set].leaderboard if problem.set in SETS else ""
        case = cases[problem.set, problem.key]
        for name, outputs in (got.items() if kind == "fake" else [(what, got)]):
            rows.append((kind, name, problem, verdict(problem, case, outputs, board)[0]))
    return rows


def with_bug(files, bug):
    text = files[bug["path"]]
    return {**files, bug["path"]: text[:bug["start"]] + bug["wrong"] + text[bug["end"]:]}


def touches_no_other(files, bug):
    """Whether every other problem of the set is graded with the same files as without the bug."""
    problem = next(p for p in PROBLEMS if p.place == bug["place"])
    wrong = with_bug(files, bug)
    return all(with_student(files, other, wrong) == with_student(files, other, files)
               for other in SETS[problem.set].problems
               if other is not problem and path_of(files, other.place) == bug["path"])


def faults(rows):
    """What is wrong with the rows of prove_functions, as sentences."""
    return [f"{kind} {what} of {problem.number} {problem.key}: {message or 'solved'}"
            for kind, what, problem, message in rows if (kind == "solution") == bool(message)]
