"""Set 6: which bugs a student gets, and what a test file is worth."""

import ast
import random
from functools import partial

import hunt
import make
import pytest
import rewrite
from grade import Results
from problems import PROBLEMS, variant_seed


@pytest.fixture(scope="module")
def bugs():
    return make.all_bugs(make.whole_project())


SMALL = {f"part{i}.py": f"def f(x):\n    y = x * {i} + 1\n    return y\n" for i in range(10)}
PLANTED = [dict(name=f"bug {i}", place=f"part{i}.py::f", path=f"part{i}.py", start=18, end=23 + len(str(i)) - 1,
                wrong=f"x - {i}", killer="") for i in range(10)]


@pytest.fixture
def graded(tmp_path):
    """A function of run(files, test, seconds): (scores, outputs) of a test file, in a small project."""
    def grade(run):
        make.write(tmp_path / "in", {"my/test_hunt.py": "x"})
        results = Results(tmp_path / "results.json", hunt.LINES, "")
        hunt.grade(SMALL, PLANTED, tmp_path / "in", "seed", "secret", results, run)
        return [test["score"] for test in results.tests], [test["output"] for test in results.tests]
    return grade


def test_every_variant_has_ten_functions(bugs):
    """Bug: two bugs are in one function, or one moves another; one student has two variants, or two have one."""
    asked = {problem.place for problem in PROBLEMS}
    chosen = {}
    for student in ("a@b.org", " A@b.org", "c@d.org"):
        found = hunt.choose(bugs, variant_seed("CS1" + student[:student.count(" ")], student))
        assert len({bug["place"] for bug in found}) == len(found) == hunt.BUGS + hunt.MORE
        assert not {bug["place"] for bug in found} & asked
        chosen[student] = [bug["place"] for bug in found]
    two = [dict(path="a.py", start=0, end=1, wrong="long"), dict(path="a.py", start=1, end=2, wrong="")]
    assert hunt.planted({"a.py": "xyz"}, two) == {"a.py": "longz"}
    many = [dict(name=name, place=f"f{i}") for i in range(10) for name in "ab"]
    assert {bug["name"] for bug in hunt.choose(many, "seed")} == {"a", "b"}
    assert variant_seed("CS1", "a@b.org") != variant_seed("CS2", "a@b.org")
    assert chosen["a@b.org"] == chosen[" A@b.org"] and sorted(chosen["a@b.org"]) != sorted(chosen["c@d.org"])


def true_versions():
    return [SMALL, *(rewrite.rewritten(SMALL, how) for how in rewrite.REWRITES)]


def shows(shown, status=1):
    """A test file that notices these bugs of the variant, by what the code does."""
    order = [bug["path"] for bug in hunt.choose(PLANTED, "seed")]

    def run(files, test, seconds):
        assert test == b"x" and seconds == hunt.SECONDS
        for i, path in enumerate(order):
            names = {}
            exec(files[path], names)
            if names["f"](7) != 7 * int(path[4:-3]) + 1:
                return status if i in shown else 0
        return 0
    return run


def test_points(graded):
    """Bug: a bug that is shown has no points, or one that is not shown has some; or a line says something else."""
    found = "test_hunt.py was found as 'my/test_hunt.py'. "
    unseen = f"{found}all tests pass with this bug"
    assert graded(shows((0, 3))) == ([6, 0, 0, 6, 0, 0], [
        f"{found}shown", unseen, unseen, f"{found}shown", unseen, "0 of 5 shown"])
    scores, outputs = graded(shows(range(1, 9)))
    assert scores == [0, 6, 6, 6, 6, 8] and outputs[5] == "4 of 5 shown"
    for status, said in ((None, "stopped after 35 seconds: not shown"), (2, "pytest could not run")):
        assert graded(shows((0,), status)) == ([0] * 6, [f"{found}{said}", *[unseen] * 4, "0 of 5 shown"])


@pytest.mark.parametrize(("number", "status", "said"), [
    (0, 2, "does not pass"), (1, 1, "does not pass"), (2, None, "was stopped"), (3, 1, "does not pass")])
