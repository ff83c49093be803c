"""The grader on a toy problem set: what students hand in, and what they should not."""

import json
import os
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).resolve().parent.parent.parent / "course"
sys.path.insert(0, str(COURSE))

import grade  # noqa: E402
import project  # noqa: E402
import sandbox  # noqa: E402
from problems import Problem, Set  # noqa: E402

TRUE = '''"""A toy."""

from math import e

LIMIT = 3


def double(x):
    """Twice x."""
    return 2 * x


class Box:
    def __init__(self, size):
        self.size = size

    def volume(self):
        """The cube of the size."""
        return self.size ** 3


def half(x):
    """Half of x."""
    return x / 2
'''
PROBES = '''import toy


def run_double(case):
    return dict(value=toy.double(case["x"]))


def run_volume(case):
    return dict(value=toy.Box(case["x"]).volume())


def run_half(case):
    return dict(value=toy.half(case["x"]))
'''
PROBLEMS = (Problem("9.1", "toy.py::double", 2, "", "twice"), Problem("9.2", "toy.py::Box.volume", 3, "", "a cube"),
            Problem("9.3", "toy.py::half", 4, "", "a half", seconds=3))
CASES = {"double": dict(cases=[{"x": 2.0}, {"x": -1.5}], expected=[{"value": 4.0}, {"value": -3.0}]),
         "volume": dict(cases=[{"x": 2.0}], expected=[{"value": 8.0}]),
         "half": dict(cases=[{"x": 3.0}], expected=[{"value": 1.5}])}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A grader of the toy set: a function of the text of toy.py that returns (results, their bytes)."""
    try:
        sandbox.python()
    except RuntimeError as fault:  # root, whose python lies in root's own folder
        pytest.skip(str(fault))
    here, base = tmp_path / "source", tmp_path / "autograder"
    (here / "project").mkdir(parents=True)
    (here / "project" / "toy.py").write_text(TRUE)
    (here / "settings.json").write_text('{"set": 9, "course": "toys"}')
    (here / "set9.py").write_text(PROBES)
    for name in ("child.py", "values.py"):
        (here / name).write_text((COURSE / name).read_text())
    monkeypatch.setattr(grade, "HERE", here)
    monkeypatch.setattr(grade, "HELPERS", ("child.py", "values.py", "set9.py"))
    monkeypatch.setattr(grade, "SETS", {9: Set("Toys", 0, "", PROBLEMS)})
    monkeypatch.setattr(project, "PROBLEMS", PROBLEMS)
    monkeypatch.setattr(grade, "TITLES", {9: "Toys"})
    monkeypatch.setattr(grade, "hidden_cases", lambda number, seed: CASES)
    (base / "submission").mkdir(parents=True)
    (base / "submission_metadata.json").write_text('{"users": [{"email": "a@b.org"}]}')

    def run(text):
        if text is not None:
            (base / "submission" / "toy.py").write_text(text)
        grade.main(["--base", str(base)])
        content = (base / "results" / "results.json").read_bytes()
        return json.loads(content), content
    run.base = base
    return run


def scores(results):
    return [test["score"] for test in results["tests"]]


def with_double(body):
    return TRUE.replace("    return 2 * x\n", body)


def test_the_solution_gets_all_and_the_same_bytes_twice(toy):
    """A clock, an order or an address gets into the result."""
    results, first = toy(TRUE)
    assert scores(results) == [2, 3, 4] and results["score"] == 9
    assert toy(TRUE)[1] == first


def test_the_result_has_gradescopes_fields(toy):
    """A field is misspelt, and Gradescope shows nothing."""
    results, _ = toy(with_double("    return 1 / 0\n"))
    assert set(results) == {"score", "output", "visibility", "tests"}
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output", "visibility"}
        assert test["status"] in ("passed", "failed") and test["visibility"] == "visible"
        assert 0 <= test["score"] <= test["max_score"]
    assert results["score"] == sum(scores(results))
    output = results["tests"][0]["output"]
    assert "ZeroDivisionError" in output and "in double: return 1 / 0" in output
    assert "a@b.org" in results["output"]


def test_a_wrong_number_is_named(toy):
    """The student is told that something is wrong, and not what."""
    results, _ = toy(with_double("    return x\n"))
    assert results["tests"][0]["output"] == "double: value expected 4.000, got 2.000 (case 1): twice"
    assert scores(results) == [0, 3, 4]


def test_helpers_imports_and_other_changes(toy):
    """A helper that the student wrote is lost, or a change elsewhere is taken along."""
    helper = "import math\n\nTWO = 2\nLIMIT = 9\n\n\ndef twice(x):\n    return math.prod([TWO, x])"
    text = TRUE.replace("LIMIT = 3", helper)
    text = text.replace("return 2 * x", "return twice(x) if LIMIT == 3 else 0").replace("return x / 2", "return 7")
    assert scores(toy(text)[0]) == [2, 3, 0]


def test_names_beside_those_of_ours(toy):
    """A name beside names of ours in one line, or a tried import, is lost; or a change of ours is taken along."""
    mine = ("from __future__ import annotations\n\nfrom math import e, prod\n\nLIMIT, TWO = 9, 2\ntry:\n"
            "    from nothing import one\nexcept ImportError:\n    one = 1\n")
    text = TRUE.replace("from math import e\n\nLIMIT = 3\n", mine).replace("def double(x):", "def double(x: Unknown):")
    text = text.replace("return 2 * x", "return prod([TWO, x, one]) if LIMIT == 3 else 0")
    assert scores(toy(text)[0]) == [2, 3, 4]


def test_earlier_functions_are_there_and_later_ones_are_not(toy):
    """Who calls a function that was written before loses points, or a later one can be looked up."""
    assert scores(toy(TRUE.replace("return x / 2", "return double(x) / 4"))[0]) == [2, 3, 4]
    results, _ = toy(with_double("    return 4 * half(x)\n"))
    assert scores(results) == [0, 3, 4] and "problem 9.3" in results["tests"][0]["output"]


@pytest.mark.parametrize("text", [None, "", "def double(x:\n", "\0", "(" * 5000, "x = 1\n", "raise SystemExit\n"])
def test_what_is_no_submission_gets_nothing(toy, text):
    """The grader fails on a file that is missing, empty or no Python."""
    results, _ = toy(text)
    assert scores(results) == [0, 0, 0] and all(test["output"] != grade.NOT_YET for test in results["tests"])


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can drop its privileges")
def test_malicious_functions_get_nothing_and_the_others_are_graded(toy, monkeypatch):
    """One submission ends, blocks, fills or fakes the grading of the others."""
    monkeypatch.setattr(grade, "SETS", {9: Set("Toys", 0, "", tuple(p._replace(seconds=2) for p in PROBLEMS))})
    target = toy.base / "results" / "results.json"
    secret = grade.HERE / "project" / "toy.py"
    bodies = dict(
        prints="    while True:\n        print('x' * 9999)\n",
        sleeps="    import time\n    time.sleep(600)\n",
        computes="    while True:\n        pass\n",
        memory="    return len(bytearray(10 ** 10))\n",
        exits="    raise SystemExit(0)\n",
        leaves="    import os\n    os._exit(0)\n",
        result=f"    open({str(target)!r}, 'w').write('{{}}')\n    return 2 * x\n",
        reads=f"    open({str(secret)!r}).read()\n    return 2 * x\n",
        spoils="    import os\n    for d in range(1, 9):\n        try:\n            os.write(d, b'[{\"value\": 4}]')\n"
               "        except OSError:\n            pass\n    os._exit(0)\n",
        child="    import os, time\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(600)\n"
              "    return 0\n",
        files="    import glob, os\n    for f in glob.glob('*.py'):\n        os.remove(f)\n"
              "    os.kill(os.getppid(), 9)\n")
    for name, body in bodies.items():
        results, _ = toy(with_double(body))
        assert scores(results) == [0, 3, 4], name
        assert not sandbox.processes(), name


def test_the_file_is_there_before_the_first_problem(toy, monkeypatch):
    """A grader that is killed leaves no valid result."""
    seen = []

    def stop(*args):
        seen.append(json.loads((toy.base / "results" / "results.json").read_text()))
        raise KeyboardInterrupt
    monkeypatch.setattr(grade, "grade_problem", stop)
    with pytest.raises(KeyboardInterrupt):
        toy(TRUE)
    assert seen[0]["score"] == 0 and [test["output"] for test in seen[0]["tests"]] == [grade.NOT_YET] * 3


def test_a_zip_of_a_folder(toy):
    """Files that lie in a folder of the submission are not found."""
    (toy.base / "submission" / "my work").mkdir()
    (toy.base / "submission" / "my work" / "toy.py").write_text(TRUE)
    assert scores(toy(None)[0]) == [2, 3, 4]


def test_links_are_not_followed(toy):
    """A link in the submission shows a file that only root can read."""
    (toy.base / "submission" / "toy.py").symlink_to(grade.HERE / "project" / "toy.py")
    assert scores(toy(None)[0]) == [0, 0, 0]
