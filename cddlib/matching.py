"""The matching loss and its exact gradient, in memory that does not grow with the student's graph.

The student starts at θ*_t and takes N steps of SGD on the synthetic set, θ_{i+1} = θ_i − α g_i with
g_i = ∇_θ ℓ(θ_i; A_i(X_i), Y_i), where A_i is an augmentation. The matching loss is
L = ‖θ_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖²  (MTT, Cazenavette et al. 2022, Eq. 2).

MTT differentiates L through the graph of all N steps at once. Here only the N parameter vectors are kept, and the
chain rule is walked back one step at a time::

    λ_N = 2 (θ_N − θ*_{t+M}) / ‖θ*_t − θ*_{t+M}‖²
    for i = N−1 … 0:
        ∂L/∂X_i −= α (∂g_i/∂X_i)ᵀ λ      ∂L/∂Y_i −= α (∂g_i/∂Y_i)ᵀ λ      ∂L/∂α −= ⟨g_i, λ⟩
        λ       ←  λ − α (∂g_i/∂θ)ᵀ λ

Each of these steps needs the derivatives of the scalar ⟨g_i, λ⟩ (`cddlib.steps`). What step i remembers for them is
kept where memory allows, and computed again where it does not. A batch's loss is a mean, so on a CPU a ConvNet takes a
large batch in parts, one after another: the memory is then that of a part. Small steps leave a processor idle, so the
students of several segments take theirs side by side. The images do not change within a walk, so all its batches are
augmented beforehand; the walk is then a function of tensors, which a GPU replays as a graph (`cddlib.graphs`).

The methods of the field change little here::

    TESLA   leaves out the last line: the student's path through later parameters is dropped, which is another gradient
    ATT     ends the student at the step n* that lies nearest to the target, and walks back from there
    PAD     keeps, in numerator and denominator, only the parameters that are furthest from the target
"""

import dataclasses
import functools
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from cddlib import augment
from cddlib.engine import operations, room, steps_of
from cddlib.files import UserError
from cddlib.graphs import Graph, branches
from cddlib.networks import ConvNet, Network
from cddlib.runs import upload
from cddlib.steps import ComputeConfig, Memory, Steps

PART = 64
"""Most images of a student that a CPU takes at a time; more are no faster. A GPU takes as many as its memory holds."""
MAPS_OF_A_STEP = 72
"""Feature maps of an image, each as large as the convolutions' outputs together, that a step and its derivatives may
take on a GPU: twice what they do, since as much is left to what steps remember."""
FILLS_CPU, FILLS_GPU = 1e8, 4e9
"""Operations, forward, of steps that keep the processor busy. On one NVIDIA H200, eight students of ten CIFAR images
(3e9) took less than half as long at once as one after the other; more have not been measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingConfig(ComputeConfig):
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


class Step(NamedTuple):
    """The randomness of one student step."""

    indices: Int64[Tensor, " b"]
    """Which synthetic images."""
    draw: augment.Draw | None
    """How they are augmented."""


def plan_student(config: MatchingConfig, size: int, strategy: str, generator: torch.Generator) -> list[Step]:
    """Draw the N steps of a student on `size` synthetic images: shuffled passes, cut into batches."""
    batches: list[Tensor] = []
    while len(batches) < config.student_steps:
        batches += torch.randperm(size, generator=generator).split(config.student_batch or size)
    return [
        Step(indices, augment.draw(strategy, len(indices), generator)) for indices in batches[: config.student_steps]
    ]


def matching_loss(
    network: Network,
    start: Float[Tensor, " p"],
    target: Float[Tensor, " p"],
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n classes"],
    step_size: Float[Tensor, ""],
    steps: list[Step],
    config: MatchingConfig | None = None,
) -> Float[Tensor, ""]:
    """L for the segment from `start` = θ*_t to `target` = θ*_{t+M}.

    Differentiable with respect to `images`, `targets` (class probabilities) and `step_size`, exactly unless `config`
    asks for another gradient; not with respect to `start` and `target`. Peak memory: one step's, of at most `PART`
    images for a ConvNet on a CPU, the images and the parameter vector of each step, and `cddlib.engine.room`, which
    changes no bit of the result.

    Raises:
        UserError: `start` equals `target`, so the loss has no scale.
    """
    losses = matching_losses(
        network, start[None], target[None], images[None], targets[None], step_size[None], [steps], config
    )
    return losses[0]


def matching_losses(
    network: Network,
    start: Float[Tensor, "s p"],
    target: Float[Tensor, "s p"],
    images: Float[Tensor, "s n c h w"],
    targets: Float[Tensor, "s n classes"],
    step_size: Float[Tensor, " s"],
    students: list[list[Step]],
    config: MatchingConfig | None = None,
) -> Float[Tensor, " s"]:
    """L of s segments, whose students take their steps side by side, each on images, targets and steps of its own.

    The students have batches of equal sizes. See `matching_loss`; memory is s times its own. In exchange, the small
    steps of ConvNets take less time: see `at_a_time`.
    """
    if bool(((start - target).square().sum(1) == 0).any()):
        raise UserError("the segment starts where it ends: the expert did not move, so there is nothing to match.")
    config = config or MatchingConfig()
    config.check_students(len(students))
    inputs, wanted, sizes = _batches(students, images, targets)
    ends = (start.detach(), target.detach())
    held = (inputs.detach(), wanted.detach(), step_size.detach())
    derivatives = torch.is_grad_enabled()
    own = MatchingConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(MatchingConfig)})
    if start.device.type != "cuda" or own.match_step == "nearest":
        walk = _walk_for(network, own, start.device, sizes, derivatives, 1)
    else:
        shape = (inputs.shape, threading.get_ident())
        walk = _graph(network, own, start.device, sizes, derivatives, *shape)  # type: ignore[arg-type]  # it has a hash
    losses, *found = walk(*ends, *held)
    return _Scaled.apply(inputs, wanted, step_size, losses, *found) if derivatives else losses


def _walk_for(
    network: Network,
    config: MatchingConfig,
    device: torch.device,
    sizes: tuple[int, ...],
    derivatives: bool,
    students: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """The walk of `students` that share a device's memory, with all but its tensors given."""
    engine, free = steps_of(network, config, device), room(device) // students if derivatives else 0
    return functools.partial(_walk, engine, sizes, config, most_at_once(network, device, free), free, derivatives)


