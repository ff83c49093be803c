"""Facts about the repository that must stay true: imports, requirements, links."""

import ast
import re
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LESSONS = ("checks data tokenizer world model sft reward ppo grpo dpo mdp lesson estimators evaluate robust "
           "pretrained micro").split()
PROGRAM = "errors files export config diagnose pairs own run scores report episode page stages folder".split()
ORDER = [*LESSONS, *[f"pipeline.{name}" for name in PROGRAM], "minirlhf"]
WINGS = ("studies", "bench", "course", "examples", "tests")
OPTIONAL = {"transformers", "tokenizers", "peft"}  # imported where they are used
MODULES = [path for path in (*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("pipeline/*.py")))
           if path.name != "__init__.py"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("course/**/*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    return name_of(path).removesuffix(".py").replace("/", ".")


def imported(path):
    """The modules that a file imports, in functions too. A relative import is ""."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # may be a module of a package
    return names


def tops(names):
    return {name.split(".")[0] for name in names}


def test_every_module_has_its_place_in_the_order():
    """Bug: a new module is at the root, and nobody knows when to read it."""
    assert {module_of(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    """Bug: a lesson needs the program, a module one that is read later, or the core the studies or the course."""
    name, names = module_of(path), imported(path)
    assert not names & set(ORDER[ORDER.index(name):])
    assert not tops(names) & {*WINGS, ""}
    assert name not in LESSONS or "pipeline" not in tops(names)
    if name == "micro":  # one page, and torch alone
        assert tops(names) <= {"torch"} | sys.stdlib_module_names and path.read_text("utf-8").count("\n") <= 200


def test_the_core_needs_its_dependencies_only():
    """Bug: a module needs a package that is not installed with the project."""
    found = set.union(*[tops(imported(path)) for path in MODULES]) - sys.stdlib_module_names - tops(ORDER)
    declared = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    assert found <= declared | OPTIONAL


def test_requirements_agree_with_the_project():
    """Bug: `pip install -r` and the project itself ask for different packages."""
    lines = {name: (ROOT / name).read_text(encoding="utf-8").splitlines()
             for name in ("requirements.txt", "requirements-dev.txt")}
    assert lines["requirements.txt"] == PROJECT["dependencies"]
    assert lines["requirements-dev.txt"] == ["-r requirements.txt", *PROJECT["optional-dependencies"]["dev"]]


def test_the_help_has_the_order_of_the_imports():
    """Bug: the help names another reading order than the imports have."""
    order = re.search(r"Read in this order: ((?:\w+\.py,?\s*)+)", (ROOT / "minirlhf.py").read_text("utf-8"))[1]
    names = [name.removesuffix(".py") for name in re.findall(r"\w+\.py", order)]
    assert names == sorted(names, key=ORDER.index) and len(names) > 4


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    """Bug: a link of the README, of a page in docs/ or of the course leads to a file that was renamed."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), link
