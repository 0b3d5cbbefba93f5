"""A folder of images streamed into a data set's file, stopped and resumed; and a large file mapped: time and memory.

    python tests/benchmarks/streaming.py --to book/results/streaming.json

Images as large as ImageNet's usually are, few different ones under many names: what is measured is decoding and
writing, not a disk's reading. Memory is anonymous memory, the part that no file backs (Pss_Anon).
"""

import concurrent.futures
import contextlib
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
from cddlib.runtime.files import file_digest, read_json, write_tensors
from cddlib.runtime.provenance import Recorder
from cddlib.training.epoch import fetch_real

CONFIG = {"images": 20_000, "width": 500, "height": 375, "size": 64, "processors": 2, "mapped_gb": 2.0, "batches": 100}
"""Images in the folder, and their pixels; pixels of a side in the data set; processors, and so threads; the
size of the file that is mapped, and random batches of 256 images that are fetched from it."""

DIFFERENT = 100
"""Images that differ."""


def write_folder(folder: Path, images: int) -> Path:
    """Smooth random JPEGs of ten classes, one of ten for testing, in ImageNet's layout; returns `folder`."""
    rng = np.random.default_rng(0)
    for i in range(images):
        path = folder / ("val" if i % 10 == 0 else "train") / f"class {i // 10 % 10}" / f"{i:07d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < DIFFERENT:
            width, height = CONFIG["width"], CONFIG["height"]
            coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
            (folder / f"{i}").hardlink_to(path)
        else:
            path.hardlink_to(folder / f"{i % DIFFERENT}")
    return folder


def anonymous(process: int) -> float:
    """MB of memory that no file backs; a page that n processes share counts as an n-th of a page."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return round(next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Pss_Anon:")), 1)


def watched(source: Path, root: Path, until: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run `cddlib data` in a process of its own, or kill it as soon as `until`; its seconds and its peak of memory."""
    peak, start = 0.0, time.monotonic()
    command = [sys.executable, "-m", "cddlib", "data", "imagefolder", "--size", str(CONFIG["size"])]
    command += ["--source", str(source), "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # a process that has just ended
                peak = max(peak, anonymous(process.pid))
            if until():
                process.send_signal(signal.SIGKILL)
            time.sleep(0.25)
    assert process.returncode in (0, -signal.SIGKILL), command
    return {"seconds": round(time.monotonic() - start, 2), "peak_anonymous": {"all_shared_once_mb": peak}}


def stream(folder: Path) -> dict[str, Any]:
    """Prepare a few images and all of them; then once more, killed in the middle and resumed."""
    images = CONFIG["images"]
    few = watched(write_folder(folder / "few", DIFFERENT), folder / "start")
    source = write_folder(folder / "source", images)
    whole = watched(source, folder / "whole")
    record = folder / "resumed" / "imagefolder.progress.json"
    watched(source, folder / "resumed", lambda: record.exists() and read_json(record)["images"] >= images // 2)
    resumed = {"durable_images": read_json(record)["images"], **watched(source, folder / "resumed")}
    files = [folder / root / "imagefolder.safetensors" for root in ("whole", "resumed")]
    return {
        "workers": CONFIG["processors"],
        "few": {"images": DIFFERENT, **few},
        "whole": {"images": images, **whole},
        "resumed": {**resumed, "same_bytes": file_digest(files[0]) == file_digest(files[1])},
    }


def write_cache(path: Path) -> int:
    """A data set in ImageNet's shape of random bytes, one image of ten for testing; returns its number of images."""
    n = int(CONFIG["mapped_gb"] * 1e9) // (3 * 64**2)
    tensors = {}
    for part, count in (("test", n // 10), ("train", n - n // 10)):
        tensors[f"{part}_images"] = torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8)
        tensors[f"{part}_labels"] = torch.arange(count) % 1000
    header = {"classes": [str(i) for i in range(1000)], "fingerprint": "0" * 16}
    write_tensors(path, tensors, "dataset", header, digests=False)
    return n


def measure_mapped(root: Path) -> dict[str, dict[str, float]]:
    """Use the data set as training does, and read all of it; the memory before and after."""
    torch.set_num_threads(1)
    before = anonymous(os.getpid())
    dataset = cddlib.load("imagenet", root)
    train, _ = dataset.split
    fetch = fetch_real(train, fit_preprocessing(dataset, zca=False))
    rng = cddlib.generator("streaming")
    for _ in range(CONFIG["batches"]):
        fetch(torch.randint(len(train.labels), (256,), generator=rng))
    assert fingerprint(dataset.train, dataset.test)
    return {"before": {"anonymous_mb": before}, "fingerprint": {"anonymous_mb": anonymous(os.getpid())}}


def main(to: Path) -> None:
    """Measure everything, print it, write the record `to`."""
    recorder = Recorder(resolve_device("cpu"))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: CONFIG["processors"]])
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as fresh:
        streamed = stream(Path(name))
        images = write_cache(Path(name) / "imagenet.safetensors")
        mapped = {"images": images, **fresh.submit(measure_mapped, Path(name)).result()}
    print(json.dumps({"streamed": streamed, "mapped": mapped}, indent=1))
    report = {key: value for key, value in recorder.report().items() if key != "peak_memory_mb"}  # not this process's
    write_record(to, {"config": CONFIG, "streamed": streamed, "mapped": mapped, **report})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
