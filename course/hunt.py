"""
Set 6: the bugs of the hunt are planted bugs of tests/planted.py, in functions that no earlier set asks for.

A student's variant decides which BUGS of them are in the working copy, and which others the student's tests meet.
"""

import ast
import json
import os
import random
import time

import cut
import sandbox
from problems import HUNTED
from project import path_of, read_submission, write

BUGS = 5        # in the working copy
EACH = 2        # points for a repaired function: few, because a comparison with the handout finds the five
TESTED = 10     # bugs that the student's test file is run against; the first BUGS are those above
KILL = 3        # points for each that it kills
TEST_FILE = "test_hunt.py"
PARTS = ("values.py", "draw.py", "set1.py", "set2.py", "set6.py", "loops.py")  # what the model answer is made of


def entries():
    """(number, name, points) of each line of the result."""
    return [*((f"6.{i + 1}", f"6.{i + 1} bug {i + 1} of {BUGS}", EACH) for i in range(BUGS)),
            (f"6.{BUGS + 1}", f"6.{BUGS + 1} write the test", KILL * TESTED)]


def choose(bugs, seed):
    """TESTED bugs of this variant, in different functions as far as there are enough."""
    bugs = sorted(bugs, key=lambda bug: bug["name"])
    random.Random(seed).shuffle(bugs)
    first = {}
    for bug in bugs:
        first.setdefault(bug["place"], bug)
    return list(first.values())[:TESTED]


def planted(files, bugs):
    """The files with these bugs in them, the last place first, so that the others stay where they were."""
    files = dict(files)
    for bug in sorted(bugs, key=lambda bug: -bug["start"]):
        text = files[bug["path"]]
        files[bug["path"]] = text[:bug["start"]] + bug["wrong"] + text[bug["end"]:]
    return files


def same(text, other, place):
    """Whether a function is the same in two files, comments and blanks aside. Missing counts as different."""
    try:
        found = [ast.dump(cut.find(cut.parse(x, place), place)[0]) for x in (text, other)]
    except cut.Missing:
        return False
    return found[0] == found[1]


def grade_hunt(here, files, submission, seed, results, deadline):
    from grade import grade_problem, hidden_cases, secret

    bugs = choose(json.loads((here / "bugs.json").read_text(encoding="utf-8")), seed)
    mine = bugs[:BUGS]
    handed_out = planted(files, mine)
    paths = sorted({path_of(files, problem.place) for problem in HUNTED})
    texts = read_submission(submission, paths, [TEST_FILE])
    cases = hidden_cases(6, seed)

    def right(problem):
        seconds = max(1, min(40, int(deadline - time.monotonic())))
        return not grade_problem(files, problem, texts, cases[problem.key], seconds, "", ())[0]

    places = [bug["place"] for bug in mine]
    repaired = []
    for problem in (next(p for p in HUNTED if p.place == place) for place in places):
        path = path_of(files, problem.place)
        untouched = path not in texts or same(texts[path], handed_out[path], problem.place)
        repaired.append(not untouched and right(problem))
    changed = [p for p in HUNTED if p.place not in places and path_of(files, p.place) in texts
               and not same(texts[path_of(files, p.place)], files[path_of(files, p.place)], p.place)]
    broken = [p.place for p in changed[:8] if not right(p)]
    left = max(0, sum(repaired) - len(broken))
    for i, done in enumerate(repaired):
        paid = done and left > 0
        left -= paid
        output = "repaired" if paid else "repaired, but it pays for what was broken" if done else "still there"
        if broken:
            output += f"; broken on the way: {', '.join(broken)}"
        results.set(f"6.{i + 1}", EACH if paid else 0, output)
    score, output = grade_tests(files, bugs, texts.get(TEST_FILE), f"{seed} {secret(here)} order", deadline)
    results.set(f"6.{BUGS + 1}", KILL * score, output)


def unparsed(files):
    """The files without comments: a test that looks at the text and not at what it does would fail here."""
    return {path: ast.unparse(ast.parse(text)) if path.endswith(".py") else text for path, text in files.items()}


def run_tests(files, test, seconds):
    """The exit status of pytest: 0 all passed, 1 some failed."""
    with sandbox.Folder() as folder:
        ini = "[pytest]\npythonpath = .\naddopts = -q -x -p no:cacheprovider --import-mode=importlib\n"
        write(folder.path, {**files, TEST_FILE: test, "pytest.ini": ini})
        folder.hand_over()
        command = [*sandbox.python(), "-m", "pytest", os.path.join(folder.path, TEST_FILE)]
        return sandbox.run(command, folder.path, seconds, descriptor=False)[0]


def grade_tests(files, bugs, test, order, deadline):
    """(number, sentence): how many bugs the test file kills, if it passes on the true code, twice."""
    if test is None:
        return 0, f"{TEST_FILE} was not handed in"
    true = unparsed(files)
    runs = [("true", true), *((bug["name"], unparsed(planted(files, [bug]))) for bug in bugs)]
    random.Random(order).shuffle(runs)
    runs = [("true", files), *runs]
    killed = 0
    for name, version in runs:
        seconds = max(1, min(60, int(deadline - time.monotonic())))
        status = run_tests(version, test, seconds)
        if name == "true" and status != 0:
            return 0, f"{TEST_FILE} does not pass on the true code, without bugs and without comments"
        killed += name != "true" and status == 1
    return killed, f"{killed} of {len(bugs)} planted bugs are killed, {BUGS} of them your own"


MODEL_ANSWER = '''"""Made by course/make.py: every function that may hold a bug, beside numbers of the true code."""

import importlib
import json
import sys

import pytest

PARTS = json.loads({parts!r})
CASES = json.loads({cases!r})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for name, text in PARTS.items():
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    return importlib.import_module("set6"), importlib.import_module("values")


@pytest.mark.parametrize("key", CASES)
def test_it_gives_the_numbers_of_the_true_code(parts, key):
    set6, values = parts
    got = [values.encode(getattr(set6, f"run_{{key}}")(values.decode(case))) for case in CASES[key]["cases"]]
    assert values.compare(key, CASES[key]["expected"], got) == ""
'''


def model_answer(root, seed, parts):
    """The text of a test file that kills every bug: it calls each function and compares with stored numbers."""
    from expect import expected

    return MODEL_ANSWER.format(parts=json.dumps(parts), cases=json.dumps(expected(6, f"{seed} answer", HUNTED)))