@functools.lru_cache(maxsize=16)
def _graph(
    network: Network,
    config: MatchingConfig,
    device: torch.device,
    sizes: tuple[int, ...],
    derivatives: bool,
    shape: torch.Size,
    thread: int,
) -> Graph:
    """The walk of students with inputs of a `shape` as a graph, a branch for each of them; every thread has its own."""
    walk = _walk_for(network, config, device, sizes, derivatives, shape[0])
    return Graph(functools.partial(branches, walk, [torch.cuda.Stream(device) for _ in range(shape[0])]))


def at_a_time(
    network: Network, config: MatchingConfig, device_type: str, image_shape: tuple[int, ...], batch: int
) -> int:
    """How many students take their steps, of `batch` images, side by side; by default ConvNets, as fill the device."""
    if config.side_by_side or not isinstance(network, ConvNet) or config.match_step == "nearest":
        return config.side_by_side or 1
    fills = FILLS_GPU if device_type == "cuda" else FILLS_CPU
    return max(1, int(fills / (batch * operations(network, image_shape))))


def turns(network: Network, config: MatchingConfig, images: Tensor, batch: int, students: int) -> list[slice]:
    """Which of the students, who train on `images`, take their steps side by side, one turn after the other."""
    number = at_a_time(network, config, images.device.type, tuple(images.shape[1:]), batch)
    return [slice(first, min(first + number, students)) for first in range(0, students, number)]


