"""Studies: families of distillations that differ in one thing, run side by side and gathered in one record.

Every run has a folder of its own below the study's and resumes from it, so a study that was stopped goes on when it is
asked for again. `jobs` processes work on the runs, each with its share of the cores.
"""

import concurrent.futures.process
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from cddbook.probes import ProbeHook
from cddbook.records import STOPPED, study_record
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.loop import distill
from cddlib.evaluate import evaluate_run
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import distill_recipe
from cddlib.runtime.config import as_dict, field_types, replace
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.errors import Diverged, UserError, as_user_error, require
from cddlib.runtime.files import read_json, write_json
from cddlib.runtime.run_folder import locked, refuse_other_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A distillation, and what follows it."""

    distillation: DistillConfig = DistillConfig()
    probes: ProbeHook = ProbeHook()


def study_recipe(method: str = "contra", data: str = "digits", ipc: int = 1, **overrides: Any) -> StudyConfig:
    """The recipe of a distillation, with fields of `DistillConfig` and of `ProbeHook` as keywords."""
    probes = ProbeHook(**{name: overrides.pop(name) for name in field_types(ProbeHook) if name in overrides})
    return StudyConfig(distillation=distill_recipe(method, data, ipc, **overrides), probes=probes)


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
        own = {"seed": base.distillation.seed + replicate, "expert": expert, "probe_expert": expert}
        shared = replace(base, **own, segments=1, validate_every=0)
        folder = f"replicate-{replicate}"
        for start in base.probes.probe_starts:
            window = {"window_start": start, "window_end": start + 1, "window_end_initial": None}
            runs[f"{folder}/matched-{start:02d}"] = replace(shared, **window)
        control = replace(shared, similarity_every=iterations)
        runs[f"{folder}/sequential"] = control
        runs[f"{folder}/concurrent"] = replace(control, segments=len(base.probes.probe_starts))
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


def comparison_runs(
    base: StudyConfig, variants: Mapping[str, Mapping[str, Any]], seeds: int, experts: int
) -> dict[str, StudyConfig]:
    """Every variant with every seed, by name, at equal compute. Seed number r follows the probes of expert r (modulo).

    `base.iterations`, `validate_every`, `probe_every` and `expansion_iterations` count matched segments: a variant that
    matches k segments an iteration takes `iterations // k` iterations, and measures as often by compute. So does
    `error_every`; if it is 0, the accumulated error is measured at the start and at the end.
    """
    paced, pace = {}, base.distillation
    iterations, expansion = pace.schedule.iterations, pace.schedule.expansion_iterations
    for name, changes in variants.items():
        variant = replace(base, **changes)
        cost = variant.distillation.schedule.segments_in_all
        if iterations < cost:
            raise UserError(f"iterations is {iterations}; {name} matches {cost} segments an iteration.")
        paced[name] = replace(
            variant,
            iterations=iterations // cost,
            validate_every=-(-pace.validate_every // cost),
            probe_every=max(1, base.probes.probe_every // cost),
            expansion_iterations=max(1, expansion // cost),
            error_every=max(1, (base.probes.error_every or iterations) // cost),
        )
    runs = dict[str, StudyConfig]()
    for number in range(seeds):  # all variants of a seed first, so that what is done can be compared
        own = {"seed": pace.seed + number, "probe_expert": number % experts}
        runs |= {f"{name}/seed-{own['seed']}": replace(paced[name], **own) for name in variants}
    return runs


def search_runs(base: StudyConfig, grid: Mapping[str, Sequence[Any]], seeds: int) -> dict[str, StudyConfig]:
    """A run for every combination of the values in `grid` (by field) and every seed; it is judged on validation images.

    Raises:
        UserError: `base` never validates, so nothing would tell one setting from another.
    """
    if base.distillation.validate_every == 0:
        raise UserError("validate_every is 0; a search needs validations to choose by.")
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    named = {",".join(f"{field}={value}" for field, value in changes.items()): changes for changes in settings}
    numbers = range(base.distillation.seed, base.distillation.seed + seeds)
    return {f"{name}/seed-{n}": replace(base, **changes, seed=n) for name, changes in named.items() for n in numbers}


def settings_by_accuracy(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """What a search found: each setting's validation accuracies, one a seed, from the best mean to the worst.

    A run that stopped, because it diverged, counts as 0.
    """
    found: dict[str, list[float]] = {}
    for name, run in record["runs"].items():
        accuracy = 0.0 if "stopped" in run else run["result"]["validation_accuracy"]
        found.setdefault(name.split("/")[0], []).append(accuracy)
    return dict(sorted(found.items(), key=lambda entry: -statistics.fmean(entry[1])))


def run_study(
    base: StudyConfig,
    runs: Mapping[str, StudyConfig],
    buffer: Path,
    out: Path,
    *,
    networks: int = 0,
    baselines: bool = True,
    jobs: int = 0,
    keep_stopped: bool = False,
    root: Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Run, resume, or read every run, and return the study's record. A study grows when asked for more seeds.

    The runs have `base` in common; a run's folder is `out/name`. So many `networks` test each synthetic set, and with
    `baselines` as many random real and all training images too, once a seed; no two seeds share a network. `jobs`
    processes share the runs; with 0 they go on in this process, one after the other. With `keep_stopped` a run that
    began and stopped, because it diverged, is a result too.

    Raises:
        UserError: `out` holds another study or is in use, or some runs failed; the others are finished first.
    """
    require(0, jobs=jobs, networks=networks)
    if jobs > (cores := os.cpu_count() or 1):
        print(f"jobs is {jobs}; this machine has {cores} cores, so {cores} runs go on at a time.", file=sys.stderr)
        jobs = cores
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
                found = read_json(out / "study.json")
                refuse_other_run(out, _identity(found), _identity(description))
                description["runs"] = list(dict.fromkeys([*found["runs"], *runs]))
        write_json(out / "study.json", description)
        first = {config.distillation.seed: name for name, config in reversed(list(runs.items())) if baselines}
        task = functools.partial(_one, networks=networks, root=root, device=device)
        work = [
            functools.partial(task, name, config, buffer, out / name, first.get(config.distillation.seed) == name)
            for name, config in runs.items()
        ]
        failed = _failures(work, jobs)
        ended = [any((out / name / file).exists() for file in ("result.json", STOPPED)) for name in runs]
        if failed and not (keep_stopped and all(ended)):
            raise UserError(f"{len(failed)} of {len(runs)} runs failed, the others are finished: {'; '.join(failed)}")
    return study_record(out)


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    """What may not differ of a study's description, the configuration unfolded: all but the number of its seeds."""
    families = ", ".join(dict.fromkeys(name.split("/")[0] for name in description["runs"]))
    return {**description["config"], **description, "config": "", "runs": families}


