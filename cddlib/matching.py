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

Each turn needs the derivatives of the scalar ⟨g_i, λ⟩ (`cddlib.steps`). What step i remembers for them is kept where
memory allows, and computed again where it does not. A batch's loss is a mean, so on a CPU a ConvNet takes a large
batch in parts, one after another: the memory is then that of a part. The methods of the field change little here::

    TESLA   leaves out the last line: the student's path through later parameters is dropped, which is another gradient
    ATT     ends the student at the step n* that lies nearest to the target, and walks back from there
    PAD     keeps, in numerator and denominator, only the parameters that are furthest from the target
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from cddlib import augment
from cddlib.files import UserError
from cddlib.networks import ConvNet, Network
from cddlib.steps import ComputeConfig, Memory, room, steps_of

PART = 64
"""Most images that a CPU takes at a time; more are no faster. A GPU takes all."""


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

    def __post_init__(self) -> None:
        for name in ("student_steps", "student_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.dropped_fraction < 1:
            raise UserError(f"dropped_fraction is {self.dropped_fraction}; it must be 0 or more and below 1.")


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
    if (start - target).square().sum() == 0:
        raise UserError("the segment starts where it ends: the expert did not move, so there is nothing to match.")
    config = config or MatchingConfig()
    kept = room(images.device) if torch.is_grad_enabled() else 0
    return _MatchingLoss.apply(images, targets, step_size, network, start, target, steps, config, kept)


class _MatchingLoss(torch.autograd.Function):
    """Forward: roll the student out, keeping its parameters, and memories. Backward: walk back over them."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        targets: Tensor,
        step_size: Tensor,
        network: Network,
        start: Tensor,
        target: Tensor,
        steps: list[Step],
        config: MatchingConfig,
        room: int,
    ) -> Tensor:
        path, ctx.memories = _roll_out(network, start, images, targets, step_size, steps, config, room)
        if config.match_step == "nearest":
            path = path[: nearest_step(path, target) + 1]
            del ctx.memories[len(path) - 1 :]
        kept = kept_parameters(path[-1], target, config.dropped_fraction)
        scale = (start - target)[kept].square().sum()
        ctx.save_for_backward(images, targets, step_size, target, scale, *path)
        ctx.network, ctx.steps, ctx.kept, ctx.config = network, steps[: len(path) - 1], kept, config
        return (path[-1] - target)[kept].square().sum() / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        images, targets, step_size, target, scale, *path = ctx.saved_tensors
        d_images, d_targets, d_step_size = (torch.zeros_like(x) for x in (images, targets, step_size))
        adjoint = torch.zeros_like(target)
        adjoint[ctx.kept] = (path[-1] - target)[ctx.kept] * (2 * grad_loss / scale)
        engine = steps_of(ctx.network, ctx.config)
        for i, step in reversed(list(enumerate(ctx.steps))):
            indices = step.indices.to(images.device)
            with torch.enable_grad():
                chosen = images[indices].detach().requires_grad_()
                inputs = augment.apply(step.draw, chosen)
            by_inputs, by_theta = torch.empty_like(chosen), torch.zeros_like(adjoint)
            for number, (part, share) in enumerate(_parts(ctx.network, inputs)):
                memory, ctx.memories[i][number] = ctx.memories[i][number], None
                if memory is None:
                    _, memory = engine.take(path[i], inputs[part], targets[indices[part]])
                along = engine.along(memory, adjoint)
                del memory
                by_inputs[part] = share * along.by_inputs
                by_theta += share * along.by_theta
                d_targets.index_add_(0, indices[part], along.by_targets * (share * -step_size))
                d_step_size -= share * along.inner
            (by_chosen,) = torch.autograd.grad(inputs, chosen, by_inputs)
            d_images.index_add_(0, indices, by_chosen * -step_size)
            if ctx.config.gradient == "exact":
                adjoint -= step_size * by_theta
        if ctx.config.gradient == "halved":
            d_images /= 2
        return d_images, d_targets, d_step_size, None, None, None, None, None, None


def roll_out(
    network: Network, start: Tensor, images: Tensor, targets: Tensor, step_size: Tensor, steps: list[Step]
) -> list[Tensor]:
    """The student's parameters θ_0 … θ_N, N + 1 vectors of length p, without any graph.

    Arguments and their shapes are those of `matching_loss`.
    """
    return _roll_out(network, start, images, targets, step_size, steps, MatchingConfig(), 0)[0]


def _roll_out(
    network: Network,
    start: Tensor,
    images: Tensor,
    targets: Tensor,
    step_size: Tensor,
    steps: list[Step],
    config: MatchingConfig,
    room: int,
) -> tuple[list[Tensor], list[list[Memory | None]]]:
    """The student's parameters; and the memory of each step, part by part, as long as there is room."""
    engine = steps_of(network, config)
    path: list[Tensor] = [start.detach()]
    memories: list[list[Memory | None]] = []
    for step in steps:
        indices = step.indices.to(images.device)
        with torch.no_grad():
            inputs = augment.apply(step.draw, images[indices])
        gradient = torch.zeros_like(path[-1])
        memories.append([])
        for part, share in _parts(network, inputs):
            by_part, memory = engine.take(path[-1], inputs[part], targets[indices[part]])
            gradient += share * by_part
            room -= memory.size
            memories[-1].append(memory if room >= 0 else None)
            del memory
        path.append((path[-1] - step_size * gradient).detach())
    return path, memories


def _parts(network: Network, inputs: Tensor) -> list[tuple[slice, float]]:
    """Where a batch is cut, and each part's share of it: a ConvNet's, unless its batch norm mixes the images."""
    mixed = not isinstance(network, ConvNet) or network.config.norm == "batch"
    number = 1 if mixed or inputs.device.type != "cpu" else -(-len(inputs) // PART)
    pieces = torch.arange(len(inputs)).chunk(number)
    return [(slice(int(p[0]), int(p[-1]) + 1), len(p) / len(inputs)) for p in pieces]


def distances_to_target(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> Float[Tensor, " steps"]:
    """‖θ_i − θ*_{t+M}‖² / ‖θ_0 − θ*_{t+M}‖² for i = 0 … N; the last one is the matching loss."""
    return torch.stack([(theta - target).square().sum() for theta in path]) / (path[0] - target).square().sum()


def nearest_step(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> int:
    """ATT's n*: which of θ_1 … θ_N is nearest to the target in the L1 norm; of equals, the last."""
    distances = torch.stack([(theta - target).abs().sum() for theta in path[1:]])
    return len(distances) - int(distances.flip(0).argmin())


def kept_parameters(student: Float[Tensor, " p"], target: Float[Tensor, " p"], dropped: float) -> Tensor | slice:
    """Indices of the parameters that PAD's loss keeps: all but the fraction `dropped` with the smallest errors."""
    if dropped == 0:
        return slice(None)
    return (student - target).square().argsort(stable=True)[int(dropped * len(target)) :]
