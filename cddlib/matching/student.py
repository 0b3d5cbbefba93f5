"""The student: its random choices, what it sees, and its N steps on the synthetic set."""

import dataclasses
import itertools
import sys
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from cddlib.data import augment
from cddlib.networks.convnet import ConvNet, Network
from cddlib.runtime.device import upload
from cddlib.runtime.errors import UserError, require
from cddlib.training.engine import make_step, operations
from cddlib.training.step import ComputeConfig, Residuals, TrainingStep

PART = 2**16
"""Pixels of a batch that a CPU computes at a time, those of 64 CIFAR images; more are no faster. A GPU takes as many
images as fit its memory."""
MAPS_OF_A_STEP = 72
"""How many times the size of all convolutions' outputs a GPU's step and its derivatives may occupy. They need half of
that; the other half is for residuals."""
FILLS_CPU, FILLS_GPU = 1e8, 4e9
"""Floating-point operations of a forward pass that keep the processor busy; see `book/results/gpu/speed.json`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How the student is trained on the synthetic set."""

    student_steps: int = 20
    """Steps N that the student takes."""
    student_batch: int | None = None
    """Synthetic images a step; without it, as many as the subset that is optimised has: all of them, if it is one."""
    gradient: Literal["exact", "truncated", "halved"] = "exact"
    """The exact gradient; TESLA's, which is truncated; or that with half the images' part, as TESLA's code has it."""
    match_step: Literal["last", "nearest"] = "last"
    """Match the student's last parameters, or those that are nearest to the target in the L1 norm (ATT)."""
    dropped_fraction: float = 0.0
    """Fraction of the parameters, those already nearest to the target, that the loss leaves out (PAD)."""
    side_by_side: int | None = None
    """Most segments whose students are trained side by side; by default as many as fill the processor."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("student_steps", "student_batch", "side_by_side")}
        require(1, **sizes)
        require(0, below=1, dropped_fraction=self.dropped_fraction)
        self.check_students(self.side_by_side or 1)

    def batch(self, learned: int, active: int) -> int:
        """Images a step of the `learned` ones: those of the subset of number `active` and of the subsets before it."""
        return min(self.student_batch or -(-learned // (active + 1)), learned)

    def check_students(self, side_by_side: int) -> None:
        """Raise `UserError` if so many students cannot be trained side by side."""
        if self.match_step == "nearest" and side_by_side > 1:
            raise UserError(
                f"side_by_side is {side_by_side}; with match_step 'nearest', where students end at different steps, "
                f"it must be 1."
            )


class StudentStep(NamedTuple):
    """The randomness of one student step."""

    indices: Int64[Tensor, " b"]
    """Which synthetic images."""
    draw: augment.Draw | None
    """How they are augmented."""


def plan_student(config: MatchingConfig, size: int, strategy: str, generator: torch.Generator) -> list[StudentStep]:
    """Draw the N steps of a student on `size` synthetic images: shuffled passes, cut into batches."""
    batches: list[Tensor] = []
    while len(batches) < config.student_steps:
        batches += torch.randperm(size, generator=generator).split(config.student_batch or size)
    return [
        StudentStep(indices, augment.draw(strategy, len(indices), generator))
        for indices in batches[: config.student_steps]
    ]


def chunk_size(network: Network, config: MatchingConfig, device_type: str, batch: int) -> int:
    """How many students with batches of `batch` images are trained side by side.

    By default one, or for ConvNets as many as keep the device busy.
    """
    if config.side_by_side or not isinstance(network, ConvNet) or config.match_step == "nearest":
        return config.side_by_side or 1
    fills = FILLS_GPU if device_type == "cuda" else FILLS_CPU
    return max(1, int(fills / (batch * operations(network))))


def segment_chunks(network: Network, config: MatchingConfig, images: Tensor, batch: int, students: int) -> list[slice]:
    """The students that are trained side by side on `images`: slices, one after the other."""
    number = chunk_size(network, config, images.device.type, batch)
    return [slice(first, min(first + number, students)) for first in range(0, students, number)]


def student_batches(
    students: list[list[StudentStep]], images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The batches of all steps: augmented images [s m c h w], targets [s m classes], and the size of each step's batch.

    All images that drew the same kind of augmentation are augmented together.
    """
    count, n = images.shape[:2]
    steps = [step._replace(indices=k * n + step.indices) for k, student in enumerate(students) for step in student]
    sizes = [len(step.indices) for step in steps]
    places = torch.arange(sum(sizes)).split(sizes)
    by_change: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        by_change.setdefault(step.draw.change if step.draw else "", []).append(number)
    order = torch.cat([places[number] for numbers in by_change.values() for number in numbers])
    rows = torch.cat([step.indices for step in steps])
    rows, grouped, back = upload(torch.stack([rows, rows[order], order.argsort()]), images.device)
    chosen = images.flatten(0, 1).index_select(0, grouped)
    groups = chosen.split([sum(sizes[number] for number in numbers) for numbers in by_change.values()])
    augmented = []
    for (change, numbers), group in zip(by_change.items(), groups, strict=True):
        draws = [draw.numbers for number in numbers if (draw := steps[number].draw)]
        draw = augment.Draw(change, upload(torch.cat(draws), images.device)) if draws else None
        augmented.append(augment.apply(draw, group))
    inputs = torch.cat(augmented).index_select(0, back).unflatten(0, (count, -1))
    batch_targets = targets.flatten(0, 1).index_select(0, rows).unflatten(0, (count, -1))
    return inputs, batch_targets, tuple(sizes[: len(students[0])])


