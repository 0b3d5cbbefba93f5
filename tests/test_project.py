"""The repository agrees with itself: versions, import order, documented commands, stripped notebooks."""

import ast
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from cddlib import cli, commands
from cddlib.methods import recipes
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = """
files runs ranks data prepare preprocessing augment networks steps convnet_steps engine graphs training curriculum
trajectory buffer segments matching combine consolidate synthetic torch_files exchange export correlation continual
evaluate state concurrent distill verify methods recipes plan study findings claims method_tables figures
study_figures reliability_figures speed_figures gpu_figures gpu_runs commands cli __main__
""".split()  # noqa: SIM905 - forty lines as a list


def locked() -> dict[str, str]:
    """Versions in requirements.lock for Python 3.12 on Linux, environment.yml's platform."""
    lines = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
    machine = {
        "python_version": "3.12",
        "python_full_version": "3.12.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
    }
    kept = [line for line in lines if line.marker is None or line.marker.evaluate(machine)]
    return {line.name.lower(): str(line.specifier).removeprefix("==") for line in kept}


def direct_requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in PROJECT["dependencies"] + [text for extra in extras for text in extra]]


def test_lock_is_exact_and_has_no_urls():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+( ; .+)?", line), line
        assert "://" not in line and "@" not in line


def test_lock_satisfies_pyproject():
    versions = locked()
    for requirement in direct_requirements():
        assert requirement.specifier.contains(versions[requirement.name.lower()], prereleases=True), requirement


def test_environment_has_the_locked_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pins = [entry for entry in environment["dependencies"][-1]["pip"] if not entry.startswith("--")]
    versions = locked()
    pinned = {Requirement(pin).name.lower(): str(Requirement(pin).specifier) for pin in pins}
    assert pinned == {r.name.lower(): f"=={versions[r.name.lower()]}" for r in direct_requirements()}
    assert "--constraint requirements.lock" in environment["dependencies"][-1]["pip"]


def test_one_version_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_modules_import_only_from_those_above():
    assert {path.stem for path in (ROOT / "cddlib").glob("*.py")} == {*MODULES, "__init__"}
    for position, module in enumerate(MODULES):
        tree = ast.parse((ROOT / "cddlib" / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cddlib":
                names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                assert set(names) <= set(MODULES[:position]), (module, names)


def test_modules_are_short():
    for path in (ROOT / "cddlib").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 420, path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_sources_are_stripped(path):
    notebook = json.loads(path.read_text())
    assert "papermill" not in notebook["metadata"] and "widgets" not in notebook["metadata"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert all("papermill" not in cell["metadata"] for cell in notebook["cells"])
    assert "parameters" in code[0]["metadata"]["tags"]
    assert "papermill notebooks/" + path.name in "".join(notebook["cells"][0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_have_captions_and_alt_texts(path):
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if (
            cell["cell_type"] == "code"
            and re.search(r"^(study_)?figures\.\w+\(", source, re.MULTILINE)
            and source.endswith(";")
        ):
            described = cell["metadata"]["mystnb"]
            assert len(described["figure"]["caption"]) > 40 and len(described["image"]["alt"]) > 40


def documented(pattern: str) -> list[str]:
    """Lines of the README, the how-to and the chapters that match `pattern`."""
    pages = [
        ROOT / "README.md",
        *(ROOT / "book" / f"{name}.md" for name in ("how-to-run", "methods", "adding-a-method")),
    ]
    texts = [page.read_text() for page in pages]
    texts += ["".join(c["source"]) for n in NOTEBOOKS for c in json.loads(n.read_text())["cells"]]
    return sorted(
        {line.strip().split("   #")[0] for text in texts for line in text.splitlines() if re.match(pattern, line)}
    )


def test_documented_papermill_lines_name_parameters_that_exist():
    lines = documented(r" *papermill ")
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        cells = json.loads((ROOT / words[1]).read_text())["cells"]
        parameters = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
        for flag, name in itertools.pairwise(words):
            if flag == "-p":
                assert re.search(rf"^{name} = ", parameters, re.MULTILINE), line


def test_documented_commands_parse(buffer, monkeypatch, capsys):
    def reached(*arguments, **keywords):
        raise UserError("reached")

    names = ("prepare", "train_buffer", "distill", "evaluate_run", "collect", "run_study", "plan", "recipes_table")
    names += ("import_buffer", "import_set", "export_png", "export_set", "export_parquet", "export_buffer", "verify")
    for name in names:
        monkeypatch.setattr(commands, name, reached)
    for module in (cli, commands):
        monkeypatch.setattr(module, "Buffer", lambda folder: buffer)
    monkeypatch.setattr(commands.SyntheticSet, "load", lambda path: None)
    monkeypatch.setattr(commands, "_network_of", lambda folder: NetworkConfig())
    lines = documented(r" *cddlib [a-z-]+ ")
    assert len(lines) >= 10
    for line in lines:
        cli.main(shlex.split(line)[1:])
        assert capsys.readouterr().err == "cddlib: reached\n", line


@pytest.fixture
def small_digits(monkeypatch, tmp_path):
    """The digits' recipes made small, in an empty folder: the README's lines run as they are written."""
    small = {"iterations": 2, "student_steps": 2, "evaluation_epochs": 2, "validate_every": 1}
    monkeypatch.setattr(recipes, "_resolve", lambda *a, _resolve=recipes._resolve: (_resolve(*a)[0] | small, None))
    monkeypatch.chdir(tmp_path)


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if containing in block)


def test_readme_commands(small_digits, capsys):
    for line in readme_block("bash", "cddlib buffer").splitlines():
        if line.startswith("cddlib"):
            assert cli.main(shlex.split(line)[1:]) == 0, line
    assert "random real images" in capsys.readouterr().out


def test_readme_python(small_digits):
    block = readme_block("python", "import cddlib")
    assert len(block.splitlines()) <= 14
    names: dict = {}
    exec(block, names)
    assert names["images"].shape == (10, 1, 8, 8)
    assert names["record"]["summary"]["synthetic"]["runs"] == 3


def test_the_committed_record_shows_constant_memory():
    """Growth from N = 10 to N = 80 is the 70 parameter vectors more that are kept, and no graph."""
    measured = json.loads((ROOT / "book" / "results" / "memory.json").read_text())["measurements"]
    above = {(m["implementation"], m["student_steps"]): m["peak_mb"] - m["start_mb"] for m in measured}
    vectors = 70 * 320_010 * 4 / 1e6
    assert above["cddlib", 80] - above["cddlib", 10] < 1.1 * vectors
    assert above["textbook", 80] - above["textbook", 10] > 10 * vectors
