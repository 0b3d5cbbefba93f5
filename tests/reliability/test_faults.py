"""Faults: kills, signals, rivals in a folder, and damage to what an unfinished run goes on from.

Every kind of work is done once undisturbed. Whatever happens to it afterwards, the same command ends with the same
files.
"""

import functools
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from children import at_operation, die, note_operations, patch
from conftest import Note, Repeats
from works import Works, assert_one_sentence, assert_refused, assert_same

from cddbook.study import study_record
from cddlib.runtime.distributed import Interrupted, Ranks
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json, read_tensors
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import parse_metrics

# --- Kills ------------------------------------------------------------------------------------------------------

KINDS = ("buffer", "distill", "remedy", "evaluate", "data", "study")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random(works: Works, kind: str, note: Note, repeats: Repeats) -> None:
    """Killed again and again after a random time, and started again, it ends with the same files."""
    work, rng, kills = works[kind], generator("kill", kind), 0
    while kills < repeats(1, 15):
        folder, code = work.begin(), 137
        while code == 137:
            child = work.child(folder)
            time.sleep(0.6 * work.seconds * float(torch.rand((), generator=rng)))
            child.signal(signal.SIGKILL)
            code = child.wait()
            kills += code == 137
        assert code == 0, child.said
        assert_same(folder, work.wanted)
    note("kills", work=kind, kills=kills, when="at random", identical=True)


def die_writing(folder: Path) -> None:
    """Leave what safetensors leaves when it is killed while it writes: a file with a name that nobody knows."""
    for beside in folder.glob("**/.*.tmp"):
        if any(beside.iterdir()):  # what is written there has not got its name yet
            (beside / ".tmp123").write_bytes(b"half")
    die()


@pytest.mark.parametrize(
    "kind", ["short buffer", "growing buffer", "short distill", "short evaluate", "data", "short study"]
)
def test_killed_before_an_operation(works: Works, kind: str, note: Note, repeats: Repeats) -> None:
    """Killed before the last operation on every other file, or before every operation; again when it resumes."""
    work = works[kind]
    folder = work.begin()
    log = folder.with_suffix(".operations")
    assert work.run(folder, functools.partial(note_operations, folder, log))[0] == 0
    files = log.read_text().splitlines()
    last = {file: number for number, file in enumerate(files, start=1) if ".tmp" not in file}
    numbers = repeats(sorted(last.values())[::2], range(1, len(files) + 1))
    kills = 0
    for number in numbers:
        folder, code = work.begin(), 137
        dying = functools.partial(die_writing, folder)
        for _ in range(2):
            if code == 137:
                code, said = work.run(folder, functools.partial(at_operation, folder, number, dying))
                kills += code == 137
        assert code in (0, 137), said
        work.assert_resumes(folder)
        shutil.rmtree(folder)
    assert kills >= len(numbers)
    note("kills", work=kind, kills=kills, when="before operations", operations=len(files), identical=True)


def test_a_killed_study_takes_its_processes_with_it(works: Works, note: Note) -> None:
    """Nobody works on in the folders of its runs, or waits for ever."""
    work = works["study, in a process"]
    folder = work.begin()
    child = work.child(folder)
    assert child.wait_until((folder / "lr_step_size=1e-05" / "seed-0" / "checkpoint.safetensors").exists)
    started = psutil.Process(child.process.pid).children()
    child.signal(signal.SIGKILL)
    assert child.wait() == 137
    assert started
    assert psutil.wait_procs(started, timeout=30)[1] == [], "they are still there"
    work.assert_resumes(folder)
    note("kills", work="study", kills=1, when="with a process of its own", identical=True)


# --- Signals ----------------------------------------------------------------------------------------------------

SAVED = {
    "buffer": r"stopped after (epoch (\d) of )?expert (\d), which is saved",
    "distill": r"stopped after iteration (\d+), which is saved",
    "evaluate": r"stopped; (\d) of 9 networks are left, the others saved",
    "data": r"stopped after image (\d+) of 300, which is saved",
}


