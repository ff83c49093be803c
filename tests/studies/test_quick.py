"""The command line, and a quick pass of every study."""

import csv
import math

import pytest

from studies import common
from studies.__main__ import STUDIES, main, parse


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for all quick passes. Jobs run in this process, because new processes would take long to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "HOME", tmp_path_factory.mktemp("studies"))
        patch.setenv("LAB_SERIAL", "1")
        patch.setenv("TQDM_DISABLE", "1")  # main sets it; this puts it back
        yield common.HOME


@pytest.mark.slow
@pytest.mark.xdist_group("studies")  # on one worker, so that the base run is made once
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_in_quick_mode(home, name, capsys):
    """Bugs: a traceback, a verdict on a quick pass, a number that is not finite, or a file that is missing."""
    assert main([name, "--quick", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    folder = home / f"{name}-quick"
    assert "not tested here: " in out
    assert "reproduced: " not in out
    assert (folder / "verdict.txt").read_text() in out + "\n"
    assert (folder / "table.txt").read_text().splitlines()[0] in out
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        for name in ("gold", "kl", "d"):
            if row.get(name):
                assert math.isfinite(float(row[name]))


@pytest.mark.parametrize("argv, message", [
    (["overfit"], "overfit"),
    ([], "NAME"),
    (["tree", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["tree", "--quik"], "--quik"),
])
def test_a_mistake_is_one_line(argv, message, capsys):
    """Bug: a traceback, or a page of usage, for an unknown study, an unknown option, or no seeds."""
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_default_numbers_of_seeds():
    """Bug: a quick pass with all seeds, or the tree with too few for its verdict (20)."""
    assert parse(["overopt"]) == ("overopt", False, 3)
    assert parse(["overopt", "--quick"]) == ("overopt", True, 1)
    assert parse(["estimators"]) == ("estimators", False, 5)  # its verdicts ask for five
    assert parse(["estimators", "--quick"]) == ("estimators", True, 1)
    assert parse(["tree"]) == ("tree", False, 24)
    assert parse(["tree", "--quick"]) == ("tree", True, 4)
    assert parse(["tree", "--seeds", "7"]) == ("tree", False, 7)


def test_a_base_run_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    """Bug: a traceback when the folder of the studies cannot be written."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(common, "HOME", tmp_path / "file")
    monkeypatch.setenv("LAB_SERIAL", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["overopt", "--quick"]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) >= 1
    assert "could not be made" in captured.err.splitlines()[-1]
