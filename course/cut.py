"""
Functions as text: where they stand, how they are emptied, and how one of them is put in the place of another.

A place is "ppo.py::gae" or "reward.py::RewardModel.scale". Only `ast` looks at the text; nothing is run.
"""

import ast


class Missing(Exception):
    """A function is not where it should be. The message says what and where."""


def split(place):
    """("ppo.py", ["gae"]) of "ppo.py::gae"."""
    file, _, names = place.partition("::")
    return file, names.split(".")


def parse(text, file):
    try:
        return ast.parse(text)
    except SyntaxError as fault:
        raise Missing(f"{file}, line {fault.lineno}: {fault.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise Missing(f"{file} is no Python") from None


def find(tree, place):
    """The node of a function, and the nodes around it from the module on."""
    file, names = split(place)
    around, node = [], tree
    for name in names:
        around.append(node)
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [child for child in getattr(node, "body", []) if isinstance(child, kinds) and child.name == name]
        if not found:
            raise Missing(f"{file} has no {'.'.join(names)}")
        node = found[-1]  # the one that Python would use
    if not isinstance(node, ast.FunctionDef):
        raise Missing(f"{file}: {'.'.join(names)} is no function")
    return node, around


def lines_of(node):
    """(first, last) line of a definition, decorators included, counted from 1."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno


def body_of(node):
    """The statements of a function without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def empty(text, *labels):
    """The text of a file whose functions raise NotImplementedError(label), for (place, label) each. The rest stays."""
    tree = ast.parse(text)
    lines = text.split("\n")
    nodes = [(find(tree, place)[0], place, label) for place, label in labels]
    for node, place, label in sorted(nodes, key=lambda row: -row[0].lineno):  # from below, so that line numbers hold
        lines = without_body(lines, node, place, label)
    return "\n".join(lines)


def without_body(lines, node, place, label):
    first = body_of(node)[0]
    before = first.lineno - 1
    floor = node.body[0].end_lineno if first is not node.body[0] else lines_of(node)[0]
    while before > floor and lines[before - 1].strip().startswith("#"):  # a comment above the body may explain it
        before -= 1
    stub = f'{" " * first.col_offset}raise NotImplementedError("{label}")'
    if node.body[0].lineno == node.lineno:  # def f(x): return x
        raise Missing(f"{place} stands on one line and cannot be emptied")
    return [*lines[:before], stub, *lines[node.end_lineno:]]


def source(text, place):
    """The lines of a function."""
    node, _ = find(parse(text, split(place)[0]), place)
    first, last = lines_of(node)
    return text.split("\n")[first - 1:last], node.col_offset


def bound_by(alias):
    """The name that a part of an import binds."""
    return alias.asname or alias.name.split(".")[0]


def names_of(node):
    """The names that a statement at the top of a module or class binds, also inside of `if`, `try` and `with`."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {bound_by(alias) for alias in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.ExceptHandler)):
        return set().union(*map(names_of, ast.iter_child_nodes(node)))
    return set()


def extras(ours, theirs, text):
    """
    The lines of what a student's module or class defines and ours does not: helpers, imports, constants.

    Of an import, and of an assignment to several names, only the new names are taken.
    """
    known = set().union(*map(names_of, ours.body), {"__name__"})
    found = []
    for node in theirs.body:
        names = names_of(node)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue  # must stand at the top: `put` does that
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [alias for alias in node.names if bound_by(alias) not in known]
            found += [" " * node.col_offset + ast.unparse(node)] if node.names else []
        elif isinstance(node, ast.Assign) and names & known and names - known:
            for name in [part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)]:
                name.id = "_" if name.id in known else name.id
            found.append(" " * node.col_offset + ast.unparse(node))
        elif names and not names & known:
            first = lines_of(node)[0] if hasattr(node, "decorator_list") else node.lineno
            found += text.split("\n")[first - 1:node.end_lineno]
    return found


def futures(module):
    """The lines `from __future__ import ...` of a module."""
    return [ast.unparse(node) for node in module.body if isinstance(node, ast.ImportFrom)
            and node.module == "__future__"]


def put(text, place, student_text):
    """
    Our file with the student's function in it, and with the helpers, imports and constants that the student added.

    Nothing else of the student's file is taken. Raises Missing for a file that is no Python or lacks the function.
    """
    file = split(place)[0]
    theirs = parse(student_text, file)
    their_lines, their_column = source(student_text, place)
    ours = ast.parse(text)
    node, around = find(ours, place)
    if node.col_offset != their_column:
        raise Missing(f"{file}: {split(place)[1][-1]} is indented by {their_column}, not {node.col_offset}")
    lines = text.split("\n")
    first, last = lines_of(node)
    lines[first - 1:last] = their_lines
    _, their_around = find(theirs, place)
    for our_outer, their_outer in zip(reversed(around), reversed(their_around)):  # from the inside to the outside
        inner = around[around.index(our_outer) + 1] if our_outer is not around[-1] else node
        at = lines_of(inner)[0] - 1
        lines[at:at] = extras(our_outer, their_outer, student_text)
    at = ours.body[0].end_lineno if ast.get_docstring(ours) is not None else 0
    lines[at:at] = futures(theirs)
    return "\n".join(lines)
