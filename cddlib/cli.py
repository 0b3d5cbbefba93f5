"""The command line. `cddlib COMMAND --help` lists every option with its default for the chosen method and data."""

import argparse
import contextlib
import difflib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cddlib.data.augment import AugmentConfig
from cddlib.data.dataset import DataConfig
from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.methods.recipes import buffer_recipe, distill_recipe
from cddlib.networks.convnet import NetworkConfig
from cddlib.runtime.config import field_types, replace
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.distributed import Ranks, joined
from cddlib.runtime.errors import UserError, needing, out_of_memory_hint

DESCRIPTION = "Dataset distillation by concurrent trajectory matching. In order: data, buffer, distill, evaluate."

DIVIDED = ("buffer", "distill", "evaluate")
"""Commands that the processes of torchrun share."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` give, and return the exit code."""
    return run("cddlib", DESCRIPTION, _commands, arguments)


def run(
    program: str,
    description: str,
    commands: Callable[[list[str]], dict[str, Callable[..., None]]],
    arguments: list[str] | None,
) -> int:
    """Run the command that `arguments` name first; errors that a user can mend become a line and an exit code.

    Args:
        program: what the command line begins with.
        description: what `--help` says of it.
        commands: gives the functions by name, whose defaults may depend on the arguments.
        arguments: the words after the program; None for those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    tqdm.monitor_interval = 0  # no thread that watches the bars: where memory is short, its start may never return
    try:
        with (
            out_of_memory_hint("the batches, --ipc or --width"),
            joined(),
            contextlib.redirect_stdout(None) if Ranks().rank else contextlib.nullcontext(),
        ):
            with needing("the command line", "tyro"):
                import tyro
            functions = commands(arguments)
            if arguments and not arguments[0].startswith("-") and arguments[0] not in functions:
                near = difflib.get_close_matches(arguments[0], functions, 1) or [", ".join(functions)]
                raise UserError(f"there is no command {arguments[0]!r}; did you mean {near[0]}?")
            flat = (tyro.conf.OmitArgPrefixes,)
            with _numbers():
                tyro.extras.subcommand_cli_from_dict(
                    functions, prog=program, args=arguments, description=description, config=flat
                )
    except UserError as error:
        print(f"cddlib: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"cddlib: {error}; what was finished before is kept, and the same command resumes.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\ncddlib: {str(stop) or 'interrupted'}; the same command resumes.", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0


def _numbers() -> Any:
    """Within, tyro says in plain words that something is no number."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _rule(info: Any) -> Any:
        kind = info.type
        if kind not in (int, float):
            return None

        def parse(words: list[str]) -> Any:
            try:
                return kind(words[0])
            except ValueError:
                raise ValueError(f"{words[0]!r} is not a {'whole ' if kind is int else ''}number") from None

        is_instance = (int, float) if kind is float else int
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, is_instance),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _commands(arguments: list[str]) -> dict[str, Callable[..., None]]:
    """The commands by name; the one that `arguments` name first has as default the recipe that they choose."""
    from cddlib import commands

    functions: dict[str, Callable[..., None]] = {
        "data": commands.data,
        "recipes": commands.recipes,
        "plan": commands.plan_run,
        "buffer": commands.buffer,
        "distill": commands.distill_data,
        "evaluate": commands.evaluate,
        "verify": commands.verify_run,
        "export": commands.export,
        "import-buffer": commands.import_experts,
        "import-set": commands.import_images,
    }
    command, arguments = arguments[0] if arguments else "", _dashed(arguments)
    if Ranks().count > 1 and command not in DIVIDED:
        raise UserError(f"`{command}` is not divided among processes; torchrun is for {', '.join(DIVIDED)}.")
    if command.startswith("import-") and not {"--zca", "--no-zca", "--help", "-h"} & {*arguments}:
        raise UserError("the files do not say whether their images are whitened; give --zca or --no-zca.")
    chosen = recipe_choices(arguments)
    if command in ("plan", "distill", "import-set"):
        imported = {"method": "mtt"} if command == "import-set" else {}
        functions[command] = functools.partial(functions[command], config=chosen_recipe(imported | chosen))
    elif command in ("buffer", "import-buffer"):
        held_out = {"holdout": False} if command == "import-buffer" else {}  # the published codes hold no images out
        functions[command] = functools.partial(functions[command], config=chosen_buffer_recipe(held_out | chosen))
    return functions


def recipe_choices(arguments: list[str]) -> dict[str, Any]:
    """The options that choose a recipe, and its window, read ahead of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--convex", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    numbers, words = ("ipc", "segments", "window-start", "window-end", "expert-epochs"), ("method", "data")
    for name, kind in [*((name, int) for name in numbers), *((name, str) for name in words), ("buffer", Path)]:
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    try:
        return vars(parser.parse_known_args(_dashed(arguments))[0])
    except argparse.ArgumentError:
        return {}  # tyro says what is wrong


def _dashed(arguments: list[str]) -> list[str]:
    """The arguments with - for _ in the options' names, which tyro takes too."""
    return [re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), word) for word in arguments]


def chosen_buffer_recipe(chosen: dict[str, Any]) -> BufferConfig:
    """How the chosen method trains experts."""
    return buffer_recipe(**{name: chosen[name] for name in chosen.keys() & {"method", "data", "ipc", "holdout"}})


def chosen_recipe(chosen: dict[str, Any]) -> DistillConfig:
    """The recipe, on the network, pixels and augmentation of the buffer's experts, and in a window that they reach."""
    folder = chosen.pop("buffer", None)
    if folder is None:
        return distill_recipe(**chosen)
    buffer = Buffer(folder)
    fields = [name for section in (NetworkConfig, AugmentConfig, DataConfig) for name in field_types(section)]
    recipe = distill_recipe(**{**{name: buffer.config[name] for name in fields}, **chosen})
    schedule, end = recipe.schedule, recipe.schedule.latest_end(buffer.epochs)
    if "window_end" in chosen or not schedule.window_start < end < schedule.window_end:
        return recipe
    print(f"The window ends at epoch {end}, because the experts stop at epoch {buffer.epochs}.", file=sys.stderr)
    first_end = schedule.window_end_initial
    return replace(recipe, window_end=end, window_end_initial=None if first_end is None else min(first_end, end))
