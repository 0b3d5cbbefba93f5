"""The wheel works on a bare image, with PyTorch and little else; what needs another package says which to install."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("torchjd", "sklearn", "scipy", "matplotlib", "seaborn", "pandas", "pyarrow", "papermill")
SLOW = ("tyro", "torchvision", "torch._dynamo")
"""Packages that are there, and that whoever does not use them does not wait for."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds that was built from the source distribution."""
    built, source = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "_build", "runs", "*.egg-info", "__pycache__"))
    build = [Path(sys.executable).with_name("uv"), "build", "--no-build-isolation", "--offline", "--python"]
    done = subprocess.run([*build, sys.executable, "--out-dir", built, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    assert list(built.glob("*.tar.gz"))
    zipfile.ZipFile(path).extractall(built / "installed")
    return built / "installed"


@pytest.fixture(scope="module")
def said(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this file, as a program in a process without those packages, says about itself."""
    folder = tmp_path_factory.mktemp("bare")
    command, environment = [sys.executable, __file__, folder], {**os.environ, "PYTHONPATH": str(wheel)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_what_is_tested_is_the_wheel(wheel: Path, said: dict[str, Any]) -> None:
    assert Path(said["file"]).is_relative_to(wheel)


def test_importing_loads_no_more_than_is_needed(said: dict[str, Any]) -> None:
    assert said["loaded by import"] == []
    assert said["loaded by --help"] == ["tyro"]


def test_experts_are_trained_and_a_set_is_distilled_and_evaluated(said: dict[str, Any]) -> None:
    assert said["experts"] == 1
    assert said["result"]["iterations_skipped"] == 0
    assert said["summary"].keys() == {"synthetic", "random_real", "full"}


def test_what_needs_a_package_says_which(said: dict[str, Any]) -> None:
    assert said["pcgrad"] == (
        "combine is 'pcgrad', which needs the package torchjd; "
        'install it with `pip install "torchjd[cagrad,quadprog-projector]"`.'
    )
    assert said["digits"] == (
        "the data set 'digits' needs the package scikit-learn; install it with `pip install \"scikit-learn\"`."
    )
    assert said["command line"] == [
        1,
        'cddlib: the command line needs the package tyro; install it with `pip install "tyro"`.\n',
    ]


class Finder(PathFinder):
    """Finds the modules of all packages but those that are absent."""

    @classmethod
    def find_spec(cls, name: str, *where: Any) -> ModuleSpec | None:
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *where)


def loaded() -> list[str]:
    """The slow packages that are loaded."""
    return [name for name in SLOW if name in sys.modules]


def refusal(call: Callable[[], object]) -> str | None:
    """The sentence that a call is refused with."""
    from cddlib import UserError

    try:
        call()
    except UserError as error:
        return str(error)
    return None


def main(folder: Path) -> None:
    """Do everything that a bare image is for, and print what came of it."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
    found: dict[str, Any] = {}
    import cddlib

    found["file"] = cddlib.__file__
    found["loaded by import"] = loaded()
    from cddlib import cli

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(["--help"])
    found["loaded by --help"] = loaded()
    sys.modules["tyro"] = None
    with contextlib.redirect_stderr(io.StringIO()) as error:
        found["command line"] = [cli.main(["recipes"]), error.getvalue()]

    import torch

    from cddlib.runtime.files import read_json, write_tensors

    rng = cddlib.generator("bare")
    tensors = {}
    for part, count in (("train", 30), ("test", 9)):
        tensors[f"{part}_images"] = torch.randint(256, (count, 3, 8, 8), generator=rng, dtype=torch.uint8)
        tensors[f"{part}_labels"] = torch.arange(count) % 3
    write_tensors(folder / "cifar10.safetensors", tensors, "dataset", {"classes": ["a", "b", "c"]}, digests=False)
    here: dict[str, Any] = {"root": folder, "device": "cpu"}
    network = {"width": 4, "depth": 1}
    experts = cddlib.buffer_recipe("cifar10", experts=1, epochs=4, **network)
    buffer = cddlib.train_buffer(experts, folder / "buffer", **here)
    found["experts"] = len(buffer.experts)
    config = {"segments": 2, "iterations": 2, "student_steps": 2, "window_end": 2, "evaluation_epochs": 2, **network}
    recipe = cddlib.distill_recipe("mtt", "cifar10", 1, **config)
    cddlib.distill(recipe, buffer, folder / "run", **here)
    found["result"] = read_json(folder / "run" / "result.json")
    found["summary"] = cddlib.evaluate_run(folder / "run", runs=1, **here)["summary"]
    other = cddlib.distill_recipe("mtt", "cifar10", 1, combine="pcgrad", **config)
    found["pcgrad"] = refusal(lambda: cddlib.distill(other, buffer, folder / "other", **here))
    found["digits"] = refusal(lambda: cddlib.load("digits"))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
