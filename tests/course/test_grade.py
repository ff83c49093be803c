"""The grader on a toy set, in the real sandbox: what students hand in, and what they should not."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import grade
import pytest
import sandbox
import work
from course_variants import COURSE
from problems import Problem, Set, points_of, variant_seed

TRUE = '''"""A toy."""


class Box:
    def __init__(self, size):
        self.size = size

    def double(self):
        """Twice the size."""
        return 2 * self.size


def half(x):
    """Half of x."""
    return Box(x).double() / 4
'''
PROBES = '''import toy

run_double = lambda case: dict(value=toy.Box(case["x"]).double())
run_half = lambda case: dict(value=toy.half(case["x"]))
'''
PROBLEMS = [Problem("9.1", "toy.py::Box.double", 2, hint="twice"), Problem("9.2", "toy.py::half", 4, hint="a half")]
CASES = {"double": dict(cases=[{"x": 2.0}, {"x": -1.5}], expected=[{"value": 4.0}, {"value": -3.0}]),
         "half": dict(cases=[{"x": 3.0}], expected=[{"value": 1.5}])}
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can drop its privileges")


@pytest.fixture
def toy(tmp_path, monkeypatch, run):
    """A function of what is handed in, {name: text or bytes}: results.json. No sandbox, for speed: `boxed` has it."""
    here, base = tmp_path / "source", tmp_path / "autograder"
    draw = "def runner(module, key):\n    return getattr(module, 'run_' + key)"
    work.write(here, {name: (COURSE / name).read_bytes() for name in ("child.py", "values.py")})
    work.write(here, {"settings.json": '{"set": 9, "course": "toys", "secret": "s"}', "project/toy.py": TRUE,
                      "set9.py": PROBES, "draw.py": draw})
    monkeypatch.setattr(work, "HERE", here)
    monkeypatch.setattr(work, "HELPERS", ("child.py", "values.py", "draw.py", "set9.py"))
    monkeypatch.setattr(work, "PROBLEMS", PROBLEMS)
    monkeypatch.setattr(grade, "HERE", here)
    monkeypatch.setitem(grade.SETS, 9, Set("Toys", 5, PROBLEMS))
    monkeypatch.setattr(grade, "expected", lambda number, seed: CASES)
    monkeypatch.setattr(grade.grade_set, "__defaults__", (run,))

    def graded(files, **known):
        submission = base / "submission"
        shutil.rmtree(submission, ignore_errors=True)
        submission.mkdir(parents=True)
        work.write(submission, files if isinstance(files, dict) else {"toy.py": files})
        metadata = dict(dict(users=[dict(email="a@b.org")]), **known)
        (base / "submission_metadata.json").write_text(json.dumps(metadata))
        grade.main(["--base", str(base)])
        return json.loads((base / "results" / "results.json").read_text())
    graded.base, graded.here = base, here
    return graded


@pytest.fixture
def boxed(toy, monkeypatch):
    monkeypatch.setattr(grade.grade_set, "__defaults__", (sandbox.run,))
    return toy


def scores(results):
    assert results["score"] == sum(test["score"] for test in results["tests"])
    return [test["score"] for test in results["tests"]]


def outputs(results):
    return [test["output"] for test in results["tests"]]


def with_double(body):
    return TRUE.replace("        return 2 * self.size\n", textwrap.indent(body + "\n", " " * 8))


def test_the_solution(boxed):
    """Bug: a field of Gradescope is misspelt, or a student's print or thread spoils the answers."""
    results = boxed(TRUE)
    assert scores(results) == [2, 4] and set(results) == {"score", "output", "tests"}
    assert results["output"] == "Set 9, Toys: 6 points by machine, 5 for the written questions. Variant of a@b.org. "
    assert results["tests"][0] == dict(number="9.1", name="9.1 double", score=2, max_score=2, output="solved")
    busy = TRUE + ("print([1], flush=True)\nimport threading, time\n"
                   "threading.Thread(target=time.sleep, args=(600,)).start()\n")
    assert boxed(busy) == results


