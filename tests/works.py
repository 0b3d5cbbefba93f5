"""Works that the tests of reliability kill, starve and damage: command lines, each run once undisturbed.

Whatever happens to a work afterwards, the same command has to end with the same files.
"""

import functools
import json
import re
import shutil
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from children import Child, Setting, patch, run
from PIL import Image

from cddlib.runtime.errors import UserError
from cddlib.runtime.random import generator
from cddlib.runtime.run_folder import read_metrics

VOLATILE = {"seconds", "seconds_per_iteration", "finished", "peak_memory_mb", "checksum", "commit", "experts_trained"}
VOLATILE |= {"metrics_sha256"}  # of lines that hold seconds
"""What may differ between two runs that are the same."""


# --- Folders ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder by its name, without what may differ; locks, which are empty, are left out."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = {k: json.loads(v) for k, v in header.get("__metadata__", {}).items()}
        return steady(header), data[8 + length :]
    if path.suffix in (".json", ".jsonl"):
        return [steady(json.loads(line)) for line in ([data] if path.suffix == ".json" else data.splitlines())]
    return data


def steady(value: Any) -> Any:
    """A value of JSON without what may differ, and without the digest of metrics that a checkpoint has."""
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if key not in VOLATILE}
        return {key: steady(entry) for key, entry in kept.items() if key != "metrics" or not isinstance(entry, str)}
    return [steady(entry) for entry in value] if isinstance(value, list) else value


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a finished run, without what may differ."""
    return steady(read_metrics(folder))


def assert_same(folder: Path, wanted: Path) -> None:
    """Two folders hold the same files."""
    a, b = contents(folder), contents(wanted)
    assert sorted(a) == sorted(b), (sorted(a), sorted(b))
    different = [name for name in a if a[name] != b[name]]
    assert not different, different


def refusal(attempt: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """What the user is told who attempts something that is refused."""
    with pytest.raises(UserError) as refused:
        attempt(*arguments, **options)
    return str(refused.value)


def stop_before(owner: Any, name: str, when: Callable[..., bool], work: Callable[[], object]) -> None:
    """Do `work`, and stop it as by Ctrl-C before the call of `owner.name` whose arguments `when` picks."""
    function = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise KeyboardInterrupt
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as within, pytest.raises(KeyboardInterrupt):
        within.setattr(owner, name, interrupted)
        work()


def assert_refused(path: Path, bits: int, note: Callable[..., None], attempt: Callable[[], object], name: str) -> None:
    """A damaged file is refused by its name (`UserError`), or `attempt`, which reads it, finds that no harm was done.

    It is cut off at some lengths, or one of that many `bits` is flipped, half of them in its beginning. The record
    calls it `name`.
    """
    whole = path.read_bytes()
    every = [whole[:length] for length in sorted({0, 7, len(whole) // 2, len(whole) - 1})]
    for reach in (min(len(whole), 400), len(whole)):
        for bit in torch.randint(8 * reach, (bits // 2,), generator=generator("damage", name, reach)).tolist():
            every.append(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
    refused = 0
    for damaged in every:
        path.write_bytes(damaged)
        try:
            attempt()
        except UserError as error:
            assert path.name in str(error) or path.stem in str(error), error
            refused += 1
        assert path.read_bytes() in (damaged, whole), "the damaged file was written over with something else"
    assert refused
    note("damage", file=name, damaged=len(every), refused=refused, harmless=len(every) - refused)


def pictures(folder: Path, size: tuple[int, int] = (24, 20), train: int = 120, val: int = 30) -> None:
    """Small PNGs of noise in ImageNet's layout, two classes; the numbers are images a class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number:03d}.png")


# --- Works ------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a work runs."""

    line: str
    """Its command line, without the folder that it writes, which comes last; `{room}` is the folder of all works."""
    begins: str | None = None
    """The work that a copy of its folder begins with; without one, it begins with an empty folder."""
    patched: Mapping[str, Any] = types.MappingProxyType({})
    """Attributes of modules that have other values, so that more is saved."""


EVERY_EPOCH = {"cddlib.experts.train.UNFINISHED_SECONDS": 0.0}
BATCHES = {"cddlib.data.download._BATCH": 16}
BUFFER = "buffer --width 8 --momentum 0.9"
EXPERTS = "--width 8 --window-end 4 --student-steps 2 --evaluation-epochs 2 --buffer {room}/buffer"
LONG = f"distill {EXPERTS} --iterations 30 --validate-every 10 --checkpoint-every 3 --segments 4"
SHORT = f"distill {EXPERTS} --iterations 3 --milestones 2 --checkpoint-every 2 --segments 2"
STUDY = f"search {EXPERTS} --seeds 1 --segments 2"
DATA = "data imagefolder --source {room}/pictures"
LARGE = "--width 32 --ipc 20 --student-batch 128 --buffer {room}/large-buffer --out"

