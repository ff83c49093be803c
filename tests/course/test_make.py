"""The files of make.py, the messages of check.py, and the grading of a folder of submissions."""

import ast
import csv
import datetime
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import zipfile

import check
import collect
import draw
import game
import grade
import host
import make
import pytest
import torch
from conftest import SMALLEST
from course_variants import COURSE
from problems import PROBLEMS, SETS, points_of, variant_seed
from project import body_of, find


def seed_of(number, seed):
    """Cases that are the seed, which takes no time."""
    return {f"case{number}": f"{number} {seed}"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Everything that make.py writes for one student."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "expected", seed_of)
        out = tmp_path_factory.mktemp("course") / "out"
        make.make(out, dict(course="", secret="s"))
        return out


def test_no_handout_contains_a_solution(project, out):
    """Bug: a body is left in the handout, there or in another file; or a grader, a test or part of a rubric is."""
    handed_out = {path.relative_to(out / "handout").as_posix(): path.read_text(encoding="utf-8")
                  for path in (out / "handout").rglob("*") if path.is_file()}
    code = "\n".join(text for name, text in handed_out.items() if name.endswith(".py"))
    parse = functools.cache(ast.parse)
    for problem in PROBLEMS:
        true, stub = (find(parse(files[problem.file]), problem.place) for files in (project, handed_out))
        last = ast.get_source_segment(project[problem.file], body_of(true)[-1])
        assert last not in code or len(last) < 30, problem.number
        assert ast.unparse(true.args) == ast.unparse(stub.args) and ast.get_docstring(true) == ast.get_docstring(stub)
        assert ast.unparse(body_of(stub)) == f"raise NotImplementedError('problem {problem.number}: {problem.key}')"
    modules = {name.removesuffix(".py") for name in project if "/" not in name}
    used = {word for text in project.values() for word in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
    assert modules - used <= {"minirlhf", "ratios", "estimators", "robust"}  # others may tell the answers
    assert not set("/".join(handed_out).split("/")) & {"grade.py", "hunt.py", "answer7.py", "course.json", "bench"}
    given = "".join(handed_out.values()) + (out / "hunt" / "README.md").read_text()
    parts = [part for path in out.glob("solution/sets/*.md") for part in path.read_text().split("*Rubric")[1:]]
    lines = [line for part in parts for line in part.split("\n\n")[0].split("\n")]
    assert len(parts) == 13 and "ubric" not in given and not [line for line in lines if line in given]
    assert f"Python {sys.version_info[0]}.{sys.version_info[1]} or later" in handed_out["README.md"]
    assert "Newton" not in handed_out["open_end.py"] and "problem 7.1" in handed_out["open_end.py"]
    assert "the last column is left out" not in handed_out["model.py"] and "course/game.py" in handed_out
    for number in range(1, 6):
        assert json.loads(handed_out[f"cases/case{number}.json"]) == f"{number} {variant_seed('', '')} visible"


def test_the_key_names_the_bugs_of_the_hunt(project, out):
    """Bug: the instructor's key is of another hunt, or the list of functions lacks one with a bug."""
    key = re.findall(r"^- (\S+): .* Shown by tests/", (out / "solution" / "hunt.key.md").read_text(), re.MULTILINE)
    texts = {place: [(out / "hunt" / place.split("::")[0]).read_text(), project[place.split("::")[0]]] for place in key}
    same = [len({ast.dump(find(ast.parse(text), place)) for text in texts[place]}) == 1 for place in key]
    assert same == [False] * 5 + [True] * 5 and set(key) <= set((out / "hunt" / "hunted.txt").read_text().split())
    for name in ("AGENTS.md", "CLAUDE.md", "docs/metrics.md", "requirements.txt", "variant.json"):
        assert (out / "hunt" / name).read_bytes() == (out / "handout" / name).read_bytes()


def test_the_zips_are_what_gradescope_asks_for(out, monkeypatch):
    """Bug: a module is missing, a script cannot be executed, a version is not pinned, or a zip depends on the time."""
    for number in (4, 6):
        with zipfile.ZipFile(out / f"gradescope-{number}.zip") as archive:
            modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
            assert {entry.date_time for entry in archive.infolist()} == {(2020, 1, 1, 0, 0, 0)}
            files = {name: archive.read(name).decode() for name in modes}
        assert modes["setup.sh"] == modes["run_autograder"] == 0o755
        assert " /autograder/source/grade.py --base /autograder\n" in files["run_autograder"]
        assert json.loads(files["settings.json"]) == {"set": number, "course": "", "secret": "s"}
        assert ("bugs.json" in modes) == (number == 6) and "project/ratios.py" in modes
        assert re.search(r"torch==\S+ --index-url \S+/cpu\n", files["setup.sh"]) and "pytest==" in files["setup.sh"]
        imported = {word for name, text in files.items() if "/" not in name
                    for word in re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE)}
        ours = {path.stem for path in (*COURSE.glob("*.py"), *COURSE.parent.glob("*.py"))} & imported
        assert all({f"{name}.py", f"project/{name}.py"} & set(files) for name in ours)
    monkeypatch.setattr(make.importlib.metadata, "version", lambda name: "2.5.1+cpu")
    assert make.pinned("torch") == "torch==2.5.1"  # PyPI has no 2.5.1+cpu


def test_the_roster(tmp_path, monkeypatch, project):
    """Bug: a student has no zip, an address is cut, two students have one variant, or --solved empties other sets."""
    roster = tmp_path / "roster.csv"
    text = "\ufeffa@b.org,Ann\r\nName,Email\r\nAnn, a@b.org\r\nCid <c@d.org>;x\n\rE f@g.org\n a@b.org\n"
    roster.write_bytes(text.encode())
    assert make.addresses(roster) == ["a@b.org", "c@d.org", "f@g.org"]
    tmp_path = tmp_path / "new" / "folder"
    monkeypatch.setattr(draw, "expected", seed_of)
    make.main([f"{tmp_path}/out/", "--course", "CS1", "--roster", str(roster), "--solved", "2"])
    bugs = set()
    for address in make.addresses(roster):
        with zipfile.ZipFile(tmp_path / "out" / "students" / f"{address}.zip") as archive:
            about = json.loads(archive.read("variant.json"))
            assert about == dict(course="CS1", student=address, seed=variant_seed("CS1", address))
            assert about["seed"] in archive.read("cases/case1.json").decode()
            assert archive.read("sft.py").decode() == project["sft.py"] and b"problem 1." not in archive.read("mdp.py")
            assert b'NotImplementedError("problem 3.' in archive.read("reward.py")
        with zipfile.ZipFile(tmp_path / "out" / "hunts" / f"{address}.zip") as archive:
            assert json.loads(archive.read("variant.json")) == about
            bugs.add(tuple(archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".py")))
    assert len(bugs) == 3
    kept = json.loads((tmp_path / "course.json").read_text())
    assert kept["course"] == "CS1" and len(kept["secret"]) == 32
    assert make.kept(tmp_path / "course.json", None) == kept != make.kept(tmp_path / "other.json", "CS1")


