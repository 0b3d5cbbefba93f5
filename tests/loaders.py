"""What cddlib reads, for tests of damage and malice: of every kind of file a small valid one, and its reader."""

import contextlib
import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cddlib
from cddlib.data import dataset as data
from cddlib.data.preprocessing import Normalisation
from cddlib.distillation.checkpoint import CHECKPOINT, State
from cddlib.exchange import published
from cddlib.experts.buffer import PREPROCESSING, Buffer, expert_path, read_preprocessing, write_trajectory
from cddlib.experts.train import ExpertTraining
from cddlib.experts.train import read_unfinished as read_growth
from cddlib.networks.zoo import build_network
from cddlib.runtime.config import as_dict
from cddlib.runtime.files import read_json, signature, tensor_digest, write_json, write_tensors
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import Metrics, parse_metrics
from cddlib.synthetic import SyntheticSet

RECIPE = cddlib.buffer_recipe("digits", depth=1, width=2, experts=1, epochs=2)
REMEDIED = cddlib.distill_recipe("contra", "digits", 1, ema=0.99, momentum_images=0.5, consolidation="ewc")
NETWORK = build_network(RECIPE.network, (1, 8, 8), 10)
NORMALISATION = Normalisation(torch.tensor([0.5]), torch.tensor([0.25]))


def bits(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: signature(tensor) for name, tensor in tensors.items()}


def write_experts(folder: Path, experts: list[list[Tensor]], record: dict[str, Any]) -> Buffer:
    """A buffer of these trajectories of `NETWORK`, which has 366 parameters; its preprocessing is missing."""
    for expert, snapshots in enumerate(experts):
        write_trajectory(expert_path(folder, expert), NETWORK, snapshots, record)
    config = cddlib.replace(RECIPE, experts=len(experts), epochs=len(experts[0]) - 1)
    digits = {"name": "digits", "fingerprint": "0" * 16, "shape": [1, 8, 8], "classes": 10}
    write_json(folder / "buffer.json", {"config": as_dict(config), "data": digits, "experts": [record] * len(experts)})
    return Buffer(folder)


def write_buffer(folder: Path, key: int) -> None:
    """A buffer of one expert."""
    trajectory = [NETWORK.init(generator("fuzz", key, epoch)) for epoch in range(3)]
    record = {"buffer": "0123456789ab", "seed": key, "train_loss": [1.0, 0.5], "validation_accuracy": [0.1, 0.5, 0.6]}
    write_experts(folder, [trajectory], record)
    tensors = {**NORMALISATION.tensors(), "std": torch.tensor([0.25 + key])}
    write_tensors(folder / PREPROCESSING, tensors, "preprocessing")


def read_expert(path: Path) -> list[str]:
    buffer = Buffer(path.parent)
    return [tensor_digest(buffer.parameters(0, epoch)) for epoch in range(3)]


def small_set(key: int, **changes: Any) -> SyntheticSet:
    """Two images for each of three classes, unless `changes` say otherwise."""
    rng = generator("fuzz", key)
    usual = SyntheticSet(
        images=torch.randn(6, 1, 2, 3, generator=rng),
        labels=torch.arange(3).repeat_interleave(2),
        label_logits=torch.randn(6, 3, generator=rng),
        step_size=torch.tensor(0.125),
        preprocessing=NORMALISATION,
        classes=("a", "β", "c"),
        subsets=2,
    )
    return dataclasses.replace(usual, **changes)


def described(synthetic: SyntheticSet) -> Any:
    tensors = {**synthetic.variable_tensors(), "labels": synthetic.labels, **synthetic.preprocessing.tensors()}
    return bits(tensors), synthetic.classes, synthetic.subsets


def write_checkpoint(folder: Path, key: int) -> None:
    state = State(REMEDIED, small_set(0))
    state.optimizer.step([torch.ones_like(variable) for variable in state.synthetic.variables()], torch.arange(6), 1)
    state.progress.iteration = 1
    state.consider(state.optimizer.candidates()[-1], 0.5 + key / 4)
    state.save(folder)


def read_checkpoint(path: Path) -> Any:
    state = State(REMEDIED, small_set(0))
    state.read(path)
    best = state.best and described(state.best)
    return bits(state.optimizer.tensors), described(state.synthetic), best, dataclasses.astuple(state.progress)


def write_unfinished(folder: Path, key: int) -> None:
    tensors = {"snapshots": torch.full((3, 5), float(key)), "momentum": torch.zeros(5)}
    header = {"buffer": "0", "losses": [1.0, 0.5], "accuracies": [0.1, 0.2, 0.3]}
    write_tensors(folder / "unfinished.safetensors", tensors, "unfinished", header)


def read_unfinished(path: Path) -> Any:
    theta = torch.zeros(5)
    optimizer = torch.optim.SGD([theta])
    snapshots, losses, accuracies = read_growth(path, "0", theta, optimizer)
    assert len(snapshots) == len(losses) + 1 and (not accuracies or len(accuracies) == len(snapshots))
    return theta.tolist(), losses, optimizer.state[theta].keys()


