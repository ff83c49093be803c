"""
What is solved, and what came where something else was expected.

    python check.py                  all sets, 1 to 5
    python check.py 4                one set
    python check.py gae 4.6          some problems
    python check.py 7                three games of the open end; --least 0.6 asks for this mean share
    python check.py --curve RUN      a run of minirlhf.py beside three seeds of the default run

One line a problem; the exit status is 1 unless all of them are solved. The grader calls the
same functions with other numbers, one process for each.
"""

import argparse
import csv
import json
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
COURSE = HERE / "course" if (HERE / "course" / "problems.py").exists() else HERE
sys.path[:0] = [str(COURSE), str(HERE)]

from judge import verdict  # noqa: E402
from problems import PROBLEMS, SETS  # noqa: E402

SHOWN = ("score", "gold", "kl", "length")


def check(problem):
    """(points, sentence) of one problem by its visible cases."""
    from child import outputs

    case = json.loads((HERE / "cases" / f"{problem.key}.json").read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs(f"set{problem.set}", problem.key, case["cases"], str(HERE))
    message, share = verdict(problem, case, got, SETS[problem.set].leaderboard)
    return (0, message) if message else (problem.points, "solved" + (f", share {share:.3f}" if share else ""))


def check_problems(problems):
    total = 0
    for number in sorted({problem.set for problem in problems}):
        print(f"\nSet {number}, {SETS[number].title}\n")
        for problem in [problem for problem in problems if problem.set == number]:
            points, sentence = check(problem)
            total += points
            print(f"  {problem.number}  {problem.key:<18} {points:>2} of {problem.points:<2}  {sentence}", flush=True)
    most = sum(problem.points for problem in problems)
    written = sum(SETS[number].written for number in {problem.set for problem in problems})
    print(f"\nThe total that will count: {total} of {most} points, if the same holds for the other numbers that the "
          "grader draws.\n"
          f"The written questions are graded by hand and come on top: up to {written} points.")
    return 0 if total == most else 1


def check_games(least):
    """Play three games. The exit status: 1 unless the mean share of the optimum is at least this."""
    from game import Game, Seen
    from open_end import HIGH, points

    sys.modules.pop("open_end")  # the grader's; the student's file has the same name
    sys.path.insert(0, str(HERE))
    from open_end import train

    shares = []
    for number in range(3):
        game = Game(f"visible game {number}")
        try:
            shares.append(game.share(train(Seen(game))))
        except NotImplementedError as fault:
            sys.exit(f"  game {number + 1}: not solved yet ({fault})")
        print(f"  game {number + 1}: {shares[-1]:.4f} of the optimum, {game.labels_left} labels left", flush=True)
    mean = sum(shares) / len(shares)
    print(f"\nmean {mean:.4f}: {points(mean)} of 20 points if the grader's five other games go the same way")
    return 0 if mean >= (HIGH if least is None else least) else 1


def show_curve(run):
    """Print PPO's metrics of a run beside the smallest and the largest of the three reference seeds."""
    path = Path(run, "metrics.jsonl")
    if not path.exists():
        sys.exit(f"check.py: {path} is not there: name the folder of a run of minirlhf.py")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("stage") == "ppo" and "score" in row]
    if not rows:
        sys.exit(f"check.py: {run} has no PPO in it")
    with open(COURSE / "curves" / "ppo.csv", encoding="utf-8") as file:
        reference = list(csv.DictReader(file))
    print(f"PPO of {run}, and in brackets the smallest and largest of seeds 0, 1 and 2 of the default run\n")
    print("  step" + "".join(f"{name:>26}" for name in SHOWN))
    for row in [row for row in rows if row["step"] % 5 == 0 or row is rows[-1]]:
        cells = ""
        for name in SHOWN:
            others = [float(other[name]) for other in reference if int(other["step"]) == row["step"]]
            band = f"({min(others):.2f} to {max(others):.2f})" if others else ""
            mine = f"{row[name]:.2f}" if name in row else "-"
            cells += f"{mine:>9} {band:<16}"
        print(f"  {row['step']:4d} {cells}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="numbers of sets, numbers or names of problems")
    parser.add_argument("--curve", metavar="RUN", help="the folder of a run of minirlhf.py")
    parser.add_argument("--least", type=float, metavar="SHARE", help="of set 7: exit status 1 below this mean share")
    args = parser.parse_args(argv)
    if not (HERE / "cases").exists():
        sys.exit("check.py: there are no cases here: run the check.py of a handout, which course/make.py makes")
    if args.curve:
        return show_curve(args.curve)
    if args.what == ["7"]:
        return check_games(args.least)
    known = {word for p in PROBLEMS for word in (str(p.set), p.number, p.key)}
    for word in args.what:
        if word not in known:
            sys.exit(f"check.py: {word!r} is no problem and no set with visible cases: try 1 to 5, 4.4 or gae, or 7")
    return check_problems([p for p in PROBLEMS if not args.what or {str(p.set), p.number, p.key} & set(args.what)])


if __name__ == "__main__":
    sys.exit(main())