@pytest.mark.parametrize(("main", "words", "said"), [
    (make.main, ["x"], "already"), (make.main, ["x/new", "--roster", "a.csv"], "goes with"),
    (make.main, ["x/new", "--course", "other"], "of the course 'this'"), (check.main, ["winn"], "is no problem"),
    (make.main, ["x/new", "--course", "this", "--roster", "no"], "No such file"),
    (make.main, ["x/new", "--course", "this", "--roster", "a.zip"], "a.zip has no address"),
    (collect.main, ["a.zip", "no", "new"], "is no folder"), (collect.main, ["a.zip", "x", "x"], "already"),
    (collect.main, ["no", "x", "new"], "is no zip")])
def test_a_wrong_command_is_one_line(tmp_path, capsys, monkeypatch, main, words, said):
    """Bug: a mistake is a traceback, or a folder, grades or a secret are overwritten."""
    monkeypatch.chdir(tmp_path)
    make.write("x", {"course.json": '{"course": "%s", "secret": "s"}' % ("this" if "--course" in words else "")})
    make.make_zip(make.Path("a.zip"), {"grade.py": ""})
    with pytest.raises(SystemExit) as fault:
        main(words)
    assert fault.value.code == 2 and said in capsys.readouterr().err.strip().split("\n")[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "x"] and len(list(tmp_path.glob("x/*"))) == 1


