"""What the course is made of: handout, hunt, zips, tests.json, notebook. Without its numbers, which take longer."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COURSE = ROOT / "course"
sys.path.insert(0, str(COURSE))

import cut  # noqa: E402
import hunt  # noqa: E402
import make  # noqa: E402
from expect import expected  # noqa: E402
from problems import HUNTED, PROBLEMS, SETS, TITLES, variant_seed  # noqa: E402
from project import emptied, path_of, read_project, with_student  # noqa: E402
from values import compare  # noqa: E402

pytestmark = pytest.mark.xdist_group("course")  # all of it is made once


@pytest.fixture(scope="module")
def files():
    return read_project(ROOT)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Everything that make.py writes, but no numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "visible_cases", lambda seed: {})
        patch.setattr(hunt, "model_answer", lambda *args: "")
        return make.make(tmp_path_factory.mktemp("course") / "out", "CS1", "a@b.org", secret="s")


def statements(text, place):
    """The statements of a function's body, as text without comments, the inner ones too."""
    node, _ = cut.find(ast.parse(text), place)
    return [ast.unparse(part) for top in cut.body_of(node) for part in ast.walk(top) if isinstance(part, ast.stmt)]


def test_nothing_in_the_handout_contains_a_solution(files, out):
    """The body of an emptied function is in the handout, there or in another file, or in a compiled one."""
    everything = Counter()
    for text in [text for path, text in files.items() if path.endswith(".py")]:
        everything.update(ast.unparse(part) for part in ast.walk(ast.parse(text)) if isinstance(part, ast.stmt))
    handed_out = {path: path.read_text(encoding="utf-8") for path in (out / "handout").rglob("*") if path.is_file()}
    code = [{line.strip() for line in ast.unparse(ast.parse(text)).split("\n")}
            for path, text in handed_out.items() if path.suffix == ".py"]
    for problem in PROBLEMS:
        own = [part for part in statements(files[path_of(files, problem.place)], problem.place)
               if len(part) > 30 and everything[part] == 1]
        for part in own:
            lines = {line.strip() for line in part.split("\n")}
            assert not any(lines <= known for known in code), part
    assert {path.suffix for path in handed_out} <= {".py", ".md", ".json", ".csv", ".txt", ".html", ""}
    names = {path.relative_to(out / "handout").parts[0] for path in handed_out}
    assert not names & {"tests", "studies", "bench", ".git"}
    grader = {"grade.py", "set6.py", "loops.py", "expect.py", "prove.py", "bugs.py", "answer7.py", "hunt.py"}
    assert not {path.name for path in handed_out} & grader


def test_the_rubrics_stay_with_the_solution(out):
    """Students read the answers under the questions."""
    for number in range(1, 8):
        rubrics = (out / "solution" / "sets" / f"{number}.md").read_text(encoding="utf-8").count("*Rubric")
        text = (out / "handout" / "sets" / f"{number}.md").read_text(encoding="utf-8")
        assert 1 <= rubrics == text.count("**W") and "ubric" not in text and "## In the papers" in text
    assert "ubric" not in (out / "hunt" / "README.md").read_text(encoding="utf-8")


def test_a_stub_keeps_all_but_the_body(files, out):
    """A signature or a docstring is lost, or another function is changed."""
    for path, text in [row for row in files.items() if row[0].endswith(".py")]:
        handed_out = (out / "handout" / path).read_text(encoding="utf-8")
        places = [problem for problem in PROBLEMS if path_of(files, problem.place) == path]
        for problem in places:
            true, stub = (cut.find(ast.parse(x), problem.place)[0] for x in (text, handed_out))
            assert ast.unparse(true.args) == ast.unparse(stub.args)
            assert ast.get_docstring(true) == ast.get_docstring(stub)
            assert ast.unparse(cut.body_of(stub)) == (
                f"raise NotImplementedError('problem {problem.number}: {problem.key}')")
            handed_out = cut.put(handed_out, problem.place, text)
        assert ast.dump(ast.parse(handed_out)) == ast.dump(ast.parse(text))


def test_the_solved_sets_of_a_handout_are_solved(files):
    """--solved leaves the wrong sets empty."""
    left = emptied(files, [problem for problem in PROBLEMS if problem.set > 2])
    assert left["model.py"] == files["model.py"] and left["ppo.py"] != files["ppo.py"]


def test_every_problem_has_its_inputs_and_its_call():
    """A problem has no cases, or two problems have one name."""
    for problem in (*PROBLEMS, *HUNTED):
        module = importlib.import_module(f"set{problem.set}")
        assert hasattr(module, f"draw_{problem.key}") and hasattr(module, f"run_{problem.key}"), problem
    assert len({problem.key for problem in PROBLEMS}) == len(PROBLEMS)
    assert {number for number in SETS} | {6, 7} == set(TITLES)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train_ppo", "train_grpo", "train_dpo", "train_sft", "train_reward_model"])
def test_the_loops_can_be_called_as_the_cases_call_them(key):
    """A training loop got another argument, and the cases of the course are forgotten."""
    problem = next(problem for problem in (*PROBLEMS, *HUNTED) if problem.key == key)
    case = expected(problem.set, "test", [problem])[key]
    assert compare(key, case["expected"], json.loads(json.dumps(case["expected"]))) == ""


