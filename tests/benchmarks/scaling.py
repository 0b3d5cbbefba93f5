"""An iteration on 1, 2 and 4 processes beside what a model predicts, and the model's curves to 64 GPUs.

    OMP_NUM_THREADS=1 python tests/benchmarks/scaling.py --to book/results/scaling.json

Wants a quiet machine with four cores, and takes some minutes. Each number of processes measures:

- segments, and iterations without any, while every process works by itself: processes share memory and clock rate, so
  more of them are slower, which is the machine's doing and no communication;
- all-reduces of several sizes, from which one link is fitted;
- iterations as they are, which the model predicts from the first two.

Times are medians, spreads half the distance between the 16th and the 84th percentile: the machine's other work counts
less so, if there is some. All are measured in turn, several rounds of them, for the machine is not always as fast.
Nothing is measured on a GPU: the curves rest on the assumptions that the record lists.

The model: devices divide the segments of an iteration; all wait for the slowest of them; a ring all-reduce adds the
gradients; and every device draws all students and takes the optimiser's step on its own::

    T(W) = E max over devices (their segments' times)               compute, idle devices, the slowest one
         + 2 (W − 1) latency + 2 (W − 1) / W · bytes / bandwidth    communication
         + segments · draw + alone                                  what is not divided

The times of segments add up, as they do one by one; small steps that are taken side by side take less.
Efficiency is T(1) / (W T(W)) for the same work (strong scaling), and T(1) / T(W) if the work grows with the devices, by
`concurrent_experts` (weak scaling).
"""

import collections
import concurrent.futures
import datetime
import functools
import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from scipy.optimize import nnls

import cddlib
from cddbook.records import write_record
from cddlib.data.dataset import load, sizes_of
from cddlib.distillation.checkpoint import State
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import iterate
from cddlib.matching.student import plan_student
from cddlib.plan import buffer_of, plan
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.random import generator
from cddlib.synthetic import initialise

# --- The model --------------------------------------------------------------------------------------------------

BINDS = 0.05
"""What takes a larger part of an iteration than this binds; below it, computing does."""


class Link(NamedTuple):
    """What carries numbers from one device to the next."""

    latency: float
    """Seconds of a step of the ring that carries nothing."""
    bandwidth: float
    """Bytes a second, in one direction."""


class Work(NamedTuple):
    """One iteration, as far as time depends on it."""

    segments: int
    """Segments that are matched, of all experts together."""
    segment: float
    """Seconds of one segment."""
    size: int = 0
    """Bytes that the all-reduce adds up."""
    draw: float = 0.0
    """Seconds in which every device draws one segment's student."""
    alone: float = 0.0
    """Seconds of all else that every device does, the optimiser's step above all."""
    segment_spread: float = 0.0
    """Standard deviation of a segment's time over its mean, each segment for itself."""
    device_spread: float = 0.0
    """Standard deviation of the devices' speeds over their mean, the same for all segments of a device."""


class Parts(NamedTuple):
    """Seconds of an iteration, by what takes them."""

    compute: float
    """The segments, if they could be divided evenly."""
    idle: float
    """Some devices have a segment less than others, or none."""
    slowest: float
    """The slowest device takes longer than the mean."""
    communication: float
    """The all-reduce."""
    alone: float
    """What is not divided."""

    @property
    def binds(self) -> str:
        """The largest part beside computing; computing itself, if no other is more than `BINDS` of the whole."""
        largest, name = max((seconds, name) for name, seconds in self._asdict().items() if name != "compute")
        return name if largest > BINDS * sum(self) else "compute"


def iteration(work: Work, devices: int, link: Link) -> Parts:
    """The parts of an iteration on so many devices."""
    shares = np.array([len(range(rank, work.segments, devices)) for rank in range(min(devices, work.segments))])
    spreads = work.segment * np.hypot(shares**0.5 * work.segment_spread, shares * work.device_spread)
    times = shares * work.segment + spreads * np.random.default_rng(0).standard_normal((20_000, len(shares)))
    compute, most = work.segments * work.segment / devices, int(shares[0]) * work.segment
    return Parts(
        compute=compute,
        idle=most - compute,
        slowest=float(times.max(axis=1).mean() - most) if len(shares) > 1 else 0.0,
        communication=all_reduce(work.size, devices, link),
        alone=work.segments * work.draw + work.alone,
    )


