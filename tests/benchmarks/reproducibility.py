"""How far the same run differs on another machine, for the book's page on reliability.

    python tests/benchmarks/reproducibility.py --to book/results/reproducibility.json

Processors differ in their vector instructions, and machines in the threads that they use; both change the order in
which numbers are added. Here one machine stands for several: its libraries are told to use fewer instructions than it
has, or more threads. Each variant trains experts, distils and evaluates; every number is compared with the first
variant's. `cddlib verify` then recomputes the first variant's run under each of the others.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

from cddbook.records import write_record
from cddlib.runtime.files import file_digest
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.run_folder import read_metrics

VARIANTS = {
    "the machine": {},
    "the machine again": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "no vector instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
ITERATIONS = 100


def command(variant: str, *arguments: str) -> str:
    """Run `cddlib` under a variant; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **VARIANTS[variant]}
    done = subprocess.run([sys.executable, "-m", "cddlib", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode and arguments[0] != "verify":
        raise RuntimeError(done.stderr)
    return done.stdout


def runs(variant: str, folder: Path, buffer: Path | None) -> None:
    """Distil and evaluate under a variant, with its own experts, or with those of `buffer`."""
    experts = buffer or folder / "buffer"
    if buffer is None:
        command(variant, "buffer", "--experts", "2", "--out", str(experts))
    run = str(folder / "run")
    distill = ["distill", "--segments", "4", "--iterations", str(ITERATIONS)]
    command(variant, *distill, "--buffer", str(experts), "--out", run)
    command(variant, "evaluate", run, "--runs", "3", "--no-baselines")


def compared(folder: Path, first: Path) -> dict[str, Any]:
    """How far the run in `folder` is from the one in `first`, which matched the same experts."""
    metrics = [read_metrics(path / "run") for path in (folder, first)]
    records = [json.loads(next((path / "run").glob("evaluation-*.json")).read_text()) for path in (folder, first)]
    losses = {
        str(number): max(abs(a / b - 1) for a, b in zip(*(lines[number]["losses"] for lines in metrics), strict=True))
        for number in (1, 10, ITERATIONS)
    }
    digests = [file_digest(path / "run" / "synthetic.safetensors") for path in (folder, first)]
    return {
        "same_bytes": digests[0] == digests[1],
        "losses": losses,
        "test_accuracies": [record["accuracies"]["synthetic"] for record in records],
    }


def verified(variant: str, run: Path, buffer: Path) -> dict[str, float]:
    """What `cddlib verify` says, under a variant, of the first variant's buffer and run."""
    printed = command(variant, "verify", str(buffer)) + command(variant, "verify", str(run), "--buffer", str(buffer))
    rows = re.findall(r"^(\S.*?)  +[\d,]+  (none|[\d.e+-]+)", printed, re.MULTILINE)
    return {what: 0.0 if said == "none" else float(said) for what, said in rows}


def main(to: Path) -> None:
    """Run every variant and write the record `to`."""
    recorder = Recorder(torch.device("cpu"))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {variant: Path(temporary) / variant.replace(" ", "-") for variant in VARIANTS}
        first = folders["the machine"]
        for variant, folder in folders.items():
            runs(variant, folder, None if folder == first else first / "buffer")
            found[variant] = {**compared(folder, first), "verify": verified(variant, first / "run", first / "buffer")}
            print(variant, json.dumps(found[variant], indent=1), flush=True)
    write_record(to, {"iterations": ITERATIONS, "settings": VARIANTS, "variants": found, **recorder.report()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
