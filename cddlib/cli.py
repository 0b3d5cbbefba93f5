"""The command line. `cddlib COMMAND --help` lists every option with its default for the chosen method and data."""

import argparse
import contextlib
import dataclasses
import functools
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
from cddlib.runtime.config import field_types
from cddlib.runtime.device import keep_freed_memory
from cddlib.runtime.distributed import Ranks, joined
from cddlib.runtime.errors import UserError, needing, out_of_memory_hint

DESCRIPTION = "Dataset distillation by concurrent trajectory matching. In order: data, buffer, distill, evaluate."

DIVIDED = ("buffer", "distill", "evaluate")
"""Commands that the processes of torchrun share."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` give, and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run("cddlib", DESCRIPTION, _commands, arguments)


def run(
    program: str,
    description: str,
    commands: Callable[[list[str]], dict[str, Callable[..., None]]],
    arguments: list[str],
) -> int:
    """Run the command that `arguments` name first; errors that a user can mend become a line and an exit code.

    Args:
        program: what the command line begins with.
        description: what `--help` says of it.
        commands: gives the functions by name, whose defaults may depend on the arguments.
        arguments: the words after the program.
    """
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
            flat = (tyro.conf.OmitArgPrefixes,)
            tyro.extras.subcommand_cli_from_dict(
                functions, prog=program, args=arguments, description=description, config=flat
            )
    except UserError as error:
        print(f"cddlib: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cddlib: {error}; what was finished before is kept, and the same command resumes.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\ncddlib: {str(stop) or 'interrupted'}; the same command resumes.", file=sys.stderr)
        return 128 + getattr(stop, "number", signal.SIGINT)
    return 0


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
    command = arguments[0] if arguments else ""
    if Ranks().count > 1 and command not in DIVIDED:
        raise UserError(f"`{command}` is not divided among processes; torchrun is for {', '.join(DIVIDED)}.")
    if command in ("plan", "distill", "import-set"):
        functions[command] = functools.partial(functions[command], config=chosen_recipe(recipe_choices(arguments)))
    elif command in ("buffer", "import-buffer"):
        recipe = chosen_buffer_recipe(recipe_choices(arguments))
        if command == "import-buffer":  # the published codes hold no images out
            recipe = dataclasses.replace(recipe, holdout=False)
        functions[command] = functools.partial(functions[command], config=recipe)
    return functions


def recipe_choices(arguments: list[str]) -> dict[str, Any]:
    """The options that choose a recipe, read ahead of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, kind in (("method", str), ("data", str), ("buffer", Path), ("ipc", int), ("segments", int)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    try:
        return vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return {}  # tyro says what is wrong


def chosen_buffer_recipe(chosen: dict[str, Any]) -> BufferConfig:
    """How the chosen method trains experts."""
    return buffer_recipe(**{name: chosen[name] for name in chosen.keys() & {"method", "data", "ipc"}})


def chosen_recipe(chosen: dict[str, Any]) -> DistillConfig:
    """The recipe, on the network, pixels and augmentation of the buffer's experts."""
    folder = chosen.pop("buffer", None)
    if folder is None:
        return distill_recipe(**chosen)
    experts = Buffer(folder).config
    fields = [name for section in (NetworkConfig, AugmentConfig, DataConfig) for name in field_types(section)]
    return distill_recipe(**{**{name: experts[name] for name in fields}, **chosen})
