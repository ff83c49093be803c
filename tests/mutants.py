"""
Test the tests: plant the bugs of planted.py, one at a time, and see whether the test that names each one fails.

    python tests/mutants.py                 all of them, each in a copy of the repository; some 15 minutes
    python tests/mutants.py clip k3         only those whose name contains one of the words
    python tests/mutants.py --tested        all, without running the tests first: pytest and pytest -m slow have passed

Prints `killed` or `SURVIVED` and the seconds for each one. The exit status is 1 if one survives, or if a test that is
named fails without any bug. A teacher's exercise: plant one, hide the tests, and ask for the line.

Many tests read the tiny run of conftest.py. It is made once. For each bug, the stages that call its function run again,
and those that use their results; the files of the other stages are as they were.
"""

import ast
import contextlib
import faulthandler
import functools
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  what the tests import is imported once, here
import pytest
import tiktoken  # noqa: F401
import torch
from planted import MUTANTS, ZEROS, Mutant
from planted_pipeline import PIPELINE
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
USED_BY = dict(  # as in minirlhf.py, which cannot be imported here: the processes would find it, and not their own
    pretrain=("sft", "preferences", "reward", "ppo", "grpo", "dpo", "report"),
    sft=("preferences", "reward", "ppo", "grpo", "dpo", "report"),
    preferences=("reward", "ppo", "grpo", "dpo", "report"), reward=("ppo", "grpo", "report"),
    ppo=("report",), grpo=("report",), dpo=("report",), report=())
STAGES = list(USED_BY)
LIMIT = 600  # seconds for one process: the slowest takes a few dozen
GAP = r"(?:\s|#[^\n]*\n)"  # what may stand between two words: a blank, the end of a line, a comment


# ---- where a bug is planted ------------------------------------------------------------------------------------------

def source(mutant):
    """(file, function or "") of a bug. Its `file` is "ppo.py", or "ppo.py::gae" to look in one function or class."""
    file, _, function = mutant.file.partition("::")
    return file, function


@functools.cache
def spans(text, kinds=(ast.FunctionDef, ast.ClassDef)):
    """(name, first line, last line) of the functions and classes of a module, the outer before the inner."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append((node.name, first, node.end_lineno))
    return found


def pattern(expression):
    """
    A regular expression for an expression, however its lines are wrapped and whatever comments stand at their ends.

    Blanks count only where they part two words.
    """
    tokens = re.findall(r"\w+|[^\w\s]", expression)
    parts = [r"(?<!\w)" if tokens[0][0].isalnum() else ""]
    for token, following in zip(tokens, [*tokens[1:], ""]):
        words = re.match(r"\w", token) and re.match(r"\w", following)
        parts += [re.escape(token), GAP + ("+" if words else "*")]
    parts[-1] = r"(?!\w)" if re.match(r"\w", tokens[-1]) else ""
    return "".join(parts)


def places(mutant, text):
    """[(start, end), ...]: where the expression of a bug stands in its file's text, and in the function it names."""
    _, function = source(mutant)
    found = [match.span() for match in re.finditer(pattern(mutant.right), text)]
    if function:
        lines = [(first, last) for name, first, last in spans(text) if name == function]
        found = [(start, end) for start, end in found
                 if any(first <= line_of(text, start) <= last for first, last in lines)]
    return found


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def planted(mutant, text):
    """(the text of the file with the bug, the line of the bug). Raises RuntimeError unless it has one place."""
    found = places(mutant, text)
    if len(found) != 1:
        raise RuntimeError(f"mutant '{mutant.name}': its text stands {len(found)} times in {mutant.file}, not once")
    start, end = found[0]
    return text[:start] + mutant.wrong.strip() + text[end:], line_of(text, start)


def zeroed(file, function, returns, killer):
    """The mutant of a function whose body is replaced by `return` of something like zeros."""
    text = (ROOT / file).read_text(encoding="utf-8")
    signature = text[text.index(f"\ndef {function}("):]
    signature = signature[:signature.index(":\n") + 1]
    return Mutant(f"{function} returns zeros", "-", file, signature, f"{signature}\n    return {returns}\n", killer)


def all_mutants():
    return MUTANTS + PIPELINE + [zeroed(*zero) for zero in ZEROS]


# ---- the tiny run ----------------------------------------------------------------------------------------------------

def make_tiny(base):
    """
    Make the tiny run in base/tiny. Returns {(file, line): stages}: the stages that call a function. Those before the
    first stage, and the modules themselves, decide about all stages: "all".
    """
    called, stage = {}, "all"

    def call(frame, event, arg):
        nonlocal stage
        code = frame.f_code
        if code.co_filename.startswith(str(base)):
            if code.co_name == "begin_metrics":
                stage = frame.f_locals["stage"]
            called.setdefault((Path(code.co_filename).name, code.co_firstlineno), set()).add(stage)

    os.chdir(base)
    sys.path[:0] = [str(base), str(base / "tests")]
    sys.dont_write_bytecode = False
    (base / "tiny").mkdir()
    sys.settrace(call)
    import conftest
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        conftest.make_tiny(base / "tiny")
    sys.settrace(None)
    return called


