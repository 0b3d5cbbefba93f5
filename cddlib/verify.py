"""Verification: recompute a sample of a run from what it kept, and compare it with what it wrote down.

On the command line::

    cddlib verify runs/buffer
    cddlib verify runs/contra --buffer runs/buffer

Every file's checksums are checked first. Then a buffer trains one epoch of some experts again, from the parameters
before it; a distillation computes some iterations again, from each milestone that it kept, and trains a validation
network and an evaluation network again. On the same machine, with as many threads and processes, every number is the
same; on another, rounding differs, and so do later digits.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.data.dataset import load
from cddlib.data.preprocessing import fit_preprocessing
from cddlib.distillation.checkpoint import CHECKPOINT, State, milestone_path, milestones
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import initial_state, iterate, validation_accuracy
from cddlib.evaluate import Trainer
from cddlib.experts.buffer import Buffer, expert_path
from cddlib.experts.config import BufferConfig
from cddlib.experts.expert import ExpertTraining
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.config import from_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, as_user_error
from cddlib.runtime.files import file_digest, read_json, read_tensors
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import read_metrics
from cddlib.synthetic import SyntheticSet

TOLERANCE = 0.02
"""Largest relative difference that rounding explains between machines; see the book's page on reliability."""
ACCURACY = 0.05
"""The same for a network's accuracy after a whole training, as a fraction of the images."""

Pairs = list[tuple[float, float]]
"""Numbers found now, each with what was written."""


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
    if sample < 1:
        raise UserError(f"sample is {sample}; it must be at least 1.")
    if not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance is {tolerance}; it must be a finite number, 0 or more.")
    dev = resolve_device(device)
    if (folder / "buffer.json").exists():
        return _verify_buffer(Buffer(folder), sample, tolerance, root, dev)
    if buffer is None:
        raise UserError(f"{folder} holds no buffer; to verify a distillation, give its experts with --buffer.")
    return _verify_distillation(folder, Buffer(buffer), sample, tolerance, root, dev)


def _verify_buffer(
    buffer: Buffer, sample: int, tolerance: float, root: Path | None, device: torch.device
) -> list[Check]:
    for expert, known in enumerate(tqdm(buffer.experts, desc="checksums", unit="expert")):
        path = expert_path(buffer.folder, expert)
        if file_digest(path) != known["sha256"]:
            raise UserError(f"{path} is damaged: it does not have the SHA-256 that buffer.json names.")
    checks = [Check("checksums of the experts", len(buffer.experts), 0.0, 0.0)]
    dataset = load(buffer.data["name"], root)
    buffer.check_data(dataset)
    config = from_dict(BufferConfig, buffer.config)
    fitted = fit_preprocessing(dataset, zca=config.data.zca).tensors()
    pairs = [(fitted[name], tensor) for name, tensor in buffer.preprocessing.tensors().items()]
    checks.append(_tensors("preprocessing", pairs, tolerance))
    read_json(buffer.folder / "result.json")
    if buffer.config.get("imported"):
        return checks
    training = ExpertTraining(config, buffer.network, dataset, buffer.folder, device, Ranks())
    rng = generator("verify", buffer.id)
    vectors, losses, accuracies = [], [], []
    for expert in tqdm(torch.randperm(len(buffer.experts), generator=rng)[:sample].tolist(), desc="training an epoch"):
        # with momentum, only the first epoch depends on nothing but the parameters before it
        epoch = 1 + int(torch.randint(1 if config.momentum else config.epochs, (), generator=rng))
        before, written = buffer.parameters(expert, epoch - 1), buffer.parameters(expert, epoch)
        theta = before.clone().to(device)
        loss = training.epoch(expert, epoch, theta, training.optimizer(theta))
        losses.append((loss, buffer.experts[expert]["train_loss"][epoch - 1]))
        theta = theta.detach()
        vectors.append((theta.cpu() - before, written - before))
        again = training.accuracy(theta, training.validation)
        accuracies.append((again, buffer.experts[expert]["validation_accuracy"][epoch]))
    return [
        *checks,
        _tensors("steps of an epoch", vectors, tolerance),
        _numbers("training losses", losses, tolerance),
        _accuracies("validation accuracies of experts", accuracies),
    ]


