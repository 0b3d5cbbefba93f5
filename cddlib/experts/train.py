"""Buffering: train experts on real data and keep their parameters after every epoch.

On the command line::

    cddlib buffer --data digits --out runs/buffer
    cddlib buffer --data cifar10 --root DIR --out runs/cifar10                                # as MTT
    cddlib buffer --method datm --data cifar10 --ipc 50 --root DIR --out runs/cifar10-datm    # as DATM

An expert is durable once it is finished, and the epochs of an unfinished one about every minute; a run that was
interrupted goes on from there and ends with the same bytes as one that was not. Experts differ only by their seed;
under torchrun its processes divide them.
"""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.dataset import Dataset, Images, load
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.experts.buffer import (
    DIFFICULTY,
    PREPROCESSING,
    Buffer,
    describe,
    expert_path,
    read_expert_record,
    read_preprocessing,
    write_trajectory,
)
from cddlib.experts.config import BufferConfig
from cddlib.experts.curriculum import difficulty, rank_in_class, select
from cddlib.networks.convnet import Network
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict, config_hash, replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import Diverged, UserError, as_user_error, out_of_memory_hint
from cddlib.runtime.files import file_digest, read_json, read_tensors, write_json, write_tensors
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import at_work, refuse_other_run
from cddlib.training.engine import worth_compiling
from cddlib.training.epoch import accuracy, fetch_real, train_epoch

UNFINISHED_SECONDS = 60.0
"""How much of an unfinished expert a killed process may lose, and the epoch it was in."""


@out_of_memory_hint("--batch-size or --width")
def train_buffer(config: BufferConfig, out: Path, *, root: Path | None = None, device: str = "auto") -> Buffer:
    """Train the experts that `out` lacks, then open it.

    Where torch.distributed is initialised, as the command line does under torchrun, every process calls this with
    the same arguments and trains its part.

    Args:
        config: what to train.
        out: the buffer's folder. It may hold some experts of the same configuration already.
        root: folder of the data sets, see `cddlib.data.dataset.default_root`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` …

    Raises:
        UserError: `out` holds another buffer or is in use, a file is damaged, the data set or the device is missing,
            memory runs out, or an expert diverges.
        Interrupted: a signal asked to stop; the epoch is finished, and saved.
    """
    dev = resolve_device(device)
    dataset = load(config.data.data, root)
    network = build_network(config.network, dataset.shape, len(dataset.classes))
    config = replace(config, compiled=_compiled(config, out, network, len(dataset.train.labels), dev))
    wanted: dict[str, Any] = {"config": as_dict(config), "data": describe(dataset), "experts": []}
    if not _resume(out, wanted)[1] and (out / "result.json").exists():
        return Buffer(out)
    with at_work(out / ".lock", "the epoch") as ranks:
        manifest, missing = _resume(out, wanted)
        recorder = Recorder(dev)
        ranks.agree(len(missing), f"the number of experts that {out} lacks")  # the first rank writes only now
        if ranks.first:
            (out / "result.json").unlink(missing_ok=True)  # of the smaller buffer that grows
            write_json(out / "buffer.json", manifest)
            if not (out / PREPROCESSING).exists():
                preprocessing = fit_preprocessing(dataset, zca=config.data.zca, device=dev)
                write_tensors(out / PREPROCESSING, preprocessing.tensors(), "preprocessing")
        training = ExpertTraining(config, dataset, out, dev)
        mine = ranks.portion(missing)
        images = len(mine) * config.epochs * len(training.train.labels)
        with ranks.progress(total=images, desc="experts", unit="image", unit_scale=True) as bar:
            for expert in mine:
                train_expert(training, expert, config_hash(_identity(wanted)), bar)
        ranks.wait()
        if ranks.first:
            experts = manifest["experts"]
            for path in _paths(out, manifest)[len(experts) :]:
                experts.append({"file": path.name, "sha256": file_digest(path), **read_expert_record(path)})
            write_json(out / "buffer.json", manifest)
            for left in out.glob(".*.unfinished.*"):  # of a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_json(out / "result.json", {"experts_trained": len(missing), **recorder.report()})
        ranks.wait()
    return Buffer(out)


