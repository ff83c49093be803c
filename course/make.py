"""
Make the course from the repository as it is:

    python course/make.py OUT                                      handout, solution, hunt, Gradescope zips, notebook
    python course/make.py OUT --course CS1 --student a@b.org       the same in the variant of one student
    python course/make.py OUT --solved 2                           a handout in which the sets 1 and 2 are solved
    python course/make.py --prove                                  prove that it grades right; twenty minutes

OUT is a new folder. Nothing in it is ever edited: change the sources and make it again.
"""

import argparse
import json
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import cut  # noqa: E402
import hunt  # noqa: E402
from bugs import all_bugs  # noqa: E402
from open_end import HIGH, LOW, POINTS  # noqa: E402
from problems import HUNTED, PROBLEMS, SETS, TITLES, points_of, variant_seed  # noqa: E402
from project import emptied, read_project, write  # noqa: E402

STUDENT = ("problems.py", "judge.py", "values.py", "exact.py", "child.py", "draw.py", "game.py")  # in every handout
PROBES = ("set1.py", "set2.py", "set3.py", "set4.py", "set5.py")
GRADER = (*STUDENT, *PROBES, "set6.py", "loops.py", "grade.py", "sandbox.py", "project.py", "cut.py", "expect.py",
          "hunt.py", "open_end.py", "play.py")
OTHERS = ("requirements.txt", "LICENSE", "docs/metrics.md")
SETUP = """#!/usr/bin/env bash
# Run once by Gradescope, as root, when the image is built. The system's python stays as it is.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
/usr/bin/python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install --no-cache-dir numpy tqdm tiktoken pytest
"""
RUN = """#!/usr/bin/env bash
# Run by Gradescope for each submission, as root, in /autograder.
export OMP_NUM_THREADS=1
exec /autograder/venv/bin/python /autograder/source/grade.py
"""


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def visible_cases(seed):
    """{path: text} of cases/KEY.json, made by the true functions."""
    import torch
    from expect import expected

    torch.set_num_threads(1)
    files = {}
    for number, part in SETS.items():
        for key, case in expected(number, f"{seed} visible", part.problems).items():
            files[f"cases/{key}.json"] = json.dumps(case) + "\n"
    return files


def texts_of_sets():
    return {f"sets/{path.name}": path.read_text(encoding="utf-8") for path in sorted((HERE / "sets").glob("*.md"))}


