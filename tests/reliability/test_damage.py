"""Damage: every file of every kind of run, cut off or with one bit flipped, is refused by name or does no harm.

Nothing is ever computed from damaged contents: what reads them stops with a sentence that names the file, or the result
is the one of undamaged files.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cddlib
from cddbook.records import collect
from cddbook.study import run_study, study_record
from cddlib.evaluate import evaluate_run
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import buffer_recipe, distill_recipe
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json
from cddlib.runtime.random import generator

SMALL = {
    "width": 8,
    "window_end": 4,
    "iterations": 4,
    "student_steps": 2,
    "evaluation_epochs": 2,
    "validate_every": 2,
    "checkpoint_every": 3,
    "segments": 2,
    "lr_step_size": 1e-7,
    "lr_images": 1.0,
}
TIMES = {"seconds", "finished", "peak_memory_mb", "seconds_per_iteration", "versions", "commit"}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache, a buffer of it with two experts, a run with an evaluation, and a study of two runs."""
    folder = tmp_path_factory.mktemp("damage")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / part / name / f"{number}.png")
    cddlib.prepare("imagefolder", folder / "data", source=folder / "pictures", size=8)
    _work(folder)
    return folder


def _buffer(folder: Path, experts: int = 2) -> Buffer:
    small = {"width": 8, "depth": 1, "experts": experts, "epochs": 6, "batch_size": 8, "zca": False}
    config = buffer_recipe("imagefolder", "pad", 1, **small)
    return cddlib.train_buffer(config, folder / "buffer", root=folder / "data", device="cpu")


def _config(**changes: Any) -> cddlib.DistillConfig:
    return distill_recipe("mtt", "imagefolder", 1, **SMALL, depth=1, zca=False, **changes)


def _work(folder: Path) -> dict[str, Any]:
    """Do or resume all of it; returns every result."""
    buffer = _buffer(folder)
    synthetic = cddlib.distill(_config(), buffer, folder / "run", root=folder / "data", device="cpu")
    evaluation = evaluate_run(folder / "run", runs=2, baselines=False, root=folder / "data", device="cpu")
    runs = {"a": _config(seed=1), "b": _config(seed=2)}
    study = run_study(_config(), runs, buffer.folder, folder / "study", root=folder / "data", device="cpu")
    return {
        "vectors": [buffer.parameters(expert, epoch) for expert in range(2) for epoch in range(7)],
        "preprocessing": list(buffer.preprocessing.tensors().values()),
        "set": synthetic.variables(),
        "evaluation": evaluation,
        "study": study,
        "collected": [collect(folder / name) for name in ("buffer", "run")],
    }


