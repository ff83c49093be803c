"""The grader on a toy set, in the real sandbox: what students hand in, and what they should not."""

import json
import os
import re
import shutil
import subprocess
import sys

import grade
import pytest
import sandbox
import work
from course_variants import COURSE
from problems import Problem, Set, variant_seed

TRUE = '''"""A toy."""

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
    return double(x) / 4
'''
PROBES = '''import toy

run_double = lambda case: dict(value=toy.double(case["x"]))
run_volume = lambda case: dict(value=toy.Box(case["x"]).volume())
run_half = lambda case: dict(value=toy.half(case["x"]))
'''
PROBLEMS = (Problem("9.1", "toy.py::double", 2, hint="twice"),
            Problem("9.2", "toy.py::Box.volume", 3, hint="a cube"), Problem("9.3", "toy.py::half", 4, hint="a half"))
CASES = {"double": dict(cases=[{"x": 2.0}, {"x": -1.5}], expected=[{"value": 4.0}, {"value": -3.0}]),
         "volume": dict(cases=[{"x": 2.0}], expected=[{"value": 8.0}]),
         "half": dict(cases=[{"x": 3.0}], expected=[{"value": 1.5}])}


@pytest.fixture
def toy(tmp_path, monkeypatch, run):
    """
    A grader of the toy set: a function of what is handed in, {name: text or bytes}, that returns results.json. Children
    are forks of this process, which is faster; `boxed` has the real sandbox.
    """
    here, base = tmp_path / "source", tmp_path / "autograder"
    work.write(here, {name: (COURSE / name).read_bytes() for name in ("child.py", "values.py")})
    work.write(here, {"settings.json": '{"set": 9, "course": "toys", "secret": "s"}', "project/toy.py": TRUE,
                      "set9.py": PROBES,
                      "draw.py": "def runner(module, key):\n    return getattr(module, 'run_' + key)"})
    monkeypatch.setattr(work, "HERE", here)
    monkeypatch.setattr(work, "HELPERS", ("child.py", "values.py", "draw.py", "set9.py"))
    monkeypatch.setattr(work, "PROBLEMS", list(PROBLEMS))
    monkeypatch.setattr(grade, "HERE", here)
    monkeypatch.setattr(grade, "SETS", {9: Set("Toys", 5, PROBLEMS)})
    monkeypatch.setattr(grade, "points_of", lambda number: 9)
    monkeypatch.setattr(grade, "expected", lambda number, seed: CASES)
    monkeypatch.setattr(grade.grade_set, "__defaults__", (run,))

    def graded(files, metadata=None):
        submission = base / "submission"
        shutil.rmtree(submission, ignore_errors=True)
        submission.mkdir(parents=True)
        work.write(submission, files if isinstance(files, dict) else {"toy.py": files})
        known = metadata or dict(users=[dict(email="a@b.org")])
        (base / "submission_metadata.json").write_text(json.dumps(known))
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
    return TRUE.replace("    return 2 * x\n", body)


def test_the_solution_and_a_wrong_value(boxed):
    """Bug: a field of Gradescope is misspelt, or a student's print or thread spoils the answers."""
    toy = boxed
    results = toy(TRUE)
    assert scores(results) == [2, 3, 4] and outputs(results) == ["solved"] * 3
    assert set(results) == {"score", "output", "tests"}
    assert results["output"] == "Set 9, Toys: 9 points by machine, 5 for the written questions. Variant of a@b.org. "
    assert set(results["tests"][0]) == {"number", "name", "score", "max_score", "output"}
    assert [(test["number"], test["name"], test["max_score"]) for test in results["tests"]] == [
        ("9.1", "9.1 double", 2), ("9.2", "9.2 volume", 3), ("9.3", "9.3 half", 4)]
    first = (toy.base / "results" / "results.json").read_bytes()
    busy = TRUE + ("print([1], flush=True)\nimport threading, time\n"
                   "threading.Thread(target=time.sleep, args=(600,)).start()\n")
    assert toy(busy) and (toy.base / "results" / "results.json").read_bytes() == first


