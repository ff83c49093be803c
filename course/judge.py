"""The verdict on one problem, from plain JSON: points, and a sentence. check.py and the grader give the same one."""

import builtins

from values import difference


def fault_of(expected, answer, tolerance):
    """None, or (property, detail): what is wrong with the answer of a child to one case."""
    if "error" in answer:
        name = answer["error"] if answer["error"] in dir(builtins) else "of another kind"
        return f"an exception, {name}", str(answer["detail"])
    found = difference("the result", expected, answer["values"], tolerance)
    if found is None and answer["changed"]:
        return "an input was changed by the call", ", ".join(map(str, answer["changed"]))
    return found


def verdict(problem, cases, expected, answers, hidden):
    """
    (points, sentence) of a problem. Each part of it has the same points, but error checks (the part "errors") have one
    point together, and none unless something else is right. A hidden verdict names the broken property and the hint: no
    number, and no text that comes from the student's process.
    """
    if answers is None or not isinstance(answers, list) or len(answers) != len(cases):
        return 0, "no values came back"
    stub = next((str(answer["stub"]) for answer in answers if "stub" in answer), "")
    if stub:
        return 0, "not solved yet" if hidden else f"not solved yet ({stub})"
    parts, sentence = {}, ""
    for number, (case, true, answer) in enumerate(zip(cases, expected, answers), start=1):
        part = case.get("part", "values")
        fault = fault_of(true, answer, problem.tolerance)
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
