"""Verification: recompute a sample of a run from what it kept, and compare it with what it wrote down.

On the command line::

    cddlib verify runs/buffer
    cddlib verify runs/contra --buffer runs/buffer

Every file's checksums are checked first. Then a buffer trains one epoch of some experts again, from the parameters
before it; a distillation computes some iterations again, from each milestone that it kept, and trains a validation
network and an evaluation network again. On the same machine, with as many threads and processes, every number is the
same; on another, rounding differs, and so do later digits.
"""

import collections
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from cddlib.data.dataset import load
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.distillation.checkpoint import CHECKPOINT, State, milestone_path, milestones
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import iterate, validation_accuracy
from cddlib.evaluate import Trainer, evaluations_of
from cddlib.experts.buffer import Buffer, expert_path
from cddlib.experts.config import BufferConfig
from cddlib.experts.train import ExpertTraining
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.config import from_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, as_user_error, require
from cddlib.runtime.files import file_digest, read_json, read_tensors
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import read_metrics
from cddlib.synthetic import SyntheticSet, initialise

TOLERANCE = 0.02
"""Largest relative difference that rounding explains between machines; see the book's page on reliability."""
ACCURACY = 0.05
"""The same for a network's accuracy after a whole training, as a fraction of the images."""

Pairs = dict[str, list[tuple[Any, Any]]]
"""Numbers or vectors found now, each with what was written, by what they are; (0, 0) for a checksum that is right."""


class Check(NamedTuple):
    """Something that was computed again."""

    what: str
    numbers: int
    """How many numbers were compared."""
    difference: float
    """The largest relative difference; for accuracies the largest difference. 0 means every number is the same."""
    tolerance: float
    """The largest difference that is accepted."""

    @property
    def passed(self) -> bool:
        """Whether what was written down can be believed."""
        return self.difference <= self.tolerance


def verify(
    folder: Path,
    buffer: Path | None = None,
    *,
    sample: int = 2,
    tolerance: float = TOLERANCE,
    root: Path | None = None,
    device: str = "auto",
) -> list[Check]:
    """Recompute a sample of a buffer or of a distillation.

    Args:
        folder: a finished buffer or distillation.
        buffer: the buffer that the distillation matched.
        sample: experts of a buffer, and iterations after each milestone of a distillation, that are computed again.
        tolerance: largest relative difference that is accepted.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        UserError: a file is damaged or missing, or the data set or the buffer is another one.
    """
    require(1, sample=sample)
    require(0, below=math.inf, tolerance=tolerance)
    if (folder / "buffer.json").exists():
        found = _recompute_buffer(Buffer(folder), sample, root, resolve_device(device))
    elif (folder / "config.json").exists() and read_json(folder / "config.json").get("imported"):
        raise UserError(f"{folder} was imported from files of another program; nothing in it can be recomputed.")
    elif buffer is None:
        raise UserError(f"{folder} holds no buffer; to verify a distillation, give its experts with --buffer.")
    else:
        found = _recompute_distillation(folder, Buffer(buffer), sample, root, device)
    checks = [_compare(what, pairs, tolerance) for what, pairs in found.items()]
    return [check for check in checks if check.numbers]


def _recompute_buffer(buffer: Buffer, sample: int, root: Path | None, device: torch.device) -> Pairs:
    for expert, known in enumerate(tqdm(buffer.experts, desc="checksums", unit="expert")):
        path = expert_path(buffer.folder, expert)
        if file_digest(path) != known["sha256"]:
            raise UserError(f"{path} is damaged: it does not have the SHA-256 that buffer.json names.")
    read_json(buffer.folder / "result.json")
    dataset = load(buffer.data["name"], root)
    buffer.check_data(dataset)
    config = from_dict(BufferConfig, buffer.config)
    fitted, images = fit_preprocessing(dataset, zca=config.data.zca), dataset.test.take(slice(100))
    found: Pairs = collections.defaultdict(list)
    found["checksums of the experts"] = [(0, 0)] * len(buffer.experts)
    found["preprocessing"] = [(fitted(images), buffer.preprocessing(images))]
    if buffer.config.get("imported"):
        return found
    training = ExpertTraining(config, dataset, buffer.folder, device)
    rng = generator("verify", buffer.id)
    for expert in tqdm(torch.randperm(len(buffer.experts), generator=rng)[:sample].tolist(), desc="training an epoch"):
        # with momentum, only the first epoch depends on nothing but the parameters before it
        epoch = 1 + int(torch.randint(1 if config.momentum else config.epochs, (), generator=rng))
        before, known = buffer.parameters(expert, epoch - 1), buffer.experts[expert]
        theta = before.clone().to(device)
        loss = training.epoch(expert, epoch, theta, training.optimizer(theta))
        theta = theta.detach()
        accuracy = training.accuracy(theta, training.validation)
        found["steps of an epoch"].append((theta.cpu() - before, buffer.parameters(expert, epoch) - before))
        found["training losses"].append((loss, known["train_loss"][epoch - 1]))
        found["validation accuracies of experts"].append((accuracy, known["validation_accuracy"][epoch]))
    return found