def all_reduce(size: int, devices: int, link: Link) -> float:
    """Seconds of a ring all-reduce: W − 1 steps that add, W − 1 that spread the sum, each with a W-th of the bytes."""
    return 2 * (devices - 1) * (link.latency + size / devices / link.bandwidth)


def fit_link(measured: Sequence[tuple[int, int, float]]) -> Link:
    """The link that explains measured all-reduces (bytes, devices, seconds) best, in relative terms."""
    size, devices, seconds = np.array(measured, dtype=np.float64).T
    terms = np.stack([2 * (devices - 1), 2 * (devices - 1) / devices * size], axis=1)
    latency, per_byte = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return Link(float(latency), float(1 / per_byte) if per_byte else math.inf)


def operations(config: DistillConfig) -> tuple[float, float]:
    """Floating-point operations of one segment, and of an iteration beside its segments, as `cddlib.plan` counts."""
    now, more = (
        plan(buffer_of(changed), changed, measure=False)[1].flops
        for replay in (config.schedule.replay, config.schedule.replay + 1)
        for changed in [cddlib.replace(config, iterations=1, replay=replay, validate_every=0)]
    )
    return more - now, now - config.schedule.segments_in_all * (more - now)


def gradient_bytes(config: DistillConfig, root: Path | None = None) -> int:
    """What one all-reduce adds up: a gradient of the synthetic set, or one for each segment where weights need them."""
    sizes = sizes_of(config.data.data, root)
    logits = 0 if config.synthetic.labels == "hard" else sizes.classes
    numbers = config.synthetic.ipc * sizes.classes * (math.prod(sizes.shape) + logits) + 1
    return 4 * numbers * (1 if config.combination.combine == "mean" else config.schedule.segments_in_all)


# --- What is measured -------------------------------------------------------------------------------------------

PROCESSES = (1, 2, 4)
SEGMENTS = (4, 8)
SIZES = (4, 2**13, 2**17, 2**20, 2**24)
ROUNDS = 4
REPEATS = 4
"""Iterations that a round times."""


def prepared(folder: Path) -> dict[str, DistillConfig]:
    """The works that are measured; trains their experts. The 32-pixel images are noise, in ten classes."""
    rng = generator("scaling")
    for part, label, number in itertools.product(("train", "val"), range(10), range(20)):
        path = folder / "images" / part / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()).save(path)
    cddlib.prepare("imagefolder", folder, source=folder / "images", size=32)
    shared: dict[str, Any] = {"student_batch": None, "window_end": 16, "expert_epochs": 2}
    shared |= {"side_by_side": 1}  # as the model has it
    shared |= {"lr_images": 0.0, "lr_step_size": 0.0}  # noise teaches nothing, and the same work is timed again
    works = {}
    for name, data, depth, ipc, steps in (
        ("digits, width 32, IPC 1", "digits", 2, 1, 20),
        ("32-pixel images, width 32, IPC 1", "imagefolder", 3, 1, 4),
        ("32-pixel images, width 32, IPC 10", "imagefolder", 3, 10, 1),
    ):
        network: dict[str, Any] = {"width": 32, "depth": depth}
        works[name] = config = cddlib.distill_recipe("mtt", data, ipc, student_steps=steps, **network, **shared)
        experts = cddlib.buffer_recipe(data, experts=1, epochs=18, augment=config.augmentation.augment, **network)
        cddlib.train_buffer(experts, folder / data, root=folder, device="cpu")
    return works


# --- In one of the processes ------------------------------------------------------------------------------------


def apart(segments: int) -> Ranks:
    """A process that differentiates the first few segments and adds them up with nobody."""
    alone = Ranks()
    alone.rank, alone.count = 0, 1
    alone.portion = lambda work: work[:segments]  # type: ignore[method-assign]
    return alone