@dataclasses.dataclass(frozen=True)
class Walk:
    """The N steps of students with batches of equal sizes: what computes a step, and how much memory it may use."""

    step: TrainingStep
    batch_sizes: tuple[int, ...]
    """Images of each step."""
    part_size: int
    """Most images of a batch that are computed at a time."""
    budget: int
    """Bytes of residuals that may be kept."""

    def parts(self, i: int) -> list[tuple[slice, float]]:
        """Step i's batch in even parts: each one's place among the images of all steps, and fraction of the batch."""
        first, size = sum(self.batch_sizes[:i]), self.batch_sizes[i]
        number = -(-size // self.part_size)
        edges = [first + size * part // number for part in range(number + 1)]
        return [(slice(*edge), (edge[1] - edge[0]) / size) for edge in itertools.pairwise(edges)]

    def forward(
        self, start: Tensor, inputs: Tensor, targets: Tensor, step_size: Tensor
    ) -> tuple[list[Tensor], list[list[Residuals | None]]]:
        """The students' parameters θ_0 … θ_N, and the residuals of each step's parts; None where they were not kept."""
        path: list[Tensor] = [start]
        residuals: list[list[Residuals | None]] = []
        budget = self.budget
        for i in range(len(self.batch_sizes)):
            gradients = []
            residuals.append([])
            for part, fraction in self.parts(i):
                gradient, kept = self.step.forward(path[-1], inputs[:, part], targets[:, part])
                gradients.append((gradient, fraction))
                budget -= kept.size
                residuals[-1].append(kept if budget >= 0 else None)
                del kept
            path.append(torch.addcmul(path[-1], step_size[:, None], batch_mean(gradients), value=-1))
        return path, residuals


def batch_mean(parts: list[tuple[Tensor, float]]) -> Tensor:
    """A batch's mean, from the means of its parts and each part's fraction of the batch."""
    first, fraction = parts[0]
    total = first if fraction == 1 else fraction * first
    for value, fraction in parts[1:]:
        total.add_(value, alpha=fraction)
    return total


def make_walk(
    network: Network, compute: ComputeConfig, device: torch.device, batch_sizes: tuple[int, ...], budget: int
) -> Walk:
    """The steps of students on a device, which may keep `budget` bytes of residuals.

    A batch is not cut into parts if the network mixes its images, as batch norm does.
    """
    part_size = sys.maxsize
    if isinstance(network, ConvNet) and network.config.norm != "batch":
        config, part_size = network.config, max(1, PART // network.side**2)
        if device.type == "cuda":
            maps = sum(4 * config.width * (network.side // 2**block) ** 2 for block in range(config.depth))
            part_size = max(part_size, budget // (MAPS_OF_A_STEP * maps))
    return Walk(make_step(network, compute, device), batch_sizes, part_size, budget)
