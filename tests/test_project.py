"""The repository agrees with itself: rooms, sizes, versions, documented commands, stripped notebooks."""

import ast
import functools
import graphlib
import itertools
import json
import re
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import cddlib
from cddlib import cli
from cddlib.runtime.run_folder import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = {path.stem: json.loads(path.read_text())["cells"] for path in NOTEBOOKS}

# --- Rooms and sizes --------------------------------------------------------------------------------------------

LONGEST_FILE, LONGEST_FUNCTION = 300, 50
MOST_LINES = {"cddlib": 7_522, "book/cddbook": 2_480, "tests": 12_849}  # lower them when the house shrinks
TREES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): ast.parse(path.read_text())
    for path in sorted(ROOT.glob("cddlib/**/*.py"))
}
"""The modules of the library by name."""


def imports(name: str) -> set[str]:
    """The modules that a module imports, anywhere in it; of cddlib by their full names."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            of_names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= of_names & TREES.keys() or {str(node.module)}
    return found


def test_rooms_import_only_from_those_before_and_nothing_from_the_book_or_the_tests():
    listed = re.search(r"importing only from those before it: (.*?)\.", " ".join(cddlib.__doc__.split()))
    order = listed.group(1).split(", ")
    rooms = {name: name.split(".")[1] for name in TREES}
    entrances = {"__init__", "__main__"}
    assert set(rooms.values()) == {*order, *entrances} and len(order) == len(set(order))
    for name, room in rooms.items():
        assert not {imported.split(".")[0] for imported in imports(name)} & {"cddbook", "book", "tests", "children"}
        for imported in imports(name) & TREES.keys():
            other = imported.split(".")[1]
            assert room in (other, *entrances) or order.index(other) < order.index(room), (name, imported)


def test_no_modules_import_each_other_in_a_circle():
    assert list(graphlib.TopologicalSorter({name: imports(name) & TREES.keys() for name in TREES}).static_order())


def test_files_of_the_library_are_short():
    lengths = {str(path): len(path.read_text().splitlines()) for path in ROOT.glob("cddlib/**/*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def length(function: ast.FunctionDef) -> int:
    """Lines of a function but its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    return function.end_lineno - function.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)