def test_the_pages_agree_with_the_numbers():
    """Bug: points in a text are not those that are given, a line of a problem is missing, or time runs out."""
    overview = (COURSE / "sets" / "README.md").read_text(encoding="utf-8")
    for number, part in SETS.items():
        text = (COURSE / "sets" / f"{number}.md").read_text(encoding="utf-8")
        for problem in part.problems:
            row = next(line for line in text.split("\n") if line.startswith(f"| {problem.number} |"))
            assert problem.key in row and f"| {problem.points} |" in row
        assert f"({part.written} points)" in text and 1 <= text.count("*Rubric") == text.count("**W")
        assert sum(problem.seconds for problem in part.problems) <= 540  # Gradescope's container has 600
        assert f"| {points_of(number)} + {part.written} |" in overview


def test_check_says_what_is_solved(out, project, true_values, tmp_path, monkeypatch, run, capsys):
    """Bug: check.py has another verdict than the grader, hides numbers, or its exit status does not tell."""
    student = tmp_path / "work"
    shutil.copytree(out / "handout", student)
    make.write(student, {name: project[name] for name in ("reward.py", "evaluate.py")})
    make.write(student, {f"cases/{key}.json": json.dumps(case) for key, case in true_values(3).items()})
    monkeypatch.setattr(check, "HERE", student)
    true_run = check.run
    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "PROBLEMS", [problem for problem in PROBLEMS if problem.key in ("scale", "wins")])
    for words in ([], ["3"], ["wins", "3.4"]):
        assert check.main(words) == 0
        said = capsys.readouterr().out
        assert "3.9  wins" in said and "The total that will count: 5 of 5 points" in said
    text = (student / "evaluate.py").read_text()
    (student / "evaluate.py").write_text("\ufeff" + text.replace("0.5 * (a == b)", "0.7 * (a == b)") + "\nx = 1 / 0\n")
    assert check.main(["--show"]) == 1
    said = capsys.readouterr().out
    shown = [json.dumps(true_values(3)["wins"][name][0]) for name in ("cases", "expected")]
    for part in ("0 of 2", "(case 1: at [0] expected 0.5, got 0.69", "Hint: a tie is one half",
                 "\n  inputs    {}\n  expected  {}\n".format(*shown)):
        assert part in said
    (student / "evaluate.py").write_text(text.replace("return (a > b)", "return (lambda: a.nothing)()") + "x = 1 / 0\n")
    assert check.main(["wins"]) == 1
    said = capsys.readouterr().out
    assert "has no attribute 'nothing', in <lambda>: return" in said and "was left out, ZeroDivisionError" in said
    make.write(student, {"child.py": "print(input())"})
    assert true_run(str(student), "request", 9) == "request\n"
    monkeypatch.setattr(check, "run", lambda folder, request, seconds: true_run(folder, request, seconds / 4000))
    assert check.main(["wins"]) == 1 and "stopped after 40 seconds" in capsys.readouterr().out
    monkeypatch.setattr(check, "run", run)
    (student / "evaluate.py").unlink()
    with pytest.raises(SystemExit, match="2"):
        check.main(["wins"])
    make.write(student, {"copy/evaluate.py": (out / "handout" / "evaluate.py").read_text()})
    assert check.main(["wins"]) == 1
    said = capsys.readouterr().out
    assert "not solved yet (problem 3.9: wins)" in said and "evaluate.py was found as 'copy/evaluate.py'." in said


