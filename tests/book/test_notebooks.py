"""Chapters run under papermill; a bad parameter or a failing cell fails the build."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}

# nbclient and zmq warn of things that are theirs to mend
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="session")
def build():
    """book/build.py as a module."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(path: Path, source: str) -> Path:
    cells = [
        nbformat.v4.new_code_cell("profile = 'ci'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    written = nbformat.v4.new_notebook(cells=cells, metadata=PYTHON)
    nbformat.write(written, path)
    return path


@pytest.mark.parametrize(
    ("source", "parameters", "error"),
    [("1", {"profil": "ci"}, "has no parameter profil; it has profile"), ("raise ValueError('seen')", {}, "seen")],
)
def test_unknown_parameters_and_failing_cells_fail(build, tmp_path, source, parameters, error):
    with pytest.raises((ValueError, papermill.PapermillExecutionError), match=error):
        build.execute(notebook(tmp_path / "a.ipynb", source), tmp_path / "out" / "a.ipynb", parameters)


def test_all_parameters_are_recorded_and_the_source_is_untouched(build, tmp_path):
    source = notebook(tmp_path / "a.ipynb", "print(profile)")
    before = source.read_bytes()
    executed = build.execute(source, tmp_path / "out" / "a.ipynb", {})
    assert executed.metadata.papermill.parameters == {"profile": "ci"}
    assert source.read_bytes() == before


def documented_line(path: Path) -> list[str]:
    """The papermill line of a chapter's first cell, split into words."""
    first = nbformat.read(path, as_version=4).cells[0].source
    return shlex.split(re.search(r"papermill notebooks/.*?(?=`|$)", first, re.MULTILINE).group())


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_documented_lines_run_as_written(path, tmp_path):
    words = documented_line(path)
    words[0] = str(Path(sys.executable).with_name("papermill"))
    words[words.index("out.ipynb")] = str(tmp_path / "out.ipynb")
    subprocess.run([*words, "-p", "profile", "ci"], cwd=ROOT, check=True, capture_output=True)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    if path.stem == "05_concurrent_matching":
        assert any("K = 3" in str(output.get("data", {}).get("text/html")) for output in outputs)
        (control,) = (cell for cell in cells if "ipywidgets.interact" in cell.source)
        assert len(control.outputs) == 1  # the widget, and no picture of its own that would never change
