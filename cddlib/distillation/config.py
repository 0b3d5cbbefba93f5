"""The configuration of a distillation, and whether a buffer fits it."""

import dataclasses

import torch

from cddbook.probes import ProbeConfig
from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig
from cddlib.distillation.consolidation import ConsolidateConfig
from cddlib.distillation.gradient import ConcurrentConfig
from cddlib.evaluate import EvaluateConfig
from cddlib.experts.buffer import Buffer
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.errors import UserError
from cddlib.training.engine import worth_compiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(
    EvaluateConfig,
    ProbeConfig,
    ConcurrentConfig,
    ConsolidateConfig,
    NetworkConfig,
    DataConfig,
):
    """A complete distillation. `cddlib.methods.recipes` fills it in for a method, data set and IPC."""

    method: str = "contra"
    """Name of the recipe."""
    loss_threshold: float | None = None
    """Skip an iteration whose loss is above this (DATM's guard); without it, never skip."""
    validate_every: int = 100
    """Iterations between validations, before the first and after the last one too; 0 means never."""
    validation_runs: int = 1
    """Networks trained for each validation."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    milestones: int = 4
    """Checkpoints that are kept, evenly spaced from the first iteration on, for `cddlib verify`; 0 keeps none."""

    def __post_init__(self) -> None:
        for base in DistillConfig.__mro__[1:]:
            if "__post_init__" in vars(base):
                base.__post_init__(self)  # type: ignore[attr-defined]
        for name in ("validation_runs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("validate_every", "milestones"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.ipc < self.subsets:
            raise UserError(f"ipc is {self.ipc}; {self.subsets} subsets need at least {self.subsets} images a class.")


def _decided(config: DistillConfig, buffer: Buffer, device: torch.device) -> DistillConfig:
    """`config`, with a decision whether to compile."""
    subset = config.ipc * buffer.data["classes"] // config.subsets
    batch = min(config.student_batch or subset, subset)
    steps = config.iterations * config.segments_in_all * config.student_steps
    images = 3 * steps * batch  # a student's step is worth three of training
    compiled = worth_compiling(buffer.network, config, device, tuple(buffer.data["shape"]), images)
    return dataclasses.replace(config, compiled=compiled)


def _check_buffer(config: DistillConfig, buffer: Buffer) -> None:
    """Refuse a buffer whose experts are not the ones that `config` wants to match."""
    for base in (DataConfig, NetworkConfig, AugmentConfig):
        for field in dataclasses.fields(base):
            wanted, found = getattr(config, field.name), buffer.config.get(field.name)
            if wanted != found:
                raise UserError(
                    f"{field.name} is {wanted!r}, but the experts in {buffer.folder} were trained with {found!r}."
                )
    config.check_epochs(buffer.epochs)
    if config.concurrent_experts > len(buffer.experts):
        raise UserError(
            f"concurrent_experts is {config.concurrent_experts}, but {buffer.folder} holds {len(buffer.experts)}."
        )
    latest = buffer.epochs - config.expert_epochs
    if config.probe_starts and config.probe_starts[-1] > latest:
        raise UserError(
            f"probe_starts is {config.probe_starts}, but the experts stop at epoch {buffer.epochs} and segments are "
            f"{config.expert_epochs} epochs long; probes may start at epoch {latest} at the latest."
        )
    for name, expert in (("expert", config.expert), ("probe_expert", config.probe_expert)):
        if expert is not None and expert >= len(buffer.experts):
            raise UserError(f"{name} is {expert}, but {buffer.folder} holds experts 0 to {len(buffer.experts) - 1}.")
