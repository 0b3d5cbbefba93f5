"""Want: full disks, folders that cannot be written, clocks that jump, and too little memory.

What is starved ends in one sentence, loses nothing that was finished, and ends with the same files once it has what it
wants.
"""

import ctypes
import datetime
import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import limit_memory
from children import Setting, at_operation, die, patch, run
from conftest import Note, Repeats
from works import Work, Works, assert_one_sentence, assert_same, contents

from cddlib.runtime import run_folder
from cddlib.runtime.files import read_json
from cddlib.runtime.random import generator

KINDS = ("short buffer", "short distill", "growing evaluate", "data")
PAGE = 4096
MEGABYTE = 2**20


# --- Disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own: a tmpfs, mounted as root or in a name space where we are root.

    Only one sleeping process sees it; others reach it through that process's root.
    """
    script = 'mount -t tmpfs -o size=4m tmpfs "$0" && echo mounted && exec sleep 1000'
    for names in (["--user", "--map-root-user", "--mount"], ["--mount"]):
        command = ["unshare", *names, "sh", "-c", script, tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            if process.stdout.readline():
                yield Path(f"/proc/{process.pid}/root{tmp_path}")
                process.kill()
                return
    pytest.skip("the system lets nobody mount a disk")


def fill(disk: Path, free: int) -> None:
    """Leave that many bytes free."""
    found = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - free))


def finished(folder: Path) -> dict[str, Any]:
    """What must stay as it is: experts, milestones, and accuracies of networks."""
    kept = {name: content for name, content in contents(folder).items() if name.startswith(("expert", "milestone"))}
    for path in folder.glob("evaluation-*.json"):
        kept |= {f"network {number}": value for number, value in enumerate(read_json(path)["accuracies"]["synthetic"])}
    return kept


def limits(work: Work, number: int) -> list[int]:
    """Bytes of some numbers of pages that are too few."""
    there, needed = (
        sum(-(-path.stat().st_size // PAGE) for path in folder.iterdir()) for folder in (work.begin(), work.wanted)
    )
    pages = range(max(1, needed - there))
    return sorted({pages[(len(pages) - 1) * part // (number - 1)] * PAGE for part in range(number)})


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk(works: Works, disk: Path, kind: str, note: Note, repeats: Repeats) -> None:
    """Whichever file does not fit, it is named; nothing finished is lost; with space, the same files result."""
    work, failed, most_kept = works[kind], [], 0
    for free in limits(work, repeats(3, 6)):
        folder = work.begin(disk / f"{kind}-{free}")
        fill(disk, free)
        code, said = work.run(folder)
        if code:
            sentence = "cannot write [^:]+: No space left on device.*; what was finished before is kept"
            assert_one_sentence(code, said, sentence)
            failed.append(re.findall("cannot write ([^:]+):", said)[0].split("/")[-1])
        kept = finished(folder)
        (disk / "filler").unlink()
        work.assert_resumes(folder)
        assert kept.items() <= finished(folder).items()
        most_kept = max(most_kept, len(kept))
        shutil.rmtree(folder)
    assert failed
    row = {"work": kind, "mounted": True, "times": len(failed), "files": sorted(set(failed))}
    note("disk_full", **row, finished_before=most_kept, identical=True)


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
def test_read_only(works: Works, read_only: Any, kind: str, note: Note) -> None:
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
        note("read_only", work=kind, times=times, finished=finished, identical=True)


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
def test_jumping_clock(works: Works, kind: str, note: Note) -> None:
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
    note("clock", work=kind, times=jumps, identical=True)


# --- Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["large-buffer", "large-distill", "large-evaluate", "large-data"])
def test_want_of_memory(works: Works, kind: str, note: Note, repeats: Repeats) -> None:
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
    note("memory", work=kind, times=len(reasons), identical=True)