def test_the_budget_of_labels_is_kept():
    """Bug: a player gets more labels than 300, none for nothing, or sees the rewards."""
    played = game.Game("a")
    for n in (301, 0, -1):
        with pytest.raises(game.OverBudget):
            played.compare(played.ref, played.ref, n)
    assert {name for name in vars(played) if name[0] != "_"} == set(played.public())
    assert len(played.compare(played.ref, torch.tensor(played.ref), 7)) == 7 and played.labels_left == 293
    labels = played.compare(played.ref, played.ref, 293)
    rewards = played._rewards
    gaps, wins = torch.tensor([(rewards[a] - rewards[b], won) for a, b, won in labels]).T
    p = torch.sigmoid(gaps)  # the score of Bradley-Terry, and its deviation
    assert abs(((wins - p) * gaps).sum()) < 3 * (p * (1 - p) * gaps ** 2).sum().sqrt()
    first = [[50.0, 0.0, 0.0, 0.0, 0.0]] * 85
    assert {a for a, _, _ in game.Game("a").compare(first, played.ref, 9)} == {played._tree.leaves.index((0,))}


def test_every_random_quantity_has_its_own_generator(monkeypatch):
    """Bug: the reference that a player sees gives the rewards away, or a course that has begun has other games."""
    made = []
    true = game.random.Random
    monkeypatch.setattr(game.random, "Random", lambda seed: made.append(seed) or true(seed))
    first = game.Game("a")
    assert len(made) == len(set(made)) == 5 and all(seed.startswith("a ") for seed in made)
    assert (first.beta, round(first._rewards[0], 6), round(first._rewards[-1], 6)) == (0.345, 0.82835, 2.486439)
    assert first.ref != game.Game("b").ref and first._rewards == game.Game("a")._rewards


def test_the_share_of_the_optimum():
    """Bug: a share is above 1, or a row without a policy has one."""
    played = game.Game("a")
    rewards = torch.tensor(played._rewards, dtype=torch.float64)
    best = game.mdp.solve(played._tree, torch.tensor(played.ref, dtype=torch.float64), rewards, played.beta)
    assert 1 - 1e-9 < game.share(played, best.logp) <= 1 and abs(game.share(played, played.ref)) < 1e-9
    assert game.share(played, [[0.0] * 5] * 85) < 0
    for wrong in (None, "x", [[float("nan")] * 5] * 85, [[0.0] * 5] * 84, [[1e400] * 5] * 85, [[0.0] * 6] * 85, {}):
        assert game.share(played, wrong) == -float("inf")
    assert [game.points(share) for share in (-1.0, 0.30, 0.575, 0.85, 1.0)] == [0, 0, 10, 20, 20]


def test_three_visible_games(monkeypatch, capsys):
    """Bug: the points or the exit status of `check.py 7` are not those of its games, or all are one game."""
    betas = set()
    monkeypatch.setitem(sys.modules, "open_end", types.SimpleNamespace(train=lambda x: betas.add(x.beta) or x.ref))
    for found, status, said in (([0.8, 0.9, 0.91], 0, "mean 0.8700: 20.0 of 20 points"), (
            [1, 0.5, 0], 1, "game 3: 0.0000 of the optimum, 300 labels left\n\nmean 0.5000: 7.3 of 20 points")):
        left = iter(found)
        monkeypatch.setattr(game, "share", lambda played, policy, left=left: policy is played.ref and next(left))
        assert check.main(["7"]) == status and said in capsys.readouterr().out and len(betas) == 3


