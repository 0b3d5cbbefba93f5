"""Damage: every file of every kind of run, cut off or with one bit flipped, is refused by name or does no harm.

Nothing is ever computed from damaged contents: what reads them stops with a sentence that names the file, or the result
is the one of undamaged files.
"""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Note, Repeats
from works import assert_refused, pictures, steady

import cddlib
from cddbook.records import collect
from cddbook.study import StudyConfig, run_study, study_recipe
from cddlib.evaluate import evaluate_run
from cddlib.experts.buffer import Buffer
from cddlib.methods.recipes import buffer_recipe
from cddlib.runtime.files import tensor_digest

SMALL = {"width": 8, "window_end": 4, "iterations": 4, "student_steps": 2, "evaluation_epochs": 2, "validate_every": 2}
SMALL |= {"checkpoint_every": 3, "segments": 2, "lr_step_size": 1e-7, "lr_images": 1.0}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data cache, a buffer of it with two experts, a run with an evaluation, and a study of two runs."""
    folder = tmp_path_factory.mktemp("damage")
    pictures(folder / "pictures", size=(8, 8), train=12, val=4)
    cddlib.prepare("imagefolder", folder / "data", source=folder / "pictures", size=8)
    _work(folder)
    return folder


def _buffer(folder: Path, experts: int = 2) -> Buffer:
    small = {"width": 8, "depth": 1, "experts": experts, "epochs": 6, "batch_size": 8, "zca": False}
    config = buffer_recipe("imagefolder", "pad", 1, **small)
    return cddlib.train_buffer(config, folder / "buffer", root=folder / "data", device="cpu")


def _config(**changes: Any) -> StudyConfig:
    return study_recipe("mtt", "imagefolder", 1, **SMALL, depth=1, zca=False, **changes)


def _work(folder: Path) -> list[Any]:
    """Do or resume all of it; returns every result, but for times."""
    buffer = _buffer(folder)
    synthetic = cddlib.distill(_config().distillation, buffer, folder / "run", root=folder / "data", device="cpu")
    evaluation = evaluate_run(folder / "run", runs=2, baselines=False, root=folder / "data", device="cpu")
    runs = {"a": _config(seed=1), "b": _config(seed=2)}
    study = run_study(_config(), runs, buffer.folder, folder / "study", root=folder / "data", device="cpu")
    vectors = [buffer.parameters(expert, epoch) for expert in range(2) for epoch in range(7)]
    tensors = [*vectors, *buffer.preprocessing.tensors().values(), *synthetic.variables()]
    collected = [collect(folder / name) for name in ("buffer", "run")]
    return steady([*map(tensor_digest, tensors), evaluation, study, *collected])


FILES = ["data/imagefolder.safetensors", "buffer/buffer.json", "buffer/result.json", "buffer/preprocessing.safetensors"]
FILES += ["buffer/expert-000.safetensors", "buffer/expert-001.safetensors", "run/config.json", "run/metrics.jsonl"]
FILES += ["run/synthetic.safetensors", "run/result.json", "run/evaluation-*.json", "study/study.json"]
FILES += ["study/a/config.json", "study/a/metrics.jsonl", "study/b/result.json"]


def test_every_file_is_there(room: Path) -> None:
    """The list is complete: nothing else is written that a finished work reads."""
    names = {re.sub(r"-\w{12}\.json", "-*.json", str(path.relative_to(room))) for path in room.glob("[dbr]*/*.*")}
    unread = re.compile(r".*(lock$|milestone|checkpoint|difficulty)")
    assert {name for name in FILES if "study" not in name} == {name for name in names if not unread.match(name)}


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_does_no_harm(name: str, room: Path, tmp_path: Path, note: Note, repeats: Repeats) -> None:
    wanted = _work(room)
    folder = Path(shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures")))

    def attempt() -> None:
        assert _work(folder) == wanted

    assert_refused(next(folder.glob(name)), repeats(8, 48), note, attempt, name)


def test_the_difficulty_that_more_experts_need(room: Path, tmp_path: Path, note: Note, repeats: Repeats) -> None:
    shutil.copytree(room, tmp_path / "copy", ignore=shutil.ignore_patterns("pictures", "study", "run"))
    name = "buffer/difficulty.safetensors"
    attempt = functools.partial(_buffer, tmp_path / "copy", experts=3)
    assert_refused(tmp_path / "copy" / name, repeats(8, 48), note, attempt, name)