def _compiled(config: BufferConfig, out: Path, network: Network, images: int, device: torch.device) -> bool:
    """Whether to compile: as the buffer in `out` began, or if one expert, perhaps all that is added, is worth it."""
    begun = out / "buffer.json"
    if config.compute.compiled is None and begun.exists():
        with as_user_error(begun, "a buffer's description"):
            return bool(read_json(begun)["config"].get("compiled"))
    return worth_compiling(network, config.compute, device, config.epochs * images)


def _paths(out: Path, manifest: dict[str, Any]) -> list[Path]:
    return [expert_path(out, expert) for expert in range(manifest["config"]["experts"])]


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes a buffer another buffer: everything but the number of its experts."""
    return {**{key: value for key, value in manifest["config"].items() if key != "experts"}, "data": manifest["data"]}


def _resume(out: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """The manifest of the buffer in `out`, grown to the experts of `wanted`, and those that are still to be trained.

    Experts of the same buffer that a killed run left are not. Refuses another buffer.
    """
    manifest, identity = {**wanted}, _identity(wanted)
    if (out / "buffer.json").exists():
        manifest = read_json(out / "buffer.json")
        with as_user_error(out / "buffer.json", "a buffer's description"):
            refuse_other_run(out, _identity(manifest), identity)
            manifest["config"]["experts"] = max(wanted["config"]["experts"], manifest["config"]["experts"])
    missing = [
        expert
        for expert, path in enumerate(_paths(out, manifest))
        if not path.exists() or read_expert_record(path).get("buffer") != config_hash(identity)
    ]
    manifest["experts"] = manifest["experts"][: missing[0] if missing else None]
    return manifest, missing


class ExpertTraining:
    """What the experts of a buffer share: network, images on a device, preprocessing, and the images' difficulty."""

    def __init__(self, config: BufferConfig, dataset: Dataset, folder: Path, device: torch.device) -> None:
        """Of the buffer in `folder`; the first rank measures the difficulty of images if the curriculum asks for it."""
        self.config, self.folder, self.ranks = config, folder, Ranks()
        self.network = build_network(config.network, dataset.shape, len(dataset.classes))
        train, validation = dataset.split
        parts = (train if config.holdout else dataset.train, validation, dataset.test)
        self.train, self.validation, self.test = (part.to(device) for part in parts)
        self.ranks.wait()
        self.preprocessing = read_preprocessing(folder, dataset.shape).to(device)
        self.difficulty_rank = self._difficulty_rank() if config.curriculum.ranks_images else None

    def _difficulty_rank(self) -> Tensor:
        """For every training image, its place in its class, from the easiest to the hardest."""
        path, config, labels = self.folder / DIFFICULTY, self.config, self.train.labels
        if self.ranks.first and not path.exists():
            how = (config.batch_size, config.learning_rate, config.augmentation.augment)
            scores = difficulty(self.network, self.train, self.preprocessing, *how)
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

    def epoch(
        self,
        expert: int,
        epoch: int,
        theta: Float[Tensor, " p"],
        optimizer: torch.optim.Optimizer,
        progress: Callable[[float], object] = int,
    ) -> float:
        """Train `theta` for the epoch of that number, counted from 1; returns the mean loss.

        The numbers that `progress` is called with add up to all training images, however many the curriculum shows.
        """
        config, fetch, size = self.config, fetch_real(self.train, self.preprocessing), len(self.train.labels)
        if self.difficulty_rank is not None:  # indices, not images: a whitened set is kept, a selection of it is not
            chosen, every = select(config.curriculum, self.difficulty_rank, epoch - 1), fetch
            fetch, size = (lambda indices: every(chosen[indices])), len(chosen)
        return train_epoch(
            self.network,
            theta,
            optimizer,
            fetch,
            size,
            batch_size=config.batch_size,
            strategy=config.augmentation.augment,
            generator=generator(config.seed + expert, "epoch", epoch),
            sharpness=config.sharpness,
            compute=config.compute,
            progress=lambda images: progress(images * len(self.train.labels) / size),
        )

    def accuracy(self, theta: Float[Tensor, " p"], part: Images) -> float:
        """Fraction of the images that are classified correctly; nan if the network's output is not finite."""
        return accuracy(self.network, theta, part, self.preprocessing)