def timed(repeats: int, *runs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each run, in turn, after one turn that is not counted; all processes begin each together."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, seconds in zip(runs, found, strict=True):
            Ranks().wait()
            began = time.perf_counter()
            run()
            seconds += [time.perf_counter() - began] if turn else []
    return found


def process(rank: int, *, count: int, store: Path, works: dict[str, DistillConfig]) -> dict[Any, list[float]]:
    """Measure everything as one of `count` processes that meet at the file `store`; seconds by what they are of."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if count > 1:
        patience = datetime.timedelta(minutes=10)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    found: dict[Any, list[float]] = {}
    for (name, work), segments in itertools.product(works.items(), SEGMENTS):
        config = cddlib.replace(work, segments=segments)
        buffer = cddlib.Buffer(store.parent / config.data.data)
        dataset, where = load(config.data.data, store.parent), (config.seed, torch.device("cpu"))
        state = State(config, initialise(config.synthetic, dataset, buffer, *where, config.schedule.subsets))
        state.progress.iteration = 0
        ranks = {"nothing": apart(0), "one": apart(1), "iteration": Ranks()}
        runs = [functools.partial(iterate, state, config, buffer, group) for group in ranks.values()]
        for who, seconds in zip(ranks, timed(REPEATS, *runs), strict=True):
            found[name, segments, who] = seconds
    if count > 1:
        for size in SIZES:
            (found["all-reduce", size],) = timed(10, functools.partial(Ranks().sum, torch.zeros(size // 4)))
        dist.destroy_process_group()
    return found


# --- In the parent ----------------------------------------------------------------------------------------------


def work_measured(every: list[dict[Any, list[float]]], name: str, segments: int, size: int) -> Work:
    """The work, from what the processes measured while each worked by itself."""
    nothing = [float(np.median(measured[name, segments, "nothing"])) for measured in every]
    one = [measured[name, segments, "one"] for measured in every]
    means = [float(np.median(times)) - beside for times, beside in zip(one, nothing, strict=True)]
    segment = float(np.mean(means))
    spreads = [np.ptp(np.percentile(times, [16, 84])) / 2 for times in one]  # a normal distribution's deviation
    return Work(
        segments=segments,
        segment=segment,
        size=size,
        alone=float(np.mean(nothing)),
        segment_spread=float(np.mean(spreads)) / segment,
        device_spread=float(np.std(means, ddof=1)) / segment if len(means) > 1 else 0.0,
    )


def compared(sizes: dict[str, int], by_count: dict[int, list[dict[Any, list[float]]]]) -> list[dict[str, Any]]:
    """Measured iterations beside predicted ones; `sizes` has the bytes that each work's all-reduce adds up."""
    reduced = [(size, count) for size in SIZES for count in PROCESSES[1:]]
    link = fit_link([(*one, float(np.median(by_count[one[1]][0]["all-reduce", one[0]]))) for one in reduced])
    rows = []
    for (name, size), segments, count in itertools.product(sizes.items(), SEGMENTS, PROCESSES):
        seconds = float(np.median(by_count[count][0][name, segments, "iteration"]))
        predicted = sum(iteration(work_measured(by_count[count], name, segments, size), count, link))
        row = {"work": name, "segments": segments, "processes": count}
        rows.append({**row, "seconds": seconds, "predicted": predicted, "error": predicted / seconds - 1})
        print(rows[-1], flush=True)
    return rows


# --- To 64 GPUs -------------------------------------------------------------------------------------------------

ASSUMED = {
    "operations_per_second": (
        2e13,
        "assumed: 30 % of the 67e12 of NVIDIA's data sheet of the H100 SXM for FP32 without tensor cores; not measured",
    ),
    "memory_bytes_per_second": (2e12, "assumed: 60 % of the 3.35e12 of the same data sheet"),
    "node": (8, "GPUs of a DGX or HGX H100"),
    "inside_bandwidth": (3e11, "assumed: two thirds of NVLink 4's 450e9 bytes a second in one direction (data sheet)"),
    "between_bandwidth": (4e10, "assumed: 80 % of a 400 Gb/s InfiniBand NDR port a GPU, as in a DGX H100"),
    "inside_latency": (3.4e-6, "NCCL, src/graph/tuning.cc: NVLink, ring, protocol Simple"),
    "between_latency": (1.4e-5, "the same: network, ring, protocol Simple"),
    "segment_spread": (0.01, "assumed: every segment has the same operations"),
    "device_spread": (0.03, "assumed: GPUs of one kind differ by some percent"),
}
SETS = (("CIFAR-100, IPC 50", "datm", "cifar100", 50), ("ImageNet-1K, IPC 10", "tesla", "imagenet", 10))
CURVES = (("strong", 1), ("strong", 8), ("weak", 1))
"""The kind of scaling, and the experts that are matched at once: by all devices, or for each of them."""


def work_of(config: DistillConfig, draw: float) -> Work:
    """The work of an iteration on the assumed device. Beside segments, it passes over the gradient about ten times."""
    (segment, beside), size = operations(config), gradient_bytes(config)
    rate, memory, *spreads = (
        ASSUMED[name][0]
        for name in ("operations_per_second", "memory_bytes_per_second", "segment_spread", "device_spread")
    )
    alone = beside / rate + 10 * size / memory
    return Work(config.schedule.segments_in_all, segment / rate, size, draw, alone, *spreads)


def model(draws: dict[str, float], segments: int = 8) -> list[dict[str, Any]]:
    """The curves of `SETS`; `draws` says how many seconds each takes to draw a segment's student."""
    links = [Link(ASSUMED[f"{where}_latency"][0], ASSUMED[f"{where}_bandwidth"][0]) for where in ("inside", "between")]
    rows = []
    for (name, *recipe), (scaling, experts) in itertools.product(SETS, CURVES):
        config = cddlib.distill_recipe(*recipe, segments=segments, concurrent_experts=experts)
        work = work_of(config, draws[name])
        for devices in (1, 2, 4, 8, 16, 32, 64):
            times = devices if scaling == "weak" else 1
            link = links[devices > ASSUMED["node"][0]]  # a ring is as slow as its slowest link
            parts = iteration(work._replace(segments=work.segments * times), devices, link)
            efficiency = sum(iteration(work, 1, link)) * times / devices / sum(parts)
            row = {"set": name, "scaling": scaling, "segments": segments, "concurrent_experts": experts * times}
            rows.append({**row, "devices": devices, "efficiency": efficiency, "binds": parts.binds})
    return rows


def drawing_seconds(config: DistillConfig) -> float:
    """Seconds to draw one segment's student; it happens on the CPU, whatever the device is."""
    images = config.synthetic.ipc * sizes_of(config.data.data, None).classes
    rng = generator("scaling", config.data.data)
    (seconds,) = timed(15, functools.partial(plan_student, config.student, images, config.augmentation.augment, rng))
    return float(np.median(seconds))


def main(to: Path) -> None:
    """Measure, predict, and write the record `to`."""
    torch.set_num_threads(1)
    recorder = Recorder(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder, spawn = Path(name), multiprocessing.get_context("spawn")
        works = prepared(folder)
        by_count: dict[int, list[dict[Any, list[float]]]] = {
            count: [collections.defaultdict(list) for _ in range(count)] for count in PROCESSES
        }
        for number, count in itertools.product(range(ROUNDS), PROCESSES):
            measure = functools.partial(process, count=count, store=folder / f"{number}-{count}", works=works)
            with concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn) as pool:
                for pooled, once in zip(by_count[count], pool.map(measure, range(count)), strict=True):
                    for what, seconds in once.items():
                        pooled[what] += seconds
        measured = compared({name: gradient_bytes(config, folder) for name, config in works.items()}, by_count)
    draws = {name: drawing_seconds(cddlib.distill_recipe(*recipe)) for name, *recipe in SETS}
    assumptions = {name: {"value": value, "source": where} for name, (value, where) in ASSUMED.items()}
    assumptions["draw_seconds"] = {"value": draws, "source": "measured here: students are drawn on the CPU"}
    write_record(to, {"measured": measured, "assumptions": assumptions, "model": model(draws), **recorder.report()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
