"""Checkpoints and milestones: what they hold, what damage costs, and that nothing is lost before it is replaced."""

import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SOFT, contents, distill, first, loop, metrics, outcome, stop_at

from cddlib import cli
from cddlib.distillation.checkpoint import State, milestone_path, milestones
from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.runtime.config import replace
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_tensors


@pytest.fixture(scope="module")
def config(recipe: Callable[..., DistillConfig]) -> DistillConfig:
    """A state of every kind of tensor but those of consolidation; milestones at 0, 1, 3 and 4."""
    return recipe(**SOFT)


@pytest.fixture(scope="module")
def whole(config: DistillConfig, buffer: Buffer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its run, never interrupted."""
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    distill(config, buffer, folder)
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "milestone-000000.safetensors",
        "milestone-000003.safetensors",
        "synthetic.safetensors",
        "result.json",
    ],
)
def test_interrupted_before_any_file_it_gives_the_same(
    buffer: Buffer, config: DistillConfig, whole: Path, tmp_path: Path, monkeypatch, file: str
) -> None:
    rename = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.name == file:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(config, buffer, tmp_path)
    distill(config, buffer, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize(
    ("count", "kept"), [(0, []), (1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_milestones_are_evenly_spaced(buffer: Buffer, recipe, tmp_path: Path, count: int, kept: list[int]) -> None:
    distill(recipe(milestones=count, student_steps=1, validate_every=0), buffer, tmp_path)
    assert milestones(tmp_path) == kept


def test_a_milestone_is_the_checkpoint_of_its_iteration(
    buffer: Buffer, config: DistillConfig, whole: Path, tmp_path: Path
) -> None:
    for iteration in milestones(whole)[1:]:
        stop_at(iteration, replace(config, checkpoint_every=1, milestones=0), buffer, tmp_path)
        state, header = read_tensors(milestone_path(whole, iteration), "state")
        other, also = read_tensors(tmp_path / "checkpoint.safetensors", "state")
        untimed = {"seconds": 0, "metrics": ""}
        assert {**header, **untimed} == {**also, **untimed, "iteration": iteration}
        assert state.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"ipc": 2}, r"best\.images is float32\[10, 1, 8, 8\], not float32\[20, 1, 8, 8\]"),
        ({"labels": "hard"}, r"best\.label_logits is float32\[10, 10\], not missing"),
        ({"ema": None}, r"ema\.images is float32\[10, 1, 8, 8\], not missing"),
        ({"consolidation": "si"}, r"consolidation\.gathered is missing, not float32\[10, 1, 8, 8\]"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    buffer: Buffer, config: DistillConfig, whole: Path, wanted: dict[str, Any], sentence: str
) -> None:
    other = replace(config, **wanted)
    state = State(other, first(other, buffer))
    with pytest.raises(UserError, match=rf"000003\.safetensors is a checkpoint of another run: {sentence}\.$"):
        state.read(milestone_path(whole, 3))


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
@pytest.mark.parametrize("count", [0, 4])
def test_a_checkpoint_that_is_deleted_costs_the_way_from_the_last_milestone(
    buffer: Buffer, config: DistillConfig, whole: Path, tmp_path: Path, monkeypatch, damage: str, count: int
) -> None:
    config = replace(config, milestones=count)
    stop_at(3, config, buffer, tmp_path)
    checkpoint = tmp_path / "checkpoint.safetensors"
    if damage != "deleted":
        bytes_ = checkpoint.read_bytes()
        checkpoint.write_bytes(bytes_[:-10] if damage == "truncated" else bytes_[:-10] + b"?" + bytes_[-9:])
        before = contents(tmp_path)
        with pytest.raises(UserError) as refused:
            distill(config, buffer, tmp_path)
        reason = {"truncated": r"is truncated or not .*", "flipped": r"is damaged: .* does not have the digest .*"}
        place = "iteration 3" if count else "the start"
        assert re.fullmatch(rf"{checkpoint} {reason[damage]}\. Delete it to go on from {place}\.", str(refused.value))
        assert contents(tmp_path) == before
    checkpoint.unlink()
    begun, iterate = [], loop.iterate
    monkeypatch.setattr(loop, "iterate", lambda state, *rest: begun.append(state.iteration) or iterate(state, *rest))
    distill(config, buffer, tmp_path)
    assert begun == list(range(3 if count else 0, 6))
    assert metrics(tmp_path) == metrics(whole)


def test_damaged_milestones_are_named_one_after_the_other(
    buffer: Buffer, config: DistillConfig, whole: Path, tmp_path: Path
) -> None:
    stop_at(3, config, buffer, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    names = ["checkpoint.safetensors", *(f"milestone-00000{kept}.safetensors" for kept in (3, 1, 0))]
    for name, place in zip(names, ("iteration 3", "iteration 1", "iteration 0", "the start"), strict=True):
        with pytest.raises(UserError, match=rf"/{name} is truncated or not .*\. Delete it to go on from {place}\.$"):
            distill(config, buffer, tmp_path)
        (tmp_path / name).unlink()
    distill(config, buffer, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_damaged_metrics_are_named_before_anything_is_lost(
    buffer: Buffer, config: DistillConfig, tmp_path: Path
) -> None:
    stop_at(4, config, buffer, tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"anchor": ', b'"anchor":1', 1))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged or missing: its lines are not those that were wri"):
        distill(config, buffer, tmp_path)
    assert contents(tmp_path) == before


@pytest.fixture
def fill_disk() -> Iterator[Callable[[], None]]:
    """Once called, files cannot grow beyond 4 KB: a checkpoint does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_gives_a_message_and_keeps_what_was_there(
    buffer: Buffer, tmp_path: Path, monkeypatch, capsys, fill_disk
) -> None:
    options = "--iterations 6 --student-steps 5 --window-end 4 --checkpoint-every 2 --validate-every 0 --device cpu"
    arguments = ["distill", "--buffer", str(buffer.folder), "--out", str(tmp_path), *options.split()]
    with monkeypatch.context() as patch:
        iterate = loop.iterate

        def interrupted(state, *rest):
            if state.iteration == 3:
                raise KeyboardInterrupt
            return iterate(state, *rest)

        patch.setattr(loop, "iterate", interrupted)
        assert cli.main(arguments) == 130
    checkpoint = contents(tmp_path)["checkpoint.safetensors"]
    assert len(checkpoint) > 4096
    fill_disk()
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "what was finished before is kept, and the same command resumes" in error
    assert contents(tmp_path)["checkpoint.safetensors"] == checkpoint
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
