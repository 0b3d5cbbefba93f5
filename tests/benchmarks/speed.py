"""Time and memory of matching, expert training and evaluation: cddlib beside the textbook's way, in one run.

    make bench
    python tests/benchmarks/speed.py --to book/results/speed-cpu.json --threads 2

CIFAR's shape, MTT's ConvNet of width 128, all augmentation, images and labels of noise: time does not depend on them.
On the CPU; `make gpu` is for a GPU. Every measurement has a process of its own, whose peak memory it is. The textbook's
way is timed with the system's allocator as it comes, and told to keep what it has (`KEEPING`); cddlib's as in `WAYS`.
Rates are in floating-point operations a second, a multiplication and an addition counted as two, beside the rate of
the convolution that does most of the work, measured in the same process in the same precision. Counted is what the
textbook's way does in convolutions and products of matrices, not what another way does twice.
The record is written after every measurement; the same command goes on with it.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import textbook
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cddlib
from cddbook.records import read_record, write_record
from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import Images
from cddlib.evaluate import EvaluateConfig, correct_of_set
from cddlib.matching.loss import matching_losses
from cddlib.matching.student import MatchingConfig, segment_chunks
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.errors import is_out_of_memory
from cddlib.runtime.provenance import Recorder
from cddlib.synthetic import SyntheticSet
from cddlib.training.compiling import not_compiled
from cddlib.training.epoch import fetch_real, train_epoch
from cddlib.training.step import ComputeConfig

SHAPE, CLASSES = (3, 32, 32), 10
STRATEGY = AugmentConfig().augment
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}
"""What glibc reads when a process starts; it takes no MALLOC_MMAP_THRESHOLD_ above 32 MiB, so there is none at all."""
WAYS: dict[str, tuple[ComputeConfig | None, dict[str, str]]] = {
    "textbook": (None, {}),
    "textbook, keeping memory": (None, KEEPING),
    "cddlib": (ComputeConfig(compiled=False), {}),
    "cddlib, least memory": (ComputeConfig(compiled=False), {"CDDLIB_KEPT_MB": "0"}),
    "cddlib, compiled": (ComputeConfig(compiled=True), {}),
    "cddlib, compiled, bfloat16": (ComputeConfig(compiled=True, precision="bfloat16"), {}),
    **{f"cddlib, {how}": (ComputeConfig(compiled=False), {}) for how in ("one by one", "side by side")},
}
"""How each implementation computes (None for the textbook's), and its process's environment. cddlib itself chooses how
many segments it matches side by side, except in the last two."""
BATCH = 256
"""Images of a training step."""
NETWORKS = 5
MOST_REPEATS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One thing to measure."""

    work: str
    """`match`, an iteration's gradient; `expert`, an epoch; `evaluate`, five networks."""
    implementation: str
    ipc: int = 1
    student_steps: int = 0
    student_batch: int | None = None
    segments: int = 1
    width: int = 128
    side: int = 32
    """Pixels along an image's side; the network has one more block each time that it doubles from 32."""
    images: int = 2048
    """Training images of an expert's epoch."""
    epochs: int = 30
    """Epochs of each evaluation network."""
    threads: int = 1
    operations: float = 0.0
    """Floating-point operations of the work."""
    least_seconds: float = 10.0
    """It is done again until it has taken so long, or `MOST_REPEATS` times."""


MATCHES = ((1, 50, None), (10, 30, None), (50, 30, 256))
"""Images a class, student steps, images a step."""
SEGMENTS = (1, 4)
ONCE = ("textbook", "textbook, keeping memory", "cddlib, compiled")
"""What is measured with several segments too."""
SMALL = {"ipc": 1, "student_steps": 20, "side": 8, "width": 32}
"""A match of small steps, like those on the digits."""


CPU = torch.device("cpu")


# --- In a process of its own ------------------------------------------------------------------------------------


@functools.cache
def convnet(point: Point) -> cddlib.ConvNet:
    """The network, one object for all repetitions: it is compiled once."""
    config = cddlib.NetworkConfig(width=point.width, depth=3 + max(0, int(math.log2(point.side / 32))))
    return cddlib.ConvNet(config, (SHAPE[0], point.side, point.side), CLASSES)


def match(point: Point, steps: int | None = None) -> list[Tensor]:
    """The sum of K segments' gradients by images and step size; `steps` replaces the point's student steps."""
    network, rng, size = convnet(point), cddlib.generator("speed"), point.ipc * CLASSES
    tensors = textbook.noise(network, (SHAPE[0], point.side, point.side), size, rng, CPU)
    start, target, images, targets, step_size = tensors
    compute = WAYS[point.implementation][0]
    student = MatchingConfig(
        student_steps=steps or point.student_steps,
        student_batch=point.student_batch,
        side_by_side={"one by one": 1, "side by side": point.segments}.get(point.implementation.split(", ")[-1]),
    )
    plans = [cddlib.plan_student(student, size, STRATEGY, rng) for _ in range(point.segments)]
    total = [torch.zeros_like(images), torch.zeros_like(step_size)]
    if not compute:
        variables = [images.requires_grad_(), step_size.requires_grad_()]
        for plan in plans:
            loss = textbook.matching_loss(network, start, target, images, targets, step_size, plan)
            for sum_, gradient in zip(total, torch.autograd.grad(loss, variables), strict=True):
                sum_ += gradient
            del loss  # and its graph, before the next
        return total
    for turn in segment_chunks(network, student, images, len(plans[0][0].indices), len(plans)):
        count = len(plans[turn])
        copies = [torch.stack([x] * count) for x in tensors]
        variables = [copies[2].requires_grad_(), copies[4].requires_grad_()]
        losses = matching_losses(network, *copies, plans[turn], student, compute)
        for sum_, gradient in zip(total, torch.autograd.grad(losses.sum(), variables), strict=True):
            sum_ += gradient.sum(0)
    return total


def expert(point: Point, steps: int | None = None) -> None:
    """An expert's epoch, or `steps` of its steps."""
    config, rng = cddlib.NetworkConfig(width=point.width), cddlib.generator("speed")
    size = BATCH * steps if steps else point.images
    pixels, labels, normalisation = real_images(size, SHAPE, CPU)
    compute = WAYS[point.implementation][0]
    if compute:
        network = convnet(point)
        theta = network.init(rng).requires_grad_()
        fetch = fetch_real(Images(pixels, labels), normalisation)
        optimizer = torch.optim.SGD([theta], lr=0.01)
        how: dict[str, Any] = {"batch_size": BATCH, "strategy": STRATEGY, "generator": rng, "compute": compute}
        train_epoch(network, theta, optimizer, fetch, size, **how)
    else:
        module = textbook.convnet(config, SHAPE, CLASSES)
        inputs = normalisation(pixels)
        textbook.train_epoch(module, torch.optim.SGD(module.parameters(), lr=0.01), inputs, labels, BATCH, STRATEGY)


real_images = functools.cache(textbook.real_images)
"""Drawing them is no part of an epoch."""


def evaluate(point: Point, epochs: int | None = None) -> None:
    """Several networks, or one for some epochs, trained on the synthetic set and tested on 10 images an epoch."""
    config, rng = cddlib.NetworkConfig(width=point.width), cddlib.generator("speed")
    size, networks, epochs = point.ipc * CLASSES, 1 if epochs else NETWORKS, epochs or point.epochs
    images, labels = torch.randn(size, *SHAPE, generator=rng), torch.arange(size) % CLASSES
    pixels, answers, normalisation = real_images(10 * epochs, SHAPE, CPU)
    compute = WAYS[point.implementation][0]
    if compute:
        synthetic = SyntheticSet(
            images=images, labels=labels, label_logits=None, step_size=torch.tensor(0.01),
            preprocessing=normalisation, classes=tuple(map(str, range(CLASSES))),
        )  # fmt: skip
        how = (EvaluateConfig(evaluation_epochs=epochs), STRATEGY, compute, Images(pixels, answers))
        for seed in range(networks):
            correct_of_set(synthetic, convnet(point), *how, purpose="speed", seed=seed)
        return
    inputs = normalisation(pixels)
    for _ in range(networks):
        module = textbook.convnet(config, SHAPE, CLASSES)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            textbook.train_epoch(module, optimizer, images, labels, BATCH, STRATEGY)
        textbook.accuracy(module, inputs, answers)


@functools.cache
def operations(point: Point) -> float:
    """Operations of the whole work, from those of one and three parts: student steps, training steps or epochs."""
    run, parts, times = WORKS[point.work](point)
    counts = []
    for number in (1, 3):
        with FlopCounterMode(display=False) as counter:
            run(point, number)
        counts.append(counter.get_total_flops())
    return float(times * (counts[0] + (parts - 1) * (counts[1] - counts[0]) / 2))


WORKS: dict[str, Callable[[Point], tuple[Callable[..., None], int, int]]] = {
    "match": lambda point: (match, point.student_steps, point.segments),
    "expert": lambda point: (expert, point.images // BATCH, 1),
    "evaluate": lambda point: (evaluate, point.epochs, NETWORKS),
}
"""What does each work, its parts, and how many times it does them."""


def convolution_rate(point: Point) -> float:
    """The best rate of the second block's convolution, forward, with as many images as a step has."""
    images = min(point.ipc * CLASSES, point.student_batch or BATCH) if point.work != "expert" else BATCH
    compute, side = WAYS[point.implementation][0], point.side // 2
    dtype = torch.bfloat16 if compute and compute.precision == "bfloat16" else torch.float32
    seconds = []
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(images, point.width, side, side, dtype=dtype).contiguous(memory_format=order)
        w = torch.randn(point.width, point.width, 3, 3, dtype=dtype).contiguous(memory_format=order)
        with torch.no_grad():
            seconds += timed(functools.partial(F.conv2d, x, w, padding=1), point.least_seconds / 20, 500)
    return 2 * images * point.width**2 * 9 * side**2 / min(seconds)


def timed(run: Callable[[], object], least: float, most: int) -> list[float]:
    """Seconds of repeated runs, until they are enough."""
    found: list[float] = []
    while not found or (sum(found) < least and len(found) < most):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


def measure(point: Point, most_seconds: float) -> dict[str, Any]:
    """Time, memory and rate of a point."""
    torch.set_num_threads(point.threads)
    if WAYS[point.implementation][0]:
        keep_freed_memory()
    recorder = Recorder(CPU)
    before = recorder.report()["peak_memory_mb"]
    rate, count = convolution_rate(point), point.operations
    if count / rate > most_seconds:  # nothing is faster than that rate
        return {"left_out": f"more than {most_seconds:.0f} seconds"}
    run, _, _ = WORKS[point.work](point)
    try:
        run(point, 2)  # which compiles for every size of a batch, and fills what is kept
        if not_compiled.cache_info().currsize:
            return {"left_out": "cannot be compiled here"}
        seconds = timed(lambda: run(point), point.least_seconds, MOST_REPEATS)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return {"left_out": "not enough memory"}
    return {
        "seconds": statistics.median_low(seconds),
        "repeats": len(seconds),
        "slowest": max(seconds),
        "peak_memory_mb": recorder.report()["peak_memory_mb"],
        "start_memory_mb": before,
        "rate": count / statistics.median_low(seconds),
        "convolution_rate": rate,
    }


def limit_memory() -> None:
    """End with an error, not by the system's hand, where less than a tenth of the machine's memory would be left."""
    most = psutil.Process().memory_info().vms + int(0.9 * psutil.virtual_memory().available)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


# --- In the parent ----------------------------------------------------------------------------------------------


def points(threads: int, width: int, seconds: float) -> list[Point]:
    """Everything that is measured."""
    shared: dict[str, Any] = {"threads": threads, "width": width, "least_seconds": seconds / 10}
    apart = [name for name in WAYS if name.endswith(("one by one", "side by side"))]
    works: list[dict[str, Any]] = [
        {"work": "match", "ipc": ipc, "student_steps": n, "student_batch": batch} for ipc, n, batch in MATCHES
    ]
    works.insert(1, {**works[0], "segments": SEGMENTS[-1]})
    works += [{"work": "expert"}, {"work": "evaluate", "ipc": 1}, {"work": "evaluate", "ipc": 10}]
    for narrow in ({"work": "match", "student_steps": 20, "width": 32}, {"work": "evaluate", "width": 32}):
        works += [{**narrow, "threads": count} for count in sorted({1, threads})]
    found = []
    for work in works:
        names = [name for name in WAYS if work.get("segments", 1) == 1 or name in ONCE]
        names = [name for name in names if work["work"] == "match" or name != "cddlib, least memory"]
        found += [Point(**{**shared, **work}, implementation=name) for name in names if name not in apart]
        if "segments" in work:
            found += [Point(**shared, **work, implementation=name) for name in apart]
    for segments, name in itertools.product(SEGMENTS, [name for name in WAYS if name.startswith("textbook")] + apart):
        found.append(Point(**{**shared, **SMALL}, work="match", segments=segments, implementation=name))
    return found


def in_a_process(point: Point, most_seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", json.dumps(dataclasses.asdict(point))]
    environment = {**os.environ, **WAYS[point.implementation][1], "OMP_NUM_THREADS": str(point.threads)}
    done = subprocess.run([*command, str(most_seconds)], env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        return {"left_out": f"ended by signal {-done.returncode}"}
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def described(point: Point) -> str:
    """A point in words."""
    width = "" if point.width == 128 or point.side != 32 else f", width {point.width}, threads: {point.threads}"
    if point.work == "match":
        side = "" if point.side == 32 else f", {point.side} × {point.side} pixels"
        return f"match, IPC {point.ipc}, N = {point.student_steps}, K = {point.segments}{side}{width}"
    return "expert, an epoch" if point.work == "expert" else f"{NETWORKS} evaluation networks, IPC {point.ipc}{width}"


def main(to: Path = Path("speed.json"), threads: int = 0, width: int = 128, seconds: float = 100.0) -> None:
    """Measure every point, print a table, write the record `to`.

    Args:
        threads: 0 is PyTorch's own choice.
        width: channels of the ConvNet.
        seconds: leave out what would take longer.
    """
    threads = threads or torch.get_num_threads()
    recorder = Recorder(CPU)
    print(f"{'':42}{'':28}{'seconds':>9}{'MB':>8}{'Gflop/s':>9}{'of conv':>9}")
    earlier = read_record(to)["measurements"] if to.exists() else []
    rows: list[dict[str, Any]] = []
    for bare in points(threads, width, seconds):
        wanted = {key: value for key, value in dataclasses.asdict(bare).items() if key != "operations"}
        known = next((row for row in earlier if wanted.items() <= row.items()), None)
        if known:
            rows.append(known)
            continue
        one = dataclasses.replace(bare, implementation="textbook", segments=1, least_seconds=0.0)
        point = dataclasses.replace(bare, operations=bare.segments * operations(one))
        found = in_a_process(point, seconds)
        named = {"name": described(point), **found, "commit": recorder.report()["commit"]}
        rows.append({**dataclasses.asdict(point), **named})
        if "left_out" in found:
            said = f"   {found['left_out']}"
        else:
            numbers = (found["seconds"], found["peak_memory_mb"], found["rate"] / 1e9)
            said = "{:9.3f}{:8.0f}{:9.1f}".format(*numbers) + f"{found['rate'] / found['convolution_rate']:9.0%}"
        print(f"{described(point):42}{point.implementation:28}{said}", flush=True)
        report = {key: value for key, value in recorder.report().items() if key not in ("peak_memory_mb", "threads")}
        write_record(to, {"threads": threads, "measurements": rows, **report})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--point"]:
        limit_memory()
        print(json.dumps(measure(Point(**json.loads(sys.argv[2])), float(sys.argv[3]))))
    else:
        tyro.cli(main, description=__doc__)