def _recompute_distillation(run: Path, buffer: Buffer, sample: int, root: Path | None, device: str) -> Pairs:
    settings = read_json(run / "config.json")
    trainer = Trainer(run, None, root=root, device=device)
    with as_user_error(run / "config.json", "a distillation's configuration"):
        config = from_dict(DistillConfig, settings)
    if settings.get("buffer_id") != buffer.id:
        other = f"{buffer.folder} is {buffer.id}: another, or one that has grown since"
        raise UserError(f"{run} matched the buffer {settings.get('buffer_id')}, but {other}.")
    result, lines, kept = read_json(run / "result.json"), read_metrics(run), milestones(run)
    for path in [run / CHECKPOINT, *(milestone_path(run, iteration) for iteration in kept)]:
        read_tensors(path, "state")
    buffer, subsets = Buffer(buffer.folder, convex=True) if config.schedule.convex else buffer, config.schedule.subsets
    initial = initialise(config.synthetic, trainer.dataset, buffer, config.seed, trainer.device, subsets)
    found: Pairs = {"checksums of files and lines of metrics": [(0, 0)] * (len(kept) + len(lines) + 4)}
    found |= _recompute_iterations(run, config, buffer, initial, lines, sample)
    accuracies = found["accuracies of networks trained on the set"] = []
    if result["validation_accuracy"] is not None:
        written = lines[result["selected_iteration"]]["validation_accuracy"][0]
        validation = trainer.dataset.split[1].to(trainer.device)
        accuracies.append((validation_accuracy(trainer.synthetic, config, buffer, validation, 0), written))
    for record in evaluations_of(run):
        tested = Trainer(run, from_dict(NetworkConfig, record["network"]), root=root, device=device)
        now = tested.correct("synthetic", record["seed"]).mean().nan_to_num().item()
        accuracies.append((now, record["accuracies"]["synthetic"][0]))
    if not (kept or accuracies):
        raise UserError(f"{run} kept no milestones and tested no set; nothing in it can be recomputed.")
    return found


def _recompute_iterations(
    run: Path, config: DistillConfig, buffer: Buffer, initial: SyntheticSet, lines: list[dict[str, Any]], sample: int
) -> Pairs:
    """The set before the first iteration, and the iterations that follow each milestone."""
    found: Pairs = collections.defaultdict(list)
    lengths: tuple[list[float], list[float]] = [], []
    for iteration in tqdm(milestones(run), desc="iterations from milestones"):
        state = State(config, initial.copy())
        state.read(milestone_path(run, iteration))
        if iteration == 0:
            written = state.synthetic.copy().variables()
            found["the set before the first iteration"] += zip(initial.copy().variables(), written, strict=True)
        for line in lines[iteration + 1 :][:sample]:
            again = iterate(state, config, buffer, Ranks())
            if again["matched"] != line["matched"]:
                raise UserError(f"{run} matched other segments in iteration {line['iteration']} than its seed draws.")
            found["losses"] += zip(again["losses"], line["losses"], strict=True)
            found["step sizes"].append((again["step_size"], line["step_size"]))
            for norms, record in zip(lengths, (again, line), strict=True):
                norms += record["gradient_norms"]
    # as one vector: where rounding turns a ReLU on, a single gradient can be some percent longer
    found["lengths of gradients"] = [lengths]
    return found


def _compare(what: str, pairs: list[tuple[Any, Any]], tolerance: float) -> Check:
    """The largest difference of a pair, relative to what was written, except for accuracies."""
    absolute = "accuracies" in what
    numbers, largest = 0, torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        found, written = (torch.as_tensor(value, dtype=torch.float64) for value in pair)
        size = 1.0 if absolute else written.norm().clamp(min=1e-12)
        largest = torch.maximum(largest, (found - written).norm() / size)  # nan, which passes no check, stays
        numbers += found.numel()
    return Check(what, numbers, float(largest), ACCURACY if absolute else tolerance)


def checks_table(checks: Sequence[Check]) -> str:
    """The checks, a line each."""
    lines = [f"{'recomputed':44} {'numbers':>9}  largest difference"]
    for check in checks:
        said = "none" if check.difference == 0 else f"{check.difference:.1e}"
        failed = "" if check.passed else f"  MORE THAN {check.tolerance:g}"
        lines.append(f"{check.what:44} {check.numbers:9,}  {said}{failed}")
    return "\n".join(lines)
