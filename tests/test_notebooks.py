"""Chapters run under papermill; a bad parameter or a failing cell fails the build."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parent.parent

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


def test_unknown_parameters_are_refused(build, tmp_path):
    with pytest.raises(ValueError, match="has no parameter profil; it has profile"):
        build.execute(notebook(tmp_path / "a.ipynb", "1"), tmp_path / "out" / "a.ipynb", {"profil": "ci"})


def test_a_failing_cell_fails(build, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="must be seen"):
        build.execute(notebook(tmp_path / "a.ipynb", "raise ValueError('must be seen')"), tmp_path / "o.ipynb", {})


def test_all_parameters_are_recorded_and_the_source_is_untouched(build, tmp_path):
    source = notebook(tmp_path / "a.ipynb", "print(profile)")
    before = source.read_bytes()
    executed = build.execute(source, tmp_path / "out" / "a.ipynb", {})
    assert executed.metadata.papermill.parameters == {"profile": "ci"}
    assert source.read_bytes() == before


def test_the_documented_line_turns_k(tmp_path):
    line = ["notebooks/05_concurrent_matching.ipynb", str(tmp_path / "out.ipynb"), "-p", "segments", "3"]
    papermill_command = str(Path(sys.executable).with_name("papermill"))
    subprocess.run([papermill_command, *line, "-p", "profile", "ci"], cwd=ROOT, check=True, capture_output=True)
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    assert any("K = 3" in str(output.get("data", {}).get("text/html")) for output in outputs)
