"""Buffering: train experts on real data and keep their parameters after every epoch.

On the command line::

    cddlib buffer --data digits --out runs/buffer
    cddlib buffer --data cifar10 --root DIR --out runs/cifar10                                # as MTT
    cddlib buffer --method datm --data cifar10 --ipc 50 --root DIR --out runs/cifar10-datm    # as DATM

An expert is durable once it is finished, and the epochs of an unfinished one about every minute; a run that was
interrupted goes on from there and ends with the same bytes as one that was not. Experts differ only by their seed;
under torchrun its processes divide them.
"""

import contextlib
import copy
import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig, Dataset, Images, load
from cddlib.data.preprocessing import Preprocessing, fit_preprocessing
from cddlib.experts.buffer import (
    DIFFICULTY,
    PREPROCESSING,
    Buffer,
    expert_path,
    read_expert_record,
    read_manifest,
    read_preprocessing,
    write_trajectory,
)
from cddlib.experts.curriculum import CurriculumConfig, difficulty, rank_in_class, select
from cddlib.networks.convnet import Network, NetworkConfig
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict, config_hash, from_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import Diverged, UserError, memory_advice
from cddlib.runtime.files import file_digest, read_tensors, write_json, write_tensors
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import locked, refuse_other_run
from cddlib.training.engine import worth_compiling
from cddlib.training.epoch import SharpnessConfig, accuracy, fetch_real, train_epoch
from cddlib.training.step import ComputeConfig

UNFINISHED_SECONDS = 60.0
"""How much of an unfinished expert a killed process may lose, and the epoch it was in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferConfig(CurriculumConfig, SharpnessConfig, DataConfig, NetworkConfig, AugmentConfig, ComputeConfig):
    """How experts are trained: SGD at a constant learning rate, on all images, unless told otherwise."""

    experts: int = 100
    """Number of experts. A finished buffer grows when asked for more, and keeps what it has when asked for fewer."""
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

    def __post_init__(self) -> None:
        for base in BufferConfig.__mro__[1:]:
            if "__post_init__" in vars(base):
                base.__post_init__(self)  # type: ignore[attr-defined]
        for name in ("experts", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate is {self.learning_rate}; it must be positive.")
        for name, limit in (("momentum", 1.0), ("weight_decay", float("inf"))):
            if not 0 <= getattr(self, name) < limit:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more and below {limit}.")


@memory_advice("--batch-size or --width")
def train_buffer(config: BufferConfig, out: Path, *, root: Path | None = None, device: str = "auto") -> Buffer:
    """Train the experts that `out` lacks, then open it.

    Where torch.distributed is initialised, as the command line does under torchrun, every process calls this with
    the same arguments and trains its share.

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
    dataset = load(config.data, root)
    network = build_network(from_dict(NetworkConfig, as_dict(config)), dataset.shape, len(dataset.classes))
    seen = config.epochs * len(dataset.train.labels)  # by one expert, so that a buffer can grow
    compiled = worth_compiling(network, config, dev, dataset.shape, seen)
    config = dataclasses.replace(config, compiled=compiled)
    data = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
    }
    wanted: dict[str, Any] = {"config": as_dict(config), "data": data, "experts": []}
    manifest = _resume(out, wanted)
    if (out / "result.json").exists() and not _missing(out, manifest):
        return Buffer(out)
    ranks = Ranks()
    with locked(out / ".lock") if ranks.first else contextlib.nullcontext(), ranks.heeding_signals("the epoch"):
        _train_missing(config, out, wanted, network, dataset, dev, ranks)
    return Buffer(out)


