"""The planted bugs have one place each and a killer that exists; and the runner sees what is not killed."""

import ast

import mutants
import pytest
from planted import BUGS, Bug, locate, plant

TEXT = "def f(x):\n    return x + 1\n\n\nclass C:\n    def g(self, x):\n        return x + 1\n"


def read(file):
    return (mutants.ROOT / file).read_text(encoding="utf-8")


def test_each_bug_has_one_place_is_python_and_names_a_test():
    """Bug: code or a test was rewritten, and a planted bug was forgotten; or the table grows until nobody reads it."""
    texts = {file: read(file) for bug in BUGS for file in (bug.place.split("::")[0], bug.killer.split("::")[0])}
    for bug in BUGS:
        file, killer = bug.place.split("::")[0], bug.killer.split("::")
        wrong = plant(bug, texts[file])
        assert wrong != texts[file] and (not file.endswith(".py") or ast.parse(wrong)), bug
        assert f"def {killer[1].split('[')[0]}(" in texts[killer[0]], bug
    assert len({bug[1:4] for bug in BUGS}) == len(BUGS) <= 300


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
    rows = [line for line in capsys.readouterr().out.splitlines() if "some.py::f" in line and " -> " in line]
    assert {row.split(" -> ")[1].strip('"\''): row.split()[0] for row in rows} == words
    assert mutants.try_bugs(base, bugs[:1])
    (base / "test_some.py").write_text("def test_f():\n    assert False\n")
    assert not mutants.try_bugs(base, bugs[:1])  # the test fails without a bug
    assert "mend them first" in capsys.readouterr().out
