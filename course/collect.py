"""
Grade a folder of submissions without Gradescope:

    python course/collect.py OUT/gradescope-4.zip SUBMISSIONS GRADES --due "2026-03-02 23:59"

SUBMISSIONS has a folder or a zip for each student, named by the address ("a@b.org" or "a@b.org.zip"), for a group by
all of its addresses with a + between them. GRADES is a new folder: grades.csv, and a text for each student.
"""

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def unpack(submission, target):
    """Copy or unzip a submission. What cannot be read (a broken or encrypted zip, a closed file) was not handed in."""
    target.mkdir(parents=True)
    try:
        if submission.is_dir():
            shutil.copytree(submission, target, dirs_exist_ok=True, symlinks=True)
        else:
            zipfile.ZipFile(submission).extractall(target)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as fault:
        print(f"{submission.name}: {type(fault).__name__}, not all of it could be read", file=sys.stderr)


def grade(source, submission, due):
    """The results of one submission, by the unpacked grader in `source`."""
    name = submission.name.removesuffix(".zip")
    # a plus joins the addresses of a group. Before an @ it is a part of one: a+b@c.d+e@f.g are two addresses
    known = dict(users=[dict(email=address) for address in re.findall(r"([^@]+@[^+]+)\+?", name)])
    if due:
        newest = max(path.lstat().st_mtime for path in (submission, *submission.rglob("*")))
        made = datetime.datetime.fromtimestamp(newest).astimezone()
        known.update(created_at=made.isoformat(), assignment=dict(due_date=due.isoformat()))
    with tempfile.TemporaryDirectory() as base:
        unpack(submission, Path(base, "submission"))
        Path(base, "submission_metadata.json").write_text(json.dumps(known))
        subprocess.run([sys.executable, str(source / "grade.py"), "--base", base], check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(base, "results", "results.json").read_text(encoding="utf-8"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path, help="the grader of a set, from make.py")
    parser.add_argument("submissions", type=Path)
    parser.add_argument("grades", type=Path, help="a new folder")
    parser.add_argument("--due", type=lambda text: datetime.datetime.fromisoformat(text).astimezone(),
                        help="local time; submissions whose newest file is later have late days")
    args = parser.parse_args(argv)
    if not args.submissions.is_dir():
        parser.error(f"{args.submissions} is no folder")
    if not zipfile.is_zipfile(args.zip):
        parser.error(f"{args.zip} is no zip: name a gradescope-N.zip that make.py wrote")
    if args.grades.exists():
        parser.error(f"{args.grades} is there already: name a new folder")
    args.grades.mkdir(parents=True)
    rows = []
    with tempfile.TemporaryDirectory() as source:
        zipfile.ZipFile(args.zip).extractall(source)
        for submission in sorted(path for path in args.submissions.iterdir() if "@" in path.name):
            name, results = submission.name.removesuffix(".zip"), grade(Path(source), submission, args.due)
            text = "\n".join(f"{test['name']}: {test['score']:g} of {test['max_score']}. {test['output']}"
                             for test in results["tests"])
            (args.grades / f"{name}.txt").write_text(f"{results['output']}\n\n{text}\n", encoding="utf-8")
            late = results["output"].partition("late days used: ")[2].partition(".")[0]
            scores = {test["name"]: test["score"] for test in results["tests"]}
            rows.append(dict(student=name, score=results["score"], late_days=late or 0, **scores))
            print(f"{name}: {results['score']:g}", flush=True)
    with open(args.grades / "grades.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["student"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
