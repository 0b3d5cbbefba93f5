"""Want: full disks, folders that cannot be written, clocks that jump, and too little memory.

Every kind of work is done once undisturbed. What is starved ends in one sentence, loses nothing that was finished, and
ends with the same files once it has what it wants. As in `test_faults.py`, processes are forked.
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
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Setting, die_at, patch, run
from test_faults import assert_same, contents, pictures

from cddlib.runtime import run_folder
from cddlib.runtime.files import read_json
from cddlib.runtime.random import generator

KINDS = ("buffer", "distill", "evaluate", "data")
PAGE = 4096
MEGABYTE = 2**20
SETTINGS = functools.partial(
    patch,
    {
        "cddlib.experts.train.UNFINISHED_SECONDS": 0.0,
        "cddlib.data.download._BATCH": 8,
        "cddlib.data.download._DURABLE": 2,
    },
)
"""Every epoch and every few images are saved."""


class Works:
    """Commands whose last argument is the folder that they write, and the undisturbed result of each."""

    def __init__(self, room: Path, width: int, ipc: int, batch: int, size: int) -> None:
        """Do all of them, below `room`."""
        self.room = room
        network = ["--width", width]
        long = ["--ipc", ipc, "--student-batch", batch, "--iterations", 4, "--segments", 2, "--checkpoint-every", 2]
        short = ["--window-end", 2, "--expert-epochs", 1, "--student-steps", 2, "--evaluation-epochs", 2]
        rest = ["--validate-every", 2, "--milestones", 2, "--buffer", room / "buffer", "--out"]
        self.commands: dict[str, list[Any]] = {
            "buffer": ["buffer", *network, "--experts", 2, "--epochs", 3, "--batch-size", 8 * batch, "--out"],
            "distill": ["distill", *network, *long, *short, *rest],
            "evaluate": ["evaluate", "--runs", 2, "--no-baselines"],
            "data": ["data", "imagefolder", "--source", room / "pictures", "--size", size, "--root"],
        }
        pictures(room / "pictures")
        self.commands["half"] = ["evaluate", "--runs", 1, "--no-baselines"]
        for kind in ("buffer", "distill", "half", "evaluate", "data"):
            code, said = self.run(kind, self.begin(kind, room / kind))
            assert code == 0, said

    def begin(self, kind: str, folder: Path) -> Path:
        """What a command finds: a finished distillation, the evaluation of one network, or nothing."""
        found = {"half": "distill", "evaluate": "half"}.get(kind)
        if found:
            shutil.copytree(self.room / found, folder)
        else:
            folder.mkdir(parents=True)
        return folder

    def run(self, kind: str, folder: Path, *settings: Setting) -> tuple[int, str]:
        """The exit code and the output."""
        return run([*self.commands[kind], folder], self.room / "log", SETTINGS, *settings)

    def assert_same(self, kind: str, folder: Path) -> None:
        """Compare a folder with the undisturbed result."""
        assert_same(folder, self.room / kind)


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    return Works(tmp_path_factory.mktemp("works"), width=8, ipc=1, batch=10, size=16)


def assert_one_sentence(code: int, said: str, *patterns: str) -> None:
    """A command failed as it should: exit code 1, and one line that has all the patterns."""
    assert code == 1, (code, said)
    assert said.startswith("cddlib: ") and said.count("\n") == 1, said
    for pattern in patterns:
        assert re.search(pattern, said), (pattern, said)


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
        return SETTINGS

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
    found = {name: content for name, content in contents(folder).items() if name.startswith(("expert", "milestone"))}
    for path in folder.glob("evaluation-*.json"):
        found |= {f"network {number}": value for number, value in enumerate(read_json(path)["accuracies"]["synthetic"])}
    return found


LITTLE = 50
"""Bytes; a record says how many seconds it took, so that another time it is some bytes shorter."""


def limits(works: Works, disk: Disk, kind: str) -> list[int]:
    """Free bytes that are too few: of a disk up to six numbers of pages, for single files all but `LITTLE` of each."""
    before = works.begin(kind, disk.folder / "before")
    began = {path.name: path.stat().st_size for path in before.iterdir()}
    shutil.rmtree(before)
    done = {path.name: path.stat().st_size for path in (works.room / kind).iterdir()}
    if disk.process is None:
        sizes = {size for name, size in done.items() if size != began.get(name)}
        return sorted(size - LITTLE for size in sizes if size > 800)[:4]  # the log is a file, too
    used, before_that = (sum(-(-size // PAGE) for size in sizes.values()) for sizes in (done, began))
    pages = range(max(1, used - before_that))
    return sorted({pages[(len(pages) - 1) * part // 5] * PAGE for part in range(6)})


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk(works: Works, disk: Disk, kind: str, notes: dict[str, Any]) -> None:
    """Whichever file does not fit, it is named; nothing finished is lost; with space, the same files result."""
    failed, most_kept = [], 0
    for free in limits(works, disk, kind):
        folder = works.begin(kind, disk.folder / f"{kind}-{free}")
        code, said = works.run(kind, folder, disk.fill(free))
        if code:
            why = "No space left on device" if disk.process else "File too large"
            assert_one_sentence(code, said, f"cannot write [^:]+: {why}.*; what was finished before is kept")
            failed.append(re.findall("cannot write ([^:]+):", said)[0].split("/")[-1])
        kept = finished(folder)
        disk.empty()
        code, said = works.run(kind, folder)
        assert code == 0, said
        works.assert_same(kind, folder)
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


@pytest.mark.parametrize("kind", KINDS)
def test_finished_and_read_only(works: Works, read_only: Any, kind: str, notes: dict[str, Any]) -> None:
    """What is finished is given back, and nothing is written."""
    folder = read_only(works.room / kind)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, said = works.run(kind, folder, drop_privileges)
    assert code == 0, said
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    works.assert_same(kind, folder)
    notes.setdefault("read_only", []).append({"work": kind, "times": 1, "finished": True, "identical": True})


UNFINISHED = {
    "buffer": ("result.json", "expert-001.safetensors"),
    "distill": ("result.json", "synthetic.safetensors"),
    "evaluate": ("evaluation-*",),
    "data": ("imagefolder.safetensors",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unfinished_and_read_only(works: Works, read_only: Any, kind: str, notes: dict[str, Any]) -> None:
    """What is not finished says so in one sentence, and ends with the same files where it may write."""
    folder = read_only(works.room / kind, *UNFINISHED[kind])
    for without in ((), (".*.lock", ".lock")):
        again = read_only(folder, *without)
        assert_one_sentence(*works.run(kind, again, drop_privileges), "cannot write [^:]+: Permission denied")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    assert works.run(kind, folder, drop_privileges)[0] == 0
    works.assert_same(kind, folder)
    notes.setdefault("read_only", []).append({"work": kind, "times": 2, "finished": False, "identical": True})


def test_read_only_experts_are_matched(works: Works, read_only: Any, tmp_path: Path) -> None:
    experts = read_only(works.room / "buffer")
    command = [experts if argument == works.room / "buffer" else argument for argument in works.commands["distill"]]
    code, said = run([*command, tmp_path / "run"], tmp_path / "log", SETTINGS, drop_privileges)
    assert code == 0, said
    works.assert_same("distill", tmp_path / "run")


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
def test_jumping_clock(works: Works, tmp_path: Path, kind: str, notes: dict[str, Any]) -> None:
    """Killed again and again, at every start in another year and with files of other years, it ends the same."""
    folder = works.begin(kind, tmp_path / kind)
    rng, code, jumps = generator("files", kind), 137, 0
    while code == 137:
        clock = functools.partial(jumping_clock, kind, jumps)
        code, said = works.run(kind, folder, clock, functools.partial(die_at, folder, 10 * (jumps + 1)))
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (time.time() + years(rng),) * 2)
        jumps += 1
    assert code == 0, said
    works.assert_same(kind, folder)
    assert jumps > 1
    notes.setdefault("clock", []).append({"work": kind, "times": jumps, "identical": True})


# --- Memory -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_works(tmp_path_factory: pytest.TempPathFactory) -> Works:
    return Works(tmp_path_factory.mktemp("large"), width=32, ipc=20, batch=128, size=128)


def limit_memory(spare: int) -> None:
    """Let the process take only so many bytes more than it has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def limit_memory_later(folder: Path, number: int, spare: int) -> None:
    """The same, at the `number`-th file in `folder` that is opened."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                limit_memory(spare)

    sys.addaudithook(hook)


@pytest.mark.parametrize("kind", KINDS)
def test_want_of_memory(large_works: Works, tmp_path: Path, kind: str, notes: dict[str, Any]) -> None:
    """Wherever memory ends, the settings to lower are named; with more of it, the same files result."""
    folder, reasons = large_works.begin(kind, tmp_path / kind), []
    limits: list[Setting] = [functools.partial(limit_memory, spare * MEGABYTE) for spare in (1, 4, 8, 16, 32)]
    limits += [functools.partial(limit_memory_later, folder, number, MEGABYTE) for number in (1, 6, 11, 16)]
    for limit in limits:
        code, said = large_works.run(kind, folder, limit)
        if code:
            assert_one_sentence(code, said, r"there is not enough memory", r"lower [^;]*--\w")
            reasons.append(said)
    code, said = large_works.run(kind, folder)
    assert code == 0, said
    large_works.assert_same(kind, folder)
    assert reasons
    notes.setdefault("memory", []).append({"work": kind, "times": len(reasons), "identical": True})


@pytest.mark.parametrize("kind", KINDS)
def test_no_bar_is_watched(works: Works, tmp_path: Path, kind: str) -> None:
    """Progress bars start no thread: where memory ran out just then, Python waited for it for ever."""
    code, said = works.run(
        kind, works.begin(kind, tmp_path / kind), functools.partial(patch, {"tqdm.std.TMonitor": None})
    )
    assert code == 0, said
    assert "monitor" not in said  # tqdm says so if it starts one and cannot
