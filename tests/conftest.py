"""What all tests share: one thread, no progress bars, and a small buffer of real digits."""

import os

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the notebooks' kernels too: threads that wait for a core are slow

import collections
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hypothesis
import pytest
import torch
from children import main
from works import Works

import cddbook.__main__ as studies
import cddlib
from cddbook.records import write_record
from cddlib import cli, commands
from cddlib.runtime.provenance import Recorder

torch.set_num_threads(1)  # the test processes share the cores, and every network here is tiny
hypothesis.settings.register_profile("cddlib", deadline=None, derandomize=True)
hypothesis.settings.load_profile("cddlib")

TINY = {"width": 8, "experts": 2, "epochs": 6}
"""Overrides of the digits' buffer recipe that train in a second."""


@pytest.fixture(scope="session")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> cddlib.Buffer:
    """Two experts of six epochs on the digits, width 8."""
    folder: Path = tmp_path_factory.mktemp("buffer")
    return cddlib.train_buffer(cddlib.buffer_recipe("digits", **TINY), folder, device="cpu")


@pytest.fixture(scope="session")
def quick() -> dict[str, object]:
    """Overrides of the digits' distillation recipe that run in a second on `buffer`."""
    short = {"width": 8, "window_end": 4, "iterations": 6, "student_steps": 5, "validate_every": 3}
    return {**short, "evaluation_epochs": 5, "checkpoint_every": 2}


@pytest.fixture(scope="session")
def recipe(quick: dict[str, Any]) -> Callable[..., cddlib.DistillConfig]:
    """Configurations of a second; `validate_every=0` for those that need the last iterate."""
    return lambda **overrides: cddlib.distill_recipe("contra", **{**quick, "segments": 2, **overrides})


@pytest.fixture(scope="session")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    """Command lines that tests kill and starve."""
    return Works(tmp_path_factory.mktemp("works"))


@pytest.fixture
def reached(buffer: cddlib.Buffer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[list[str]], None]:
    """Checks that a command line parses and reaches the work behind it, of which nothing is done."""
    stop = Mock(side_effect=cddlib.UserError("reached"))
    names = ("prepare", "train_buffer", "distill", "evaluate_run", "plan", "recipes_table", "verify", "read_json")
    names += ("import_buffer", "import_set", "export_png", "export_set", "export_parquet", "export_buffer")
    for module, name in [*((commands, name) for name in names), (studies.study, "run_study"), (studies, "collect")]:
        monkeypatch.setattr(module, name, stop)
    long = copy.copy(buffer)
    long.epochs = 1000
    for module in (cli, commands, studies):
        monkeypatch.setattr(module, "Buffer", lambda folder: long)
    monkeypatch.setattr(commands.SyntheticSet, "load", lambda path: None)

    def check(words: list[str]) -> None:
        main(words)
        assert capsys.readouterr().err == "cddlib: reached\n", words

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--records book/results` keeps what tests measured as the book's records; `make soak` says how."""
    parser.addoption("--records", type=Path, default=None, help="folder for the records of tests that measure")


Repeats = Callable[[Any, Any], Any]
Note = Callable[..., None]


@pytest.fixture(scope="module", params=["quick", pytest.param("soak", marks=pytest.mark.soak)])
def repeats(request: pytest.FixtureRequest) -> Repeats:
    """`repeats(2, 15)` is 2 in `make test` and 15 in `make soak`: every test that uses it belongs to both."""
    return lambda quick, soak: soak if request.param == "soak" else quick


@pytest.fixture(scope="module")
def note(request: pytest.FixtureRequest, repeats: Repeats) -> Iterator[Note]:
    """`note("kills", work="distill")` adds an entry to a list of the record: `tests/test_x.py` writes `x.json`."""
    recorder = Recorder(torch.device("cpu"))
    noted: dict[str, Any] = collections.defaultdict(list)
    yield lambda what, **entry: noted[what].append(entry)
    folder = request.config.getoption("--records")
    if folder is not None:
        write_record(folder / f"{request.path.stem.removeprefix('test_')}.json", {**noted, **recorder.report()})


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole book in profile ci."""
    output = tmp_path_factory.mktemp("book")
    build = Path(__file__).resolve().parents[1] / "book" / "build.py"
    command = [sys.executable, build, "--profile", "ci", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output / "_build" / "html"
