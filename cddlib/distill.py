"""Distillation: the loop of concurrent trajectory matching.

On the command line::

    cddlib distill --method contra --data digits --ipc 1 --segments 4 --buffer runs/buffer --out runs/contra

One iteration draws K segments of one expert, computes each segment's exact gradient one after the other, combines
them, and takes one optimiser step on images, label logits and step size. The validation part of the training data
selects the best iterate. A run resumes from its checkpoint and ends with the same bytes as one never interrupted.
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.augment import AugmentConfig
from cddlib.combine import CombineConfig, weighted_sum, weights
from cddlib.data import DataConfig, Images, load
from cddlib.evaluate import EvaluateConfig, accuracy_of_set
from cddlib.matching import MatchingConfig, matching_loss, plan_student
from cddlib.networks import NetworkConfig
from cddlib.runs import (
    Metrics,
    Recorder,
    UserError,
    as_dict,
    generator,
    open_tensors,
    read_json,
    read_metadata,
    refuse_other_run,
    resolve_device,
    write_json,
    write_tensors,
)
from cddlib.segments import SegmentsConfig, draw_segments
from cddlib.synthetic import SyntheticConfig, SyntheticSet, initialise
from cddlib.trajectory import Buffer

MOST_SKIPPED = 100  # iterations in a row that the loss guard may skip before the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(
    EvaluateConfig,
    SyntheticConfig,
    CombineConfig,
    MatchingConfig,
    SegmentsConfig,
    AugmentConfig,
    NetworkConfig,
    DataConfig,
):
    """A complete distillation. `cddlib.recipes` fills it in for a method, data set and IPC."""

    method: str = "contra"
    """Name of the recipe."""
    iterations: int = 5000
    """Optimiser steps on the synthetic set."""
    lr_images: float = 1000.0
    """Learning rate of the images."""
    momentum_images: float = 0.5
    """Momentum of the images."""
    lr_labels: float = 2.0
    """Learning rate of the label logits, with soft labels."""
    momentum_labels: float = 0.9
    """Momentum of the label logits."""
    lr_step_size: float = 1e-5
    """Learning rate of the student's step size."""
    momentum_step_size: float = 0.5
    """Momentum of the student's step size."""
    loss_threshold: float | None = None
    """Skip an iteration whose loss is above this (DATM's guard); without it, never skip."""
    ema: float | None = None
    """Decay of a moving average of the images that is evaluated and saved in their place (FTD)."""
    validate_every: int = 100
    """Iterations between validations, before the first and after the last one too; 0 means never."""
    validation_runs: int = 1
    """Networks trained for each validation."""
    checkpoint_every: int = 20
    """Iterations between checkpoints."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for base in DistillConfig.__mro__[1:]:
            if dataclasses.is_dataclass(base):
                base.__post_init__(self)  # type: ignore[attr-defined]
        for name in ("iterations", "validation_runs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("lr_images", "lr_labels", "lr_step_size", "validate_every"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("momentum_images", "momentum_labels", "momentum_step_size"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more and below 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must lie between 0 and 1.")


def distill(
    config: DistillConfig, buffer: Buffer | Path, out: Path, *, root: Path | None = None, device: str = "auto"
) -> SyntheticSet:
    """Run, resume, or return the finished result of a distillation in the folder `out`.

    Args:
        config: the whole configuration.
        buffer: trajectories of experts of the same network, data set and augmentation.
        out: run folder.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        UserError: `out` holds another run, `buffer` does not fit, or the run diverges; the message then says which
            iteration the checkpoint holds.
    """
    buffer = buffer if isinstance(buffer, Buffer) else Buffer(buffer)
    run = {**as_dict(config), "buffer_id": buffer.id, "data_fingerprint": buffer.data["fingerprint"]}
    if (out / "config.json").exists():
        refuse_other_run(out, read_json(out / "config.json"), run)
    dev = resolve_device(device)
    if (out / "result.json").exists():
        return SyntheticSet.load(out / "synthetic.safetensors").to(dev)
    _check_buffer(config, buffer)
    dataset = load(config.data, root)
    buffer.check_data(dataset)
    state = _State(config, initialise(config, dataset, buffer, config.seed, dev))
    write_json(out / "config.json", run)
    state.restore(out / "checkpoint.safetensors")
    metrics = Metrics(out / "metrics.jsonl", resume_at=state.iteration)
    validation = dataset.split[1].to(dev)
    recorder = Recorder(dev, elapsed=state.seconds)

    progress = tqdm(total=config.iterations, desc=f"{config.method} K={config.segments}", unit="it")
    try:
        if state.iteration < 0:
            state.iteration = 0
            metrics.write(
                iteration=0, **(_validate(state, config, buffer, validation) if config.validate_every else {})
            )
            state.save(out / "checkpoint.safetensors", recorder.seconds())
        progress.update(state.iteration)
        while state.iteration < config.iterations:
            record = _iterate(state, config, buffer)
            last = state.iteration == config.iterations
            due = config.validate_every > 0 and (last or state.iteration % config.validate_every == 0)
            metrics.write(**record, **(_validate(state, config, buffer, validation) if due else {}))
            if due or last or state.iteration % config.checkpoint_every == 0:
                state.save(out / "checkpoint.safetensors", recorder.seconds())
            progress.update()
            progress.set_postfix(state.report(record["loss"]))
    finally:
        metrics.close()
        progress.close()
    return _finish(state, config, buffer, out, recorder)


def _check_buffer(config: DistillConfig, buffer: Buffer) -> None:
    """Refuse a buffer whose experts are not the ones that `config` wants to match."""
    for base in (DataConfig, NetworkConfig, AugmentConfig):
        for field in dataclasses.fields(base):
            wanted, found = getattr(config, field.name), buffer.config.get(field.name)
            if wanted != found:
                raise UserError(
                    f"{field.name} is {wanted!r}, but the experts in {buffer.folder} were trained with {found!r}."
                )
    config.check_epochs(buffer.epochs)


def _validate(state: "_State", config: DistillConfig, buffer: Buffer, validation: Images) -> dict[str, Any]:
    """Measure the set as it is now on the validation images; keep it if it is the best so far."""
    candidate = state.candidate()
    seeds = range(config.seed, config.seed + config.validation_runs)
    accuracies = [
        accuracy_of_set(candidate, buffer.network, config, config.augment, validation, purpose="validation", seed=seed)
        for seed in seeds
    ]
    state.consider(candidate, statistics.fmean(accuracies))
    return {"validation_accuracy": accuracies}


def _iterate(state: "_State", config: DistillConfig, buffer: Buffer) -> dict[str, Any]:
    """One iteration: gradients, guard, optimiser step. Returns the line for the metrics."""
    began = time.monotonic()
    number = state.iteration + 1
    gradients, record = concurrent_gradient(config, buffer, state.synthetic, state.iteration)
    stopped = f"iteration {number}, segments from epochs {record['starts']}: "
    kept = f"the checkpoint holds iteration {state.saved_at}; start again in another folder with a lower"
    if not all(bool(gradient.isfinite().all()) for gradient in gradients) or not record["loss"] < float("inf"):
        raise UserError(
            f"{stopped}the losses are {record['losses']} and their gradient is not finite; {kept} --lr-images or "
            f"--step-size."
        )
    skipped = config.loss_threshold is not None and record["loss"] > config.loss_threshold
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row == MOST_SKIPPED:
        raise UserError(
            f"{stopped}the loss has been above loss_threshold ({config.loss_threshold}) for {MOST_SKIPPED} "
            f"iterations; {kept} --step-size, or a higher --loss-threshold."
        )
    if not skipped:
        state.step(gradients)
    if not all(bool(variable.isfinite().all()) for variable in state.synthetic.variables()[:-1]):
        raise UserError(f"{stopped}images or label logits are no longer finite; {kept} --lr-images or --lr-labels.")
    step_size = state.synthetic.step_size.item()
    if not 0 < step_size < float("inf"):
        raise UserError(f"{stopped}the step size became {step_size}; {kept} --lr-step-size ({config.lr_step_size}).")
    state.iteration = number
    return {
        "iteration": number,
        **record,
        "step_size": step_size,
        "skipped": skipped,
        "seconds": round(time.monotonic() - began, 4),
    }


def _finish(state: "_State", config: DistillConfig, buffer: Buffer, out: Path, recorder: Recorder) -> SyntheticSet:
    """Write the selected set, then the record that marks the run as finished."""
    selected, iteration = (state.best, state.best_iteration) if state.best else (state.candidate(), state.iteration)
    selected.save(out / "synthetic.safetensors", config=as_dict(config), buffer_id=buffer.id, iteration=iteration)
    lines = [line for line in Metrics.read(out / "metrics.jsonl") if "loss" in line]
    result = {
        "selected_iteration": iteration,
        "selected_by": "validation accuracy" if state.best else "last iterate",
        "validation_accuracy": state.best_accuracy if state.best else None,
        "validation_held_out_from_experts": buffer.config["holdout"],
        "iterations_skipped": sum(line["skipped"] for line in lines),
        "seconds_per_iteration": statistics.median(line["seconds"] for line in lines),
    }
    write_json(out / "result.json", {**result, **recorder.report()})
    return selected


def concurrent_gradient(
    config: DistillConfig, buffer: Buffer, synthetic: SyntheticSet, iteration: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """The combined gradient of K segments with respect to `synthetic.variables`, and what was matched.

    The segments share an expert, drawn uniformly; each has its own batches and augmentation. That is our choice: the
    paper's is not known. Nothing random depends on earlier iterations.

    Returns:
        A gradient for each variable, in its shape; and the iteration's loss, losses, start epochs, anchor and expert.
    """
    rng = generator(config.seed, "iteration", iteration)
    expert = int(torch.randint(len(buffer.experts), (), generator=rng))
    segments = draw_segments(config, iteration, rng)
    device, size = synthetic.images.device, len(synthetic.labels)
    variables = synthetic.variables()
    losses, gradients = [], []
    for start in segments.starts:
        loss = matching_loss(
            buffer.network,
            buffer.parameters(expert, start).to(device),
            buffer.parameters(expert, start + config.expert_epochs).to(device),
            synthetic.images,
            synthetic.targets(),
            synthetic.step_size,
            plan_student(config, size, config.augment, rng),
        )
        gradients.append(torch.autograd.grad(loss, variables))
        losses.append(loss.item())
    shares = weights(config, config.segments, segments.anchor)
    matched = {
        "loss": sum(share * loss for share, loss in zip(shares, losses, strict=True)),
        "losses": losses,
        "starts": segments.starts,
        "anchor": segments.anchor,
        "expert": expert,
    }
    return weighted_sum(gradients, shares), matched


class _State:
    """Everything that changes from iteration to iteration, and its checkpoint."""

    def __init__(self, config: DistillConfig, initial: SyntheticSet) -> None:
        self.iteration = -1  # iterations done; -1: not even the validation before the first
        self.saved_at = 0  # iteration of the checkpoint
        self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.best: SyntheticSet | None = None
        self.best_iteration, self.best_accuracy = 0, 0.0
        self.synthetic = initial
        for variable in initial.variables():
            variable.requires_grad_()
        groups = [{"params": [initial.images], "lr": config.lr_images, "momentum": config.momentum_images}]
        if initial.label_logits is not None:
            groups += [{"params": [initial.label_logits], "lr": config.lr_labels, "momentum": config.momentum_labels}]
        groups += [{"params": [initial.step_size], "lr": config.lr_step_size, "momentum": config.momentum_step_size}]
        self.optimizer = torch.optim.SGD(groups)
        self.ema_decay = config.ema
        self.ema_images = None if config.ema is None else initial.images.detach().clone()

    def step(self, gradients: list[Tensor]) -> None:
        """One optimiser step, then the moving average."""
        for variable, gradient in zip(self.synthetic.variables(), gradients, strict=True):
            variable.grad = gradient
        self.optimizer.step()
        if self.ema_images is not None and self.ema_decay is not None:
            self.ema_images.lerp_(self.synthetic.images.detach(), 1 - self.ema_decay)

    def candidate(self) -> SyntheticSet:
        """A copy of the set as it would be evaluated now."""
        found = self.synthetic.copy()
        return found if self.ema_images is None else dataclasses.replace(found, images=self.ema_images.clone())

    def consider(self, candidate: SyntheticSet, accuracy: float) -> None:
        """Keep `candidate` if it is the best so far."""
        if self.best is None or accuracy > self.best_accuracy:
            self.best, self.best_iteration, self.best_accuracy = candidate, self.iteration, accuracy

    def report(self, loss: float) -> dict[str, str]:
        """What the progress bar shows."""
        found = {"loss": f"{loss:.3f}"}
        if self.best is not None:
            found["best"] = f"{self.best_accuracy:.1%}"
        if self.skipped_in_a_row:
            found["skipped in a row"] = str(self.skipped_in_a_row)
        return found

    def save(self, path: Path, seconds: float) -> None:
        """Write the checkpoint."""
        variables = self.synthetic.variable_tensors()
        tensors = dict(variables)
        for name, variable in variables.items():
            momentum = self.optimizer.state[variable].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        if self.ema_images is not None:
            tensors["ema.images"] = self.ema_images
        if self.best is not None:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.variable_tensors().items()}
        state = {
            "iteration": self.iteration,
            "seconds": seconds,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_iteration": self.best_iteration,
            "best_accuracy": self.best_accuracy,
        }
        write_tensors(path, tensors, {"state": state})
        self.saved_at = self.iteration

    def restore(self, path: Path) -> None:
        """Continue from the checkpoint, if there is one."""
        if not path.exists():
            return
        file = open_tensors(path)
        state = read_metadata(file, path, "state")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        self.iteration = self.saved_at = state["iteration"]
        self.seconds, self.skipped_in_a_row = state["seconds"], state["skipped_in_a_row"]
        self.best_iteration, self.best_accuracy = state["best_iteration"], state["best_accuracy"]
        device = self.synthetic.images.device
        variables = self.synthetic.variable_tensors()
        with torch.no_grad():
            for name, variable in variables.items():
                variable.copy_(tensors[name])
                if f"momentum.{name}" in tensors:
                    self.optimizer.state[variable]["momentum_buffer"] = tensors[f"momentum.{name}"].to(device)
        if self.ema_images is not None:
            self.ema_images.copy_(tensors["ema.images"])
        if "best.images" in tensors:
            best: dict[str, Any] = {name: tensors[f"best.{name}"].to(device) for name in variables}
            self.best = dataclasses.replace(self.synthetic, **best)
