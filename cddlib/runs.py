"""Run folders: atomic writes, resuming, provenance, seeds.

A run folder belongs to one configuration. Asked for the same run again, it resumes or returns the finished
result; asked for another, it refuses. Every file but the append-only `metrics.jsonl` is written beside its place and
then renamed, so a reader or a killed process never sees half a file.
"""

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can mend. The message is one sentence that names the value and what is allowed."""


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
    """`auto` is the first GPU if there is one, else the CPU; raises `UserError` for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}); use 'cpu' or 'auto'."
        ) from None
    return torch.device(name)


def keep_freed_memory() -> None:
    """Ask glibc, for the whole process, to keep freed memory for the next allocation.

    Every operation on the CPU allocates its result, and giving pages back to the system only to ask for them again
    takes time. The command line calls this; a program that uses the library may.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            ctypes.CDLL(None).mallopt(parameter, value)


# --- Files ------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed process left is written over
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Write `value` as JSON, atomically; without `indent` in one line, half the size for many numbers."""
    text = json.dumps(value, indent=indent) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises `UserError` naming the file if it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Write `tensors` as safetensors, atomically, with the one value of `metadata` as JSON in the header.

    One, because safetensors writes several in random order, and the same run has to give the same bytes.
    """
    assert len(metadata) <= 1
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    write_atomically(path, lambda temporary: save_file(contents, temporary, metadata=header))


def open_tensors(path: Path) -> Any:
    """A lazy reader (`safetensors.safe_open`) of `path`; raises `UserError` saying why it cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}).") from None


def read_metadata(file: Any, path: Path, key: str) -> Any:
    """The JSON under `key` in the header of an open safetensors `file`."""
    try:
        return json.loads((file.metadata() or {})[key])
    except (KeyError, ValueError):
        raise UserError(f"{path} has no readable {key!r} in its header: it was written by another program.") from None


def check_classes(classes: Any, path: Path) -> tuple[str, ...]:
    """`classes` from the header of `path` as a tuple of names; raises `UserError` if they are anything else."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path} has classes in its header that are not a list of names: {classes!r}.")
    return tuple(classes)


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Run folders ------------------------------------------------------------------------------------------------


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: dict[str, Any]) -> str:
    """Twelve hex digits that name a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(config_type: type[T], values: dict[str, Any]) -> T:
    """The `config_type` among `values`, which may hold more. Raises `KeyError` if a field is missing."""
    found = {field.name: values[field.name] for field in dataclasses.fields(cast(Any, config_type))}
    return config_type(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})  # JSON has lists


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
    """Append-only `metrics.jsonl`: one JSON object a line, each with an `iteration`."""

    def __init__(self, path: Path, *, resume_at: int) -> None:
        """Keep the lines up to `resume_at`, the iteration of the checkpoint, and drop what a killed run added."""
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        kept = [line for line in complete if json.loads(line)["iteration"] <= resume_at]
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))
        self._file = open(path, "a")  # noqa: SIM115 - open as long as the run

    def write(self, **values: object) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in path.read_text().splitlines()]


def collect(folder: Path) -> dict[str, Any]:
    """Everything a finished run wrote about itself: configuration, result, metrics, evaluations.

    Raises:
        UserError: `folder` holds no finished run.
    """
    named = {name: folder / f"{name}.json" for name in ("buffer", "config", "result")}
    if not named["result"].exists():
        raise UserError(f"{folder} holds no finished run: result.json is missing.")
    record = {name: read_json(path) for name, path in named.items() if path.exists()}
    if (folder / "metrics.jsonl").exists():
        record["metrics"] = Metrics.read(folder / "metrics.jsonl")
        record["evaluations"] = [read_json(path) for path in sorted(folder.glob("evaluation-*.json"))]
    return record


def read_record(name: str) -> dict[str, Any]:
    """The committed record `book/results/<name>.json`, found from the repository's root or from notebooks/."""
    for folder in (Path.cwd(), Path.cwd().parent):
        if (folder / "book" / "results").is_dir():
            return read_json(folder / "book" / "results" / f"{name}.json")
    raise UserError(f"book/results is not in {Path.cwd()} or above it; run the notebook inside the repository.")


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
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