def check_saved(kind: str, folder: Path, found: re.Match[str]) -> None:
    """What the sentence says is saved, is."""
    if kind == "distill":
        assert read_tensors(folder / "checkpoint.safetensors", "state")[1]["iteration"] == int(found[1])
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == int(found[1]) + 1
    elif kind == "buffer" and found[1]:
        header = read_tensors(folder / f".expert-00{found[3]}.unfinished.safetensors", "unfinished")[1]
        assert len(header["losses"]) == int(found[2])
    elif kind == "buffer":
        assert (folder / f"expert-00{found[3]}.safetensors").exists()
    elif kind == "evaluate":
        record = read_json(next(folder.glob("evaluation-*.json")))
        assert sum(map(len, record["accuracies"].values())) == 9 - int(found[1])
    else:
        assert read_json(folder / "imagefolder.progress.json")["images"] == int(found[1])


@pytest.mark.parametrize("kind", ["buffer", "distill", "evaluate", "data"])
def test_asked_to_stop(works: Works, kind: str, note: Note, repeats: Repeats) -> None:
    """It finishes what it is at, says what is saved, and goes on from there as if nothing had been."""
    work, rng, times = works[kind], generator("signal", kind), {signal.SIGINT: 0, signal.SIGTERM: 0}
    rare = functools.partial(patch, {"cddlib.experts.train.UNFINISHED_SECONDS": 1e9})  # only because it is asked to
    while min(times.values()) < repeats(1, 2):
        folder = work.begin()
        for turn in range(100):
            number = (signal.SIGINT, signal.SIGTERM)[(turn + min(times.values())) % 2]
            child = work.child(folder, rare)
            if child.wait_until(child.heeds):
                time.sleep(0.6 * work.seconds * float(torch.rand((), generator=rng)))
                child.signal(number)
            code, said = child.wait(), child.said
            if "finishing" not in said:  # the signal came when all was done, or not at all
                break
            assert code == 128 + number, said
            times[number] += 1
            assert re.match(r"\ncddlib: finishing the (epoch|iteration|network|image); a second signal stops", said)
            assert re.search(r"\n\ncddlib: stopped.*; the same command resumes\.\n$", said), said
            if "all was finished" in said:
                break
            stopped = re.search(SAVED[kind.split(",")[0]], said)
            assert stopped, said
            check_saved(kind.split(",")[0], folder, stopped)
        work.assert_resumes(folder)
    for number, count in times.items():
        note("signals", work=kind, signal=number.name, times=count, identical=True)


@pytest.mark.parametrize("kind", ["buffer", "distill", "evaluate", "data"])
def test_asked_to_stop_at_once(works: Works, kind: str, note: Note, repeats: Repeats) -> None:
    """By a second signal; nothing that was finished is lost."""
    work, rng = works[kind], generator("at once", kind)
    folder = work.begin()
    times = repeats(1, 3)
    for _ in range(times):
        child = work.child(folder)
        assert child.wait_until(child.heeds)
        time.sleep(0.1 * work.seconds * float(torch.rand((), generator=rng)))
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
            child.signal(number)
        assert child.wait() == 128 + signal.SIGTERM, child.said
        assert child.said.endswith("\n\ncddlib: stopped at once; the same command resumes.\n"), child.said
    work.assert_resumes(folder)
    note("signals", work=kind, signal="SIGINT, SIGTERM", times=times, identical=True)


def test_a_second_signal_that_a_library_hides() -> None:
    """Compiled code may turn the interruption into an error of its own; that is no reason to show its traceback."""
    ranks = Ranks()
    with pytest.raises(Interrupted, match="stopped at once") as stop, ranks.graceful_stop("the test"):
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise ValueError("could not determine the shape") from None
    assert stop.value.number == signal.SIGTERM
    with pytest.raises(ValueError, match="of its own"), ranks.graceful_stop("the test"):
        raise ValueError("of its own")


def stop_when_all_is_done() -> None:
    """Let the signal come after the run's last iteration."""
    name, stop = "cddlib.distillation.loop.parse_metrics", functools.partial(signal.raise_signal, signal.SIGINT)
    patch({name: lambda *given: stop() or parse_metrics(*given)})


def test_a_study_stops_although_its_run_is_finished(works: Works, note: Note) -> None:
    """The signal came too late to stop the run; it must not be forgotten."""
    work = works["study"]
    folder = work.begin()
    code, said = work.run(folder, stop_when_all_is_done)
    assert code == 130
    assert said.endswith("\n\ncddlib: stopped when all was finished; the same command resumes.\n")
    assert [path.parent.parent.name for path in folder.glob("*/*/result.json")] == ["lr_step_size=1e-05"]
    assert not (folder / "lr_step_size=1000.0").exists()
    work.assert_resumes(folder)
    note("signals", work="study", signal="SIGINT", times=1, identical=True)


