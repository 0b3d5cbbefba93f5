"""Studies: families of distillations that differ in one thing, run side by side and gathered in one record.

On the command line::

    python -m cddbook correlate --buffer runs/buffer --out runs/correlation --probe-starts 0 3 6 9
    python -m cddbook compare --what segments --buffer runs/buffer --out runs/segments
    python -m cddbook compare --what remedies --segments 4 --buffer runs/buffer --out runs/remedies
    python -m cddbook search --buffer runs/buffer --out runs/search --vary lr_images=10,30 step_size=0.02

Every run has a folder of its own below the study's and resumes from it, so a study that was stopped goes on when it is
asked for again. `jobs` processes work on the runs, each with its share of the cores.
"""

import concurrent.futures.process
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from cddbook.probes import ProbeHook, Probes
from cddlib.data.dataset import load
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import distill
from cddlib.evaluate import evaluate_run
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import distill_recipe, parse_value
from cddlib.runtime.config import as_dict, configure, field_types, replace
from cddlib.runtime.device import end_with_parent, keep_freed_memory, resolve_device
from cddlib.runtime.errors import Diverged, UserError, as_user_error
from cddlib.runtime.files import read_json, write_json
from cddlib.runtime.run_folder import locked, read_metrics, refuse_other_run
from cddlib.synthetic import initialise


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Fields and their values, from texts like `lr_images=10,30`.

    Raises:
        UserError: a text of another form, a field that a distillation does not have, or a value that is not one.
    """
    grid = {}
    for text in texts:
        field, _, values = text.partition("=")
        if field not in field_types(DistillConfig) or not values:
            raise UserError(f"{text!r} is not a field of a distillation with values, like lr_images=10,30.")
        try:
            grid[field] = [parse_value(field, token) for token in values.split(",")]
        except (KeyError, ValueError):
            raise UserError(f"{text!r} has a value that {field} cannot take.") from None
    return grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A distillation, and what follows it."""

    distillation: DistillConfig = DistillConfig()
    """The distillation."""
    probes: ProbeHook = ProbeHook()
    """Segments that are followed."""


def study_recipe(method: str = "contra", data: str = "digits", ipc: int = 1, **overrides: Any) -> StudyConfig:
    """The recipe of a distillation, with fields of `DistillConfig` and of `ProbeHook` as keywords."""
    probes = {name: overrides.pop(name) for name in field_types(ProbeHook) if name in overrides}
    return StudyConfig(
        distillation=distill_recipe(method, data, ipc, **overrides), probes=configure(ProbeHook, **probes)
    )


STOPPED = "stopped.json"
"""File in the folder of a run that stopped on its own."""

Comparison = Literal["segments", "remedies"]


# --- What is run ------------------------------------------------------------------------------------------------


def correlation_runs(base: StudyConfig, replicates: int, experts: int) -> dict[str, StudyConfig]:
    """The runs of a correlation study, by name.

    In each replicate, one run for every probe matches nothing but that probe's segment; `sequential` matches a segment
    of the window at a time and `concurrent` as many as there are probes, spread over the window. Replicate r has seed
    `base.seed + r` and expert r (modulo their number), and follows that expert's probes.
    """
    if not base.probes.probe_starts:
        raise UserError("a correlation study needs segments to match and measure; name them with --probe-starts.")
    runs, iterations = {}, base.distillation.schedule.iterations
    for replicate in range(replicates):
        expert = replicate % experts
        shared = replace(
            base,
            seed=base.distillation.seed + replicate,
            expert=expert,
            probe_expert=expert,
            segments=1,
            validate_every=0,
        )
        folder = f"replicate-{replicate}"
        for start in base.probes.probe_starts:
            window: dict[str, Any] = {"window_start": start, "window_end": start + 1, "window_end_initial": None}
            runs[f"{folder}/matched-{start:02d}"] = replace(shared, **window)
        runs[f"{folder}/sequential"] = replace(shared, similarity_every=iterations)
        runs[f"{folder}/concurrent"] = replace(
            shared, similarity_every=iterations, segments=len(base.probes.probe_starts)
        )
    return runs


