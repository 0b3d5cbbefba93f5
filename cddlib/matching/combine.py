"""K gradients into one step.

Every rule takes a weighted sum of the segments' gradients; they differ in the weights::

    mean       1 / K each (ConTra), or `balance` between the anchor and the others
    gradnorm   gradients of equal length, longer for segments that are matched worse (Chen et al. 2018)
    pcgrad     each gradient without its part against every other one, then the mean (Yu et al. 2020)
    cagrad     near the mean, and as good as possible for the segment that gains least; longer than the mean by up to a
               half (Liu et al. 2021)
    upgrad     each gradient projected so that it hurts no segment, then the mean (Quinton & Rey 2024)
    mgda       about the shortest convex combination, by Frank-Wolfe (Désidéri 2012)
    gem        the anchor's gradient projected so that it hurts no other (Lopez-Paz & Ranzato 2017)

All but the first two need only the gradients' inner products, and torchjd solves for the weights. An inner product is
taken in the metric of the optimiser, ⟨g, h⟩ = Σ_v η_v ⟨g_v, h_v⟩ with the learning rate η_v of each variable: to first
order it is what a step along g takes off the loss whose gradient is h.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.runtime.errors import UserError, needing

Combine = Literal["mean", "gradnorm", "pcgrad", "cagrad", "upgrad", "mgda", "gem"]

CAGRAD_RADIUS = 0.5  # c: how far from the mean, relative to its length; the value of the authors' toy example
GRADNORM_POWER = 1.0  # how much more a segment that is matched worse than the others counts; our choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """How the segments' gradients become one."""

    combine: Combine = "mean"
    """Rule that weighs the gradients; see `cddlib.matching.combine`."""
    balance: float | None = None
    """Weight β of the other segments under the rule mean. The anchor weighs 1 / (1 + β), the others share β / (1 + β).

    0 matches the anchor alone, K - 1 is the mean; without it, the mean. Our reconstruction of the paper's balance
    coefficient."""

    def __post_init__(self) -> None:
        if self.balance is not None and not 0 <= self.balance < float("inf"):
            raise UserError(f"balance is {self.balance}; it must be a finite number, 0 or more.")
        if self.balance is not None and self.combine != "mean":
            raise UserError(f"balance is {self.balance}, but combine is {self.combine!r}; balance is part of 'mean'.")


def gramian(gradients: Sequence[Sequence[Tensor]], rates: Sequence[float]) -> Float[Tensor, "k k"]:
    """Inner products Σ_v η_v ⟨g_i,v, g_j,v⟩ in float64, on the CPU.

    Args:
        gradients: segment i's gradient for every variable v.
        rates: the learning rate η_v of every variable.
    """
    rows = [
        torch.cat([rate**0.5 * g.flatten().double() for rate, g in zip(rates, gradient, strict=True)])
        for gradient in gradients
    ]
    stacked = torch.stack(rows)
    return (stacked @ stacked.T).cpu()


def fixed_weights(config: CombineConfig, count: int, anchor: int) -> list[float] | None:
    """The weights where they do not depend on the gradients, which then need not be kept; else None."""
    if count == 1:
        return [1.0]
    return _mean(config.balance, count, anchor) if config.combine == "mean" else None


def weights(
    config: CombineConfig,
    products: Float[Tensor, "k k"],
    losses: Sequence[float],
    anchor: int,
    generator: torch.Generator,
) -> list[float]:
    """The weight w_k of each segment's gradient.

    Args:
        config: the rule.
        products: the gradients' inner products, from `gramian`.
        losses: the segments' matching losses.
        anchor: which segment is the anchor.
        generator: the order in which pcgrad visits the others comes from here.

    Raises:
        UserError: the rule needs torchjd, which is not installed.
    """
    count = len(losses)
    fixed = fixed_weights(config, count, anchor)
    if fixed is not None or not _usable(products):
        return fixed or _mean(None, count, anchor)
    if config.combine == "gradnorm":
        return _gradnorm(products, losses)
    products = products / products.diagonal().mean()  # weights do not depend on the scale, and solvers like 1
    with needing(f"combine is {config.combine!r}, which", "torchjd[cagrad,quadprog-projector]"):
        import torchjd.aggregation
        import torchjd.linalg
    if config.combine == "pcgrad":
        with torch.random.fork_rng(devices=[]):  # torchjd shuffles with the global generator
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return (torchjd.aggregation.PCGradWeighting()(products) / count).tolist()
    if config.combine == "cagrad":
        return torchjd.aggregation.CAGradWeighting(c=CAGRAD_RADIUS)(products).tolist()
    if config.combine == "mgda":
        return torchjd.aggregation.MGDAWeighting()(products).tolist()
    # reg_eps is for rounding; its default, 1e-4 of the trace, would drown a short gradient
    projector = torchjd.linalg.QuadprogProjector(reg_eps=1e-8)
    if config.combine == "upgrad":
        return torchjd.aggregation.UPGradWeighting(projector=projector)(products).tolist()
    preference = torch.zeros(count, dtype=products.dtype)
    preference[anchor] = 1
    return torchjd.aggregation.DualProjWeighting(preference, projector=projector)(products).tolist()


def _usable(products: Tensor) -> bool:
    """Whether every gradient is finite, which the loop will report, and none is zero, to which no rule applies."""
    return bool(products.isfinite().all()) and bool(products.diagonal().all())


def _mean(balance: float | None, count: int, anchor: int) -> list[float]:
    if balance is None:
        return [1 / count] * count
    others = balance / (count - 1)
    return [(1.0 if k == anchor else others) / (1 + balance) for k in range(count)]


def _gradnorm(products: Tensor, losses: Sequence[float]) -> list[float]:
    """Weights that make ‖w_k g_k‖ proportional to r_k^a, with sum 1; r_k is the loss over the mean loss.

    GradNorm moves its weights towards that by gradient descent; here they are there at once. Its r_k is a loss over its
    first value, which is about 1 for every matching loss.
    """
    mean = sum(losses) / len(losses)
    wanted = torch.tensor([(loss / mean) ** GRADNORM_POWER for loss in losses], dtype=products.dtype)
    found = wanted / products.diagonal().sqrt()
    return (found / found.sum()).tolist()


def weighted_sum(gradients: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """Σ w_k g_k, variable by variable. `gradients[k]` holds segment k's gradient for every variable."""
    return [
        sum((w * g for w, g in zip(weights[1:], variable[1:], strict=True)), weights[0] * variable[0])
        for variable in zip(*gradients, strict=True)
    ]
