"""How the synthetic set is stepped: SGD on its variables, a moving average, and remedies that hold images."""

import dataclasses
import math

import torch
from torch import Tensor

from cddlib.distillation.consolidation import ConsolidateConfig, Consolidation
from cddlib.runtime.errors import require
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
    """Decay of a moving average of the images (FTD). Each validation tests the set with both, and keeps the better."""

    def __post_init__(self) -> None:
        for variable in ("images", "labels", "step_size"):
            require(0, below=math.inf, **{f"lr_{variable}": getattr(self, f"lr_{variable}")})
            require(0, below=1, **{f"momentum_{variable}": getattr(self, f"momentum_{variable}")})
        require(above=0, below=1, ema=self.ema)

    def rates(self, synthetic: SyntheticSet, kind: str = "lr") -> list[float]:
        """The learning rate, or the `momentum`, of each of the set's variables, in the order of `variable_tensors`."""
        fields = {"images": "images", "label_logits": "labels", "step_size": "step_size"}
        return [getattr(self, f"{kind}_{fields[name]}") for name in synthetic.variable_tensors()]


class SetOptimizer:
    """Steps a synthetic set in place."""

    def __init__(self, config: OptimizerConfig, consolidation: ConsolidateConfig, synthetic: SyntheticSet) -> None:
        """Before the first step."""
        self._config, self._synthetic = config, synthetic
        variables = synthetic.copy().variable_tensors()
        self._consolidation = None
        self.tensors = {f"momentum.{name}": torch.zeros_like(variable) for name, variable in variables.items()}
        """What the next step depends on beside the set; changed in place."""
        if consolidation.consolidation != "none":
            self._consolidation = Consolidation(consolidation, synthetic.images)
            self.tensors |= {f"consolidation.{name}": tensor for name, tensor in self._consolidation.tensors.items()}
        if config.ema is not None:
            self.tensors["ema.images"] = variables["images"]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rows: Tensor, iteration: int) -> None:
        """The step of that number, from 1, on the images at `rows`: SGD, then consolidation, then the average.

        The other images have no gradient, and momentum does not move them.
        """
        config, images = self._config, self._synthetic.images
        before, rows = images.clone(), rows.to(images.device)
        rates, momenta = (config.rates(self._synthetic, kind) for kind in ("lr", "momentum"))
        variables = self._synthetic.variable_tensors().items()
        for (name, variable), gradient, rate, momentum in zip(variables, gradients, rates, momenta, strict=True):
            velocity = self.tensors[f"momentum.{name}"].mul_(momentum).add_(gradient)
            moved = rows if variable.ndim else ()
            variable[moved] = variable[moved].sub(velocity[moved], alpha=rate)
        if self._consolidation is not None:
            self._consolidation.after_step(images, before, gradients[0], rows, iteration)
        if config.ema is not None:
            average = self.tensors["ema.images"]
            average[rows] = average[rows].lerp(images[rows], 1 - config.ema)

    def candidates(self) -> list[SyntheticSet]:
        """Copies of the set as it could be evaluated now: with its images, and with their moving average."""
        copy, average = self._synthetic.copy(), self.tensors.get("ema.images")
        return [copy] if average is None else [copy, dataclasses.replace(copy, images=average.clone())]
