"""What a run will cost, before hours are spent on it: floating-point operations, memory, disk and time.

On the command line::

    cddlib plan --method datm --data cifar100 --ipc 10 --segments 4

Operations and memory are counted on tensors without data, for one step of each kind, and scaled to the run. Time is
measured: a few steps of each kind run on this machine, uncompiled, on random images of the right shape, so it holds as
far as the machine will be as busy as it is now; a compiled run takes less. Memory is what a run cannot do without where
a student takes its batch whole, as on a GPU; what `cddlib.training.step` keeps where there is room comes on top.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cddlib.data.dataset import VALIDATION_FRACTION, Images, load
from cddlib.data.preprocessing import Normalisation, Preprocessing, Whitening
from cddlib.distillation.config import DistillConfig
from cddlib.experts.config import BufferConfig
from cddlib.experts.curriculum import SCORER_EPOCHS, SCORERS
from cddlib.matching.loss import matching_losses
from cddlib.matching.student import chunk_size, plan_student
from cddlib.methods.recipes import buffer_recipe
from cddlib.networks.convnet import Network, NetworkConfig, parameter_count
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import flat, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.errors import UserError
from cddlib.runtime.random import generator
from cddlib.training.epoch import SharpnessConfig, fetch_real, predict, train_epoch
from cddlib.training.step import AutogradStep

MEASURED_SECONDS = 2.0
"""How long each kind of step is measured, at least; the first one is not counted."""


class Sizes(NamedTuple):
    """How large a data set is."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int


