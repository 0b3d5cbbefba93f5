"""How the synthetic set is stepped: SGD on its variables, a moving average, and remedies that hold images."""

import dataclasses
import math

import torch
from torch import Tensor

from cddlib.distillation.consolidation import ConsolidateConfig, Consolidation
from cddlib.runtime.errors import UserError, require
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
        for variable in ("images", "labels", "step_size"):
            require(0, below=math.inf, **{f"lr_{variable}": getattr(self, f"lr_{variable}")})
            require(0, below=1, **{f"momentum_{variable}": getattr(self, f"momentum_{variable}")})
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must lie between 0 and 1.")

    def rates(self, synthetic: SyntheticSet) -> list[float]:
        """The learning rate of each of the set's variables, in the order of `variable_tensors`."""
        rates = {"images": self.lr_images, "label_logits": self.lr_labels, "step_size": self.lr_step_size}
        return [rates[name] for name in synthetic.variable_tensors()]


class SetOptimizer:
    """Steps a synthetic set in place."""

    def __init__(self, config: OptimizerConfig, consolidation: ConsolidateConfig, synthetic: SyntheticSet) -> None:
        """Before the first step."""
        self._synthetic, self._decay = synthetic, config.ema
        variables = synthetic.variable_tensors()
        momenta = {
            "images": config.momentum_images,
            "label_logits": config.momentum_labels,
            "step_size": config.momentum_step_size,
        }
        self._sgd = torch.optim.SGD(
            [
                {"params": [variable.requires_grad_()], "lr": rate, "momentum": momenta[name]}
                for (name, variable), rate in zip(variables.items(), config.rates(synthetic), strict=True)
            ]
        )
        self._average = None if config.ema is None else synthetic.images.detach().clone()
        holds = consolidation.consolidation != "none"
        self._consolidation = Consolidation(consolidation, synthetic.images) if holds else None

    def step(self, gradients: list[Tensor], rows: Tensor, iteration: int) -> None:
        """The step of that number, from 1, on the images at `rows`: SGD, then consolidation, then the average.

        Momentum of the other images, which have no gradient, must not move them: they are put back.
        """
        images, variables = self._synthetic.images, self._synthetic.variables()
        before = [variable.detach().clone() for variable in variables]
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        self._sgd.step()
        rows = rows.to(images.device)
        if len(rows) < len(images):
            with torch.no_grad():
                for variable, old in zip(variables[:-1], before, strict=False):
                    variable.copy_(old.index_copy(0, rows, variable[rows]))
        if self._consolidation is not None:
            self._consolidation.after_step(images, before[0], gradients[0], iteration)
        if self._average is not None and self._decay is not None:
            self._average[rows] = self._average[rows].lerp(images.detach()[rows], 1 - self._decay)

    def candidate(self) -> SyntheticSet:
        """A copy of the set as it would be evaluated now."""
        copy = self._synthetic.copy()
        return copy if self._average is None else dataclasses.replace(copy, images=self._average.clone())

    def tensors(self) -> dict[str, Tensor]:
        """What the next step depends on beside the set; a momentum only once there is one."""
        momenta = {
            f"momentum.{name}": self._sgd.state[variable]["momentum_buffer"]
            for name, variable in self._synthetic.variable_tensors().items()
            if self._sgd.state[variable].get("momentum_buffer") is not None
        }
        return momenta | self._buffers()

    def expected(self, names: set[str]) -> dict[str, Tensor]:
        """Tensors of the shapes that `load` needs, with the momenta that are among `names`."""
        variables = self._synthetic.variable_tensors()
        momenta = {f"momentum.{name}": variable for name, variable in variables.items()}
        return {name: tensor for name, tensor in momenta.items() if name in names} | self._buffers()

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` once returned."""
        for name, variable in self._synthetic.variable_tensors().items():
            if f"momentum.{name}" in tensors:
                self._sgd.state[variable]["momentum_buffer"] = tensors[f"momentum.{name}"].to(variable.device)
        for name, tensor in self._buffers().items():
            tensor.copy_(tensors[name])

    def _buffers(self) -> dict[str, Tensor]:
        average = {} if self._average is None else {"ema.images": self._average}
        held = {} if self._consolidation is None else self._consolidation.tensors
        return average | {f"consolidation.{name}": tensor for name, tensor in held.items()}