def remedies(segments: int) -> dict[str, dict[str, Any]]:
    """Ways to match segments without forgetting the others, as changes of a configuration.

    The first three match one segment an iteration, all others `segments` of them; of these, replay and gem take all
    but one from earlier iterations.
    """
    concurrent: dict[str, Any] = {"segments": segments}
    rehearsal: dict[str, Any] = {"segments": 1, "replay": segments - 1}
    rules = ("gradnorm", "pcgrad", "cagrad", "upgrad", "mgda")
    return {
        "sequential": {"segments": 1},
        "ewc": {"segments": 1, "consolidation": "ewc"},
        "si": {"segments": 1, "consolidation": "si"},
        "replay": rehearsal,
        "gem": {**rehearsal, "combine": "gem"},
        "concurrent": concurrent,
        "balance": {**concurrent, "balance": 1.0},
        **{rule: {**concurrent, "combine": rule} for rule in rules},
    }


def segment_counts(counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Segment counts K, as changes of a configuration."""
    return {f"K={count}": {"segments": count} for count in counts}


def comparison_runs(base: StudyConfig, variants: Mapping[str, Mapping[str, Any]], seeds: int) -> dict[str, StudyConfig]:
    """Every variant with every seed, by name, at equal compute.

    `base.iterations`, `validate_every`, `probe_every` and `expansion_iterations` count matched segments: a variant that
    matches k segments an iteration takes `iterations // k` iterations, and measures as often by compute. The
    accumulated error is measured at the start and at the end.
    """
    runs, pace = {}, base.distillation
    iterations, expansion = pace.schedule.iterations, pace.schedule.expansion_iterations
    for name, changes in variants.items():
        variant = replace(base, **changes)
        cost = variant.distillation.schedule.segments_in_all
        if iterations < cost:
            raise UserError(f"iterations is {iterations}; {name} matches {cost} segments an iteration.")
        paced = replace(
            variant,
            iterations=iterations // cost,
            validate_every=-(-pace.validate_every // cost),
            probe_every=max(1, base.probes.probe_every // cost),
            expansion_iterations=max(1, expansion // cost),
            error_every=iterations // cost,
        )
        for seed in range(pace.seed, pace.seed + seeds):
            runs[f"{name}/seed-{seed}"] = replace(paced, seed=seed)
    return runs


def search_runs(base: StudyConfig, grid: Mapping[str, Sequence[Any]], seeds: int) -> dict[str, StudyConfig]:
    """A run for every combination of the values in `grid` (by field) and every seed; it is judged on validation images.

    Raises:
        UserError: `base` never validates, so nothing would tell one setting from another.
    """
    if base.distillation.validate_every == 0:
        raise UserError("validate_every is 0; a search needs validations to choose by.")
    runs = {}
    for values in itertools.product(*grid.values()):
        changes: dict[str, Any] = dict(zip(grid, values, strict=True))
        name = ",".join(f"{field}={value}" for field, value in changes.items())
        first = base.distillation.seed
        for seed in range(first, first + seeds):
            runs[f"{name}/seed-{seed}"] = replace(base, **changes, seed=seed)
    return runs


def settings_by_accuracy(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """What a search found: each setting's validation accuracies, one a seed, from the best mean to the worst.

    A run that stopped, because it diverged, counts as 0.
    """
    found: dict[str, list[float]] = {}
    for name, run in record["runs"].items():
        accuracy = 0.0 if "stopped" in run else run["result"]["validation_accuracy"]
        found.setdefault(name.split("/")[0], []).append(accuracy)
    return dict(sorted(found.items(), key=lambda entry: -statistics.fmean(entry[1])))


def first_similarities(
    base: StudyConfig, buffer: Buffer, *, root: Path | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """`Probes.gradient_similarity` of the initial synthetic set, once an expert: its probes, and a seed of its own."""
    dev, config = resolve_device(device), base.distillation
    dataset = load(config.data.data, root)
    similarities = []
    for expert in range(len(buffer.experts)):
        seed = config.seed + expert
        synthetic = initialise(config.synthetic, dataset, buffer, seed, dev)
        probes = Probes(config, buffer, starts=base.probes.probe_starts, expert=expert, seed=seed, device=dev)
        similarities.append(probes.gradient_similarity(synthetic, config.optimizer.rates(synthetic)))
    return similarities


# --- Running it -------------------------------------------------------------------------------------------------


def run_study(
    base: StudyConfig,
    runs: Mapping[str, StudyConfig],
    buffer: Path,
    out: Path,
    *,
    networks: int = 0,
    jobs: int = 0,
    keep_stopped: bool = False,
    root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Run, resume, or read every run, and return the study's record.

    Args:
        base: what the runs have in common.
        runs: configurations by name; a run's folder is `out/name`.
        buffer: folder of the experts.
        out: the study's folder.
        networks: networks that test each synthetic set, and the baselines once a seed; 0 tests nothing. No two seeds
            share a network.
        jobs: processes that share the runs; 0 runs them in this process, one after the other.
        keep_stopped: a run that began and stopped, because it diverged, is a result too.
        root: folder of the data sets.
        device: `auto`, `cpu`, `cuda` …

    Raises:
        UserError: `out` holds another study or is in use, or some runs failed; the others are finished first.
    """
    for name, value in (("jobs", jobs), ("networks", networks)):
        if value < 0:
            raise UserError(f"{name} is {value}; it must be 0 or more.")
    if not runs:
        raise UserError("there is nothing to run; give at least one seed, replicate and variant.")
    experts = Buffer(buffer)
    for config in runs.values():
        config.probes.check(config.distillation, experts)
    description = {"config": as_dict(base), "runs": list(runs), "networks": networks, "buffer_id": experts.id}
    description |= {"keep_stopped": True} if keep_stopped else {}
    with locked(out / ".lock"):
        if (out / "study.json").exists():
            with as_user_error(out / "study.json", "a study's description"):
                found = _identity(read_json(out / "study.json"))
            refuse_other_run(out, found, _identity(description))
        write_json(out / "study.json", description)
        first: dict[int, str] = {}  # the first run of a seed also tests random real images
        for name, config in runs.items():
            first.setdefault(config.distillation.seed, name)
        work = [
            (name, config, buffer, out / name, networks, name in first.values(), root, device)
            for name, config in runs.items()
        ]
        failed = _in_processes(work, jobs) if jobs else _one_by_one(work)
        if failed and not (keep_stopped and all(_ended(out / name) for name in runs)):
            raise UserError(f"{len(failed)} of {len(runs)} runs failed, the others are finished: {'; '.join(failed)}")
    return study_record(out)


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    """A study's description with its configuration unfolded, so that a difference can be named."""
    unfolded = {key: value for key, value in description.items() if key not in ("config", "runs")}
    families = ", ".join(dict.fromkeys(name.split("/")[0] for name in description["runs"]))
    return {**description["config"], **unfolded, "runs": f"{len(description['runs'])} of {families}"}


def _one(
    name: str,
    config: StudyConfig,
    buffer: Path,
    out: Path,
    networks: int,
    baselines: bool,
    root: Path | None,
    device: str,
) -> str | None:
    """Do one run; returns why it failed."""
    try:
        distill(config.distillation, buffer, out, hooks=[config.probes], root=root, device=device)
        if networks:
            seed = config.distillation.seed * networks
            evaluate_run(out, runs=networks, baselines=baselines, root=root, device=device, seed=seed)
    except Diverged as error:  # not what another command or machine would mend
        if (out / "config.json").exists():  # it began
            write_json(out / STOPPED, {"reason": str(error)})
        return f"{name}: {error}"
    except (UserError, OSError) as error:
        return f"{name}: {error}"
    return None


def _one_by_one(work: list[tuple[Any, ...]]) -> list[str]:
    return [reason for task in tqdm(work, desc="study", unit="run") if (reason := _one(*task))]


def _in_processes(work: list[tuple[Any, ...]], jobs: int) -> list[str]:
    """A process for every run, `jobs` at a time; no process does two, so that each one's peak memory is its own."""
    threads = max(1, torch.get_num_threads() // jobs)
    quiet = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # for the children, whose bars would overwrite each other
    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:  # each thread waits for one process
            futures = [pool.submit(_in_a_process, task, threads, number) for number, task in enumerate(work)]
            done = tqdm(concurrent.futures.as_completed(futures), total=len(work), desc="study", unit="run")
            try:
                return [reason for future in done if (reason := future.result())]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # runs that have not begun
                raise
    finally:
        os.environ.pop("TQDM_DISABLE")
        os.environ.update({} if quiet is None else {"TQDM_DISABLE": quiet})


def _in_a_process(task: tuple[Any, ...], threads: int, number: int) -> str | None:
    try:
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _prepare, (threads, number)
        ) as pool:
            return pool.submit(_one, *task).result()
    except concurrent.futures.process.BrokenProcessPool:
        return f"{task[0]}: its process was killed, perhaps for want of memory; fewer jobs need less."


def _prepare(threads: int, number: int) -> None:
    """What a child does first; the children take the GPUs in turn."""
    end_with_parent()
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())  # as torchrun says it
    torch.set_num_threads(threads)
    keep_freed_memory()


