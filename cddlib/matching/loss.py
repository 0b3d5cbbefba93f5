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

Each of these steps needs the derivatives of the scalar ⟨g_i, λ⟩ (`cddlib.training.step`). What step i remembers for
them is kept where memory allows, and computed again where it does not. A batch's loss is a mean, so on a CPU a ConvNet
takes a large batch in parts, one after another: the memory is then that of a part. Small steps leave a processor idle,
so the students of several segments take theirs side by side. The images do not change within a walk, so all its
batches are augmented beforehand; the walk is then a function of tensors, which a GPU replays as a graph
(`cddlib.training.graphs`).

The methods of the field change little here::

    TESLA   leaves out the last line: the student's path through later parameters is dropped, which is another gradient
    ATT     ends the student at the step n* that lies nearest to the target, and walks back from there
    PAD     keeps, in numerator and denominator, only the parameters that are furthest from the target
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cddlib.matching.student import (
    MatchingConfig,
    StudentStep,
    most_at_once,
    over_parts,
    step_parts,
    student_batches,
    walk_forward,
)
from cddlib.networks.convnet import Network
from cddlib.runtime.errors import UserError
from cddlib.training.engine import make_step, residual_budget
from cddlib.training.graphs import Graph, branches
from cddlib.training.step import ComputeConfig, TrainingStep


def matching_loss(
    network: Network,
    start: Float[Tensor, " p"],
    target: Float[Tensor, " p"],
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n classes"],
    step_size: Float[Tensor, ""],
    steps: list[StudentStep],
    config: MatchingConfig | None = None,
    compute: ComputeConfig | None = None,
) -> Float[Tensor, ""]:
    """L for the segment from `start` = θ*_t to `target` = θ*_{t+M}.

    Differentiable with respect to `images`, `targets` (class probabilities) and `step_size`, exactly unless `config`
    asks for another gradient; not with respect to `start` and `target`. Peak memory: one step's, of at most `PART`
    images for a ConvNet on a CPU, the images and the parameter vector of each step, and `cddlib.training.engine.residual_budget`,
    which changes no bit of the result.

    Raises:
        UserError: `start` equals `target`, so the loss has no scale.
    """
    losses = matching_losses(
        network, start[None], target[None], images[None], targets[None], step_size[None], [steps], config, compute
    )
    return losses[0]


def matching_losses(
    network: Network,
    start: Float[Tensor, "s p"],
    target: Float[Tensor, "s p"],
    images: Float[Tensor, "s n c h w"],
    targets: Float[Tensor, "s n classes"],
    step_size: Float[Tensor, " s"],
    students: list[list[StudentStep]],
    config: MatchingConfig | None = None,
    compute: ComputeConfig | None = None,
) -> Float[Tensor, " s"]:
    """L of s segments, whose students take their steps side by side, each on images, targets and steps of its own.

    The students have batches of equal sizes. See `matching_loss`; memory is s times its own. In exchange, the small
    steps of ConvNets take less time: see `chunk_size`.
    """
    if bool(((start - target).square().sum(1) == 0).any()):
        raise UserError("the segment starts where it ends: the expert did not move, so there is nothing to match.")
    config = config or MatchingConfig()
    config.check_students(len(students))
    inputs, wanted, sizes = student_batches(students, images, targets)
    ends = (start.detach(), target.detach())
    held = (inputs.detach(), wanted.detach(), step_size.detach())
    derivatives = torch.is_grad_enabled()
    compute = compute or ComputeConfig()
    if start.device.type != "cuda" or config.match_step == "nearest":
        walk = _walk_for(network, config, compute, start.device, sizes, derivatives, 1)
    else:
        shape = (inputs.shape, threading.get_ident())
        walk = _graph(network, config, compute, start.device, sizes, derivatives, *shape)  # type: ignore[arg-type]  # it has a hash
    losses, *found = walk(*ends, *held)
    return _Scaled.apply(inputs, wanted, step_size, losses, *found) if derivatives else losses


def _walk_for(
    network: Network,
    config: MatchingConfig,
    compute: ComputeConfig,
    device: torch.device,
    sizes: tuple[int, ...],
    derivatives: bool,
    students: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """The walk of `students` that share a device's memory, with all but its tensors given."""
    engine, free = make_step(network, compute, device), residual_budget(device) // students if derivatives else 0
    return functools.partial(_walk, engine, sizes, config, most_at_once(network, device, free), free, derivatives)


@functools.lru_cache(maxsize=16)
def _graph(
    network: Network,
    config: MatchingConfig,
    compute: ComputeConfig,
    device: torch.device,
    sizes: tuple[int, ...],
    derivatives: bool,
    shape: torch.Size,
    thread: int,
) -> Graph:
    """The walk of students with inputs of a `shape` as a graph, a branch for each of them; every thread has its own."""
    walk = _walk_for(network, config, compute, device, sizes, derivatives, shape[0])
    return Graph(functools.partial(branches, walk, [torch.cuda.Stream(device) for _ in range(shape[0])]))


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


def _walk(
    engine: TrainingStep,
    sizes: tuple[int, ...],
    config: MatchingConfig,
    parts: int,
    residual_budget: int,
    derivatives: bool,
    start: Tensor,
    target: Tensor,
    inputs: Tensor,
    targets: Tensor,
    step_size: Tensor,
) -> tuple[Tensor, ...]:
    """Losses of students that see `inputs` [s m c h w] and `targets`; on request, their derivatives by the last three.

    Forward it keeps the parameters, and what steps remember as long as there is `residual_budget`; then it walks back. A step
    takes at most `parts` images at a time.
    """
    seen = engine.prepared(inputs)
    path, memories = walk_forward(engine, sizes, parts, residual_budget, start, seen, targets, step_size)
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
        for number, (part, share) in enumerate(step_parts(sizes, i, parts)):
            memory, memories[i][number] = memories[i][number], None
            if memory is None:
                _, memory = engine.forward(path[i], seen[:, part], targets[:, part])
            along = engine.vjp(memory, adjoint)
            del memory
            torch.mul(along.by_inputs, share, out=by_inputs[:, part])
            torch.mul(along.by_targets, share, out=by_targets[:, part])
            by_step_size.sub_(along.inner, alpha=share)
            by_theta.append((along.by_theta, share))
        if config.gradient == "exact":
            adjoint = torch.addcmul(adjoint, rate, over_parts(by_theta), value=-1)
    half = 2 if config.gradient == "halved" else 1
    return losses, by_inputs * (-step_size / half)[:, None, None, None, None], by_targets * -rate[:, None], by_step_size


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
