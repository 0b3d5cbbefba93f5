"""An iteration on 1, 2 and 4 processes beside what `scaling_model.py` predicts, and its curves to 64 GPUs.

    OMP_NUM_THREADS=1 python tests/benchmarks/scaling.py --to book/results/scaling.json

Wants a quiet machine with four cores, and takes some minutes. Each number of processes measures:

- segments, and iterations without any, while every process works by itself: processes share memory and clock rate, so
  more of them are slower, which is the machine's doing and no communication;
- all-reduces of several sizes, from which one link is fitted;
- iterations as they are, which the model predicts from the first two.

Times are medians, spreads half the distance between the 16th and the 84th percentile: the machine's other work counts
less so, if there is some. All are measured in turn, several rounds of them, for the machine is not always as fast.
Nothing is measured on a GPU: the curves rest on the assumptions that the record lists.
"""

import argparse
import collections
import concurrent.futures
import datetime
import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from scaling_model import (
    Cluster,
    Link,
    Scaling,
    Work,
    fit_link,
    gradient_bytes,
    iteration,
    scaled,
    work_of,
)

import cddlib
from cddbook.records import write_record
from cddlib.data.dataset import load, sizes_of
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import initial_state, iterate
from cddlib.matching.student import plan_student
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.random import generator

PROCESSES = (1, 2, 4)
SEGMENTS = (4, 8)
SIZES = (4, 2**13, 2**17, 2**20, 2**24)
DEVICES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 4


class Case(NamedTuple):
    """One work, with the experts that it matches."""

    name: str
    config: DistillConfig
    repeats: int
    """Iterations that a round times."""
    buffer: Path
    root: Path


def cases(folder: Path) -> list[Case]:
    """The works that are measured; trains their experts. The 32-pixel images are noise, in ten classes."""
    rng = generator("scaling")
    for part, label, number in itertools.product(("train", "val"), range(10), range(20)):
        path = folder / "images" / part / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()).save(path)
    cddlib.prepare("imagefolder", folder, source=folder / "images", size=32)
    shared: dict[str, Any] = {"segments": max(SEGMENTS), "window_end": 16, "expert_epochs": 2}
    shared |= {"side_by_side": 1}  # as the model has it
    shared |= {"lr_images": 0.0, "lr_step_size": 0.0}  # noise teaches nothing, and the same work is timed again
    found = []
    for name, data, depth, ipc, steps, repeats in (
        ("digits, width 32, IPC 1", "digits", 2, 1, 20, 5),
        ("32-pixel images, width 32, IPC 1", "imagefolder", 3, 1, 4, 4),
        ("32-pixel images, width 32, IPC 10", "imagefolder", 3, 10, 1, 3),
    ):
        network: dict[str, Any] = {"width": 32, "depth": depth}
        config = cddlib.distill_recipe("mtt", data, ipc, student_steps=steps, student_batch=None, **network, **shared)
        buffer = folder / f"{data}-experts"
        experts = cddlib.buffer_recipe(data, experts=1, epochs=18, augment=config.augmentation.augment, **network)
        cddlib.train_buffer(experts, buffer, root=folder, device="cpu")
        found.append(Case(name, config, repeats, buffer, folder))
    return found


# --- In one of the processes ------------------------------------------------------------------------------------


class Apart(Ranks):
    """A process that differentiates the first few segments and adds them up with nobody."""

    def __init__(self, segments: int) -> None:
        """Work on so many segments."""
        super().__init__()
        self.rank, self.count, self._segments = 0, 1, segments

    def share(self, work: Sequence[Any]) -> Sequence[Any]:
        """The first few."""
        return work[: self._segments]


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


def process(rank: int, *, count: int, store: Path, works: list[Case]) -> dict[Any, list[float]]:
    """Measure everything as one of `count` processes; returns seconds by what they are of."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if count > 1:
        patience = datetime.timedelta(minutes=10)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    found: dict[Any, list[float]] = {}
    for case, segments in itertools.product(works, SEGMENTS):
        config = cddlib.replace(case.config, segments=segments)
        buffer = cddlib.Buffer(case.buffer)
        state = initial_state(config, load(config.data.data, case.root), buffer, torch.device("cpu"))
        state.progress.iteration = 0
        ranks = {"nothing": Apart(0), "one": Apart(1), "iteration": Ranks()}
        runs = [functools.partial(iterate, state, config, buffer, group) for group in ranks.values()]
        for name, seconds in zip(ranks, timed(case.repeats, *runs), strict=True):
            found[case.name, segments, name] = seconds
    if count > 1:
        for size in SIZES:
            (found["all-reduce", size],) = timed(10, functools.partial(Ranks().sum, torch.zeros(size // 4)))
        dist.destroy_process_group()
    return found


# --- In the parent ----------------------------------------------------------------------------------------------


def together(count: int, works: list[Case], store: Path) -> list[dict[Any, list[float]]]:
    """What each of `count` processes measured in a round; they find each other at `store`, a new file."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn) as pool:
        return list(pool.map(functools.partial(process, count=count, store=store, works=works), range(count)))


