"""Distillation: the loop of concurrent trajectory matching.

On the command line::

    cddlib distill --method contra --data digits --ipc 1 --segments 4 --buffer runs/buffer --out runs/contra

One iteration draws K segments of one expert, computes each segment's exact gradient, combines them, and takes one
optimiser step on images, label logits and step size. The validation part of the training data selects the best
iterate. A run resumes from its checkpoint; on a CPU it ends with the same bytes as one never interrupted.

Under torchrun, the segments are divided among its processes, and one all-reduce an iteration adds their gradients::

    torchrun --nproc-per-node 4 -m cddlib distill --segments 8 …
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cddlib.data.dataset import Images, load
from cddlib.distillation.checkpoint import State
from cddlib.distillation.config import DistillConfig, check_buffer, with_compilation
from cddlib.distillation.gradient import concurrent_gradient, teacher_logits
from cddlib.distillation.guard import check_finite, check_losses, check_set
from cddlib.distillation.hooks import Hook, Run
from cddlib.evaluate import correct_of_set
from cddlib.experts.buffer import PREPROCESSING, Buffer
from cddlib.matching.segments import active_subset
from cddlib.runtime.config import as_dict
from cddlib.runtime.device import resolve_device
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import Diverged, UserError, as_user_error, out_of_memory_hint
from cddlib.runtime.files import link_or_copy, read_json, write_json
from cddlib.runtime.provenance import Recorder
from cddlib.runtime.run_folder import Metrics, at_work, parse_metrics, refuse_other_run
from cddlib.synthetic import SyntheticSet, initialise


@out_of_memory_hint("--side-by-side, --student-batch, --evaluation-batch, --ipc or --width")
def distill(
    config: DistillConfig,
    buffer: Buffer | Path,
    out: Path,
    *,
    hooks: Sequence[Hook] = (),
    root: Path | None = None,
    device: str = "auto",
) -> SyntheticSet:
    """Run, resume, or return the finished result of a distillation in the folder `out`.

    A run goes on when asked for more iterations than it had; but one in subsets does not, because their number says
    when each subset's turn is. Where torch.distributed is initialised, as the command line does under torchrun, every
    process calls this with the same arguments, and gets the same set.

    Args:
        config: the whole configuration.
        buffer: trajectories of experts of the same network, data set and augmentation.
        out: run folder.
        hooks: what watches the run; their fields are part of its identity.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        UserError: `out` holds another run or is in use, a file is damaged, `buffer` does not fit, memory runs out, or
            the run diverges; the message then says which iteration the checkpoint holds.
        Interrupted: a signal asked to stop; the iteration is finished, and saved.
    """
    buffer = buffer if isinstance(buffer, Buffer) else Buffer(buffer)
    dev = resolve_device(device)
    config = with_compilation(config, buffer, out, dev)
    identity = {**as_dict(config), "buffer_id": buffer.id, "data_fingerprint": buffer.data["fingerprint"]}
    for hook in hooks:
        if taken := identity.keys() & as_dict(hook).keys():
            raise UserError(f"the hook {type(hook).__name__} has a field {min(taken)!r}, which the run has too.")
        identity |= as_dict(hook)
    if _has_result(out, identity):
        return SyntheticSet.load(out / "synthetic.safetensors").to(dev)
    check_buffer(config, buffer)
    dataset = load(config.data.data, root)
    buffer.check_data(dataset)
    buffer = Buffer(buffer.folder, convex=True) if config.schedule.convex else buffer
    state = State(config, initialise(config.synthetic, dataset, buffer, config.seed, dev, config.schedule.subsets))
    with at_work(out / ".lock", "the iteration") as ranks:
        _has_result(out, identity)  # other work may have begun another run just now
        return Distillation(config, buffer, dataset.split[1].to(dev), out, state, hooks, ranks).run(identity)


def _has_result(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` holds the result of this run; raises `UserError` if it holds another run."""
    if not (out / "config.json").exists():
        return False
    found = read_json(out / "config.json")
    with as_user_error(out / "config.json", "a distillation's configuration"):
        grows = identity["subsets"] == 1 and found.get("iterations", math.inf) < identity["iterations"]
    refuse_other_run(out, found | {"iterations": identity["iterations"]} if grows else found, identity)
    return not grows and (out / "result.json").exists()


