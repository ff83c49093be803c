"""
The progress of a loop: a bar on a terminal, a line now and then in a log file, and in a run checkpoints of its state.

Every loop runs over a ProgressBar. So it looks like a plain loop, and can be stopped and continued all the same.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from tqdm import tqdm

from data import UserError

LINES = 10.0  # seconds between two lines in a log file
SAVES = 20.0  # seconds between two checkpoints, or fifty times the time that one takes, if that is longer

signals = SimpleNamespace(asked=None, in_loop=False)  # the signal that a loop has yet to obey; whether one is running


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. `number` is that of the signal."""

    def __init__(self, number):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stoppable():
    """Within it, a first SIGINT or SIGTERM ends a loop after its step; a second one, or one elsewhere, ends at once."""
    def stop(number, frame):
        if signals.asked or not signals.in_loop:
            raise Stopped(number)
        signals.asked = number

    if threading.current_thread() is not threading.main_thread():  # only the main thread can catch signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signals.asked, signals.in_loop = None, False


def stop_if_asked():
    """Raise Stopped if a signal came in a step of a loop."""
    if signals.asked:
        raise Stopped(signals.asked)


def write_file(path, content):
    """
    Write a text, an iterator of texts, or anything else with torch.save. The old file stays whole until the new one is
    on the disk.

    Raises UserError when it cannot be written: a full disk, a folder that is gone or may not be written to.
    """
    if isinstance(content, str):
        blocks = [content.encode()]
    elif isinstance(content, Iterator):
        blocks = (text.encode() for text in content)
    else:
        buffer = io.BytesIO()  # torch has no exception of its own for a full disk
        torch.save(content, buffer)
        blocks = [buffer.getbuffer()]
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as fault:
        raise UserError(f"{path} cannot be written ({fault.strerror}): what was there before is kept") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()  # there is none after the replace


class ProgressBar:
    """
    The steps of a loop: `for step in ProgressBar(steps, name, unit)` counts from 0.

    parts: {name: what the loop changes}, modules, optimizers and generators. With a path, their state is restored from
    that checkpoint, the steps that it has are left out, and it is written again now and then and when a signal came.
    place: what the checkpoint belongs to; one of another place is not used. leave=False: a bar that vanishes.
    """

    quiet = False  # True: show nothing

    def __init__(self, steps, name, unit, parts=None, path=None, place=None, leave=True):
        self.steps, self.name, self.unit, self.leave = steps, name, unit, leave
        self.parts, self.path, self.place = parts or {}, path, place
        self.numbers = {}
        self.saved = None  # the step of the last checkpoint
        self.step = self.start = self.restore() if path else 0

    def set_postfix(self, numbers=None, **more):
        """The numbers that stand beside the bar."""
        self.numbers = {**(numbers or {}), **more}

    def __iter__(self):
        self.began = self.printed = time.perf_counter()
        last_save, cost = self.began, 0.0
        signals.in_loop = signals.in_loop or self.path is not None  # a bar without a path may run within another
        try:
            with tqdm(initial=self.start, total=self.steps, desc=self.name, unit=self.unit, dynamic_ncols=True,
                      leave=self.leave, disable=self.quiet or not sys.stderr.isatty()) as bar:
                for step in range(self.start, self.steps):
                    self.step = step
                    yield step
                    bar.set_postfix(self.numbers, refresh=False)
                    bar.update()
                    if bar.disable and not self.quiet:
                        self.print_line()
                    if self.path is None or step + 1 == self.steps:
                        continue  # after the last step the stage goes on, and is saved as a whole
                    now = time.perf_counter()
                    if signals.asked or now - last_save >= max(SAVES, 50 * cost):
                        self.save()
                        last_save = time.perf_counter()
                        cost = last_save - now
                    stop_if_asked()
        finally:
            if self.path is not None:
                signals.in_loop = False

    def print_line(self):
        """A line in a log file: after the first step, after the last one, and every ten seconds."""
        now, done = time.perf_counter(), self.step + 1
        if now - self.printed < LINES and not (self.leave and done in (self.start + 1, self.steps)):
            return
        self.printed = now
        pace = (now - self.began) / (done - self.start)
        numbers = "".join(f", {name} {number}" for name, number in self.numbers.items())
        print(f"{self.name}: {done}/{self.steps} {self.unit}, {pace:.3g} s/{self.unit}{numbers}",
              file=sys.stderr, flush=True)

    def save(self):
        """Write the state after this step, unless it is not finite: then the last good one stays."""
        states = {}
        for name, part in self.parts.items():
            states[name] = part.get_state() if hasattr(part, "get_state") else part.state_dict()
            if isinstance(part, torch.nn.Module) and not all_finite(states[name]):
                return
        self.saved = self.step + 1
        write_file(self.path, dict(place=self.place, step=self.saved, rng=torch.get_rng_state(), parts=states))

    def restore(self):
        """Put the parts into the state of the checkpoint. Returns its step, 0 if there is none for this place."""
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            if saved["place"] != self.place:
                return 0
            for name, part in self.parts.items():
                state = saved["parts"][name]
                part.set_state(state) if hasattr(part, "set_state") else part.load_state_dict(state)
            torch.set_rng_state(saved["rng"])
            self.saved = saved["step"]
        except Exception:  # torch.load has no exception of its own for a damaged file
            raise UserError(f"{self.path} is damaged: remove it, and --resume begins the stage again") from None
        return self.saved


def all_finite(weights):
    """Whether no weight of a state_dict is NaN or infinite."""
    return all(bool(weight.isfinite().all()) for weight in weights.values())
