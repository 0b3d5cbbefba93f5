"""One expert: its epochs, what is kept of them while it grows, and its trajectory."""

import math
import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.dataset import Dataset, Images
from cddlib.experts.buffer import DIFFICULTY, expert_path, read_preprocessing, write_trajectory
from cddlib.experts.config import BufferConfig
from cddlib.experts.curriculum import difficulty, rank_in_class, select
from cddlib.networks.convnet import Network
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import Diverged, UserError
from cddlib.runtime.files import read_tensors, write_tensors
from cddlib.runtime.random import generator
from cddlib.training.epoch import accuracy, fetch_real, train_epoch

UNFINISHED_SECONDS = 60.0
"""How much of an unfinished expert a killed process may lose, and the epoch it was in."""


class ExpertTraining:
    """What the experts of a buffer share: network, images on a device, preprocessing, and the images' difficulty."""

    def __init__(
        self,
        config: BufferConfig,
        network: Network,
        dataset: Dataset,
        folder: Path,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """Of the buffer in `folder`; the first rank measures the difficulty of images if the curriculum asks for it."""
        self.config, self.network, self.folder, self.ranks = config, network, folder, ranks
        train, validation = dataset.split
        parts = (train if config.holdout else dataset.train, validation, dataset.test)
        self.train, self.validation, self.test = (part.to(device) for part in parts)
        ranks.wait()
        self.preprocessing = read_preprocessing(folder, dataset.shape).to(device)
        self.difficulty_rank = self._difficulty_rank() if config.curriculum.ranks_images else None

    def _difficulty_rank(self) -> Tensor:
        """For every training image, its place in its class, from the easiest to the hardest."""
        path, config, labels = self.folder / DIFFICULTY, self.config, self.train.labels
        if self.ranks.first and not path.exists():
            scores = difficulty(
                self.network,
                self.train,
                self.preprocessing,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                strategy=config.augmentation.augment,
            )
            write_tensors(path, {"el2n": scores}, "difficulty")
        self.ranks.wait()
        el2n = read_tensors(path, "difficulty")[0].get("el2n")
        if el2n is None or (el2n.dtype, el2n.shape) != (torch.float32, labels.shape):
            raise UserError(f"{path} does not hold the difficulty of {len(labels)} images; delete it.")
        return rank_in_class(el2n.to(labels.device), labels)

    def optimizer(self, theta: Float[Tensor, " p"]) -> torch.optim.Optimizer:
        """What trains an expert's parameters."""
        c = self.config
        return torch.optim.SGD(
            [theta.requires_grad_()], lr=c.learning_rate, momentum=c.momentum, weight_decay=c.weight_decay
        )

    def epoch(self, expert: int, epoch: int, theta: Float[Tensor, " p"], optimizer: torch.optim.Optimizer) -> float:
        """Train `theta` for the epoch of that number, counted from 1; returns the mean loss."""
        config, seen = self.config, self.train
        if self.difficulty_rank is not None:
            seen = seen.select(select(config.curriculum, self.difficulty_rank, epoch - 1))
        return train_epoch(
            self.network,
            theta,
            optimizer,
            fetch_real(seen, self.preprocessing),
            len(seen.labels),
            batch_size=config.batch_size,
            strategy=config.augmentation.augment,
            generator=generator(config.seed + expert, "epoch", epoch),
            sharpness=config.sharpness,
            compute=config.compute,
        )

    def accuracy(self, theta: Float[Tensor, " p"], part: Images) -> float:
        """Fraction of the images that are classified correctly; nan if the network's output is not finite."""
        return accuracy(self.network, theta, part, self.preprocessing)


class _Expert:
    """One expert as it grows: its parameters after every epoch, and what was measured."""

    def __init__(self, training: ExpertTraining, number: int, buffer: str) -> None:
        """From the epoch that an earlier run saved, if there is one of the same `buffer`; else from the start."""
        self.training, self.number, self.buffer = training, number, buffer
        path = expert_path(training.folder, number)
        self.path, self.unfinished = path, path.with_name(f".{path.stem}.unfinished.safetensors")
        rng = generator(training.config.seed + number, "init")
        self.theta = training.network.init(rng).to(training.train.labels.device)
        self.optimizer = training.optimizer(self.theta)
        self.snapshots = [self.theta.detach().clone()]  # cloned: the vector itself goes on changing
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        if self.unfinished.exists():
            self._read()
        if not self.accuracies:
            self.accuracies = [training.accuracy(self.theta, training.validation)]

    def train_epoch(self) -> None:
        """Train the next epoch; raises `Diverged` if its numbers are beyond use."""
        epoch = len(self.losses) + 1
        loss = self.training.epoch(self.number, epoch, self.theta, self.optimizer)
        measured = self.training.accuracy(self.theta, self.training.validation)
        if not loss < math.inf or math.isnan(measured) or not bool(self.theta.isfinite().all()):
            raise Diverged(f"expert {self.number} diverged in epoch {epoch} (loss {loss}); lower --learning-rate.")
        self.snapshots.append(self.theta.detach().clone())
        self.losses.append(loss)
        self.accuracies.append(measured)

    def save(self) -> None:
        """Keep the epochs so far."""
        momentum = self.optimizer.state[self.theta].get("momentum_buffer")
        tensors = {"snapshots": torch.stack(self.snapshots)} | ({} if momentum is None else {"momentum": momentum})
        header = {"buffer": self.buffer, "losses": self.losses, "accuracies": self.accuracies}
        write_tensors(self.unfinished, tensors, "unfinished", header)

    def finish(self) -> None:
        """Write the trajectory."""
        record = {
            "buffer": self.buffer,
            "seed": self.training.config.seed + self.number,
            "train_loss": self.losses,
            "validation_accuracy": self.accuracies,
            "test_accuracy": self.training.accuracy(self.theta, self.training.test),
        }
        write_trajectory(self.path, self.training.network, self.snapshots, record)
        self.unfinished.unlink(missing_ok=True)

    def _read(self) -> None:
        """Go on from the epochs that an earlier run saved."""
        path, theta = self.unfinished, self.theta
        tensors, header = read_tensors(path, "unfinished")
        if header.get("buffer") != self.buffer:
            return
        losses, accuracies = header.get("losses"), header.get("accuracies")
        if not isinstance(losses, list) or not isinstance(accuracies, list) or len(accuracies) != len(losses) + 1:
            raise UserError(f"{path} does not hold the losses and accuracies of epochs; delete it to begin anew.")
        wanted = {"snapshots": (len(accuracies), len(theta)), "momentum": (len(theta),)}
        if "snapshots" not in tensors or any(
            tensor.dtype != theta.dtype or tuple(tensor.shape) != wanted.get(name) for name, tensor in tensors.items()
        ):
            raise UserError(
                f"{path} does not hold the parameters of {len(accuracies)} epochs; delete it to begin anew."
            )
        self.snapshots, self.losses, self.accuracies = list(tensors["snapshots"].to(theta.device)), losses, accuracies
        with torch.no_grad():
            theta.copy_(self.snapshots[-1])
        if "momentum" in tensors:
            self.optimizer.state[theta]["momentum_buffer"] = tensors["momentum"].to(theta.device)


def train_expert(training: ExpertTraining, number: int, buffer: str) -> None:
    """Train one expert, from the epoch that an earlier run saved if there is one, and write its trajectory."""
    config, ranks = training.config, training.ranks
    expert = _Expert(training, number, buffer)
    name = f"expert {number + 1}/{config.experts}"
    saved = time.monotonic()
    with ranks.progress(total=config.epochs, initial=len(expert.losses), desc=name, unit="epoch") as bar:
        while len(expert.losses) < config.epochs:
            expert.train_epoch()
            bar.update()
            bar.set_postfix(loss=f"{expert.losses[-1]:.3f}", accuracy=f"{expert.accuracies[-1]:.1%}")
            if len(expert.losses) == config.epochs:
                break
            if ranks.asked or time.monotonic() - saved > UNFINISHED_SECONDS:
                expert.save()
                saved = time.monotonic()
            if ranks.asked:
                done = f"stopped after epoch {len(expert.losses)} of expert {number}, which is saved"
                raise Interrupted(done, ranks.asked)
    expert.finish()
    if ranks.asked:
        raise Interrupted(f"stopped after expert {number}, which is saved", ranks.asked)
