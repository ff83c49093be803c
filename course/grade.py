"""
The grader of one problem set: python grade.py [--base /autograder]

It reads BASE/submission and BASE/submission_metadata.json and writes BASE/results/results.json: first with score 0,
then anew after each problem, each time replaced as a whole. It never runs the student's code: a child does (sandbox.py,
child.py), which is told the inputs and not what is expected. No clock enters the result: the same submission gives
the same bytes.

Beside this file lie `project/` (the true files), `settings.json` (the set, the course) and, for set 6, `bugs.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cut
import sandbox
from judge import verdict
from problems import SETS, TITLES, variant_seed
from project import is_stub, path_of, read_project, read_submission, with_student, write

HERE = Path(__file__).resolve().parent
BUDGET = 540  # seconds of wall clock for everything: the container has 600
HELPERS = ("child.py", "values.py", "draw.py", "set1.py", "set2.py", "set3.py", "set4.py", "set5.py", "set6.py",
           "loops.py")
NOT_YET = "not graded: the grader was stopped before this problem"


class Results:
    """results.json: what each problem got so far."""

    def __init__(self, path, tests, about):
        self.path, self.tests, self.about, self.leaderboard = path, tests, about, []
        self.save()

    def save(self):
        total = round(sum(test["score"] for test in self.tests), 2)
        content = dict(score=total, output=self.about, visibility="visible", tests=self.tests)
        if self.leaderboard:
            content["leaderboard"] = self.leaderboard
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        try:
            part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        except OSError:  # a child that fills the disk: the file before stays, the next one comes
            if not self.path.exists():
                raise

    def set(self, number, score, output, share=None, board="share of the optimum"):
        test = next(test for test in self.tests if test["number"] == number)
        test.update(score=score, status="passed" if score >= test["max_score"] else "failed", output=clean(output))
        if share is not None:
            self.leaderboard = [dict(name=board, value=share, order="desc")]
        self.save()


def entry(number, name, points):
    """A test of Gradescope's results.json, not yet graded."""
    return dict(number=number, name=name, score=0, max_score=points, status="failed", output=NOT_YET,
                visibility="visible")


def clean(text):
    """A text without control characters, cut."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)[:1500]


def student_of(base):
    """The e-mail address of the first user of the submission, "" if there is none."""
    try:
        users = json.loads((base / "submission_metadata.json").read_text(encoding="utf-8"))["users"]
        return str(users[0]["email"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def variant(settings, base):
    """The seed of the variant: of the course and the student if the zip was made for a course, else the common one."""
    student = student_of(base) if settings["course"] else ""
    return variant_seed(settings["course"], student), student


def secret(here):
    """The text that only this zip has. With it, who knows the seed and the code still does not know the numbers."""
    return json.loads((here / "settings.json").read_text(encoding="utf-8")).get("secret", "")


def hidden_cases(number, seed):
    """The cases of this student and what the true code gives, computed in a process of ours."""
    command = [sys.executable, str(HERE / "expect.py"), str(HERE / "project"), str(number),
               f"{seed} {secret(HERE)} hidden"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True,
                          env={**sandbox.environment("/tmp"), "HOME": "/"})
    return json.loads(done.stdout)


def call(files, problem, case, seconds):
    """The outputs of one function of the given files for the inputs of its cases, or a sentence that says why not."""
    with sandbox.Folder() as folder:
        write(folder.path, {**files, **{name: (HERE / name).read_text(encoding="utf-8") for name in HELPERS}})
        folder.hand_over()
        request = json.dumps(dict(set=problem.set, key=problem.key, cases=case["cases"]))
        command = [*sandbox.python(), os.path.join(folder.path, "child.py"), folder.path]
        status, text = sandbox.run(command, folder.path, seconds, request)
    if status == "time":
        return "it took too long and was stopped"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return "the process ended before it gave its values" + (" (memory or time)" if status else "")


def grade_problem(files, problem, texts, case, seconds, leaderboard, everything=None):
    """(message, share) of one problem."""
    try:
        path = path_of(files, problem.place)
        if path in texts and is_stub(problem, texts[path]):
            return f"{problem.key}: not solved yet", None
        ours = with_student(files, problem, texts, everything)
    except cut.Missing as fault:
        return f"{problem.key}: {fault}", None
    return verdict(problem, case, call(ours, problem, case, seconds), leaderboard)


def grade_set(number, files, texts, seed, results, deadline):
    """Sets 1 to 5: one problem after another."""
    part = SETS[number]
    cases = hidden_cases(number, seed)
    for problem in part.problems:
        seconds = max(1, min(problem.seconds, int(deadline - time.monotonic())))
        message, share = grade_problem(files, problem, texts, cases[problem.key], seconds, part.leaderboard)
        results.set(problem.number, 0 if message else problem.points, message or "solved", share)


def tests_of(number, settings):
    """The entries of a set, in order."""
    if number in SETS:
        return [entry(p.number, f"{p.number} {p.key}: {p.title}", p.points) for p in SETS[number].problems]
    if number == 6:
        from hunt import entries
    else:
        from open_end import entries
    return [entry(*row) for row in entries()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="/autograder", type=Path)
    base = parser.parse_args(argv).base
    started = time.monotonic()
    settings = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    number = settings["set"]
    seed, student = variant(settings, base)
    about = f"Set {number}, {TITLES[number]}. Variant {seed[:8]}" + (f" of {student}" if student else "") + (
        ". Every part of this total is shown. The written questions are graded by hand and come on top.")
    results = Results(base / "results" / "results.json", tests_of(number, settings), about)
    if os.getuid() == 0:
        os.chmod(HERE, 0o700)  # the true files are not for the student's code
    files = read_project(HERE / "project")
    deadline = started + BUDGET
    if number in SETS:
        paths = sorted({path_of(files, problem.place) for problem in SETS[number].problems})
        grade_set(number, files, read_submission(base / "submission", paths), seed, results, deadline)
    elif number == 6:
        from hunt import grade_hunt

        grade_hunt(HERE, files, base / "submission", seed, results, deadline)
    else:
        from open_end import grade_open

        grade_open(HERE, files, base / "submission", seed, results, deadline)


if __name__ == "__main__":
    main()