def test_the_mean_of_the_games(tmp_path, monkeypatch):
    """Bug: one game without a policy costs all points, or all games are one game."""
    seeds, results = [], grade.Results(tmp_path / "results.json", host.LINES, "")
    shares = iter([0.9, -float("inf"), 0.9, 1.0, 0.95])
    monkeypatch.setattr(host, "play", lambda played, files: seeds.append(played.ref) or next(shares))
    (tmp_path / "open_end.py").write_text("")
    host.grade({}, tmp_path, "seed", results)
    assert len(seeds) == 5 and host.SECONDS == 60 and all(seeds.count(ref) == 1 for ref in seeds)
    assert seeds[0] == game.Game("seed hidden game 0").ref and results.tests[0]["score"] == game.points(0.55)
    board = json.loads((tmp_path / "results.json").read_text())["leaderboard"]
    assert board == [dict(name="share of the optimum", value=0.55, order="desc")]
    assert "0.900, no policy, 0.900, 1.000, 0.950" in results.tests[0]["output"]


@pytest.mark.slow
@pytest.mark.parametrize(("body", "is_policy"), [
    ("import random\n    print([1], flush=True)\n    assert random.random() == random.Random(0).random()\n"
     "    return game.ref", True), ("raise SystemExit", False),
    ("import time\n    time.sleep(9)\n    return game.ref", False),
    ("import game as rules\n    while game.labels_left:\n        (a, b, won), = game.compare(game.ref, game.ref, 1)\n"
     "    try: game.compare(a, b, 1)\n    except rules.OverBudget: return game.ref", True),
    ("import os\n    while True:\n        os.write(3, b'{\"compare\": 1}\\n' * 1000)", False)])
def test_players_in_the_sandbox(project, tmp_path, monkeypatch, body, is_policy):
    """Bug: a player blocks the grader, a policy that ignores the labels has points, or all labels cannot be used."""
    monkeypatch.setattr(host, "SECONDS", 2 if "sleep" in body else 30)
    monkeypatch.setattr(host, "GAMES", 1)
    (tmp_path / "open_end.py").write_text(f"def train(game):\n    {body}\n")
    results = grade.Results(tmp_path / "results.json", host.LINES, "")
    host.grade(project, tmp_path, "seed", results)
    assert results.tests[0]["score"] == results.leaderboard[0]["value"] == 0
    assert ("no policy" not in results.tests[0]["output"]) == is_policy
    for timer in [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]:
        timer.join(1)  # it has just ended the player; one that waits on would end game 2
        assert not timer.is_alive()


