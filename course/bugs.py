"""The planted bugs of tests/planted.py that can be hunted, as slices of text."""

import ast
import sys

from problems import PROBLEMS

PRINTED = ("main", "lesson", "show_pairs", "show_gradients", "print_row")  # what they do is seen, and not returned


def functions(tree, file):
    """(place, first line, last line) of each function of a module and of its classes."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        name = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for part in [part for part in inner if isinstance(part, ast.FunctionDef) and part.name not in PRINTED]:
            yield f"{file}::{name}{part.name}", part.lineno, part.end_lineno


def all_bugs(root, files):
    """
    [{name, place, path, start, end, wrong, killer}, ...]: the planted bugs in functions of the lessons that no earlier
    set asks for, so that no visible case gives them away. text[start:end] of the file at `path` becomes `wrong`.
    """
    sys.path.insert(0, str(root / "tests"))
    from planted import BUGS, locate

    asked, found = {problem.place for problem in PROBLEMS}, []
    for bug in BUGS:
        file = bug.place.split("::")[0]
        if file not in files or "/" in file:
            continue
        start, end = locate(bug, files[file])
        line = files[file].count("\n", 0, start) + 1
        places = [place for place, first, last in functions(ast.parse(files[file]), file) if first <= line <= last]
        if places and places[0] not in asked:
            found.append(dict(name=f"{bug.right} -> {bug.wrong}", place=places[0], path=file, start=start, end=end,
                              wrong=bug.wrong, killer=bug.killer))
    return found
