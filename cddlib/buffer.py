"""Buffering: train experts on real data and keep their parameters after every epoch.

On the command line::

    cddlib buffer --data digits --out runs/buffer
    cddlib buffer --data cifar10 --root DIR --out runs/cifar10                                # as MTT
    cddlib buffer --method datm --data cifar10 --ipc 50 --root DIR --out runs/cifar10-datm    # as DATM

An expert is durable once it is finished; a run that was interrupted trains the missing ones and ends with the same
bytes as one that was not. Experts differ only by their seed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.augment import AugmentConfig
from cddlib.curriculum import CurriculumConfig, difficulty, rank_in_class, select
from cddlib.data import DataConfig, Images, load
from cddlib.networks import Network, NetworkConfig, build_network
from cddlib.preprocessing import Preprocessing, fit_preprocessing
from cddlib.runs import (
    Recorder,
    UserError,
    as_dict,
    config_hash,
    file_digest,
    from_dict,
    generator,
    open_tensors,
    read_json,
    refuse_other_run,
    resolve_device,
    write_json,
    write_tensors,
)
from cddlib.training import SharpnessConfig, accuracy, fetch_real, train_epoch
from cddlib.trajectory import (
    DIFFICULTY,
    PREPROCESSING,
    Buffer,
    expert_path,
    read_expert_record,
    read_preprocessing,
    write_trajectory,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferConfig(CurriculumConfig, SharpnessConfig, DataConfig, NetworkConfig, AugmentConfig):
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
        for base in BufferConfig.__mro__[1:-1]:
            base.__post_init__(self)  # type: ignore[attr-defined]
        for name in ("experts", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate is {self.learning_rate}; it must be positive.")
        for name, limit in (("momentum", 1.0), ("weight_decay", float("inf"))):
            if not 0 <= getattr(self, name) < limit:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more and below {limit}.")


def train_buffer(config: BufferConfig, out: Path, *, root: Path | None = None, device: str = "auto") -> Buffer:
    """Train the experts that `out` lacks, then open it.

    Args:
        config: what to train.
        out: the buffer's folder. It may hold some experts of the same configuration already.
        root: folder of the data sets, see `cddlib.data.default_root`.
        device: `auto`, `cpu`, `cuda`, `cuda:1` …

    Raises:
        UserError: `out` holds another buffer, the data set or the device is missing, or an expert diverges.
    """
    dev = resolve_device(device)
    dataset = load(config.data, root)
    network = build_network(from_dict(NetworkConfig, as_dict(config)), dataset.shape, len(dataset.classes))
    data = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.shape),
        "classes": len(dataset.classes),
    }
    manifest: dict[str, Any] = {"config": as_dict(config), "data": data, "experts": []}
    identity = config_hash(_identity(manifest))
    if (out / "buffer.json").exists():
        manifest = _resume(out, manifest)
        if len(manifest["experts"]) == manifest["config"]["experts"] and (out / "result.json").exists():
            return Buffer(out)

    recorder = Recorder(dev)
    (out / "result.json").unlink(missing_ok=True)  # of the smaller buffer that grows
    write_json(out / "buffer.json", manifest)
    if not (out / PREPROCESSING).exists():
        write_tensors(out / PREPROCESSING, fit_preprocessing(dataset, zca=config.zca).tensors(), {})
    preprocessing = read_preprocessing(out).to(dev)
    train, validation = dataset.split
    parts = (train if config.holdout else dataset.train, validation, dataset.test)
    on_device = tuple(part.to(dev) for part in parts)
    ranks = _ranks(config, out, network, on_device[0], preprocessing)
    trained = 0
    for expert in range(len(manifest["experts"]), manifest["config"]["experts"]):
        path = expert_path(out, expert)
        if not path.exists() or read_expert_record(path)["buffer"] != identity:
            _train_expert(config, expert, network, on_device, preprocessing, ranks, path, identity)
            trained += 1
        manifest["experts"].append({"file": path.name, "sha256": file_digest(path), **read_expert_record(path)})
        write_json(out / "buffer.json", manifest)
    write_json(out / "result.json", {"experts_trained": trained, **recorder.report()})
    return Buffer(out)


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes a buffer another buffer: everything but the number of its experts."""
    return {**{key: value for key, value in manifest["config"].items() if key != "experts"}, "data": manifest["data"]}


def _resume(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the buffer in `out`, grown to the experts of `wanted`; refuse another buffer."""
    manifest = read_json(out / "buffer.json")
    try:
        refuse_other_run(out, _identity(manifest), _identity(wanted))
        manifest["config"]["experts"] = max(wanted["config"]["experts"], manifest["config"]["experts"])
        len(manifest["experts"])
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{out / 'buffer.json'} is not a buffer's description ({error!r}).") from None
    return manifest


def _ranks(
    config: BufferConfig, out: Path, network: Network, train: Images, preprocessing: Preprocessing
) -> Tensor | None:
    """How easy each training image is within its class, if the curriculum asks; computed once and kept in `out`."""
    if not config.ranks_images:
        return None
    if not (out / DIFFICULTY).exists():
        scores = difficulty(
            network,
            train,
            preprocessing,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            strategy=config.augment,
        )
        write_tensors(out / DIFFICULTY, {"el2n": scores}, {})
    return rank_in_class(open_tensors(out / DIFFICULTY).get_tensor("el2n").to(train.labels.device), train.labels)


def _train_expert(
    config: BufferConfig,
    expert: int,
    network: Network,
    parts: tuple[Images, ...],
    preprocessing: Preprocessing,
    ranks: Tensor | None,
    path: Path,
    buffer: str,
) -> None:
    """Train one expert and write its trajectory."""
    train, validation, test = parts
    seed = config.seed + expert
    theta = network.init(generator(seed, "init")).to(train.labels.device)
    snapshots = [theta.clone()]  # cloned: the vector itself goes on changing
    optimizer = torch.optim.SGD(
        [theta.requires_grad_()],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    losses, accuracies = [], [accuracy(network, theta, validation, preprocessing)]
    progress = tqdm(range(1, config.epochs + 1), desc=f"expert {expert + 1}/{config.experts}", unit="epoch")
    for epoch in progress:
        seen = train if ranks is None else train.select(select(config, ranks, epoch - 1))
        loss = train_epoch(
            network,
            theta,
            optimizer,
            fetch_real(seen, preprocessing),
            len(seen.labels),
            batch_size=config.batch_size,
            strategy=config.augment,
            generator=generator(seed, "epoch", epoch),
            sharpness=config,
        )
        if not loss < float("inf") or not bool(theta.isfinite().all()):
            raise UserError(f"expert {expert} diverged in epoch {epoch} (loss {loss}); lower --learning-rate.")
        snapshots.append(theta.detach().clone())
        losses.append(loss)
        accuracies.append(accuracy(network, theta, validation, preprocessing))
        progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracies[-1]:.1%}")
    record = {
        "buffer": buffer,
        "seed": seed,
        "train_loss": losses,
        "validation_accuracy": accuracies,
        "test_accuracy": accuracy(network, theta, test, preprocessing),
    }
    write_trajectory(path, network, snapshots, record)
