"""The state of a distillation: everything that changes from iteration to iteration, and its checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cddlib.distillation.consolidation import ConsolidateConfig, Consolidation
from cddlib.distillation.optimizer import OptimizerConfig
from cddlib.runtime.config import from_dict
from cddlib.runtime.errors import UserError, expecting
from cddlib.runtime.files import read_tensors, write_tensors
from cddlib.synthetic import SyntheticSet

CHECKPOINT = "checkpoint.safetensors"


def milestone_path(folder: Path, iteration: int) -> Path:
    """The checkpoint that a run keeps of an iteration."""
    return folder / f"milestone-{iteration:06d}.safetensors"


def milestones(folder: Path) -> list[int]:
    """The iterations whose checkpoints a run has kept, ascending."""
    return sorted(int(path.stem.removeprefix("milestone-")) for path in folder.glob("milestone-*.safetensors"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers:
    """What a checkpoint holds beside tensors."""

    iteration: int
    seconds: float
    above_in_a_row: int
    best_iteration: int
    best_accuracy: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < float("inf"):
                raise TypeError(f"{name} is {value}")


class State:
    """Everything that changes from iteration to iteration, and its checkpoint."""

    def __init__(self, config: OptimizerConfig, consolidate: ConsolidateConfig, initial: SyntheticSet) -> None:
        """Before the first iteration: the set is `initial`, which is changed in place."""
        self.iteration = -1  # iterations done; -1: not even the validation before the first
        self.saved_at = 0  # iteration of the checkpoint
        self.above_in_a_row = 0
        self.seconds = 0.0
        self.best: SyntheticSet | None = None
        self.best_iteration, self.best_accuracy = 0, 0.0
        self.synthetic = initial
        for variable in initial.variables():
            variable.requires_grad_()
        momenta = {
            "images": config.momentum_images,
            "label_logits": config.momentum_labels,
            "step_size": config.momentum_step_size,
        }
        self.optimizer = torch.optim.SGD(
            [
                {"params": [variable], "lr": rate, "momentum": momenta[name]}
                for (name, variable), rate in zip(
                    initial.variable_tensors().items(), config.rates(initial), strict=True
                )
            ]
        )
        self.ema_decay = config.ema
        self.ema_images = None if config.ema is None else initial.images.detach().clone()
        held = consolidate.consolidation != "none"
        self.consolidation = Consolidation(consolidate, initial.images) if held else None

    def relabel(self, logits: Tensor, rows: Tensor) -> None:
        """Give the images at `rows` the label that `logits` say."""
        with torch.no_grad():
            cast(Tensor, self.synthetic.label_logits)[rows] = logits[rows]

    def step(self, gradients: list[Tensor], rows: Tensor) -> None:
        """One optimiser step on the images at `rows`, then the remedy that holds images, then the moving average.

        Momentum of the other images, which have no gradient, must not move them: they are put back.
        """
        images = self.synthetic.images
        before = [variable.detach().clone() for variable in self.synthetic.variables()]
        for variable, gradient in zip(self.synthetic.variables(), gradients, strict=True):
            variable.grad = gradient
        self.optimizer.step()
        rows = rows.to(images.device)
        if len(rows) < len(images):
            with torch.no_grad():
                for variable, old in zip(self.synthetic.variables()[:-1], before, strict=False):
                    variable.copy_(old.index_copy(0, rows, variable[rows]))
        if self.consolidation is not None:
            self.consolidation.after_step(images, before[0], gradients[0], self.iteration + 1)
        if self.ema_images is not None and self.ema_decay is not None:
            self.ema_images[rows] = self.ema_images[rows].lerp(images.detach()[rows], 1 - self.ema_decay)

    def candidate(self) -> SyntheticSet:
        """A copy of the set as it would be evaluated now."""
        found = self.synthetic.copy()
        return found if self.ema_images is None else dataclasses.replace(found, images=self.ema_images.clone())

    def consider(self, candidate: SyntheticSet, accuracy: float) -> None:
        """Keep `candidate` if it is the best so far."""
        if self.best is None or accuracy > self.best_accuracy:
            self.best, self.best_iteration, self.best_accuracy = candidate, self.iteration, accuracy

    def report(self, loss: float) -> dict[str, str]:
        """What the progress bar shows."""
        found = {"loss": f"{loss:.3f}"}
        if self.best is not None:
            found["best"] = f"{self.best_accuracy:.1%}"
        if self.above_in_a_row:
            found["above the guard"] = str(self.above_in_a_row)
        return found

    def save(self, folder: Path, seconds: float, *, milestone: bool = False) -> None:
        """Write the checkpoint of a run's folder; of a `milestone`, a copy that stays when the next one replaces it."""
        variables = self.synthetic.variable_tensors()
        tensors = dict(variables)
        for name, variable in variables.items():
            momentum = self.optimizer.state[variable].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        if self.ema_images is not None:
            tensors["ema.images"] = self.ema_images
        if self.consolidation is not None:
            tensors |= {f"consolidation.{name}": tensor for name, tensor in self.consolidation.tensors.items()}
        if self.best is not None:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.variable_tensors().items()}
        state = {
            "iteration": self.iteration,
            "seconds": seconds,
            "above_in_a_row": self.above_in_a_row,
            "best_iteration": self.best_iteration,
            "best_accuracy": self.best_accuracy,
        }
        if milestone:  # first: a process that is killed between the two comes here again
            write_tensors(milestone_path(folder, self.iteration), tensors, "state", state)
        write_tensors(folder / CHECKPOINT, tensors, "state", state)
        self.saved_at = self.iteration

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint of a run's folder, or from the last milestone if it was deleted."""
        kept = milestones(folder)[::-1]
        paths = [path for path in (folder / CHECKPOINT, *(milestone_path(folder, i) for i in kept)) if path.exists()]
        if not paths:
            return
        try:
            self.read(paths[0])
        except UserError as error:
            place = [*(f"iteration {iteration}" for iteration in kept), "the start"][-len(paths)]
            raise UserError(f"{error} Delete it to go on from {place}.") from None

    def read(self, path: Path) -> None:
        """Continue from the state in a checkpoint or milestone; raises `UserError` if it is damaged or foreign."""
        tensors, header = read_tensors(path, "state")
        with expecting(path, "a checkpoint"):
            numbers = from_dict(_Numbers, header)
        self._check_tensors(tensors, path)
        self.iteration = self.saved_at = numbers.iteration
        self.seconds, self.above_in_a_row = numbers.seconds, numbers.above_in_a_row
        self.best_iteration, self.best_accuracy = numbers.best_iteration, numbers.best_accuracy
        device = self.synthetic.images.device
        variables = self.synthetic.variable_tensors()
        with torch.no_grad():
            for name, variable in variables.items():
                variable.copy_(tensors[name])
                if f"momentum.{name}" in tensors:
                    self.optimizer.state[variable]["momentum_buffer"] = tensors[f"momentum.{name}"].to(device)
        if self.ema_images is not None:
            self.ema_images.copy_(tensors["ema.images"])
        if self.consolidation is not None:
            for name, tensor in self.consolidation.tensors.items():
                tensor.copy_(tensors[f"consolidation.{name}"])
        if "best.images" in tensors:
            best: dict[str, Any] = {name: tensors[f"best.{name}"].to(device) for name in variables}
            self.best = dataclasses.replace(self.synthetic, **best)

    def _check_tensors(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Raise `UserError` unless these are the tensors of a checkpoint of this run."""
        variables = self.synthetic.variable_tensors()
        wanted = dict(variables)
        if self.ema_images is not None:
            wanted["ema.images"] = self.ema_images
        if self.consolidation is not None:
            wanted |= {f"consolidation.{name}": tensor for name, tensor in self.consolidation.tensors.items()}
        if any(name.startswith("best.") for name in tensors):
            wanted |= {f"best.{name}": tensor for name, tensor in variables.items()}
        wanted |= {f"momentum.{name}": variables[name] for name in variables if f"momentum.{name}" in tensors}
        for name in wanted.keys() | tensors.keys():
            described = [
                f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" if tensor is not None else "missing"
                for tensor in (tensors.get(name), wanted.get(name))
            ]
            if described[0] != described[1]:
                raise UserError(f"{path} is a checkpoint of another run: {name} is {described[0]}, not {described[1]}.")
