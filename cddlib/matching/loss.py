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

Each of these steps needs the derivatives of the scalar ⟨g_i, λ⟩ (`cddlib.training.step`). Step i's residuals, which its
derivatives need, are kept where memory allows, and computed again where it does not. A batch's loss is a mean, so on a
CPU a ConvNet computes a large batch in parts, one after another, which needs the memory of one part. Small steps do not
fill a processor, so the students of several segments are trained side by side. The images do not change within a walk,
so all its batches are augmented beforehand; the walk is then a function of tensors, which a GPU replays as a graph
(`cddlib.training.graphs`).

The methods of the field change little here::

    TESLA   leaves out the last line: the student's path through later parameters is dropped, which is another gradient
    ATT     ends the student at the step n* that lies nearest to the target, and walks back from there
    PAD     keeps, in numerator and denominator, only the parameters that are furthest from the target
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cddlib.matching.student import MatchingConfig, StudentStep, Walk, batch_mean, make_walk, student_batches
from cddlib.networks.convnet import Network
from cddlib.runtime.errors import UserError
from cddlib.training.engine import residual_budget
from cddlib.training.graphs import branches, capture_streams, graph
from cddlib.training.step import ComputeConfig


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
    asks for another gradient; not with respect to `start` and `target`. Peak memory is that of one step (for a ConvNet
    on a CPU, of at most `PART` pixels), the images and the parameter vector of each step, and the residuals. Their
    `cddlib.training.engine.residual_budget` changes no bit of the result.

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
    """L of s segments, whose students are trained side by side, each with its own images, targets and steps.

    The students have batches of equal sizes. See `matching_loss`: this needs s times its memory, and for ConvNets with
    small batches less time (`cddlib.matching.student.chunk_size`).
    """
    if bool(((start - target).square().sum(1) == 0).any()):
        raise UserError("the segment starts where it ends: the expert did not move, so there is nothing to match.")
    config = config or MatchingConfig()
    config.check_students(len(students))
    inputs, batch_targets, sizes = student_batches(students, images, targets)
    setting = _Setting(network, config, compute or ComputeConfig(), start.device, sizes, torch.is_grad_enabled())
    if start.device.type != "cuda":
        walk = setting.walk(1)
    elif config.match_step == "nearest":
        walk = _kept_walk(setting, 1)
    else:
        walk = graph(start.device, _Setting.branched, setting, inputs.shape)
    variables = (inputs, batch_targets, step_size)
    losses, *gradients = walk(start.detach(), target.detach(), *(x.detach() for x in variables))
    return _Scaled.apply(*variables, losses, *gradients) if gradients else losses


class _Setting(NamedTuple):
    """What decides how a walk is computed, and whether a captured graph can be used again."""

    network: Network
    config: MatchingConfig
    compute: ComputeConfig
    device: torch.device
    batch_sizes: tuple[int, ...]
    derivatives: bool

    def walk(self, sharing: int) -> Callable[..., tuple[Tensor, ...]]:
        """The walk as a function of its tensors, if `sharing` walks divide the device's memory."""
        budget = residual_budget(self.device) // sharing if self.derivatives else 0
        walk = make_walk(self.network, self.compute, self.device, self.batch_sizes, budget)
        return functools.partial(_losses_and_gradients, walk, self.config, self.derivatives)

    def branched(self, shape: torch.Size) -> Callable[..., tuple[Tensor, ...]]:
        """The walks of students with inputs of a `shape`, a branch for each."""
        return functools.partial(branches, self.walk(shape[0]), capture_streams(self.device, shape[0]))


_kept_walk = functools.lru_cache(maxsize=16)(_Setting.walk)
"""A GPU's walk that is no graph; kept, because asking for the free memory takes time."""


class _Scaled(torch.autograd.Function):
    """Losses with known derivatives, which backward scales."""

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


def _losses_and_gradients(
    walk: Walk,
    config: MatchingConfig,
    derivatives: bool,
    start: Tensor,
    target: Tensor,
    inputs: Tensor,
    targets: Tensor,
    step_size: Tensor,
) -> tuple[Tensor, ...]:
    """Losses of students with batches `inputs` [s m c h w] and `targets`; if asked, derivatives by the last three."""
    prepared = walk.step.prepared(inputs)
    path, residuals = walk.forward(start, prepared, targets, step_size)
    if config.match_step == "nearest":
        path = path[: nearest_step([theta[0] for theta in path], target[0]) + 1]
        del residuals[len(path) - 1 :]
    mask = torch.stack([kept_parameters(*ends, config.dropped_fraction) for ends in zip(path[-1], target, strict=True)])
    scale = ((start - target) * mask).square().sum(1)
    losses = ((path[-1] - target) * mask).square().sum(1) / scale
    if not derivatives:
        return (losses,)
    by_inputs, by_targets, by_step_size = (torch.zeros_like(x) for x in (inputs, targets, step_size))
    rate = step_size[:, None]
    adjoint = (path[-1] - target) * mask * (2 / scale)[:, None]
    for i in reversed(range(len(path) - 1)):
        by_theta = []
        for number, (part, fraction) in enumerate(walk.parts(i)):
            kept, residuals[i][number] = residuals[i][number], None
            if kept is None:
                _, kept = walk.step.forward(path[i], prepared[:, part], targets[:, part])
            vjp = walk.step.vjp(kept, adjoint)
            del kept
            torch.mul(vjp.by_inputs, fraction, out=by_inputs[:, part])
            torch.mul(vjp.by_targets, fraction, out=by_targets[:, part])
            by_step_size.sub_(vjp.inner, alpha=fraction)
            by_theta.append((vjp.by_theta, fraction))
        if config.gradient == "exact":
            adjoint = torch.addcmul(adjoint, rate, batch_mean(by_theta), value=-1)
    half = 2 if config.gradient == "halved" else 1
    return losses, by_inputs * (-step_size / half)[:, None, None, None, None], by_targets * -rate[:, None], by_step_size


def nearest_step(path: list[Float[Tensor, " p"]], target: Float[Tensor, " p"]) -> int:
    """ATT's n*: which of θ_1 … θ_N is nearest to the target in the L1 norm; of equals, the last."""
    distances = torch.stack([(theta - target).abs().sum() for theta in path[1:]])
    return len(distances) - int(distances.flip(0).argmin())


def kept_parameters(student: Float[Tensor, " p"], target: Float[Tensor, " p"], dropped: float) -> Bool[Tensor, " p"]:
    """Which parameters PAD's loss keeps: all but the fraction `dropped` with the smallest errors."""
    kept = torch.ones_like(target, dtype=torch.bool)
    if dropped:
        smallest = (student - target).square().argsort(stable=True)[: int(dropped * len(target))]
        kept.index_fill_(0, smallest, False)  # without a copy from the CPU, which a graph cannot have
    return kept
