"""Progress bars, and a stop that loses nothing."""

import signal
import sys
import threading

from tqdm import tqdm

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
