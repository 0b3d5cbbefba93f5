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
from cddlib.runtime.errors import UserError
from cddlib.training.engine import make_step, operations
from cddlib.training.step import ComputeConfig, Residuals, TrainingStep

PART = 64
"""Most images of a student that a CPU takes at a time; more are no faster. A GPU takes as many as its memory holds."""
MAPS_OF_A_STEP = 72
"""Feature maps of an image, each as large as the convolutions' outputs together, that a step and its derivatives may
take on a GPU: twice what they do, since as much is left to what steps remember."""
FILLS_CPU, FILLS_GPU = 1e8, 4e9
"""Operations, forward, of steps that keep the processor busy. On one NVIDIA H200, eight students of ten CIFAR images
(3e9) took less than half as long at once as one after the other; more have not been measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """How the student is trained on the synthetic set."""

    student_steps: int = 20
    """Steps N that the student takes."""
    student_batch: int | None = None
    """Synthetic images a step; without it, all of them."""
    gradient: Literal["exact", "truncated", "halved"] = "exact"
    """The exact gradient; TESLA's, which is truncated; or that with half the images' part, as TESLA's code has it."""
    match_step: Literal["last", "nearest"] = "last"
    """Match the student's last parameters, or those that are nearest to the target in the L1 norm (ATT)."""
    dropped_fraction: float = 0.0
    """Fraction of the parameters, those already nearest to the target, that the loss leaves out (PAD)."""
    side_by_side: int | None = None
    """Most segments whose students take their steps side by side; by default as many as fill the processor."""

    def __post_init__(self) -> None:
        for name in ("student_steps", "student_batch", "side_by_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        self.check_students(self.side_by_side or 1)
        if not 0 <= self.dropped_fraction < 1:
            raise UserError(f"dropped_fraction is {self.dropped_fraction}; it must be 0 or more and below 1.")

    def check_students(self, side_by_side: int) -> None:
        """Raise `UserError` if so many students cannot take their steps side by side."""
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


def chunk_size(
    network: Network, config: MatchingConfig, device_type: str, image_shape: tuple[int, ...], batch: int
) -> int:
    """How many students take their steps, of `batch` images, side by side; by default ConvNets, as fill the device."""
    if config.side_by_side or not isinstance(network, ConvNet) or config.match_step == "nearest":
        return config.side_by_side or 1
    fills = FILLS_GPU if device_type == "cuda" else FILLS_CPU
    return max(1, int(fills / (batch * operations(network, image_shape))))


def segment_chunks(network: Network, config: MatchingConfig, images: Tensor, batch: int, students: int) -> list[slice]:
    """Which of the students, who train on `images`, take their steps side by side, one turn after the other."""
    number = chunk_size(network, config, images.device.type, tuple(images.shape[1:]), batch)
    return [slice(first, min(first + number, students)) for first in range(0, students, number)]


def student_batches(
    students: list[list[StudentStep]], images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """What the students see: augmented images [s m c h w], targets [s m classes], step after step; the steps' sizes.

    Each of the six changes is made at once to all the images that have drawn it.
    """
    count, n = images.shape[:2]
    steps = [step._replace(indices=k * n + step.indices) for k, student in enumerate(students) for step in student]
    sizes = [len(step.indices) for step in steps]
    places = torch.arange(sum(sizes)).split(sizes)
    by_change: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        by_change.setdefault(step.draw.change if step.draw else "", []).append(number)
    order = torch.cat([places[number] for several in by_change.values() for number in several])
    rows = torch.cat([step.indices for step in steps])
    rows, grouped, back = upload(torch.stack([rows, rows[order], order.argsort()]), images.device)
    chosen = images.flatten(0, 1).index_select(0, grouped)
    alike = chosen.split([sum(sizes[number] for number in several) for several in by_change.values()])
    found = []
    for (change, several), group in zip(by_change.items(), alike, strict=True):
        numbers = [draw.numbers for number in several if (draw := steps[number].draw)]
        drawn = augment.Draw(change, upload(torch.cat(numbers), images.device)) if numbers else None
        found.append(augment.apply(drawn, group))
    inputs = torch.cat(found).index_select(0, back).unflatten(0, (count, -1))
    wanted = targets.flatten(0, 1).index_select(0, rows).unflatten(0, (count, -1))
    return inputs, wanted, tuple(sizes[: len(students[0])])


def over_parts(parts: list[tuple[Tensor, float]]) -> Tensor:
    """The batch's value, from those of its parts and each part's share of the batch."""
    first, share = parts[0]
    total = first if share == 1 else share * first
    for value, share in parts[1:]:
        total.add_(value, alpha=share)
    return total


def walk_forward(
    engine: TrainingStep,
    sizes: tuple[int, ...],
    parts: int,
    residual_budget: int,
    start: Tensor,
    inputs: Tensor,
    targets: Tensor,
    step_size: Tensor,
) -> tuple[list[Tensor], list[list[Residuals | None]]]:
    """The students' parameters; and the memory of each step, part by part, as long as there is room."""
    path: list[Tensor] = [start]
    memories: list[list[Residuals | None]] = []
    for i in range(len(sizes)):
        gradients = []
        memories.append([])
        for part, share in step_parts(sizes, i, parts):
            by_part, memory = engine.forward(path[-1], inputs[:, part], targets[:, part])
            gradients.append((by_part, share))
            residual_budget -= memory.size
            memories[-1].append(memory if residual_budget >= 0 else None)
            del memory
        path.append(torch.addcmul(path[-1], step_size[:, None], over_parts(gradients), value=-1))
    return path, memories


def step_parts(sizes: tuple[int, ...], step: int, most: int) -> list[tuple[slice, float]]:
    """Where a step's images lie among all, cut into even parts of at most `most`; and each part's share of the step."""
    first, size = sum(sizes[:step]), sizes[step]
    number = -(-size // most)
    edges = [first + size * part // number for part in range(number + 1)]
    return [(slice(*edge), (edge[1] - edge[0]) / size) for edge in itertools.pairwise(edges)]


def most_at_once(network: Network, device: torch.device, residual_budget: int) -> int:
    """Images of a step that are taken at a time; all where the network mixes them, as batch norm does."""
    if not isinstance(network, ConvNet) or network.config.norm == "batch":
        return sys.maxsize
    if device.type != "cuda":
        return PART
    maps = sum(4 * network.config.width * (network.side // 2**block) ** 2 for block in range(network.config.depth))
    return max(PART, residual_budget // (MAPS_OF_A_STEP * maps))


@torch.no_grad()
def roll_out(
    network: Network, start: Tensor, images: Tensor, targets: Tensor, step_size: Tensor, steps: list[StudentStep]
) -> list[Tensor]:
    """The student's parameters θ_0 … θ_N, N + 1 vectors of length p, without any graph.

    Arguments and their shapes are those of `matching_loss`.
    """
    inputs, wanted, sizes = student_batches([steps], images[None], targets[None])
    engine, most = make_step(network, ComputeConfig(), start.device), most_at_once(network, start.device, 0)
    path, _ = walk_forward(engine, sizes, most, 0, start[None], engine.prepared(inputs), wanted, step_size[None])
    return [thetas[0] for thetas in path]
