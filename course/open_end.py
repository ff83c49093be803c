"""
Set 7: the grader's side. The rewards are in this process; the student's `train` is in another and asks for labels.
"""

import json
import math
import os
import select
import time
from pathlib import Path

import sandbox
from game import Game, OverBudget
from project import read_submission, write

GAMES, SECONDS, POINTS = 5, 60, 20
LOW, HIGH = 0.30, 0.75  # shares of the optimum: points begin, and are all there
FILE = "open_end.py"    # what is handed in
LINE = 2_000_000        # bytes of one message


def entries():
    """(number, name, points) of each line of the result."""
    return [("7.1", f"7.1 open end: mean share of the optimum in {GAMES} games", POINTS)]


def points(share):
    return round(POINTS * min(1.0, max(0.0, (share - LOW) / (HIGH - LOW))), 1)


def lines(descriptor, deadline):
    """The lines that come through a pipe until it is closed, a line is too long, or it is too late."""
    buffer = b""
    while time.monotonic() < deadline:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(descriptor, 65536) if ready else b""
        if not part:
            return
        buffer += part
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            yield line
        if len(buffer) > LINE:
            return


def answer(game, line):
    """(reply to the player, logits or None, error or "") for one message."""
    try:
        message = json.loads(line)
        if "logits" in message:
            return None, message["logits"], ""
        if "error" in message:
            return None, None, str(message["error"])
        labels = game.compare(*message["compare"])
        return dict(labels=labels, labels_left=game.labels_left), None, ""
    except OverBudget as fault:
        return dict(error=str(fault)), None, ""
    except Exception:
        return None, None, "the process sent something that is no message"


def play(game, files, seconds):
    """(logits, "") or (None, sentence): one game of the player in `files`."""
    ours, theirs = os.pipe(), os.pipe()  # to the player, from the player
    with sandbox.Folder() as folder:
        write(folder.path, files)
        folder.hand_over()
        command = [*sandbox.python(), os.path.join(folder.path, "play.py"), folder.path, str(ours[0]), str(theirs[1])]
        process = sandbox.start(command, folder.path, seconds, sandbox.subprocess.DEVNULL,
                                sandbox.subprocess.DEVNULL, [ours[0], theirs[1]])
        os.close(ours[0])
        os.close(theirs[1])
        found, error = None, "the process ended or took too long, and left no policy"
        try:
            os.write(ours[1], (json.dumps(game.public()) + "\n").encode())
            for line in lines(theirs[0], time.monotonic() + seconds):
                reply, found, fault = answer(game, line)
                if reply is None:
                    error = fault
                    break
                os.write(ours[1], (json.dumps(reply) + "\n").encode())
        except OSError:
            pass
        sandbox.end(process)
        os.close(ours[1])
        os.close(theirs[0])
    return found, error


def grade_open(here, files, submission, seed, results, deadline):
    texts = read_submission(submission, [], [FILE])
    if FILE not in texts:
        return results.set("7.1", 0, f"{FILE} was not handed in")
    helpers = {name: (Path(here) / name).read_text(encoding="utf-8")
               for name in ("child.py", "play.py", "game.py", "exact.py")}
    from grade import secret

    shares, said = [], []
    for number in range(GAMES):
        game = Game(f"{seed} {secret(Path(here))} hidden game {number}")
        seconds = max(1, min(SECONDS, int(deadline - time.monotonic())))
        logits, error = play(game, {**files, **helpers, FILE: texts[FILE]}, seconds)
        share = game.share(logits) if logits is not None else -math.inf
        shares.append(max(-1.0, share))
        told = f"{share:.4f}" if math.isfinite(share) else error or "no policy came back"
        said.append(f"game {number + 1}: {told}")
        mean = sum(shares) / GAMES  # games that are not played yet count as 0
        deviation = math.sqrt(sum((s - sum(shares) / len(shares)) ** 2 for s in shares) / max(1, len(shares) - 1))
        summary = f"mean {mean:.4f}, standard error {deviation / math.sqrt(len(shares)):.4f}"
        results.set("7.1", points(mean), "\n".join([*said, summary]), round(max(0.0, mean), 4))
