"""The verdict on one problem, from plain JSON: what check.py shows and what the grader counts."""

from exact import share_of
from values import compare

SHARE = 0.90  # of the optimum, asked in each case of a problem with a leaderboard


def verdict(problem, case, got, leaderboard):
    """
    (message, share): "" and the share of the optimum if the problem is solved, else a sentence and its share so far.

    case: {"cases": inputs, "expected": outputs} of the true code. got: the student's outputs, or a text.
    """
    if problem.number != leaderboard or not isinstance(got, list) or len(got) != len(case["cases"]):
        message = compare(problem.key, case["expected"], got, problem.tolerance)
        return explained(message, problem), None
    shares = [share_of(inputs, outputs) for inputs, outputs in zip(case["cases"], got)]
    share = round(min(1.0, max(0.0, sum(shares) / len(shares))), 4)
    message = compare(problem.key, *[[without(row) for row in rows] for rows in (case["expected"], got)],
                      problem.tolerance)
    if message:
        return explained(message, problem), share
    low = next((s for s in shares if s < SHARE), None)
    return (f"{problem.key}: {low:.3f} of the optimum, {SHARE:.2f} is asked" if low is not None else ""), share


def without(outputs):
    """The outputs without the last logits, whose share counts and whose digits do not."""
    return {name: x for name, x in outputs.items() if name != "logits"} if isinstance(outputs, dict) else outputs


def explained(message, problem):
    """The message with the problem's hint, after a wrong number; an exception speaks for itself."""
    wrong_number = " expected " in message and ", got " in message
    return f"{message}: {problem.hint}" if problem.hint and wrong_number else message
