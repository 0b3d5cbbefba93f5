"""K gradients into one step."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from cddlib.runs import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """How the segments' losses are weighed."""

    balance: float | None = None
    """Weight β of the other segments. The anchor weighs 1 / (1 + β), the others share β / (1 + β).

    0 matches the anchor alone, K - 1 is the mean; without it, the mean. Our reconstruction of the paper's balance
    coefficient."""

    def __post_init__(self) -> None:
        if self.balance is not None and not 0 <= self.balance < float("inf"):
            raise UserError(f"balance is {self.balance}; it must be a finite number, 0 or more.")


def weights(config: CombineConfig, segments: int, anchor: int) -> list[float]:
    """The weight w_k of each segment's loss; they sum to 1."""
    if config.balance is None or segments == 1:
        return [1 / segments] * segments
    others = config.balance / (segments - 1)
    return [(1.0 if k == anchor else others) / (1 + config.balance) for k in range(segments)]


def weighted_sum(gradients: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> list[Tensor]:
    """Σ w_k g_k, variable by variable. `gradients[k]` holds segment k's gradient for every variable."""
    return [
        sum((w * g for w, g in zip(weights[1:], variable[1:], strict=True)), weights[0] * variable[0])
        for variable in zip(*gradients, strict=True)
    ]
