"""
The same program, written in another way: what a test may not notice. Comments go, locals have other names, and sums and
products have their parts in the other order (which changes no bit of a float). `padded` adds code that does nothing.
"""

import ast
import builtins
import symtable


def without_comments(text):
    return ast.unparse(ast.parse(text))


def locals_of(function):
    """The names that a function assigns and that can be renamed: no argument, no global, nothing that is imported."""
    nodes = list(ast.walk(function))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.arg):
            stored.discard(node.arg)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            stored -= set(node.names)
        elif isinstance(node, ast.alias):
            stored.discard((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            stored.discard(node.name)
    return stored - set(dir(builtins))


def names_of(text):
    """All names of the module itself. A function may use one, and a function in it have a local of that name."""
    return set(symtable.symtable(text, "", "exec").get_identifiers())


def with_other_names(text):
    tree, outer = ast.parse(text), names_of(text)
    owners = [part for part in ast.walk(tree) if isinstance(part, (ast.Module, ast.ClassDef))]
    for function in [node for part in owners for node in part.body if isinstance(node, ast.FunctionDef)]:
        names = locals_of(function) - outer
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in names:
                node.id = f"{node.id}_"
    return ast.unparse(tree)


def is_number(node):
    """Whether an expression can only be a number or a tensor, and no list and no text."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub)
    # no product: a list times a number is a list
    return isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.Div, ast.Pow))


class Reordered(ast.NodeTransformer):
    def visit_BinOp(self, node):
        self.generic_visit(node)
        sums = isinstance(node.op, ast.Add) and (is_number(node.left) or is_number(node.right))
        if sums or isinstance(node.op, ast.Mult):
            node.left, node.right = node.right, node.left
        return node


def in_other_order(text):
    return with_other_names(ast.unparse(Reordered().visit(ast.parse(text))))


def padded(text, rng):
    """Text in which some functions begin with a lambda that nobody calls: words and operators cannot be counted."""
    tree, outer = ast.parse(text), names_of(text)
    kinds = (ast.BinOp, ast.Call, ast.Compare, ast.Subscript, ast.Attribute)
    nodes = list(ast.walk(tree))
    expressions = [node for node in nodes
                   if isinstance(node, kinds) and not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))]
    for function in [node for node in nodes if isinstance(node, ast.FunctionDef)]:
        names, docstring = sorted(locals_of(function) - outer), ast.get_docstring(function) is not None
        for name in rng.sample(names, rng.randint(0, min(2, len(names)))):
            unused = ast.parse(f"{name} = lambda: {ast.unparse(rng.choice(expressions))}")
            function.body[docstring:docstring] = unused.body
    return ast.unparse(tree)


REWRITES = (without_comments, with_other_names, in_other_order)


def rewritten(files, rewrite):
    """The files with every lesson rewritten: no bug is planted in a package."""
    return {path: rewrite(text) if path.endswith(".py") and "/" not in path else text for path, text in files.items()}
