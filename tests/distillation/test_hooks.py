"""Hooks see every iteration from 0 on, belong to the run's identity, and cannot write what is not finite."""

import dataclasses
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import distill, first, stop_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from works import assert_same, contents, metrics

import cddlib
from cddlib.distillation.hooks import Hook, Run
from cddlib.experts.buffer import Buffer
from cddlib.runtime.errors import Diverged, UserError
from cddlib.runtime.files import read_json


@dataclasses.dataclass(frozen=True)
class Brightest:
    """Measures the brightest pixel every few iterations."""

    brightest_every: int = 4

    def after_iteration(self, run: Run) -> dict[str, Any]:
        """See `Hook`."""
        return {"brightest": run.synthetic.images.max().item()} if run.due(self.brightest_every) else {}


def hook_of(after_iteration: Callable[[Run], dict[str, Any]]) -> Hook:
    """A hook without fields."""
    return dataclasses.make_dataclass("Told", [], namespace={"after_iteration": staticmethod(after_iteration)})()


def test_hooks_see_every_iteration_from_0_on(buffer: Buffer, recipe, tmp_path: Path) -> None:
    seen: list[tuple[int, Path, str, dict[str, Any]]] = []

    def look(run: Run) -> dict[str, Any]:
        seen.append((run.iteration, run.folder, run.buffer.id, dict(run.metrics)))
        return {"told": [1, {"b": 0.5}]} if run.iteration == 2 else {}

    distill(recipe(), buffer, tmp_path, hooks=[Brightest(), hook_of(look)])
    lines = metrics(tmp_path)
    for number, (iteration, folder, buffer_id, line) in enumerate(seen):
        assert (iteration, folder, buffer_id) == (number, tmp_path, buffer.id)
        assert lines[number].keys() - {"told"} == line.keys() - {"seconds"}  # with what earlier hooks measured
    assert [line["iteration"] for line in lines if "brightest" in line] == [0, 4, 6]
    assert [line["told"] for line in lines if "told" in line] == [[1, {"b": 0.5}]]


def test_a_hook_changes_nothing_else_and_survives_an_interruption(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(labels="learned")
    plain = distill(config, buffer, tmp_path / "plain").variable_tensors()
    hooked = distill(config, buffer, tmp_path / "hooked", hooks=[Brightest()]).variable_tensors()
    assert all(torch.equal(tensor, hooked[name]) for name, tensor in plain.items())
    lines = [{name: line[name] for name in line if name != "brightest"} for line in metrics(tmp_path / "hooked")]
    assert lines == metrics(tmp_path / "plain")
    stop_at(5, config, buffer, tmp_path / "parts", hooks=[Brightest()])
    distill(config, buffer, tmp_path / "parts", hooks=[Brightest()])
    assert_same(tmp_path / "parts", tmp_path / "hooked")


def test_a_hook_s_fields_are_part_of_the_run_s_identity(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(iterations=2, validate_every=0)
    stop_at(1, config, buffer, tmp_path, hooks=[Brightest(2)])
    before = contents(tmp_path)
    for other, hooks, said in (
        (config, [Brightest(3)], "brightest_every is 2 there and 3 here"),
        (config, [], "brightest_every is 2 there and None here"),
        (cddlib.replace(config, seed=1), [Brightest(2)], "seed is 0 there and 1 here"),
    ):
        with pytest.raises(UserError, match=rf"holds another run \({said}\); choose another folder"):
            distill(other, buffer, tmp_path, hooks=hooks)
    assert contents(tmp_path) == before
    distill(config, buffer, tmp_path, hooks=[hook_of(lambda run: {}), Brightest(2)])  # one without fields is not
    assert read_json(tmp_path / "config.json")["brightest_every"] == 2
    with pytest.raises(UserError, match=r"^the hook Brightest has a field 'brightest_every', which the run has too\.$"):
        distill(config, buffer, tmp_path, hooks=[Brightest(2), Brightest(3)])


@pytest.mark.parametrize(("iteration", "saved"), [(0, ""), (5, "the checkpoint holds iteration 4; ")])
@pytest.mark.parametrize("value", [float("nan"), [1.0, {"deep": float("-inf")}]])
def test_values_that_are_not_finite_stop_the_run(
    buffer: Buffer, recipe, tmp_path: Path, iteration: int, saved: str, value: Any
) -> None:
    hook = hook_of(lambda run: {"told": value} if run.iteration == iteration else {})
    with pytest.raises(Diverged) as stopped:
        distill(recipe(lr_step_size=0.0, validate_every=0), buffer, tmp_path, hooks=[hook])
    assert str(stopped.value) == (
        f"iteration {iteration}: told is not finite, at the step size {recipe().synthetic.step_size:g}; {saved}start "
        f"again in another folder with a lower --step-size, --lr-step-size or --lr-images."
    )
    assert not (tmp_path / "result.json").exists()


def test_tensorboard_holds_the_metrics_and_the_images(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(validation_runs=2)
    distill(config, buffer, tmp_path, hooks=[Brightest(), cddlib.TensorBoard()])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = metrics(tmp_path)
    found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag in ("loss", "losses/1", "step_size", "brightest", "validation_accuracy/1"):
        name, _, index = tag.partition("/")
        values = {line["iteration"]: line[name] for line in lines if name in line}
        wanted = {step: value[int(index)] if index else value for step, value in values.items()}
        assert found[tag] == pytest.approx(wanted, rel=1e-6)
    pictures = events.Images("synthetic set")
    assert [event.step for event in pictures] == [0, 3, 6]
    grid = torch.tensor(np.array(Image.open(io.BytesIO(pictures[0].encoded_image_string))))[:, :, 0] / 255
    tiles = grid.unflatten(0, (2, 8)).unflatten(2, (8, 8)).transpose(1, 2).flatten(0, 1)[:10]
    assert (tiles - first(config, buffer).pictures()[:, 0]).abs().max() < 0.01


def test_tensorboard_takes_back_what_is_done_again(buffer: Buffer, recipe, tmp_path: Path) -> None:
    """In the process that was stopped, and in a folder that was deleted meanwhile."""
    config, hooks = recipe(checkpoint_every=2, validate_every=0), [cddlib.TensorBoard()]
    stop_at(3, config, buffer, tmp_path / "run", hooks=hooks)
    for _ in range(2):
        distill(config, buffer, tmp_path / "run", hooks=hooks)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
        shutil.rmtree(tmp_path / "run")


def test_tensorboard_that_is_missing_is_named(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^the hook TensorBoard needs the package tensorboard; install it with `pip"):
        distill(recipe(), buffer, tmp_path, hooks=[cddlib.TensorBoard()])
