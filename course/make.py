"""
Make the course from the repository as it is:

    python course/make.py OUT                            handout, solution, hunt, Gradescope zips, notebook
    python course/make.py OUT --course "CS 101, spring"  the same for a course in which every student has a variant
    python course/make.py OUT --roster emails.txt        and a zip for each student: handout and hunt
    python course/make.py OUT --solved 2                 a handout in which the sets 1 and 2 are solved

OUT is a new folder. The name of the course and the secret of its hidden numbers are kept in course.json next to OUT, so
that whatever is made there later is graded alike. Nothing in OUT is ever edited: change the sources and make it again.
"""

import argparse
import importlib.metadata
import json
import re
import secrets
import shutil
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "sets"), str(ROOT)]

import hunt  # noqa: E402
from bugs import all_bugs  # noqa: E402
from notebook import notebook  # noqa: E402
from problems import PROBLEMS, SETS, points_of, variant_seed  # noqa: E402
from project import emptied, read_project, write  # noqa: E402

SETTERS = ("set1.py", "set2.py", "set3.py", "set4.py", "set5.py", "sets/problems.csv")
STUDENT = (*SETTERS, "problems.py", "judge.py", "values.py", "child.py", "draw.py", "game.py", "handed_in.py",
           "project.py", "work.py")  # in every handout
GRADER = (*STUDENT, "grade.py", "sandbox.py", "hunt.py", "rewrite.py", "open_end.py", "play.py")
OTHERS = ("LICENSE", "docs/metrics.md")
PACKAGES = ("torch", "numpy", "tqdm", "tiktoken")


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def pinned(name):
    """The version that is installed here: what was tried is what students and the grader get."""
    return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"


def python_needed():
    """The oldest Python that all these versions run on: "3.11"."""
    least = [re.search(r">=3\.(\d+)", importlib.metadata.metadata(name)["Requires-Python"])[1] for name in PACKAGES]
    return f"3.{max(map(int, least))}"


def scripts():
    """The two scripts of a zip for Gradescope."""
    torch, *others = map(pinned, (*PACKAGES, "pytest"))
    setup = read("gradescope/setup.sh").format(torch=torch, others=" ".join(others))
    return {"setup.sh": setup, "run_autograder": read("gradescope/run_autograder")}


# ---- what students get ----------------------------------------------------------------------------

def whole_project():
    """{path: text} of the project and of the exercise that is kept in the course."""
    return {**read_project(ROOT), "ratios.py": read("sets/ratios.py")}


def visible_cases(seed):
    """{path: text} of cases/KEY.json, made by the true functions."""
    import torch
    from draw import expected

    torch.set_num_threads(1)
    return {f"cases/{key}.json": json.dumps(case) + "\n" for number, part in SETS.items() if part.problems
            for key, case in expected(number, f"{seed} visible").items()}


def without_rubrics(text):
    return re.sub(r"\s*\*Rubric[^*]*\*", "", text)


def common(project):
    """The files that handout and solution share, without the numbers of a variant."""
    files = {f"course/{name}": read(name) for name in STUDENT}
    files.update({name: (ROOT / name).read_text(encoding="utf-8") for name in OTHERS if (ROOT / name).exists()})
    files.update({f"sets/{path.name}": path.read_text(encoding="utf-8") for path in HERE.glob("sets/[0-9].md")})
    requirements = "".join(f"{pinned(name)}\n" for name in PACKAGES)
    return {**project, **files, "check.py": read("check.py"), "hack.py": read("sets/hack.py"),
            "README.md": read("sets/README.md").format(python=python_needed()),
            "AGENTS.md": read("AGENTS.md"), "CLAUDE.md": read("AGENTS.md"), "requirements.txt": requirements}


def handout(project, shared, solved):
    left = [problem for problem in PROBLEMS if problem.set > solved]
    texts = {path: without_rubrics(text) if path.startswith("sets/") else text for path, text in shared.items()}
    return {**texts, **emptied(project, left), "open_end.py": read("sets/open_end.py")}


def hunted(project, shared, bugs, seed):
    """The working copy of set 6, with the bugs of a variant."""
    kept = {name: shared[name] for name in ("AGENTS.md", "CLAUDE.md", "docs/metrics.md") if name in shared}
    places = sorted({bug["place"] for bug in bugs})
    copy = hunt.planted(project, hunt.choose(bugs, seed)[:hunt.BUGS])
    return {**copy, **kept, "hunted.txt": "\n".join(places) + "\n",
            "README.md": without_rubrics(read("sets/6.md")),
            "requirements.txt": shared["requirements.txt"] + pinned("pytest") + "\n"}


