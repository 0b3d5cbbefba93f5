"""Do training and distillation end at the same accuracy in both precisions? Experts, and sets, of several seeds.

    python tests/benchmarks/precision_runs.py runs/precision --root DIR --to book/results/precision-runs.json

Short runs, on the digits and on CIFAR-10: what is compared is the precision, not the method. Runs resume.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import cddlib
from cddlib.distill import distill
from cddlib.evaluate import evaluate_run
from cddlib.files import write_record
from cddlib.recipes import buffer_recipe, distill_recipe
from cddlib.runs import Recorder, keep_freed_memory, resolve_device

PRECISIONS = ("float32", "bfloat16")
EXPERTS = 3
DIGITS: dict[str, Any] = {"iterations": 200, "validate_every": 0, "segments": 2, "evaluation_epochs": 300}
CIFAR: dict[str, Any] = {**DIGITS, "compiled": True, "zca": False, "segments": 1, "student_steps": 20}
RUNS: dict[tuple[str, int], tuple[dict[str, Any], int]] = {
    ("digits", 1): (DIGITS, 5),
    ("digits", 10): (DIGITS, 5),
    ("cifar10", 1): (CIFAR | {"iterations": 60, "expert_epochs": 2, "window_end": 5}, 3),
    ("cifar10", 10): (CIFAR | {"iterations": 20, "expert_epochs": 2, "window_end": 5, "student_batch": 50}, 3),
}
"""By data set and images a class: the settings, and how many seeds."""


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing; the record is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--cifar", type=Path, help="a buffer of CIFAR-10's experts; without it, only the digits")
    parser.add_argument("--root", type=Path, help="folder of the data sets")
    parser.add_argument("--to", type=Path, default=Path("precision-runs.json"), help="the record")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    recorder, rows = Recorder(resolve_device("auto")), []

    def add(**row: Any) -> None:
        rows.append(row)
        write_record(options.to, {"runs": rows, **recorder.report()})

    digits = {}
    for precision in PRECISIONS:
        config = buffer_recipe("digits", experts=EXPERTS, precision=precision, compiled=False)
        digits[precision] = cddlib.train_buffer(config, options.out / f"digits-{precision}")
        for expert in digits[precision].experts:
            accuracy = expert["test_accuracy"]
            add(data="digits", work="expert", precision=precision, seed=expert["seed"], accuracies=[accuracy])
    for ((data, ipc), (settings, seeds)), precision in itertools.product(RUNS.items(), PRECISIONS):
        for seed in range(seeds if data == "digits" or options.cifar else 0):
            out = options.out / f"{data}-{ipc}-{precision}-{seed}"
            buffer = digits["float32"].folder if data == "digits" else options.cifar
            config = distill_recipe("contra", data, ipc, **{"seed": seed, "precision": precision, **settings})
            distill(config, buffer, out, root=options.root)
            record = evaluate_run(out, runs=2, baselines=False, root=options.root)
            accuracies = record["accuracies"]["synthetic"]
            add(data=data, work=f"IPC {ipc}", precision=precision, seed=seed, accuracies=accuracies)


if __name__ == "__main__":
    main()