@dataclasses.dataclass
class Distillation:
    """A run at work in its folder. Its `state` is that before the first iteration, or of the folder's checkpoint."""

    config: DistillConfig
    buffer: Buffer
    validation: Images
    folder: Path
    state: State
    hooks: Sequence[Hook]
    ranks: Ranks

    def run(self, identity: dict[str, Any]) -> SyntheticSet:
        """Go on from the checkpoint to the end, and return the selected set."""
        state, ranks, iterations = self.state, self.ranks, self.config.schedule.iterations
        state.restore(self.folder)
        ranks.agree(state.iteration, f"the iteration of the checkpoint in {self.folder}")  # nobody has written yet
        metrics, progress, device = None, state.progress, state.synthetic.images.device
        if ranks.first:
            (self.folder / "result.json").unlink(missing_ok=True)  # of fewer iterations
            write_json(self.folder / "config.json", identity)
            metrics = Metrics(self.folder / "metrics.jsonl", resume_at=progress.iteration, digest=progress.metrics)
            if state.iteration >= 0:
                state.save(self.folder)  # a milestone may have stood in for the checkpoint
        recorder = Recorder(device, elapsed=progress.seconds)
        name = f"{self.config.method} K={self.config.schedule.segments}"
        bar = ranks.progress(total=iterations, initial=max(0, state.iteration), desc=name, unit="it")
        try:
            if state.iteration < 0:
                progress.iteration = 0
                self._record({"iteration": 0}, metrics, recorder)
            while state.iteration < iterations:
                line = iterate(state, self.config, self.buffer, ranks)
                self._record(line, metrics, recorder)
                bar.update()
                best = {"best": f"{progress.best_accuracy:.1%}"} if state.best else {}
                bar.set_postfix(loss=f"{line['loss']:.3f}", **best)
                if ranks.stopping and state.iteration < iterations:
                    ranks.stop(f"stopped after iteration {state.iteration}, which is saved")
        except Diverged as error:
            if not ranks.first or state.best is None:
                raise
            iteration = self._save_selected()
            raise Diverged(f"{error} The best set so far, of iteration {iteration}, can be evaluated.") from None
        finally:
            if metrics:
                metrics.close()
            bar.close()
        if ranks.first:
            self._finish(recorder)
        ranks.wait()
        return SyntheticSet.load(self.folder / "synthetic.safetensors").to(device)

    def _record(self, line: dict[str, Any], metrics: Metrics | None, recorder: Recorder) -> None:
        """Measure what is due after an iteration, write its line, and save a checkpoint where one is due."""
        config, number, parts = self.config, self.state.iteration, self.config.milestones
        run = Run(config, self.buffer, self.folder, number, self.state.synthetic, line)
        if run.due(config.validate_every):
            line["validation_accuracy"] = self._validate()
        if metrics is None:
            return
        for hook in self.hooks:
            measured = hook.after_iteration(run)
            for name, value in measured.items():
                check_finite(self.state, name, value)
            line |= measured
        metrics.write(line)
        milestone = number in {part * config.schedule.iterations // parts for part in range(parts)}
        if milestone or run.due(config.checkpoint_every) or "validation_accuracy" in line or self.ranks.stopping:
            self.state.progress.metrics = metrics.sync()
            self.state.progress.seconds = recorder.seconds()
            self.state.save(self.folder, milestone=milestone)

    def _validate(self) -> list[float]:
        """The better candidate's accuracies on the validation images; it is kept if it is the best so far."""
        candidates, runs = self.state.optimizer.candidates(), self.config.validation_runs
        measured = torch.zeros(len(candidates), runs, dtype=torch.float64)
        for which, number in self.ranks.portion([*itertools.product(range(len(candidates)), range(runs))]):
            how = (self.config, self.buffer, self.validation, number)
            measured[which, number] = validation_accuracy(candidates[which], *how)
        self.ranks.sum(measured)
        check_finite(self.state, "validation_accuracy", measured.tolist())
        accuracies, candidate = max(zip(measured.tolist(), candidates, strict=True), key=lambda pair: sum(pair[0]))
        self.state.consider(candidate, statistics.fmean(accuracies))
        return accuracies

    def _finish(self, recorder: Recorder) -> None:
        """Write the selected set, then the result, which marks the run as finished."""
        state, digest = self.state, self.state.progress.metrics
        lines = parse_metrics(self.folder / "metrics.jsonl", digest)[1:]
        result = {
            "selected_iteration": self._save_selected(),
            "selected_by": "validation accuracy" if state.best else "last iterate",
            "validation_accuracy": state.progress.best_accuracy if state.best else None,
            "validation_held_out_from_experts": self.buffer.config["holdout"],
            "iterations_skipped": sum(line["skipped"] for line in lines),
            "seconds_per_iteration": statistics.median(line["seconds"] for line in lines),
            "metrics_sha256": digest,
        }
        write_json(self.folder / "result.json", {**result, **recorder.report()})

    def _save_selected(self) -> int:
        """Write the best set, or the last where nothing was validated; returns its iteration."""
        state, buffer = self.state, self.buffer
        selected, iteration = state.optimizer.candidates()[-1], state.iteration
        if state.best:
            selected, iteration = state.best, state.progress.best_iteration
        if buffer.config["zca"] and not (self.folder / PREPROCESSING).exists():
            link_or_copy(buffer.folder / PREPROCESSING, self.folder / PREPROCESSING)
        header = {"config": as_dict(self.config), "buffer_id": buffer.id, "iteration": iteration}
        selected.save(self.folder / "synthetic.safetensors", **header)
        return iteration


def validation_accuracy(
    synthetic: SyntheticSet, config: DistillConfig, buffer: Buffer, validation: Images, number: int
) -> float:
    """Accuracy on the validation images of the network of that number, trained on `synthetic`."""
    how = (config.evaluation, config.augmentation.augment, config.compute, validation)
    seed = config.seed + number
    return correct_of_set(synthetic, buffer.network, *how, purpose="validation", seed=seed).mean().item()


def iterate(state: State, config: DistillConfig, buffer: Buffer, ranks: Ranks) -> dict[str, Any]:
    """One iteration: gradients, guard, optimiser step. Returns the line for the metrics."""
    began = time.monotonic()
    number = state.iteration + 1
    try:
        gradients, record = concurrent_gradient(config, buffer, state.synthetic, state.iteration, ranks)
    except Diverged as error:  # of an expert
        raise Diverged(f"iteration {number}: {error} The checkpoint holds iteration {state.saved_at}.") from None
    skipped = check_losses(state, config, record)
    if not skipped:
        rows = state.synthetic.subset(active_subset(config.schedule, state.iteration))
        if config.synthetic.labels == "teacher":
            expert, start = record["matched"][record["anchor"]]
            target = start + config.schedule.expert_epochs
            labels = teacher_logits(buffer, state.synthetic, expert, target)
            state.synthetic.variable_tensors()["label_logits"][rows] = labels[rows]
        state.optimizer.step(gradients, rows, number)
    check_set(state, config, record)
    state.progress.iteration = number
    return {
        "iteration": number,
        **record,
        "step_size": state.synthetic.step_size.item(),
        "skipped": skipped,
        "seconds": round(time.monotonic() - began, 4),
    }
