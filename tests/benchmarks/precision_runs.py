"""Do training and distillation end at the same accuracy in both precisions? Experts, and sets, of several seeds.

    python tests/benchmarks/precision_runs.py digits runs/precision --to book/results/precision-digits.json
    python tests/benchmarks/precision_runs.py cifar10 runs/precision --to book/results/precision-cifar10.json

Short runs: what is compared is the precision, not the method. They resume.
"""

import itertools
from pathlib import Path
from typing import Any, Literal

import tyro

import cddlib
from cddbook.records import write_record
from cddlib.distillation.loop import distill
from cddlib.evaluate import evaluate_run
from cddlib.methods.recipes import buffer_recipe, distill_recipe
from cddlib.runtime.device import keep_freed_memory, resolve_device
from cddlib.runtime.provenance import Recorder

PRECISIONS = ("float32", "bfloat16")
DIGITS: dict[str, Any] = {"iterations": 100, "validate_every": 0, "segments": 2, "evaluation_epochs": 300}
CIFAR = {**DIGITS, "compiled": True, "zca": False, "segments": 1}
CIFAR |= {"student_steps": 20, "expert_epochs": 2, "window_end": 2}
EXPERTS: dict[str, dict[str, Any]] = {
    "digits": {"experts": 3, "compiled": False},
    "cifar10": {"experts": 1, "epochs": 4, "compiled": True, "zca": False},
}
SETS: dict[str, dict[int, dict[str, Any]]] = {
    "digits": {1: DIGITS, 10: DIGITS},
    "cifar10": {
        1: CIFAR | {"iterations": 50},
        10: CIFAR | {"iterations": 10, "student_batch": 50, "window_end_initial": 2},
    },
}
"""By images a class."""
SEEDS = 3


def main(
    data: tyro.conf.Positional[Literal["digits", "cifar10"]],
    out: tyro.conf.Positional[Path],
    to: Path,
    root: Path | None = None,
) -> None:
    """Train what is missing in the folder `out`; the record `to` is written after each."""
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    recorder = Recorder(resolve_device("auto"))

    def add(**row: Any) -> None:
        rows.append(row)
        write_record(to, {"data": data, "runs": rows, **recorder.report()})

    buffers = {}
    for precision in PRECISIONS:
        config = buffer_recipe(data, precision=precision, **EXPERTS[data])
        buffers[precision] = cddlib.train_buffer(config, out / f"{data}-{precision}", root=root)
        for expert in buffers[precision].experts:
            accuracies = [expert["test_accuracy"]]
            add(work="expert", precision=precision, seed=expert["seed"], accuracies=accuracies)
    for (ipc, settings), seed, precision in itertools.product(SETS[data].items(), range(SEEDS), PRECISIONS):
        run = out / f"{data}-{ipc}-{precision}-{seed}"
        config = distill_recipe("contra", data, ipc, **{"seed": seed, "precision": precision, **settings})
        distill(config, buffers["float32"], run, root=root)
        record = evaluate_run(run, runs=2, baselines=False, root=root)
        add(work=f"IPC {ipc}", precision=precision, seed=seed, accuracies=record["accuracies"]["synthetic"])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
