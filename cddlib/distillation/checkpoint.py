"""Everything that changes from iteration to iteration, and its file."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from cddlib.distillation.config import DistillConfig
from cddlib.distillation.optimizer import SetOptimizer
from cddlib.runtime.config import from_dict
from cddlib.runtime.errors import UserError, as_user_error
from cddlib.runtime.files import read_tensors, write_tensors
from cddlib.synthetic import SyntheticSet

CHECKPOINT = "checkpoint.safetensors"


def milestone_path(folder: Path, iteration: int) -> Path:
    """The checkpoint that a run keeps of an iteration."""
    return folder / f"milestone-{iteration:06d}.safetensors"


def milestones(folder: Path) -> list[int]:
    """The iterations whose checkpoints a run has kept, ascending."""
    return sorted(int(path.stem.removeprefix("milestone-")) for path in folder.glob("milestone-*.safetensors"))


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a checkpoint holds beside tensors."""

    iteration: int = -1
    """Iterations done; -1: not even the validation before the first."""
    seconds: float = 0.0
    """Wall time so far."""
    above_in_a_row: int = 0
    """Latest iterations whose loss was above the guard."""
    best_iteration: int = 0
    """When the best set so far was validated."""
    best_accuracy: float = 0.0
    """Its validation accuracy."""
    metrics: str = ""
    """Digest of the lines of metrics so far."""


class State:
    """The synthetic set, its optimiser, the best set so far, and the progress."""

    def __init__(self, config: DistillConfig, initial: SyntheticSet) -> None:
        """Before the first iteration: the set is `initial`, which is changed in place."""
        self.synthetic = initial
        self.optimizer = SetOptimizer(config.optimizer, config.consolidation, initial)
        self.best: SyntheticSet | None = None
        self.progress = Progress()
        self.saved_at = 0
        """Iteration of the checkpoint."""

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.progress.iteration

    def consider(self, candidate: SyntheticSet, accuracy: float) -> None:
        """Keep `candidate` if it is the best so far."""
        if self.best is None or accuracy > self.progress.best_accuracy:
            self.best = candidate
            self.progress.best_iteration, self.progress.best_accuracy = self.iteration, accuracy

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name."""
        best = {} if self.best is None else self.best.variable_tensors()
        named = self.synthetic.variable_tensors() | self.optimizer.tensors
        return named | {f"best.{name}": tensor for name, tensor in best.items()}

    def save(self, folder: Path, *, milestone: bool = False) -> None:
        """Write the checkpoint of a run's folder; of a `milestone`, a copy that stays when the next one replaces it."""
        header = dataclasses.asdict(self.progress)
        if milestone:  # first: a process that is killed between the two comes here again
            write_tensors(milestone_path(folder, self.iteration), self.tensors(), "state", header)
        write_tensors(folder / CHECKPOINT, self.tensors(), "state", header)
        self.saved_at = self.iteration

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint of a run's folder, or from the last milestone if it was deleted."""
        saved = {folder / CHECKPOINT: ""}
        saved |= {milestone_path(folder, number): f"iteration {number}" for number in milestones(folder)[::-1]}
        paths = [path for path in saved if path.exists()]
        if not paths:
            return
        try:
            self.read(paths[0])
        except UserError as error:
            earlier = saved[paths[1]] if len(paths) > 1 else "the start"
            raise UserError(f"{error} Delete it to go on from {earlier}.") from None

    def read(self, path: Path) -> None:
        """Continue from the state in a checkpoint or milestone; raises `UserError` if it is damaged or foreign."""
        found, header = read_tensors(path, "state")
        with as_user_error(path, "a checkpoint"):
            self.progress = from_dict(Progress, header)
        if any(name.startswith("best.") for name in found):
            self.best = self.synthetic.copy()
        state = self.tensors()
        for name in sorted(state.keys() | found.keys()):
            held, wanted = (
                f"{str(of[name].dtype).removeprefix('torch.')}{list(of[name].shape)}" if name in of else "missing"
                for of in (found, state)
            )
            if held != wanted:
                raise UserError(f"{path} is a checkpoint of another run: {name} is {held}, not {wanted}.")
        with torch.no_grad():
            for name, tensor in found.items():
                state[name].copy_(tensor)
        self.saved_at = self.iteration
