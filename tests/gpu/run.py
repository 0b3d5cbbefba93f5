"""What a GPU has to prove, and what it is good for, in the time that there is: `make gpu`.

    python tests/gpu/run.py --seconds 540 --root DIR --to DIR

Stages, in this order, each with a record of its own in the folder `--to`, which is written as soon as it is known. A
stage whose record is complete is not done again, and one that has too little time left is left out::

    machine     versions, and rates of copies, matrix products and convolutions
    gradients   whole walks, on random segments, against automatic differentiation in float64
    at-once     several runs in threads of one process, which share the GPU
    speed       an iteration's gradient, beside the textbook's; an expert's epoch and a network's epochs
    experts     a buffer for MTT's CIFAR-10 with one image a class: real work from here on
    precision   walks on segments of these experts, in every precision, against float64
    distil      MTT with K = 1 and K = 2 at equal compute, several seeds, all at once
    evaluate    networks trained on each run's set, at its milestones and at the end, and on random real images

The command works from a checkout, without installing, where Python has torch, numpy, safetensors, jaxtyping, tqdm,
psutil and filelock. `--tiny` does all of it in sizes that a CPU manages in a minute, which is how it is tested.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / folder) for folder in (".", "book", "tests/benchmarks")]

import textbook  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import cddlib  # noqa: E402
from cddbook.records import read_record, write_record  # noqa: E402
from cddlib.data.augment import CHANGES, AugmentConfig  # noqa: E402
from cddlib.data.dataset import Images  # noqa: E402
from cddlib.evaluate import REAL_LEARNING_RATE, correct_of_set, fetch_synthetic, train_network  # noqa: E402
from cddlib.matching import loss as losses  # noqa: E402
from cddlib.matching import student as students  # noqa: E402
from cddlib.matching.loss import matching_losses  # noqa: E402
from cddlib.matching.student import MatchingConfig  # noqa: E402
from cddlib.protocol import EvaluateConfig  # noqa: E402
from cddlib.runtime.config import replace  # noqa: E402
from cddlib.runtime.device import resolve_device  # noqa: E402
from cddlib.runtime.distributed import Interrupted, Ranks  # noqa: E402
from cddlib.runtime.files import read_json, read_tensors  # noqa: E402
from cddlib.runtime.provenance import Recorder  # noqa: E402
from cddlib.training import convnet_step, graphs  # noqa: E402
from cddlib.training.epoch import fetch_real, train_epoch  # noqa: E402
from cddlib.training.step import ComputeConfig  # noqa: E402

CLASSES = 10
STRATEGY = AugmentConfig().augment
MILESTONES = 10
"""Iterations of a run whose sets are kept, and tested: evenly spaced, so that runs of different K share some."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    side: int = 32
    width: int = 128
    steps: int = 50
    """Student steps N at one image a class."""
    few_steps: int = 8
    """Student steps of the checks with every augmentation."""
    more: tuple[int, int] = (10, 30)
    """Images a class, and student steps, of the other setting whose speed is measured."""
    counts: tuple[int, ...] = (1, 2, 4, 8)
    batch: int = 256
    real_images: int = 50_000
    epochs: int = 100
    """Of a network on one image a class."""
    seconds: float = 1.0
    """A measurement is done again until it has taken so long."""
    large: int = 8192
    """Rows of the matrices, and thousands of the numbers that are copied, whose rates are measured."""
    experts: int = 20
    expert_epochs: int = 3
    walks: int = 20
    data: str = "cifar10"
    segments: int = 5000
    """Segments that a run matches."""
    runs: str = "1:0,2:0,1:1,2:1"
    """K and seed of each."""
    networks: int = 3
    evaluation_epochs: int = 1000


TINY = Sizes(
    side=8, width=4, steps=4, few_steps=3, more=(2, 3), counts=(1, 2), batch=16, real_images=64, epochs=2, seconds=0.0,
    large=64, experts=2, expert_epochs=3, walks=2, data="digits", segments=4, runs="1:0,2:0", networks=1,
    evaluation_epochs=2,
)  # fmt: skip