def _verify_distillation(
    run: Path, buffer: Buffer, sample: int, tolerance: float, root: Path | None, device: torch.device
) -> list[Check]:
    settings = read_json(run / "config.json")
    if settings.get("imported"):
        raise UserError(f"{run} was imported from files of another program; it holds nothing that can be recomputed.")
    trainer = Trainer(run, None, root=root, device=str(device))
    with as_user_error(run / "config.json", "a distillation's configuration"):
        config = from_dict(DistillConfig, settings)
    if settings.get("buffer_id") != buffer.id:
        raise UserError(f"{run} matched the buffer {settings.get('buffer_id')}, but {buffer.folder} is {buffer.id}.")
    result = read_json(run / "result.json")
    lines = read_metrics(run)
    kept = milestones(run)
    for path in [run / CHECKPOINT, *(milestone_path(run, iteration) for iteration in kept)]:
        read_tensors(path, "state")
    checks = [Check("checksums of files and lines of metrics", len(kept) + len(lines) + 4, 0.0, 0.0)]
    buffer = buffer.convexified() if config.schedule.convex else buffer
    initial = initial_state(config, trainer.dataset, buffer, device).synthetic
    checks += _verify_iterations(run, config, buffer, initial, lines, sample, tolerance)
    accuracies: Pairs = []
    if result["validation_accuracy"] is not None:
        written = lines[result["selected_iteration"]]["validation_accuracy"][0]
        validation = trainer.dataset.split[1].to(device)
        accuracies.append((validation_accuracy(trainer.synthetic, config, buffer, validation, 0), written))
    for path in sorted(run.glob("evaluation-*.json")):
        record = read_json(path)
        tested = Trainer(run, from_dict(NetworkConfig, record["network"]), root=root, device=str(device))
        now = tested.accuracy("synthetic", record["seed"])
        accuracies.append((0.0 if math.isnan(now) else now, record["accuracies"]["synthetic"][0]))
    return [*checks, _accuracies("accuracies of networks trained on the set", accuracies)]


def _verify_iterations(
    run: Path,
    config: DistillConfig,
    buffer: Buffer,
    initial: SyntheticSet,
    lines: Sequence[dict[str, Any]],
    sample: int,
    tolerance: float,
) -> list[Check]:
    """The set before the first iteration, and the iterations that follow each milestone."""
    losses: Pairs = []
    lengths: Pairs = []
    step_sizes: Pairs = []
    starts: list[tuple[Tensor, Tensor]] = []
    for iteration in tqdm(milestones(run), desc="iterations from milestones"):
        state = State(config, initial.copy())
        state.read(milestone_path(run, iteration))
        if iteration == 0:
            starts = list(zip(initial.copy().variables(), state.synthetic.copy().variables(), strict=True))
        for line in lines[iteration + 1 :][:sample]:
            again = iterate(state, config, buffer, Ranks())
            if again["matched"] != line["matched"]:
                raise UserError(f"{run} matched other segments in iteration {line['iteration']} than its seed draws.")
            losses += zip(again["losses"], line["losses"], strict=True)
            lengths += zip(again["gradient_norms"], line["gradient_norms"], strict=True)
            step_sizes.append((again["step_size"], line["step_size"]))
    now, then = torch.tensor(lengths).reshape(-1, 2).unbind(1)
    return [
        _tensors("the set before the first iteration", starts, tolerance),
        _numbers("losses", losses, tolerance),
        # as one vector: where rounding turns a ReLU on, a single gradient can be some percent longer
        _tensors("lengths of gradients", [(now, then)], tolerance),
        _numbers("step sizes", step_sizes, tolerance),
    ]


def _numbers(what: str, pairs: Pairs, tolerance: float) -> Check:
    """Numbers found now, each with what was written."""
    differences = [abs(found - written) / max(abs(written), 1e-12) for found, written in pairs]
    return Check(what, len(pairs), _largest(differences), tolerance)


def _accuracies(what: str, pairs: Pairs) -> Check:
    return Check(what, len(pairs), _largest([abs(found - written) for found, written in pairs]), ACCURACY)


def _tensors(what: str, pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> Check:
    """Tensors found now, each with what was written; the difference is that of the lengths of vectors."""
    differences = [float((found - written).norm() / written.norm().clamp(min=1e-12)) for found, written in pairs]
    return Check(what, sum(found.numel() for found, _ in pairs), _largest(differences), tolerance)


def _largest(differences: Sequence[float]) -> float:
    """The largest of them, 0 of none; nan, which passes no check, if there is one among them."""
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def checks_table(checks: Sequence[Check]) -> str:
    """The checks, a line each."""
    lines = [f"{'recomputed':44} {'numbers':>9}  largest difference"]
    for check in checks:
        said = "none" if check.difference == 0 else f"{check.difference:.1e}"
        failed = "" if check.passed else f"  MORE THAN {check.tolerance:g}"
        lines.append(f"{check.what:44} {check.numbers:9,}  {said}{failed}")
    return "\n".join(lines)
