"""The wheel works on a bare image, with PyTorch and little else; what needs another package says which to install."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("torchjd", "sklearn", "scipy", "matplotlib", "seaborn", "pandas", "pyarrow", "papermill")
SLOW = ("tyro", "torchvision", "torch._dynamo")
"""Packages that are there, and that whoever does not use them does not wait for."""


def test_the_wheel_does_everything_without_those_packages_and_waits_for_nothing(tmp_path: Path) -> None:
    """The wheel is built from the source distribution."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "_build", "runs", "*.egg-info", "__pycache__"))
    build = [Path(sys.executable).with_name("uv"), "build", "--no-build-isolation", "--offline", "--python"]
    subprocess.run([*build, sys.executable, "--out-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{installed / 'cddlib'}\n"


def loaded() -> list[str]:
    """The slow packages that are loaded."""
    return [name for name in SLOW if name in sys.modules]


def main(folder: Path) -> None:
    """Do everything that a bare image is for."""
    sys.modules.update(dict.fromkeys(ABSENT))  # importing one fails
    import cddlib

    print(Path(cddlib.__file__).parent)
    assert loaded() == []
    from cddlib import cli

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(["--help"])
    assert loaded() == ["tyro"]
    sys.modules["tyro"] = None
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert cli.main(["recipes"]) == 1
    said = 'cddlib: the command line needs the package tyro; install it with `pip install "tyro"`.\n'
    assert error.getvalue() == said, error.getvalue()

    import pytest
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
    config = {"segments": 2, "iterations": 2, "student_steps": 2, "window_end": 2, "evaluation_epochs": 2, **network}
    recipe = cddlib.distill_recipe("mtt", "cifar10", 1, **config)
    cddlib.distill(recipe, buffer, folder / "run", **here)
    assert read_json(folder / "run" / "result.json")["iterations_skipped"] == 0
    summary = cddlib.evaluate_run(folder / "run", runs=1, **here)["summary"]
    assert summary.keys() == {"synthetic", "random_real", "full"}
    install = 'install it with `pip install "{}"`.'
    said = "combine is 'pcgrad', which needs the package torchjd; "
    with pytest.raises(
        cddlib.UserError, match=re.escape(said + install.format("torchjd[cagrad,quadprog-projector]")) + "$"
    ):
        cddlib.distill(cddlib.replace(recipe, combine="pcgrad"), buffer, folder / "other", **here)
    said = "the data set 'digits' needs the package scikit-learn; "
    with pytest.raises(cddlib.UserError, match=re.escape(said + install.format("scikit-learn")) + "$"):
        cddlib.load("digits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
