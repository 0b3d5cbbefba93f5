"""Bounds on memory and time for what a test runs in its own process."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path


def limit_memory(extra: int) -> None:
    """Let the process, and those that it starts, map only so many bytes more than it has now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Within, a gigabyte more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(2**30)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def little_time(seconds: float = 30.0) -> Iterator[None]:
    """Within, `TimeoutError` after so many seconds."""

    def stop(_number: int, _frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
