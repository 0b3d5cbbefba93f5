"""Run folders: the life of every long piece of work, and the lines that it writes on its way.

A run folder belongs to one configuration. Asked for the same run again, it resumes or returns the finished result;
asked for another, it refuses; and so it does while the same run is at work in it elsewhere.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, as_user_error
from cddlib.runtime.files import parse_json, read_json, write_atomically, writing


@contextlib.contextmanager
def at_work(lock: Path, unit: str) -> Iterator[Ranks]:
    """Within, the folder of `lock` is this work's alone, and the first signal lets it finish the `unit` that it is at.

    Yields:
        The processes that share the work; the first of them holds the lock, and writes.

    Raises:
        UserError: the folder is in use.
        Interrupted: see `Ranks.graceful_stop`.
    """
    ranks = Ranks()
    with locked(lock) if ranks.first else contextlib.nullcontext(), ranks.graceful_stop(unit):
        yield ranks


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, nothing else can lock `path`, in this process or in another; the system unlocks it if the process dies.

    A file system without locks keeps nobody apart.

    Raises:
        UserError: it is locked.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)  # a soft one outlives a killed process
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{path.parent} is in use: other work holds {path.name}; wait until it ends, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    try:
        yield
    finally:
        lock.release()


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
    """Append-only `metrics.jsonl`: a line of JSON for every iteration from 0 on.

    Whoever relies on the lines so far, a checkpoint or a result, keeps their `digest`.
    """

    def __init__(self, path: Path, *, resume_at: int, digest: str = "") -> None:
        """Go on after the line of iteration `resume_at` (-1: before the first), and drop what a killed run added.

        Raises:
            UserError: the lines up to there do not have the `digest`.
        """
        lines = _lines(path, resume_at + 1, digest) if resume_at >= 0 else []
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(lines)))
        self._path, self._hash = path, hashlib.sha256(b"".join(lines))
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, values: dict[str, Any]) -> None:
        """Append one line."""
        line = json.dumps(values) + "\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        self._hash.update(line.encode())

    def sync(self) -> str:
        """Have the lines on the disk before a file that relies on them; returns their digest."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a full disk, which the write has reported
            self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a finished run; raises `UserError` unless they are those that its result knows."""
    with as_user_error(folder / "result.json", "the result of a distillation"):
        digest = read_json(folder / "result.json")["metrics_sha256"]
    return parse_metrics(folder / "metrics.jsonl", digest)


def parse_metrics(path: Path, digest: str) -> list[dict[str, Any]]:
    """The lines of a file of metrics; raises `UserError` unless they have the `digest`."""
    return [parse_json(line, str(path)) for line in _lines(path, None, digest)]


def _lines(path: Path, number: int | None, digest: str) -> list[bytes]:
    """The first lines of a file, or all, checked."""
    lines = path.read_bytes().splitlines(keepends=True)[:number] if path.is_file() else []
    if hashlib.sha256(b"".join(lines)).hexdigest() != digest:
        raise UserError(f"{path} is damaged or missing: its lines are not those that were written.")
    return lines
