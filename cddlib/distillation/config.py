"""The configuration of a distillation, and whether a buffer fits it."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig
from cddlib.distillation.consolidation import ConsolidateConfig
from cddlib.distillation.optimizer import OptimizerConfig
from cddlib.experts.buffer import Buffer
from cddlib.matching.combine import CombineConfig
from cddlib.matching.segments import SegmentsConfig, learned_images
from cddlib.matching.student import MatchingConfig
from cddlib.networks.convnet import NetworkConfig
from cddlib.protocol import EvaluateConfig
from cddlib.runtime.config import as_dict, replace
from cddlib.runtime.errors import UserError, require
from cddlib.runtime.files import read_json
from cddlib.synthetic import SyntheticConfig
from cddlib.training.engine import worth_compiling
from cddlib.training.step import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A complete distillation. `cddlib.methods` fills it in for a method, data set and IPC."""

    method: str = "contra"
    """Name of the recipe."""
    seed: int = 0
    """Seed of everything random."""
    schedule: SegmentsConfig = SegmentsConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    student: MatchingConfig = MatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    combination: CombineConfig = CombineConfig()
    consolidation: ConsolidateConfig = ConsolidateConfig()
    evaluation: EvaluateConfig = EvaluateConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    augmentation: AugmentConfig = AugmentConfig()
    compute: ComputeConfig = ComputeConfig()
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
        require(1, validation_runs=self.validation_runs, checkpoint_every=self.checkpoint_every)
        require(0, validate_every=self.validate_every, milestones=self.milestones)
        subsets, ipc = self.schedule.subsets, self.synthetic.ipc
        if ipc < subsets:
            raise UserError(f"ipc is {ipc}; {subsets} subsets need at least {subsets} images a class.")

    def images_a_step(self, classes: int) -> int:
        """Synthetic images in a student's step, in the mean over the subsets that are optimised one after another."""
        learned = learned_images(self.synthetic.ipc, classes, self.schedule.subsets)
        return sum(self.student.batch(size, number) for number, size in enumerate(learned)) // len(learned)


def with_compilation(config: DistillConfig, buffer: Buffer, folder: Path, device: torch.device) -> DistillConfig:
    """`config`, with a decision whether to compile: that of the run in `folder`, if it began already."""
    if config.compute.compiled is None and (folder / "config.json").exists():
        return replace(config, compiled=read_json(folder / "config.json").get("compiled"))
    steps = config.schedule.iterations * config.schedule.segments_in_all * config.student.student_steps
    images = 3 * steps * config.images_a_step(buffer.data["classes"])  # a student's step is worth three of training
    compiled = worth_compiling(buffer.network, config.compute, device, images)
    return replace(config, compiled=compiled)


def check_buffer(config: DistillConfig, buffer: Buffer) -> None:
    """Raise `UserError` unless the experts in `buffer` are those that `config` wants to match."""
    wanted: dict[str, Any] = as_dict(config.data) | as_dict(config.network) | as_dict(config.augmentation)
    for name, value in wanted.items():
        theirs = buffer.config.get(name)
        if value != theirs:
            raise UserError(f"{name} is {value!r}, but the experts in {buffer.folder} were trained with {theirs!r}.")
    config.schedule.check_epochs(buffer.epochs)
    count, expert = config.schedule.concurrent_experts, config.schedule.expert
    if count > len(buffer.experts):
        raise UserError(f"concurrent_experts is {count}, but {buffer.folder} holds {len(buffer.experts)}.")
    if expert is not None:
        buffer.check_expert("expert", expert)
