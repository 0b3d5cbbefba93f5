"""A golden trajectory: the losses of a small buffer and of a few iterations of distillation on it.

    python tests/golden/write.py

rewrites digits.json. Do it only when a change of the numbers is meant, and say in the commit why they change.
`tests/test_golden.py` computes the same and compares.

The activation is the sigmoid: with ReLU a change of the first parameters by 1e-6, which is how processors differ,
moves the losses by 3e-3, because the digits' background is flat and a whole one passes the kink at once; with the
sigmoid it moves them by less than 1e-6.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from conftest import TINY

import cddlib
from cddbook.records import write_record
from cddlib.runtime.run_folder import read_metrics

GOLDEN = Path(__file__).with_name("digits.json")
BUFFER: dict[str, Any] = {**TINY, "activation": "sigmoid"}
SHARED: dict[str, Any] = {"width": 8, "activation": "sigmoid", "window_end": 4, "student_steps": 5, "iterations": 4}
SHARED |= {"lr_step_size": 1e-3, "validate_every": 0}
RUNS: dict[str, dict[str, Any]] = {
    "mtt": {"method": "mtt", "ipc": 1},
    "contra": {"method": "contra", "ipc": 2, "segments": 3, "labels": "learned", "student_batch": 8, "balance": 1.0},
}


def distillation(buffer: cddlib.Buffer, name: str, folder: Path) -> dict[str, list[Any]]:
    """What each iteration of the run `name` matched, its losses, and the step size that it learned."""
    cddlib.distill(cddlib.distill_recipe(data="digits", **RUNS[name], **SHARED), buffer, folder, device="cpu")
    lines = [line for line in read_metrics(folder) if "loss" in line]
    return {key: [line[key] for line in lines] for key in ("matched", "anchor", "losses", "step_size")}


def golden(folder: Path) -> dict[str, Any]:
    """Everything, computed in `folder`."""
    buffer = cddlib.train_buffer(cddlib.buffer_recipe("digits", **BUFFER), folder / "buffer", device="cpu")
    return {
        "train_loss": [expert["train_loss"] for expert in buffer.experts],
        **{name: distillation(buffer, name, folder / name) for name in RUNS},
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        write_record(GOLDEN, golden(Path(temporary)))