def test_a_mistake_stays_in_its_problem(files):
    """A wrong function is used where another problem is graded."""
    problem = next(problem for problem in PROBLEMS if problem.key == "gae")
    path = path_of(files, problem.place)
    wrong = {**files, path: cut.empty(files[path], (problem.place, "other"))}
    for other in SETS[4].problems:
        same = with_student(files, other, wrong) == with_student(files, other, files)
        assert same == (other is not problem), (problem.key, other.key)


def test_the_zips_are_what_gradescope_asks_for(out):
    """setup.sh or run_autograder is not at the root, or cannot be executed, or a zip depends on when it was made."""
    for number in TITLES:
        with zipfile.ZipFile(out / f"gradescope-{number}.zip") as archive:
            modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
            assert modes["setup.sh"] & 0o111 and modes["run_autograder"] & 0o111
            assert archive.read("run_autograder").startswith(b"#!")
            assert json.loads(archive.read("settings.json")) == {"set": number, "course": "CS1", "secret": "s"}
            assert ("bugs.json" in modes) == (number == 6)
            files = {name: archive.read(name).decode() for name in modes}
        make.make_zip(out / "again.zip", files)
        assert (out / "again.zip").read_bytes() == (out / f"gradescope-{number}.zip").read_bytes()


def test_classroom50_gets_its_schema(out):
    """A field that classroom50/tests/v1 does not know, or a limit that it does not allow."""
    for number in (*SETS, 7):
        content = json.loads((out / f"classroom50-{number}" / "tests.json").read_text())
        assert set(content) == {"schema", "tests"} and content["schema"] == "classroom50/tests/v1"
        names = [test["name"] for test in content["tests"]]
        assert 0 < len(names) == len(set(names)) <= 100
        for test in content["tests"]:
            assert set(test) == {"name", "type", "setup", "run", "timeout", "points"} and test["type"] == "run"
            assert 1 <= test["timeout"] <= 600 and 0 <= test["points"] <= 1000 and len(test["name"].encode()) <= 100
        most = make.points_of(number) if number in SETS else make.POINTS
        assert sum(test["points"] for test in content["tests"]) == most


def test_a_variant_follows_from_course_and_student(files, out):
    """Two students hunt the same bugs, or one student's bugs change."""
    bugs = make.all_bugs(ROOT, files, HUNTED)
    chosen = {}
    for course, student in (("CS1", "a@b.org"), ("CS1", "A@b.org "), ("CS1", "c@b.org"), ("CS2", "a@b.org")):
        found = hunt.choose(bugs, variant_seed(course, student))
        assert len({bug["place"] for bug in found}) == len(found) == hunt.TESTED
        chosen[course, student] = [bug["name"] for bug in found]
    assert chosen["CS1", "a@b.org"] == chosen["CS1", "A@b.org "]
    assert len({str(names) for names in chosen.values()}) == 3
    mine = hunt.choose(bugs, variant_seed("CS1", "a@b.org"))[:hunt.BUGS]
    for problem in HUNTED:
        path = path_of(files, problem.place)
        same = hunt.same((out / "hunt" / path).read_text(encoding="utf-8"), files[path], problem.place)
        assert same == (problem.place not in {bug["place"] for bug in mine})


def test_the_notebook_is_valid(out):
    """A key that nbformat 4.5 asks for is missing, or a cell is no Python."""
    content = json.loads((out / "tour.ipynb").read_text(encoding="utf-8"))
    assert set(content) == {"cells", "metadata", "nbformat", "nbformat_minor"} and content["nbformat"] == 4
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | code
        if code:
            names = {node.id for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, ast.Name)}
            assert not any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse("".join(cell["source"]))))
            assert names


@pytest.mark.slow
def test_the_notebook_runs_and_quick_learns(out):
    """A cell calls what is not there; or the run of --quick, as a user makes it, learns nothing."""
    content = json.loads((out / "tour.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run([sys.executable, "-c", "\n\n".join(code)], cwd=out, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "share of the optimum" in done.stdout
    folder = Path(re.search(r", writing to (\S+)", done.stdout)[1])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    rows = report["policies"]
    assert report["reward_model"]["accuracy"] > 0.55
    assert rows["ppo"]["score"] > rows["sft"]["score"] + 0.5
    assert rows["ppo"]["objective"] > rows["sft"]["objective"] + 0.3
    assert rows["ppo"]["objective"] < report["optimum"]["objective"] + 0.3
    assert rows["dpo"]["score"] > rows["sft"]["score"]
    shutil.rmtree(folder)


def test_the_pages_agree_with_the_numbers():
    """Points in a text are not those that are given, or a line of a problem is missing."""
    overview = (COURSE / "sets" / "README.md").read_text(encoding="utf-8")
    for number, part in SETS.items():
        text = (COURSE / "sets" / f"{number}.md").read_text(encoding="utf-8")
        for problem in part.problems:
            row = next(line for line in text.split("\n") if line.startswith(f"| {problem.number} |"))
            assert problem.key in row and f"| {problem.points} |" in row
        assert f"({part.written} points)" in text
        assert f"| {make.points_of(number)} + {part.written} |" in overview