def spread(values: Sequence[float]) -> float:
    """Half the distance between the 16th and the 84th percentile: a normal distribution's standard deviation."""
    low, high = np.percentile(values, [16, 84])
    return float(high - low) / 2


def work_measured(every: list[dict[Any, list[float]]], case: Case, segments: int) -> Work:
    """The work, from what the processes measured while each worked by itself."""
    nothing = [float(np.median(measured[case.name, segments, "nothing"])) for measured in every]
    one = [measured[case.name, segments, "one"] for measured in every]
    means = [float(np.median(times)) - beside for times, beside in zip(one, nothing, strict=True)]
    segment = float(np.mean(means))
    return Work(
        segments=segments,
        segment=segment,
        size=gradient_bytes(case.config, case.root),
        alone=float(np.mean(nothing)),
        segment_spread=float(np.mean([spread(times) for times in one])) / segment,
        device_spread=float(np.std(means, ddof=1)) / segment if len(means) > 1 else 0.0,
    )


def compared(works: list[Case], by_count: dict[int, list[dict[Any, list[float]]]]) -> list[dict[str, Any]]:
    """Measured iterations beside predicted ones."""
    reduced = [(size, count) for size in SIZES for count in PROCESSES[1:]]
    link = fit_link([(*one, float(np.median(by_count[one[1]][0]["all-reduce", one[0]]))) for one in reduced])
    rows = []
    for case, segments, count in itertools.product(works, SEGMENTS, PROCESSES):
        seconds = float(np.median(by_count[count][0][case.name, segments, "iteration"]))
        predicted = iteration(work_measured(by_count[count], case, segments), count, link).seconds
        row = {"work": case.name, "segments": segments, "processes": count}
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
CURVES: tuple[tuple[Scaling, int], ...] = (("strong", 1), ("strong", 8), ("weak", 1))
"""The kind of scaling, and the experts that are matched at once: by all devices, or for each of them."""


def model(draws: dict[str, float], segments: int = 8) -> list[dict[str, Any]]:
    """The curves of `SETS`; `draws` says how many seconds each takes to draw a segment's student."""
    a = {name: value for name, (value, _) in ASSUMED.items()}
    inside, between = (Link(a[f"{where}_latency"], a[f"{where}_bandwidth"]) for where in ("inside", "between"))
    cluster = Cluster(inside, between, int(a["node"]))
    rows = []
    for (name, config), (scaling, experts) in itertools.product(configurations(segments).items(), CURVES):
        work = work_of(
            cddlib.replace(config, concurrent_experts=experts),
            a["operations_per_second"],
            memory=a["memory_bytes_per_second"],
            draw=draws[name],
            segment_spread=a["segment_spread"],
            device_spread=a["device_spread"],
        )
        for devices in DEVICES:
            parts, efficiency = scaled(work, devices, cluster, scaling)
            at_once = experts * (devices if scaling == "weak" else 1)
            row = {"set": name, "scaling": scaling, "segments": segments, "concurrent_experts": at_once}
            rows.append({**row, "devices": devices, "efficiency": efficiency, "binds": parts.binds})
    return rows


def configurations(segments: int) -> dict[str, DistillConfig]:
    """The recipes of `SETS`."""
    return {name: cddlib.distill_recipe(*recipe, segments=segments) for name, *recipe in SETS}


def drawing_seconds(config: DistillConfig) -> float:
    """Seconds to draw one segment's student; it happens on the CPU, whatever the device is."""
    images = config.synthetic.ipc * sizes_of(config.data.data, None).classes
    rng = generator("scaling", config.data.data)
    (seconds,) = timed(15, functools.partial(plan_student, config.student, images, config.augmentation.augment, rng))
    return float(np.median(seconds))


def main() -> None:
    """Measure, predict, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recorder = Recorder(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        works = cases(Path(folder))
        by_count: dict[int, list[dict[Any, list[float]]]] = {
            count: [collections.defaultdict(list) for _ in range(count)] for count in PROCESSES
        }
        for number, count in itertools.product(range(ROUNDS), PROCESSES):
            found = together(count, works, Path(folder) / f"store-{number}-{count}")
            for pooled, once in zip(by_count[count], found, strict=True):
                for what, seconds in once.items():
                    pooled[what] += seconds
        measured = compared(works, by_count)
    draws = {name: drawing_seconds(config) for name, config in configurations(8).items()}
    assumptions = {name: {"value": value, "source": where} for name, (value, where) in ASSUMED.items()}
    assumptions["draw_seconds"] = {"value": draws, "source": "measured here: students are drawn on the CPU"}
    record = {"measured": measured, "assumptions": assumptions, "model": model(draws), **recorder.report()}
    write_record(options.to, record)


if __name__ == "__main__":
    main()
