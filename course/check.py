"""
Tells which problems are solved, and for the others which result was expected and which came.

    python check.py                  all sets, 1 to 5
    python check.py 4                one set
    python check.py gae 4.6          some problems
    python check.py gae --show       and the inputs of the first case that fails
    python check.py 7                three games of the open end

The exit status is 1 unless all of them are solved, and 2 for a problem that does not exist.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "course"), str(HERE)]

import handed_in  # noqa: E402
from judge import fault_of, verdict  # noqa: E402
from problems import PROBLEMS  # noqa: E402
from project import read_project  # noqa: E402
from work import HELPERS, ask  # noqa: E402


def run(folder, request, seconds):
    """The text that child.py writes."""
    command = [sys.executable, "-s", str(Path(folder, "child.py")), folder]
    try:
        return subprocess.run(command, input=request, text=True, timeout=seconds, stdout=subprocess.PIPE,
                              cwd=folder, encoding="utf-8").stdout
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def student_files():
    """({path: text} of the folder, remark): the files of the problems are those that the grader would find."""
    files = {**read_project(HERE), **{name: (HERE / "course" / name).read_text(encoding="utf-8") for name in HELPERS}}
    remark = ""
    for name in sorted({problem.file for problem in PROBLEMS}):
        content, note = handed_in.read(HERE, name)
        files[f"handed_in/{name}"] = content
        remark += note
    return files, remark


def check(problem, files, show):
    """(points, sentence) of one problem by its visible cases."""
    case = json.loads((HERE / "cases" / f"{problem.key}.json").read_text(encoding="utf-8"))
    try:
        answers = ask(files, problem, {}, case["cases"], run)
    except TimeoutError:
        return 0, f"stopped after {problem.seconds} seconds"
    if show and answers:
        for inputs, expected, answer in zip(case["cases"], case["expected"], answers):
            if "stub" not in answer and fault_of(expected, answer, problem.tolerance):
                print(f"\n  inputs    {json.dumps(inputs)}\n  expected  {json.dumps(expected)}\n")
                break
    return verdict(problem, case["cases"], case["expected"], answers, hidden=False)


def check_problems(problems, show):
    files, remark = student_files()
    total, most = 0, sum(problem.points for problem in problems)
    for problem in problems:
        points, sentence = check(problem, files, show)
        total += points
        print(f"  {problem.number:<5}{problem.key:<22} {points:>4g} of {problem.points:<2}  {sentence}", flush=True)
    print(f"\n{remark}The total that will count: {total:g} of {most} points, if the grader's other numbers agree.")
    return 0 if total == most else 1


def check_games():
    """Play three games."""
    from game import POINTS, Game, points, share
    from open_end import train

    shares = []
    for number in range(3):
        game = Game(f"visible game {number}")
        try:
            shares.append(share(game, train(game)))
        except NotImplementedError as fault:
            sys.exit(f"  game {number + 1}: not solved yet ({fault})")
        print(f"  game {number + 1}: {shares[-1]:.4f} of the optimum, {game.labels_left} labels left", flush=True)
    mean = sum(shares) / len(shares)
    print(f"\nmean {mean:.4f}: {points(mean)} of {POINTS} points if the grader's other games go the same way")
    return 0 if points(mean) == POINTS else 1


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="numbers of sets, numbers or names of problems")
    parser.add_argument("--show", action="store_true", help="the inputs of the first case that fails")
    args = parser.parse_args(argv)
    if args.what == ["7"]:
        return check_games()
    known = {word for p in PROBLEMS for word in (str(p.set), p.number, p.key)}
    for word in args.what:
        if word not in known:
            parser.error(f"{word!r} is no problem and no set with visible cases: try 1 to 5, 4.4 or gae, or 7")
    chosen = [p for p in PROBLEMS if not args.what or {str(p.set), p.number, p.key} & set(args.what)]
    try:
        return check_problems(chosen, args.show)
    except handed_in.Refused as fault:
        parser.error(str(fault))


if __name__ == "__main__":
    sys.exit(main())