@pytest.mark.parametrize(("number", "module"), [(6, grade.hunt), (7, grade.host)])
def test_the_hunt_and_the_open_end(toy, monkeypatch, number, module):
    """Bug: they get the bugs, games or secret of another student, or their points do not reach the results."""
    def graded(*arguments):
        seen.append(arguments[:-1])
        arguments[-1].set(module.LINES[-1][0], 2, "told")

    work.write(toy.here, {"settings.json": f'{{"set": {number}, "course": "toys", "secret": "s"}}', "bugs.json": "[1]"})
    seen, seed = [], variant_seed("toys", "a@b.org")
    monkeypatch.setattr(module, "grade", graded)
    results = toy({"notes.txt": "x"})
    submission = toy.base / "submission"
    assert seen == [({"toy.py": TRUE}, *([[1], submission, seed] if number == 6 else [submission]), f"{seed} s")]
    assert scores(results) == [0] * (len(module.LINES) - 1) + [2] and outputs(results)[-1] == "told"
    assert sum(test["max_score"] for test in results["tests"]) == points_of(number)


@pytest.mark.parametrize("body", [
    "return self.size + 7177", "return {'7177': self.size}",
    "class E7177(NotImplementedError):\n    pass\nraise E7177('7177')"])
def test_nothing_of_the_student_is_shown(toy, body):
    """Bug: hidden numbers, or the text of true functions, come back in a message."""
    results = toy(with_double(body))
    shown = outputs(results)[0]
    assert scores(results) == [0, 4] and "twice" in shown and "7177" not in json.dumps(results)
    assert not re.search(r"\d", shown)


def test_what_is_beside_the_functions(toy):
    """Bug: an experiment, an unused import, a helper or another way to define a function costs points."""
    text = ("from __future__ import annotations\nimport no_such_package\nimport helper, math\nTWO = 2\n"
            + TRUE.replace("2 * self.size", "math.prod([TWO, helper.one(), self.size])").replace("f):", "f: Unknown):")
            + "\nhalf = lambda x: Box(x).double() / 4\nfor i in range(3):\n    no_such_name\n"
            "raise SystemExit\nlong = 1" + " + 1" * 4000)
    assert scores(toy({"toy.py": text, "helper.py": "def one():\n    return 1\n"})) == [2, 4]


def test_others_stand_in_for_earlier_functions_only(toy):
    """Bug: a mistake costs points twice, or a later function can be looked up."""
    early = with_double("return 3 * self.size").replace("def half", "twice = Box.double\n\n\ndef half")
    assert scores(toy(early.replace("Box(x).double()", "twice(Box(x))"))) == [0, 4]
    assert scores(toy(TRUE[TRUE.index("def half"):].replace("Box(x).double()", "2 * x"))) == [0, 4]
    later = with_double("return 4 * half(self.size)").replace("return Box(x).double() / 4",
                                                               'raise NotImplementedError("problem 9.2: half")')
    results = toy(later)
    assert scores(results) == [0, 0] and outputs(results)[1] == "not solved yet"
    for steal in ("import ours_toy\n    return ours_toy.half(x)",
                  "names = {}\n    exec(open('toy.py').read(), names)\n    return names['half'](x)"):
        assert scores(toy(TRUE.replace("return Box(x).double() / 4", steal))) == [2, 0]


@pytest.mark.parametrize(("files", "points", "said"), [
    ({}, 0, "toy.py was not handed in"), ({"hunt/toy.py": TRUE}, 6, "found as 'hunt/toy.py'. solved"),
    ({"a/b/TOY (1).py": with_double("import two\nreturn two.X * self.size"), "a/b/two.py": "X = 2"}, 6, "/TOY (1).p"),
    ({"toy.py": TRUE, "toy - Copy.py": TRUE + "#"}, 0, "2 files"),
    ({"toy.py": TRUE, "copy/toy.py": TRUE, "hunt/toy.py": "x", ".old/toy.py": "x", "draw.py": "1 / 0"}, 6, "solved"),
    ({"toy.py": TRUE + "#" * 3_000_000}, 0, "at most 2000000 bytes"), ({"toy.py": b"\xff"}, 0, "an exception"),
    ({"toy.py": b"\xef\xbb\xbf" + TRUE.replace("    ", "\t").replace("\n", "\r\n").encode()}, 6, "solved"),
    ({"toy.py": ("# coding: latin-1\n" + TRUE.replace("2 *", "len('J\xf6') *")).encode("latin-1")}, 6, "solved"),
    ({"toy.py": with_double("return 10 ** 400")}, 4, "no values came back"),
    ({"toy.py": with_double("y = 0\nfor i in range(3000):\n    y = [y]\nreturn y")}, 4, "an exception"),
    ({"toy.py": with_double("import sys\nsys._getframe(1).f_locals['case']['x'] = 0\nreturn 2 * self.size")}, 4, "")])