@pytest.mark.slow
def test_the_notebook_runs(out):
    """Bug: a cell calls what is not there, or hack.py goes down where it should climb, or measures from the policy."""
    content = json.loads((out / "tour.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert (content["nbformat"], content["nbformat_minor"], content["cells"][0]["cell_type"]) == (4, 5, "markdown")
    assert content["cells"][1] == dict(id="cell-1", cell_type="code", metadata={}, execution_count=None, outputs=[],
                                       source=code[0].splitlines(keepends=True))
    code.insert(1, f"import pipeline.config\npipeline.config.QUICK = {SMALLEST}")  # a run of seconds
    code.append("import hack\nhack.ROWS, hack.ITERATIONS, kl = 64, 10, hack.exact_kl\n"
                "hack.exact_kl = lambda p, *more: p.wte.weight.requires_grad * kl(p, *more)\nhack.main(folder)\n"
                "print(*[open(folder + '/hack.csv').read().split()[i] for i in (0, 1, -1)])")
    done = subprocess.run([sys.executable, "-c", "\n\n".join(code)], cwd=out, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    name, first, last = done.stdout.split()[-3:]
    first, last = ([float(x) for x in row.split(",")] for row in (first, last))
    assert name == "iteration,score,gold,kl" and (first[0], last[0]) == (0, 10)
    assert abs(first[3]) < 1e-4 < last[3] and last[1] > first[1] + 0.1, done.stdout


def grades(out, number, tmp_path, *more):
    """The rows of grades.csv for the submissions in tmp_path/in."""
    folder = tmp_path / "grades" / str(number)
    collect.main([str(out / f"gradescope-{number}.zip"), str(tmp_path / "in"), str(folder), *more])
    with open(folder / "grades.csv", encoding="utf-8") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def test_a_folder_of_submissions(out, tmp_path, monkeypatch):
    """Bug: a zip is not read, a late submission is not marked, a group has no row, or points are lost on the way."""
    make.write(tmp_path / "in", {"a@b.org/reward.py": "x = 1\n", "notes.txt": "x", "g@h.org.zip": "no zip"})
    make.make_zip(tmp_path / "in" / "c+1@d.org+e@f.org.zip", {"work/reward.py": "x = 1\n"})
    (tmp_path / "in" / "a@b.org" / "link.py").symlink_to(tmp_path / "in" / "notes.txt")
    os.utime(tmp_path / "in" / "a@b.org" / "reward.py", (0, 4_000_000_000))
    seen = {}

    def run(command, **options):
        base = make.Path(command[-1])
        known = json.loads((base / "submission_metadata.json").read_text())
        seen[known["users"][0]["email"]] = known, sorted(path.name for path in (base / "submission").rglob("*.py"))
        assert all(path.is_symlink() for path in (base / "submission").glob("link.py"))  # what it names is not copied
        make.write(base / "results", {"results.json": json.dumps(dict(
            score=3, output=f"late days used: {grade.days_late(known)}.", tests=[
                dict(name="3.1 x", score=3, max_score=4, output="fine")]))})
    monkeypatch.setattr(collect.subprocess, "run", run)
    rows = grades(out, 3, tmp_path, "--due", "2026-03-02 23:59")
    assert list(rows) == ["a@b.org", "c+1@d.org+e@f.org", "g@h.org"]
    late = rows["a@b.org"].pop("late_days")
    assert rows["a@b.org"] == {"student": "a@b.org", "score": "3", "3.1 x": "3"}
    assert int(late) == -(-(4_000_000_000 - datetime.datetime(2026, 3, 2, 23, 59).timestamp()) // 86_400)
    assert [user["email"] for user in seen["c+1@d.org"][0]["users"]] == ["c+1@d.org", "e@f.org"]
    assert seen["c+1@d.org"][1] == ["reward.py"] and seen["g@h.org"][1] == []
    text = (tmp_path / "grades" / "3" / "a@b.org.txt").read_text()
    assert text == f"late days used: {late}.\n\n3.1 x: 3 of 4. fine\n"


@pytest.mark.slow
def test_the_real_grader(tmp_path):
    """Bug: the command make.py fails, a zip lacks a file, or the solution loses points. Other sets are like set 3."""
    out = tmp_path / "out"
    make.write(tmp_path, {"course.json": '{"course": "", "secret": "s"}'})  # other games may give 19.9 points
    subprocess.run([sys.executable, COURSE / "make.py", out], check=True)
    assert {path.stem for path in out.glob("handout/cases/*")} == {problem.key for problem in PROBLEMS}
    done = subprocess.run([sys.executable, out / "handout" / "check.py", "wins"], capture_output=True, text=True)
    assert done.returncode == 1 and "not solved yet (problem 3.9: wins)" in done.stdout, done.stderr
    for name in ("evaluate.py", "open_end.py"):
        make.write(tmp_path / "in", {f"a@b.org/{name}": (out / "solution" / name).read_bytes()})
    row = grades(out, 3, tmp_path)["a@b.org"]
    for problem in SETS[3].problems:
        points = problem.points if problem.file == "evaluate.py" else 0
        assert float(row[f"{problem.number} {problem.key}"]) == points, row
    assert float(grades(out, 7, tmp_path)["a@b.org"]["score"]) == 20
