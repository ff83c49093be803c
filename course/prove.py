"""
The proof that the course grades right: python course/make.py --prove

For every set: stubs get 0 points and the solution all; zeros, ones and the first argument get nothing; every planted
bug that touches an emptied function costs the points of that problem, and no other is graded with other files; the same
submission gives the same bytes. grade.py is what Gradescope runs; where only one function is in question, the values
come from a fork of this process, which is faster and otherwise the same.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zipfile

import cut
from judge import verdict
from problems import HUNTED, PROBLEMS, SETS
from project import emptied, path_of, with_student, write

HELPERS = ("draw.py", "set1.py", "set2.py", "set3.py", "set4.py", "set5.py", "set6.py", "loops.py")


def fill(value, number):
    """A value of the same kind, made of zeros or ones."""
    if isinstance(value, types.GeneratorType):
        return [fill(item, number) for item in value]
    if isinstance(value, dict):
        return {name: fill(item, number) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[fill(item, number) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(fill(item, number) for item in value)
    if dataclasses.is_dataclass(value):
        parts = {field.name: fill(getattr(value, field.name), number) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if hasattr(value, "new_full"):
        return value.detach().clone().fill_(number)
    return type(value)(number) if isinstance(value, (bool, int, float)) else value


def copied(args):
    found = []
    for arg in args:
        try:
            found.append(copy.deepcopy(arg))
        except Exception:  # a generator of random numbers
            found.append(arg)
    return found


def fakes(true):
    """{name: function}: the wrong functions that must get nothing."""
    import torch

    made = {
        "zeros": lambda *args, **options: fill(true(*copied(args), **options), 0),
        "ones": lambda *args, **options: fill(true(*copied(args), **options), 1),
        "a zero": lambda *args, **options: torch.zeros(()),
        "a one": lambda *args, **options: 1.0,
        "its first argument": lambda *args, **options: args[0],
        "its second argument": lambda *args, **options: args[1] if len(args) > 1 else None,
        "nothing": lambda *args, **options: None,
    }
    return made


def replace_function(place, make):
    """Put make(function) in the place of a function that has been imported."""
    file, names = cut.split(place)
    name = file.removesuffix(".py")
    owner = next(sys.modules[n] for n in (name, f"pipeline.{name}") if n in sys.modules)
    for part in names[:-1]:
        owner = getattr(owner, part)
    true = getattr(owner, names[-1])
    setattr(owner, names[-1], make(true))
    return lambda: setattr(owner, names[-1], true)


def values(work):
    """In a fork: the outputs of a problem in these files; with `faked`, {name: outputs} of the wrong functions."""
    here, files, problem, cases, faked = work
    import child

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write(folder, {**files, **{name: (here / name).read_text(encoding="utf-8") for name in HELPERS}})
        os.chdir(folder)
        for name in [*files, *HELPERS]:  # what this process has imported is not what is graded
            sys.modules.pop(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), None)
        sys.path[:] = [folder, *[path for path in sys.path if path not in ("", str(here), str(here.parent))]]
        module = f"set{problem.set}"
        if not faked:
            return child.outputs(module, problem.key, cases, folder)
        importlib.import_module(module)
        found = {}
        for name in fakes(None):
            undo = replace_function(problem.place, lambda true, name=name: fakes(true)[name])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = child.outputs(module, problem.key, cases, folder)
            undo()
        return found


def in_forks(works, processes=1):
    """The values of each of the works, every one in a process that has imported torch and nothing of the project."""
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch, once
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap(values, works, 1)


def prove_functions(here, files, bugs, seed, numbers=(1, 2, 3, 4, 5, 6)):
    """
    [(kind, what, problem, message), ...] of everything that is graded: kind is solution, stub, fake or bug.

    Only for solution may the message be empty.
    """
    works, labels, cases = [], [], {}
    for number in numbers:
        done = subprocess.run([sys.executable, str(here / "expect.py"), str(here / "project"), str(number), seed],
                              capture_output=True, text=True, check=True)
        cases.update({(number, key): case for key, case in json.loads(done.stdout).items()})
    for problem in [p for p in (*PROBLEMS, *HUNTED) if p.set in numbers]:
        everything = PROBLEMS if problem.set < 6 else ()
        case = cases[problem.set, problem.key]
        true = with_student(files, problem, files, everything)
        works.append((here, true, problem, case["cases"], False))
        labels.append(("solution", "", problem))
        if problem.set < 6:
            stub = with_student(files, problem, emptied(files), everything)
            works.append((here, stub, problem, case["cases"], False))
            labels.append(("stub", "", problem))
            works.append((here, true, problem, case["cases"], True))
            labels.append(("fake", "", problem))
        for bug in [bug for bug in bugs if bug["place"] == problem.place]:
            wrong = with_bug(files, bug)
            works.append((here, with_student(files, problem, wrong, everything), problem, case["cases"], False))
            labels.append(("bug", bug["name"], problem))
    rows = []
    for (kind, what, problem), got in zip(labels, in_forks(works)):
        board = SETS[problem.set].leaderboard if problem.set in SETS else ""
        case = cases[problem.set, problem.key]
        for name, outputs in (got.items() if kind == "fake" else [(what, got)]):
            rows.append((kind, name, problem, verdict(problem, case, outputs, board)[0]))
    return rows


def with_bug(files, bug):
    text = files[bug["path"]]
    return {**files, bug["path"]: text[:bug["start"]] + bug["wrong"] + text[bug["end"]:]}


def touches_no_other(files, bug):
    """Whether every other problem of the set is graded with the same files as without the bug."""
    problem = next(p for p in PROBLEMS if p.place == bug["place"])
    wrong = with_bug(files, bug)
    return all(with_student(files, other, wrong) == with_student(files, other, files)
               for other in SETS[problem.set].problems
               if other is not problem and path_of(files, other.place) == bug["path"])


def faults(rows):
    """What is wrong with the rows of prove_functions, as sentences."""
    return [f"{kind} {what} of {problem.number} {problem.key}: {message or 'solved'}"
            for kind, what, problem, message in rows if (kind == "solution") == bool(message)]


# ---- whole submissions, through the grader that Gradescope runs -----------------------------------

WRONG = {  # set 4: one function after another tries something else; 4.8 and 4.9 are right
    "masked_mean": "    raise SystemExit(0)\n",
    "kl_estimates": "    return bytearray(10 ** 10)\n",
    "token_rewards": "    import glob\n    for path in ['/autograder/results/results.json', *glob.glob('*.py')]:\n"
                     "        open(path, 'w').write('{}')\n",
    "gae": "    while True:\n        print('advantages' * 1000)\n",
    "whiten": "    import time\n    time.sleep(10 ** 6)\n",
    "policy_loss": "    import os\n    os._exit(0)\n",
    "value_loss": "    import os\n    while True:\n        os.fork()\n"}


def malicious(solution):
    """ppo.py in which every function does something that it should not."""
    text = solution["ppo.py"]
    for key, body in WRONG.items():
        text = cut.empty(text, (f"ppo.py::{key}", key)).replace(f'    raise NotImplementedError("{key}")\n', body)
    return {**solution, "ppo.py": text}


def grade_zip(archive, submission, folder, student="a@b.org"):
    """(results, their bytes, seconds, most MB of a process) of a submission, graded by the content of a zip."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "source")
    for path, text in submission.items():
        (folder / "submission" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "submission" / path).write_text(text, encoding="utf-8")
    (folder / "submission_metadata.json").write_text(json.dumps(dict(users=[dict(email=student)])))
    started = time.monotonic()
    subprocess.run([sys.executable, str(folder / "source" / "grade.py"), "--base", str(folder)], check=True)
    seconds = time.monotonic() - started
    content = (folder / "results" / "results.json").read_bytes()
    return json.loads(content), content, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def tree_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".json", ".md")}


