"""Evaluation: networks trained from scratch on a synthetic set, tested on real images they never saw.

On the command line::

    cddlib evaluate runs/contra --runs 3

Networks learn by the published protocol (`cddlib.protocol`), at the learned step size. Beside it, by the same
protocol, random real images of the same number, and all training images for about as many steps; these two train at
the reference codes' 0.01, because they have no learned step size.

A network of another architecture than the synthetic set was distilled with is trained in the same way and at the
same rates, as MTT, FTD and ATT do.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig, Images, load
from cddlib.networks.convnet import Network, NetworkConfig
from cddlib.networks.zoo import build_network
from cddlib.protocol import EvaluateConfig, fetch_synthetic, train_network
from cddlib.runtime.config import as_dict, config_hash, from_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, as_user_error, out_of_memory_hint, require
from cddlib.runtime.files import file_digest, read_json, write_json
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import at_work
from cddlib.synthetic import SyntheticSet, random_real
from cddlib.training.epoch import correct, fetch_real
from cddlib.training.step import ComputeConfig

REAL_LEARNING_RATE = 0.01
SETS = {"synthetic": "synthetic set", "random_real": "random real images", "full": "all training images"}
"""What networks are trained on, in words; the random real images are as many as the synthetic ones."""


def correct_of_set(
    synthetic: SyntheticSet,
    network: Network,
    config: EvaluateConfig,
    strategy: str,
    compute: ComputeConfig,
    real: Images,
    *,
    purpose: str,
    seed: int,
) -> Float[Tensor, " n"]:
    """Which images of `real` one network trained on `synthetic` classifies correctly: 1, else 0; nan if it diverges.

    A set in subsets is learned as SeqMatch does: the first subset, then the first two, and so on, each stage with all
    its epochs.
    """
    how, targets, theta = (config, strategy, compute, float(synthetic.step_size)), synthetic.targets(), None
    which: dict[str, Any] = {"purpose": purpose, "seed": seed, "device": targets.device}
    for number in range(synthetic.subsets):
        rows = synthetic.learned(number)
        fetch = fetch_synthetic(synthetic.images[rows], targets[rows])
        theta = train_network(network, fetch, len(rows), *how, **which, begun=theta)
    assert theta is not None  # there is at least one subset
    return correct(network, theta, real, synthetic.preprocessing)


def real_epochs(config: EvaluateConfig, learned: list[int], real: int) -> int:
    """Whole epochs on `real` images for about as many steps as stages take in which so many images are `learned`."""
    batch = config.evaluation_batch
    steps = config.evaluation_epochs * sum(math.ceil(stage / batch) for stage in learned)
    return max(1, round(steps / math.ceil(real / batch)))


def summarise(accuracies: list[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (none for one run) and number of runs."""
    std = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"mean": statistics.fmean(accuracies), "std": std, "runs": len(accuracies)}