def _one(
    name: str, config: StudyConfig, buffer: Path, out: Path, baselines: bool, *, networks: int, **where: Any
) -> str | None:
    """Do one run; returns why it failed."""
    try:
        distill(config.distillation, buffer, out, hooks=[config.probes], **where)
        if networks:
            seed = config.distillation.seed * networks
            evaluate_run(out, runs=networks, baselines=baselines, seed=seed, **where)
    except (UserError, OSError) as error:
        if isinstance(error, Diverged) and (out / "config.json").exists():  # it began, and no other machine mends it
            write_json(out / STOPPED, {"reason": str(error)})
        return f"{name}: {error}"
    return None


def _failures(work: Sequence[functools.partial[str | None]], jobs: int) -> list[str]:
    """Why runs failed, once all are done: one after the other here, or `jobs` at a time, each in a process of its own.

    No process does two, so that each one's peak memory is its own.
    """
    threads = itertools.repeat(torch.get_num_threads() // max(1, jobs) or 1)
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:  # each thread waits for one process
        done = pool.map(_in_a_process, work, threads, itertools.count()) if jobs else (task() for task in work)
        return [reason for reason in tqdm(done, desc="study", unit="run", total=len(work)) if reason]


def _in_a_process(task: functools.partial[str | None], threads: int, number: int) -> str | None:
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, context, _prepare, (threads, number)) as pool:
            return pool.submit(task).result()
    except concurrent.futures.process.BrokenProcessPool:
        return f"{task.args[0]}: its process was killed, perhaps for want of memory; fewer jobs need less."


def _prepare(threads: int, number: int) -> None:
    """What a child does first; the children take the GPUs in turn."""
    _end_with_parent()
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # the children's bars overwrite each other
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())  # as torchrun says it
    torch.set_num_threads(threads)
    keep_freed_memory()


def _end_with_parent() -> None:
    """Let this process end when the one that started it is killed, whatever it does then."""
    parent = cast(multiprocessing.process.BaseProcess, multiprocessing.parent_process())

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
