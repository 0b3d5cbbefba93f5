"""The command line. `cddlib COMMAND --help` lists every option with its default for the chosen method and data."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from cddlib.augment import AugmentConfig
from cddlib.buffer import BufferConfig, train_buffer
from cddlib.data import DataConfig, prepare
from cddlib.distill import DistillConfig, distill
from cddlib.evaluate import evaluate_run
from cddlib.networks import NetworkConfig, parameter_count
from cddlib.recipes import buffer_recipe, distill_recipe
from cddlib.runs import UserError, collect, keep_freed_memory, read_json, write_json
from cddlib.study import (
    Comparison,
    comparison_runs,
    correlation_runs,
    remedies,
    run_study,
    segment_counts,
    study_record,
)
from cddlib.trajectory import Buffer

Root = Path | None
"""Folder of the data sets; None is `cddlib.data.default_root()`."""


def data(name: tyro.conf.Positional[str], *, root: Root = None, source: Path | None = None, size: int = 64) -> None:
    """Prepare a data set: download it, or read it from a folder, into one tensor file.

    Args:
        name: fashion_mnist, cifar10, cifar100, tiny_imagenet or imagefolder; digits needs nothing.
        root: Folder for the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        source: A folder that holds train/ and val/, for tiny_imagenet and imagefolder.
        size: Pixels of a side, for imagefolder.
    """
    print(f"{name} is ready in {prepare(name, root, source=source, size=size)}")


def buffer(
    *, config: Annotated[BufferConfig, tyro.conf.arg(name="")], out: Path, root: Root = None, device: str = "auto"
) -> None:
    """Train experts on real data and keep their parameters after every epoch.

    Args:
        config: How experts are trained.
        out: Folder of the buffer.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    trained = train_buffer(config, out, root=root, device=device)
    tests = [expert["test_accuracy"] for expert in trained.experts]
    print(
        f"{len(tests)} experts of {trained.epochs} epochs and {parameter_count(trained.network):,} parameters in "
        f"{out}; test accuracy {min(tests):.1%} to {max(tests):.1%}"
    )


def distill_data(
    *,
    config: Annotated[DistillConfig, tyro.conf.arg(name="")],
    buffer: Path,
    out: Path,
    root: Root = None,
    device: str = "auto",
) -> None:
    """Distil a data set by matching K segments of the experts' trajectories at once.

    Args:
        config: The distillation.
        buffer: Folder of the buffer whose experts are matched.
        out: Folder of the run; it resumes, or returns the finished result.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    distill(config, buffer, out, root=root, device=device)
    result = read_json(out / "result.json")
    accuracy = result["validation_accuracy"]
    measured = "" if accuracy is None else f" (validation accuracy {accuracy:.1%})"
    print(
        f"{config.method}, K = {config.segments}, {config.ipc} images per class: iteration "
        f"{result['selected_iteration']} of {config.iterations} selected{measured}, {result['iterations_skipped']} "
        f"skipped, {result['seconds']:.0f} s; the synthetic set is {out / 'synthetic.safetensors'}"
    )


def evaluate(
    folder: tyro.conf.Positional[Path],
    *,
    runs: int = 5,
    baselines: bool = True,
    seed: int = 0,
    root: Root = None,
    device: str = "auto",
) -> None:
    """Train networks from scratch on a synthetic set and on baselines, and test them on real images.

    Args:
        folder: Folder of a finished distillation.
        runs: Networks R trained on each set.
        baselines: Also train on random real images of the same number, and on all training images for as many steps.
        seed: Seed of the first network; network i has seed + i.
        root: Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …
    """
    record = evaluate_run(folder, runs=runs, baselines=baselines, root=root, device=device, seed=seed)
    names = {"synthetic": "synthetic set", "random_real": "random real images", "full": "all training images"}
    for key, summary in record["summary"].items():
        spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
        print(f"{names[key]:20} {100 * summary['mean']:5.1f}{spread} % ({summary['runs']} networks)")


def correlate(
    *,
    config: Annotated[DistillConfig, tyro.conf.arg(name="")],
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
    print(f"{len(runs)} runs are finished; `cddlib record {out} --to FILE` gathers them")


def compare(
    *,
    config: Annotated[DistillConfig, tyro.conf.arg(name="")],
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
    variants = segment_counts(counts) if what == "segments" else remedies(config.segments)
    runs = comparison_runs(config, variants, seeds)
    run_study(config, runs, buffer, out, networks=networks, jobs=jobs, root=root, device=device)
    print(f"{len(runs)} runs are finished; `cddlib record {out} --to FILE` gathers them")


def record(folder: tyro.conf.Positional[Path], *, to: Path) -> None:
    """Gather everything a finished run wrote about itself into one JSON record, as the book shows it.

    Args:
        folder: Folder of a buffer, a distillation, or a study.
        to: The record to write.
    """
    if (folder / "study.json").exists():
        write_json(to, study_record(folder), indent=None)
    else:
        write_json(to, collect(folder))
    print(f"wrote {to}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` give, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    try:
        chosen = _choices(arguments)
        recipe = _distill_recipe(chosen if arguments[:1] in (["distill"], ["correlate"], ["compare"]) else {})
        commands: dict[str, Callable[..., None]] = {
            "data": data,
            "buffer": functools.partial(buffer, config=buffer_recipe(chosen.get("data", "digits"))),
            "distill": functools.partial(distill_data, config=recipe),
            "evaluate": evaluate,
            "correlate": functools.partial(correlate, config=recipe),
            "compare": functools.partial(compare, config=recipe),
            "record": record,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="cddlib",
            args=arguments,
            description="Dataset distillation by concurrent trajectory matching. "
            "In order: data, buffer, distill, evaluate; correlate and compare are the book's studies.",
        )
    except UserError as error:
        print(f"cddlib: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cddlib: {error}; what was finished before is kept, and the same command resumes.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncddlib: interrupted; the same command resumes.", file=sys.stderr)
        return 130
    return 0


def _choices(arguments: list[str]) -> dict[str, Any]:
    """The options that choose a recipe, read ahead of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("method", "data", "buffer", "ipc", "segments"):
        parser.add_argument(f"--{name}")
    try:
        found = {key: value for key, value in vars(parser.parse_known_args(arguments)[0]).items() if value}
        return {key: int(value) if key in ("ipc", "segments") else value for key, value in found.items()}
    except (argparse.ArgumentError, ValueError):
        return {}  # tyro says what is wrong


def _distill_recipe(chosen: dict[str, Any]) -> DistillConfig:
    """The recipe, on the network, pixels and augmentation of the buffer's experts."""
    folder = chosen.pop("buffer", None)
    if folder is None:
        return distill_recipe(**chosen)
    experts = Buffer(Path(folder)).config
    chosen.setdefault("data", experts["data"])
    fields = [field.name for base in (NetworkConfig, AugmentConfig, DataConfig) for field in dataclasses.fields(base)]
    return distill_recipe(**{**{name: experts[name] for name in fields}, **chosen})


if __name__ == "__main__":
    sys.exit(main())
