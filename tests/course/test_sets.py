"""The sets themselves: the solution has all points, and what is wrong loses them."""

import ast

import pytest
from course_variants import ALSO_RIGHT, RIGHT, WRONG
from problems import PROBLEMS, SETS
from project import body_of, emptied, find
from work import grade_problem


def with_body(files, problem, body):
    """The file of a problem with another body in its function, indented by the length of its first indentation."""
    text = files[problem.file]
    node = find(ast.parse(text), problem.place)
    first = body_of(node)[0]
    lines = text.split("\n")
    pad = " " * first.col_offset
    new = [pad + line if line else line for line in body.strip("\n").split("\n")]
    return "\n".join([*lines[:first.lineno - 1], *new, *lines[node.end_lineno:]])


def graded(project, problem, case, text, run):
    return grade_problem(project, problem, case, {f"handed_in/{problem.file}": text.encode()}, run)


@pytest.mark.parametrize("number", [1, 3, *[pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5)]])
def test_the_solution_has_all_points(project, true_values, run, number):
    """Bug: a right function loses points."""
    for problem in SETS[number].problems:
        case = true_values(number)[problem.key]
        found = graded(project, problem, case, project[problem.file], run)
        assert found == (problem.points, "solved"), problem.number


@pytest.mark.parametrize("number", [1, 3, *[pytest.param(n, marks=pytest.mark.slow) for n in (4, 5)]])
def test_every_argument_varies(true_values, number):
    """Bug: a function that ignores an argument has all points, because it has one value in all cases."""
    for problem in SETS[number].problems:
        cases = [case for case in true_values(number)[problem.key]["cases"] if case.get("part") != "errors"]
        for name in [name for name, x in cases[0].items() if isinstance(x, (int, float, str)) and name != "part"]:
            assert len({str(case[name]) for case in cases if name in case}) > 1, (problem.key, name)


def test_stubs_have_no_points(project, true_values, run):
    """Bug: an empty function has points, or what is said hides that it is empty."""
    empty = emptied(project)
    for problem in PROBLEMS[::12]:
        case = true_values(problem.set)[problem.key]
        assert graded(project, problem, case, empty[problem.file], run) == (0, "not solved yet"), problem.number


def with_replacement(files, problem, old, new):
    """The file of a problem in which a piece of its function is another one."""
    text = files[problem.file]
    node = find(ast.parse(text), problem.place)
    lines = text.split("\n")
    function = "\n".join(lines[node.lineno - 1:node.end_lineno])
    head = "\n".join(lines[node.lineno - 1:body_of(node)[0].lineno - 1])
    body = function[len(head):]
    assert body.count(old) >= 1, (problem.key, old)
    return text.replace(function, head + body.replace(old, new, 1))


def problem_of(key):
    return next(problem for problem in PROBLEMS if problem.key == key)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "old", "new"), WRONG)
def test_a_wrong_function_loses_points(project, true_values, run, key, old, new):
    """Bug: a function that is wrong has all points."""
    problem = problem_of(key)
    text = with_replacement(project, problem, old, new)
    points, sentence = graded(project, problem, true_values(problem.set)[key], text, run)
    assert points < problem.points and problem.hint in sentence


@pytest.mark.slow
@pytest.mark.parametrize(("key", "old", "new"), [*[(key, "", body) for key, body in RIGHT], *ALSO_RIGHT])
def test_a_right_function_keeps_its_points(project, true_values, run, key, old, new):
    """Bug: a function that is right, and unlike ours, loses points."""
    problem = problem_of(key)
    text = with_replacement(project, problem, old, new) if old else with_body(project, problem, new)
    assert graded(project, problem, true_values(problem.set)[key], text, run) == (problem.points, "solved")