def _train_missing(
    config: BufferConfig,
    out: Path,
    wanted: dict[str, Any],
    network: Network,
    dataset: Dataset,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Train the experts that `out` lacks, in a folder that is this run's alone."""
    manifest = _resume(out, wanted)
    missing = _missing(out, manifest)
    manifest["experts"] = manifest["experts"][: min(missing, default=len(manifest["experts"]))]
    recorder = Recorder(device)
    train, validation = dataset.split
    parts = (train if config.holdout else dataset.train, validation, dataset.test)
    on_device = tuple(part.to(device) for part in parts)
    ranks.agree(len(missing), f"the number of experts that {out} lacks")  # the first rank writes only now
    if ranks.first:
        (out / "result.json").unlink(missing_ok=True)  # of the smaller buffer that grows
        write_json(out / "buffer.json", manifest)
        if not (out / PREPROCESSING).exists():
            preprocessing = fit_preprocessing(dataset, zca=config.zca, device=device)
            write_tensors(out / PREPROCESSING, preprocessing.tensors(), "preprocessing")
        if config.ranks_images and not (out / DIFFICULTY).exists():
            _measure_difficulty(config, out, network, on_device[0], read_preprocessing(out, dataset.shape).to(device))
    ranks.wait()
    preprocessing = read_preprocessing(out, dataset.shape).to(device)
    ease = ease_of(config, out, on_device[0])
    for expert in ranks.share(missing):
        _train_expert(
            config, expert, network, on_device, preprocessing, ease, out, config_hash(_identity(wanted)), ranks
        )
        if ranks.first:
            _list_experts(out, manifest)
    ranks.wait()
    if ranks.first:
        _list_experts(out, manifest)
        for left in out.glob(".*.unfinished.*"):  # of a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_json(out / "result.json", {"experts_trained": len(missing), **recorder.report()})
    ranks.wait()


def _missing(out: Path, manifest: dict[str, Any]) -> list[int]:
    """The experts that are still to be trained. Those of the same buffer that a killed run left are not."""
    identity = config_hash(_identity(manifest))
    paths = [expert_path(out, expert) for expert in range(manifest["config"]["experts"])]
    return [
        expert
        for expert, path in enumerate(paths)
        if not path.exists() or read_expert_record(path).get("buffer") != identity
    ]


def _list_experts(out: Path, manifest: dict[str, Any]) -> None:
    """Describe in `buffer.json` the experts that are finished, up to the first that is not."""
    missing = _missing(out, manifest)
    for expert in range(len(manifest["experts"]), min(missing, default=manifest["config"]["experts"])):
        path = expert_path(out, expert)
        manifest["experts"].append({"file": path.name, "sha256": file_digest(path), **read_expert_record(path)})
    write_json(out / "buffer.json", manifest)


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes a buffer another buffer: everything but the number of its experts."""
    return {**{key: value for key, value in manifest["config"].items() if key != "experts"}, "data": manifest["data"]}


def _resume(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the buffer in `out`, grown to the experts of `wanted`; refuse another buffer."""
    if not (out / "buffer.json").exists():
        return copy.deepcopy(wanted)
    manifest, _ = read_manifest(out)
    refuse_other_run(out, _identity(manifest), _identity(wanted))
    manifest["config"]["experts"] = max(wanted["config"]["experts"], manifest["config"]["experts"])
    return manifest


def _measure_difficulty(
    config: BufferConfig, out: Path, network: Network, train: Images, preprocessing: Preprocessing
) -> None:
    """Write down how hard each training image is."""
    scores = difficulty(
        network,
        train,
        preprocessing,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        strategy=config.augment,
    )
    write_tensors(out / DIFFICULTY, {"el2n": scores}, "difficulty")


def ease_of(config: BufferConfig, out: Path, train: Images) -> Tensor | None:
    """How easy each training image is within its class, if the curriculum asks."""
    if not config.ranks_images:
        return None
    scores = read_tensors(out / DIFFICULTY, "difficulty")[0].get("el2n")
    if scores is None or (scores.dtype, scores.shape) != (torch.float32, train.labels.shape):
        raise UserError(f"{out / DIFFICULTY} does not hold the difficulty of {len(train.labels)} images; delete it.")
    return rank_in_class(scores.to(train.labels.device), train.labels)


def expert_optimizer(config: BufferConfig, theta: Float[Tensor, " p"]) -> torch.optim.Optimizer:
    """What trains an expert's parameters."""
    return torch.optim.SGD(
        [theta.requires_grad_()],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def expert_epoch(
    config: BufferConfig,
    expert: int,
    epoch: int,
    network: Network,
    theta: Float[Tensor, " p"],
    optimizer: torch.optim.Optimizer,
    train: Images,
    preprocessing: Preprocessing,
    ease: Tensor | None,
) -> float:
    """Train `theta` for the epoch of that number, counted from 1; returns the mean loss."""
    seen = train if ease is None else train.select(select(config, ease, epoch - 1))
    return train_epoch(
        network,
        theta,
        optimizer,
        fetch_real(seen, preprocessing),
        len(seen.labels),
        batch_size=config.batch_size,
        strategy=config.augment,
        generator=generator(config.seed + expert, "epoch", epoch),
        sharpness=config,
        compute=config,
    )


def _read_unfinished(path: Path, theta: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The epochs that an earlier run saved of an expert of which `theta` are parameters."""
    tensors, header = read_tensors(path, "unfinished")
    losses, accuracies = header.get("losses"), header.get("accuracies")
    if not isinstance(losses, list) or not isinstance(accuracies, list) or len(accuracies) != len(losses) + 1:
        raise UserError(
            f"{path} does not hold the losses and accuracies of epochs; delete it to train the expert anew."
        )
    wanted = {"snapshots": (len(accuracies), len(theta)), "momentum": (len(theta),)}
    if "snapshots" not in tensors or any(
        tensor.dtype != theta.dtype or tuple(tensor.shape) != wanted.get(name) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} does not hold the parameters of {len(accuracies)} epochs; delete it to begin anew.")
    return tensors, header


def _train_expert(
    config: BufferConfig,
    expert: int,
    network: Network,
    parts: tuple[Images, ...],
    preprocessing: Preprocessing,
    ease: Tensor | None,
    out: Path,
    buffer: str,
    ranks: Ranks,
) -> None:
    """Train one expert, from the epoch that an earlier run saved if there is one, and write its trajectory."""
    train, validation, test = parts
    seed = config.seed + expert
    theta = network.init(generator(seed, "init")).to(train.labels.device)
    snapshots = [theta.clone()]  # cloned: the vector itself goes on changing
    optimizer = expert_optimizer(config, theta)
    losses, accuracies = [], [accuracy(network, theta, validation, preprocessing)]
    path = expert_path(out, expert)
    unfinished = path.with_name(f".{path.stem}.unfinished.safetensors")
    if unfinished.exists():
        tensors, header = _read_unfinished(unfinished, theta)
        if header.get("buffer") == buffer:
            snapshots = list(tensors["snapshots"].to(theta.device))
            losses, accuracies = header["losses"], header["accuracies"]
            with torch.no_grad():
                theta.copy_(snapshots[-1])
            if "momentum" in tensors:
                optimizer.state[theta]["momentum_buffer"] = tensors["momentum"].to(theta.device)
    progress = ranks.progress(
        total=config.epochs, initial=len(losses), desc=f"expert {expert + 1}/{config.experts}", unit="epoch"
    )
    saved = time.monotonic()
    for epoch in range(len(losses) + 1, config.epochs + 1):
        loss = expert_epoch(config, expert, epoch, network, theta, optimizer, train, preprocessing, ease)
        found = accuracy(network, theta, validation, preprocessing)
        if not loss < math.inf or math.isnan(found) or not bool(theta.isfinite().all()):
            raise Diverged(f"expert {expert} diverged in epoch {epoch} (loss {loss}); lower --learning-rate.")
        snapshots.append(theta.detach().clone())
        losses.append(loss)
        accuracies.append(found)
        progress.update()
        progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracies[-1]:.1%}")
        if epoch < config.epochs and (ranks.asked or time.monotonic() - saved > UNFINISHED_SECONDS):
            momentum = optimizer.state[theta].get("momentum_buffer")
            tensors = {"snapshots": torch.stack(snapshots)} | ({} if momentum is None else {"momentum": momentum})
            header = {"buffer": buffer, "losses": losses, "accuracies": accuracies}
            write_tensors(unfinished, tensors, "unfinished", header)
            saved = time.monotonic()
            if ranks.asked:
                raise Interrupted(f"stopped after epoch {epoch} of expert {expert}, which is saved", ranks.asked)
    progress.close()
    record = {
        "buffer": buffer,
        "seed": seed,
        "train_loss": losses,
        "validation_accuracy": accuracies,
        "test_accuracy": accuracy(network, theta, test, preprocessing),
    }
    write_trajectory(path, network, snapshots, record)
    unfinished.unlink(missing_ok=True)
    if ranks.asked:
        raise Interrupted(f"stopped after expert {expert}, which is saved", ranks.asked)
