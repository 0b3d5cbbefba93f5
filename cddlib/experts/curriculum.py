"""Easy images first, easiest images last out: which real images an expert sees in which epoch (PAD, Li et al. 2024).

Images are ranked within their class by EL2N (Paul et al. 2021): the length of the error, softmax minus one-hot label,
of networks early in training. PAD's repository ranks with scores that it ships; ours are computed once a buffer.
"""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cddlib.data.dataset import Images, indices_by_class
from cddlib.data.preprocessing import Preprocessing
from cddlib.networks.convnet import Network
from cddlib.runtime.errors import UserError, require
from cddlib.runtime.random import generator
from cddlib.training.epoch import fetch_real, predict, train_epoch

SCORERS = 5  # networks whose errors are averaged
SCORER_EPOCHS = 10  # epochs that each has trained


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which images an expert sees in which epoch."""

    easiest_fraction: float = 1.0
    """Fraction of every class, the easiest, that the first epoch sees; it grows linearly. At 1, all from the start."""
    all_from_epoch: int = 20
    """Epoch, from 0, from which all images are seen."""
    drop_epochs: tuple[int, ...] = ()
    """Epochs, ascending, after each of which some of the easiest images are left out."""
    drop_fractions: tuple[float, ...] = ()
    """The fraction of every class that is left out from then on, one for each of `drop_epochs`."""

    def __post_init__(self) -> None:
        require(above=0, most=1, easiest_fraction=self.easiest_fraction)
        require(1, all_from_epoch=self.all_from_epoch)
        if len(self.drop_epochs) != len(self.drop_fractions):
            raise UserError(
                f"drop_fractions has {len(self.drop_fractions)} values and drop_epochs {len(self.drop_epochs)}; each "
                f"epoch needs a fraction."
            )
        if list(self.drop_epochs) != sorted({epoch for epoch in self.drop_epochs if epoch >= self.all_from_epoch}):
            raise UserError(
                f"drop_epochs is {self.drop_epochs}; epochs must be ascending, each once, and not before "
                f"all_from_epoch ({self.all_from_epoch})."
            )
        for fraction in self.drop_fractions:
            require(0, below=1, drop_fractions=fraction)

    @property
    def ranks_images(self) -> bool:
        """Whether any epoch sees fewer than all images."""
        return self.easiest_fraction < 1 or any(self.drop_fractions)

    def bounds(self, epoch: int) -> tuple[float, float]:
        """From which to which fraction of a class, from easy to hard, epoch `epoch` (from 0) sees."""
        if epoch < self.all_from_epoch:
            return 0.0, self.easiest_fraction + (1 - self.easiest_fraction) * epoch / self.all_from_epoch
        passed = sum(epoch > begin for begin in self.drop_epochs)
        return (0.0, *self.drop_fractions)[passed], 1.0


def difficulty(
    network: Network, train: Images, preprocessing: Preprocessing, batch_size: int, learning_rate: float, strategy: str
) -> Float[Tensor, " n"]:
    """EL2N of every training image: its mean over `SCORERS` networks trained for `SCORER_EPOCHS` epochs.

    The scorers belong to no expert: their streams are their own, and the same for every seed of a buffer.
    """
    fetch, size = fetch_real(train, preprocessing), len(train.labels)
    total = torch.zeros(size, device=train.labels.device)
    for scorer in range(SCORERS):
        theta = network.init(generator("difficulty", scorer, "init")).to(train.labels.device).requires_grad_()
        optimizer = torch.optim.SGD([theta], lr=learning_rate)
        for epoch in range(SCORER_EPOCHS):
            rng = generator("difficulty", scorer, epoch)
            train_epoch(network, theta, optimizer, fetch, size, batch_size=batch_size, strategy=strategy, generator=rng)
        logits = predict(network, theta, fetch, size)
        total += (logits.softmax(1) - F.one_hot(train.labels, logits.shape[1])).norm(dim=1)
    return total / SCORERS


def rank_in_class(scores: Float[Tensor, " n"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """For every image, its place in its class, from 0 for the easiest to 1; of equal scores the earlier is easier."""
    ranks = torch.empty_like(scores, dtype=torch.float64)
    for members in indices_by_class(labels):
        order = scores[members].argsort(stable=True)
        ranks[members[order]] = torch.linspace(0, 1, len(members), dtype=torch.float64, device=scores.device)
    return ranks


def select(config: CurriculumConfig, ranks: Float[Tensor, " n"], epoch: int) -> Int64[Tensor, " m"]:
    """The images that epoch `epoch` (from 0) sees."""
    lower, upper = config.bounds(epoch)
    return torch.nonzero((ranks >= lower) & (ranks <= upper)).flatten()
