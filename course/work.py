"""
One problem, from the student's file to points. check.py and the grader go this way, with other cases and another `run`.
"""

import json
import os
import tempfile
from pathlib import Path

from judge import verdict
from problems import PROBLEMS
from project import emptied, write

HERE = Path(__file__).resolve().parent
HELPERS = ("child.py", "values.py", "draw.py", "problems.py", "sets/problems.csv", "set1.py", "set2.py", "set3.py",
           "set4.py", "set5.py")


def place_of(problem):
    """The index of a problem; its seconds may be fewer than in the table."""
    return [other.number for other in PROBLEMS].index(problem.number)


def others(problem):
    """{module: names} of the earlier problems that are in the same file: ours take the student's places."""
    earlier = PROBLEMS[:place_of(problem)]
    names = [other.place.partition("::")[2] for other in earlier if other.file == problem.file]
    return {problem.file.removesuffix(".py"): names}


def folder_of(files, problem):
    """{path: text} of a child's folder: our files, in which this problem and all later ones are empty."""
    helpers = {name: (HERE / name).read_bytes() for name in HELPERS}
    return {**emptied(files, PROBLEMS[place_of(problem):]), **helpers}


def ask(files, problem, ours, cases, run):
    """The answers of a child to the cases, or None. run(folder, request, seconds) -> the text that it wrote."""
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as folder:
        write(folder, files)
        request = dict(set=problem.set, key=problem.key, ours=ours, cases=cases)
        text = run(os.path.realpath(folder), json.dumps(request), problem.seconds)
    return json.loads(text) if text else None


def grade_problem(files, problem, case, handed_in, run):
    """
    (points, sentence) of what was handed in, {path: bytes}. Nothing in it can stop the grading of other problems.
    """
    folder = {**handed_in, **folder_of(files, problem)}
    try:
        answers = ask(folder, problem, others(problem), case["cases"], run)
        return verdict(problem, case["cases"], case["expected"], answers, hidden=True)
    except Exception as fault:  # a full disk, a number with 400 digits, brackets a thousand deep
        return 0, "it took too long and was stopped" if isinstance(fault, TimeoutError) else "no values came back"
