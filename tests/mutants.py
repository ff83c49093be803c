"""
Test the tests: plant the bugs of planted.py, one at a time, and see whether the test that each one names fails.

    python tests/mutants.py                all of them, in about two minutes on two cores
    python tests/mutants.py ppo.py P20     only those with one of these words in their row

Run the tests first: one that fails without a bug kills every bug. Prints `killed` or `SURVIVED` and the seconds for
each one. The exit status is 1 if one survives.

Each bug has a copy of the repository, whose other files are links, and a process. It is forked from this one, which has
imported all that takes long to import. A test that reads the tiny run of conftest.py makes it again.
"""

import compileall
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  imported here once, for all processes; nothing of ours is: each has its own copy
import pytest
import tiktoken  # noqa: F401
import torch
from planted import BUGS, plant

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds of a process; the slowest takes about twenty
OPTIONS = ["-o", "addopts=", "-x", "-q", "--assert=plain", "--import-mode=importlib", "-p", "no:cacheprovider"]
WORDS = {0: "SURVIVED", 1: "killed", -14: "HANGS"}  # -14: SIGALRM; else BROKEN: they could not run


def start(base, bug, limit):
    """Run the killer of a bug in a new process: (its id, its folder). Its exit status is pytest's."""
    folder = Path(tempfile.mkdtemp(dir=base.parent), "copy")
    shutil.copytree(base, folder, copy_function=os.link)
    path = folder / bug.place.split("::")[0]
    wrong = plant(bug, path.read_text(encoding="utf-8"))
    path.unlink()  # the link: the file itself is shared by all copies
    path.write_text(wrong, encoding="utf-8")
    pid = os.fork()
    if pid:
        return pid, folder
    status = 3
    try:
        signal.alarm(limit)  # ends the process after so many seconds
        os.chdir(folder)
        output = os.open("output.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = int(pytest.main([*OPTIONS, f"--basetemp={folder / 'tmp'}", bug.killer]))
    finally:
        os._exit(status)


def try_bugs(base, bugs, limit=LIMIT):
    """
    Plant the bugs in copies of `base`, on all cores, and print a row for each. Returns whether all of them are killed.

    Here is one thread. A process that is forked while another thread holds a lock would wait for it for ever.
    """
    waiting, running, killed = list(reversed(bugs)), {}, 0
    while waiting or running:
        while waiting and len(running) < os.cpu_count():
            bug = waiting.pop()
            pid, folder = start(base, bug, limit)
            running[pid] = bug, folder, time.perf_counter()
        pid, status = os.wait()
        bug, folder, started = running.pop(pid)
        word = WORDS.get(os.waitstatus_to_exitcode(status), "BROKEN")
        killed += word == "killed"
        shown = f"{bug.right!r} -> {bug.wrong!r}"
        seconds = time.perf_counter() - started
        print(f"{word:<9}{seconds:5.1f} s  {bug.pitfall:<4}{bug.place:<34}{shown[:70]}", flush=True)
        if word in ("BROKEN", "HANGS"):
            print(bug.killer, (folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-1500:], sep="\n")
        shutil.rmtree(folder.parent)
    print(f"{killed} of {len(bugs)} planted bugs killed")
    return killed == len(bugs)


def main(words):
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one of a process imports half of torch
    gc.freeze()  # what is here now is never searched for garbage: pytest does so at its end
    bugs = [bug for bug in BUGS if not words or any(word in " ".join(bug) for word in words)]
    if not bugs:
        sys.exit(f"no planted bug has {' or '.join(words)} in its row")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = Path(folder, "base").resolve()
        shutil.copytree(ROOT, base, ignore=shutil.ignore_patterns(".*", "runs", "*.png"))
        compileall.compile_dir(base, quiet=1)
        return 0 if try_bugs(base, bugs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