def test_what_may_be_handed_in(toy, files, points, said):
    """Bug: an unusual place, tabs or a coding cost points, one of two files is taken, or a strange one has points."""
    results = toy(files)
    assert results["score"] == points and said in outputs(results)[0]


@as_root
@pytest.mark.parametrize("body", [
    "import os\nfor d in range(9):\n    try:\n        os.write(d, b'[{\"values\": 4}]')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "import glob, os\nfor f in glob.glob('*.py'):\n    os.remove(f)\nos.kill(os.getppid(), 9)"])
def test_what_a_function_may_try(boxed, body):
    """Bug: one function spoils the channel of its answers, or ends or confuses the grading of the others."""
    assert scores(boxed(with_double(body))) == [0, 4]


@as_root
def test_packages_in_a_closed_folder(tmp_path, monkeypatch):
    """Bug: an interpreter runs without privileges but finds no torch, and every problem is graded as 0 points."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    with pytest.raises(RuntimeError, match="import torch without privileges"):
        sandbox.python.__wrapped__()


@as_root
def test_nothing_reaches_the_next_child(boxed):
    """Bug: a file, a process or shared memory of one problem is there for the next one; or our files can be read."""
    toy = boxed
    os.chmod(toy.here, 0o755)
    leave = f"""import ctypes, os, pathlib, resource, time
for folder in ("/tmp", "/dev/shm", "/var/tmp"):
    os.makedirs(folder + "/left-by-a-child/inside", exist_ok=True)
assert ctypes.CDLL(None).shmget(7177, 4096, 0o1666) >= 0
assert not os.access({str(toy.here)!r} + "/project/toy.py", os.R_OK)
assert not os.access({str(toy.base)!r} + "/results", os.W_OK)
names = ("RLIMIT_FSIZE", "RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_CORE")
limits = [resource.getrlimit(getattr(resource, name))[1] for name in names]
assert limits == [4 << 20, 480 << 20, 1920 << 20, 16, 256, 0] and os.umask(0o077) == 0o077
assert not set(os.getgroups()) - {{os.getgid()}} and not set(os.environ) & {{"PYTEST_CURRENT_TEST", "USER"}}
assert os.environ["PYTHONHASHSEED"] == "0" and os.environ["HOME"] == os.environ["TMPDIR"] == os.getcwd()
assert os.environ["OMP_NUM_THREADS"] == "1" and os.getsid(0) == os.getpid()
while pathlib.Path("/proc/self/oom_score_adj").read_text() != "1000\\n":
    pass  # the grader says it after the start
if os.fork() == 0:
    os.setsid()
    time.sleep(600)
return 2 * self.size"""
    look = """import ctypes, os
    assert not any(os.path.exists(folder + "/left-by-a-child") for folder in ("/tmp", "/dev/shm", "/var/tmp"))
    assert ctypes.CDLL(None).shmget(7177, 4096, 0o666) < 0
    return x / 2
"""
    results = toy(with_double(leave).replace("return Box(x).double() / 4\n", look))
    assert scores(results) == [2, 4] and os.stat(toy.here).st_mode & 0o777 == 0o700
    assert subprocess.run(["pgrep", "-r", "R,S,D,T", "-u", str(sandbox.UID)]).returncode == 1  # nobody but zombies


@pytest.mark.slow
@as_root
@pytest.mark.parametrize(("body", "said"), [
    ("while True:\n    print('x' * 9999)", "too long"),
    ("import os\nwhile True:\n    os.fork()", ""),
    ("n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').write('x' * 4000000)\n    n += 1", "")])
def test_limits(boxed, monkeypatch, body, said):
    """Bug: a function that blocks, fills memory or the disk is waited for, or takes the others with it."""
    problems = [problem._replace(seconds=2) for problem in PROBLEMS]
    monkeypatch.setitem(grade.SETS, 9, Set("Toys", 0, problems))
    monkeypatch.setattr(work, "PROBLEMS", problems)
    results = boxed(with_double(body))
    assert scores(results) == [0, 4] and said in outputs(results)[0]


def test_the_file_is_there_before_the_first_problem(toy, monkeypatch):
    """Bug: a grader that is killed leaves no valid result, or one that can run no code grades all the same."""
    seen = []

    def stop():
        seen.append(json.loads((toy.base / "results" / "results.json").read_text()))
        raise KeyboardInterrupt
    monkeypatch.setattr(sandbox, "python", stop)
    with pytest.raises(KeyboardInterrupt):
        toy(TRUE)
    assert scores(seen[0]) == [0, 0] and outputs(seen[0]) == [grade.NOT_YET] * 2


def test_whose_variant_it_is(toy, monkeypatch):
    """Bug: a group or a late submission is graded by another variant or without a word, or its hidden seed is known."""
    seeds = []
    monkeypatch.setattr(grade, "expected", lambda number, seed: seeds.append((number, seed)) or CASES)
    mine, other = variant_seed("toys", "c@d.org"), variant_seed("toys", "a@b.org")
    users = [dict(email="a@b.org"), dict(email="c@d.org")]
    results = toy({"variant.json": json.dumps(dict(seed=mine))}, users=users, created_at="2026-03-03T00:00:01Z",
                  assignment=dict(due_date="2026-03-02T00:00:00Z"))
    assert seeds == [(9, f"{mine} s hidden")]
    assert results["output"].endswith(" Variant of c@d.org. Handed in late, late days used: 2.")
    folder = toy.base / "submission"
    assert grade.whose("", ["a@b.org"], folder) == (variant_seed("", ""), "")
    assert grade.whose("toys", [], toy.here) == (variant_seed("toys", ""), "Variant of nobody. ")
    assert "MADE FOR ANOTHER ADDRESS" in grade.whose("toys", ["a@b.org"], folder)[1]
    for strange in (b"[" * 100_000, b"null", b"\xff"):
        (folder / "variant.json").write_bytes(strange)
        assert grade.whose("toys", ["a@b.org"], folder) == (other, "Variant of a@b.org. ")


@pytest.mark.parametrize(("made", "late"), [
    ("2026-03-02T08:00:00+08:00", 0), ("2026-03-02T00:00:01Z", 1), ("2026-03-03T00:00:00Z", 1),
    ("2026-03-03T00:00:00.000001Z", 2), ("2026-03-02", 0), (None, 0)])
def test_days_late(made, late):
    """Bug: a second counts as no day, a whole day as two, or two time zones are compared by their digits."""
    assert grade.days_late(dict(created_at=made, assignment=dict(due_date="2026-03-02T00:00:00Z"))) == late


def test_helpers_are_few_and_small(tmp_path):
    """Bug: modules that are handed in fill the grader's memory, or one of ours is replaced by one of theirs."""
    work.write(tmp_path, {**{f"m{number:02}.py": "" for number in range(40)}, "large.py": "#" * 3_000_000})
    (tmp_path / "link.py").symlink_to(tmp_path / "m00.py")
    found = grade.handed_in.helpers(tmp_path, ["m01.py"], {"m01.py": ""})
    assert len(found) == 20 and not {"m01.py", "large.py", "link.py"} & set(found)


def test_without_root(boxed, monkeypatch):
    """Bug: a user without privileges cannot grade, or the end of a child ends all processes of that user."""
    monkeypatch.setattr(sandbox, "is_root", lambda: False)
    monkeypatch.setattr(sandbox.subprocess, "run", None)  # no command cleans up
    monkeypatch.setattr(sandbox, "python", lambda: (sys.executable, []))
    before = os.stat(boxed.here).st_mode
    body = f"import os\nassert len(bytearray(10 ** 8)) and os.getuid() == {os.getuid()}\nreturn 2 * self.size"
    assert scores(boxed(with_double(body))) == [2, 4] and os.stat(boxed.here).st_mode == before
    results = boxed(with_double("return len(bytearray(10 ** 9))"))
    assert scores(results) == [0, 4] and "MemoryError" in outputs(results)[0]


def test_a_limit_of_the_machine_is_kept():
    """Bug: where a limit is lower than ours no child can start, or a problem does not have the time of its line."""
    assert work.ask({}, PROBLEMS[0]._replace(seconds=7), {}, [], lambda folder, request, seconds: str(seconds)) == 7
    code = ("import resource, sandbox\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\nsandbox.limits(7)()\n"
            "print(*[resource.getrlimit(x)[1] for x in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=COURSE, capture_output=True, text=True)
    assert done.stdout.split() == ["100", "9"], done.stderr
