"""
Make the course from the repository as it is:

    python course/make.py OUT                            handout, solution, hunt, Gradescope zips, notebook
    python course/make.py OUT --course "CS 101, spring"  the same for a course in which every student has a variant
    python course/make.py OUT --course "CS 101, spring" --roster emails.txt    and a zip for each student
    python course/make.py OUT --solved 2                 a handout in which the sets 1 and 2 are solved

OUT is a new folder. The name of the course and the secret of its hidden numbers are kept in course.json next to OUT, so
that whatever is made there later is graded alike. Nothing in OUT is ever edited: change the sources and make it again.
"""

import argparse
import ast
import importlib.metadata
import json
import re
import secrets
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "sets"), str(ROOT), str(ROOT / "tests")]

import hunt  # noqa: E402
from planted import BUGS, locate  # noqa: E402
from problems import PROBLEMS, SETS, Problem, variant_seed  # noqa: E402
from project import emptied, empty, read_project, write  # noqa: E402
from work import HELPERS  # noqa: E402

STUDENT = (*HELPERS, "judge.py", "game.py", "handed_in.py", "project.py", "work.py")  # in every handout
GRADER = (*STUDENT, "grade.py", "sandbox.py", "hunt.py", "rewrite.py", "host.py")
OPEN_END = Problem("7.1", "open_end.py::train", 20)
OTHERS = ("LICENSE", "docs/metrics.md")
PRINTED = ("main", "lesson", "show_pairs", "print_table", "print_row")  # what they do is seen, and not returned
PACKAGES = ("torch", "numpy", "tqdm", "tiktoken", "pytest")


def read(name):
    return (HERE / name).read_text(encoding="utf-8")


def pinned(name):
    """The version that is installed here: what was tried is what students and the grader get."""
    return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"


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
    return re.sub(r"(?s)\s*\*Rubric.*?\*\n", "\n", text)  # an asterisk as in J* is no end


def common(project):
    """The files that handout and solution share, without the numbers of a variant."""
    files = {f"course/{name}": read(name) for name in STUDENT}
    files.update({name: (ROOT / name).read_text(encoding="utf-8") for name in OTHERS})
    files.update({f"sets/{path.name}": path.read_text(encoding="utf-8") for path in HERE.glob("sets/[0-9].md")})
    requirements = "".join(f"{pinned(name)}\n" for name in PACKAGES)
    return {**project, **files, "check.py": read("check.py"), "hack.py": read("sets/hack.py"),
            "README.md": read("sets/README.md").format(python="{}.{}".format(*sys.version_info)),
            "AGENTS.md": read("AGENTS.md"), "CLAUDE.md": read("AGENTS.md"), "requirements.txt": requirements}


def handout(project, shared, solved):
    left = [problem for problem in PROBLEMS if problem.set > solved]
    texts = {path: without_rubrics(text) if path.startswith("sets/") else text for path, text in shared.items()}
    return {**texts, **emptied(project, left), "open_end.py": empty(read("sets/answer7.py"), [OPEN_END])}


