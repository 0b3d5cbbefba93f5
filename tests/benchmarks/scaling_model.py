"""What an iteration takes on W devices, and what keeps it from being W times as fast: a model of numbers alone.

Devices divide the segments of an iteration, as distillation does; all wait for the slowest of them; a ring all-reduce
adds the gradients; and every device draws all students and takes the optimiser's step on its own::

    T(W) = E max over devices (their segments' times)               compute, idle devices, the slowest one
         + 2 (W − 1) latency + 2 (W − 1) / W · bytes / bandwidth    communication
         + segments · draw + alone                                  what is not divided

The times of segments add up, as they do one by one; small steps that are taken side by side take less.
Efficiency is T(1) / (W T(W)) for the same work (strong scaling), and T(1) / T(W) if the work grows with the devices, by
`concurrent_experts` (weak scaling). What the numbers are has to be measured or assumed; ``tests/benchmarks/scaling.py``
measures them on one machine, and compares the model with runs of 2 and 4 processes there.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm

import cddlib
from cddlib.data.dataset import sizes_of
from cddlib.distillation.config import DistillConfig
from cddlib.plan import buffer_of, plan

Scaling = Literal["strong", "weak"]

BINDS = 0.05
"""What takes a larger part of an iteration than this binds; below it, computing does."""


class Link(NamedTuple):
    """What carries numbers from one device to the next."""

    latency: float
    """Seconds of a step of the ring that carries nothing."""
    bandwidth: float
    """Bytes a second, in one direction."""


class Cluster(NamedTuple):
    """Nodes of several devices each."""

    inside: Link
    """Between devices of one node."""
    between: Link
    """Between devices of two nodes; a ring through several is as slow as this in every step."""
    node: int = 8
    """Devices of a node."""

    def link(self, devices: int) -> Link:
        """The slowest link of a ring through so many devices."""
        return self.inside if devices <= self.node else self.between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One iteration, as far as time depends on it."""

    segments: int
    """Segments that are matched, of all experts together."""
    segment: float
    """Seconds of one segment."""
    size: int
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
    def seconds(self) -> float:
        """All of it."""
        return math.fsum(self)

    @property
    def binds(self) -> str:
        """The largest part beside computing; computing itself, if no other is more than `BINDS` of the whole."""
        largest, name = max((seconds, name) for name, seconds in self._asdict().items() if name != "compute")
        return name if largest > BINDS * self.seconds else "compute"


def iteration(work: Work, devices: int, link: Link) -> Parts:
    """The parts of an iteration on so many devices."""
    shares = [len(range(rank, work.segments, devices)) for rank in range(devices)]
    last = expected_maximum(
        (count * work.segment, work.segment * math.hypot(count**0.5 * work.segment_spread, count * work.device_spread))
        for count in shares
        if count
    )
    compute = work.segments * work.segment / devices
    return Parts(
        compute=compute,
        idle=shares[0] * work.segment - compute,
        slowest=last - shares[0] * work.segment,
        communication=all_reduce(work.size, devices, link),
        alone=work.segments * work.draw + work.alone,
    )


def scaled(work: Work, devices: int, cluster: Cluster, scaling: Scaling) -> tuple[Parts, float]:
    """The parts of an iteration on so many devices, and its efficiency; with weak scaling, `work` is that of one."""
    alone = iteration(work, 1, cluster.inside).seconds
    if scaling == "strong":
        parts = iteration(work, devices, cluster.link(devices))
        return parts, alone / (devices * parts.seconds)
    parts = iteration(dataclasses.replace(work, segments=work.segments * devices), devices, cluster.link(devices))
    return parts, alone / parts.seconds


def all_reduce(size: int, devices: int, link: Link) -> float:
    """Seconds of a ring all-reduce: W − 1 steps that add, W − 1 that spread the sum, each with a W-th of the bytes."""
    return 2 * (devices - 1) * (link.latency + size / devices / link.bandwidth)


def expected_maximum(normals: Iterable[tuple[float, float]]) -> float:
    """The mean of the largest of independent normal numbers, each given by its mean and its standard deviation.

    The deviations are all positive, or all zero.
    """
    means, deviations = np.array(list(normals)).T
    if len(means) == 1 or not deviations.any():
        return float(means.max())
    low, high = (means - 9 * deviations).max(), (means + 9 * deviations).max()
    points = np.linspace(low, high, 2001)
    below = norm.cdf(points[:, None], means, deviations).prod(axis=1)
    return float(low + np.trapezoid(1 - below, points))


def fit_link(measured: Sequence[tuple[int, int, float]]) -> Link:
    """The link that explains measured all-reduces (bytes, devices, seconds) best, in relative terms."""
    size, devices, seconds = np.array(measured, dtype=np.float64).T
    terms = np.stack([2 * (devices - 1), 2 * (devices - 1) / devices * size], axis=1)
    latency, per_byte = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return Link(float(latency), float(1 / per_byte) if per_byte else float("inf"))


# --- The work of a configuration --------------------------------------------------------------------------------


def work_of(config: DistillConfig, rate: float, *, memory: float, **others: float) -> Work:
    """The work of an iteration of `config` on devices of `rate` operations and `memory` bytes a second.

    Beside its segments, an iteration passes over the gradient about ten times. `others` are further fields of `Work`.
    """
    segment, beside = operations(config)
    size = gradient_bytes(config)
    alone = beside / rate + 10 * size / memory
    return Work(segments=config.schedule.segments_in_all, segment=segment / rate, size=size, alone=alone, **others)


def operations(config: DistillConfig) -> tuple[float, float]:
    """Floating-point operations of one segment, and of an iteration beside its segments, as `cddlib.plan` counts."""

    def in_all(replay: int) -> float:
        changed = cddlib.replace(config, iterations=1, replay=replay, validate_every=0)
        return plan(buffer_of(changed), changed, measure=False)[1].flops

    now = in_all(config.schedule.replay)
    segment = in_all(config.schedule.replay + 1) - now
    return segment, now - config.schedule.segments_in_all * segment


def gradient_bytes(config: DistillConfig, root: Path | None = None) -> int:
    """What one all-reduce adds up: a gradient of the synthetic set, or one for each segment where weights need them."""
    sizes = sizes_of(config.data.data, root)
    logits = 0 if config.synthetic.labels == "hard" else sizes.classes
    numbers = config.synthetic.ipc * sizes.classes * (math.prod(sizes.shape) + logits) + 1
    return 4 * numbers * (1 if config.combination.combine == "mean" else config.schedule.segments_in_all)