def test_a_signal_while_something_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wants to say so, too, cannot; the work goes on until it may stop."""

    class Terminal(io.RawIOBase):
        written = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if not self.written:
                signal.raise_signal(signal.SIGINT)
            self.written += len(data)
            return len(data)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(terminal)))
    ranks = Ranks()
    with pytest.raises(Interrupted, match="when all was finished"), ranks.graceful_stop("the test"):
        print("half of the work", file=sys.stderr, flush=True)
        assert ranks.asked == signal.SIGINT
        print("is done", file=sys.stderr, flush=True)
    assert terminal.written == len("half of the work\nis done\n")


# --- Rivals -----------------------------------------------------------------------------------------------------

HOLDS = {"evaluate": ".evaluation-", "data": ".imagefolder.lock"}


@pytest.mark.parametrize("kind", ["buffer", "distill", "evaluate", "data", "study"])
def test_two_processes(works: Works, kind: str, note: Note) -> None:
    """The second is refused with a sentence, as long as the first lives; the first is not disturbed."""
    work = works[kind]
    for end in (signal.SIGCONT, signal.SIGKILL):
        folder = work.begin()
        first = work.child(folder)
        assert first.wait_until(first.heeds)
        first.signal(signal.SIGSTOP)
        held = rf"{re.escape(str(folder))} is in use: other work holds {re.escape(HOLDS.get(kind, '.lock'))}"
        assert_one_sentence(*work.run(folder), rf"^cddlib: {held}.*; wait until it ends, or choose another folder\.$")
        first.signal(end)
        code = first.wait()
        if end == signal.SIGCONT:
            assert code == 0, first.said
            assert_same(folder, work.wanted)
        work.assert_resumes(folder)
    note("collisions", work=kind, times=2, identical=True)


# --- Damage to what an unfinished run goes on from ---------------------------------------------------------------


def die_for(path: Path) -> None:
    """Kill this process before a file gets its name."""
    replace = os.replace
    os.replace = lambda source, target: die() if Path(target) == path else replace(source, target)


UNFINISHED = [  # the work, the file without which it is killed, what it goes on from, what is missing, too
    ("short buffer", "expert-001.safetensors", "buffer.json", None),
    ("short buffer", "expert-001.safetensors", "preprocessing.safetensors", None),
    ("short buffer", "expert-001.safetensors", ".expert-001.unfinished.safetensors", None),
    ("short distill", "milestone-000001.safetensors", "milestone-000000.safetensors", "checkpoint.safetensors"),
    ("short distill", "result.json", "checkpoint.safetensors", None),
    ("short distill", "result.json", "metrics.jsonl", None),
    ("short distill", "result.json", "config.json", None),
    ("data", "imagefolder.safetensors", "imagefolder.partial", None),
    ("data", "imagefolder.safetensors", "imagefolder.progress.json", None),
]


@pytest.mark.parametrize(("kind", "killed_for", "name", "missing"), UNFINISHED)
def test_damage_to_unfinished(
    works: Works, kind: str, killed_for: str, name: str, missing: str | None, note: Note, repeats: Repeats
) -> None:
    """The command refuses the file by name, in one sentence; or the damage does no harm."""
    work = works[kind]
    start = work.begin()
    assert work.run(start, functools.partial(die_for, start / killed_for))[0] == 137
    if missing:
        (start / missing).unlink()

    def attempt() -> None:
        with tempfile.TemporaryDirectory(dir=start.parent) as parent:
            folder = Path(shutil.copytree(start, Path(parent) / "damaged"))
            code, said = work.run(folder)
            if code:
                assert_one_sentence(code, said, re.escape(str(folder / name)))
                raise UserError(said)
            assert_same(folder, work.wanted)

    assert_refused(start / name, repeats(6, 48), note, attempt, f"unfinished {name}")


def test_damage_to_the_reason_why_a_run_stopped(works: Works, tmp_path: Path, note: Note, repeats: Repeats) -> None:
    folder = Path(shutil.copytree(works["short study"].wanted, tmp_path / "study"))
    wanted = study_record(folder)

    def attempt() -> None:
        assert study_record(folder) == wanted

    assert_refused(next(folder.glob("*/*/stopped.json")), repeats(6, 48), note, attempt, "stopped.json")