def test_a_test_that_fails_on_the_true_code_has_nothing(graded, monkeypatch, number, status, said):
    """Bug: a test that compares texts or names passes for one that looks at what the code does."""
    monkeypatch.setattr(hunt, "padded", lambda text, rng: text)
    true = true_versions()

    def run(files, test, seconds):
        return status if files == true[number] else 0 if files in true else 1
    scores, outputs = graded(run)
    assert scores == [0] * 6 and said in outputs[0] and said in outputs[5]


def test_no_version_tells_whether_a_bug_is_in_it(monkeypatch):
    """Bug: a bug comes in one rewriting or at a known place, and a test fails there without a look at what it does."""
    monkeypatch.setattr(hunt, "padded", lambda text, rng: text)
    orders, styles, true = set(), set(), true_versions()
    for secret in range(3):
        versions = hunt.versions_of(SMALL, PLANTED, secret)
        numbers = [number for number, _ in versions]
        assert numbers[0] is None and sorted(numbers, key=str) == [*range(10), *[None] * 4]
        orders.add(tuple(numbers))
        for number, files in versions:  # all files but that of the bug are those of a true version
            styles |= {(number, i) for i in range(4) if sum(true[i][path] != files[path] for path in SMALL) <= 1}
    assert len(orders) == 3 and {number for number, _ in styles} == {None, *range(10)}
    assert len(styles) > 14 and {i for number, i in styles if number is not None} == {1, 2, 3}


SAMPLE = '''SHIFT = 0
def f(items, scale=2):  # a comment
    """A docstring."""
    total, scale = 0.0, scale + SHIFT
    names = ["a"] * 1 + 2 * items
    for item in names:
        total = total + 3 * len(item) - scale
    pick = [total * i for i in range(2)]

    def inner(x):
        nonlocal total
        total, SHIFT = total + x, 5
        return x * total + SHIFT
    return inner(pick[1] + 1), names + items + names
'''


@pytest.mark.parametrize("how", [*rewrite.REWRITES, *[partial(rewrite.padded, rng=random.Random(i)) for i in range(9)]])
def test_a_rewriting_changes_the_text_and_not_what_it_does(how):
    """Bug: the true code does something else when written in another way, or a part is not; a global is renamed."""
    texts = SAMPLE, how(SAMPLE)
    found = []
    for text in texts:
        names = {}
        exec(text, names)
        found.append(names["f"](["bb", "c"]))
    assert found[0] == found[1] and "#" not in texts[1] and names["f"].__doc__ == "A docstring."
    assert how is not rewrite.in_other_order or "items * 2" in texts[1]  # a product in a sum
    same = ast.dump(ast.parse(SAMPLE)) == ast.dump(ast.parse(texts[1]))
    assert same == (how is rewrite.without_comments) or how not in rewrite.REWRITES


def test_words_cannot_be_counted(project):
    """Bug: a test counts the words of a function, which no rewriting changes, and has all points."""
    versions = hunt.versions_of({"ppo.py": project["ppo.py"]}, [], "s")
    counts = [len(list(ast.walk(ast.parse(files["ppo.py"])))) for _, files in versions]
    assert len(set(counts)) == len(counts)


HONEST = '''import torch
import robust

def test_the_surest_head():
    means, stds = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    assert robust.two_opinions("brme", means, stds)[0].tolist() == [1.0, 4.0]
'''


@pytest.mark.slow
def test_real_runs_of_pytest(project, bugs):
    """Bug: an honest test fails on the true code, or a file that never ends or cannot be read counts as one."""
    for files in (project, rewrite.rewritten(project, rewrite.REWRITES[-1])):  # the last one does what the others do
        assert hunt.run_tests(files, HONEST.encode(), 60) == 0
    bug = next(bug for bug in bugs if bug["path"] == "robust.py" and "argmax" in bug["wrong"])
    assert hunt.run_tests(hunt.planted(project, [bug]), HONEST.encode(), 60) == 1
    assert hunt.run_tests(project, b"def test_x():\n    while True:\n        pass\n", 3) is None
    assert hunt.run_tests(project, b"no python", 60) == 2
