"""Set 7: the rewards are in this process; the student's `train` is in another and asks for labels."""

import json
import math
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import handed_in
import sandbox
from game import LABELS, POINTS, Game, OverBudget, points, share
from project import write

HERE = Path(__file__).resolve().parent
GAMES, SECONDS = 5, 60
FILE = "open_end.py"     # handed in
LINE = 2_000_000         # bytes of one message
LINES = [("7.1", f"7.1 open end: mean share of the optimum in {GAMES} games", POINTS)]


def talk(game, process):
    """The logits that a player ends with, None if it ends with anything else."""
    def tell(message):
        process.stdin.write((json.dumps(message) + "\n").encode())
        process.stdin.flush()  # it cannot block: at most LABELS are told, and a pipe holds more

    tell(game.public())
    for _ in range(2 * LABELS):  # one label at a time, and some requests that are refused
        message = json.loads(process.stdout.readline(LINE))
        if "compare" not in message:
            return message.get("logits")
        try:
            tell(dict(labels=game.compare(*message["compare"]), labels_left=game.labels_left))
        except OverBudget as fault:
            tell(dict(error=str(fault)))
    return None


def play(game, files):
    """The share of the optimum of the player in `files`; -inf if it leaves no policy."""
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as folder:
        write(folder, files)
        folder = os.path.realpath(folder)
        process = sandbox.start([os.path.join(folder, "game.py")], folder, SECONDS, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)
        timer = threading.Timer(SECONDS, sandbox.finish, [process])  # which ends the pipe, and so the talk
        timer.start()
        try:
            logits = talk(game, process)
        finally:
            timer.cancel()
            sandbox.finish(process)
    return share(game, logits)


def grade(files, submission, seed, results):
    try:
        content, remark = handed_in.read(submission, FILE)
    except handed_in.Refused as fault:
        return results.set("7.1", 0, str(fault))
    files = {**files, "game.py": (HERE / "game.py").read_bytes(), FILE: content}
    shares = []
    for number in range(GAMES):
        try:
            found = play(Game(f"{seed} hidden game {number}"), files)
        except Exception:  # no JSON, a closed pipe, a full disk: this game has no policy
            found = -math.inf
        shares.append(max(-1.0, found))
    mean = sum(shares) / GAMES
    told = ", ".join(f"{x:.3f}" if x > -1 else "no policy" for x in shares)
    results.set("7.1", points(mean), f"{remark}shares {told}; mean {mean:.3f}", round(max(0.0, mean), 3))
