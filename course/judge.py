"""The verdict on one problem, from plain JSON: points, and a sentence. check.py and the grader give the same one."""

import builtins
import math

from values import decode, difference

SHARE = 0.90  # of the optimum, asked of an output named "policy"


def share_of(case, policy):
    """The share of J* - J(ref) that encoded logits have, at most 1; -inf if they are no policy."""
    import mdp  # ours in the grader, the student's in check.py

    try:
        ref, rewards, logits = decode(case["ref"]), decode(case["rewards"]), decode(policy)
        tree = mdp.Tree(*case["tree"])
        at_ref = mdp.objective(tree, ref, ref, rewards, case["beta"])
        J = mdp.objective(tree, logits.view_as(ref), ref, rewards, case["beta"])
        share = float((J - at_ref) / (mdp.solve(tree, ref, rewards, case["beta"]).J - at_ref))
    except Exception:
        return -math.inf
    return min(1.0, share) if math.isfinite(share) else -math.inf


def fault_of(case, expected, answer, tolerance):
    """None, or (property, detail): what is wrong with the answer of a child to one case."""
    if "error" in answer:
        known = getattr(builtins, str(answer["error"]), None)
        is_known = isinstance(known, type) and issubclass(known, BaseException)
        return f"an exception, {known.__name__}" if is_known else "an exception", str(answer.get("detail", ""))
    got = answer["values"]
    if isinstance(expected, dict) and "policy" in expected and isinstance(got, dict):
        share = share_of(case, got.get("policy"))
        if share < SHARE:
            return f"the last policy has less than {SHARE:.2f} of the optimum", f"it has {share:.3f}"
        expected, got = [{k: x for k, x in part.items() if k != "policy"} for part in (expected, got)]
    found = difference("the result", expected, got, tolerance)
    if found is None and answer["changed"]:
        return "an input was changed by the call", ", ".join(map(str, answer["changed"]))
    return found


def verdict(problem, cases, expected, answers, hidden):
    """
    (points, sentence) of a problem; the sentence is "solved" if there is nothing to say.

    Each part of a problem has the same points, but error checks (the part "errors") have one point together, and none
    unless something else is right. A hidden verdict names the broken property and the hint. It has no number and no
    text that comes from the student's process.
    """
    if answers is None or not isinstance(answers, list) or len(answers) != len(cases):
        return 0, "no values came back"
    stub = next((str(answer["stub"]) for answer in answers if "stub" in answer), "")
    if stub:
        return 0, "not solved yet" if hidden else f"not solved yet ({stub})"
    parts, sentence = {}, ""
    for number, (case, true, answer) in enumerate(zip(cases, expected, answers), start=1):
        part = case.get("part", "values")
        fault = fault_of(case, true, answer, problem.tolerance)
        parts[part] = parts.get(part, True) and fault is None
        if fault and not sentence:
            where = f"{part}: " if part != "values" else ""
            detail = "" if hidden else f" (case {number}: {fault[1]})"
            sentence = f"{where}{fault[0]}{detail}. Hint: {problem.hint}"
    values = [right for part, right in parts.items() if part != "errors"]
    extra = 1 if "errors" in parts else 0
    points = (problem.points - extra) * sum(values) / len(values)
    if any(values) and parts.get("errors"):
        points += extra
    return round(points, 1), sentence or "solved"
