"""Running distillations, stopping them, and what they leave behind."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from works import stop_before

import cddlib
from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.synthetic import SyntheticSet, initialise

CPU = torch.device("cpu")
distill = partial(cddlib.distill, device="cpu")
loop = importlib.import_module("cddlib.distillation.loop")

SOFT = {"labels": "learned", "ema": 0.9, "momentum_labels": 0.9, "lr_labels": 0.5}
"""A state of every kind of tensor but those of consolidation."""
SUBSETS = {"subsets": 2, "ipc": 3, "segments": 2, "momentum_images": 0.9}


def first(config: DistillConfig, buffer: Buffer) -> SyntheticSet:
    """The set before the first iteration, to be differentiated."""
    synthetic = initialise(config.synthetic, cddlib.load("digits"), buffer, config.seed, CPU)
    for variable in synthetic.variables():
        variable.requires_grad_()
    return synthetic


def stop_at(iteration: int, config: DistillConfig, buffer: Buffer, folder: Path, **options: Any) -> None:
    """Begin or go on with the run, and stop it as by Ctrl-C after this iteration."""
    run = partial(distill, config, buffer, folder, **options)
    stop_before(loop, "iterate", lambda state, *_: state.iteration == iteration, run)


def learned_and_held(config: DistillConfig, iteration: int) -> tuple[list[int], list[int]]:
    """Which images students learn in an iteration, the active subset's and those before it; and the latter alone."""
    subsets, ipc = config.schedule.subsets, config.synthetic.ipc
    turn = next(k for k in range(subsets) if iteration < config.schedule.iterations * (k + 1) / subsets)
    places = [place for place in range(10 * ipc) if place % ipc * subsets / ipc < turn + 1]
    return places, [place for place in places if place % ipc * subsets / ipc < turn]


def rows_of(config: DistillConfig, iteration: int) -> list[int]:
    """Which images an iteration optimises: of every class those whose place is in the active subset."""
    learned, held = learned_and_held(config, iteration)
    return sorted({*learned} - {*held})