_SIZES = {
    "fashion_mnist": Sizes((1, 28, 28), 10, 60_000, 10_000),
    "cifar10": Sizes((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Sizes((3, 32, 32), 100, 50_000, 10_000),
    "tiny_imagenet": Sizes((3, 64, 64), 200, 100_000, 10_000),
    "imagenet": Sizes((3, 64, 64), 1000, 1_281_167, 50_000),
}


class Cost(NamedTuple):
    """What one stage takes."""

    stage: str
    flops: float
    """Floating-point operations, a multiply-add counted as two."""
    memory: float
    """Peak bytes of tensors on one device."""
    disk: float
    """Bytes that it leaves on disk."""
    seconds: float | None
    """Wall time, or None if nothing was measured."""


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What one image costs in one kind of step."""

    flops: float
    seconds: float | None


def sizes_of(name: str, root: Path | None) -> Sizes:
    """How large a data set is; one of no fixed size has to be prepared already (`UserError`)."""
    if name in _SIZES:
        return _SIZES[name]
    dataset = load(name, root)
    return Sizes(dataset.shape, len(dataset.classes), len(dataset.train.labels), len(dataset.test.labels))


def buffer_of(config: DistillConfig, **overrides: Any) -> BufferConfig:
    """How the experts that `config` matches are trained: by its method, on its network, pixels and augmentation."""
    experts = buffer_recipe(config.data.data, config.method, config.synthetic.ipc)
    own = {**flat(config.data), **flat(config.network), **flat(config.augmentation), **flat(config.compute)}
    return replace(experts, seed=config.seed, **own, **overrides)


def plan(
    experts: BufferConfig,
    config: DistillConfig,
    *,
    networks: int = 5,
    devices: int = 1,
    measure: bool = True,
    root: Path | None = None,
    device: str = "auto",
) -> list[Cost]:
    """The cost of training the experts, of the distillation, and of its evaluation with baselines.

    Args:
        experts: how experts are trained.
        config: the distillation.
        networks: networks R of the evaluation.
        devices: equal devices among which experts, segments and networks are divided, at no cost for communication.
        measure: run a few steps to predict the time.
        root: folder of the data sets.
        device: where to measure, or what for.

    Raises:
        UserError: `devices` or `networks` is below 1, or the size of the data set is not known.
    """
    for name, value in (("devices", devices), ("networks", networks)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    sizes = sizes_of(config.data.data, root)
    steps = _Steps(experts, config, sizes, device, measure, devices)
    return [
        _buffering(experts, sizes, steps, devices),
        _distillation(config, sizes, steps, devices),
        _evaluation(config, sizes, steps, networks, devices),
    ]


def _buffering(experts: BufferConfig, sizes: Sizes, steps: "_Steps", devices: int) -> Cost:
    validation = round(VALIDATION_FRACTION * sizes.train)
    train = sizes.train - validation * experts.holdout
    seen = sum(b - a for a, b in map(experts.curriculum.bounds, range(experts.epochs))) * train
    work = [(steps.expert, seen), (steps.test, validation * (experts.epochs + 1) + sizes.test)]
    ranking = [(steps.train, SCORERS * SCORER_EPOCHS * train)] if experts.curriculum.ranks_images else []
    share = -(-experts.experts // devices)
    vectors = 4 * parameter_count(steps.network) * (experts.epochs + 1)
    return Cost(
        "experts",
        experts.experts * _flops(work) + _flops(ranking),
        steps.expert_memory + vectors + _data_bytes(sizes, sizes.train + sizes.test),
        experts.experts * vectors,
        _seconds(work, share, ranking),
    )


def _distillation(config: DistillConfig, sizes: Sizes, steps: "_Steps", devices: int) -> Cost:
    images = config.synthetic.ipc * sizes.classes
    subset = images // config.schedule.subsets
    in_a_step = min(config.student.student_batch or subset, subset)
    labelled = [(steps.test, config.schedule.iterations * images)] if config.synthetic.labels == "teacher" else []
    student = [(steps.student, config.schedule.iterations * config.student.student_steps * in_a_step), *labelled]
    times = 0 if config.validate_every == 0 else 1 + -(-config.schedule.iterations // config.validate_every)
    validation = round(VALIDATION_FRACTION * sizes.train)
    trained = images * config.evaluation.evaluation_epochs * (config.schedule.subsets + 1) // 2
    checks = [(steps.train, times * config.validation_runs * trained)]
    checks += [(steps.test, times * config.validation_runs * validation), *labelled]
    set_bytes = 4 * images * (sizes.shape[0] * sizes.shape[1] * sizes.shape[2] + sizes.classes)
    vectors = 4 * parameter_count(steps.network) * (config.student.student_steps + 3)
    kept = 1 if config.combination.combine == "mean" else config.schedule.segments_in_all
    return Cost(
        "distillation",
        config.schedule.segments_in_all * _flops(student) + _flops(checks),
        steps.students * (steps.student_memory + vectors)
        + (kept + 3 + 2 * steps.students) * set_bytes
        + _data_bytes(sizes, validation),
        4 * set_bytes,  # the set; and the checkpoint: variables, momentum, best
        _seconds(student, -(-config.schedule.segments_in_all // devices), checks),
    )


def _evaluation(config: DistillConfig, sizes: Sizes, steps: "_Steps", networks: int, devices: int) -> Cost:
    images = config.synthetic.ipc * sizes.classes
    trained = images * config.evaluation.evaluation_epochs
    batches = config.evaluation.evaluation_epochs * -(-images // config.evaluation.evaluation_batch)
    epochs = max(1, round(batches / -(-sizes.train // config.evaluation.evaluation_batch)))
    on_sets = trained * (config.schedule.subsets + 1) // 2 + trained
    work = [(steps.train, on_sets), (steps.real, epochs * sizes.train), (steps.test, 3 * sizes.test)]
    memory = steps.train_memory + _data_bytes(sizes, sizes.train + sizes.test)
    return Cost("evaluation", networks * _flops(work), memory, 0, _seconds(work, -(-networks // devices), []))


def _flops(work: Sequence[tuple[_Unit, int | float]]) -> float:
    return sum((unit.flops * images for unit, images in work), 0.0)


def _seconds(
    work: Sequence[tuple[_Unit, int | float]], share: int, once: Sequence[tuple[_Unit, int | float]]
) -> float | None:
    """Seconds of `share` times `work`, and of what is not divided; None if nothing was measured."""
    if any(unit.seconds is None for unit, _ in work):
        return None
    total = [(unit.seconds or 0) * images for unit, images in work]
    return share * sum(total, 0.0) + sum((unit.seconds or 0) * images for unit, images in once)


def _data_bytes(sizes: Sizes, images: int) -> int:
    return images * sizes.shape[0] * sizes.shape[1] * sizes.shape[2]


def costs_table(costs: list[Cost]) -> str:
    """The costs as lines of text, with their sum."""
    total = sum(cost.seconds for cost in costs if cost.seconds is not None)
    lines = [f"{'':14}{'operations':>12}{'memory':>10}{'disk':>10}{'time':>12}"]
    for cost in costs:
        seconds = "-" if cost.seconds is None else _duration(cost.seconds)
        lines.append(
            f"{cost.stage:14}{cost.flops:>12.1e}{cost.memory / 1e6:>7,.0f} MB{cost.disk / 1e6:>7,.0f} MB{seconds:>12}"
        )
    if total:
        lines.append(f"{'':44}{_duration(total):>14}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read."""
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


# --- One step of each kind --------------------------------------------------------------------------------------


class _Steps:
    """The cost of one image in an expert's step, a student's step, a network's step, and a test."""

    def __init__(
        self, experts: BufferConfig, config: DistillConfig, sizes: Sizes, device: str, measure: bool, devices: int
    ) -> None:
        self.network = build_network(config.network, sizes.shape, sizes.classes)
        self.config, self.sizes = config, sizes
        subset = config.synthetic.ipc * sizes.classes // config.schedule.subsets
        student_batch = min(config.student.student_batch or subset, subset)
        train_batch = min(config.evaluation.evaluation_batch, config.synthetic.ipc * sizes.classes)
        network = config.network
        sharp = experts.sharpness
        expert, self.expert_memory = _training(network, sizes, experts.batch_size)
        train, self.train_memory = _training(network, sizes, train_batch)
        student, self.student_memory = _student(network, sizes, student_batch)
        kind = resolve_device(device).type if measure or device == "auto" else device.split(":")[0]
        most = chunk_size(self.network, config.student, kind, sizes.shape, student_batch)
        self.students = min(most, -(-config.schedule.segments_in_all // devices))
        """How many take their steps side by side."""
        seconds: dict[str, float | None] = dict.fromkeys(("expert", "train", "real", "test", "student"))
        if measure:
            seconds |= self._measure(experts.batch_size, train_batch, student_batch, sharp, resolve_device(device))
        self.expert = _Unit(expert * (2 if sharp.sharpness_radius else 1), seconds["expert"])
        self.train, self.real = _Unit(train, seconds["train"]), _Unit(train, seconds["real"])
        self.test = _Unit(_test(network, sizes), seconds["test"])
        self.student = _Unit(student, seconds["student"])

    def _measure(
        self, expert_batch: int, train_batch: int, student_batch: int, sharp: SharpnessConfig, device: torch.device
    ) -> dict[str, float]:
        """Seconds for one image in each kind of step."""
        rng = generator("plan")
        network, c, sizes = self.network, self.config, self.sizes
        theta = network.init(rng).to(device).requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=0.0)
        many = max(expert_batch, train_batch, 500)
        pixels = torch.randint(256, (many, *sizes.shape), generator=rng, dtype=torch.uint8).to(device)
        real = Images(pixels, torch.randint(sizes.classes, (many,), generator=rng).to(device))
        fetch = fetch_real(real, _any_preprocessing(c.data.zca, sizes, device))
        images = torch.randn(max(student_batch, train_batch), *sizes.shape, generator=rng).to(device)
        targets = torch.eye(sizes.classes)[torch.arange(len(images)) % sizes.classes].to(device)

        def held(indices: Tensor) -> tuple[Tensor, Tensor]:
            return images[indices], targets[indices]

        def epoch(of: Any, batch: int, sharpness: SharpnessConfig | None = None) -> Callable[[], object]:
            return lambda: train_epoch(
                network,
                theta,
                optimizer,
                of,
                batch,
                batch_size=batch,
                strategy=c.augmentation.augment,
                generator=rng,
                sharpness=sharpness,
            )

        few = replace(c.student, student_steps=2, student_batch=None)
        step_size = torch.tensor(c.synthetic.step_size, device=device)
        start, learned, wanted, rates = (
            tensor.expand(self.students, *tensor.shape).contiguous()
            for tensor in (theta.detach(), images[:student_batch], targets[:student_batch], step_size)
        )
        variables = [learned.requires_grad_(), rates.requires_grad_()]

        def student() -> None:
            steps = [plan_student(few, student_batch, c.augmentation.augment, rng) for _ in range(self.students)]
            losses = matching_losses(network, start, start + 1, learned, wanted, rates, steps, few)
            torch.autograd.grad(losses.sum(), variables)

        return {
            "expert": _time(epoch(fetch, expert_batch, sharp), device) / expert_batch,
            "train": _time(epoch(held, train_batch), device) / train_batch,
            "real": _time(epoch(fetch, c.evaluation.evaluation_batch), device) / c.evaluation.evaluation_batch,
            "test": _time(lambda: predict(network, theta, fetch, 500), device) / 500,
            "student": _time(student, device) / (2 * student_batch * self.students),
        }


def _any_preprocessing(zca: bool, sizes: Sizes, device: torch.device) -> Preprocessing:
    """A map that costs what the data set's own will."""
    c, h, w = sizes.shape
    if not zca:
        return Normalisation(torch.zeros(c), torch.ones(c)).to(device)
    return Whitening(torch.zeros(c * h * w), torch.eye(c * h * w), torch.ones(c * h * w)).to(device)


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of `run`, after one that is not counted."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()
    began, count = now(), 0
    while count < 3 or now() - began < MEASURED_SECONDS:
        run()
        count += 1
    return (now() - began) / count


# Steps on tensors that have shapes but no data. Recipes share networks and batches, so each is counted once.


def _blank(config: NetworkConfig, sizes: Sizes, batch: int) -> tuple[Network, Tensor, Tensor, Tensor]:
    """A network, its parameters, images, and targets."""
    network = build_network(config, sizes.shape, sizes.classes)
    theta = torch.empty(parameter_count(network), device="meta", requires_grad=True)
    images = torch.empty(batch, *sizes.shape, device="meta")
    return network, theta, images, torch.empty(batch, sizes.classes, device="meta")


@functools.cache
def _test(config: NetworkConfig, sizes: Sizes) -> float:
    """Operations to classify one image."""
    network, theta, images, _ = _blank(config, sizes, 2)
    with torch.no_grad():
        return _count(lambda: network(theta, images))[0] / 2


@functools.cache
def _training(config: NetworkConfig, sizes: Sizes, batch: int) -> tuple[float, float]:
    """Operations for one image of a step of SGD, and the step's peak memory."""
    network, theta, images, targets = _blank(config, sizes, batch)
    flops, memory = _count(lambda: torch.autograd.grad(F.cross_entropy(network(theta, images), targets), theta))
    return flops / batch, memory


@functools.cache
def _student(config: NetworkConfig, sizes: Sizes, batch: int) -> tuple[float, float]:
    """Operations for one image of a student's step, forward and back, and its peak memory."""
    network, theta, images, targets = _blank(config, sizes, batch)
    engine, step = AutogradStep(network), (theta[None], images[None], targets[None])
    flops, memory = _count(lambda: engine.vjp(engine.forward(*step)[1], theta.detach()[None]))
    return flops / batch + _training(config, sizes, batch)[0], memory


def _count(run: Callable[[], object]) -> tuple[float, float]:
    """Operations and peak bytes of `run`."""
    with FlopCounterMode(display=False) as counter, _PeakMemory() as memory:
        run()
    return float(counter.get_total_flops()), float(memory.peak)


class _PeakMemory(TorchDispatchMode):
    """The most bytes that the results of operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return results

    def _free(self, size: int) -> None:
        self.now -= size
