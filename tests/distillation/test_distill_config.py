"""Configurations that are impossible, and buffers that do not fit, are refused before anything is written."""

import math
from pathlib import Path

import pytest
from running import CPU, distill
from works import refusal

import cddlib
from cddlib.distillation.config import with_compilation
from cddlib.experts.buffer import Buffer
from cddlib.runtime.config import flat, replace
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import write_json

REFUSED = {
    "it must be at least 1.": [
        *(("experts", 0), ("epochs", 0), ("batch_size", 0), ("all_from_epoch", 0), ("ipc", 0), ("iterations", 0)),
        *(("concurrent_experts", 0), ("validation_runs", 0), ("consolidate_every", 0), ("evaluation_batch", 0)),
        *(("student_steps", 0), ("student_batch", 0), ("side_by_side", 0), ("segments", 0), ("expert_epochs", 0)),
        *(("expansion_iterations", 0), ("subsets", 0), ("checkpoint_every", 0)),
    ],
    "it must be at least 1 and at most 100000.": [("evaluation_epochs", 0), ("evaluation_epochs", 100_001)],
    "it must be at least 0.": [("milestones", -1), ("expert", -1), ("replay", -1)],
    "it must be at least 0 and below 1.": [("momentum", -1.0), ("momentum_labels", 1.0), ("dropped_fraction", 1.0)],
    "it must be at least 0 and below inf.": [
        *(("weight_decay", -1.0), ("lr_images", -1.0), ("sharpness_radius", -1.0), ("sharpness_weight", math.inf)),
        *(("balance", -0.1), ("balance", math.inf), ("balance", math.nan)),
    ],
    "it must be above 0 and below inf.": [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("step_size", math.nan),
        ("consolidation_strength", 0.0),
    ],
    "it must be above 0 and below 1.": [("ema", 1.0), ("ema", 0.0)],
    "it must be above 0 and at most 1.": [("easiest_fraction", 0.0), ("easiest_fraction", 1.1)],
    "2 subsets need at least 2 images a class.": [("ipc", 1)],
    "epochs must be ascending, each once, and not before all_from_epoch (20).": [
        ("drop_epochs", epochs) for epochs in ((40, 30), (30, 30), (19, 20))
    ],
}
"""Fields and values of a buffer or a distillation, by what is said of them."""


@pytest.mark.parametrize(("said", "field", "value"), [(said, *each) for said in REFUSED for each in REFUSED[said]])
def test_impossible_values_are_refused(recipe, said: str, field: str, value: object) -> None:
    """In a curriculum of two drops, and with two subsets."""
    staged = cddlib.buffer_recipe("digits", drop_epochs=(25, 30), drop_fractions=(0.1, 0.2))
    config = staged if field in flat(staged) else recipe(ipc=2, subsets=2)
    assert refusal(replace, config, **{field: value}) == f"{field} is {value}; {said}"


def test_batches_divide_what_is_learned_evenly(recipe) -> None:
    assert [recipe().student.batch(*stage) for stage in ((170, 0), (340, 1), (500, 2))] == [170, 170, 167]
    assert recipe(ipc=10, subsets=2, student_batch=100).images_a_step(10) == (50 + 100) // 2


def test_values_that_do_not_go_together_are_refused(recipe) -> None:
    with pytest.raises(UserError, match=r"^expert is 1 and concurrent_experts is 2; leave one of them out\.$"):
        recipe(concurrent_experts=2, expert=1)
    with pytest.raises(UserError, match=r"^drop_fractions is 1\.0; it must be at least 0 and below 1\.$"):
        cddlib.buffer_recipe("digits", drop_epochs=(25, 30), drop_fractions=(0.5, 1.0))
    with pytest.raises(UserError, match=r"^drop_fractions has 0 values and drop_epochs 1; each epoch needs a fraction"):
        cddlib.buffer_recipe("digits", drop_epochs=(30,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 16}, "width is 16, but the experts in FOLDER were trained with 8."),
        ({"data": "fashion_mnist"}, "data is 'fashion_mnist', but the experts in FOLDER were trained with 'digits'."),
        ({"zca": True}, "zca is True, but the experts in FOLDER were trained with False."),
        ({"augment": "flip"}, "augment is 'flip', but the experts in FOLDER were trained with 'crop_scale_rotate'."),
        ({"window_end": 6}, "the experts stop at epoch 6; window_end may be at most 5."),
        ({"expert": 2}, "expert is 2, but FOLDER holds experts 0 to 1."),
        ({"concurrent_experts": 3}, "concurrent_experts is 3, but FOLDER holds 2."),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer: Buffer, recipe, tmp_path: Path, wrong, message: str) -> None:
    said = refusal(distill, replace(recipe(), **wrong), buffer, tmp_path / "run")
    assert said.endswith(message.replace("FOLDER", str(buffer.folder)))
    assert not (tmp_path / "run").exists()


def test_long_runs_are_compiled_unless_told_otherwise(buffer: Buffer, recipe, tmp_path: Path) -> None:
    def decided(**overrides: object) -> bool | None:
        return with_compilation(recipe(**overrides), buffer, tmp_path, CPU).compute.compiled

    least = next(n for n in (2**k for k in range(60)) if decided(iterations=n))
    assert least > 10_000, "the digits of the tests earn it late"
    assert not decided(iterations=least // 2) and not decided(iterations=least, compiled=False)
    assert decided(iterations=5, compiled=True)
    for more in ({"segments": 4}, {"student_steps": 2 * recipe().student.student_steps}, {"ipc": 2}):
        assert decided(iterations=least // 2, **more)
    for begun in (True, False):  # on another device, where the choice may be another
        write_json(tmp_path / "config.json", {"compiled": begun})
        assert decided(iterations=5) is decided(iterations=least) is begun
        assert decided(iterations=5, compiled=not begun) is not begun
