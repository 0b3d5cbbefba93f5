"""A folder of images streamed into a data set's file, stopped and resumed; and a large file mapped: time and memory.

    python tests/benchmarks/streaming.py --to book/results/streaming.json

Images as large as ImageNet's usually are, few different ones under many names: what is measured is decoding and
writing, not a disk's reading. Memory is anonymous memory, the part that no file backs (RssAnon); worker processes share
much of it with the process that starts them, so their sum is also given with each page counted once (Pss_Anon).
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

import cddlib
from cddbook.records import write_record
from cddlib.data.dataset import fingerprint
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.runtime.device import resolve_device
from cddlib.runtime.files import add_checksum, file_digest, read_json
from cddlib.runtime.provenance import Recorder
from cddlib.training.epoch import fetch_real

DIFFERENT = 100
"""Images that differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    to: Path
    """File of the record."""
    images: int = 20_000
    """Images in the folder."""
    width: int = 500
    """Their width in pixels."""
    height: int = 375
    """Their height in pixels."""
    size: int = 64
    """Pixels of a side in the data set."""
    processors: int = 2
    """Processors, and so worker processes."""
    mapped_gb: float = 2.0
    """Size of the file that is mapped."""
    batches: int = 100
    """Random batches of 256 images fetched from it."""


def write_folder(folder: Path, images: int, options: Options) -> Path:
    """Smooth random JPEGs of ten classes, one of ten for testing, in ImageNet's layout; returns `folder`."""
    rng = np.random.default_rng(0)
    for i in range(images):
        path = folder / ("val" if i % 10 == 0 else "train") / f"class {i // 10 % 10}" / f"{i:07d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < DIFFERENT:
            coarse = Image.fromarray(rng.integers(0, 256, (options.height // 8, options.width // 8, 3), dtype=np.uint8))
            coarse.resize((options.width, options.height), Image.Resampling.BICUBIC).save(path, quality=90)
            (folder / f"{i}").hardlink_to(path)
        else:
            path.hardlink_to(folder / f"{i % DIFFERENT}")
    return folder


def fields(file: str, *names: str) -> list[float]:
    """Lines of a file in /proc, in MB."""
    lines = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return [int(lines[name].split()[0]) * 1024 / 1e6 for name in names]


class Watched:
    """A run of `cddlib data` in a process of its own, whose memory and its workers' is watched."""

    def __init__(self, source: Path, root: Path, size: int, until: Callable[[], bool] = lambda: False) -> None:
        """Run until the end, or kill it as soon as `until`."""
        self.peak = {"process_mb": 0.0, "largest_worker_mb": 0.0, "all_shared_once_mb": 0.0}
        self.workers = 0
        start = time.monotonic()
        command = [sys.executable, "-m", "cddlib", "data", "imagefolder"]
        command += ["--source", str(source), "--root", str(root), "--size", str(size)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                with contextlib.suppress(OSError, KeyError):  # a process that has just ended
                    self._watch(process.pid)
                if until():
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.25)
        self.seconds = time.monotonic() - start
        assert process.returncode in (0, -signal.SIGKILL), command

    def _watch(self, pid: int) -> None:
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        every = [fields(f"/proc/{worker}/status", "RssAnon")[0] for worker in (pid, *workers)]
        shared = [fields(f"/proc/{worker}/smaps_rollup", "Pss_Anon")[0] for worker in (pid, *workers)]
        self.workers = max(self.workers, len(workers))
        found = {
            "process_mb": every[0],
            "largest_worker_mb": max(every[1:], default=0),
            "all_shared_once_mb": sum(shared),
        }
        self.peak = {key: round(max(value, found[key]), 1) for key, value in self.peak.items()}


def stream(folder: Path, options: Options) -> dict[str, Any]:
    """Prepare a few images and all of them; then once more, killed in the middle and resumed."""
    few = Watched(write_folder(folder / "few", DIFFERENT, options), folder / "start", options.size)
    source = write_folder(folder / "source", options.images, options)
    whole = Watched(source, folder / "whole", options.size)
    record = folder / "resumed" / "imagefolder.progress.json"
    half = options.images // 2
    killed = Watched(
        source, folder / "resumed", options.size, lambda: record.exists() and read_json(record)["images"] >= half
    )
    durable = read_json(record)["images"]
    rest = Watched(source, folder / "resumed", options.size)
    digests = [file_digest(folder / root / "imagefolder.safetensors") for root in ("whole", "resumed")]
    return {
        "workers": whole.workers,
        "jpeg_bytes": sum((source / f"{i}").stat().st_size for i in range(DIFFERENT)) // DIFFERENT,
        "file_mb": round((folder / "whole" / "imagefolder.safetensors").stat().st_size / 1e6, 1),
        "few": {"images": DIFFERENT, "seconds": round(few.seconds, 2), "peak_anonymous": few.peak},
        "whole": {
            "images": options.images,
            "seconds": round(whole.seconds, 2),
            "images_per_second": round((options.images - DIFFERENT) / (whole.seconds - few.seconds), 1),
            "peak_anonymous": whole.peak,
        },
        "resumed": {
            "killed_after_seconds": round(killed.seconds, 2),
            "durable_images": durable,
            "seconds": round(rest.seconds, 2),
            "images_per_second": round((options.images - durable) / (rest.seconds - few.seconds), 1),
            "same_bytes": digests[0] == digests[1],
        },
    }


def write_cache(path: Path, options: Options) -> int:
    """A data set in ImageNet's shape of `mapped_gb` random bytes, one image of ten for testing; returns its images."""
    n = int(options.mapped_gb * 1e9) // (3 * 64**2)
    labels = {"test": np.arange(n // 10) % 1000, "train": np.arange(n - n // 10) % 1000}
    about = add_checksum({"classes": [str(i) for i in range(1000)], "fingerprint": "0" * 16})
    header: dict[str, Any] = {"__metadata__": {"dataset": json.dumps(about)}}
    end = 0
    for kind, dtype, width, shape in (("labels", "I64", 8, []), ("images", "U8", 3 * 64**2, [3, 64, 64])):
        for part, values in labels.items():
            begin, end = end, end + len(values) * width
            header[f"{part}_{kind}"] = {"dtype": dtype, "shape": [len(values), *shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in labels.values()))
        for start in range(0, n, 4096):
            file.write(rng.bytes(min(4096, n - start) * 3 * 64**2))
    return n


def measure_mapped(root: Path, batches: int) -> dict[str, Any]:
    """Use the data set as training does, and see what memory each step takes."""
    torch.set_num_threads(1)
    steps: dict[str, dict[str, float]] = {}

    def note(step: str, since: float) -> None:
        seconds = time.monotonic() - since
        anonymous, file = fields("/proc/self/status", "RssAnon", "RssFile")
        steps[step] = {"anonymous_mb": round(anonymous, 1), "file_mb": round(file, 1), "seconds": round(seconds, 3)}

    note("before", time.monotonic())
    start = time.monotonic()
    dataset = cddlib.load("imagenet", root)
    note("load", start)
    start = time.monotonic()
    train, _ = dataset.split
    note("split", start)
    fetch = fetch_real(train, fit_preprocessing(dataset, zca=False))
    rng = cddlib.generator("streaming")
    start = time.monotonic()
    for _ in range(batches):
        fetch(torch.randint(len(train.labels), (256,), generator=rng))
    note("batches", start)
    start = time.monotonic()
    assert fingerprint(dataset.train, dataset.test)
    note("fingerprint", start)
    return steps


def main(options: Options) -> None:
    """Measure everything, print it, write the record."""
    recorder = Recorder(resolve_device("cpu"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.processors])
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as fresh:
        folder = Path(name)
        streamed = stream(folder, options)
        print(json.dumps(streamed, indent=1), flush=True)
        images = write_cache(folder / "imagenet.safetensors", options)
        steps = fresh.submit(measure_mapped, folder, options.batches).result()
        print(json.dumps(steps, indent=1))
    config = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name != "to"}
    report = {key: value for key, value in recorder.report().items() if key != "peak_memory_mb"}  # not this process's
    write_record(options.to, {"config": config, "streamed": streamed, "mapped": {"images": images, **steps}, **report})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