def test_functions_of_the_library_are_short():
    functions = [
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    lengths = {f"{name}.{node.name}": length(node) for name, node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("folder", MOST_LINES)
def test_the_whole_is_small(folder):
    texts = (path.read_text() for path in ROOT.glob(f"{folder}/**/*.py"))
    assert sum(len(text.splitlines()) for text in texts) <= MOST_LINES[folder]


# --- Versions ---------------------------------------------------------------------------------------------------


def locked_versions() -> dict[str, str]:
    """Versions in requirements.lock for Python 3.12 on Linux, environment.yml's platform."""
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
    machine = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "os_name": "posix"}
    machine |= {"platform_system": "Linux", "platform_machine": "x86_64"}
    needed = [line for line in lines if line.marker is None or line.marker.evaluate(machine)]
    return {line.name.lower(): str(line.specifier).removeprefix("==") for line in needed}


def direct_requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for."""
    return list(map(Requirement, itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())))


def test_the_lock_is_exact_and_satisfies_pyproject():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+( ; .+)?", line), line
    versions = locked_versions()
    for requirement in direct_requirements():
        assert requirement.specifier.contains(versions[requirement.name.lower()], prereleases=True), requirement


def test_the_environment_has_the_locked_versions():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    pins = [Requirement(line) for line in lines if not line.startswith("--")]
    versions = locked_versions()
    wanted = {r.name.lower(): f"=={versions[r.name.lower()]}" for r in direct_requirements()}
    assert {pin.name.lower(): str(pin.specifier) for pin in pins} == wanted
    assert "--constraint requirements.lock" in lines


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


# --- Notebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_sources_are_stripped(path):
    notebook = json.loads(path.read_text())
    assert not notebook["metadata"].keys() & {"papermill", "widgets"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert all("papermill" not in cell["metadata"] for cell in notebook["cells"])
    assert "parameters" in code[0]["metadata"]["tags"]
    assert "papermill notebooks/" + path.name in "".join(notebook["cells"][0]["source"])


# --- Documented commands ----------------------------------------------------------------------------------------

PAGES = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("book/*.md"))]
PAGES += ["\n".join("".join(cell["source"]) for cell in cells) for cells in CELLS.values()]
PROGRAMS = r"(?:cddlib|python -m cddbook|torchrun .*? -m cddlib) +"


def documented(pattern: str) -> list[str]:
    """Lines of the README and the book that begin with `pattern`, joined where a backslash breaks them."""
    lines = [line.strip() for page in PAGES for line in re.sub(r"\\\n\s*", " ", page).splitlines()]
    return sorted({line for line in lines if re.match(pattern, line)})


def complete_spans() -> list[str]:
    """Commands within sentences that name all that they need."""
    spans = {" ".join(span.split()) for page in PAGES for span in re.findall(rf"`({PROGRAMS}[^`]+)`", page)}
    return sorted(span for span in spans if re.search(" (data \\w+|--out|--to)", span))


def test_no_line_of_code_is_cut_off():
    """The pages show 88 columns."""
    blocks = [block for page in PAGES for block in re.findall(r"^```.*?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    blocks += ["".join(c["source"]) for cells in CELLS.values() for c in cells if c["cell_type"] == "code"]
    blocks += [path.read_text() for path in (ROOT / "book" / "examples").iterdir()]
    code = [line for block in blocks for line in block.splitlines()]
    assert len(code) > 500
    assert [line for line in code if len(line) > 88] == []


@pytest.mark.parametrize("line", documented("papermill "))
def test_documented_papermill_lines_name_parameters_that_exist(line):
    words = shlex.split(line, comments=True)
    cells = json.loads((ROOT / words[1]).read_text())["cells"]
    parameters = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    for flag, name in itertools.pairwise(words):
        assert flag != "-p" or re.search(rf"^{name} = ", parameters, re.MULTILINE)


@pytest.mark.parametrize("line", documented(f"{PROGRAMS}[a-z]") + complete_spans())
def test_documented_commands_parse(line, reached):
    reached(shlex.split(re.sub(f"^{PROGRAMS}", "", line), comments=True))


@pytest.fixture
def small_digits(monkeypatch, tmp_path):
    """The digits' recipes made small, in an empty folder: examples run as they are written."""
    small = {"iterations": 2, "student_steps": 2, "evaluation_epochs": 2, "validate_every": 1, "width": 8}
    for module in (cddlib, cli):
        monkeypatch.setattr(module, "distill_recipe", functools.partial(cddlib.distill_recipe, **small))
        monkeypatch.setattr(module, "buffer_recipe", functools.partial(cddlib.buffer_recipe, width=8, experts=2))
    monkeypatch.chdir(tmp_path)


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if containing in block)


def test_readme_commands(small_digits, capsys):
    for line in readme_block("bash", "cddlib buffer").replace("\\\n", "").splitlines():
        if line.startswith("cddlib"):
            assert cli.main(shlex.split(line)[1:]) == 0, line
    assert "random real images" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["README", "docstring"])
def test_examples_in_python_run(small_digits, place):
    (indented,) = (paragraph for paragraph in cddlib.__doc__.split("\n\n") if paragraph.startswith("    "))
    example = readme_block("python", "import cddlib") if place == "README" else textwrap.dedent(indented)
    assert len(example.splitlines()) <= 14
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["record"]["summary"]["synthetic"]["runs"] == 3


DEVELOPING = (ROOT / "book" / "developing.md").read_text()


def test_every_file_that_the_page_for_developers_names_is_there():
    files = re.findall(r"`((?:cddlib|book)/[\w/]+\.py)`", DEVELOPING)
    assert len(set(files)) >= 11
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_code_for_developers_runs_and_its_hook_writes_a_number(buffer, quick, tmp_path):
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DEVELOPING, re.DOTALL):
        exec(block, names)
    config = cddlib.distill_recipe("contra", "digits", **quick, segments=2)
    cddlib.distill(config, buffer, tmp_path, hooks=names["hooks"], device="cpu")
    assert [line["iteration"] for line in read_metrics(tmp_path) if "contrast" in line] == [0, 5, 6]
    assert json.loads((tmp_path / "config.json").read_text())["contrast_every"] == 5
    assert list((tmp_path / "tensorboard").glob("events*"))
