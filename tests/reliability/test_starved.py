"""Want: full disks, folders that cannot be written, clocks that jump, and too little memory.

What is starved ends in one sentence, loses nothing that was finished, and ends with the same files once it has what it
wants.
"""

import ctypes
import datetime
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Setting, at_operation, die, patch, run
from conftest import Repeats
from works import Work, Works, assert_one_sentence, assert_same, contents

from cddlib.runtime import run_folder
from cddlib.runtime.files import read_json
from cddlib.runtime.random import generator

KINDS = ("short buffer", "short distill", "growing evaluate", "data")
PAGE = 4096
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    return Works(tmp_path_factory.mktemp("works"))


# --- Disk -------------------------------------------------------------------------------------------------------


class Disk:
    """A small disk of its own: a tmpfs, mounted where only one sleeping process sees it.

    Others reach it through that process's root. Where the system lets nobody mount, a folder in which no file may be
    longer than a limit stands for it.
    """

    def __init__(self, folder: Path) -> None:
        """Mount it on `folder`, as root or in a name space where we are root."""
        self.folder, self.process = folder, None
        folder.mkdir()
        script = 'mount -t tmpfs -o size=4m tmpfs "$0" && echo mounted && exec sleep 1000'
        for names in (["--user", "--map-root-user", "--mount"], ["--mount"]):
            process = subprocess.Popen(
                ["unshare", *names, "sh", "-c", script, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdout is not None
            with process.stdout:
                mounted = process.stdout.readline()
            if mounted:
                self.process, self.folder = process, Path(f"/proc/{process.pid}/root{folder}")
                break
            process.wait()

    def fill(self, free: int) -> Setting:
        """Leave that many bytes free, for a command with this setting."""
        if self.process is None:
            return functools.partial(limit_files, free)
        found = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - free))
        return functools.partial(patch, {})

    def empty(self) -> None:
        """Make space."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def limit_files(length: int) -> None:
    """Let every write behind that length fail."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))


