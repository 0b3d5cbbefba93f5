"""How long each command of the command line takes to its first word and to its end, beside `import torch`.

    python tests/benchmarks/first_words.py --to first-words.json

Each runs three times on the digits, in a temporary folder; medians count. It takes two minutes on a quiet machine.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

from cddbook.records import write_record
from cddlib.runtime.provenance import Recorder

SHORT = "--iterations 4 --validate-every 0 --evaluation-epochs 5"
COMMANDS = {
    "import torch": "-c 'import torch; print()'",
    "--help": "-m cddlib --help",
    "distill --help": "-m cddlib distill --help",
    "recipes": "-m cddlib recipes --data cifar10",
    "plan": "-m cddlib plan --data digits",
    "buffer": "-m cddlib buffer --data digits --experts 2 --epochs 5 --out {folder}/buffer",
    "distill": f"-m cddlib distill --data digits {SHORT} --buffer {{folder}}/buffer --out {{folder}}/run",
    "evaluate": "-m cddlib evaluate {folder}/run --runs 1 --no-baselines",
    "verify": "-m cddlib verify {folder}/run --buffer {folder}/buffer --sample 1",
    "export": "-m cddlib export {folder}/run --to {folder}/pictures",
}


def seconds(command: str) -> tuple[float, float]:
    """Until the command's first word, on either stream, and until its end."""
    began = time.perf_counter()
    line = f"exec {sys.executable} {command}"
    with subprocess.Popen(line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - began
        process.stdout.read()
    assert process.returncode == 0, command
    return first, time.perf_counter() - began


def main(to: Path) -> None:
    """Time every command, and write the record `to`."""
    recorder, times = Recorder(torch.device("cpu")), {name: ([], []) for name in COMMANDS}
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for name, command in COMMANDS.items():
                for taken, one in zip(times[name], seconds(command.format(folder=folder)), strict=True):
                    taken.append(one)
    medians = {name: [statistics.median(taken) for taken in both] for name, both in times.items()}
    unit = medians["import torch"][0]
    for name, (first, end) in medians.items():
        print(f"{name:16}{first:6.2f} s, {first / unit:.2f} times `import torch`; ends after {end:.2f} s")
    write_record(to, {"seconds": medians, **recorder.report()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
