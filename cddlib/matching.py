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
students of several segments take theirs side by side. The methods of the field change little here::

    TESLA   leaves out the last line: the student's path through later parameters is dropped, which is another gradient
    ATT     ends the student at the step n* that lies nearest to the target, and walks back from there
    PAD     keeps, in numerator and denominator, only the parameters that are furthest from the target
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from cddlib import augment
from cddlib.files import UserError
from cddlib.networks import ConvNet, Network
from cddlib.steps import ComputeConfig, Memory, operations, room, steps_of

PART = 64
"""Most images of a student that a CPU takes at a time; more are no faster. A GPU takes all."""
FILLS_CPU, FILLS_GPU = 1e8, 1e10
"""Operations, forward, of steps that keep the processor busy. The GPU's follows from the time that it takes to start
kernels; it has not been measured."""


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
    images for a ConvNet on a CPU, len(steps) parameter vectors, and `cddlib.steps.room`, which changes no bit of the
    result.

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
    kept = room(images.device) if torch.is_grad_enabled() else 0
    return _MatchingLosses.apply(images, targets, step_size, network, start, target, students, config, kept)


def at_a_time(
    network: Network, config: MatchingConfig, device_type: str, image_shape: tuple[int, ...], batch: int
) -> int:
    """How many students take their steps, of `batch` images, side by side; by default ConvNets, as fill the device."""
    if config.side_by_side or not isinstance(network, ConvNet) or config.match_step == "nearest":
        return config.side_by_side or 1
    fills = FILLS_CPU if device_type == "cpu" else FILLS_GPU
    return max(1, int(fills / (batch * operations(network, image_shape))))


def turns(network: Network, config: MatchingConfig, images: Tensor, batch: int, students: int) -> list[slice]:
    """Which of the students, who train on `images`, take their steps side by side, one turn after the other."""
    number = at_a_time(network, config, images.device.type, tuple(images.shape[1:]), batch)
    return [slice(first, min(first + number, students)) for first in range(0, students, number)]


