"""The planted bugs have one place each and a killer that exists; and the runner sees what is not killed."""

import mutants
import pytest
from planted import BUGS, Bug, locate, plant

TEXT = "def f(x):\n    return x + 1\n\n\nclass C:\n    def g(self, x):\n        return x + 1\n"


def test_each_bug_has_one_place_and_names_a_test():
    """Bug: code or a test was rewritten, and a planted bug was forgotten; or the table grows until nobody reads it."""
    for bug in BUGS:
        file, killer = bug.place.split("::")[0], bug.killer.split("::")
        text, tests = [(mutants.ROOT / name).read_text(encoding="utf-8") for name in (file, killer[0])]
        assert plant(bug, text) != text, bug
        assert f"def {killer[1].split('[')[0]}(" in tests, bug
    assert len({bug[1:4] for bug in BUGS}) == len(BUGS) <= 200


def test_where_a_text_stands():
    """Bug: another place is taken for the bug's, or one of two."""
    for place, line in (("x.py::f", 2), ("x.py::C", 7), ("x.py::g", 7)):
        start, end = locate(Bug("-", place, "x + 1", "x - 1", ""), TEXT)
        assert TEXT[start:end] == "x + 1" and TEXT.count("\n", 0, start) + 1 == line
    for place, right in (("x.py", "x + 1"), ("x.py", "x + 2"), ("x.py::f", "self")):
        with pytest.raises(ValueError, match="times in x.py"):
            locate(Bug("-", place, right, "", ""), TEXT)


@pytest.mark.slow
def test_the_runner_sees_what_is_not_killed(tmp_path, capsys):
    """Bug: a bug that nobody sees, or a test that could not run, counts as killed; or one that hangs stops all."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "some.py").write_text(TEXT)
    (base / "test_some.py").write_text("import some\n\n\ndef test_f():\n    assert some.f(1) == 2\n")
    (base / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    words = {"x - 1": "killed", "2 * x": "SURVIVED", "(": "BROKEN", "__import__('os').abort()": "BROKEN",
             "exec('while True: pass')": "HANGS"}
    bugs = [Bug("-", "some.py::f", "x + 1", wrong, "test_some.py::test_f") for wrong in words]
    assert not mutants.try_bugs(base, bugs, limit=10)
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "some.py::f" in line and " -> " in line]
    assert last == "1 of 5 planted bugs killed"
    assert {row.split(" -> ")[1].strip('"\''): row.split()[0] for row in rows} == words
    assert mutants.try_bugs(base, bugs[:1])
