"""The command line, and a quick pass of every study."""

import csv
import math

import pytest

from studies import common
from studies.__main__ import STUDIES, main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for all quick passes. Jobs run in this process, because new processes would take long to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "HOME", tmp_path_factory.mktemp("studies"))
        patch.setenv("LAB_SERIAL", "1")
        yield common.HOME


@pytest.mark.slow
@pytest.mark.xdist_group("studies")  # on one worker, so that the base run is made once
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_in_quick_mode(home, name, capsys):
    """Bug: a traceback, a verdict on a quick pass, a number that is not finite, or a random number without a seed."""
    results = []
    for _ in range(2 if name == "tree" else 1):
        assert main([name, "--quick", "--seeds", "1"]) == 0
        folder = home / f"{name}-quick"
        results.append((folder / "results.csv").read_text())
    out = capsys.readouterr().out
    assert "not tested here: " in out and "reproduced: " not in out
    assert (folder / "verdict.txt").read_text() in out + "\n"
    assert results[0] == results[-1]
    rows = list(csv.DictReader(results[0].splitlines()))
    assert rows and all(math.isfinite(float(row[key])) for row in rows for key in ("gold", "kl", "d") if row.get(key))


@pytest.mark.parametrize("argv, message", [
    (["overfit"], "overfit"), (["tree", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["overopt", "--quick"], "cannot be the folder of a run")])
def test_a_mistake_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    """Bug: a traceback, or a page of usage, for an unknown study, no seeds, or a folder that is a file."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(common, "HOME", tmp_path / "file")
    monkeypatch.setenv("LAB_SERIAL", "1")
    assert main(argv) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_pass_makes(monkeypatch, capsys):
    """Bug: a quick pass takes the seeds, the base runs or the folder of a full one; or --seeds goes nowhere."""
    def study(*asked):
        """Question"""
        calls.append(asked)

    calls, home = [], common.HOME
    monkeypatch.setattr("studies.__main__.parallel", lambda *asked: calls.append(asked))
    for name in ("tree", "overopt"):
        monkeypatch.setitem(STUDIES, name, study)
    assert [main(argv.split()) for argv in ("tree", "tree --quick", "overopt", "overopt --quick --seeds 2")] == [0] * 4
    assert calls == [(24, False, home / "tree"), (4, True, home / "tree-quick"),
                     (common.make_base, [(seed, False) for seed in range(10)]), (10, False, home / "overopt"),
                     (common.make_base, [(0, True), (1, True)]), (2, True, home / "overopt-quick")]
    assert "\n2 seeds, " in capsys.readouterr().out


def test_a_study_that_is_stopped_ends_in_one_line(monkeypatch, capsys):
    """Bug: Ctrl-C ends in a traceback, or with the status of a study that is finished."""
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("studies.__main__.run_study", stop)
    assert main(["tree"]) == 130
    assert capsys.readouterr().err.startswith("\nstudies: stopped")
