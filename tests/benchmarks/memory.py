"""Peak memory of one segment's gradient as the student takes more steps: cddlib's walk beside the textbook's graph.

And of the summed gradient of K segments, one after the other, at the first of the student steps, repeatedly, for a
process's peak is not the same twice. No residuals are kept.

    python tests/benchmarks/memory.py --to book/results/memory.json

CIFAR's shape, one image a class, full-batch steps with all augmentation, as in `speed.py`. Each measurement has a
process of its own.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
from pathlib import Path
from typing import Any

import speed
import torch
import tyro

from cddbook.records import write_record
from cddlib.runtime.provenance import Recorder

WAYS = {"cddlib": "cddlib, one by one", "textbook": "textbook", "cddlib, K segments": "cddlib, one by one"}


def measure(name: str, student_steps: int, segments: int, width: int, threads: int) -> dict[str, Any]:
    """Memory and time of one gradient."""
    torch.set_num_threads(threads)
    os.environ["CDDLIB_KEPT_MB"] = "0"
    sizes = {"student_steps": student_steps, "segments": segments, "width": width}
    recorder = Recorder(torch.device("cpu"))
    before = recorder.report()["peak_memory_mb"]
    speed.match(speed.Point(work="match", implementation=WAYS[name], **sizes))  # type: ignore[arg-type]
    after = recorder.report()
    found = {"start_mb": before, "peak_mb": after["peak_memory_mb"], "seconds": after["seconds"]}
    return {"implementation": name, "student_steps": student_steps, "segments": segments, **found}


def main(
    to: Path,
    student_steps: tuple[int, ...] = (10, 20, 40, 80),
    segments: tuple[int, ...] = (1, 2, 4, 8),
    repeats: int = 5,
    width: int = 128,
    threads: int = 1,
) -> None:
    """Measure everything, print it, write the record `to`."""
    recorder = Recorder(torch.device("cpu"))
    spawn = multiprocessing.get_context("spawn")
    fresh = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1)
    points = [*itertools.product(("cddlib", "textbook"), student_steps, (1,))]
    points += itertools.product(("cddlib, K segments",), student_steps[:1], segments * repeats)
    measurements = []
    for point in points:
        measurements.append(fresh.submit(measure, *point, width, threads).result())
        print(measurements[-1], flush=True)
    config = {"student_steps": student_steps, "segments": segments, "repeats": repeats, "width": width}
    config |= {"images": speed.CLASSES, "threads": threads, "device": "cpu"}
    report = {key: value for key, value in recorder.report().items() if key != "peak_memory_mb"}  # not this process's
    write_record(to, {"config": config, "measurements": measurements, **report})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