class _MatchingLosses(torch.autograd.Function):
    """Forward: roll the students out, keeping their parameters, and memories. Backward: walk back over them."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        targets: Tensor,
        step_size: Tensor,
        network: Network,
        start: Tensor,
        target: Tensor,
        students: list[list[Step]],
        config: MatchingConfig,
        room: int,
    ) -> Tensor:
        path, ctx.memories = _roll_out(network, start, images, targets, step_size, students, config, room)
        if config.match_step == "nearest":
            path = path[: nearest_step([theta[0] for theta in path], target[0]) + 1]
            del ctx.memories[len(path) - 1 :]
        kept = torch.stack(
            [kept_parameters(*ends, config.dropped_fraction) for ends in zip(path[-1], target, strict=True)]
        )
        scale = ((start - target) * kept).square().sum(1)
        ctx.save_for_backward(images, targets, step_size, target, scale, kept, *path)
        ctx.network, ctx.students, ctx.config = network, students, config
        return ((path[-1] - target) * kept).square().sum(1) / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        images, targets, step_size, target, scale, kept, *path = ctx.saved_tensors
        d_images, d_targets, d_step_size = (x.new_zeros(x.shape) for x in (images, targets, step_size))
        adjoint = (path[-1] - target) * kept * (2 * grad_loss / scale)[:, None]
        engine = steps_of(ctx.network, ctx.config)
        for i in reversed(range(len(path) - 1)):
            batches = [student[i] for student in ctx.students]
            k, indices = _rows(batches, images)
            with torch.enable_grad():
                chosen = images[k, indices].detach().requires_grad_()
                inputs = _augmented(batches, chosen)
            by_inputs, by_theta = torch.empty_like(inputs), torch.zeros_like(adjoint)
            for number, (part, share) in enumerate(_parts(ctx.network, inputs)):
                memory, ctx.memories[i][number] = ctx.memories[i][number], None
                if memory is None:
                    _, memory = engine.take(path[i], inputs[:, part], targets[k, indices[:, part]])
                along = engine.along(memory, adjoint)
                del memory
                by_inputs[:, part] = share * along.by_inputs
                by_theta += share * along.by_theta
                _subtract(d_targets, k, indices[:, part], step_size * share, along.by_targets)
                d_step_size -= share * along.inner
            (by_chosen,) = torch.autograd.grad(inputs, chosen, by_inputs)
            _subtract(d_images, k, indices, step_size, by_chosen)
            if ctx.config.gradient == "exact":
                adjoint -= step_size[:, None] * by_theta
        if ctx.config.gradient == "halved":
            d_images /= 2
        return d_images, d_targets, d_step_size, None, None, None, None, None, None


def roll_out(
    network: Network, start: Tensor, images: Tensor, targets: Tensor, step_size: Tensor, steps: list[Step]
) -> list[Tensor]:
    """The student's parameters θ_0 … θ_N, N + 1 vectors of length p, without any graph.

    Arguments and their shapes are those of `matching_loss`.
    """
    path, _ = _roll_out(
        network, start[None], images[None], targets[None], step_size[None], [steps], MatchingConfig(), 0
    )
    return [thetas[0] for thetas in path]


def _roll_out(
    network: Network,
    start: Tensor,
    images: Tensor,
    targets: Tensor,
    step_size: Tensor,
    students: list[list[Step]],
    config: MatchingConfig,
    room: int,
) -> tuple[list[Tensor], list[list[Memory | None]]]:
    """The students' parameters; and the memory of each step, part by part, as long as there is room."""
    engine = steps_of(network, config)
    path: list[Tensor] = [start.detach()]
    memories: list[list[Memory | None]] = []
    for batches in zip(*students, strict=True):
        k, indices = _rows(batches, images)
        with torch.no_grad():
            inputs = _augmented(batches, images[k, indices])
        gradient = torch.zeros_like(path[-1])
        memories.append([])
        for part, share in _parts(network, inputs):
            by_part, memory = engine.take(path[-1], inputs[:, part], targets[k, indices[:, part]])
            gradient += share * by_part
            room -= memory.size
            memories[-1].append(memory if room >= 0 else None)
            del memory
        path.append((path[-1] - step_size[:, None] * gradient).detach())
    return path, memories


def _rows(batches: Sequence[Step], images: Tensor) -> tuple[Tensor, Tensor]:
    """Which images [s n …] the students take: student [s 1] and indices [s b]."""
    indices = torch.stack([batch.indices for batch in batches]).to(images.device)
    return torch.arange(len(indices), device=images.device)[:, None], indices


def _augmented(batches: Sequence[Step], chosen: Tensor) -> Tensor:
    """Each student's images under its own augmentation."""
    return torch.stack([augment.apply(batch.draw, images) for batch, images in zip(batches, chosen, strict=True)])


def _subtract(total: Tensor, k: Tensor, indices: Tensor, factors: Tensor, values: Tensor) -> None:
    """Take each student's `values` [s b …], times its factor [s], off the rows of `total` [s n …] at its `indices`."""
    scaled = values * -factors.view(-1, *[1] * (values.dim() - 1))
    rows = (k * total.shape[1] + indices).flatten()
    total.view(-1, *total.shape[2:]).index_add_(0, rows, scaled.flatten(0, 1))


def _parts(network: Network, inputs: Float[Tensor, "s b c h w"]) -> list[tuple[slice, float]]:
    """Where a batch is cut, and each part's share of it: a ConvNet's, unless its batch norm mixes the images."""
    size = inputs.shape[1]
    mixed = not isinstance(network, ConvNet) or network.config.norm == "batch"
    number = 1 if mixed or inputs.device.type != "cpu" else -(-size // PART)
    pieces = torch.arange(size).chunk(number)
    return [(slice(int(p[0]), int(p[-1]) + 1), len(p) / size) for p in pieces]


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
