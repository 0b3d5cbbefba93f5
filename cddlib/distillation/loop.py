"""Distillation: the loop of concurrent trajectory matching.

On the command line::

    cddlib distill --method contra --data digits --ipc 1 --segments 4 --buffer runs/buffer --out runs/contra

One iteration draws K segments of one expert, computes each segment's exact gradient, combines them, and takes one
optimiser step on images, label logits and step size. The validation part of the training data selects the best
iterate. A run resumes from its checkpoint and ends with the same bytes as one never interrupted.

Under torchrun, the segments are divided among its processes, and one all-reduce an iteration adds their gradients::

    torchrun --nproc-per-node 4 -m cddlib distill --segments 8 …
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from cddbook.probes import Probes, accumulated_error
from cddlib.data.dataset import Dataset, Images, load
from cddlib.distillation.checkpoint import CHECKPOINT, State
from cddlib.distillation.config import DistillConfig, _check_buffer, _decided
from cddlib.distillation.gradient import concurrent_gradient, matched_segments, teacher_logits
from cddlib.evaluate import accuracy_of_set
from cddlib.experts.buffer import PREPROCESSING, Buffer
from cddlib.matching.segments import active_subset
from cddlib.runtime.config import as_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import Diverged, memory_advice
from cddlib.runtime.files import link_or_copy, read_json, write_json
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.run_folder import Metrics, locked, refuse_other_run
from cddlib.synthetic import SyntheticSet, initialise

MOST_ABOVE = 100  # iterations in a row whose loss may be above the guard before the run stops
LARGEST_LOSS = 100.0  # the guard of a run that sets none: the student ends ten times as far from the target as it began
LARGEST_STEP_SIZE = 100.0  # times its first value


@memory_advice("--side-by-side, --student-batch, --evaluation-batch, --ipc or --width")
def distill(
    config: DistillConfig, buffer: Buffer | Path, out: Path, *, root: Path | None = None, device: str = "auto"
) -> SyntheticSet:
    """Run, resume, or return the finished result of a distillation in the folder `out`.

    Where torch.distributed is initialised, as the command line does under torchrun, every process calls this with
    the same arguments, and gets the same set.

    Args:
        config: the whole configuration.
        buffer: trajectories of experts of the same network, data set and augmentation.
        out: run folder.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        UserError: `out` holds another run or is in use, a file is damaged, `buffer` does not fit, memory runs out, or
            the run diverges; the message then says which iteration the checkpoint holds.
        Interrupted: a signal asked to stop; the iteration is finished, and saved.
    """
    buffer = buffer if isinstance(buffer, Buffer) else Buffer(buffer)
    dev = resolve_device(device)
    config = _decided(config, buffer, dev)
    run = {**as_dict(config), "buffer_id": buffer.id, "data_fingerprint": buffer.data["fingerprint"]}
    _refuse_other_run(out, run)
    if (out / "result.json").exists():
        return SyntheticSet.load(out / "synthetic.safetensors").to(dev)
    _check_buffer(config, buffer)
    dataset = load(config.data, root)
    buffer.check_data(dataset)
    buffer = buffer.convexified() if config.convex else buffer
    state = initial_state(config, dataset, buffer, dev)
    ranks = Ranks()
    with locked(out / ".lock") if ranks.first else contextlib.nullcontext(), ranks.heeding_signals("the iteration"):
        _refuse_other_run(out, run)  # another process may have begun it just now
        return _distill(state, config, buffer, dataset, out, run, dev, ranks)


def _refuse_other_run(out: Path, run: dict[str, Any]) -> None:
    """Raise `UserError` if `out` holds another run."""
    if (out / "config.json").exists():
        refuse_other_run(out, read_json(out / "config.json"), run)


def _distill(
    state: State,
    config: DistillConfig,
    buffer: Buffer,
    dataset: Dataset,
    out: Path,
    run: dict[str, Any],
    device: torch.device,
    ranks: Ranks,
) -> SyntheticSet:
    """`distill`, in a folder that is this run's alone."""
    state.restore(out)
    ranks.agree(state.iteration, f"the iteration of the checkpoint in {out}")  # the first rank writes only now
    validation = dataset.split[1].to(device)
    probes = Probes(
        config, buffer, starts=config.probe_starts, expert=config.probe_expert, seed=config.seed, device=device
    )
    metrics = None
    if ranks.first:
        write_json(out / "config.json", run)
        metrics = Metrics(out / "metrics.jsonl", resume_at=state.iteration)
        if state.iteration >= 0 and not (out / CHECKPOINT).exists():  # it goes on from a milestone
            state.save(out, state.seconds)
    recorder = Recorder(device, elapsed=state.seconds)

    progress = ranks.progress(total=config.iterations, desc=f"{config.method} K={config.segments}", unit="it")
    try:
        if state.iteration < 0:
            state.iteration = 0
            measured = _measure(state, config, buffer, validation, probes, ranks)
            if metrics:
                metrics.write(iteration=0, **measured)
                metrics.sync()
                state.save(out, recorder.seconds(), milestone=config.milestones > 0)
        progress.update(state.iteration)
        while state.iteration < config.iterations:
            record = iterate(state, config, buffer, ranks)
            measured = _measure(state, config, buffer, validation, probes, ranks)
            milestone = _is_milestone(config, state.iteration)
            due = "validation_accuracy" in measured or _due(config.checkpoint_every, state.iteration, config)
            if metrics:
                metrics.write(**record, **measured)
                if due or milestone or ranks.stopping:
                    metrics.sync()
                    state.save(out, recorder.seconds(), milestone=milestone)
            progress.update()
            progress.set_postfix(state.report(record["loss"]))
            if ranks.stopping and state.iteration < config.iterations:
                ranks.wait()  # torchrun ends all when one ends: the first has saved
                raise Interrupted(f"stopped after iteration {state.iteration}, which is saved", ranks.asked)
    except Diverged as error:
        if not ranks.first or state.best is None:
            raise
        iteration = _save_selected(state, config, buffer, out)
        raise Diverged(f"{error} The best set so far, of iteration {iteration}, can be evaluated.") from None
    finally:
        if metrics:
            metrics.close()
        progress.close()
    if ranks.first:
        _finish(state, config, buffer, out, recorder)
    ranks.wait()
    return SyntheticSet.load(out / "synthetic.safetensors").to(device)


