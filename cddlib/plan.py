"""What a run will cost, before hours are spent on it: floating-point operations, memory, disk and time.

On the command line::

    cddlib plan --method datm --data cifar100 --ipc 10 --segments 4

A run takes steps of a few kinds: an expert's, a student's, those of a network that is trained to evaluate a set, and
tests. One step of each kind is counted, on tensors that have shapes but no data, and timed, on random images on this
machine; the rest is one sum. The time holds as far as the machine will be as busy as it is now, and for runs that are
not compiled. The memory is what a run cannot do without if a student takes its batch whole, as on a GPU; what
`cddlib.training.step` remembers where memory allows comes on top.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cddlib.data.dataset import VALIDATION_FRACTION, Sizes, sizes_of
from cddlib.distillation.config import DistillConfig
from cddlib.evaluate import real_epochs
from cddlib.experts.config import BufferConfig
from cddlib.experts.curriculum import SCORER_EPOCHS, SCORERS
from cddlib.matching.loss import matching_losses
from cddlib.matching.segments import learned_images
from cddlib.matching.student import chunk_size, plan_student
from cddlib.methods.recipes import buffer_recipe
from cddlib.networks.convnet import parameter_count
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import flat, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.errors import UserError, require
from cddlib.runtime.random import generator
from cddlib.training import counting
from cddlib.training.epoch import predict, train_epoch

MEASURED_SECONDS = 0.5
"""How long each kind of step is repeated, at least; the first one is not counted."""
LONGEST_SECONDS = 0.3
"""How long one step may take: if it would take longer, fewer images are timed."""
MOST_IMAGES = 500
"""The largest batch that is timed."""


class Cost(NamedTuple):
    """What one stage takes."""

    stage: str
    flops: float
    """Floating-point operations on all devices, a multiply-add counted as two."""
    memory: int
    """Peak bytes of tensors on one device."""
    disk: int
    """Bytes that it leaves on disk."""
    seconds: float | None
    """Wall time, or None if nothing was measured."""


class _Step(NamedTuple):
    """What a step of one kind takes."""

    flops: float
    """Operations for one image."""
    memory: int
    """Peak bytes of the whole step."""
    seconds: float
    """Time for one image; 0 if it was not measured."""


_Work = Sequence[tuple[_Step, int]]
"""Kinds of step, each with the number of images that take part."""


def buffer_of(config: DistillConfig, **overrides: Any) -> BufferConfig:
    """How the experts that `config` matches are trained: by its method, on its network, pixels and augmentation."""
    experts = buffer_recipe(config.data.data, config.method, config.synthetic.ipc)
    shared = flat(config.data) | flat(config.network) | flat(config.augmentation) | flat(config.compute)
    return replace(experts, seed=config.seed, **shared, **overrides)


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
    require(1, devices=devices, networks=networks)
    meter = _Meter(config, sizes_of(config.data.data, root), devices, resolve_device(device) if measure else None)
    try:
        kind = resolve_device(device).type if device == "auto" else torch.device(device).type
    except RuntimeError:
        raise UserError(f"device is {device!r}; it must be auto, or one that PyTorch knows.") from None
    return [_buffering(experts, meter), _distillation(config, meter, kind), _evaluation(config, networks, meter)]


def _buffering(experts: BufferConfig, meter: "_Meter") -> Cost:
    sizes, step = meter.sizes, meter.training(experts.batch_size)
    validation = round(VALIDATION_FRACTION * sizes.train)
    train = sizes.train - validation * experts.holdout
    seen = round(train * sum(b - a for a, b in map(experts.curriculum.bounds, range(experts.epochs))))
    gradients = 2 if experts.sharpness.sharpness_radius > 0 else 1
    expert = [(step, gradients * seen), (meter.test, validation * (experts.epochs + 1) + sizes.test)]
    ranking = [(step, SCORERS * SCORER_EPOCHS * train * experts.curriculum.ranks_images)]
    trajectory = 4 * meter.parameters * (experts.epochs + 1)
    memory = step.memory + trajectory + meter.pixels * (sizes.train + sizes.test)
    return meter.cost("experts", experts.experts, expert, ranking, memory, experts.experts * trajectory)


def _distillation(config: DistillConfig, meter: "_Meter", device_type: str) -> Cost:
    schedule, classes = config.schedule, meter.sizes.classes
    images = config.synthetic.ipc * classes
    batch = config.images_a_step(classes)
    most = chunk_size(meter.network, config.student, device_type, batch)
    students = min(most, -(-schedule.segments_in_all // meter.devices))  # who take their steps side by side
    step = meter.student(batch, students)
    labelled = (meter.test, schedule.iterations * images * (config.synthetic.labels == "teacher"))
    student = [(step, schedule.iterations * config.student.student_steps * batch), labelled]

    validation = round(VALIDATION_FRACTION * meter.sizes.train)
    times = 0 if config.validate_every == 0 else 1 + -(-schedule.iterations // config.validate_every)
    learned = learned_images(config.synthetic.ipc, classes, schedule.subsets)
    trained = config.evaluation.evaluation_epochs * sum(learned)
    network = meter.training(min(config.evaluation.evaluation_batch, images))
    runs = times * config.validation_runs * (1 if config.optimizer.ema is None else 2)  # of the average too
    checks = [(network, runs * trained), (meter.test, runs * validation), labelled]

    path = 4 * meter.parameters * (config.student.student_steps + 3)
    set_bytes = 4 * images * (meter.pixels + classes)
    sets = 3 + 2 * students + (1 if config.combination.combine == "mean" else schedule.segments_in_all)  # and gradients
    memory = students * (step.memory + path) + sets * set_bytes + meter.pixels * validation
    kept = 3 + (config.optimizer.ema is not None) + 3 * (config.consolidation.consolidation != "none")
    disk = set_bytes * (1 + kept * (1 + config.milestones))  # the set; checkpoints: variables, momentum, best, and more
    return meter.cost("distillation", schedule.segments_in_all, student, checks, memory, disk)


def _evaluation(config: DistillConfig, networks: int, meter: "_Meter") -> Cost:
    sizes, images, batch = meter.sizes, config.synthetic.ipc * meter.sizes.classes, config.evaluation.evaluation_batch
    learned = learned_images(config.synthetic.ipc, sizes.classes, config.schedule.subsets)
    on_all = sizes.train * real_epochs(config.evaluation, learned, sizes.train)
    trained = config.evaluation.evaluation_epochs * (sum(learned) + images)  # on the set, and on random real images
    on_set, on_real = meter.training(min(batch, images)), meter.training(batch)
    network = [(on_set, trained), (on_real, on_all), (meter.test, 3 * sizes.test)]
    memory = on_real.memory + meter.pixels * (sizes.train + sizes.test)
    return meter.cost("evaluation", networks, network, [], memory, 0)


def costs_table(costs: Sequence[Cost], devices: int = 1) -> str:
    """The costs on so many devices as a sentence, and below it a table, a line a stage."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    where = "on this machine" if devices == 1 else f"on {devices} devices like this machine's"
    duration = f"About {_duration(sum(known))} {where}" if known else "No time was measured"
    memory = f"{_bytes(max(cost.memory for cost in costs))} of memory{' on each' if devices > 1 else ''}"
    lines = [f"{duration}; {memory}.", f"{'':14}{'operations':>12}{'memory':>10}{'disk':>10}{'time':>14}"]
    for cost in costs:
        seconds = "-" if cost.seconds is None else _duration(cost.seconds)
        sizes = f"{_bytes(cost.memory):>10}{_bytes(cost.disk):>10}"
        lines.append(f"{cost.stage:14}{cost.flops:>12.1e}{sizes}{seconds:>14}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """A time in the unit in which it is easiest to read."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    length, unit = next((length, unit) for length, unit in units if seconds >= 2 * length or length == 1)
    return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


class _Meter:
    """Counts a step of each kind, and times it if it has a device."""

    def __init__(self, config: DistillConfig, sizes: Sizes, devices: int, device: torch.device | None) -> None:
        self.config, self.sizes, self.devices, self.device = config, sizes, devices, device
        self.pixels = math.prod(sizes.shape)
        self.network = build_network(config.network, sizes.shape, sizes.classes)
        self.parameters = parameter_count(self.network)
        self.count = functools.partial(counting.count, config=config.network, shape=sizes.shape, classes=sizes.classes)
        if device:
            self.seconds = functools.cache(functools.partial(_seconds, device=device))
            self.rng = generator("plan")
            self.theta = self.network.init(self.rng).to(device).requires_grad_()
            self.images = torch.randn(MOST_IMAGES, *sizes.shape, generator=self.rng).to(device)
            self.targets = torch.eye(sizes.classes)[torch.arange(MOST_IMAGES) % sizes.classes].to(device)
            self.fetch = lambda indices: (self.images[indices], self.targets[indices])

    def cost(self, stage: str, times: int, each: _Work, once: _Work, memory: int, disk: int) -> Cost:
        """The sum: `times` times the steps of `each`, divided among the devices, and the steps of `once`."""
        flops = times * sum(step.flops * images for step, images in each)
        flops += sum(step.flops * images for step, images in once)
        seconds = -(-times // self.devices) * sum(step.seconds * images for step, images in each)
        seconds += sum(step.seconds * images for step, images in once)
        return Cost(stage, flops, memory, disk, seconds if self.device else None)

    def training(self, batch: int) -> _Step:
        """A step of SGD."""
        return _Step(*self.count(counting.descend, batch=batch), self._time(self._train, batch))

    @functools.cached_property
    def test(self) -> _Step:
        """The classification of images."""
        seconds = self._time(lambda size: predict(self.network, self.theta, self.fetch, size), MOST_IMAGES)
        return _Step(*self.count(counting.classify, batch=2), seconds)

    def student(self, batch: int, students: int) -> _Step:
        """A step of a student, forward and back, of so many side by side."""
        back, memory = self.count(counting.walk_back, batch=batch)
        forward, _ = self.count(counting.descend, batch=batch)
        seconds = self._time(functools.partial(self._match, students), batch) / (2 * students)
        return _Step(forward + back, memory, seconds)

    def _train(self, size: int) -> None:
        optimizer, strategy = torch.optim.SGD([self.theta], lr=0.0), self.config.augmentation.augment
        how: dict[str, Any] = {"batch_size": size, "strategy": strategy, "generator": self.rng}
        train_epoch(self.network, self.theta, optimizer, self.fetch, size, **how)

    def _match(self, students: int, size: int) -> None:
        """Two steps of students side by side."""
        config = replace(self.config.student, student_steps=2, student_batch=None)
        rate = torch.tensor(self.config.synthetic.step_size, device=self.device)
        start, images, targets, rates = (
            tensor.detach().expand(students, *tensor.shape).contiguous()
            for tensor in (self.theta, self.images[:size], self.targets[:size], rate)
        )
        variables = [images.requires_grad_(), rates.requires_grad_()]
        steps = [plan_student(config, size, self.config.augmentation.augment, self.rng) for _ in range(students)]
        losses = matching_losses(self.network, start, start + 1, images, targets, rates, steps, config)
        torch.autograd.grad(losses.sum(), variables)

    def _time(self, run: Callable[[int], object], batch: int) -> float:
        """Seconds for one image of `run` on a batch: of all its images, or of as many as can be timed in passing."""
        if self.device is None:
            return 0.0
        few = min(batch, 4)
        many = max(few, int(LONGEST_SECONDS / self.seconds(run, few, 0.0)))
        return self.seconds(run, min(batch, many, MOST_IMAGES), MEASURED_SECONDS)


def _seconds(run: Callable[[int], object], images: int, at_least: float, device: torch.device) -> float:
    """Mean seconds for one image of `run`, repeated for `at_least` so long; the first one is not counted."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < at_least:
        began = time.perf_counter()
        run(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sum(times[1:]) / len(times[1:]) / images
