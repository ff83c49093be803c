"""
The project's files as a dict {path: text}, and what is made of them: with functions emptied, with a student's function.

Copied are all modules at the root and all packages that they import. Studies, benchmarks and tests stay here: they
contain the answers.
"""

import ast
import os
import shutil
import stat
from pathlib import Path

import cut
from problems import PROBLEMS

STAY = ("studies", "bench", "tests", "course", "build", "dist")
TEXT = (".py", ".html", ".css", ".js", ".json", ".txt")  # what is read when a package runs
LIMIT = 300_000  # bytes of a file that is handed in


def read_project(root):
    """{path: text} of the modules at the root of the project, and of all text files of its packages."""
    files = {}
    packages = [folder for folder in sorted(root.iterdir())
                if (folder / "__init__.py").exists() and folder.name not in STAY]
    inner = [path for folder in packages for path in sorted(folder.rglob("*")) if path.suffix in TEXT]
    for path in [*sorted(root.glob("*.py")), *inner]:
        files[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    return files


def path_of(files, place):
    """Where a file of a place lies: "stages.py" may be in a package."""
    name = cut.split(place)[0]
    found = [path for path in files if path == name or path.endswith(f"/{name}")]
    if len(found) != 1:
        raise cut.Missing(f"the project has {len(found)} files named {name}")
    return found[0]


def emptied(files, problems=PROBLEMS):
    """The files in which the functions of these problems raise NotImplementedError."""
    labels = {}
    for problem in problems:
        label = problem.place, f"problem {problem.number}: {problem.key}"
        labels.setdefault(path_of(files, problem.place), []).append(label)
    return {**files, **{path: cut.empty(files[path], *labels[path]) for path in labels}}


def with_student(files, problem, texts, all_problems=None):
    """
    The files in which one problem is graded: the student's function, those of earlier problems as they should be, and
    those of later ones emptied, but for what it needs.

    texts: {path: text} of what was handed in. Raises Missing, with a sentence for the student.
    """
    path = path_of(files, problem.place)
    if path not in texts:
        raise cut.Missing(f"{path} was not handed in")
    all_problems = PROBLEMS if all_problems is None else all_problems
    later = all_problems[all_problems.index(problem) + 1:] if problem in all_problems else all_problems
    ours = emptied(files, [other for other in later if other.place not in problem.needs])
    ours[path] = cut.put(ours[path], problem.place, texts[path])
    return ours


def is_stub(problem, text):
    """Whether a function was left as it was handed out."""
    node, _ = cut.find(cut.parse(text, problem.place), problem.place)
    return any(isinstance(part, ast.Raise) and "NotImplementedError('problem" in ast.unparse(part)
               for part in cut.body_of(node)[:1])


def write(folder, files):
    for path, text in files.items():
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def read_submission(folder, paths, others=()):
    """
    {path: text} of the files that were handed in, in their folders or flat, and of the `others` that are there.

    Links and other files that are no plain text of a sensible size are passed over: the grader reads them as root.
    """
    folder = Path(os.path.realpath(folder))
    found = {}
    places = [folder, *(inner for inner in sorted(folder.iterdir()) if inner.is_dir())]  # a zip of a folder
    for path in [*paths, *others]:
        for candidate in [place / name for place in places for name in (path, Path(path).name)]:
            try:
                real = os.path.realpath(candidate) == str(candidate)
                kind = os.lstat(candidate)
                if real and stat.S_ISREG(kind.st_mode) and kind.st_size <= LIMIT:
                    found[path] = candidate.read_text(encoding="utf-8").replace("\r\n", "\n")
                    break
            except (OSError, ValueError):
                continue
    return found


def copy_clean(source, target):
    """Copy a folder without compiled files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"), dirs_exist_ok=True)
