"""Recipes: a complete configuration for every (method, data set, IPC).

The methods so far::

    mtt     matching training trajectories (Cazenavette et al. 2022): one segment
    contra  concurrent matching: the same with K segments, in a window at least K wide

MTT's values are those its authors published for CIFAR-10, CIFAR-100 and Tiny ImageNet (dc_benchmark, methods/tm).
ConTra's own are not public: `contra` takes MTT's. The digits' are ours, found on their validation images; other data
sets start from CIFAR-10's, untuned.
"""

import dataclasses
from typing import Any

from cddlib.buffer import BufferConfig
from cddlib.data import check_data_name
from cddlib.distill import DistillConfig
from cddlib.runs import UserError

METHODS = ("mtt", "contra")
CONTRA_SEGMENTS = 4

_DEPTHS = {"tiny_imagenet": 4, "imagefolder": 4}

# (data set, IPC): N, M, T+, synthetic images a step, images' rate, step size's rate, first step size
_MTT: dict[tuple[str, int], tuple[int, int, int, int | None, float, float, float]] = {
    ("cifar10", 1): (50, 2, 2, None, 100.0, 1e-7, 0.01),
    ("cifar10", 10): (30, 2, 20, None, 100.0, 1e-5, 0.001),
    ("cifar10", 50): (30, 2, 40, None, 1000.0, 1e-5, 0.001),
    ("cifar100", 1): (20, 3, 20, None, 1000.0, 1e-5, 0.01),
    ("cifar100", 10): (20, 2, 20, None, 1000.0, 1e-5, 0.01),
    ("cifar100", 50): (80, 2, 40, 125, 1000.0, 1e-5, 0.01),
    ("tiny_imagenet", 1): (10, 2, 10, None, 1e4, 1e-4, 0.01),
    ("tiny_imagenet", 10): (20, 2, 40, 200, 1e4, 1e-4, 0.01),
    ("tiny_imagenet", 50): (20, 2, 40, 300, 1e4, 1e-4, 0.01),
}
_NOT_WHITENED = (("cifar10", 50), ("cifar100", 10))  # by its authors; their buffers then need --no-zca
_DIGITS: dict[str, Any] = {
    "iterations": 100,
    "student_steps": 20,
    "expert_epochs": 2,
    "window_end": 12,
    "lr_images": 30.0,
    "lr_step_size": 1e-5,
    "step_size": 0.05,
    "evaluation_epochs": 300,
    "validate_every": 25,
}


def _shared(data: str) -> dict[str, Any]:
    """What experts and students of a data set have in common: pixels, network, augmentation."""
    check_data_name(data)
    if data == "digits":
        return {"data": data, "depth": 2, "width": 32, "augment": "crop_scale_rotate"}
    return {"data": data, "zca": data in ("cifar10", "cifar100"), "depth": _DEPTHS.get(data, 3)}


def buffer_recipe(data: str, **overrides: Any) -> BufferConfig:
    """How to train experts on `data`: MTT's 100 experts of 50 epochs, or 5 of 20 on the digits.

    Any field of `BufferConfig` can be given as a keyword.
    """
    values = _shared(data)
    if data == "digits":
        values |= {"experts": 5, "epochs": 20, "learning_rate": 0.1, "batch_size": 64}
    return BufferConfig(**{**values, **overrides})


def distill_recipe(method: str = "contra", data: str = "digits", ipc: int = 1, **overrides: Any) -> DistillConfig:
    """The configuration of `method` for `ipc` images per class of `data`.

    Any field of `DistillConfig` can be given as a keyword. Values for an IPC that was not published are those of
    the nearest published one.

    Raises:
        UserError: unknown method or data set, or values that do not fit together.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    values = {
        **_shared(data),
        **({"zca": False} if (data, ipc) in _NOT_WHITENED else {}),
        "method": method,
        "ipc": ipc,
        **(_DIGITS if data == "digits" else _mtt(data, ipc)),
    }
    if method == "contra":
        values["segments"] = segments = overrides.get("segments", CONTRA_SEGMENTS)
        overrides = {"window_end": max(values["window_end"], segments), **overrides}
    elif overrides.get("segments", 1) != 1:
        raise UserError(f"segments is {overrides['segments']}; mtt matches one segment: use --method contra for more.")
    return DistillConfig(**{**values, **overrides})


def _mtt(data: str, ipc: int) -> dict[str, Any]:
    """MTT's values for the published IPC that is nearest to `ipc`."""
    source = data if (data, 1) in _MTT else "cifar10"
    cells = {cell_ipc: cell for (name, cell_ipc), cell in _MTT.items() if name == source}
    names = (
        "student_steps",
        "expert_epochs",
        "window_end",
        "student_batch",
        "lr_images",
        "lr_step_size",
        "step_size",
    )
    nearest = min(cells, key=lambda cell_ipc: abs(cell_ipc - ipc))
    return dict(zip(names, cells[nearest], strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much work a chapter of the book does."""

    buffer: dict[str, Any]
    """Overrides of the buffer's recipe."""
    distill: dict[str, Any]
    """Overrides of the distillation's recipe."""
    seeds: int
    """Repetitions."""
    correlate_iterations: int
    """Iterations of each run of a correlation study."""
    compare_iterations: int
    """Matched segments of each run of a comparison."""


PROFILES = {
    "ci": Profile(
        buffer={"width": 8, "experts": 2, "epochs": 10},
        distill={
            "width": 8,
            "window_end": 8,
            "iterations": 4,
            "student_steps": 3,
            "validate_every": 2,
            "evaluation_epochs": 5,
        },
        seeds=2,
        correlate_iterations=3,
        compare_iterations=8,
    ),
    "quick": Profile(
        buffer={"experts": 3},
        distill={"iterations": 32, "validate_every": 8, "evaluation_epochs": 200},
        seeds=3,
        correlate_iterations=16,
        compare_iterations=64,
    ),
    "full": Profile(buffer={}, distill={}, seeds=3, correlate_iterations=200, compare_iterations=5000),
}


def profile(name: str) -> Profile:
    """The profile called `name`: ci (seconds), quick (minutes on a CPU, the digits) or full (the whole recipe)."""
    if name not in PROFILES:
        raise UserError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]