@pytest.mark.parametrize(("number", "module"), [(6, grade.hunt), (7, grade.open_end)])
def test_the_hunt_and_the_open_end(toy, monkeypatch, number, module):
    """Bug: they get the bugs, games or secret of another student, or their points do not reach the results."""
    def graded(*arguments):
        seen.append(arguments[:-1])
        arguments[-1].set(module.LINES[-1][0], 2, "told")

    work.write(toy.here, {"settings.json": f'{{"set": {number}, "course": "toys", "secret": "s"}}', "bugs.json": "[1]"})
    seen, seed = [], variant_seed("toys", "a@b.org")
    monkeypatch.setattr(grade, "SETS", {number: Set("Toys", 3, ())})
    monkeypatch.setattr(module, "grade", graded)
    results = toy({"notes.txt": "x"})
    submission = toy.base / "submission"
    assert seen == [({"toy.py": TRUE}, *([[1], submission, seed] if number == 6 else [submission]), f"{seed} s")]
    assert scores(results) == [0] * (len(module.LINES) - 1) + [2] and outputs(results)[-1] == "told"
    assert [test["max_score"] for test in results["tests"]] == ([6] * 5 + [10] if number == 6 else [20])


@pytest.mark.parametrize("body", [
    "    return x + 7177\n", "    raise ValueError('7177')\n", "    return {'7177': x}\n",
    "    class E7177(Exception):\n        pass\n    raise E7177('7177')\n"])
def test_nothing_of_the_student_is_shown(toy, body):
    """Bug: hidden numbers, or the text of true functions, come back in a message."""
    results = toy(with_double(body))
    shown = outputs(results)[0]
    assert scores(results) == [0, 3, 4] and "twice" in shown and "7177" not in json.dumps(results)
    assert not re.search(r"\d", shown.replace("[0]", ""))


def test_what_is_beside_the_functions(toy):
    """Bug: an experiment, an unused import, a helper or another way to define a function costs points."""
    text = ("from __future__ import annotations\nimport no_such_package\nimport helper, math\nTWO = 2\n"
            + TRUE.replace("2 * x", "math.prod([TWO, helper.one(), y])").replace("double(x):", "double(y: Unknown):")
            + "\nhalf = lambda x: x / 2\nfor i in range(3):\n    y = no_such_name\n"
            "input()\nraise SystemExit\nlong = 1" + " + 1" * 4000)
    assert scores(toy({"toy.py": text, "helper.py": "def one():\n    return 1\n"})) == [2, 3, 4]


def test_others_stand_in_for_earlier_functions_only(toy):
    """Bug: a mistake costs points twice, or a later function can be looked up."""
    wrong = with_double("    return 3 * x\n")
    assert scores(toy(wrong)) == [0, 3, 4]
    early = wrong.replace("class Box", "twice = double\n\n\nclass Box").replace("double(x) / 4", "twice(x) / 4")
    assert scores(toy(early)) == [0, 3, 4]
    assert scores(toy(TRUE[TRUE.index("def half"):])) == [0, 0, 4]
    later = TRUE.replace("return 2 * x", "return 4 * half(x)").replace("return double(x) / 4",
                                                                      'raise NotImplementedError("problem 9.3: half")')
    results = toy(later)
    assert scores(results) == [0, 3, 0] and outputs(results)[2] == "not solved yet"
    for steal in ("import ours_toy\n    return ours_toy.half(x)",
                  "names = {}\n    exec(open('toy.py').read(), names)\n    return names['half'](x)"):
        assert scores(toy(TRUE.replace("return double(x) / 4", steal))) == [2, 3, 0]


@pytest.mark.parametrize("text", ["", "(" * 5000, "raise SystemExit\n", "import os\nos._exit(0)\n", b"\xff"])
def test_what_cannot_be_read_has_no_points(toy, text):
    """Bug: the grader fails on a file that is empty or no Python."""
    results = toy(text)
    assert scores(results) == [0, 0, 0] and grade.NOT_YET not in outputs(results)


@pytest.mark.parametrize(("files", "points", "said"), [
    ({}, 0, "toy.py was not handed in"), ({"a/b/toy.py": TRUE}, 9, "found as 'a/b/toy.py'"),
    ({"TOY (1).py": TRUE}, 9, "found as 'TOY (1).py'"), ({"toy.py": TRUE, "toy - Copy.py": TRUE + "#"}, 0, "2 files"),
    ({"toy.py": TRUE, "__MACOSX/toy.py": "x", "hunt/toy.py": "x", ".old/toy.py": "x"}, 9, "solved"),
    ({"toy.py": TRUE, "copy/toy.py": TRUE}, 9, "solved"), ({"toy.py": TRUE, "draw.py": "1 / 0"}, 9, "solved"),
    ({"toy.py": TRUE + "#" * 3_000_000}, 0, "at most 2000000 bytes")])
