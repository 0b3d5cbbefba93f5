"""K gradients into one.

Every rule is a weighted sum of the segments' gradients; the rules differ in the weights::

    mean       1 / K each (ConTra), or `balance` between the anchor and the others
    gradnorm   gradients of equal length, longer for segments that are matched worse (Chen et al. 2018)
    pcgrad     removes from each gradient its projection on those that it conflicts with, then the mean (Yu et al. 2020)
    cagrad     the vector near the mean that is best for the segment that gains least; at most 1.5 times as long as the
               mean (Liu et al. 2021)
    upgrad     each gradient projected so that it hurts no segment, then the mean (Quinton & Rey 2024)
    mgda       about the shortest convex combination, by Frank-Wolfe (Désidéri 2012)
    gem        the anchor's gradient projected so that it hurts no other (Lopez-Paz & Ranzato 2017)

All but the first two need only the gradients' inner products, and torchjd solves for the weights. An inner product is
taken in the metric of the optimiser, ⟨g, h⟩ = Σ_v η_v ⟨g_v, h_v⟩ with the learning rate η_v of each variable: to first
order, it is how much a step against g lowers the loss whose gradient is h.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.runtime.errors import UserError, needing, require

Combine = Literal["mean", "gradnorm", "pcgrad", "cagrad", "upgrad", "mgda", "gem"]

CAGRAD_RADIUS = 0.5  # c: how far from the mean, relative to its length; the value of the authors' toy example
GRADNORM_POWER = 1.0  # how much more a segment that is matched worse than the others counts; our choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """How the segments' gradients become one."""

    combine: Combine = "mean"
    """Rule that weighs the gradients; see `cddlib.matching.combine`."""
    balance: float | None = None
    """Weight β of the other segments under the rule mean: the anchor has 1 / (1 + β), all others together β / (1 + β).

    0 matches the anchor alone, K - 1 is the mean; without it, the mean. Our reconstruction of the paper's balance
    coefficient."""

    def __post_init__(self) -> None:
        require(0, below=float("inf"), balance=self.balance)
        if self.balance is not None and self.combine != "mean":
            raise UserError(f"balance is {self.balance}, but combine is {self.combine!r}; balance is part of 'mean'.")


def gramian(gradients: Sequence[Sequence[Tensor]], rates: Sequence[float]) -> Float[Tensor, "k k"]:
    """Inner products Σ_v η_v ⟨g_i,v, g_j,v⟩ of segments i, j over the variables v of rates η_v; float64, on the CPU."""
    rows = [
        torch.cat([rate**0.5 * g.flatten().double() for rate, g in zip(rates, gradient, strict=True)])
        for gradient in gradients
    ]
    stacked = torch.stack(rows)
    return (stacked @ stacked.T).cpu()


def fixed_weights(config: CombineConfig, count: int, anchor: int) -> list[float] | None:
    """The weights if they do not depend on the gradients, which then need not be kept; otherwise None."""
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
    """The weight w_k of each segment's gradient, where `fixed_weights` has none.

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
    # The loop reports a gradient that is not finite, and no rule applies to one that is zero.
    if not (products.isfinite().all() and products.diagonal().all()):
        return _mean(None, count, anchor)
    if config.combine == "gradnorm":
        return _gradnorm(products, losses)
    products = products / products.diagonal().mean()  # weights do not depend on the scale, and solvers like 1
    with needing(f"combine is {config.combine!r}, which", "torchjd[cagrad,quadprog-projector]"):
        import torchjd.aggregation as rules
        import torchjd.linalg
    if config.combine == "pcgrad":
        with torch.random.fork_rng(devices=[]):  # torchjd shuffles with the global generator
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return (rules.PCGradWeighting()(products) / count).tolist()
    # reg_eps is for rounding; its default, 1e-4 of the trace, would drown a short gradient
    projector = torchjd.linalg.QuadprogProjector(reg_eps=1e-8)
    one_hot = torch.eye(count, dtype=products.dtype)[anchor]
    weightings: dict[str, Callable[[], Any]] = {
        "cagrad": functools.partial(rules.CAGradWeighting, c=CAGRAD_RADIUS),
        "mgda": rules.MGDAWeighting,
        "upgrad": functools.partial(rules.UPGradWeighting, projector=projector),
        "gem": functools.partial(rules.DualProjWeighting, one_hot, projector=projector),
    }
    return weightings[config.combine]()(products).tolist()


def _mean(balance: float | None, count: int, anchor: int) -> list[float]:
    if balance is None:
        return [1 / count] * count
    others = balance / (count - 1)
    return [(1.0 if k == anchor else others) / (1 + balance) for k in range(count)]


def _gradnorm(products: Tensor, losses: Sequence[float]) -> list[float]:
    """Weights that make ‖w_k g_k‖ proportional to r_k^a, with sum 1; r_k is the loss divided by the mean loss.

    GradNorm approaches these weights by gradient descent; here they are computed directly. Its r_k is a loss divided by
    its first value, which is about 1 for every matching loss.
    """
    mean = sum(losses) / len(losses)
    lengths = torch.tensor([(loss / mean) ** GRADNORM_POWER for loss in losses], dtype=products.dtype)
    weights = lengths / products.diagonal().sqrt()
    return (weights / weights.sum()).tolist()
