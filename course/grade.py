"""
The grader of one problem set: python grade.py --base /autograder

It reads BASE/submission and BASE/submission_metadata.json and writes BASE/results/results.json: first with score 0,
then again after each problem, each time replaced as a whole. It never runs the student's code: a child does
(sandbox.py, child.py), which is told the inputs and not what is expected.

Next to this file are `project/` (the true files), `settings.json` (set, course, secret) and, for set 6, `bugs.json`.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "project"))  # the true code, which judges policies

import handed_in  # noqa: E402
import host  # noqa: E402
import hunt  # noqa: E402
import sandbox  # noqa: E402
from draw import expected  # noqa: E402
from problems import SETS, points_of, variant_seed  # noqa: E402
from project import read_project  # noqa: E402
from work import grade_problem  # noqa: E402

NOT_YET = "not graded: the grader was stopped before this problem"


class Results:
    """results.json: the points of each problem so far."""

    def __init__(self, path, tests, about):
        self.path, self.about, self.leaderboard = path, about, []
        self.tests = [dict(number=number, name=name, score=0, max_score=points, output=NOT_YET)
                      for number, name, points in tests]
        self.save()

    def save(self):
        total = round(sum(test["score"] for test in self.tests), 2)
        content = dict(score=total, output=self.about, tests=self.tests)
        if self.leaderboard:
            content["leaderboard"] = self.leaderboard
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def set(self, number, score, output, share=None):
        test = next(test for test in self.tests if test["number"] == number)
        test.update(score=score, output=output)
        if share is not None:
            self.leaderboard = [dict(name="share of the optimum", value=share, order="desc")]
        self.save()


def read_json(path):
    """The content of a JSON file, {} if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def whose(course, group, submission):
    """
    (seed of the variant, remark). With a course every student has a variant. A group may work on the variant of any
    member: the one whose variant.json is handed in, else the first. Without a course there is one variant for all.
    """
    if not course:
        return variant_seed("", ""), ""
    try:
        seed = str(json.loads(handed_in.read(submission, "variant.json")[0])["seed"])
    except Exception:  # a RecursionError too: brackets a thousand deep must not stop the grader
        seed = ""
    seeds = {variant_seed(course, address): address for address in group or [""]}
    mine = seed if seed in seeds else next(iter(seeds))
    remark = f"Variant of {seeds[mine] or 'nobody'}. "
    if seed and seed != mine:
        remark += "YOUR variant.json WAS MADE FOR ANOTHER ADDRESS: ask for the copy that was made for this one. "
    return mine, remark


def days_late(known):
    """Whole days after the due date that the metadata give, 0 if there is none."""
    try:
        due, made = [datetime.datetime.fromisoformat(x.replace("Z", "+00:00"))
                     for x in (known["assignment"]["due_date"], known["created_at"])]
        return max(0, -((due - made) // datetime.timedelta(days=1)))
    except (LookupError, ValueError, TypeError, AttributeError):
        return 0


def grade_set(number, files, submission, cases, results, run=sandbox.run):
    """Sets 1 to 5: one problem after another."""
    helpers = handed_in.helpers(submission, {problem.file for problem in SETS[number].problems}, files)
    for problem in SETS[number].problems:
        try:
            content, remark = handed_in.read(submission, problem.file)
        except handed_in.Refused as fault:
            results.set(problem.number, 0, str(fault))
            continue
        given = {**helpers, f"handed_in/{problem.file}": content}
        points, sentence = grade_problem(files, problem, cases[problem.key], given, run)
        results.set(problem.number, points, remark + sentence)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    base = parser.parse_args(argv).base
    settings, known = read_json(HERE / "settings.json"), read_json(base / "submission_metadata.json")
    number, submission = settings["set"], base / "submission"
    group = [user["email"] for user in known.get("users", ())]
    seed, remark = whose(settings["course"], group, submission)
    late = days_late(known)
    about = (f"Set {number}, {SETS[number].title}: {points_of(number)} points by machine, {SETS[number].written} for "
             f"the written questions. {remark}" + (f"Handed in late, late days used: {late}." if late else ""))
    lines = [(problem.number, f"{problem.number} {problem.key}", problem.points) for problem in SETS[number].problems]
    lines = {6: hunt.LINES, 7: host.LINES}.get(number, lines)
    results = Results(base / "results" / "results.json", lines, about)
    sandbox.python()  # fails here and not as zero points, if nothing can be run without privileges
    if sandbox.is_root():
        os.chmod(HERE, 0o700)  # the true files are not for the student's code
    secret = f"{seed} {settings['secret']}"
    files = read_project(HERE / "project")
    if number == 6:
        hunt.grade(files, read_json(HERE / "bugs.json"), submission, seed, secret, results)
    elif number == 7:
        host.grade(files, submission, secret, results)
    else:
        grade_set(number, files, submission, expected(number, f"{secret} hidden"), results)


if __name__ == "__main__":
    main()