def write_difficulty(folder: Path, key: int) -> None:
    write_tensors(folder / "difficulty.safetensors", {"el2n": torch.arange(6.0) * (-1) ** key}, "difficulty")


def read_difficulty(path: Path) -> list[int]:
    train, alone = types.SimpleNamespace(labels=torch.arange(6) % 2), types.SimpleNamespace(first=True, wait=int)
    training = types.SimpleNamespace(folder=path.parent, config=None, train=train, ranks=alone)
    return ExpertTraining._difficulty_rank(training).tolist()  # type: ignore[arg-type]


def write_cache(folder: Path, key: int) -> None:
    rng = generator("fuzz", key)
    parts = [data.Images(torch.randint(256, (n, 3, 2, 2), generator=rng).byte(), torch.arange(n) % 2) for n in (4, 2)]
    named = zip(("train", "test"), parts, strict=True)
    tensors = {
        f"{name}_{what}": value for name, x in named for what, value in (("images", x.store), ("labels", x.labels))
    }
    header = {"classes": ["a", "b"], "fingerprint": data.fingerprint(*parts)}
    write_tensors(folder / "cifar10.safetensors", tensors, "dataset", header, digests=False)


def read_cache(path: Path) -> Any:
    found = data.load("cifar10", path.parent)
    return found.fingerprint, found.classes, found.shape


def write_metrics(folder: Path, key: int) -> None:
    """Four lines, and beside them the digest that their reader knows."""
    with contextlib.closing(Metrics(folder / "metrics.jsonl", resume_at=-1)) as metrics:
        for iteration in range(4):
            metrics.write({"iteration": iteration, "loss": 0.5 * iteration + key, "matched": [[0, 1], [0, 3]]})
        (folder / "digest").write_text(metrics.sync())


def write_published(folder: Path, key: int) -> None:
    rng = generator("fuzz", key)
    torch.save(torch.randn(10, 1, 8, 8, generator=rng), folder / "images_best.pt")
    torch.save(torch.randn(10, 10, generator=generator("fuzz")), folder / "labels_best.pt")
    epochs = [[torch.randn(shape, generator=rng) for shape in NETWORK.shapes.values()] for _ in range(2)]
    torch.save([epochs], folder / "replay_buffer_0.pt")


def read_published(path: Path) -> Any:
    labels = path.with_name("labels_best.pt")
    return described(published.import_set(path, labels, data.DataConfig(data="digits"), step_size=0.5))


def read_replay_buffer(path: Path) -> Any:
    return [[signature(theta) for theta in snapshots] for _, _, snapshots in published._read_experts([path], NETWORK)]


class Loader(NamedTuple):
    """What is read, how it is written, and what reads it."""

    file: str
    write: Callable[[Path, int], object]
    """Fills a folder; different numbers give different contents."""
    read: Callable[[Path], Any]


LOADERS = {
    "JSON file": Loader(
        "a.json",
        lambda folder, key: write_json(folder / "a.json", {"α": [1, 2.5, None, True, {"b": -1e-9}], "key": key}),
        lambda path: json.dumps(read_json(path)),
    ),
    "buffer.json": Loader("buffer.json", write_buffer, lambda path: Buffer(path.parent).id),
    "preprocessing": Loader(
        PREPROCESSING, write_buffer, lambda path: bits(read_preprocessing(path.parent, (1, 8, 8)).tensors())
    ),
    "expert": Loader("expert-000.safetensors", write_buffer, read_expert),
    "unfinished expert": Loader("unfinished.safetensors", write_unfinished, read_unfinished),
    "difficulty": Loader("difficulty.safetensors", write_difficulty, read_difficulty),
    "synthetic set": Loader(
        "synthetic.safetensors",
        lambda folder, key: small_set(key).save(folder / "synthetic.safetensors"),
        lambda path: described(SyntheticSet.load(path)),
    ),
    "checkpoint": Loader(CHECKPOINT, write_checkpoint, read_checkpoint),
    "data set": Loader("cifar10.safetensors", write_cache, read_cache),
    "metrics": Loader(
        "metrics.jsonl",
        write_metrics,
        lambda path: json.dumps(parse_metrics(path, path.with_name("digest").read_text())),
    ),
    "published set (.pt)": Loader("images_best.pt", write_published, read_published),
    "replay buffer (.pt)": Loader("replay_buffer_0.pt", write_published, read_replay_buffer),
}


def written(loader: Loader, folder: Path) -> tuple[Path, Path]:
    """A valid file, and another one of its kind."""
    for key, name in enumerate("ab"):
        (folder / name).mkdir()
        loader.write(folder / name, key)
    return folder / "a" / loader.file, folder / "b" / loader.file


TENSORS = ("preprocessing", "expert", "unfinished expert", "difficulty", "synthetic set", "checkpoint", "data set")
"""Those that are safetensors."""