def without_rubrics(files):
    """The files, where the texts of the sets have no rubrics: these name the answers."""
    return {name: re.sub(r"\s*\*Rubric.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL) if name.startswith("sets/") else text
            for name, text in files.items()}


def common(project, seed, about):
    """What the handout and the solution share, beside the project's files."""
    files = {f"course/{name}": read(name) for name in (*STUDENT, *PROBES)}
    files["course/open_end.py"] = points_only()
    files["course/curves/ppo.csv"] = read("curves/ppo.csv")
    files.update({name: (ROOT / name).read_text(encoding="utf-8") for name in OTHERS if (ROOT / name).exists()})
    files.update({"check.py": read("check.py"), "hack.py": read("sets/hack.py"), "AGENTS.md": read("AGENTS.md"),
                  "README.md": read("sets/README.md"),
                  "variant.json": json.dumps(dict(about, seed=seed), indent=1) + "\n"})
    files.update({name: text for name, text in texts_of_sets().items() if name != "sets/README.md"})
    return {**project, **files, **visible_cases(seed)}


def points_only():
    """What check.py needs of open_end.py: how a share becomes points."""
    text = read("open_end.py")
    constants = next(line for line in text.split("\n") if line.startswith("LOW, HIGH"))
    body = "\n".join(cut.source(text, "open_end.py::points")[0])
    return f'"""How a share of the optimum becomes points in set 7."""\n\nPOINTS = 20\n{constants}\n\n\n{body}\n'


def make_zip(path, files):
    """A zip that is the same, byte for byte, whenever it is made. Scripts are executable."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            archive.writestr(entry, text)


def grader_files(number, project, course, bugs, secret):
    """{path: text} of gradescope-N.zip."""
    files = {name: read(name) for name in GRADER}
    files.update({f"project/{path}": text for path, text in project.items()})
    files["settings.json"] = json.dumps(dict(set=number, course=course, secret=secret)) + "\n"
    if number == 6:
        files["bugs.json"] = json.dumps(bugs, indent=1) + "\n"
    return {**files, "setup.sh": SETUP, "run_autograder": RUN}


def classroom(number):
    """tests.json of Classroom 50, schema classroom50/tests/v1: one `run` a problem, which fails unless it is solved."""
    if number == 7:  # a quarter of the points for each step from LOW to HIGH
        steps = [LOW + (HIGH - LOW) * part / 4 for part in (1, 2, 3, 4)]
        rows = [(f"share of {x:.2f}", f"7 --least {x:.3f}", POINTS // 4) for x in steps]
    else:
        rows = [(problem.key, problem.number, problem.points) for problem in SETS[number].problems]
    tests = [dict(name=f"{number}: {name}", type="run", setup="true", run=f"python3 check.py {what}", timeout=300,
                  points=points) for name, what, points in rows]
    tests[0]["setup"] = "python3 -m pip install -q -r requirements.txt"
    return dict(schema="classroom50/tests/v1", tests=tests)


def make(out, course="", student="", solved=0, secret=""):
    """Write everything into the new folder `out`."""
    out = Path(out)
    out.mkdir(parents=True)
    seed = variant_seed(course, student)
    project = read_project(ROOT)
    bugs = all_bugs(ROOT, project, HUNTED)
    about = dict(course=course, student=student)
    left = [problem for problem in PROBLEMS if problem.set > solved]
    shared = common(project, seed, about)
    answer = read("answer7.py")
    stub = cut.empty(answer, ("answer7.py::train", "problem 7.1: train"))
    stub = stub.replace("\n".join(cut.source(stub, "answer7.py::features")[0]) + "\n\n\n", "")
    tests = {hunt.TEST_FILE: hunt.model_answer(ROOT, seed, {name: read(name) for name in hunt.PARTS})}
    write(out / "solution", {**shared, "open_end.py": answer, **tests})
    published = without_rubrics(shared)
    write(out / "handout", {**published, **emptied(project, left), "open_end.py": stub})
    mine = hunt.choose(bugs, seed)[:hunt.BUGS]
    hunted = "".join(f"{problem.place}\n" for problem in HUNTED)
    write(out / "hunt", {**hunt.planted(project, mine), "README.md": published["sets/6.md"], "hunted.txt": hunted,
                         "requirements.txt": shared["requirements.txt"] + "pytest\n",
                         **{name: shared[name] for name in ("AGENTS.md", "docs/metrics.md")}})
    for number in TITLES:
        make_zip(out / f"gradescope-{number}.zip", grader_files(number, project, course, bugs, secret))
        if number != 6:  # which would need the true code
            write(out / f"classroom50-{number}", {"tests.json": json.dumps(classroom(number), indent=1) + "\n"})
    from notebook import notebook

    write(out, {"tour.ipynb": json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"})
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", metavar="OUT", help="a new folder")
    parser.add_argument("--course", default="", help="the name of the course: every student gets a variant")
    parser.add_argument("--student", default="", metavar="EMAIL", help="make this student's variant")
    parser.add_argument("--solved", type=int, default=0, metavar="N", help="leave the sets 1 to N solved")
    parser.add_argument("--secret", default="", metavar="TEXT", help="of the hidden numbers; a random one by default")
    parser.add_argument("--prove", action="store_true", help="prove that it grades right")
    args = parser.parse_args(argv)
    if args.prove:
        from prove import prove

        with tempfile.TemporaryDirectory() as folder:
            return prove(make, Path(folder))
    if not args.out or Path(args.out).exists():
        sys.exit("make.py: name a new folder for what is made" + (f": {args.out} is there already" if args.out else ""))
    if args.student and not args.course:
        sys.exit("make.py: --student goes with --course: the variant follows from both")
    part = Path(f"{args.out}.part")
    shutil.rmtree(part, ignore_errors=True)
    make(part, args.course, args.student, args.solved, args.secret or secrets.token_hex(16))
    part.rename(args.out)
    print(f"{args.out}: handout, solution, hunt, seven zips for Gradescope, tests.json for Classroom 50, tour.ipynb")
    for number in SETS:
        print(f"  set {number}: {points_of(number)} points by machine, {SETS[number].written} written")


if __name__ == "__main__":
    sys.exit(main())
