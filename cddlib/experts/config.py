"""The configuration of a buffer: how experts are trained."""

import dataclasses

from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig
from cddlib.experts.curriculum import CurriculumConfig
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.errors import require
from cddlib.training.epoch import SharpnessConfig
from cddlib.training.step import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """How experts are trained: SGD at a constant learning rate, on all images, unless told otherwise."""

    experts: int = 100
    """Number of experts. A finished buffer grows when asked for more, which makes it another one to the runs on it, and
    keeps what it has when asked for fewer."""
    epochs: int = 50
    """Epochs T of each expert; the buffer keeps T + 1 parameter vectors."""
    learning_rate: float = 0.01
    """Learning rate."""
    momentum: float = 0.0
    """Momentum."""
    weight_decay: float = 0.0
    """Weight decay."""
    batch_size: int = 256
    """Real images a step."""
    holdout: bool = True
    """Keep the validation images out of training. The published codes train on all images (--no-holdout)."""
    seed: int = 0
    """Seed of the first expert; expert i has seed + i, so independent buffers have seeds at least `experts` apart."""
    sharpness: SharpnessConfig = SharpnessConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    augmentation: AugmentConfig = AugmentConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        require(1, experts=self.experts, epochs=self.epochs, batch_size=self.batch_size)
        require(above=0, below=float("inf"), learning_rate=self.learning_rate)
        require(0, below=1, momentum=self.momentum)
        require(0, below=float("inf"), weight_decay=self.weight_decay)
