"""The command line. `cddlib COMMAND --help` lists every option with its default for the chosen method and data."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from cddlib.augment import AugmentConfig
from cddlib.buffer import BufferConfig, train_buffer
from cddlib.data import DataConfig, default_root, prepare
from cddlib.distill import DistillConfig, distill
from cddlib.evaluate import evaluate_run
from cddlib.networks import NetworkConfig, parameter_count
from cddlib.recipes import buffer_recipe, distill_recipe
from cddlib.runs import UserError, collect, from_dict, read_json, write_json
from cddlib.trajectory import Buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Machine:
    """Where to run."""

    root: Path | None = None
    """Folder of the data sets; without it $CDDLIB_DATA, else the user's cache folder."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda, cuda:1 …"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCommand:
    """Prepare a data set: download it, or read it from a folder, into one tensor file."""

    name: tyro.conf.Positional[str]
    """fashion_mnist, cifar10, cifar100, tiny_imagenet or imagefolder; digits needs nothing."""
    root: Path | None = None
    """Folder for the data sets; without it $CDDLIB_DATA, else the user's cache folder."""
    source: Path | None = None
    """A folder that holds train/ and val/, for tiny_imagenet and imagefolder."""
    size: int = 64
    """Pixels of a side, for imagefolder."""

    def run(self) -> None:
        """Prepare."""
        path = prepare(self.name, self.root or default_root(), source=self.source, size=self.size)
        print(f"{self.name} is ready in {path}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferCommand(_Machine, BufferConfig):
    """Train experts on real data and keep their parameters after every epoch."""

    out: Path
    """Folder of the buffer."""

    def run(self) -> None:
        """Train what is missing."""
        buffer = train_buffer(from_dict(BufferConfig, vars(self)), self.out, root=self.root, device=self.device)
        tests = [expert["test_accuracy"] for expert in buffer.experts]
        print(
            f"{len(tests)} experts of {buffer.epochs} epochs and {parameter_count(buffer.network):,} parameters in "
            f"{self.out}; test accuracy {min(tests):.1%} to {max(tests):.1%}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillCommand(_Machine, DistillConfig):
    """Distil a data set by matching K segments of the experts' trajectories at once."""

    buffer: Path
    """Folder of the buffer whose experts are matched."""
    out: Path
    """Folder of the run; it resumes, or returns the finished result."""

    def run(self) -> None:
        """Distil, or resume."""
        config = from_dict(DistillConfig, vars(self))
        distill(config, self.buffer, self.out, root=self.root, device=self.device)
        result = read_json(self.out / "result.json")
        accuracy = result["validation_accuracy"]
        measured = "" if accuracy is None else f" (validation accuracy {accuracy:.1%})"
        print(
            f"{self.method}, K = {self.segments}, {self.ipc} images per class: iteration "
            f"{result['selected_iteration']} of {self.iterations} selected{measured}, "
            f"{result['seconds']:.0f} s; the synthetic set is {self.out / 'synthetic.safetensors'}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateCommand(_Machine):
    """Train networks from scratch on a synthetic set and on baselines, and test them on real images."""

    folder: tyro.conf.Positional[Path]
    """Folder of a finished distillation."""
    runs: int = 5
    """Networks R trained on each set."""
    baselines: bool = True
    """Also train on random real images of the same number, and on all training images for as many steps."""
    seed: int = 0
    """Seed of the first network; network i has seed + i."""

    def run(self) -> None:
        """Evaluate and print a table."""
        record = evaluate_run(
            self.folder,
            runs=self.runs,
            baselines=self.baselines,
            root=self.root,
            device=self.device,
            seed=self.seed,
        )
        names = {
            "synthetic": "synthetic set",
            "random_real": "random real images",
            "full": "all training images",
        }
        for key, summary in record["summary"].items():
            spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
            print(f"{names[key]:20} {100 * summary['mean']:5.1f}{spread} % ({summary['runs']} networks)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordCommand:
    """Gather everything a finished run wrote about itself into one JSON record, as the book shows it."""

    folder: tyro.conf.Positional[Path]
    """Folder of a buffer or a distillation."""
    to: Path
    """The record to write."""

    def run(self) -> None:
        """Write the record."""
        write_json(self.to, collect(self.folder))
        print(f"wrote {self.to}")


def main(arguments: list[str] | None = None) -> int:
    """Parse `arguments`, run the command, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _parse(arguments).run()
    except UserError as error:
        print(f"cddlib: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"cddlib: {error}; what was finished before is kept, and the same command resumes.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\ncddlib: interrupted; the same command resumes.", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: list[str]) -> Any:
    """The command, with defaults from the recipe that its --method, --data, --ipc and --segments name."""
    chosen = _choices(arguments)
    missing: Any = tyro.MISSING
    buffer = distillation = None
    if arguments[:1] == ["buffer"]:
        experts = buffer_recipe(chosen.get("data", "digits"))
        buffer = BufferCommand(**dataclasses.asdict(experts), out=missing)
    elif arguments[:1] == ["distill"]:
        recipe = _distill_recipe(chosen)
        distillation = DistillCommand(**dataclasses.asdict(recipe), buffer=missing, out=missing)

    def command(name: str, default: Any = None) -> Any:
        return tyro.conf.subcommand(name) if default is None else tyro.conf.subcommand(name, default=default)

    commands = (
        Annotated[DataCommand, command("data")]
        | Annotated[BufferCommand, command("buffer", buffer)]
        | Annotated[DistillCommand, command("distill", distillation)]
        | Annotated[EvaluateCommand, command("evaluate")]
        | Annotated[RecordCommand, command("record")]
    )
    return tyro.cli(
        commands,
        prog="cddlib",
        args=arguments,
        description="Dataset distillation by concurrent trajectory matching. Typical order: data, buffer, distill, "
        "evaluate.",
    )


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