class Bench:
    """The device, the sizes, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start the clock."""
        self.device = resolve_device(options.device)
        self.sizes = dataclasses.replace(TINY if options.tiny else Sizes(), **dict(options.set))
        self.root: Path | None = options.root
        self.to: Path = options.to
        self.gpu = self.device.type == "cuda"
        self._ends = time.monotonic() + options.seconds

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Segment count and seed of every run."""
        pairs = (run.split(":") for run in self.sizes.runs.split(","))
        return [(int(count), int(seed)) for count, seed in pairs]

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._ends - time.monotonic()

    @functools.cached_property
    def network(self) -> cddlib.ConvNet:
        """The field's ConvNet for the measurements on random images."""
        depth = 3 if self.sizes.side == 32 else 2
        config = cddlib.NetworkConfig(width=self.sizes.width, depth=depth)
        return cddlib.build_network(config, (3, self.sizes.side, self.sizes.side), CLASSES)  # type: ignore[return-value]

    @functools.cached_property
    def buffer(self) -> cddlib.Buffer:
        return cddlib.Buffer(self.to / "buffer")

    def wait(self) -> None:
        """Until the GPU has done its work."""
        if self.gpu:  # the device as a whole may not be waited for while another thread captures
            torch.cuda.current_stream(self.device).synchronize()

    def timed(self, run: Callable[[], object], *, most: int = 50) -> dict[str, Any]:
        """Median, least and most milliseconds of repeated runs after a first one, whose seconds count apart."""

        def once() -> float:
            began = time.perf_counter()
            run()
            self.wait()
            return time.perf_counter() - began

        first, ms = once(), [1000 * once() for _ in range(3)]
        while sum(ms) < 1000 * self.sizes.seconds and len(ms) < most:
            ms.append(1000 * once())
        numbers = {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}
        rounded = {name: round(value, 4) for name, value in numbers.items()}
        return {**rounded, "repeats": len(ms), "first_seconds": round(first, 3)}