@out_of_memory_hint("the distillation's --evaluation-batch")
def evaluate_run(
    run: Path,
    *,
    runs: int = 5,
    baselines: bool = True,
    root: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    network: NetworkConfig | None = None,
) -> dict[str, Any]:
    """Test the synthetic set of a distillation run, and write `evaluation-<hash>.json` beside it.

    Every finished network is recorded at once: an interrupted evaluation goes on, and asking for more runs adds to
    the ones already there. Each `network` has a record of its own. Where torch.distributed is initialised, as the
    command line does under torchrun, every process calls this with the same arguments and trains its share.

    Args:
        run: folder of the distillation run.
        runs: number of networks R.
        baselines: also train on random real images and on all training images.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …
        seed: network i of a set has seed + i.
        network: which network is trained; by default the one that the set was distilled with.

    Raises:
        UserError: `run` holds no finished distillation, a file in it is damaged, another process is at the same
            evaluation, the data set is missing or another version of it, memory runs out, or the network does not fit
            its images.
        Interrupted: a signal asked to stop; the network that was being trained is finished, and recorded.

    Returns:
        The record: accuracies on the test images under `synthetic`, `random_real` and `full`, also `by_class`, their
        summary, the learning rates, and the network. A network that diverges counts as 0, and is named under
        `diverged`.
    """
    require(1, runs=runs)
    trainer = Trainer(run, network, root=root, device=device)
    identity = {
        "synthetic_sha256": file_digest(run / "synthetic.safetensors"),
        "seed": seed,
        "evaluation": as_dict(trainer.config) | as_dict(trainer.compute),
    }
    described = {**identity, "network": as_dict(trainer.network_config)}
    path = run / f"evaluation-{config_hash(identity if trainer.has_own_network else described)}.json"
    wanted = [(name, number) for name in (SETS if baselines else ["synthetic"]) for number in range(runs)]
    if _resume(path, wanted)[1]:
        with at_work(path.with_name(f".{path.stem}.lock"), "the network") as ranks:
            _train_missing(path, wanted, trainer, described, ranks)
    return read_json(path)


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """The records of `evaluate_run` in a run's folder, not of earlier sets; raises `UserError` if one is damaged."""
    found = {path: read_json(path) for path in sorted(run.glob("evaluation-*.json"))}
    tested = file_digest(run / "synthetic.safetensors") if found else ""
    return [record for record in found.values() if record.get("synthetic_sha256") == tested]


@dataclasses.dataclass(frozen=True)
class _Record:
    """What an evaluation goes on from: accuracies by the set that the networks were trained on, seconds, failures."""

    synthetic: tuple[float, ...] = ()
    random_real: tuple[float, ...] = ()
    full: tuple[float, ...] = ()
    seconds: float = 0.0
    diverged: tuple[str, ...] = ()
    by_class: dict = dataclasses.field(default_factory=dict)


def _resume(path: Path, wanted: list[tuple[str, int]]) -> tuple[_Record, list[tuple[str, int]]]:
    """What the record says so far, and the networks, each of a set and with a number, that it lacks."""
    record = _Record()
    if path.exists():
        values = read_json(path)
        with as_user_error(path, "a record of an evaluation"):
            record = from_dict(_Record, {"diverged": [], **values, **values["accuracies"]})
            record.by_class.update({name: [*rows] for name, rows in record.by_class.items()})
    return record, [(name, number) for name, number in wanted if number >= len(getattr(record, name))]


def _train_missing(
    path: Path, wanted: list[tuple[str, int]], trainer: "Trainer", described: dict[str, Any], ranks: Ranks
) -> None:
    """Train the networks that the record lacks, one on each rank at a time, and write it after every turn."""
    earlier, missing = _resume(path, wanted)
    accuracies, diverged = {name: list(getattr(earlier, name)) for name in SETS}, list(earlier.diverged)
    by_class: dict[str, list[list[float]]] = {name: earlier.by_class.get(name, []) for name in SETS}
    labels, classes = trainer.dataset.test.labels, trainer.dataset.classes
    recorder = Recorder(trainer.device, elapsed=earlier.seconds)
    ranks.agree(len(missing), f"the number of networks that {path} lacks")  # the first rank writes only now
    with ranks.progress(total=len(missing), desc="evaluating", unit="network") as bar:
        for start in range(0, len(missing), ranks.count):
            turn = missing[start : start + ranks.count]
            measured = torch.zeros(len(turn), len(labels), dtype=torch.float64)
            for name, number in turn[ranks.rank : ranks.rank + 1]:
                measured[ranks.rank] = trainer.correct(name, described["seed"] + number)
            ranks.sum(measured)
            for (name, number), right in zip(turn, measured, strict=True):
                accuracies[name].append(right.mean().nan_to_num().item())
                fractions = [right[labels == label].mean() for label in range(len(classes))]
                by_class[name].append(torch.stack(fractions).nan_to_num().tolist())
                if bool(right.isnan().any()):
                    what = f"network {number} trained on {name} at learning rate {trainer.learning_rates[name]:g}"
                    diverged.append(f"{what} diverged: it counts as 0.")
            if ranks.first:
                record = {
                    **described,
                    "learning_rates": trainer.learning_rates,
                    "summary": {name: summarise(values) for name, values in accuracies.items() if values},
                    "accuracies": accuracies,
                    "by_class": by_class,
                    "classes": classes,
                    **({"diverged": diverged} if diverged else {}),
                    **recorder.report(),
                }
                write_json(path, record)
            bar.update(len(turn))
            left = len(missing) - start - len(turn)
            if ranks.stopping and left:
                ranks.stop(f"stopped; {left} of {len(wanted)} networks are left, the others saved")
    ranks.wait()


