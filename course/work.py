"""One problem, from the student's file to points: check.py and the grader go this way."""

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


def ask(files, problem, ours, cases, run):
    """The answers of a child to the cases, or None. run(folder, request, seconds) -> the text that it wrote."""
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as folder:
        write(folder, files)
        request = dict(set=problem.set, key=problem.key, ours=ours, cases=cases)
        text = run(os.path.realpath(folder), json.dumps(request), problem.seconds)
    return json.loads(text) if text else None


def grade_problem(files, problem, case, handed_in, run):
    """(points, sentence) of what was handed in, {path: bytes}. Nothing in it can stop the grading of other problems."""
    helpers = {name: (HERE / name).read_bytes() for name in HELPERS}
    number = PROBLEMS.index(problem)
    folder = {**handed_in, **emptied(files, PROBLEMS[number:]), **helpers}  # no true text from here on
    earlier = [other.place.partition("::")[2] for other in PROBLEMS[:number] if other.file == problem.file]
    try:
        answers = ask(folder, problem, {problem.file.removesuffix(".py"): earlier}, case["cases"], run)
        return verdict(problem, case["cases"], case["expected"], answers, hidden=True)
    except Exception as fault:  # a full disk, a number with 400 digits, brackets a thousand deep
        return 0, "it took too long and was stopped" if isinstance(fault, TimeoutError) else "no values came back"
