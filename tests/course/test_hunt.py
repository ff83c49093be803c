"""The points of the bug hunt: for what was repaired, less what was broken on the way."""

import collections
import json
import sys
from pathlib import Path

import pytest

COURSE = Path(__file__).resolve().parent.parent.parent / "course"
sys.path.insert(0, str(COURSE))

import cut  # noqa: E402
import grade  # noqa: E402
import hunt  # noqa: E402
from bugs import all_bugs  # noqa: E402
from problems import HUNTED, PROBLEMS  # noqa: E402
from project import path_of, read_project, write  # noqa: E402


@pytest.fixture
def hunted(tmp_path, monkeypatch):
    """(true files, the bugs of a hunt, a function of handed-in files that returns the points of the lines)."""
    files = read_project(COURSE.parent)
    bugs = all_bugs(COURSE.parent, files, HUNTED)
    (tmp_path / "bugs.json").write_text(json.dumps(bugs))
    (tmp_path / "settings.json").write_text("{}")

    def graded(files, problem, texts, *rest):
        path = path_of(files, problem.place)
        return ("" if hunt.same(texts[path], files[path], problem.place) else "wrong"), None
    monkeypatch.setattr(grade, "grade_problem", graded)
    monkeypatch.setattr(grade, "hidden_cases", lambda number, seed: collections.defaultdict(dict))
    monkeypatch.setattr(hunt, "grade_tests", lambda *args: (0, ""))

    def points(texts):
        write(tmp_path / "submission", texts)
        results = grade.Results(tmp_path / "results.json", [grade.entry(*row) for row in hunt.entries()], "")
        hunt.grade_hunt(tmp_path, files, tmp_path / "submission", "seed", results, 10 ** 9)
        return [test["score"] for test in results.tests], results.tests[0]["output"]
    return files, hunt.choose(bugs, "seed")[:hunt.BUGS], points


def test_repairs_pay_and_what_was_broken_costs(hunted):
    """The untouched copy has points, a repair has none, or a function that was broken on the way costs nothing."""
    files, bugs, points = hunted
    assert points(hunt.planted(files, bugs))[0] == [0] * 6
    assert points(hunt.planted(files, bugs[2:]))[0] == [hunt.EACH] * 2 + [0] * 4
    places = {bug["place"] for bug in bugs}
    other = next(p for p in HUNTED if p.place not in places and "::" in p.place)
    broken = hunt.planted(files, bugs[2:])
    path = path_of(files, other.place)
    broken[path] = cut.empty(broken[path], (other.place, "broken"))
    scores, output = points(broken)
    assert sum(scores) == hunt.EACH and other.place in output
    assert points(files)[0] == [hunt.EACH] * hunt.BUGS + [0]


def test_the_points_of_the_hunt_are_those_of_its_text(hunted, monkeypatch):
    """A bug that the student's tests kill counts less, or more, than the text of the set promises."""
    files, _, points = hunted
    monkeypatch.setattr(hunt, "grade_tests", lambda *args: (4, "4 of 10"))
    assert points(files)[0] == [2] * 5 + [12]
    assert [most for _, _, most in hunt.entries()] == [2] * 5 + [30]
    text = (COURSE / "sets" / "6.md").read_text(encoding="utf-8")
    assert "**2 points for each repaired function** (10)" in text and "**30 points for your test file**" in text


def test_other_changes_cost_nothing(hunted):
    """A comment or a blank counts as a repair, or a change outside of the hunt's functions as broken."""
    files, bugs, points = hunted
    commented = {path: text + "\n# read\n" if path.endswith(".py") else text
                 for path, text in hunt.planted(files, bugs).items()}
    assert points(commented)[0] == [0] * 6
    outside = next(p for p in PROBLEMS if p.key == "whiten")
    changed = {**files, "ppo.py": cut.empty(files["ppo.py"], (outside.place, "other"))}
    assert points(changed)[0] == [hunt.EACH] * hunt.BUGS + [0]


def test_the_files_of_a_test_have_no_comments():
    """A test that compares texts passes on the true code, and kills every bug."""
    assert hunt.unparsed({"a.py": "x = 1  # one\n", "b.html": "<p>"}) == {"a.py": "x = 1", "b.html": "<p>"}