# --- The machine ------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rates, of which the first is in GB a second, read and written, and the others in Tflop/s."""
    n, device = bench.sizes.large, bench.device
    source = torch.randn(n * 1000 * 16, device=device)
    goal = torch.empty_like(source)
    rates = {"copy_gb_s": 2 * source.nbytes / 1e6 / bench.timed(lambda: goal.copy_(source))["least"]}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[f"product_{name}"] = 2 * n**3 / 1e9 / bench.timed(lambda a=a, b=b: a @ b)["least"]
    width, side = bench.sizes.width, bench.sizes.side // 2
    for images, (name, dtype) in itertools.product(
        (10, bench.sizes.batch), (("ieee", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ):
        x = torch.randn(images, width, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(width, width, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        with convnet_step._multiplying(name, device):
            ms = bench.timed(lambda x=x, w=w: [F.conv2d(x, w, padding=1) for _ in range(20)])["least"] / 20
        rates[f"convolution_{name}_{images}"] = 2 * images * width**2 * 9 * side**2 / 1e9 / ms
    yield {"rates": {name: round(rate, 3) for name, rate in rates.items()}}


# --- Gradients --------------------------------------------------------------------------------------------------

Walk = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[students.StudentStep]]
"""Start, target, images, targets, step size and steps of a student."""


def random_walk(
    bench: Bench, seed: int, steps: int, strategy: str = STRATEGY, batch: int | None = None, ipc: int = 1
) -> Walk:
    """A student on random images, between random parameters and others that are near."""
    rng, size, side = cddlib.generator("gpu", seed), ipc * CLASSES, bench.sizes.side
    start, target, images, _, step_size = textbook.noise(bench.network, (3, side, side), size, rng, bench.device)
    targets = torch.rand(size, CLASSES, generator=rng).softmax(1).to(bench.device)
    plan = cddlib.plan_student(MatchingConfig(student_steps=steps, student_batch=batch), size, strategy, rng)
    return start, target, images, targets, step_size, plan


def textbook_gradients(network: cddlib.ConvNet, walk: Walk, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Loss, and derivatives by images, targets and step size, by automatic differentiation."""
    start, target, *variables = (tensor.detach().to(dtype) for tensor in walk[:5])
    for variable in variables:
        variable.requires_grad_()
    loss = textbook.matching_loss(network, start, target, *variables, walk[5])
    return [loss.detach(), *torch.autograd.grad(loss, variables)]


def cddlib_gradients(network: cddlib.ConvNet, walks: Sequence[Walk], compute: ComputeConfig) -> list[list[Tensor]]:
    """The same for each of several students that are trained side by side, as cddlib computes it."""
    start, target, *variables = (torch.stack(tensors) for tensors in list(zip(*walks, strict=True))[:5])
    for variable in variables:
        variable.requires_grad_()
    losses = matching_losses(network, start, target, *variables, [walk[5] for walk in walks], compute=compute)
    found = torch.autograd.grad(losses.sum(), variables)
    return [[losses[k].detach(), *(gradient[k] for gradient in found)] for k in range(len(walks))]


def compare(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """The errors of a loss and its gradients by images, targets and step size."""
    (loss, images, targets, step_size), (loss_, images_, targets_, step_size_) = (
        [tensor.double().cpu() for tensor in tensors] for tensors in (found, exact)
    )
    return {
        "loss": float((loss / loss_ - 1).abs()),
        "images": float((images - images_).norm() / images_.norm()),
        "cosine": float(F.cosine_similarity(images.flatten(), images_.flatten(), 0)),
        "targets": float((targets - targets_).norm() / targets_.norm()),
        "step_size": float((step_size / step_size_ - 1).abs()),
    }


def gradients(bench: Bench) -> Iterator[dict[str, Any]]:
    """Walks on random images: with every augmentation, with unequal batches, several at once, twice."""
    network, few = bench.network, bench.sizes.few_steps
    exact, rows = ComputeConfig(precision="ieee"), []

    def row(name: str, walk: Walk, found: list[Tensor]) -> None:
        rows.append({"what": name, **compare(found, textbook_gradients(network, walk))})

    for change in CHANGES:
        walk = random_walk(bench, 0, few, change)
        row(f"ieee, {change}", walk, cddlib_gradients(network, [walk], exact)[0])
    unequal = random_walk(bench, 1, few, batch=CLASSES // 2 - 1)
    row("ieee, batches of 4, 4 and 2", unequal, cddlib_gradients(network, [unequal], exact)[0])
    yield {"walks": rows}
    several = [random_walk(bench, seed, few) for seed in range(2, 5)]
    together = cddlib_gradients(network, several, exact)
    for number, (walk, found) in enumerate(zip(several, together, strict=True), 1):
        row(f"ieee, {number} of 3 at once", walk, found)
    alone = cddlib_gradients(network, several[:1], exact)[0]
    again = cddlib_gradients(network, several[:1], exact)[0]
    graph_after_other = cddlib_gradients(network, several[1:2], exact)[0]
    for name, precision, compiled in (
        ("float32", "float32", False), ("ieee, compiled", "ieee", True), ("float32, compiled", "float32", True),
    ):  # fmt: skip
        config = ComputeConfig(precision=precision, compiled=compiled and bench.gpu)  # type: ignore[arg-type]
        row(name, several[0], cddlib_gradients(network, several[:1], config)[0])
        yield {"walks": rows}
    loss, *_ = without_graph(bench, several[0], exact)()
    yield {
        "walks": rows,
        "same": {
            "twice": compare(again, alone),
            "at once": compare(together[0], alone),
            "another in between": compare(graph_after_other, together[1]),
            "without a graph, loss": float((loss[0] / alone[0] - 1).abs()),
        },
        "synchronisations": synchronisations(bench, several[0]),
    }


def synchronisations(bench: Bench, walk: Walk) -> int | None:
    """How many times the CPU waits for the GPU in one walk; None on a CPU."""
    if not bench.gpu:
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        cddlib_gradients(bench.network, [walk], ComputeConfig(precision="ieee"))
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


# --- Speed ------------------------------------------------------------------------------------------------------


def iteration(bench: Bench, ipc: int, steps: int, count: int, config: ComputeConfig | None) -> Callable[[], Any]:
    """An iteration's gradients on random images, as cddlib computes them; without a configuration as the textbook."""
    walks = [random_walk(bench, seed, steps, ipc=ipc) for seed in range(count)]
    if config:
        return functools.partial(cddlib_gradients, bench.network, walks, config)
    return lambda: [textbook_gradients(bench.network, walk, torch.float32) for walk in walks]


def speed(bench: Bench) -> Iterator[dict[str, Any]]:
    """Milliseconds of everything, the fastest ways first, so that time cuts off the textbook's."""
    rows: list[dict[str, Any]] = []
    compute = ComputeConfig(compiled=bench.gpu)

    def row(name: str, run: Callable[[], object], **more: Any) -> dict[str, Any]:
        rows.append({"what": name, **more, **bench.timed(run)})
        print(f"    {name:50} {rows[-1]['ms']:10.3f} ms   {more}", flush=True)
        return {"rows": rows}

    ways = {
        "cddlib": compute,
        "cddlib, uncompiled": ComputeConfig(compiled=False),
        "cddlib, bfloat16": ComputeConfig(compiled=bench.gpu, precision="bfloat16"),
        "textbook": None,
    }

    def match(way: str, ipc: int, steps: int, count: int = 1) -> dict[str, Any]:
        run = iteration(bench, ipc, steps, count, ways[way])
        return row("an iteration's gradient", run, way=way, ipc=ipc, steps=steps, segments=count)

    for count in bench.sizes.counts:
        yield match("cddlib", 1, bench.sizes.steps, count)
    for way in ("cddlib, uncompiled", "textbook"):
        yield match(way, 1, bench.sizes.steps)
    if bench.gpu:
        walk = random_walk(bench, 0, bench.sizes.steps)
        plain = without_graph(bench, walk, compute)
        yield row("without a graph", plain, way="cddlib", ipc=1, steps=bench.sizes.steps)
    yield row("an expert's epoch", expert_epoch(bench, compute), way="cddlib", images=bench.sizes.real_images)
    yield row("a network's epochs", network_epochs(bench, compute), way="cddlib", epochs=bench.sizes.epochs)
    yield match("cddlib, bfloat16", 1, bench.sizes.steps)
    for way in ("cddlib", "textbook", "cddlib, bfloat16"):
        yield match(way, *bench.sizes.more)
    for count in bench.sizes.counts[1:3]:
        yield match("textbook", 1, bench.sizes.steps, count)
    if bench.gpu:
        graphs._LATEST.graph.cache_clear()
        with torch.backends.cudnn.flags(benchmark=True):
            match("cddlib", 1, bench.sizes.steps)
        rows[-1]["way"] = "cddlib, cuDNN's search"
        graphs._LATEST.graph.cache_clear()
        yield {"rows": rows}


def without_graph(bench: Bench, walk: Walk, compute: ComputeConfig) -> Callable[[], tuple[Tensor, ...]]:
    """A walk whose steps are launched one after the other."""
    start, target, images, targets, step_size, plan = walk
    inputs, batch_targets, sizes = students.student_batches([plan], images[None], targets[None])
    run = losses._Setting(bench.network, MatchingConfig(), compute, bench.device, sizes, True).walk(1)
    return lambda: run(start[None], target[None], inputs, batch_targets, step_size[None])


def expert_epoch(bench: Bench, compute: ComputeConfig) -> Callable[[], object]:
    """An epoch on random images."""
    size, shape = bench.sizes.real_images, (3, bench.sizes.side, bench.sizes.side)
    rng = cddlib.generator("expert")
    pixels, labels, normalise = textbook.real_images(size, shape, bench.device)
    theta = bench.network.init(rng).to(bench.device).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.01)
    fetch = fetch_real(Images(pixels, labels), normalise)
    how: dict[str, Any] = {"batch_size": bench.sizes.batch, "strategy": STRATEGY, "generator": rng, "compute": compute}
    return lambda: train_epoch(bench.network, theta, optimizer, fetch, size, **how)


def network_epochs(bench: Bench, compute: ComputeConfig) -> Callable[[], object]:
    """Some epochs of a network on one image a class."""
    rng = cddlib.generator("network")
    images = torch.randn(CLASSES, 3, bench.sizes.side, bench.sizes.side, generator=rng).to(bench.device)
    targets = torch.eye(CLASSES, device=bench.device)
    config = EvaluateConfig(evaluation_epochs=bench.sizes.epochs, evaluation_batch=bench.sizes.batch)
    how: dict[str, Any] = {"purpose": "speed", "seed": 0, "device": bench.device}
    fetch = fetch_synthetic(images, targets)
    return lambda: train_network(bench.network, fetch, CLASSES, config, STRATEGY, compute, 0.01, **how)


def at_once(bench: Bench) -> Iterator[dict[str, Any]]:
    """Iterations of one, two, four and eight runs in threads: how many segments a second all of them match."""
    rows = []
    for segments, count in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4)):
        config, times = ComputeConfig(compiled=bench.gpu), 12 if bench.gpu else 2
        runs = [iteration(bench, 1, bench.sizes.steps, segments, config) for _ in range(count)]
        barrier = threading.Barrier(count, timeout=60)
        spans: list[tuple[float, float]] = []

        def repeat(run: Any, times: int = times, barrier: Any = barrier, spans: Any = spans) -> None:
            run()  # which captures
            bench.wait()
            barrier.wait()
            began = time.perf_counter()
            for _ in range(times):
                run()[0][0].item()
            spans.append((began, time.perf_counter()))

        for error in in_threads([functools.partial(repeat, run) for run in runs], bench):
            raise error
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        rows.append({"runs": count, "segments": segments, "segments_a_second": times * count * segments / seconds})
        print(f"    {rows[-1]}", flush=True)
        yield {"rows": rows}


def in_threads(works: Sequence[Callable[[], object]], bench: Bench) -> list[Exception]:
    """Do all of them, each in a thread with a stream of its own; returns what they raised, which is printed too."""
    raised: list[Exception] = []

    def work(function: Callable[[], object]) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream(bench.device)) if bench.gpu else contextlib.nullcontext()
        try:
            with stream:
                function()
        except Interrupted:
            pass
        except Exception as error:
            traceback.print_exception(error)
            raised.append(error)

    threads = [threading.Thread(target=work, args=(function,), daemon=True) for function in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # signals are heeded in between
    return raised


# --- Real work --------------------------------------------------------------------------------------------------


def experts(bench: Bench) -> Iterator[dict[str, Any]]:
    """MTT's, which see all training images, but few epochs: one image a class needs no more; in half of the time."""
    config = cddlib.buffer_recipe(
        bench.sizes.data, "mtt", width=bench.sizes.width, experts=bench.sizes.experts,
        epochs=bench.sizes.expert_epochs, holdout=False, compiled=bench.gpu,
    )  # fmt: skip
    with stopping_after(bench.left / 2):
        cddlib.train_buffer(config, bench.to / "buffer", root=bench.root, device=str(bench.device))
    yield {"buffer": read_json(bench.to / "buffer" / "buffer.json"), **read_json(bench.to / "buffer" / "result.json")}


@contextlib.contextmanager
def stopping_after(seconds: float) -> Iterator[None]:
    """Ask this process to stop when the time is over, as a cluster does."""
    timer = threading.Timer(max(1.0, seconds), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def precision(bench: Bench) -> Iterator[dict[str, Any]]:
    """Whole walks on the experts' first segments and real images, against float64."""
    buffer = bench.buffer
    dataset = cddlib.load(bench.sizes.data, bench.root)
    config = run_config(bench, 1, 0)
    rows = []
    for number in range(bench.sizes.walks):
        seeded = replace(config, seed=1000 + number)
        found = cddlib.synthetic.initialise(seeded.synthetic, dataset, buffer, seeded.seed, bench.device)
        rng = cddlib.generator("precision", number)
        expert, start = number % len(buffer.experts), number % config.schedule.window_end
        epochs = (start, start + config.schedule.expert_epochs)
        ends = (buffer.parameters(expert, epoch).to(bench.device) for epoch in epochs)
        plan = cddlib.plan_student(config.student, len(found.labels), config.augmentation.augment, rng)
        walk: Walk = (*ends, found.images, found.targets(), found.step_size, plan)  # type: ignore[assignment]
        wanted = textbook_gradients(buffer.network, walk)
        for name, compiled in (("ieee", False), ("float32", bench.gpu), ("bfloat16", False)):
            way = ComputeConfig(precision=name, compiled=compiled)  # type: ignore[arg-type]
            rows.append({"precision": name, **compare(cddlib_gradients(buffer.network, [walk], way)[0], wanted)})
        yield {"rows": rows}


def run_config(bench: Bench, count: int, seed: int) -> cddlib.DistillConfig:
    """MTT's recipe for one image a class with K segments, at equal compute."""
    sizes = bench.sizes
    few = {} if sizes.data == "cifar10" else {"student_steps": sizes.steps, "window_end": 2}
    return cddlib.distill_recipe(
        "mtt", sizes.data, ipc=1, segments=count, seed=seed, width=sizes.width, compiled=bench.gpu,
        iterations=sizes.segments // count, validate_every=0, milestones=MILESTONES,
        evaluation_epochs=sizes.evaluation_epochs, checkpoint_every=100, **few,
    )  # fmt: skip


def distil(bench: Bench) -> Iterator[dict[str, Any]]:
    """Each K with each seed, all at once; what time cuts off goes on from its checkpoint where its buffer is."""
    names = bench.runs

    def run(count: int, seed: int) -> None:
        config = run_config(bench, count, seed)
        cddlib.distill(config, bench.buffer, folder(bench, count, seed), root=bench.root, device=str(bench.device))

    sets, errors = 1 + len(names) * (2 + MILESTONES), list[Exception]()
    seconds = bench.left - (min(bench.left / 2, 2 + 0.8 * bench.sizes.networks * sets) if bench.gpu else 0)
    with contextlib.suppress(Interrupted), Ranks().graceful_stop("the iterations"), stopping_after(seconds):
        errors += in_threads([functools.partial(run, *name) for name in names], bench)
    yield {"runs": [run_record(bench, *name) for name in names if (folder(bench, *name) / "metrics.jsonl").exists()]}
    for error in errors:
        raise error
    check_finished(bench)


def check_finished(bench: Bench) -> None:
    """Raise `Interrupted` unless all runs are finished: a stage that depends on them is not complete."""
    if not all((folder(bench, *name) / "result.json").exists() for name in bench.runs):
        raise Interrupted("the runs are not finished; they go on from their checkpoints")


def folder(bench: Bench, count: int, seed: int) -> Path:
    return bench.to / f"k{count}-seed{seed}"


def run_record(bench: Bench, count: int, seed: int) -> dict[str, Any]:
    """What a run, finished or not, has written."""
    here = folder(bench, count, seed)
    lines = [line for line in (here / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    metrics = [json.loads(line) for line in lines]
    return {
        "segments": count, "seed": seed, "finished": (here / "result.json").exists(), "iterations": len(metrics) - 1,
        "config": read_json(here / "config.json"),
        **{name: [line[name] for line in metrics[1:]] for name in ("losses", "step_size", "seconds")},
        "starts": [[start for _, start in line["matched"]] for line in metrics[1:]],
    }  # fmt: skip


def evaluate(bench: Bench) -> Iterator[dict[str, Any]]:
    """Networks trained on each run's set, at its milestones and at the end, and on random real images."""
    dataset, preprocessing = cddlib.load(bench.sizes.data, bench.root), bench.buffer.preprocessing
    network, config = bench.buffer.network, run_config(bench, 1, 0)
    test = dataset.test.to(bench.device)
    accuracies: dict[tuple[int, int, int], list[float]] = {}
    random_real: list[float] = []

    def accuracy(images: Tensor, step_size: Tensor, seed: int) -> float:
        found = cddlib.SyntheticSet(
            images=images, labels=torch.arange(CLASSES), label_logits=None, step_size=step_size,
            preprocessing=preprocessing, classes=dataset.classes,
        ).to(bench.device)  # fmt: skip
        how = (config.evaluation, config.augmentation.augment, config.compute)
        return correct_of_set(found, network, *how, test, purpose="evaluation", seed=seed).mean().item()

    for number in range(bench.sizes.networks):
        real = cddlib.synthetic.random_real(dataset.train, CLASSES, 1, cddlib.generator("random real", number))
        random_real.append(accuracy(preprocessing(real.images), torch.tensor(REAL_LEARNING_RATE), number))
        for count, seed in bench.runs:
            here = folder(bench, count, seed)
            for path in (*sorted(here.glob("milestone-*.safetensors")), *here.glob("checkpoint.safetensors")):
                tensors, header = read_tensors(path, "state")
                each = accuracies.setdefault((count, seed, header["iteration"]), [])
                each.append(accuracy(tensors["images"], tensors["step_size"], number))
                rows = [
                    {"segments": k, "seed": s, "iteration": i, "matched": i * k, "accuracies": values}
                    for (k, s, i), values in accuracies.items()
                ]
                yield {"rows": rows, "random_real": random_real}
    check_finished(bench)


# --- All of it --------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[[Bench], Iterator[dict[str, Any]]], float]] = {
    "machine": (machine, 15),
    "gradients": (gradients, 60),
    "at-once": (at_once, 30),
    "speed": (speed, 60),
    "experts": (experts, 60),
    "precision": (precision, 40),
    "distil": (distil, 60),
    "evaluate": (evaluate, 20),
}
"""What each does, and how many seconds have to be left for it on a GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Do the stages, and return how many of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540.0, help="the time there is")
    parser.add_argument("--root", type=Path, help="folder of the data sets, as `cddlib data` fills it")
    parser.add_argument("--to", type=Path, default=Path("gpu-records"), help="folder of the records, and of the runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), help="only these")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--set", nargs="*", default=[], type=_setting, help="other sizes, as experts=40")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    if not (bench.gpu or options.tiny):
        parser.error(f"the device is {bench.device}; this is for a GPU. A CPU does all of it with --tiny.")
    failed = 0
    for name in options.stages:
        path, (stage, least) = options.to / f"{name}.json", STAGES[name]
        there = name != "experts" or (options.to / "buffer" / "result.json").exists()
        if there and path.exists() and read_record(path)["complete"]:
            print(f"{name}: its record is there")
        elif bench.gpu and bench.left < least:
            print(f"{name}: left out, for there are {bench.left:.0f} s left", flush=True)
        else:
            failed += not _do(name, stage, bench, path)
    return failed


def _setting(text: str) -> tuple[str, Any]:
    """A field of `Sizes` and its value."""
    name, value = text.split("=")
    return name, type(getattr(Sizes(), name))(value)


def _do(name: str, stage: Callable[[Bench], Iterator[dict[str, Any]]], bench: Bench, path: Path) -> bool:
    """Do a stage and write what it knows each time that it knows more; whether it came to its end."""
    recorder, record = Recorder(bench.device), {}
    print(f"{name}: begins with {bench.left:.0f} s left", flush=True)
    why = None
    try:
        for record in stage(bench):
            write_record(path, {**record, "complete": False, **recorder.report()})
            if bench.gpu and bench.left < 5:
                why = "no time is left"
                break
    except Interrupted as stop:
        why = str(stop)
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
    write_record(path, {**record, "complete": why is None, **({"why": why} if why else {}), **recorder.report()})
    print(f"{name}: {why or 'done'}, {recorder.seconds():.1f} s", flush=True)
    return why is None


if __name__ == "__main__":
    sys.exit(main())
