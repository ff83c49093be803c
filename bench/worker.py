"""
Clocks, processes and turns: each side works in its own process, and the sides take one step each in turn.

A worker is a script in another interpreter. We talk to it in lines of JSON, as peers.py describes.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

# ---- clocks ---------------------------------------------------------------------------------------

def clock(device):
    """The time in seconds. A GPU works in the background, so its work is waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(device, times=1, dtype=torch.float32):
    """The FLOP/s of a large matrix product, the fastest of several: the limit of what the machine can do."""
    n = 8192 if device == "cuda" else 2048
    a = torch.ones(n, n, device=device, dtype=dtype)
    product = torch.ones_like(a)
    seconds = []
    for _ in range(times):
        started = clock(device)
        torch.mm(a, a, out=product)
        seconds.append(clock(device) - started)
    return 2 * n ** 3 / min(seconds)


# ---- processes ------------------------------------------------------------------------------------

class Worker(NamedTuple):
    process: subprocess.Popen
    log: Path       # what it writes to its standard error
    versions: dict  # {package: version}, None for a package that it lacks; empty when it did not start

    def last_line(self):
        """The last line that it wrote to its standard error: most often the reason why it ended."""
        lines = self.log.read_text().strip().splitlines()
        return lines[-1] if lines else "no error message"


@contextlib.contextmanager
def start_worker(python, script, setup):
    """
    Run a script of this folder in another interpreter, and end it when the `with` block ends. The script finds `setup`,
    a dict, in the file that is its argument, with the path of a temporary folder in it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(dict(setup, folder=str(folder)), folder / "setup.pt")
        command = [os.path.expanduser(python), Path(__file__).parent / script, folder / "setup.pt"]
        with open(folder / "stderr.txt", "w") as log:
            try:
                process = subprocess.Popen(command, text=True, bufsize=1, stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=log)
            except OSError as error:
                sys.exit(f"--peers {python}: {error.strerror}")
        try:
            first_line = process.stdout.readline()
            yield Worker(process, folder / "stderr.txt", json.loads(first_line or "{}"))
        finally:
            process.kill()
            process.wait()


def ask(worker, **order):
    """Send an order and return the answer, a dict. It has the key "error" when the worker could not do it."""
    try:
        print(json.dumps(order), file=worker.process.stdin, flush=True)
        return json.loads(worker.process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        return dict(error=f"its process ended: {worker.last_line()}")


# ---- turns ----------------------------------------------------------------------------------------

def take_turns(run, steps, device, peers, **order):
    """
    Time the steps of this side and of the peers in turn: one step here, then one step of each peer.

    run(steps=..., tick=...) does our steps and calls tick(), with what it counted, after each. peers: {name: worker};
    they get `order`, the task. The first step of each side is thrown away: it also builds what later steps reuse.

    Returns our steps and {name: steps} of the peers, each step a dict: seconds, limit (FLOP/s of a matrix product at
    that time), memory (peak bytes on a GPU, else None), and the counts. A peer that fails is left out, with a message.
    """
    ours = []
    theirs = {name: [ask(worker, **order, steps=1 + steps)] for name, worker in peers.items()}  # builds the task
    bar = tqdm(total=1 + steps, desc=order["task"], unit="step", dynamic_ncols=True, leave=False)

    def start():
        nonlocal started
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = clock(device)

    def tick(**counts):
        seconds = clock(device) - started
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
        limit = product_rate(device)  # after every step, because the pace of a shared machine changes
        ours.append(dict(counts, seconds=seconds, memory=memory, limit=limit))
        for name, answers in theirs.items():
            if "error" not in answers[-1]:
                answers.append(dict(ask(peers[name]), limit=limit))
        bar.update()
        start()

    started = None
    with bar:
        start()
        run(steps=1 + steps, tick=tick)
    timed = {}
    for name, answers in theirs.items():
        if "error" in answers[-1]:
            print(f"{name} is left out: {answers[-1]['error']}")
        else:
            timed[name] = answers[2:]  # without the answer to the order, and without the first step
    return ours[1:], timed
