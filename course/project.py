"""
The project's files as a dict {path: text}, and the same with functions emptied.

A place is "ppo.py::gae" or "reward.py::RewardModel.scale".
"""

import ast
from pathlib import Path

from problems import PROBLEMS

STAY = ("studies", "bench", "tests", "course", "build", "dist")  # they contain the answers
ANSWERS = ("micro.py", "pretrained.py")  # functions of the sets once more: all of RLHF on one page; `hidden`
TEXT = (".py", ".html", ".css", ".js", ".json", ".txt")  # what is read when a package runs


def read_project(root):
    """{path: text} of the modules at the root of the project, and of all text files of its packages."""
    packages = [folder for folder in sorted(root.iterdir())
                if (folder / "__init__.py").exists() and folder.name not in STAY]
    inner = [path for folder in packages for path in sorted(folder.rglob("*")) if path.suffix in TEXT]
    files = [path for path in [*sorted(root.glob("*.py")), *inner] if path.name not in ANSWERS]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8", errors="replace") for path in files}


def find(tree, place):
    """The node of a function in the tree of its file."""
    node = tree
    for name in place.partition("::")[2].split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node, = [child for child in node.body if isinstance(child, kinds) and child.name == name]
    return node


def body_of(node):
    """The statements of a function without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def empty(text, problems):
    """The text of a file in which the functions of these problems raise NotImplementedError. All else stays."""
    tree, lines = ast.parse(text), text.split("\n")
    found = [(find(tree, problem.place), problem) for problem in problems]
    for node, problem in sorted(found, key=lambda pair: -pair[0].lineno):  # from below: line numbers stay right
        first = body_of(node)[0]
        before, floor = first.lineno - 1, node.body[0].end_lineno if first is not node.body[0] else node.lineno
        while before > floor and lines[before - 1].strip().startswith("#"):  # a comment above the body may explain it
            before -= 1
        stub = f'{" " * first.col_offset}raise NotImplementedError("problem {problem.number}: {problem.key}")'
        lines[before:node.end_lineno] = [stub]
    return "\n".join(lines)


def emptied(files, problems=PROBLEMS):
    """The files in which the functions of these problems are empty."""
    names = {problem.file for problem in problems}
    return {**files, **{name: empty(files[name], [p for p in problems if p.file == name]) for name in names}}


def write(folder, files):
    """Write {path: text or bytes} into a folder."""
    for path, content in files.items():
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
