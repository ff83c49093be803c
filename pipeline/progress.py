"""
A training loop within a run: a progress bar, a stop that loses nothing, and files that are written whole or not at all.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from pipeline.errors import UserError

SAVES = 20.0  # seconds between two checkpoints, or fifty times the time that one takes, if that is longer
SHOWN = ("score", "gold", "kl", "loss", "accuracy")  # the first three of these that a loop logs, at its bar
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]  # Ctrl-C, kill, a closed terminal, and the warnings of a cluster


class Stopper:
    """
    Within `with stopper:` a first signal lets a training loop finish its step. A second one stops at once, and so does
    one between loops: KeyboardInterrupt.
    """
    in_loop = asked = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only the main thread can catch signals
            self.before = {number: signal.signal(number, self.stop) for number in SIGNALS}
        return self

    def __exit__(self, *fault):
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)
        self.in_loop = self.asked = False

    def stop(self, number, frame):
        if self.asked or not self.in_loop:
            raise KeyboardInterrupt
        self.asked = True


stopper = Stopper()


def bar(steps, name, unit, start=0, leave=True):
    """A tqdm bar on stderr. In a log file it is a line now and then."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(initial=start, total=steps, desc=name, unit=unit, leave=leave, ncols=79, file=sys.stderr,
                mininterval=0.1 if terminal else 10, disable=sys.stderr is None)


def follow(loop, steps, name, start=0, save=lambda parts, step: None):
    """
    Yield what a training loop yields, with a progress bar. Now and then, and when a signal came, save(parts, step).

    After the last step nothing is saved: the stage writes its results then.
    """
    saved, cost = time.perf_counter(), 0.0
    stopper.in_loop = True
    try:
        with bar(steps, name, "step", start) as progress:
            for metrics, parts, *rollout in loop:
                yield metrics, *rollout
                shown = [f"{key} {metrics[key]:.2f}" for key in SHOWN if key in metrics][:3]
                progress.set_postfix_str(", ".join(shown), refresh=False)
                progress.update()
                now, done = time.perf_counter(), metrics["step"] + 1
                if done < steps and (stopper.asked or now - saved >= max(SAVES, 50 * cost)):
                    save(parts, done)
                    saved = time.perf_counter()
                    cost = saved - now
                if done < steps and stopper.asked:
                    raise KeyboardInterrupt
    finally:
        stopper.in_loop = False


def write_file(path, content):
    """
    Write a text, or anything else with torch.save. The old file stays whole until the new one is on the disk.

    Raises UserError when it cannot be written: a full disk, a folder that is gone or may not be written to.
    """
    if isinstance(content, str):
        data = content.encode()
    else:
        buffer = io.BytesIO()  # torch raises no special exception for a full disk
        torch.save(content, buffer)
        data = buffer.getbuffer()
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as fault:
        raise UserError(f"{path} cannot be written ({fault.strerror}): the old content is kept") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # there is none after the replace