def test_where_a_file_is_found(toy, files, points, said):
    """Bug: a file in an unusual place is not found, or one of two is taken in silence."""
    results = toy(files)
    assert results["score"] == points and said in outputs(results)[0]


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can drop its privileges")


@as_root
@pytest.mark.parametrize("body", [
    "    return 10 ** 400\n", "    y = x\n    for i in range(3000):\n        y = [y]\n    return y\n",
    "    import sys\n    sys._getframe(1).f_locals['case']['x'] = 0\n    return 2 * x\n",
    "    import os\n    for d in range(9):\n        try:\n            os.write(d, b'[{\"values\": 4}]')\n"
    "        except OSError:\n            pass\n    os._exit(0)\n",
    "    import glob, os\n    for f in glob.glob('*.py'):\n        os.remove(f)\n    os.kill(os.getppid(), 9)\n"])
def test_what_a_function_may_try(boxed, body):
    """Bug: one function spoils the channel of its answers, or ends or confuses the grading of the others."""
    assert scores(boxed(with_double(body))) == [0, 3, 4]


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
    secret = toy.here / "project" / "toy.py"
    leave = f"""    import ctypes, os, pathlib
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        os.makedirs(folder + "/left-by-a-child/inside", exist_ok=True)
        pathlib.Path(folder, "left-by-a-child", "file").write_text("x")
    assert ctypes.CDLL(None).shmget(7177, 4096, 0o1666) >= 0
    assert not os.access({str(secret)!r}, os.R_OK) and not os.access({str(toy.base)!r} + "/results", os.W_OK)
    import resource
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
        import time
        time.sleep(600)
    return 2 * x
"""
    look = """        import ctypes, os
        assert not any(os.path.exists(folder + "/left-by-a-child") for folder in ("/tmp", "/dev/shm", "/var/tmp"))
        assert ctypes.CDLL(None).shmget(7177, 4096, 0o666) < 0
        return self.size ** 3
"""
    results = toy(with_double(leave).replace("        return self.size ** 3\n", look))
    assert scores(results) == [2, 3, 4] and os.stat(toy.here).st_mode & 0o777 == 0o700
    assert subprocess.run(["pgrep", "-r", "R,S,D,T", "-u", str(sandbox.UID)]).returncode == 1  # nobody but zombies


@pytest.mark.slow
@as_root
@pytest.mark.parametrize(("body", "said"), [
    ("    while True:\n        print('x' * 9999)\n", "too long"),
    ("    import os\n    while True:\n        os.fork()\n", ""),
    ("    return len(bytearray(10 ** 10))\n", "an exception, MemoryError"),
    ("    n = 0\n    while True:\n        open(f'/tmp/{n}', 'w').write('x' * 4000000)\n        n += 1\n", "")])
def test_limits(boxed, monkeypatch, body, said):
    """Bug: a function that blocks, fills memory or the disk is waited for, or takes the others with it."""
    problems = [problem._replace(seconds=3) for problem in PROBLEMS]
    monkeypatch.setattr(grade, "SETS", {9: Set("Toys", 0, problems)})
    monkeypatch.setattr(work, "PROBLEMS", problems)
    results = boxed(with_double(body))
    assert scores(results) == [0, 3, 4] and said in outputs(results)[0]


