"""How near `cddlib plan` comes: small runs on the digits and CIFAR-10, planned, then run and timed.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan.py --root DIR --to book/results/plan.json

DIR holds cifar10.safetensors. Runs in a temporary folder and takes some minutes.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

import cddlib
from cddbook.records import write_record
from cddlib.plan import buffer_of, plan
from cddlib.runtime.config import as_dict
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.files import read_json
from cddlib.runtime.provenance import Recorder

TWO = {"experts": 2}
CIFAR = {"data": "cifar10", "width": 32}
RUNS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "digits, mtt, IPC 1": ("mtt", 1, {"data": "digits", "iterations": 60}, {"experts": 3}),
    "digits, contra, IPC 10, K = 2": (*("contra", 10), {"data": "digits", "iterations": 20, "segments": 2}, TWO),
    "digits, datm, IPC 1": ("datm", 1, {"data": "digits", "iterations": 60}, TWO),
    "CIFAR-10, mtt, IPC 1, width 32": (
        *("mtt", 1),
        {**CIFAR, "iterations": 30, "evaluation_epochs": 200, "validate_every": 15},
        {"experts": 1, "epochs": 3},
    ),
    "CIFAR-10, mtt, IPC 10, width 32": (
        *("mtt", 10),
        {**CIFAR, "iterations": 4, "window_end": 2, "evaluation_epochs": 20, "validate_every": 2},
        {"experts": 1, "epochs": 3},
    ),
}


def measure(name: str, root: Path, folder: Path) -> dict[str, Any]:
    """Plan and run one of `RUNS`; seconds of each stage."""
    method, ipc, changes, experts = RUNS[name]
    config = cddlib.distill_recipe(method, ipc=ipc, **changes)
    trained = buffer_of(config, **experts)
    costs = plan(trained, config, networks=2, root=root)
    cddlib.train_buffer(trained, folder / "buffer", root=root)
    cddlib.distill(config, folder / "buffer", folder / "run", root=root)
    evaluation = cddlib.evaluate_run(folder / "run", runs=2, root=root)
    took = [read_json(folder / part / "result.json")["seconds"] for part in ("buffer", "run")]
    stages = ("experts", "distillation", "evaluation")
    return {
        "what": name,
        "config": as_dict(config),
        "planned": {cost.stage: cost.seconds for cost in costs},
        "planned_operations": {cost.stage: cost.flops for cost in costs},
        "measured": dict(zip(stages, (*took, evaluation["seconds"]), strict=True)),
    }


def main(root: Path, to: Path) -> None:
    """Measure all runs, one after the other, and write the record `to`; `root` holds the data sets."""
    keep_freed_memory()
    recorder = Recorder(torch.device("cpu"))
    runs = []
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(name, root, Path(folder)))
        write_record(to, {"runs": runs, **recorder.report()})
        print(name, runs[-1]["planned"], runs[-1]["measured"], flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
