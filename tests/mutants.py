"""
Test the tests: plant the bugs of planted.py, one at a time, and see whether the test that names each one fails.

    python tests/mutants.py                 each in a copy of the repository; some minutes
    python tests/mutants.py --pipeline      those of planted_pipeline.py too; a quarter of an hour more
    python tests/mutants.py clip k3         only those whose name contains one of the words

Prints `killed` or `SURVIVED` and the seconds for each one. The exit status is 1 if one survives, or if a test that is
named fails without any bug. A teacher's exercise: plant one, hide the tests, and ask for the line.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  the tests need it
import pytest
import tiktoken  # noqa: F401
import torch
from planted import MUTANTS, ZEROS, Mutant
from planted_pipeline import PIPELINE
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def zeroed(file, function, returns, killer):
    """The mutant of a function whose body is replaced by `return` of something like zeros."""
    text = (ROOT / file).read_text(encoding="utf-8")
    signature = text[text.index(f"\ndef {function}("):]
    signature = signature[:signature.index(":\n") + 2]
    return Mutant(f"{function} returns zeros", "-", file, signature, f"{signature}    return {returns}\n", killer)


def copy_of_the_repository():
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("tests", "studies", "bench", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return folder


def run_tests(folder, tests):
    """Whether these tests pass in a copy of the repository. Raises RuntimeError when they neither pass nor fail."""
    os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = pytest.main(["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", *sorted(tests)])
    if status not in (0, 1):  # no such test, or the bug is no Python
        raise RuntimeError(f"{tests} ended with {status}:\n{output.getvalue()[-3000:]}")
    return status == 0


def plant(mutant):
    """Plant a bug in a copy of the repository. Returns (mutant, whether its test failed, seconds)."""
    started = time.perf_counter()
    folder = copy_of_the_repository()
    try:
        text = (folder / mutant.file).read_text(encoding="utf-8")
        if text.count(mutant.right) != 1:
            raise RuntimeError(f"mutant '{mutant.name}': its text stands {text.count(mutant.right)} times in "
                               f"{mutant.file}, not once")
        (folder / mutant.file).write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        killed = not run_tests(folder, [mutant.killer])
        return mutant, killed, time.perf_counter() - started
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder)


def all_pass(tests):
    return run_tests(ROOT, tests)


def main(words):
    mutants = MUTANTS + [zeroed(*zero) for zero in ZEROS]
    if "--pipeline" in words:
        mutants += PIPELINE
        words = [word for word in words if word != "--pipeline"]
    if words:
        mutants = [mutant for mutant in mutants if any(word in mutant.name for word in words)]
    torch.set_num_threads(1)
    # every bug gets a process of its own, forked from this one: what is imported here need not be imported again
    fork = multiprocessing.get_context("fork")
    with fork.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        files = {mutant.killer.split("::")[0] for mutant in mutants}
        killers = [{mutant.killer for mutant in mutants if mutant.killer.startswith(file)} for file in sorted(files)]
        if not all(pool.map(all_pass, killers, 1)):
            sys.exit("the tests fail without any bug: mend them first")
    survived = 0
    with fork.Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for mutant, killed, seconds in tqdm(pool.imap(plant, mutants, 1), total=len(mutants), dynamic_ncols=True):
            survived += not killed
            word = "killed  " if killed else "SURVIVED"
            tqdm.write(f"{word} {seconds:5.1f} s  {mutant.file:<14} {mutant.pitfall:<4} "
                       f"{mutant.name:<50} {mutant.killer}")
    print(f"{len(mutants) - survived} of {len(mutants)} planted bugs killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
