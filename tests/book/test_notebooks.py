"""Chapters run under papermill; a bad parameter or a failing cell fails the build."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

import build

ROOT = Path(__file__).resolve().parents[2]

PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}

# nbclient and zmq warn of things that are theirs to mend
pytestmark = pytest.mark.filterwarnings("default")


def notebook(path: Path, source: str) -> Path:
    parameters = nbformat.v4.new_code_cell("profile = 'ci'", metadata={"tags": ["parameters"]})
    written = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)], metadata=PYTHON)
    nbformat.write(written, path)
    return path


@pytest.mark.parametrize(
    ("source", "parameters", "error"),
    [("1", {"profil": "ci"}, "has no parameter profil; it has profile"), ("raise ValueError('seen')", {}, "seen")],
)
def test_unknown_parameters_and_failing_cells_fail(tmp_path, source, parameters, error):
    with pytest.raises((ValueError, papermill.PapermillExecutionError), match=error):
        build.execute(notebook(tmp_path / "a.ipynb", source), tmp_path / "out" / "a.ipynb", parameters)


@pytest.mark.parametrize(("given", "allowed"), [("profile", True), ("profil", False)])
def test_papermill_cannot_give_a_chapter_a_parameter_that_it_lacks(tmp_path, given, allowed):
    source = notebook(tmp_path / "a.ipynb", "from cddbook import profiles\nprint(profiles.profile(profile).buffer)")
    message = "there is no parameter profil; the chapter has profile"
    refused = pytest.raises(papermill.PapermillExecutionError, match=message)
    with contextlib.nullcontext() if allowed else refused:
        papermill.execute_notebook(str(source), str(tmp_path / "out.ipynb"), {given: "quick"}, progress_bar=False)


def test_all_parameters_are_recorded_and_the_source_is_untouched(tmp_path):
    source = notebook(tmp_path / "a.ipynb", "print(profile)")
    before = source.read_bytes()
    executed = build.execute(source, tmp_path / "out" / "a.ipynb", {})
    assert executed.metadata.papermill.parameters == {"profile": "ci"}
    assert source.read_bytes() == before


STUDIES = sorted(ROOT.glob("notebooks/0[3-6]*.ipynb"))
PAGES = [ROOT / "book" / f"{name}.md" for name in ("intro", "claims", "limits")]


def test_every_figure_of_a_study_names_the_command_of_its_record():
    commands = (ROOT / "book" / "record.sh").read_text()
    for path in STUDIES:
        figures = (cell.metadata.get("mystnb", {}).get("figure") for cell in nbformat.read(path, as_version=4).cells)
        for caption in (figure["caption"] for figure in figures if figure):
            names = re.findall(r"`book/record.sh ROOT RUNS ([\w-]+)`", caption)
            assert names or caption.startswith("This build"), caption
            assert all(f"\n{name}() {{" in commands for name in names), caption


@pytest.mark.parametrize("path", [*STUDIES, *PAGES], ids=lambda path: path.stem)
def test_no_page_types_a_measured_number(path):
    """Percentages and points come from records, through functions; only levels of confidence are typed."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        looks = [cell.metadata.get("mystnb", {}) for cell in cells]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        text += "".join(look["figure"]["caption"] + look["image"]["alt"] for look in looks if look)
    assert set(re.findall(r"\d[\d.,]* ?(?:%|points?\b|times\b|hours?\b)", text)) <= {"95 %"}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_documented_lines_run_as_written(path, tmp_path):
    first = nbformat.read(path, as_version=4).cells[0].source
    words = shlex.split(re.search(r"papermill notebooks/.*?(?=`|$)", first, re.MULTILINE).group())
    words[0] = str(Path(sys.executable).with_name("papermill"))
    words[words.index("out.ipynb")] = str(tmp_path / "out.ipynb")
    subprocess.run([*words, "-p", "profile", "ci"], cwd=ROOT, check=True, capture_output=True)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [cell for cell in cells if "figure" in cell.metadata.get("mystnb", {})]
    assert all(["image/png" in output.get("data", {}) for output in cell.outputs] == [True] for cell in figures)
    if path.stem == "05_concurrent_matching":
        assert any("K = 3" in str(output.get("data", {}).get("text/html")) for output in outputs)
        (control,) = (cell for cell in cells if "live_slider" in cell.source)
        assert len(control.outputs) == 1  # the widget, and no picture of its own that would never change