def stages_to_run(called, mutant, text, line):
    """The stages of the tiny run that a bug in this line may change: those that call its code, and those after them."""
    file, _ = source(mutant)
    if file.startswith(("studies/", "bench/")):
        return ""  # no stage calls the studies or the benchmark
    if file.endswith(".html"):
        return "report"
    module = Path(file).name
    start, end = next(((a, b) for _, a, b in spans(text, ast.FunctionDef) if a <= line <= b), (0, len(text)))
    callers = set().union(*(stages for (name, at), stages in called.items() if name == module and start <= at <= end))
    if "all" in callers:
        return ",".join(STAGES)
    for stage in STAGES:
        if stage in callers:
            callers.update(USED_BY[stage])
    return ",".join(stage for stage in STAGES if stage in callers)


# ---- planting --------------------------------------------------------------------------------------------------------

def copy_of_the_repository():
    folder = Path(tempfile.mkdtemp(prefix="mutant-")).resolve()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy2(path, folder)
    for name in ("pipeline", "tests", "studies", "bench", "course", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return folder


def run_tests(folder, tests, *more, stages=""):
    """Whether these tests pass in a copy of the repository. Raises RuntimeError when they neither pass nor fail."""
    os.chdir(folder)
    os.environ.update(TINY_RUN=str(folder / "tiny"), TINY_STAGES=stages, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    options = ["-o", "addopts=", "--import-mode=importlib", "-x", "-q", "--tb=no", *more]
    for plugin in ("cacheprovider", "unraisableexception", "threadexception"):
        options += ["-p", f"no:{plugin}"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main([*options, *sorted(tests)])
    if status not in (0, 1):  # no such test, or the bug is no Python
        raise RuntimeError(f"{tests} ended with {status}:\n{output.getvalue()[-3000:]}")
    return status == 0


def compile_tests(work):
    """Collect tests in the base, which compiles their files: the copies of the base find them compiled."""
    base, tests = work
    sys.dont_write_bytecode = False
    return run_tests(base, tests, "--collect-only")


def all_pass(work):
    base, tests = work
    return run_tests(base, tests)


def plant(work):
    """Plant a bug in a copy of the repository. Returns (mutant, whether its test failed, seconds)."""
    base, called, mutant = work
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="mutant-")).resolve()
    try:
        shutil.copytree(base, folder, copy_function=os.link, dirs_exist_ok=True)
        path = folder / source(mutant)[0]
        text = path.read_text(encoding="utf-8")
        wrong, line = planted(mutant, text)
        path.unlink()  # the link: the file itself is shared by all copies
        path.write_text(wrong, encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        killed = not run_tests(folder, [mutant.killer], stages=stages_to_run(called, mutant, text, line))
        return mutant, killed, time.perf_counter() - started
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder)


# ---- processes -------------------------------------------------------------------------------------------------------

def answer(sender, function, task, limit):
    """In a process of its own: send function(task). One that hangs shows where, and ends."""
    faulthandler.dump_traceback_later(limit, exit=True)
    sender.send(function(task))
    faulthandler.cancel_dump_traceback_later()


def forked(function, tasks, limit=LIMIT):
    """
    function(task) of each task, in the order in which they end. Each has a process of its own, forked from this one:
    what is imported here need not be imported again. Raises RuntimeError if one dies, or hangs for `limit` seconds.

    A multiprocessing.Pool forks from a second thread. A process that is forked while the first one prints finds the
    lock of the output taken, and waits for ever. Here one thread does both.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(tasks)), {}
    try:
        while waiting or running:
            while waiting and len(running) < os.cpu_count():
                task = waiting.pop()
                receiver, sender = fork.Pipe(duplex=False)
                process = fork.Process(target=answer, args=(sender, function, task, limit))
                process.start()
                sender.close()
                running[receiver] = process, task
            for receiver in multiprocessing.connection.wait(list(running)):
                process, task = running.pop(receiver)
                try:
                    result = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"the process of {task} died, or hung for {limit} s") from None
                process.join()
                yield result
    finally:
        for process, _ in running.values():
            process.kill()


def main(words):
    tested = "--tested" in words
    words = [word for word in words if word != "--tested"]
    mutants = [mutant for mutant in all_mutants() if not words or any(word in mutant.name for word in words)]
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one of a process imports half of torch
    tqdm.monitor_interval = 0  # a thread
    base = copy_of_the_repository()
    gc.freeze()  # what is there now is never looked through for garbage
    try:
        called, = forked(make_tiny, [base])
        files = sorted({mutant.killer.split("::")[0] for mutant in mutants})
        killers = [{mutant.killer for mutant in mutants if mutant.killer.startswith(file)} for file in files]
        list(forked(compile_tests, [(base, tests) for tests in killers]))
        if not tested and not all(forked(all_pass, [(base, tests) for tests in killers])):
            sys.exit("the tests fail without any bug: mend them first")
        survived = 0
        plants = forked(plant, [(base, called, mutant) for mutant in mutants])
        for mutant, killed, seconds in tqdm(plants, total=len(mutants), dynamic_ncols=True):
            survived += not killed
            word = "killed  " if killed else "SURVIVED"
            tqdm.write(f"{word} {seconds:5.1f} s  {source(mutant)[0]:<14} {mutant.pitfall:<4} "
                       f"{mutant.name:<50} {mutant.killer}")
    finally:
        shutil.rmtree(base)
    print(f"{len(mutants) - survived} of {len(mutants)} planted bugs killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
