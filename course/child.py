"""
Call one function on the inputs of its cases, in a separate process: python child.py FOLDER

The request comes on the standard input: {"set": 4, "key": "gae", "ours": places, "cases": [inputs, ...]}. The answers
go to the standard output, one a case. This process never sees what is expected.

FOLDER/handed_in has the student's files. They run statement by statement. One that fails (an experiment at the end, an
import of a plotting library) is left out. Our functions take the places of those that earlier problems ask for.
"""

import ast
import json
import os
import sys
import traceback
import warnings
from importlib import abc, import_module, machinery, util
from pathlib import Path


class Student(abc.Loader):
    """Imports the modules in FOLDER/handed_in, with ours in the places of other problems."""

    def __init__(self, folder, ours):
        self.folder, self.ours, self.left_out = folder, ours, []

    def find_spec(self, name, path=None, target=None):
        file = Path(self.folder, "handed_in", f"{name}.py")
        return machinery.ModuleSpec(name, self, origin=str(file)) if file.exists() else None

    def exec_module(self, module):
        file = module.__spec__.origin
        module.__file__ = file
        sys.setrecursionlimit(20_000)  # an expression may have thousands of terms
        tree = ast.parse(Path(file).read_bytes(), file)  # bytes: Python looks for the byte order mark and the coding
        places = [place.split(".") for place in self.ours.get(module.__name__, ())]
        ours = true_module(self.folder, module.__name__) if places else None
        future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        for node in tree.body:
            try:
                exec(compile(ast.Module([*future, node], []), file, "exec"), module.__dict__)
            except BaseException as fault:  # SystemExit too
                self.left_out.append(f"line {node.lineno} was left out, {type(fault).__name__}: {fault}")
            for names in places:
                put(module, ours, names)
        sys.setrecursionlimit(1000)


def true_module(folder, name):
    """Our file of this name, next to the student's: functions of later problems are empty in it."""
    spec = util.spec_from_file_location(f"ours_{name}", os.path.join(folder, f"{name}.py"))
    sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules[spec.name]


def put(module, ours, names):
    """Our function in place of the student's. A method waits for its class."""
    *outer, name = names
    for part in outer:
        module, ours = getattr(module, part, None), getattr(ours, part)
    if module is not None:
        setattr(module, name, vars(ours)[name])


def say(fault, folder):
    """An exception as one sentence: the message, and the line of the student's code."""
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__)
              if frame.filename.startswith(os.path.join(folder, "handed_in"))]
    where = f", in {frames[-1].name}: {frames[-1].line}"[:160] if frames else ""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}{where}"


def failed(fault, student):
    if isinstance(fault, NotImplementedError) and str(fault).startswith("problem "):
        return {"stub": str(fault)[:60]}
    return {"error": type(fault).__name__, "detail": "; ".join([say(fault, student.folder), *student.left_out])[:600]}


def answer(run, inputs, student):
    """The encoded values of one case, and the names of the inputs that the call has changed."""
    from values import decode, encode

    decoded = decode(inputs)
    try:
        values = encode(run(decoded))
        changed = [name for name, x in inputs.items() if getattr(decoded[name], "requires_grad", False)
                   or json.dumps(encode(decoded[name])) != json.dumps(x)]
        return {"values": values, "changed": changed}
    except BaseException as fault:
        return failed(fault, student)


def answers(folder, request):
    """The answers to all cases of a request, one after another."""
    student = Student(folder, request["ours"])
    sys.path.insert(0, folder)
    sys.meta_path.insert(0, student)
    try:
        runs = import_module("draw").runner(import_module(f"set{request['set']}"), request["key"])
    except BaseException as fault:  # the student's file cannot be read, or has not what is asked
        return [failed(fault, student)] * len(request["cases"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [answer(runs, inputs, student) for inputs in request["cases"]]


def main():
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a student's print must not mix with the answers
    sys.dont_write_bytecode = True
    json.dump(answers(os.path.realpath(sys.argv[1]), json.load(sys.stdin)), out)
    out.flush()
    os._exit(0)  # whatever the student's code has left running


if __name__ == "__main__":
    main()
