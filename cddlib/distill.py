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
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.augment import AugmentConfig
from cddlib.combine import CombineConfig, gramian, weighted_sum, weights
from cddlib.consolidate import ConsolidateConfig
from cddlib.continual import accumulated_error
from cddlib.correlation import ProbeConfig, Probes
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
    read_json,
    refuse_other_run,
    resolve_device,
    write_json,
)
from cddlib.segments import Segments, SegmentsConfig, active_subset, draw_segments
from cddlib.state import OptimizerConfig, State
from cddlib.synthetic import SyntheticConfig, SyntheticSet, initialise
from cddlib.training import predict
from cddlib.trajectory import Buffer

MOST_SKIPPED = 100  # iterations in a row that the loss guard may skip before the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(
    EvaluateConfig,
    ProbeConfig,
    OptimizerConfig,
    SyntheticConfig,
    ConsolidateConfig,
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
    loss_threshold: float | None = None
    """Skip an iteration whose loss is above this (DATM's guard); without it, never skip."""
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
        for name in ("validation_runs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.validate_every < 0:
            raise UserError(f"validate_every is {self.validate_every}; it must be 0 or more.")
        if self.ipc < self.subsets:
            raise UserError(f"ipc is {self.ipc}; {self.subsets} subsets need at least {self.subsets} images a class.")


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
    if config.convex:
        buffer = buffer.convexified()
    initial = initialise(config, dataset, buffer, config.seed, dev)
    state = State(config, config, dataclasses.replace(initial, subsets=config.subsets))
    write_json(out / "config.json", run)
    state.restore(out / "checkpoint.safetensors")
    metrics = Metrics(out / "metrics.jsonl", resume_at=state.iteration)
    validation = dataset.split[1].to(dev)
    probes = Probes(
        config, buffer, starts=config.probe_starts, expert=config.probe_expert, seed=config.seed, device=dev
    )
    recorder = Recorder(dev, elapsed=state.seconds)

    progress = tqdm(total=config.iterations, desc=f"{config.method} K={config.segments}", unit="it")
    try:
        if state.iteration < 0:
            state.iteration = 0
            metrics.write(iteration=0, **_measure(state, config, buffer, validation, probes))
            state.save(out / "checkpoint.safetensors", recorder.seconds())
        progress.update(state.iteration)
        while state.iteration < config.iterations:
            record = _iterate(state, config, buffer)
            measured = _measure(state, config, buffer, validation, probes)
            metrics.write(**record, **measured)
            if "validation_accuracy" in measured or _due(config.checkpoint_every, state.iteration, config):
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
    latest = buffer.epochs - config.expert_epochs
    if config.probe_starts and config.probe_starts[-1] > latest:
        raise UserError(
            f"probe_starts is {config.probe_starts}, but the experts stop at epoch {buffer.epochs} and segments are "
            f"{config.expert_epochs} epochs long; probes may start at epoch {latest} at the latest."
        )
    for name, expert in (("expert", config.expert), ("probe_expert", config.probe_expert)):
        if expert is not None and expert >= len(buffer.experts):
            raise UserError(f"{name} is {expert}, but {buffer.folder} holds experts 0 to {len(buffer.experts) - 1}.")


def _due(every: int, iteration: int, config: DistillConfig) -> bool:
    """Whether it is time for what happens `every` so many iterations (0: never), at the start and at the end."""
    return every > 0 and (iteration % every == 0 or iteration == config.iterations)


def _measure(state: State, config: DistillConfig, buffer: Buffer, validation: Images, probes: Probes) -> dict[str, Any]:
    """What is due of validation, the probes' losses and gradients, and the accumulated error, for the metrics."""
    found: dict[str, Any] = {}
    if _due(config.validate_every, state.iteration, config):
        found |= _validate(state, config, buffer, validation)
    if probes.starts and _due(config.probe_every, state.iteration, config):
        found["probe_losses"] = probes.losses(state.synthetic)
    if _due(config.geometry_every, state.iteration, config):
        found["geometry"] = probes.geometry(state.synthetic, config.rates(state.synthetic))
    if _due(config.error_every, state.iteration, config):
        found["accumulated_error"] = accumulated_error(
            config, buffer, state.synthetic, expert=config.probe_expert, seed=config.seed
        )
    return found


def _validate(state: State, config: DistillConfig, buffer: Buffer, validation: Images) -> dict[str, Any]:
    """Measure the set as it is now on the validation images; keep it if it is the best so far."""
    candidate = state.candidate()
    seeds = range(config.seed, config.seed + config.validation_runs)
    accuracies = [
        accuracy_of_set(candidate, buffer.network, config, config.augment, validation, purpose="validation", seed=seed)
        for seed in seeds
    ]
    state.consider(candidate, statistics.fmean(accuracies))
    return {"validation_accuracy": accuracies}


def _iterate(state: State, config: DistillConfig, buffer: Buffer) -> dict[str, Any]:
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
        rows = state.synthetic.subset(active_subset(config, state.iteration))
        if config.labels == "teacher":
            anchor = record["starts"][record["anchor"]]
            state.relabel(teacher_logits(config, buffer, state.synthetic, record["expert"], anchor), rows)
        state.step(gradients, rows)
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


def _finish(state: State, config: DistillConfig, buffer: Buffer, out: Path, recorder: Recorder) -> SyntheticSet:
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
    experts = len(buffer.experts)
    expert, segments = _draw(config, experts, iteration, rng)
    replayed = _draw_earlier(config, experts, iteration)
    device = synthetic.images.device
    rows = synthetic.subset(active_subset(config, iteration))
    variables = synthetic.variables()
    losses, gradients = [], []
    for owner, start in [(expert, start) for start in segments.starts] + replayed:
        taught = config.labels == "teacher"
        steps = plan_student(config, len(rows), config.augment, rng)
        loss = matching_loss(
            buffer.network,
            buffer.parameters(owner, start).to(device),
            buffer.parameters(owner, start + config.expert_epochs).to(device),
            synthetic.images,
            teacher_logits(config, buffer, synthetic, owner, start).softmax(1) if taught else synthetic.targets(),
            synthetic.step_size,
            [step._replace(indices=rows[step.indices]) for step in steps],
            config,
        )
        gradients.append(torch.autograd.grad(loss, variables, allow_unused=taught, materialize_grads=taught))
        losses.append(loss.item())
    shares = weights(config, gramian(gradients, config.rates(synthetic)), losses, segments.anchor, rng)
    averaged = shares if config.combine == "mean" else [1 / len(losses)] * len(losses)
    matched = {
        "loss": sum(share * loss for share, loss in zip(averaged, losses, strict=True)),
        "losses": losses,
        "starts": segments.starts,
        "anchor": segments.anchor,
        "expert": expert,
        **({"replayed": replayed} if config.replay else {}),
        **({"weights": shares} if config.combine != "mean" else {}),
    }
    return weighted_sum(gradients, shares), matched


def teacher_logits(
    config: SegmentsConfig, buffer: Buffer, synthetic: SyntheticSet, expert: int, start: int | float
) -> Float[Tensor, "n classes"]:
    """What the network at the end of a segment says of the synthetic images (TESLA's labels for 1000 classes)."""
    theta = buffer.parameters(expert, start + config.expert_epochs).to(synthetic.images.device)
    images = synthetic.images.detach()
    return predict(buffer.network, theta, lambda indices: (images[indices], synthetic.labels[indices]), len(images))


def _draw(config: SegmentsConfig, experts: int, iteration: int, rng: torch.Generator) -> tuple[int, Segments]:
    """The expert and the segments of an iteration; `rng` is the iteration's generator."""
    expert = int(torch.randint(experts, (), generator=rng))
    segments = draw_segments(config, iteration, rng)
    return (expert if config.expert is None else config.expert), segments


def _draw_earlier(config: DistillConfig, experts: int, iteration: int) -> list[tuple[int, int | float]]:
    """Experts and start epochs of `replay` earlier anchors, as many as there are; drawn anew, so nothing is stored."""
    rng = generator(config.seed, "replay", iteration)
    chosen = torch.randperm(iteration, generator=rng)[: config.replay].tolist()
    found = []
    for earlier in chosen:
        expert, segments = _draw(config, experts, earlier, generator(config.seed, "iteration", earlier))
        found.append((expert, segments.starts[segments.anchor]))
    return found