def initial_state(config: DistillConfig, dataset: Dataset, buffer: Buffer, device: torch.device) -> State:
    """The state before the first iteration."""
    initial = initialise(config, dataset, buffer, config.seed, device)
    return State(config, config, dataclasses.replace(initial, subsets=config.subsets))


def _due(every: int, iteration: int, config: DistillConfig) -> bool:
    """Whether it is time for what happens `every` so many iterations (0: never), at the start and at the end."""
    return every > 0 and (iteration % every == 0 or iteration == config.iterations)


def _is_milestone(config: DistillConfig, iteration: int) -> bool:
    """Whether the checkpoint of an iteration is kept: of 0, and of as many more as make parts of equal length."""
    return iteration in (part * config.iterations // config.milestones for part in range(config.milestones))


def _measure(
    state: State, config: DistillConfig, buffer: Buffer, validation: Images, probes: Probes, ranks: Ranks
) -> dict[str, Any]:
    """What is due of validation, the probes' losses and gradients, and the accumulated error, for the metrics.

    Validation is divided among the ranks; the rest is for the first, which writes.
    """
    found: dict[str, Any] = {}
    if _due(config.validate_every, state.iteration, config):
        found["validation_accuracy"] = _validate(state, config, buffer, validation, ranks)
    if not ranks.first:
        return found
    if probes.starts and _due(config.probe_every, state.iteration, config):
        found["probe_losses"] = probes.losses(state.synthetic)
    if _due(config.geometry_every, state.iteration, config):
        found["geometry"] = probes.geometry(state.synthetic, config.rates(state.synthetic))
    if _due(config.error_every, state.iteration, config):
        found["accumulated_error"] = accumulated_error(
            config, buffer, state.synthetic, expert=config.probe_expert, seed=config.seed
        )
    for name, value in found.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise _beyond_measure(state, f"{name} is not finite") from None
    return found


def _beyond_measure(state: State, what: str) -> Diverged:
    """What stops a run whose set can no longer be measured, or never could."""
    kept = f"the checkpoint holds iteration {state.saved_at}; " if state.iteration else ""
    return Diverged(
        f"iteration {state.iteration}: {what}, at the step size {state.synthetic.step_size.item():g}; {kept}start "
        f"again in another folder with a lower --step-size, --lr-step-size or --lr-images."
    )


def _validate(state: State, config: DistillConfig, buffer: Buffer, validation: Images, ranks: Ranks) -> list[float]:
    """Measure the set as it is now on the validation images; keep it if it is the best so far."""
    candidate = state.candidate()
    accuracies = torch.zeros(config.validation_runs, dtype=torch.float64)
    for run in ranks.share(range(config.validation_runs)):
        accuracies[run] = validation_accuracy(candidate, config, buffer, validation, run)
    ranks.sum(accuracies)
    if not bool(accuracies.isfinite().all()):
        raise _beyond_measure(state, "a network that was trained on the set for validation diverged")
    state.consider(candidate, statistics.fmean(accuracies.tolist()))
    return accuracies.tolist()


def validation_accuracy(
    synthetic: SyntheticSet, config: DistillConfig, buffer: Buffer, validation: Images, run: int
) -> float:
    """Accuracy on the validation images of the network of that number, trained on `synthetic`."""
    seed = config.seed + run
    return accuracy_of_set(
        synthetic, buffer.network, config, config.augment, validation, purpose="validation", seed=seed
    )


def iterate(state: State, config: DistillConfig, buffer: Buffer, ranks: Ranks) -> dict[str, Any]:
    """One iteration: gradients, guard, optimiser step. Returns the line for the metrics."""
    began = time.monotonic()
    number = state.iteration + 1
    kept = f"the checkpoint holds iteration {state.saved_at}; start again in another folder with a lower"
    try:
        gradients, record = concurrent_gradient(config, buffer, state.synthetic, state.iteration, ranks)
    except Diverged as error:  # of an expert
        raise Diverged(f"iteration {number}: {error} The checkpoint holds iteration {state.saved_at}.") from None
    stopped = f"iteration {number}, segments from epochs {record['starts']} of expert {record['expert']}: "
    for segment, loss, norm in zip(matched_segments(record), record["losses"], record["gradient_norms"], strict=True):
        if not loss + norm < math.inf:
            raise Diverged(
                f"iteration {number}, the segment from epoch {segment[1]} of expert {segment[0]}: its loss is {loss:g} "
                f"and its gradient's norm {norm:g}; {kept} --lr-images or --step-size."
            )
    guard = LARGEST_LOSS if config.loss_threshold is None else config.loss_threshold
    above = record["loss"] > guard
    state.above_in_a_row = state.above_in_a_row + 1 if above else 0
    if state.above_in_a_row == MOST_ABOVE:
        raise Diverged(
            f"{stopped}the loss has been above {guard:g} for {MOST_ABOVE} iterations; {kept} --step-size or "
            f"--lr-images, or with a higher --loss-threshold."
        )
    skipped = above and config.loss_threshold is not None
    if not skipped:
        rows = state.synthetic.subset(active_subset(config, state.iteration))
        if config.labels == "teacher":
            anchor = record["starts"][record["anchor"]]
            state.relabel(teacher_logits(config, buffer, state.synthetic, record["expert"], anchor), rows)
        state.step(gradients, rows)
    if not all(bool(variable.isfinite().all()) for variable in state.synthetic.variables()[:-1]):
        raise Diverged(f"{stopped}images or label logits are no longer finite; {kept} --lr-images or --lr-labels.")
    step_size = state.synthetic.step_size.item()
    if not 0 < step_size < LARGEST_STEP_SIZE * config.step_size:
        raise Diverged(
            f"{stopped}the step size became {step_size:g}, from {config.step_size:g} at first; {kept} --lr-step-size "
            f"({config.lr_step_size:g})."
        )
    state.iteration = number
    return {
        "iteration": number,
        **record,
        "step_size": step_size,
        "skipped": skipped,
        "seconds": round(time.monotonic() - began, 4),
    }


def _finish(state: State, config: DistillConfig, buffer: Buffer, out: Path, recorder: Recorder) -> None:
    """Write the selected set, then the record that marks the run as finished."""
    iteration = _save_selected(state, config, buffer, out)
    lines = Metrics.read(out / "metrics.jsonl", until=config.iterations)[1:]
    result = {
        "selected_iteration": iteration,
        "selected_by": "validation accuracy" if state.best else "last iterate",
        "validation_accuracy": state.best_accuracy if state.best else None,
        "validation_held_out_from_experts": buffer.config["holdout"],
        "iterations_skipped": sum(line["skipped"] for line in lines),
        "seconds_per_iteration": statistics.median(line["seconds"] for line in lines),
    }
    write_json(out / "result.json", {**result, **recorder.report()})


def _save_selected(state: State, config: DistillConfig, buffer: Buffer, out: Path) -> int:
    """Write the best set, or the last where nothing was validated; returns its iteration."""
    selected, iteration = (state.best, state.best_iteration) if state.best else (state.candidate(), state.iteration)
    if buffer.config["zca"] and not (out / PREPROCESSING).exists():
        link_or_copy(buffer.folder / PREPROCESSING, out / PREPROCESSING)
    selected.save(out / "synthetic.safetensors", config=as_dict(config), buffer_id=buffer.id, iteration=iteration)
    return iteration
