"""Checkpoints and milestones: what they hold, what damage costs, and that nothing is lost before it is replaced."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import SOFT, distill, first, stop_at
from works import assert_same

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
        assert {**header, **untimed} == {**also, **untimed}
        assert header["iteration"] == iteration
        assert state.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_the_checkpoint_of_another_run_is_refused(buffer: Buffer, config: DistillConfig, whole: Path) -> None:
    for wanted, sentence in (
        ({"ipc": 2}, r"best\.images is float32\[10, 1, 8, 8\], not float32\[20, 1, 8, 8\]"),
        ({"ema": None}, r"ema\.images is float32\[10, 1, 8, 8\], not missing"),
        ({"consolidation": "si"}, r"consolidation\.gathered is missing, not float32\[10, 1, 8, 8\]"),
    ):
        other = replace(config, **wanted)
        with pytest.raises(UserError, match=rf"000003\.safetensors is a checkpoint of another run: {sentence}\.$"):
            State(other, first(other, buffer)).read(milestone_path(whole, 3))


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
    assert_same(tmp_path, whole)
