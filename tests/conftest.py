"""What all tests share: one thread, no progress bars, and a small buffer of real digits."""

import os

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for the notebooks' kernels too: threads that wait for a core are slow

from pathlib import Path

import hypothesis
import pytest
import torch

import cddlib

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
    return {
        "width": 8,
        "window_end": 4,
        "iterations": 6,
        "student_steps": 5,
        "validate_every": 3,
        "evaluation_epochs": 5,
        "checkpoint_every": 2,
    }
