"""The book's studies on the command line: `python -m cddbook correlate | compare | search | record`."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from cddbook.records import collect, write_record
from cddbook.study import (
    Comparison,
    StudyConfig,
    comparison_runs,
    correlation_runs,
    parse_grid,
    remedies,
    run_study,
    search_runs,
    segment_counts,
    settings_by_accuracy,
    study_record,
)
from cddlib import cli
from cddlib.commands import Root
from cddlib.experts.buffer import Buffer


def correlate(
    *,
    config: Annotated[StudyConfig, tyro.conf.arg(name="")],
    buffer: Path,
    out: Path,
    replicates: int = 3,
    jobs: int = 0,
    root: Root = None,
    device: str = "auto",
) -> None:
    """Match one fixed segment at a time and follow the others' losses, as the paper's correlation study does.

    Args:
        config: What every run has in common; --probe-starts names the segments.
        buffer: Folder of the buffer whose experts are matched.
        out: Folder of the study; it resumes.
        replicates: Times that everything is repeated, each with a seed and an expert of its own.
        jobs: Processes that share the runs; 0 runs one after the other in this one.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    runs = correlation_runs(config, replicates, len(Buffer(buffer).experts))
    run_study(config, runs, buffer, out, jobs=jobs, root=root, device=device)
    print(f"{len(runs)} runs are finished; `python -m cddbook record {out} --to FILE` gathers them")


def compare(
    *,
    config: Annotated[StudyConfig, tyro.conf.arg(name="")],
    buffer: Path,
    out: Path,
    what: Comparison = "segments",
    counts: tuple[int, ...] = (1, 2, 4, 8),
    seeds: int = 3,
    networks: int = 3,
    jobs: int = 0,
    root: Root = None,
    device: str = "auto",
) -> None:
    """Compare segment counts, or remedies against forgetting, at equal compute.

    Args:
        config: What every run has in common. Iterations, and iterations between measurements, count matched segments.
        buffer: Folder of the buffer whose experts are matched.
        out: Folder of the study; it resumes.
        what: Segment counts, or the remedies against forgetting with --segments K.
        counts: The segment counts K that are compared.
        seeds: Distillations of each variant.
        networks: Networks that test each synthetic set.
        jobs: Processes that share the runs; 0 runs one after the other in this one.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    variants = segment_counts(counts) if what == "segments" else remedies(config.distillation.schedule.segments)
    runs = comparison_runs(config, variants, seeds)
    run_study(config, runs, buffer, out, networks=networks, jobs=jobs, root=root, device=device)
    print(f"{len(runs)} runs are finished; `python -m cddbook record {out} --to FILE` gathers them")


def search(
    *,
    config: Annotated[StudyConfig, tyro.conf.arg(name="")],
    buffer: Path,
    out: Path,
    vary: tuple[str, ...],
    seeds: int = 2,
    jobs: int = 0,
    root: Root = None,
    device: str = "auto",
) -> None:
    """Distil with every combination of some settings, and rank them by validation accuracy.

    Args:
        config: What every run has in common.
        buffer: Folder of the buffer whose experts are matched.
        out: Folder of the study; it resumes.
        vary: Fields with the values to try, as lr_images=10,30,100
        seeds: Distillations of each combination.
        jobs: Processes that share the runs; 0 runs one after the other in this one.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    runs = search_runs(config, parse_grid(vary), seeds)
    found = run_study(config, runs, buffer, out, jobs=jobs, keep_stopped=True, root=root, device=device)
    for reason in (run["stopped"] for run in found["runs"].values() if "stopped" in run):
        print(f"counted as 0 %: {reason}")
    for setting, accuracies in settings_by_accuracy(found).items():
        print(f"{100 * sum(accuracies) / len(accuracies):5.1f} %  {setting.replace(',', '  ')}")


def record(folder: tyro.conf.Positional[Path], *, to: Path) -> None:
    """Gather everything a finished run wrote about itself into one JSON record, as the book shows it.

    Args:
        folder: Folder of a buffer, a distillation, or a study.
        to: The record to write.
    """
    if (folder / "study.json").exists():
        write_record(to, study_record(folder), indent=None)
    else:
        write_record(to, collect(folder))
    print(f"wrote {to}")


DESCRIPTION = "The studies of the book: families of distillations, and the records that they leave."


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` give, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return cli.run("python -m cddbook", DESCRIPTION, _commands, arguments)


def _commands(arguments: list[str]) -> dict[str, Callable[..., None]]:
    """The commands by name, with the recipe that `arguments` choose as defaults."""
    recipe = StudyConfig(distillation=cli.chosen_recipe(cli.recipe_choices(arguments)))
    studies: dict[str, Callable[..., None]] = {"correlate": correlate, "compare": compare, "search": search}
    return {**{name: functools.partial(study, config=recipe) for name, study in studies.items()}, "record": record}


if __name__ == "__main__":
    sys.exit(main())