class Trainer:
    """Trains one network on a run's synthetic set or on a baseline, and tests it."""

    def __init__(self, run: Path, network: NetworkConfig | None, *, root: Path | None, device: str) -> None:
        """Open the run in the folder `run`; `network` and the errors as in `evaluate_run`."""
        path = run / "synthetic.safetensors"
        if not path.exists():
            if (run / "config.json").exists():
                raise UserError(
                    f"the distillation in {run} is not finished; its `cddlib distill` command goes on with it."
                )
            raise UserError(f"{run} holds no finished distillation: {path.name} is missing.")
        self.device = resolve_device(device)
        settings = read_json(run / "config.json")
        self.synthetic = SyntheticSet.load(path).to(self.device)
        with as_user_error(run / "config.json", "a distillation's configuration"):
            own, self.config = from_dict(NetworkConfig, settings), from_dict(EvaluateConfig, settings)
            self.strategy, self.compute = from_dict(AugmentConfig, settings).augment, from_dict(ComputeConfig, settings)
            data, fingerprint = from_dict(DataConfig, settings).data, settings["data_fingerprint"]
        self.dataset = load(data, root)
        self.test = self.dataset.test.to(self.device)
        if fingerprint != self.dataset.fingerprint:
            raise UserError(f"{run} was distilled from another version of {self.dataset.name} than the one in --root.")
        shape = tuple(self.synthetic.images.shape[1:])
        if (self.synthetic.classes, shape) != (self.dataset.classes, self.dataset.shape):
            raise UserError(f"{path} has other classes, or images of another shape, than {self.dataset.name}.")
        self.network_config, self.has_own_network = network or own, network in (None, own)
        self.network = build_network(self.network_config, self.dataset.shape, len(self.dataset.classes))
        self.learning_rates = dict.fromkeys(SETS, REAL_LEARNING_RATE) | {"synthetic": float(self.synthetic.step_size)}

    def correct(self, name: str, seed: int) -> Float[Tensor, " n"]:
        """Which test images one network trained on the set called `name` classifies correctly; nan if it diverges."""
        test, preprocessing = self.test, self.synthetic.preprocessing
        if name == "synthetic":
            how = (self.config, self.strategy, self.compute)
            return correct_of_set(self.synthetic, self.network, *how, test, purpose="evaluation", seed=seed)
        train, config = self.dataset.train, self.config
        if name == "random_real":
            rng = generator(seed, "random real")
            train = random_real(self.dataset.split[0], len(self.dataset.classes), self.synthetic.ipc, rng)
        else:
            learned = [len(self.synthetic.learned(number)) for number in range(self.synthetic.subsets)]
            config = dataclasses.replace(config, evaluation_epochs=real_epochs(config, learned, len(train.labels)))
        fetch, how = fetch_real(train.to(self.device), preprocessing), (config, self.strategy, self.compute)
        which: dict[str, Any] = {"purpose": "evaluation", "seed": seed, "device": self.device}
        theta = train_network(self.network, fetch, len(train.labels), *how, self.learning_rates[name], **which)
        return correct(self.network, theta, test, preprocessing)
