"""
Set 7: the grader's side. The rewards are in this process; the student's `train` is in another and asks for labels.
"""

import json
import math
import os
import subprocess
import tempfile
import threading
import time
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
    """
    The logits that a player ends with, None if it ends with anything else or is ended.

    No answer can block: at most LABELS are given, with a few dozen bytes each, and a pipe holds more.
    """
    def tell(message):
        process.stdin.write((json.dumps(message) + "\n").encode())
        process.stdin.flush()

    tell(game.public())
    for _ in range(LABELS + 1):
        message = json.loads(process.stdout.readline(LINE))
        if "compare" not in message:
            return message.get("logits")
        try:
            tell(dict(labels=game.compare(*message["compare"]), labels_left=game.labels_left))
        except OverBudget as fault:
            tell(dict(error=str(fault)))
    return None


def play(game, files, seconds):
    """The share of the optimum of the player in `files`; -inf if it leaves no policy."""
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as folder:
        write(folder, files)
        folder = os.path.realpath(folder)
        process = sandbox.start([os.path.join(folder, "play.py"), folder], folder, seconds, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE)
        timer = threading.Timer(seconds, sandbox.finish, [process])  # which ends the pipe, and so the talk
        timer.start()
        try:
            logits = talk(game, process)
        finally:
            timer.cancel()
            sandbox.finish(process)
    return share(game, logits)


def grade(files, submission, seed, results, deadline):
    try:
        content, remark = handed_in.read(submission, FILE)
    except handed_in.Refused as fault:
        return results.set("7.1", 0, str(fault))
    helpers = {name: (HERE / name).read_bytes() for name in ("play.py", "game.py", "judge.py", "values.py")}
    shares = []
    for number in range(GAMES):
        seconds = int(min(SECONDS, deadline - time.monotonic()))
        try:
            found = play(Game(f"{seed} hidden game {number}"), {**files, **helpers, FILE: content}, max(1, seconds))
        except Exception:  # no JSON, a closed pipe, a full disk: this game has no policy
            found = -math.inf
        shares.append(max(-1.0, found))
        mean = min(1.0, sum(shares) / GAMES)  # games that are not played yet count as 0
        deviation = math.sqrt(sum((s - sum(shares) / len(shares)) ** 2 for s in shares) / max(1, len(shares) - 1))
        told = ", ".join(f"{s:.3f}" if s > -1 else "no policy" for s in shares)
        results.set("7.1", points(mean), f"{remark}shares {told}; mean {mean:.3f}, standard error "
                                         f"{deviation / math.sqrt(len(shares)):.3f}", round(max(0.0, mean), 3))
