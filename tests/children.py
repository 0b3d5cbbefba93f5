"""Processes that a test may stop, starve or kill.

They are forked, in milliseconds, from a server that has imported cddlib but computed nothing; each runs one command
line of cddlib and exits with its code. A *setting* is a function that a child calls before.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cddlib.cli", "cddlib.commands", "torchvision.transforms.v2", "sklearn.datasets"])

Setting = Callable[[], object]

STUDIES = ("correlate", "compare", "search", "record")
"""Commands of `python -m cddbook`."""


class Child:
    """A command line of cddlib in a process of its own."""

    def __init__(self, arguments: list[Any], log: Path, *settings: Setting) -> None:
        """Start it; what it says goes to `log`."""
        self.log = log
        self.process = CONTEXT.Process(target=_main, args=([str(a) for a in arguments], log, settings))
        self.process.start()

    def signal(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        with contextlib.suppress(ProcessLookupError):  # it ends just now
            if self.process.is_alive():
                os.kill(self.process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, as a shell would say it."""
        self.process.join(seconds)
        assert not self.process.is_alive(), f"still running after {seconds} s: {self.said}"
        code = self.process.exitcode
        self.process.close()
        return 128 - code if code < 0 else code

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> bool:
        """Whether something came to be so before the process ended."""
        end = time.monotonic() + seconds
        while self.process.is_alive():
            if condition():
                return True
            assert time.monotonic() < end, f"it did not come to that: {self.said}"
            time.sleep(0.001)
        return False

    def heeds(self) -> bool:
        """Whether it would finish something before it obeyed a SIGTERM."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:  # it has ended
            return False
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text() if self.log.exists() else ""


def main(arguments: list[str]) -> int:
    """The exit code of a command of the library, or of a study of the book."""
    import cddbook.__main__
    import cddlib.cli

    program = cddbook.__main__ if arguments[:1] and arguments[0] in STUDIES else cddlib.cli
    return program.main(arguments)


def exit_code(*arguments: object) -> int:
    """The exit code of `main`, also where the parser itself exits."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code


def run(arguments: list[Any], log: Path, *settings: Setting) -> tuple[int, str]:
    """The exit code and the output of a command line."""
    child = Child(arguments, log, *settings)
    return child.wait(), child.said


def _main(arguments: list[str], log: Path, settings: tuple[Setting, ...]) -> None:
    """What a child does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    multiprocessing.set_start_method("fork", force=True)  # for its own children
    torch.set_num_threads(1)
    for setting in settings:
        setting()
    sys.exit(main(arguments))


# --- Settings ---------------------------------------------------------------------------------------------------


def patch(values: Mapping[str, Any]) -> None:
    """Give attributes, named as `module.attribute`, other values."""
    for name, value in values.items():
        module, attribute = name.rsplit(".", 1)
        setattr(importlib.import_module(module), attribute, value)


def on_operations(folder: Path, then: Callable[[str], object]) -> None:
    """Call `then` before each operation on a file in `folder`, with the name of that file."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.split(".")[0] in ("open", "os", "shutil"):
            paths = [str(a) for a in arguments if isinstance(a, (str, os.PathLike)) and str(a).startswith(str(folder))]
            if paths:
                then(paths[-1])

    sys.addaudithook(hook)


def at_operation(folder: Path, number: int, action: Callable[[], object]) -> None:
    """Do something before the `number`-th operation on files in `folder`."""
    numbers = itertools.count(1)
    on_operations(folder, lambda _name: action() if next(numbers) == number else None)


def note_operations(folder: Path, notes: Path) -> None:
    """Write a line for each operation on files in `folder`."""
    file = os.open(notes, os.O_WRONLY | os.O_CREAT)
    on_operations(folder, lambda name: os.write(file, f"{name}\n".encode()))


def die() -> None:
    """End as if there had never been a process."""
    os.kill(os.getpid(), signal.SIGKILL)
