"""Hooks: what may watch a run. The book's probes are hooks; TensorBoard is the library's own.

A hook is a frozen dataclass. Its fields are part of the run's identity, so a folder belongs to one choice of them; a
hook that changes nothing which the run writes has none::

    @dataclasses.dataclass(frozen=True)
    class MeanPixel:
        def after_iteration(self, run: Run) -> dict[str, Any]:
            return {"mean_pixel": run.synthetic.images.mean().item()}

    cddlib.distill(config, buffer, out, hooks=[MeanPixel()])
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.runtime.errors import needing
from cddlib.synthetic import SyntheticSet


class Run(NamedTuple):
    """A run as a hook sees it, before the first iteration (0) and after each."""

    config: DistillConfig
    buffer: Buffer
    folder: Path
    iteration: int
    synthetic: SyntheticSet
    """The set, which a hook may measure and must not change."""
    metrics: dict[str, Any]
    """The iteration's line of metrics so far."""

    def due(self, every: int) -> bool:
        """Whether it is time for what happens `every` so many iterations (0: never), at the start and at the end."""
        return every > 0 and (self.iteration % every == 0 or self.iteration == self.config.schedule.iterations)


@runtime_checkable
class Hook(Protocol):
    """Watches a run, on the first process of those that share it."""

    def after_iteration(self, run: Run) -> dict[str, Any]:
        """Values, as JSON, that join the iteration's line of metrics; numbers that are not finite stop the run."""


_WRITERS: dict[Path, tuple[Any, int]] = {}
"""The event file of the run that was watched last, and the iteration that it has come to."""


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Writes each number of the metrics, and the synthetic images at each validation, into `RUN/tensorboard`."""

    def after_iteration(self, run: Run) -> dict[str, Any]:
        """See `Hook`; it adds nothing to the metrics. Events of iterations that are done again are taken back."""
        writer, latest = _WRITERS.get(run.folder, (None, run.iteration))
        if run.iteration <= latest:
            with needing("the hook TensorBoard", "tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
            for earlier, _ in _WRITERS.values():
                earlier.close()
            _WRITERS.clear()
            writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.iteration)
        _WRITERS[run.folder] = writer, run.iteration
        for name, value in run.metrics.items():
            for index, number in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(number, (int, float)) and name != "iteration":
                    writer.add_scalar(f"{name}/{index}" if isinstance(value, list) else name, number, run.iteration)
        if "validation_accuracy" in run.metrics:
            writer.add_images("synthetic set", run.synthetic.pictures(), run.iteration)
        writer.flush()
        return {}