@pytest.fixture(params=["mounted", "limited"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    if request.param == "limited":
        found.close()
        found.folder, found.process = tmp_path / "disk", None
    yield found
    found.close()


def finished(folder: Path) -> dict[str, Any]:
    """What must stay as it is: experts, milestones, and accuracies of networks."""
    kept = {name: content for name, content in contents(folder).items() if name.startswith(("expert", "milestone"))}
    for path in folder.glob("evaluation-*.json"):
        kept |= {f"network {number}": value for number, value in enumerate(read_json(path)["accuracies"]["synthetic"])}
    return kept


LITTLE = 50
"""Bytes; a record says how many seconds it took, so that another time it is some bytes shorter."""


def limits(work: Work, disk: Disk, number: int) -> list[int]:
    """Some sizes that are too small: of a disk a number of pages, of single files all but `LITTLE` bytes of each."""
    before, after = (
        {path.name: path.stat().st_size for path in folder.iterdir()} for folder in (work.begin(), work.wanted)
    )
    if disk.process is None:
        sizes = {size for name, size in after.items() if size != before.get(name)}
        return sorted(size - LITTLE for size in sizes if size > 800)[: number - 1]  # the log is a file, too
    needed, there = (sum(-(-size // PAGE) for size in sizes.values()) for sizes in (after, before))
    pages = range(max(1, needed - there))
    return sorted({pages[(len(pages) - 1) * part // (number - 1)] * PAGE for part in range(number)})


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk(works: Works, disk: Disk, kind: str, notes: dict[str, Any], repeats: Repeats) -> None:
    """Whichever file does not fit, it is named; nothing finished is lost; with space, the same files result."""
    work, failed, most_kept = works[kind], [], 0
    for free in limits(work, disk, repeats(3, 6)):
        folder = work.begin(disk.folder / f"{kind}-{free}")
        code, said = work.run(folder, disk.fill(free))
        if code:
            why = "No space left on device" if disk.process else "File too large"
            assert_one_sentence(code, said, f"cannot write [^:]+: {why}.*; what was finished before is kept")
            failed.append(re.findall("cannot write ([^:]+):", said)[0].split("/")[-1])
        kept = finished(folder)
        disk.empty()
        work.assert_resumes(folder)
        assert kept.items() <= finished(folder).items()
        most_kept = max(most_kept, len(kept))
        shutil.rmtree(folder)
    assert failed
    note = {"work": kind, "mounted": disk.process is not None, "times": len(failed), "files": sorted(set(failed))}
    notes.setdefault("disk_full", []).append({**note, "finished_before": most_kept, "identical": True})


# --- Folders that cannot be written -----------------------------------------------------------------------------


def drop_privileges() -> None:
    """Obey permission bits, which root does not as long as it has capabilities."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Any]:
    """A function that copies a folder and makes the copy read-only."""
    made = []

    def copy(source: Path, *without: str) -> Path:
        folder = tmp_path / f"copy-{len(made)}"
        made.append(shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*without)))
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        return folder

    yield copy
    for folder in made:
        folder.chmod(0o755)


UNFINISHED = {
    "short buffer": ("result.json", "expert-001.safetensors"),
    "short distill": ("result.json", "synthetic.safetensors"),
    "growing evaluate": ("evaluation-*",),
    "data": ("imagefolder.safetensors",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_only(works: Works, read_only: Any, kind: str, notes: dict[str, Any]) -> None:
    """What is finished is given back, and nothing is written. What is not says so, and is finished where it can be."""
    work = works[kind]
    folder = read_only(work.wanted)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, said = work.run(folder, drop_privileges)
    assert code == 0, said
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert_same(folder, work.wanted)

    unfinished = read_only(work.wanted, *UNFINISHED[kind])
    for without in ((), (".*.lock", ".lock")):
        again = read_only(unfinished, *without)
        assert_one_sentence(*work.run(again, drop_privileges), "cannot write [^:]+: Permission denied")
    for path in (unfinished, *unfinished.iterdir()):
        path.chmod(0o755)
    work.assert_resumes(unfinished)
    for finished, times in ((True, 1), (False, 2)):
        entry = {"work": kind, "times": times, "finished": finished, "identical": True}
        notes.setdefault("read_only", []).append(entry)


def test_read_only_experts_are_matched(works: Works, tmp_path: Path, read_only: Any) -> None:
    work = works["short distill"]
    line = work.kind.line.format(room=works.room).replace(
        str(works.room / "buffer"), str(read_only(works["buffer"].wanted))
    )
    code, said = run([*line.split(), tmp_path / "run"], tmp_path / "log", drop_privileges)
    assert code == 0, said
    assert_same(tmp_path / "run", work.wanted)


# --- Clock ------------------------------------------------------------------------------------------------------


def years(rng: torch.Generator) -> float:
    """Seconds of up to twenty years, back or forth."""
    return (float(torch.rand((), generator=rng)) - 0.5) * 40 * 365 * 86400


def jumping_clock(*keys: int | str) -> None:
    """Let the time of day jump whenever it is read, and with it the time at which files were changed."""
    rng, now, replace = generator("clock", *keys), time.time, os.replace

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=years(rng))

    def replace_and_date(source: Path, target: Path) -> None:
        replace(source, target)
        os.utime(target, (now() + years(rng),) * 2)

    time.time = lambda: now() + years(rng)
    os.replace = replace_and_date
    run_folder.datetime = Jumping


@pytest.mark.parametrize("kind", KINDS)
def test_jumping_clock(works: Works, kind: str, notes: dict[str, Any]) -> None:
    """Killed again and again, at every start in another year and with files of other years, it ends the same."""
    work = works[kind]
    folder, rng, code, jumps = work.begin(), generator("files", kind), 137, 0
    while code == 137:
        clock = functools.partial(jumping_clock, kind, jumps)
        code, said = work.run(folder, clock, functools.partial(at_operation, folder, 10 * (jumps + 1), die))
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (time.time() + years(rng),) * 2)
        jumps += 1
    assert code == 0, said
    assert_same(folder, work.wanted)
    assert jumps > 1
    notes.setdefault("clock", []).append({"work": kind, "times": jumps, "identical": True})


# --- Memory -----------------------------------------------------------------------------------------------------


def limit_memory(spare: int) -> None:
    """Let the process take only so many bytes more than it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.parametrize("kind", ["large-buffer", "large-distill", "large-evaluate", "large-data"])
def test_want_of_memory(works: Works, kind: str, notes: dict[str, Any], repeats: Repeats) -> None:
    """Wherever memory ends, the settings to lower are named; with more of it, the same files result.

    No progress bar starts a thread, either: where memory ran out just then, Python waited for the thread for ever.
    """
    work, reasons = works[kind], []
    folder = work.begin()
    limit = functools.partial(limit_memory, MEGABYTE)
    limits: list[Setting] = [
        functools.partial(limit_memory, spare * MEGABYTE) for spare in repeats((1, 8), (1, 4, 8, 16, 32))
    ]
    limits += [functools.partial(at_operation, folder, number, limit) for number in repeats((1, 11), (1, 6, 11, 16))]
    for setting in limits:
        code, said = work.run(folder, setting)
        if code:
            assert_one_sentence(code, said, r"there is not enough memory", r"lower [^;]*--\w")
            reasons.append(said)
    code, said = work.run(folder, functools.partial(patch, {"tqdm.std.TMonitor": None}))
    assert code == 0, said
    assert "monitor" not in said  # tqdm says so if it starts one and cannot
    assert_same(folder, work.wanted)
    assert reasons
    notes.setdefault("memory", []).append({"work": kind, "times": len(reasons), "identical": True})
