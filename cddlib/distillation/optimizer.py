"""How the synthetic set is stepped."""

import dataclasses

from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the synthetic set is stepped: SGD with a rate and a momentum for each of its variables."""

    lr_images: float = 1000.0
    """Learning rate of the images."""
    momentum_images: float = 0.5
    """Momentum of the images."""
    lr_labels: float = 2.0
    """Learning rate of the label logits, with soft labels."""
    momentum_labels: float = 0.9
    """Momentum of the label logits."""
    lr_step_size: float = 1e-5
    """Learning rate of the student's step size."""
    momentum_step_size: float = 0.5
    """Momentum of the student's step size."""
    ema: float | None = None
    """Decay of a moving average of the images that is evaluated and saved in their place (FTD)."""

    def __post_init__(self) -> None:
        for name in ("lr_images", "lr_labels", "lr_step_size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("momentum_images", "momentum_labels", "momentum_step_size"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more and below 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must lie between 0 and 1.")

    def rates(self, synthetic: SyntheticSet) -> list[float]:
        """The learning rate of each of the set's variables, in the order of `variable_tensors`."""
        rates = {"images": self.lr_images, "label_logits": self.lr_labels, "step_size": self.lr_step_size}
        return [rates[name] for name in synthetic.variable_tensors()]
