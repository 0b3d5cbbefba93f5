"""What a piece of work took, and where it ran."""

import importlib.metadata
import platform
import re
import resource
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def _commit() -> str | None:
    """The commit that holds this package, with `+dirty` if its files differ from it; None if git does not have it."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+dirty" if dirty else "")


def _proc(file: str, pattern: str) -> str | None:
    """What Linux says of the machine or of this process in a file below /proc; None on other systems."""
    try:
        found = re.search(pattern, Path("/proc", file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and found[1]


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
        processor = _proc("cpuinfo", r"^model name\s*: (.+)") or platform.processor() or platform.machine()
        return {
            "seconds": self.seconds(),
            "peak_memory_mb": _peak_memory_mb(self._device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
            "device": torch.cuda.get_device_name(self._device) if gpu else processor,
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
    peak = _proc("self/status", r"^VmHWM:\s*(\d+)")  # getrusage's begins with that of the process that started this one
    return round(int(peak) * 1024 / 1e6 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)
