"""The planted bugs: each has one place, is Python, and names a test that exists. And how a place is found."""

import ast
import os
import re
import time

import conftest
import mutants
import pytest
from mutants import ROOT, Mutant, pattern, places, planted, source

import minirlhf
from pipeline.config import STAGES

ALL = mutants.all_mutants()
FILES = sorted({source(mutant)[0] for mutant in ALL})
TEXT = '''
def wide(a, b):
    return maximum(  # (B, R)
        a +
        b)  # (B,)


class Both:
    @property
    def first(self):
        return a + b * 2

    def second(self):
        return ab + b
'''


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_each_planted_bug_has_one_place_and_is_python(file):
    """The code was rewritten, and a planted bug was forgotten."""
    text = read(file)
    parts = ast.parse(text).body if file.endswith(".py") else []
    for mutant in ALL:
        if source(mutant)[0] == file:
            assert len(places(mutant, text)) == 1, mutant
            wrong, line = planted(mutant, text)
            assert wrong != text, mutant
            if not parts:
                continue
            part = [node for node in parts if node.lineno <= line][-1]  # it alone is read: a whole file takes longer
            last = part.end_lineno + wrong.count("\n") - text.count("\n")
            ast.parse("\n".join(wrong.split("\n")[part.lineno - 1:last]))


def test_each_planted_bug_names_a_test_that_exists():
    """A test was renamed, and the planted bug that it should kill was forgotten."""
    texts = {file: read(file) for file in {mutant.killer.split("::")[0] for mutant in ALL}}
    for mutant in ALL:
        file, name = mutant.killer.split("::")
        assert f"\ndef {name.split('[')[0]}(" in texts[file], mutant


def test_planted_bugs_have_different_names():
    """Two rows of the table cannot be told apart."""
    assert len({(mutant.name, mutant.file) for mutant in ALL}) == len(ALL)


@pytest.mark.parametrize("file, right, lines", [
    ("x.py", "maximum(a + b)", [3]),              # wrapped, with comments
    ("x.py", "maximum(a+b )", [3]),
    ("x.py", "a + b", [4, 11]),                   # not ab + b
    ("x.py", "a + b * 2", [11]),
    ("x.py::first", "a + b", [11]),
    ("x.py::Both", "a + b", [11]),
    ("x.py::wide", "a + b", [4]),
    ("x.py::second", "a + b", []),
    ("x.py::third", "a + b", []),
    ("x.py", "return maximum", [3]),
    ("x.py", "returnmaximum", []),
    ("x.py", "wide(a, b)", [2]),
])
def test_where_an_expression_stands(file, right, lines):
    """A line that is wrapped in another way loses its planted bug, or another expression is taken for it."""
    mutant = Mutant("name", "-", file, right, "c", "test")
    assert [mutants.line_of(TEXT, start) for start, _ in places(mutant, TEXT)] == lines
    if len(lines) == 1:
        assert planted(mutant, TEXT)[1] == lines[0]
    else:
        with pytest.raises(RuntimeError, match=f"stands {len(lines)} times"):
            planted(mutant, TEXT)


def test_a_bug_takes_the_place_of_its_expression_alone():
    """The planted bug is more, or less, than its entry says."""
    mutant = Mutant("name", "-", "x.py", " maximum(a + b)\n", "minimum(a, b)", "test")
    assert planted(mutant, TEXT)[0].splitlines()[2] == "    return minimum(a, b)  # (B,)"


def test_a_pattern_is_quick_where_it_does_not_match():
    """A search takes minutes, because blanks and comments can be parted in many ways."""
    assert not re.search(pattern("a + b + c"), "a # + \n" * 3000)


def test_the_stages_are_those_of_the_pipeline():
    """A stage that the bug may change does not run again."""
    assert {stage: tuple(users) for stage, users in minirlhf.USED_BY.items()} == mutants.USED_BY
    assert mutants.STAGES == list(STAGES)


@pytest.mark.parametrize("file, line, stages", [
    ("x.py", 5, "ppo,report"),                                             # called by PPO
    ("x.py", 10, "reward,ppo,grpo,dpo,report"),                            # by the reward model and DPO; a decorator
    ("x.py", 14, ""),                                                      # never called
    ("x.py", 8, ",".join(STAGES)),                                         # in no function
    ("page.html", 4, "report"),
    ("y.py", 4, ""), ("studies/x.py", 4, ""),                              # a file that the run does not import
])
def test_the_stages_that_a_bug_may_change(file, line, stages):
    """The files of the run without the bug are read in place of those with it, and the bug is not seen."""
    called = {("x.py", 1): {"all"}, ("x.py", 2): {"ppo"}, ("x.py", 9): {"dpo", "reward"}, ("z.py", 13): {"sft"}}
    assert mutants.stages_to_run(called, Mutant("name", "-", file, "", "", ""), TEXT, line) == stages


def test_processes_run_side_by_side_and_each_one_answers_once(tmp_path, monkeypatch):
    """A bug is left out, or counted twice; or all wait for the slowest."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    tasks = [(tmp_path, name) for name in ("the last", "a", "b", "c", "d")]
    ended = list(mutants.forked(wait_for_the_others, tasks, 60))  # one after another, the first would wait for ever
    assert sorted(ended) == sorted(name for _, name in tasks)


def wait_for_the_others(task):
    folder, name = task
    if name == "the last":
        while len(list(folder.iterdir())) < 4:
            time.sleep(0.01)
    else:
        (folder / name).touch()
    return name


@pytest.mark.parametrize("seconds, limit", [(-1, 60), (60, 1)])
def test_a_process_that_dies_or_hangs_ends_the_test_of_the_tests(seconds, limit, capfd):
    """One process hangs, and so does everything, without a word."""
    with pytest.raises(RuntimeError, match="died, or hung"):
        list(mutants.forked(sleep, [seconds], limit))
    assert ("in sleep" in capfd.readouterr().err) == (seconds > limit)


def sleep(seconds):
    if seconds < 0:
        os._exit(1)
    time.sleep(seconds)
    return seconds


def test_the_tiny_run_of_a_planted_bug(tiny, tmp_path, monkeypatch):
    """The run with a bug has other settings than the tiny run, so that any bug seems to be found."""
    commands = []
    monkeypatch.setattr(minirlhf, "main", lambda command: commands.append(command[:-2]) or 0)
    monkeypatch.setenv("TINY_RUN", str(tiny))
    for stages in (",".join(STAGES), "ppo,dpo,report", "report", ""):
        monkeypatch.setenv("TINY_STAGES", stages)
        folder = tmp_path / f"run {stages}"
        folder.mkdir()
        conftest.make_tiny(folder)
        if stages.startswith("pretrain"):
            assert not list(folder.iterdir())
        else:
            assert {path.name for path in folder.iterdir()} == {path.name for path in tiny.iterdir()}
    assert commands == [["--quick", "--seed", conftest.SEED, "--stages", ",".join(STAGES)],
                        ["--stages", "ppo,dpo"], ["--stages", "report"], ["--stages", "report"]]