KINDS = {
    "buffer": Kind(f"{BUFFER} --experts 3 --epochs 6 --out", patched=EVERY_EPOCH),
    "distill": Kind(f"{LONG} --ema 0.9 --out"),
    "remedy": Kind(f"{LONG} --method datm --consolidation si --out"),
    "evaluate": Kind("evaluate --runs 3", begins="distill"),
    "data": Kind(f"{DATA} --size 16 --root", patched=BATCHES),
    # the second run diverges
    "study": Kind(f"{STUDY} --iterations 8 --vary lr_step_size=1e-5,1e3 --out"),
    "study, in a process": Kind(f"{STUDY} --iterations 8 --vary lr_step_size=1e-5,1e3 --jobs 1 --out"),
    "short buffer": Kind(f"{BUFFER} --experts 2 --epochs 2 --out", patched=EVERY_EPOCH),
    "growing buffer": Kind(f"{BUFFER} --experts 3 --epochs 2 --out", "short buffer", EVERY_EPOCH),
    "short distill": Kind(f"{SHORT} --out"),
    "short evaluate": Kind("evaluate --runs 1", "short distill"),
    "growing evaluate": Kind("evaluate --runs 2", "short evaluate"),
    "short study": Kind(f"{STUDY} --iterations 2 --vary lr_step_size=1e3 --out"),
    "large-buffer": Kind("buffer --width 32 --batch-size 1024 --experts 2 --epochs 3 --out", patched=EVERY_EPOCH),
    "large-distill": Kind(f"{SHORT} --window-end 2 --expert-epochs 1 {LARGE}"),
    "large-evaluate": Kind("evaluate --runs 1 --no-baselines", "large-distill"),
    "large-data": Kind(f"{DATA} --size 128 --root", patched=BATCHES),
}


class Work:
    """A command that writes a folder, done once undisturbed."""

    def __init__(self, kind: str, room: Path) -> None:
        """Do it in the folder `room / kind`."""
        self.name, self.kind, self.room = kind, KINDS[kind], room
        self.begun = 0
        began = time.monotonic()
        self.wanted = self.begin(room / kind)
        self.resume(self.wanted)
        self.seconds = time.monotonic() - began

    def begin(self, folder: Path | None = None) -> Path:
        """A folder, with what the command needs to find in it."""
        self.begun += 1
        folder = folder or self.room / f"{self.name}-{self.begun}"
        if self.kind.begins:
            return Path(shutil.copytree(self.room / self.kind.begins, folder))
        folder.mkdir()
        return folder

    def child(self, folder: Path, *settings: Setting) -> Child:
        """Start the command."""
        words = [word.format(room=self.room) for word in self.kind.line.split()]
        log = self.room / f"{time.monotonic_ns()}.log"
        return Child([*words, folder], log, functools.partial(patch, dict(self.kind.patched)), *settings)

    def run(self, folder: Path, *settings: Setting) -> tuple[int, str]:
        """The exit code and the output of the command."""
        child = self.child(folder, *settings)
        return child.wait(), child.said

    def resume(self, folder: Path) -> None:
        """Run the command, which must succeed."""
        code, said = self.run(folder)
        assert code == 0, said

    def assert_resumes(self, folder: Path) -> None:
        """The command ends with the same files."""
        self.resume(folder)
        assert_same(folder, self.wanted)


class Works(dict[str, Work]):
    """Works by kind, done when they are asked for."""

    def __init__(self, room: Path) -> None:
        """Do them in `room`."""
        super().__init__()
        self.room = room
        pictures(room / "pictures")
        assert run(["recipes", "--method", "mtt"], room / "log")[0] == 0  # the server has started

    def __missing__(self, kind: str) -> Work:
        line, begins, _ = KINDS[kind]
        for needed in (begins, *re.findall(r"\{room\}/((?:large-)?buffer)", line)[-1:]):
            if needed:
                self[needed]  # so that it is there
        self[kind] = Work(kind, self.room)
        return self[kind]


def assert_one_sentence(code: int, said: str, *patterns: str) -> None:
    """A command failed as it should: exit code 1, and one line that has all the patterns."""
    assert code == 1, (code, said)
    assert said.startswith("cddlib: ") and said.count("\n") == 1, said
    for pattern in patterns:
        assert re.search(pattern, said), (pattern, said)