def prove(make, folder):
    """Print the proof. Returns 1 if something is not as it should be."""
    from bugs import all_bugs
    from make import HERE, ROOT
    from project import read_project

    wrong = []
    out = make(folder / "out", "proof", "a@b.org")
    solution, handout, hunt = (tree_of(out / name) for name in ("solution", "handout", "hunt"))
    files = read_project(ROOT)
    bugs = all_bugs(ROOT, files, (*PROBLEMS, *HUNTED))
    write(folder / "source" / "project", files)
    for name in [path.name for path in HERE.glob("*.py")]:
        (folder / "source" / name).write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")
    rows = prove_functions(folder / "source", files, bugs, "proof")
    wrong += faults(rows)
    wrong += [f"{bug['name']} changes the files of another problem" for bug in bugs
              if any(p.place == bug["place"] for p in PROBLEMS) and not touches_no_other(files, bug)]
    counts = {kind: sum(row[0] == kind for row in rows) for kind in ("solution", "stub", "fake", "bug")}
    print(f"functions: {counts['solution']} right ones, {counts['stub']} stubs, {counts['fake']} wrong ones, "
          f"{counts['bug']} planted bugs; {len(wrong)} graded wrong", flush=True)
    print("set  submission      score   seconds  largest process")
    runs = 0
    for number in range(1, 8):
        archive = out / f"gradescope-{number}.zip"
        tries = [("stubs", hunt if number == 6 else handout, 0), ("solution", solution, None)]
        tries += [("solution", solution, None)] if number != 6 else []
        tries += [("malicious", malicious(solution), 13)] if number == 4 else []
        before = None
        for name, submission, score in tries:
            runs += 1
            work = folder / f"graded-{runs}"
            results, content, seconds, size = grade_zip(archive, submission, work)
            most = sum(test["max_score"] for test in results["tests"])
            score = most if score is None else score
            print(f"{number:3}  {name:<12} {results['score']:4g} of {most:<3} {seconds:6.0f}    {size:6.0f} MB",
                  flush=True)
            if results["score"] != score:
                wrong.append(f"set {number}, {name}: {results['score']} points, not {score}")
                wrong += [f"    {test['number']}: {test['output']}" for test in results["tests"]]
            if name == "solution" and before is not None and content != before:
                wrong.append(f"set {number}: the same submission gives other bytes")
            before = content if name == "solution" else before
    print("\n".join(["WRONG", *wrong]) if wrong else "all is graded right")
    return 1 if wrong else 0
