"""The book's studies on the command line: `python -m cddbook correlate | compare | search | record`."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cddbook import study
from cddbook.records import collect, read_record, study_record, write_record
from cddlib import cli
from cddlib.commands import Device, Root
from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import parse_value
from cddlib.runtime.config import field_types
from cddlib.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study finds its experts and its data, where it writes, and what it runs on."""

    buffer: Path
    """Folder of the buffer whose experts are matched."""
    out: Path
    """Folder of the study; it resumes."""
    jobs: int = 0
    """Processes that share the runs; 0 runs one after the other in this one."""
    root: Root = None
    device: Device = "auto"


Config = Annotated[study.StudyConfig, tyro.conf.arg(name="")]
At = Annotated[Place, tyro.conf.arg(name="")]


def correlate(*, config: Config, place: At, replicates: int = 3) -> None:
    """Match one fixed segment at a time and follow the others' losses, as the paper's correlation study does.

    Args:
        config: What every run has in common; --probe-starts names the segments.
        place: Folders and device.
        replicates: Times that everything is repeated, each with a seed and an expert of its own.
    """
    runs = study.correlation_runs(config, replicates, len(Buffer(place.buffer).experts))
    _run(config, runs, place)


def compare(
    *,
    config: Config,
    place: At,
    what: Literal["segments", "remedies"] = "segments",
    counts: tuple[int, ...] = (1, 2, 4, 8),
    seeds: int = 3,
    networks: int = 3,
    baselines: bool = True,
    change: tuple[str, ...] = (),
) -> None:
    """Compare segment counts, or remedies against forgetting, at equal compute.

    Args:
        config: What every run has in common. Iterations, and iterations between measurements, count matched segments.
        place: Folders and device.
        what: Segment counts, or the remedies against forgetting with --segments K.
        counts: The segment counts K that are compared.
        seeds: Distillations of each variant, each with the probes of another expert.
        networks: Networks that test each synthetic set.
        baselines: Once a seed, as many networks also learn random real and all training images.
        change: Fields of single variants, as K=4.lr_images=100 or ewc.consolidation_strength=10
    """
    segments = config.distillation.schedule.segments
    variants = study.segment_counts(counts) if what == "segments" else study.remedies(segments)
    for text in change:
        name, _, setting = text.partition(".")
        if name not in variants:
            raise UserError(f"{text!r} changes none of the variants {', '.join(variants)}.")
        variants[name] |= {field: values[-1] for field, values in parse_grid([setting]).items()}
    runs = study.comparison_runs(config, variants, seeds, len(Buffer(place.buffer).experts))
    _run(config, runs, place, networks=networks, baselines=baselines)


def _run(config: study.StudyConfig, runs: dict[str, study.StudyConfig], place: Place, **tests: Any) -> None:
    study.run_study(config, runs, **tests, **vars(place))
    print(f"{len(runs)} runs are finished; `python -m cddbook record {place.out} --to FILE` gathers them")


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
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


def search(*, config: Config, place: At, vary: tuple[str, ...], seeds: int = 2) -> None:
    """Distil with every combination of some settings, and rank them by validation accuracy.

    Args:
        config: What every run has in common.
        place: Folders and device.
        vary: Fields with the values to try, as lr_images=10,30,100
        seeds: Distillations of each combination.
    """
    runs = study.search_runs(config, parse_grid(vary), seeds)
    found = study.run_study(config, runs, keep_stopped=True, **vars(place))
    for reason in (run["stopped"] for run in found["runs"].values() if "stopped" in run):
        print(f"counted as 0 %: {reason}")
    for setting, accuracies in study.settings_by_accuracy(found).items():
        print(f"{100 * sum(accuracies) / len(accuracies):5.1f} %  {setting.replace(',', '  ')}")


def record(folder: tyro.conf.Positional[Path], *, to: Path) -> None:
    """Gather everything a finished run wrote about itself into one JSON record, as the book shows it.

    Args:
        folder: Folder of a buffer, a distillation, or a study.
        to: The record to write.
    """
    earlier = read_record(to) if to.exists() else {"runs": {}}
    if not isinstance(earlier, dict) or not earlier.keys() & {"runs", "result"}:
        raise UserError(f"{to} exists and is not a record of a run; choose another file.")
    is_study = (folder / "study.json").exists()
    write_record(to, study_record(folder) if is_study else collect(folder), indent=None if is_study else 1)
    print(f"wrote {to}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` give, and return the exit code."""
    description = "The studies of the book: families of distillations, and the records that they leave."
    return cli.run("python -m cddbook", description, _commands, arguments)


def _commands(arguments: list[str]) -> dict[str, Callable[..., None]]:
    """The commands by name, with the recipe that `arguments` choose as defaults."""
    recipe = study.StudyConfig(distillation=cli.chosen_recipe(cli.recipe_choices(arguments)))
    studies: dict[str, Callable[..., None]] = {"correlate": correlate, "compare": compare, "search": search}
    return {name: functools.partial(command, config=recipe) for name, command in studies.items()} | {"record": record}


if __name__ == "__main__":
    sys.exit(main())
