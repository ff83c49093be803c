"""Facts about the repository that must stay true: sizes, line lengths, imports, requirements, links."""

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
ORDER = ("data pipeline.tokens pipeline.pairs checks pipeline.progress world model reward ppo grpo dpo mdp lesson "
         "estimators evaluate "
         "robust pipeline.limits pipeline.config pipeline.folder pipeline.run pipeline.report pipeline.views "
         "pipeline.page pipeline.stages minirlhf").split()
ROOT_MODULES = sorted(ROOT.glob("*.py"))
MODULES = ROOT_MODULES + [path for path in sorted(ROOT.glob("pipeline/*.py")) if path.name != "__init__.py"]
WINGS = ("studies", "bench", "course", "tests")
SOURCES = MODULES + [path for folder in WINGS for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [ROOT / "README.md", ROOT / "course" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    return name_of(path).removesuffix(".py").replace("/", ".")


def imported(path):
    """The modules that a file imports, in functions too, but not where it is run as a program."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = [node for node in tree.body if not ast.unparse(node).startswith("if __name__ == '__main__':")]
    names = set()
    for part in body:
        for node in ast.walk(part):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
                names.update(f"pipeline.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
    return names


def tops(names):
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_read_in_one_sitting(path):
    """A file of the core grows until nobody reads it."""
    limit = 260 if path.name == "model.py" else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_every_module_has_its_place_in_the_order():
    """A new module stands at the root, and nobody knows when to read it."""
    assert {module_of(path) for path in MODULES} == set(ORDER)


def test_the_core_is_read_in_an_afternoon():
    """The lessons at the root grow: what a program needs beside them belongs into pipeline/."""
    on_top = ("grpo.py", "estimators.py")
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT_MODULES if path.name not in on_top]
    assert sum(lines) <= 2200


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    """A module imports one that is read later, or the core needs the studies or the benchmark."""
    names = imported(path)
    later = ORDER[ORDER.index(module_of(path)):]
    assert not names & set(later)
    assert not tops(names) & {*WINGS, ""}  # "" is a relative import


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_line_is_longer_than_120_characters(path):
    """A line does not fit a laptop's screen beside a terminal."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, start=1) if len(line) > 120] == []


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").split("\n")[:-1]


def test_requirements_agree_with_the_project(project):
    """`pip install -r` and `pip install -e .` install different things."""
    assert lines_of("requirements.txt") == project["project"]["dependencies"]
    dev = project["project"]["optional-dependencies"]["dev"]
    assert lines_of("requirements-dev.txt") == ["-r requirements.txt", *dev]


def test_an_installed_project_has_all_modules(project):
    """A module or a package is left out of the installed project, so that its first import fails."""
    setuptools = project["tool"]["setuptools"]
    assert sorted(setuptools["py-modules"]) == [path.stem for path in ROOT_MODULES]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(setuptools["packages"]) == packages
    pages = {name: [path.name for path in (ROOT / name).glob("*.html")] for name in packages}
    assert setuptools["package-data"] == {name: found for name, found in pages.items() if found}


def test_the_core_needs_its_dependencies_only(project):
    """A module needs a package that is not installed with the project."""
    found = set()
    for path in MODULES:
        found |= tops(imported(path))
    found -= sys.stdlib_module_names | tops(ORDER)
    declared = {re.match(r"[\w-]+", line)[0] for line in project["project"]["dependencies"]}
    assert found <= declared | {"filelock", "regex"}  # come with torch and tiktoken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    """A link of the README or of a page in docs/ leads to a file that was renamed."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            target = (page.parent / link.split("#")[0]).resolve()
            assert target.exists(), link


def test_the_help_has_the_order_of_the_imports():
    """The help names another reading order than the imports have."""
    text = (ROOT / "minirlhf.py").read_text(encoding="utf-8")
    order = re.search(r"Read in this order: ((?:\w+\.py(?:, |\s)?)+)", text)[1]
    names = [name.removesuffix(".py") for name in re.findall(r"\w+\.py", order)]
    assert names == sorted(names, key=ORDER.index) and len(names) > 4


def test_the_readme_stays_short():
    """The README grows until nobody reads it."""
    assert len((ROOT / "README.md").read_bytes()) <= 9000
