"""Run folders: one process at a time, resuming, interruption, metrics, provenance, seeds.

A run folder belongs to one configuration. Asked for the same run again, it resumes or returns the finished
result; asked for another, it refuses; and so it does while another process works in it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cddlib.runtime.errors import UserError
from cddlib.runtime.files import seal, unseal, write_atomically, writing

# --- Run folders ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for this process alone, as long as the context lasts; the system unlocks it if the process dies.

    Raises:
        UserError: another process has it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, its locks do not outlive us in children
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{path.parent} is in use by another process, which holds {path.name}; wait until it ends, or choose "
                f"another folder."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield file


def refuse_other_run(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `UserError` if `folder` belongs to the configuration `found` and not to `wanted`."""
    details = [
        f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if details:
        raise UserError(f"{folder} holds another run ({'; '.join(details)}); choose another folder with --out.")


class Metrics:
    """Append-only `metrics.jsonl`: a line for every iteration from 0 on, JSON with a checksum."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Keep the lines up to `resume_at`, the iteration of the checkpoint, and drop what a killed run added.

        Raises:
            UserError: one of the kept lines is damaged or missing.
        """
        kept = _lines(path, resume_at) if resume_at >= 0 else []
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(kept)))
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, **values: Any) -> None:
        """Append one line."""
        with writing(self._path):
            self._file.write(json.dumps(seal(values)) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Have the lines on the disk before a checkpoint that relies on them."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a full disk, which the write has reported
            self._file.close()

    @staticmethod
    def read(path: Path, *, until: int) -> list[dict[str, Any]]:
        """The lines of iterations 0 … `until`; raises `UserError` if one of them is damaged or missing."""
        return [unseal(line, f"{path}, line {number},") for number, line in enumerate(_lines(path, until), start=1)]


def _lines(path: Path, until: int) -> list[bytes]:
    """The lines of iterations 0 … `until`, all of them checked."""
    lines = path.read_bytes().splitlines(keepends=True)[: until + 1] if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if unseal(line, f"{path}, line {number},").get("iteration") != number - 1:
            raise UserError(f"{path} is damaged: line {number} is not that of iteration {number - 1}.")
    if len(lines) <= until or not lines[until].endswith(b"\n"):
        raise UserError(f"{path} is damaged: it ends before iteration {until}.")
    return lines
