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
from cddlib.experts.config import BufferConfig
from cddlib.experts.curriculum import SCORER_EPOCHS, SCORERS
from cddlib.matching.loss import matching_losses
from cddlib.matching.student import chunk_size, plan_student
from cddlib.methods.recipes import buffer_recipe
from cddlib.networks.convnet import parameter_count
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import flat, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.errors import UserError
from cddlib.runtime.random import generator
from cddlib.training import counting
from cddlib.training.epoch import SharpnessConfig, predict, train_epoch

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
    devices: int
    """Number of equal devices that divide it among them."""


class _Step(NamedTuple):
    """What a step of one kind takes."""

    flops: float
    """Operations for one image."""
    memory: int
    """Peak bytes of the whole step."""
    seconds: float
    """Time for one image; 0 if it was not measured."""


_Work = Sequence[tuple[_Step, int | float]]
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
    for name, value in (("devices", devices), ("networks", networks)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    meter = _Meter(config, sizes_of(config.data.data, root), devices, resolve_device(device) if measure else None)
    kind = resolve_device(device).type if device == "auto" else device.split(":")[0]
    return [_buffering(experts, meter), _distillation(config, meter, kind), _evaluation(config, networks, meter)]


def _buffering(experts: BufferConfig, meter: "_Meter") -> Cost:
    sizes, test = meter.sizes, meter.test()
    validation = round(VALIDATION_FRACTION * sizes.train)
    train = sizes.train - validation * experts.holdout
    seen = sum(b - a for a, b in map(experts.curriculum.bounds, range(experts.epochs))) * train
    step = meter.training(experts.batch_size, experts.sharpness)
    expert = [(step, seen), (test, validation * (experts.epochs + 1) + sizes.test)]
    ranking = (
        [(meter.training(experts.batch_size), SCORERS * SCORER_EPOCHS * train)]
        if experts.curriculum.ranks_images
        else []
    )
    trajectory = 4 * meter.parameters * (experts.epochs + 1)
    memory = step.memory + trajectory + math.prod(sizes.shape) * (sizes.train + sizes.test)
    return meter.cost("experts", experts.experts, expert, ranking, memory, experts.experts * trajectory)


def _distillation(config: DistillConfig, meter: "_Meter", device_type: str) -> Cost:
    sizes, test = meter.sizes, meter.test()
    images = config.synthetic.ipc * sizes.classes
    subset = images // config.schedule.subsets
    batch = min(config.student.student_batch or subset, subset)
    most = chunk_size(meter.network, config.student, device_type, sizes.shape, batch)
    students = min(most, -(-config.schedule.segments_in_all // meter.devices))  # who take their steps side by side
    step = meter.student(batch, students)
    labelled = [(test, config.schedule.iterations * images)] if config.synthetic.labels == "teacher" else []
    student = [(step, config.schedule.iterations * config.student.student_steps * batch), *labelled]

    times = 0 if config.validate_every == 0 else 1 + -(-config.schedule.iterations // config.validate_every)
    validation = round(VALIDATION_FRACTION * sizes.train)
    trained = images * config.evaluation.evaluation_epochs * (config.schedule.subsets + 1) // 2
    network = meter.training(min(config.evaluation.evaluation_batch, images))
    checks = [(network, times * config.validation_runs * trained)]
    checks += [(test, times * config.validation_runs * validation), *labelled]

    set_bytes = 4 * images * (math.prod(sizes.shape) + sizes.classes)
    sets = (
        3 + 2 * students + (1 if config.combination.combine == "mean" else config.schedule.segments_in_all)
    )  # and gradients
    path = 4 * meter.parameters * (config.student.student_steps + 3)
    memory = students * (step.memory + path) + sets * set_bytes + math.prod(sizes.shape) * validation
    disk = 4 * set_bytes  # the set; and the checkpoint: variables, momentum, best
    return meter.cost("distillation", config.schedule.segments_in_all, student, checks, memory, disk)


def _evaluation(config: DistillConfig, networks: int, meter: "_Meter") -> Cost:
    sizes, images = meter.sizes, config.synthetic.ipc * meter.sizes.classes
    batches = config.evaluation.evaluation_epochs * -(-images // config.evaluation.evaluation_batch)
    epochs = max(1, round(batches / -(-sizes.train // config.evaluation.evaluation_batch)))
    on_set, on_real = map(
        meter.training, (min(config.evaluation.evaluation_batch, images), config.evaluation.evaluation_batch)
    )
    trained = (
        images * config.evaluation.evaluation_epochs * (config.schedule.subsets + 3) // 2
    )  # on the set, and on random real images
    network = [(on_set, trained), (on_real, epochs * sizes.train), (meter.test(), 3 * sizes.test)]
    memory = on_real.memory + math.prod(sizes.shape) * (sizes.train + sizes.test)
    return meter.cost("evaluation", networks, network, [], memory, 0)


def costs_table(costs: Sequence[Cost]) -> str:
    """The costs as a sentence, and below it a table, a line a stage."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    devices = costs[0].devices
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
        self.network = build_network(config.network, sizes.shape, sizes.classes)
        self.parameters = parameter_count(self.network)
        what = {"config": config.network, "shape": sizes.shape, "classes": sizes.classes}
        self.count = functools.partial(counting.count, **what)
        self.training, self.test = functools.cache(self._training), functools.cache(self._test)
        if device:
            self.rng = generator("plan")
            self.theta = self.network.init(self.rng).to(device).requires_grad_()
            self.images = torch.randn(MOST_IMAGES, *sizes.shape, generator=self.rng).to(device)
            self.targets = torch.eye(sizes.classes)[torch.arange(MOST_IMAGES) % sizes.classes].to(device)
            self.fetch = lambda indices: (self.images[indices], self.targets[indices])

    def cost(self, stage: str, times: int, each: _Work, once: _Work, memory: int, disk: int) -> Cost:
        """The sum: `times` times the steps of `each`, divided among the devices, and the steps of `once`."""
        divided = -(-times // self.devices)
        flops = sum(times * step.flops * images for step, images in each)
        flops += sum(step.flops * images for step, images in once)
        seconds = sum(divided * step.seconds * images for step, images in each)
        seconds += sum(step.seconds * images for step, images in once)
        return Cost(stage, flops, memory, disk, seconds if self.device else None, self.devices)

    def _training(self, batch: int, sharpness: SharpnessConfig | None = None) -> _Step:
        """A step of SGD; of an expert, with a second gradient if its minima shall be flat."""
        gradients = 2 if sharpness and sharpness.sharpness_radius > 0 else 1

        def run(size: int) -> None:
            network = self.network, self.theta, torch.optim.SGD([self.theta], lr=0.0)
            options: dict[str, Any] = {
                "strategy": self.config.augmentation.augment,
                "generator": self.rng,
                "sharpness": sharpness,
            }
            train_epoch(*network, self.fetch, size, batch_size=size, **options)

        flops, memory = self.count(counting.descend, batch=batch)
        return _Step(gradients * flops, memory, self._time(run, batch))

    def _test(self) -> _Step:
        """The classification of images."""
        seconds = self._time(lambda size: predict(self.network, self.theta, self.fetch, size), MOST_IMAGES)
        return _Step(*self.count(counting.classify, batch=2), seconds)

    def student(self, batch: int, students: int) -> _Step:
        """A step of a student, forward and back, of so many side by side."""
        config = replace(self.config, student_steps=2, student_batch=None)

        def run(size: int) -> None:
            rate = torch.tensor(config.synthetic.step_size, device=self.device)
            start, images, targets, rates = (
                tensor.detach().expand(students, *tensor.shape).contiguous()
                for tensor in (self.theta, self.images[:size], self.targets[:size], rate)
            )
            variables = [images.requires_grad_(), rates.requires_grad_()]
            steps = [plan_student(config.student, size, config.augmentation.augment, self.rng) for _ in range(students)]
            losses = matching_losses(self.network, start, start + 1, images, targets, rates, steps, config.student)
            torch.autograd.grad(losses.sum(), variables)

        back, memory = self.count(counting.walk_back, batch=batch)
        forward, _ = self.count(counting.descend, batch=batch)
        return _Step(forward + back, memory, self._time(run, batch) / (2 * students))

    def _time(self, run: Callable[[int], object], batch: int) -> float:
        """Seconds for one image of `run` on a batch: of all its images, or of as many as can be timed in passing."""
        if self.device is None:
            return 0.0
        few = min(batch, 4)
        many = max(few, int(LONGEST_SECONDS / _seconds(run, few, 0.0, self.device)))
        return _seconds(run, min(batch, many, MOST_IMAGES), MEASURED_SECONDS, self.device)


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