def test_the_file_is_there_before_the_first_problem(toy, monkeypatch):
    """Bug: a grader that is killed leaves no valid result, or one that can run no code grades all the same."""
    seen = []

    def stop(*args):
        seen.append(json.loads((toy.base / "results" / "results.json").read_text()))
        raise KeyboardInterrupt
    monkeypatch.setattr(grade, "grade_problem", stop)
    with pytest.raises(KeyboardInterrupt):
        toy(TRUE)
    assert seen[0]["score"] == 0 and outputs(seen[0]) == [grade.NOT_YET] * 3
    monkeypatch.setattr(sandbox, "python", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy(TRUE)


@pytest.mark.parametrize(("users", "handed", "owner", "warned"), [
    (["a@b.org"], "", "a@b.org", False), (["a@b.org"], "c@d.org", "a@b.org", True),
    (["a@b.org", "c@d.org"], "c@d.org", "c@d.org", False)])
def test_whose_variant_it_is(toy, monkeypatch, users, handed, owner, warned):
    """Bug: an address that is spelt differently is not noticed, or a group is graded by somebody else's variant."""
    seeds = []
    monkeypatch.setattr(grade, "expected", lambda number, seed: seeds.append((number, seed)) or CASES)
    files = {"variant.json": json.dumps(dict(seed=variant_seed("toys", handed)))} if handed else {}
    results = toy(files, dict(users=[dict(email=user) for user in users]))
    assert seeds == [(9, f"{variant_seed('toys', owner)} s hidden")]
    assert ("ANOTHER ADDRESS" in results["output"]) == warned and f"Variant of {owner}. " in results["output"]
    assert grade.read_json(toy.here / "missing") == grade.read_json(toy.here / "set9.py") == {}
    assert grade.whose("", users, toy.base) == (variant_seed("", ""), "")
    assert grade.whose("toys", [], toy.here) == (variant_seed("toys", ""), "Variant of nobody. ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": []}', "null", "\xff"])
def test_a_strange_variant_stops_nothing(toy, text):
    """Bug: a variant.json that is no JSON, or too deep, ends the grader without a result."""
    assert scores(toy({"toy.py": TRUE, "variant.json": text.encode("latin-1")})) == [2, 3, 4]


@pytest.mark.parametrize(("made", "late"), [
    ("2026-03-02T08:00:00+08:00", 0), ("2026-03-02T00:00:01Z", 1), ("2026-03-03T00:00:00Z", 1),
    ("2026-03-03T00:00:00.000001Z", 2), ("2026-03-01T20:00:00-08:00", 1), ("2026-03-02", 0), (None, 0)])
def test_days_late(toy, made, late):
    """Bug: a second counts as no day, a whole day as two, or two time zones are compared by their digits."""
    known = dict(users=[dict(email="a@b.org")], created_at=made, assignment=dict(due_date="2026-03-02T00:00:00Z"))
    assert grade.days_late(known) == late and grade.days_late({}) == 0
    assert (f"late days used: {late}." in toy(TRUE, known)["output"]) == (late > 0)


@pytest.mark.parametrize("content", [
    TRUE.replace("    ", "\t"), TRUE.replace("    ", "  "), TRUE.replace("\n", "\r\n"), b"\xef\xbb\xbf" + TRUE.encode(),
    ("# -*- coding: latin-1 -*-\n# J\xf6rg\nname = 'J\xf6rg'\nassert len(name) == 4\n" + TRUE.replace(
        "return 2 * x", "return 2 * x if len(name) == 4 else 0")).encode("latin-1")])
def test_a_file_is_read_as_python_reads_it(toy, content):
    """Bug: tabs, two spaces, the ends of lines on Windows, a byte order mark or a coding cost points."""
    assert scores(toy({"toy.py": content})) == [2, 3, 4]


def test_helpers_are_few_and_small(tmp_path):
    """Bug: modules that are handed in fill the grader's memory, or one of ours is replaced by one of theirs."""
    work.write(tmp_path, {**{f"m{number:02}.py": "" for number in range(40)}, "deep/other.py": ""})
    work.write(tmp_path, {"large.py": "#" * 3_000_000})
    (tmp_path / "link.py").symlink_to(tmp_path / "m00.py")
    found = grade.handed_in.helpers(tmp_path, {"m01.py": ""})
    assert len(found) == 20 and not {"m01.py", "large.py", "link.py", "other.py"} & set(found)


def test_without_root(boxed, monkeypatch):
    """Bug: a user without privileges cannot grade, or the end of a child ends all processes of that user."""
    monkeypatch.setattr(sandbox, "is_root", lambda: False)
    monkeypatch.setattr(sandbox.subprocess, "run", None)  # no command cleans up
    monkeypatch.setattr(sandbox, "python", lambda: (sys.executable, []))
    before = os.stat(boxed.here).st_mode
    body = f"    import os\n    assert len(bytearray(10 ** 8)) and os.getuid() == {os.getuid()}\n    return 2 * x\n"
    assert scores(boxed(with_double(body))) == [2, 3, 4] and os.stat(boxed.here).st_mode == before
    results = boxed(with_double("    return len(bytearray(10 ** 9))\n"))
    assert scores(results) == [0, 3, 4] and "MemoryError" in outputs(results)[0]


def test_a_limit_of_the_machine_is_kept():
    """Bug: where a limit is lower than ours no child can start, and all problems have 0 points."""
    code = ("import resource, sandbox\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\nsandbox.limits(7)()\n"
            "print(*[resource.getrlimit(x)[1] for x in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=COURSE, capture_output=True, text=True)
    assert done.stdout.split() == ["100", "9"], done.stderr