def train_expert(training: ExpertTraining, number: int, buffer: str, bar: Any) -> None:
    """Train one expert, from the epoch that an earlier run saved if there is one, and write its trajectory."""
    config, ranks, path = training.config, training.ranks, expert_path(training.folder, number)
    unfinished, saved = path.with_name(f".{path.stem}.unfinished.safetensors"), time.monotonic()
    theta = training.network.init(generator(config.seed + number, "init")).to(training.train.labels.device)
    optimizer = training.optimizer(theta)
    snapshots, losses, accuracies = read_unfinished(unfinished, buffer, theta, optimizer)
    accuracies = accuracies or [training.accuracy(theta, training.validation)]
    bar.update(len(losses) * len(training.train.labels))
    for epoch in range(len(losses) + 1, config.epochs + 1):
        loss = training.epoch(number, epoch, theta, optimizer, bar.update)
        measured = training.accuracy(theta, training.validation)
        if not loss < math.inf or math.isnan(measured) or not bool(theta.isfinite().all()):
            raise Diverged(f"expert {number} diverged in epoch {epoch} (loss {loss}); lower --learning-rate.")
        snapshots.append(theta.detach().clone())  # cloned: the vector itself goes on changing
        losses.append(loss)
        accuracies.append(measured)
        done = f"{number + 1} of {config.experts}, epoch {epoch} of {config.epochs}"
        bar.set_postfix(expert=done, loss=f"{loss:.3f}", accuracy=f"{measured:.1%}")
        if epoch < config.epochs and (ranks.asked or time.monotonic() - saved > UNFINISHED_SECONDS):
            momentum = optimizer.state[theta].get("momentum_buffer")
            tensors = {"snapshots": torch.stack(snapshots)} | ({} if momentum is None else {"momentum": momentum})
            header = {"buffer": buffer, "losses": losses, "accuracies": accuracies}
            write_tensors(unfinished, tensors, "unfinished", header)
            saved = time.monotonic()
            if ranks.asked:
                done = f"stopped after epoch {epoch} of expert {number}, which is saved"
                raise Interrupted(done, ranks.asked)
    record = {
        "buffer": buffer,
        "seed": config.seed + number,
        "train_loss": losses,
        "validation_accuracy": accuracies,
        "test_accuracy": training.accuracy(theta, training.test),
    }
    write_trajectory(path, training.network, snapshots, record)
    unfinished.unlink(missing_ok=True)
    if ranks.asked:
        raise Interrupted(f"stopped after expert {number}, which is saved", ranks.asked)


def read_unfinished(
    path: Path, buffer: str, theta: Tensor, optimizer: torch.optim.Optimizer
) -> tuple[list[Tensor], list[float], list[float]]:
    """Parameters, losses and accuracies of the epochs that an earlier run of `buffer` saved; `theta` goes on from them.

    Without any, the parameters at the start, and no losses and accuracies.
    """
    tensors, header = read_tensors(path, "unfinished") if path.exists() else ({}, {})
    if header.get("buffer") != buffer:
        return [theta.detach().clone()], [], []
    with as_user_error(path, "an unfinished expert, and can be deleted"):
        losses, accuracies = list(header["losses"]), list(header["accuracies"])
        wanted = {"snapshots": (len(losses) + 1, len(theta)), "momentum": (len(theta),)}
        fit = all((tensor.dtype, tensor.shape) == (theta.dtype, wanted[name]) for name, tensor in tensors.items())
        if not fit or len(accuracies) != len(losses) + 1 or {*map(type, losses + accuracies)} != {float}:
            raise TypeError(f"{len(losses)} epochs of {len(theta)} parameters")
        theta.data.copy_(tensors["snapshots"][-1])
        if "momentum" in tensors:
            optimizer.state[theta]["momentum_buffer"] = tensors["momentum"].to(theta.device)
        return list(tensors["snapshots"].to(theta.device)), losses, accuracies
