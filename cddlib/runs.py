"""Run folders: one process at a time, resuming, interruption, metrics, provenance, seeds.

A run folder belongs to one configuration. Asked for the same run again, it resumes or returns the finished
result; asked for another, it refuses; and so it does while another process works in it.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import reprlib
import resource
import subprocess
import sys
import threading
import time
import types
import typing
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import psutil
import torch
from torch import Tensor

from cddlib.files import UserError, expecting, is_want_of_memory, read_json, seal, unseal, write_atomically, writing

T = TypeVar("T")

CGROUP = Path("/sys/fs/cgroup")


# --- Seeds ------------------------------------------------------------------------------------------------------


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator seeded by the hash of `keys`, for example ``generator(seed, "expert", 3)``.

    Each piece of work takes a stream named after itself, so no result depends on what ran before it: an interrupted
    run needs no saved random state, and a draw is the same on every device.
    """
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# --- Devices ----------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """`auto` is this process's GPU if there is one, else the CPU; raises `UserError` for a device that is not here."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        process, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()  # torchrun's, one a GPU
        if process >= here:
            raise UserError(
                f"torchrun started process {process} of this machine, counted from 0, but it has {here} GPUs; give "
                f"--nproc-per-node {here}, or --device cpu."
            )
        return torch.device("cuda", process)
    if name == "auto":
        return torch.device("cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}); use 'cpu' or 'auto'."
        ) from None
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; or on the machine, as far as the container leaves them to its processes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free, limit = psutil.virtual_memory().available, CGROUP / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int((CGROUP / "memory.current").read_text()))
    return max(0, free)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a CUDA device gets it from the CPU while the CPU goes on."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Ask glibc, for the whole process, to keep freed memory for the next allocation.

    Every operation on the CPU allocates its result, and giving pages back to the system only to ask for them again
    takes time. The command line calls this; a program that uses the library may.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            ctypes.CDLL(None).mallopt(parameter, value)


@contextlib.contextmanager
def memory_advice(settings: str) -> Iterator[None]:
    """Turn a want of memory inside into a `UserError` that names the `settings` to lower; also a decorator."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_want_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is not enough memory ({reason}); lower {settings}, in another folder, or go on with the same "
            f"command where there is more: what was saved is kept."
        ) from None


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed, whatever it does then."""
    parent = cast(multiprocessing.process.BaseProcess, multiprocessing.parent_process())

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The `config_type` among the JSON `values`, which may hold more.

    Raises:
        KeyError: a field is missing.
        TypeError: a field has a value of another type.
    """
    found = {field.name: values[field.name] for field in dataclasses.fields(cast(Any, config_type))}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}  # JSON has lists
    check_types(config_type, found)
    return config_type(**found)


def check_types(config_type: type, values: dict[str, Any]) -> None:
    """Raise `TypeError` for a value that the field of its name in `config_type` cannot have."""
    kinds = _kinds(config_type)
    for name in values.keys() & kinds.keys():
        if not _fits(values[name], kinds[name]):
            kind = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name]).removeprefix("typing.")
            raise TypeError(f"{name} is {reprlib.repr(values[name])}, which is not of type {kind}")


_kinds = functools.cache(typing.get_type_hints)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a configuration's field of type `kind` can have a value."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in parts
    if origin is types.UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        several = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(several) and all(map(_fits, value, several))
    if type(value) is int:  # which a bool is not
        return kind in (int, float) and abs(value) < 2**63
    return type(value) is kind


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


def collect(folder: Path) -> dict[str, Any]:
    """Everything a finished run wrote about itself: configuration, result, metrics, evaluations.

    Raises:
        UserError: `folder` holds no finished run.
    """
    named = {name: folder / f"{name}.json" for name in ("buffer", "config", "result")}
    if not named["result"].exists():
        raise UserError(f"{folder} holds no finished run: result.json is missing.")
    record: dict[str, Any] = {name: read_json(path) for name, path in named.items() if path.exists()}
    if (folder / "metrics.jsonl").exists():
        with expecting(folder / "config.json", "a distillation's configuration"):
            iterations = record["config"]["iterations"]
            if type(iterations) is not int or iterations < 0:
                raise TypeError(f"iterations is {reprlib.repr(iterations)}")
        record["metrics"] = Metrics.read(folder / "metrics.jsonl", until=iterations)
        record["evaluations"] = [read_json(path) for path in sorted(folder.glob("evaluation-*.json"))]
    return record


# --- Provenance -------------------------------------------------------------------------------------------------


def _commit() -> str | None:
    """The commit of the checkout that holds this package, with `+dirty` if files differ from it; None outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+dirty" if dirty else "")


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Recorder:
    """Started with a piece of work, it says at the end what it took and where it ran."""

    def __init__(self, device: torch.device, *, elapsed: float = 0.0) -> None:
        """Start the clock, at `elapsed` seconds if the work was interrupted; note the code's commit as it is now."""
        self._device = device
        self._start = time.monotonic() - elapsed  # a clock that never jumps
        self._commit = _commit()

    def seconds(self) -> float:
        """Wall time so far."""
        return round(time.monotonic() - self._start, 3)

    def report(self) -> dict[str, Any]:
        """Seconds, peak memory of the process in MB (of the GPU, if on one), versions, hardware, commit, date."""
        versions = {name: _version(name) for name in ("cddlib", "torchvision", "numpy")}
        gpu = self._device.type == "cuda"
        return {
            "seconds": self.seconds(),
            "peak_memory_mb": _peak_memory_mb(self._device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
            "device": torch.cuda.get_device_name(self._device) if gpu else _processor(),
            "threads": torch.get_num_threads(),
            "commit": self._commit,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _version(package: str) -> str | None:
    """A package's version; None for one that runs from a checkout without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peak_memory_mb(device: torch.device) -> float:
    """Highest allocated memory of the GPU, or highest resident set of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux begins with the peak of the process that started this one
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return round(int(peak) * 1024 / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