def _same(found: Any, wanted: Any) -> bool:
    """Equal, but for times, and where it ran."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[k], wanted[k]) for k in wanted if k not in TIMES)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return found == wanted


def _damages(data: bytes, seed: str) -> Iterator[bytes]:
    """The file cut off at some lengths, and with single bits flipped: in its header, and anywhere."""
    rng = generator("damage", seed)
    for length in sorted({0, 1, 7, len(data) // 3, len(data) - 1}):
        yield data[:length]
    for reach in (min(len(data), 400), len(data)):
        for bit in torch.randint(8 * reach, (24,), generator=rng).tolist():
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            yield bytes(damaged)


FILES = [
    "data/imagefolder.safetensors",
    "buffer/buffer.json",
    "buffer/result.json",
    "buffer/preprocessing.safetensors",
    "buffer/expert-000.safetensors",
    "buffer/expert-001.safetensors",
    "run/config.json",
    "run/metrics.jsonl",
    "run/synthetic.safetensors",
    "run/result.json",
    "run/evaluation",
    "study/study.json",
    "study/a/config.json",
    "study/a/metrics.jsonl",
    "study/b/result.json",
]


def test_every_file_is_there(room: Path) -> None:
    """The list is complete: nothing else is written that a finished work reads."""
    written = {str(p.relative_to(room)) for p in room.rglob("*") if p.is_file() and "pictures" not in p.parts}
    written = {name for name in written if not name.endswith(".lock") and not name.startswith("study/")}
    unread = {name for name in written if "milestone" in name or "checkpoint" in name or "difficulty" in name}
    assert {name for name in FILES if name[:5] not in ("study", "run/e")} == {
        name for name in written - unread if not name.startswith("run/evaluation")
    }


def _path(folder: Path, name: str) -> Path:
    return next((folder / "run").glob("evaluation-*.json")) if name == "run/evaluation" else folder / name


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_does_no_harm(name: str, room: Path, tmp_path: Path, notes: dict[str, Any]) -> None:
    wanted = _work(room)
    folder = Path(shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures")))
    path = _path(folder, name)
    original = path.read_bytes()
    refused = harmless = 0
    for damaged in _damages(original, name):
        if damaged == original:
            continue
        path.write_bytes(damaged)
        try:
            found = _work(folder)
        except UserError as error:
            assert path.name in str(error) or path.stem in str(error), error
            refused += 1
        else:
            assert _same(found, wanted)
            harmless += 1
        assert path.read_bytes() in (damaged, original), "the damaged file was written over with something else"
    assert refused > 10
    notes.setdefault("damage", []).append(
        {"file": name, "damaged": refused + harmless, "refused": refused, "harmless": harmless}
    )


# --- Files that an unfinished work goes on from ------------------------------------------------------------------


def test_the_difficulty_that_more_experts_need(room: Path, tmp_path: Path, notes: dict[str, Any]) -> None:
    path = "buffer/difficulty.safetensors"
    for damaged in (every := list(_damages((room / path).read_bytes(), path))):
        shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures", "study", "run"))
        (tmp_path / "copy" / path).write_bytes(damaged)
        with pytest.raises(UserError, match=r"difficulty\.safetensors"):
            _buffer(tmp_path / "copy", experts=3)
        shutil.rmtree(tmp_path / "copy")
    entry = {"file": path, "damaged": len(every), "refused": len(every), "harmless": 0}
    notes.setdefault("damage", []).append(entry)


class Enough(Exception):
    """Stops a work in the middle."""


def _stop_distillation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A distillation that stopped after iteration 3; returns what goes on with it."""
    import sys

    module = sys.modules["cddlib.distillation.loop"]
    iterate = module.iterate

    def interrupted(state: Any, *arguments: Any) -> Any:
        if state.iteration == 3:
            raise Enough
        return iterate(state, *arguments)

    def go_on() -> list[torch.Tensor]:
        config = _config(ema=0.9)
        return cddlib.distill(
            config, folder / "buffer", folder / "stopped", root=folder / "data", device="cpu"
        ).variables()

    with monkeypatch.context() as patched:
        patched.setattr(module, "iterate", interrupted)
        with pytest.raises(Enough):
            go_on()
    return go_on


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.jsonl", "config.json"])
def test_a_stopped_distillation(
    name: str, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures", "study")))
    go_on = _stop_distillation(folder, monkeypatch)
    stopped = Path(shutil.copytree(folder / "stopped", tmp_path / "as it was"))
    wanted = go_on()
    original = (stopped / name).read_bytes()
    refused = harmless = 0
    for damaged in _damages(original, name):
        shutil.rmtree(folder / "stopped")
        shutil.copytree(stopped, folder / "stopped")
        (folder / "stopped" / name).write_bytes(damaged)
        try:
            found = go_on()
        except UserError as error:
            assert name in str(error), error
            refused += 1
        else:
            assert _same(found, wanted)
            harmless += 1
    assert refused > 10
    entry = {"file": f"stopped run/{name}", "damaged": refused + harmless, "refused": refused, "harmless": harmless}
    notes.setdefault("damage", []).append(entry)


def test_a_damaged_checkpoint_can_be_deleted(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures", "study")))
    go_on = _stop_distillation(folder, monkeypatch)
    undisturbed = Path(shutil.copytree(folder / "stopped", tmp_path / "as it was"))
    wanted = go_on()
    shutil.rmtree(folder / "stopped")
    shutil.copytree(undisturbed, folder / "stopped")
    checkpoint = folder / "stopped" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is truncated .* Delete it to go on from iteration 3"):
        go_on()
    checkpoint.unlink()
    assert _same(go_on(), wanted)


def test_the_record_of_a_damaged_study_is_refused(room: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(room / "study", tmp_path / "study"))
    line = folder / "b" / "metrics.jsonl"
    line.write_bytes(line.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    with pytest.raises(UserError, match=r"b/metrics\.jsonl, line \d, is damaged"):
        study_record(folder)
    assert read_json(folder / "study.json")["runs"] == ["a", "b"]