def _ended(run: Path) -> bool:
    """Whether a run has finished, or stopped on its own."""
    return (run / "result.json").exists() or (run / STOPPED).exists()


# --- The record -------------------------------------------------------------------------------------------------

DENSE = ("iteration", "loss", "matched", "step_size", "seconds", "skipped")
SPARSE = ("validation_accuracy", "probe_losses", "gradient_similarity", "accumulated_error")


def study_record(out: Path) -> dict[str, Any]:
    """Everything that the runs of a finished study wrote, small enough to commit.

    Returns:
        JSON values. `config` of the base; and for each of `runs` its `changes` of that configuration, its `metrics`
        (a list of values for what every iteration has, and of [iteration, value] for what only some have), `result`,
        and `evaluations`; or `stopped`, the reason why there is nothing but its changes.

    Raises:
        UserError: `out` holds no study, or one that is not finished.
    """
    with as_user_error(out / "study.json", "the description of a finished study"):
        return _gathered(out, read_json(out / "study.json"))


def _gathered(out: Path, description: dict[str, Any]) -> dict[str, Any]:
    runs = {}
    for name in description["runs"]:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{out / 'study.json'} names the run {name!r}, which is not below its folder.")
        finished = (out / name / "result.json").exists()
        if not (finished or (description.get("keep_stopped") and _ended(out / name))):
            raise UserError(f"{out} holds a study that is not finished: {name} is missing; run it again to finish.")
        config = read_json(out / name / "config.json")
        changes = {key: config[key] for key, value in description["config"].items() if config[key] != value}
        if description["config"].get("compiled") is None:  # each run decided by itself, which is no change
            changes.pop("compiled", None)
        if not finished:
            runs[name] = {"changes": changes, "stopped": read_json(out / name / STOPPED)["reason"]}
            continue
        result = read_json(out / name / "result.json")
        del result["metrics_sha256"]  # of lines that the record does not keep
        runs[name] = {
            "changes": changes,
            "metrics": _columns(read_metrics(out / name)),
            "result": result,
            "evaluations": [read_json(path)["accuracies"] for path in sorted((out / name).glob("evaluation-*.json"))],
        }
    return {**description, "runs": runs}


def _columns(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Metrics by name instead of by line, in six digits."""
    iterations = [line for line in lines if "loss" in line]
    dense = {key: [line[key] for line in iterations] for key in DENSE if key in iterations[0]}
    sparse = {key: [[line["iteration"], line[key]] for line in lines if key in line] for key in SPARSE}
    return _rounded({**dense, **{key: values for key, values in sparse.items() if values}})


def _rounded(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same JSON values with floats in six digits."""
    return json.loads(json.dumps(values), parse_float=lambda digits: float(f"{float(digits):.6g}"))


def lines_of(metrics: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """The lines that `metrics` of a record were made from, in order, as far as it keeps them."""
    lines: dict[int, dict[str, Any]] = {}
    for key in DENSE:
        for iteration, value in zip(metrics["iteration"], metrics.get(key, []), strict=False):
            lines.setdefault(iteration, {})[key] = value
    for key in SPARSE:
        for iteration, value in metrics.get(key, []):
            lines.setdefault(iteration, {"iteration": iteration})[key] = value
    return [lines[iteration] for iteration in sorted(lines)]