def functions(tree, file):
    """(place, first line, last line) of each function of a module and of its classes."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        name = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for part in [part for part in inner if isinstance(part, ast.FunctionDef) and part.name not in PRINTED]:
            yield f"{file}::{name}{part.name}", part.lineno, part.end_lineno


def all_bugs(files):
    """
    [{name, place, path, start, end, wrong, killer}, ...]: the bugs of tests/planted.py in functions of the lessons that
    no earlier set asks for, so that no visible case gives them away. text[start:end] of `path` becomes `wrong`.
    """
    asked, found = {problem.place for problem in PROBLEMS}, []
    lessons = {path: list(functions(ast.parse(text), path)) for path, text in files.items() if "/" not in path}
    for bug in BUGS:
        file = bug.place.split("::")[0]
        if file not in lessons:
            continue
        start, end = locate(bug, files[file])
        line = files[file].count("\n", 0, start) + 1
        places = [place for place, first, last in lessons[file] if first <= line <= last]
        if places and places[0] not in asked:
            found.append(dict(name=f"{bug.right} -> {bug.wrong}", place=places[0], path=file, start=start, end=end,
                              wrong=bug.wrong, killer=bug.killer))
    return found


def hunted(project, shared, bugs, seed):
    """The working copy of set 6, with the bugs of a variant."""
    kept = {name: shared[name] for name in ("AGENTS.md", "CLAUDE.md", "docs/metrics.md", "requirements.txt")}
    places = "\n".join(sorted({bug["place"] for bug in bugs}))
    copy = hunt.planted(project, hunt.choose(bugs, seed)[:hunt.BUGS])
    return {**copy, **kept, "hunted.txt": places, "README.md": without_rubrics(read("sets/6.md"))}


def key_of(bugs, seed):
    """For the instructor: the bugs of a hunt, and the tests of the project that show them."""
    lines = [f"- {bug['place']}: `{bug['name']}`. Shown by {bug['killer']}\n" for bug in hunt.choose(bugs, seed)]
    return f"The first {hunt.BUGS} of these bugs are in the copy.\n\n{''.join(lines)}"


# ---- what the instructor gets ---------------------------------------------------------------------

def make_zip(path, files):
    """A zip that is the same, byte for byte, whenever it is made. Scripts are executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in sorted(files.items()):
            entry = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED)


def grader(number, project, settings, bugs):
    """{path: text} of gradescope-N.zip."""
    torch, *others = map(pinned, PACKAGES)
    files = {name: read(name) for name in GRADER}
    files.update({f"project/{path}": text for path, text in project.items()})
    files["settings.json"] = json.dumps(dict(settings, set=number))
    files["setup.sh"] = read("gradescope/setup.sh").format(torch=torch, others=" ".join(others))
    files["run_autograder"] = read("gradescope/run_autograder")
    return {**files, "bugs.json": json.dumps(bugs)} if number == 6 else files


def notebook(text):
    """tour.ipynb, nbformat 4.5, from Markdown: its Python blocks are cells of code, all else is text."""
    cells = []
    for number, part in enumerate(re.split(r"```(?:python)?\n", text)):  # text and code in turns
        if part.strip():
            cell = dict(id=f"cell-{number}", metadata={}, source=part.strip().splitlines(keepends=True))
            code = dict(cell_type="code", execution_count=None, outputs=[])
            cells.append({**cell, **(code if number % 2 else dict(cell_type="markdown"))})
    kernel = dict(display_name="Python 3", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def kept(path, course):
    """The settings of a course, from course.json or new ones. Raises ValueError if they are of another course."""
    if not path.exists():
        return dict(course=course or "", secret=secrets.token_hex(16))
    settings = json.loads(path.read_text(encoding="utf-8"))
    if course is not None and settings["course"] != course:
        raise ValueError(f"{path} is of the course {settings['course']!r}: make this one in another folder")
    return settings


def addresses(path):
    """The addresses of a roster: the field with an @ in each line, whatever its line ends."""
    lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    found = [next((word for word in re.split(r"[\s,;<>\"]+", line) if "@" in word), "") for line in lines]
    if not any(found):
        raise ValueError(f"{path} has no address: write one in each line")
    return list(dict.fromkeys(address for address in found if address))


def make(out, settings, roster=(), solved=0):
    """Write everything into the new folder `out`."""
    course, project = settings["course"], whole_project()
    bugs, shared = all_bugs(project), common(project)
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
    path = out.parent / "course.json"
    try:
        settings = kept(path, args.course)
        if args.roster and not settings["course"]:
            raise ValueError("--roster goes with --course: the variants follow from both")
        roster = addresses(args.roster) if args.roster else []
    except (OSError, ValueError) as fault:
        parser.error(str(fault))
    path.write_text(json.dumps(settings, indent=1) + "\n")
    make(out, settings, roster, args.solved)
    print(f"{args.out} is made for {len(roster) or 'all'} students; {out.parent / 'course.json'} keeps the secret")


if __name__ == "__main__":
    sys.exit(main())