class _Scaled(torch.autograd.Function):
    """Losses whose derivatives are known: backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, targets: Tensor, step_size: Tensor, losses: Tensor, *derivatives: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*derivatives)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_losses: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (x * by_losses.view(-1, *[1] * (x.dim() - 1)) for x in ctx.saved_tensors)
        return *scaled, None, None, None, None


def _batches(students: list[list[Step]], images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
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


def _walk(
    engine: Steps,
    sizes: tuple[int, ...],
    config: MatchingConfig,
    parts: int,
    room: int,
    derivatives: bool,
    start: Tensor,
    target: Tensor,
    inputs: Tensor,
    targets: Tensor,
    step_size: Tensor,
) -> tuple[Tensor, ...]:
    """Losses of students that see `inputs` [s m c h w] and `targets`; on request, their derivatives by the last three.

    Forward it keeps the parameters, and what steps remember as long as there is `room`; then it walks back. A step
    takes at most `parts` images at a time.
    """
    seen = engine.prepared(inputs)
    path, memories = _roll_out(engine, sizes, parts, room, start, seen, targets, step_size)
    if config.match_step == "nearest":
        path = path[: nearest_step([theta[0] for theta in path], target[0]) + 1]
        del memories[len(path) - 1 :]
    kept = torch.stack([kept_parameters(*ends, config.dropped_fraction) for ends in zip(path[-1], target, strict=True)])
    scale = ((start - target) * kept).square().sum(1)
    losses = ((path[-1] - target) * kept).square().sum(1) / scale
    if not derivatives:
        return (losses,)
    by_inputs, by_targets, by_step_size = (torch.zeros_like(x) for x in (inputs, targets, step_size))
    rate = step_size[:, None]
    adjoint = (path[-1] - target) * kept * (2 / scale)[:, None]
    for i in reversed(range(len(path) - 1)):
        by_theta = []
        for number, (part, share) in enumerate(_parts(sizes, i, parts)):
            memory, memories[i][number] = memories[i][number], None
            if memory is None:
                _, memory = engine.take(path[i], seen[:, part], targets[:, part])
            along = engine.along(memory, adjoint)
            del memory
            torch.mul(along.by_inputs, share, out=by_inputs[:, part])
            torch.mul(along.by_targets, share, out=by_targets[:, part])
            by_step_size.sub_(along.inner, alpha=share)
            by_theta.append((along.by_theta, share))
        if config.gradient == "exact":
            adjoint = torch.addcmul(adjoint, rate, _over_parts(by_theta), value=-1)
    half = 2 if config.gradient == "halved" else 1
    return losses, by_inputs * (-step_size / half)[:, None, None, None, None], by_targets * -rate[:, None], by_step_size


def _over_parts(parts: list[tuple[Tensor, float]]) -> Tensor:
    """The batch's value, from those of its parts and each part's share of the batch."""
    first, share = parts[0]
    total = first if share == 1 else share * first
    for value, share in parts[1:]:
        total.add_(value, alpha=share)
    return total


def _roll_out(
    engine: Steps,
    sizes: tuple[int, ...],
    parts: int,
    room: int,
    start: Tensor,
    inputs: Tensor,
    targets: Tensor,
    step_size: Tensor,
) -> tuple[list[Tensor], list[list[Memory | None]]]:
    """The students' parameters; and the memory of each step, part by part, as long as there is room."""
    path: list[Tensor] = [start]
    memories: list[list[Memory | None]] = []
    for i in range(len(sizes)):
        gradients = []
        memories.append([])
        for part, share in _parts(sizes, i, parts):
            by_part, memory = engine.take(path[-1], inputs[:, part], targets[:, part])
            gradients.append((by_part, share))
            room -= memory.size
            memories[-1].append(memory if room >= 0 else None)
            del memory
        path.append(torch.addcmul(path[-1], step_size[:, None], _over_parts(gradients), value=-1))
    return path, memories


def _parts(sizes: tuple[int, ...], step: int, most: int) -> list[tuple[slice, float]]:
    """Where a step's images lie among all, cut into even parts of at most `most`; and each part's share of the step."""
    first, size = sum(sizes[:step]), sizes[step]
    number = -(-size // most)
    edges = [first + size * part // number for part in range(number + 1)]
    return [(slice(*edge), (edge[1] - edge[0]) / size) for edge in itertools.pairwise(edges)]


def most_at_once(network: Network, device: torch.device, room: int) -> int:
    """Images of a step that are taken at a time; all where the network mixes them, as batch norm does."""
    if not isinstance(network, ConvNet) or network.config.norm == "batch":
        return sys.maxsize
    if device.type != "cuda":
        return PART
    maps = sum(4 * network.config.width * (network.side // 2**block) ** 2 for block in range(network.config.depth))
    return max(PART, room // (MAPS_OF_A_STEP * maps))


@torch.no_grad()
def roll_out(
    network: Network, start: Tensor, images: Tensor, targets: Tensor, step_size: Tensor, steps: list[Step]
) -> list[Tensor]:
    """The student's parameters θ_0 … θ_N, N + 1 vectors of length p, without any graph.

    Arguments and their shapes are those of `matching_loss`.
    """
    inputs, wanted, sizes = _batches([steps], images[None], targets[None])
    engine, most = steps_of(network, MatchingConfig(), start.device), most_at_once(network, start.device, 0)
    path, _ = _roll_out(engine, sizes, most, 0, start[None], engine.prepared(inputs), wanted, step_size[None])
    return [thetas[0] for thetas in path]


def distances_to_target(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> Float[Tensor, " steps"]:
    """‖θ_i − θ*_{t+M}‖² / ‖θ_0 − θ*_{t+M}‖² for i = 0 … N; the last one is the matching loss."""
    return torch.stack([(theta - target).square().sum() for theta in path]) / (path[0] - target).square().sum()


def nearest_step(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> int:
    """ATT's n*: which of θ_1 … θ_N is nearest to the target in the L1 norm; of equals, the last."""
    distances = torch.stack([(theta - target).abs().sum() for theta in path[1:]])
    return len(distances) - int(distances.flip(0).argmin())


def kept_parameters(student: Float[Tensor, " p"], target: Float[Tensor, " p"], dropped: float) -> Bool[Tensor, " p"]:
    """Which parameters PAD's loss keeps: all but the fraction `dropped` with the smallest errors."""
    kept = torch.ones_like(target, dtype=torch.bool)
    if dropped:
        kept[(student - target).square().argsort(stable=True)[: int(dropped * len(target))]] = False
    return kept