def key_of(bugs, seed):
    """For the instructor: the bugs of a hunt, and the tests of the project that show them."""
    lines = ["# The bugs of this hunt, and a test of the project that shows each one", ""]
    for i, bug in enumerate(hunt.choose(bugs, seed)):
        whose = "in the copy" if i < hunt.BUGS else "not in the copy"
        lines.append(f"- {bug['place']}, {whose}: {bug['name']}. Planted: `{bug['wrong']}`. Shown by {bug['killer']}")
    return "\n".join([*lines, ""])


# ---- what the instructor gets ---------------------------------------------------------------------

def make_zip(path, files):
    """A zip that is the same, byte for byte, whenever it is made. Scripts are executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            archive.writestr(entry, text)


def grader(number, project, settings, bugs):
    """{path: text} of gradescope-N.zip."""
    files = {name: read(name) for name in GRADER}
    files.update({f"project/{path}": text for path, text in project.items()})
    files["settings.json"] = json.dumps(dict(settings, set=number)) + "\n"
    if number == 6:
        files["bugs.json"] = json.dumps(bugs, indent=1) + "\n"
    return {**files, **scripts()}


def kept(path, course):
    """The settings of a course, from course.json; made on the first call. ValueError if they are of another course."""
    if not path.exists():
        path.write_text(json.dumps(dict(course=course or "", secret=secrets.token_hex(16)), indent=1) + "\n")
    settings = json.loads(path.read_text(encoding="utf-8"))
    if course is not None and settings["course"] != course:
        raise ValueError(f"{path} is of the course {settings['course']!r}: make this one in another folder")
    return settings


def addresses(path):
    """The addresses of a roster: the field with an @ in each line, whatever its line ends."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    found = [next((word for word in re.split(r"[\s,;<>\"]+", line) if "@" in word), "") for line in lines]
    return list(dict.fromkeys(address for address in found if address))


def make(out, settings, roster=(), solved=0):
    """Write everything into the new folder `out`."""
    course, project = settings["course"], whole_project()
    bugs, shared = all_bugs(ROOT, project), common(project)
    given = handout(project, shared, solved)
    for address in roster or [""]:
        seed = variant_seed(course, address)
        about = {"variant.json": json.dumps(dict(course=course, student=address, seed=seed), indent=1) + "\n"}
        mine = {**about, **visible_cases(seed)}
        copy = {**hunted(project, shared, bugs, seed), **about}
        if roster:
            make_zip(out / "students" / f"{address}.zip", {**given, **mine})
            make_zip(out / "hunts" / f"{address}.zip", copy)
            write(out / "hunts", {f"{address}.key.md": key_of(bugs, seed)})
    if not roster:
        write(out / "handout", {**given, **mine})
        write(out / "hunt", copy)
    answers = {"open_end.py": read("sets/answer7.py"), "hunt.key.md": key_of(bugs, seed)}
    write(out / "solution", {**shared, **mine, **answers})
    for number in SETS:
        make_zip(out / f"gradescope-{number}.zip", grader(number, project, settings, bugs))
    write(out, {"tour.ipynb": json.dumps(notebook(read("sets/tour.md")), indent=1, ensure_ascii=False) + "\n"})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--course", help="the name of the course: every student gets a variant")
    parser.add_argument("--roster", metavar="FILE", help="an address in each line: a zip for each student")
    parser.add_argument("--solved", type=int, default=0, metavar="N", help="leave the sets 1 to N solved")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if out.exists():
        parser.error(f"{args.out} is there already: name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        settings = kept(out.parent / "course.json", args.course)
    except ValueError as fault:
        parser.error(str(fault))
    if args.roster and not settings["course"]:
        parser.error("--roster goes with --course: the variants follow from both")
    roster = addresses(args.roster) if args.roster else []
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make(part, settings, roster, args.solved)
    part.rename(out)
    print(f"{args.out} is made for {len(roster) or 'all'} students; {out.parent / 'course.json'} keeps the secret")
    for number, part in SETS.items():
        print(f"  set {number}: {points_of(number)} points by machine, {part.written} written")


if __name__ == "__main__":
    sys.exit(main())
