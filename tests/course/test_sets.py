"""The sets themselves: the solution has all points, and what is wrong loses them."""

import ast
import textwrap

import draw
import pytest
from course_variants import RIGHT, WRONG
from problems import PROBLEMS, SETS
from project import body_of, find
from work import grade_problem


def graded(project, problem, case, text, run):
    return grade_problem(project, problem, case, {f"handed_in/{problem.file}": text.encode()}, run)


@pytest.mark.parametrize("number", [3, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 5)]])
def test_the_solution_has_all_points(project, true_values, run, number):
    """Bug: a right function loses points."""
    for problem in SETS[number].problems:
        case = true_values(number)[problem.key]
        found = graded(project, problem, case, project[problem.file], run)
        assert found == (problem.points, "solved"), problem.number


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_every_argument_varies(monkeypatch, number):
    """Bug: a function that ignores an argument has all points, or the hidden numbers are the visible ones."""
    monkeypatch.setattr(draw, "runner", lambda module, key: lambda case: None)  # the cases alone
    visible, hidden = draw.expected(number, "visible"), draw.expected(number, "hidden")
    for key in visible:
        cases = [case for case in visible[key]["cases"] if case.get("part") != "errors"]
        assert cases != hidden[key]["cases"][:len(cases)]
        for name in [name for name, x in cases[0].items() if isinstance(x, (int, float, str)) and name != "part"]:
            assert len({str(case[name]) for case in cases if name in case}) > 1, (key, name)


def changed(files, problem, old, new):
    """The file of a problem in which a piece of its function is another one, or for "" its body."""
    text = files[problem.file]
    node = find(ast.parse(text), problem.place)
    first, lines = body_of(node)[0], text.split("\n")
    head, body = lines[:first.lineno - 1], "\n".join(lines[first.lineno - 1:node.end_lineno])
    assert old in body, problem.key
    new = body.replace(old, new, 1) if old else textwrap.indent(new, " " * first.col_offset)
    return "\n".join([*head, new, *lines[node.end_lineno:]])


@pytest.mark.slow
@pytest.mark.parametrize(("key", "old", "new", "right"),
                         [*((*variant, False) for variant in WRONG), *((*variant, True) for variant in RIGHT)])
def test_a_wrong_function_loses_points_and_a_right_one_keeps_them(project, true_values, run, key, old, new, right):
    """Bug: a function that is wrong has all points, or one that is right, and unlike ours, loses some."""
    problem = next(problem for problem in PROBLEMS if problem.key == key)
    text = changed(project, problem, old, new)
    points, sentence = graded(project, problem, true_values(problem.set)[key], text, run)
    assert (points == problem.points) == right and (sentence == "solved") == right
    assert right or problem.hint in sentence
