"""Configurations that are impossible, and buffers that do not fit, are refused before anything is written."""

from pathlib import Path

import pytest
from running import CPU, distill

from cddlib.distillation.config import with_compilation
from cddlib.experts.buffer import Buffer
from cddlib.runtime.config import replace
from cddlib.runtime.errors import UserError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations is 0; it must be at least 1."),
        ({"validation_runs": 0}, "validation_runs is 0; it must be at least 1."),
        ({"milestones": -1}, "milestones is -1; it must be at least 0."),
        ({"concurrent_experts": 0}, "concurrent_experts is 0; it must be at least 1."),
        (
            {"concurrent_experts": 2, "expert": 1},
            "expert is 1 and concurrent_experts is 2; leave one of them out.",
        ),
        ({"dropped_fraction": 1.0}, "dropped_fraction is 1.0; it must be at least 0 and below 1."),
        ({"ipc": 1, "subsets": 2}, "ipc is 1; 2 subsets need at least 2 images a class."),
        ({"lr_images": -1.0}, "lr_images is -1.0; it must be at least 0 and below inf."),
        ({"momentum_labels": 1.0}, "momentum_labels is 1.0; it must be at least 0 and below 1."),
        ({"ema": 1.0}, "ema is 1.0; it must lie between 0 and 1."),
        ({"consolidation_strength": 0.0}, "consolidation_strength is 0.0; it must be a finite number above 0."),
        (
            {"consolidation_strength": float("nan")},
            "consolidation_strength is nan; it must be a finite number above 0.",
        ),
        ({"consolidate_every": 0}, "consolidate_every is 0; it must be at least 1."),
    ],
)
def test_impossible_distillations_are_refused(recipe, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(recipe(), **wrong)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 16}, "width is 16, but the experts in FOLDER were trained with 8."),
        ({"data": "fashion_mnist"}, "data is 'fashion_mnist', but the experts in FOLDER were trained with 'digits'."),
        ({"zca": True}, "zca is True, but the experts in FOLDER were trained with False."),
        ({"augment": "flip"}, "augment is 'flip', but the experts in FOLDER were trained with 'crop_scale_rotate'."),
        ({"window_end": 6}, "the experts stop at epoch 6; window_end may be at most 5."),
        # a real epoch just before 5 is two epochs before one just before 7
        ({"convex": True, "window_end": 5}, "the experts stop at epoch 6; window_end may be at most 4."),
        ({"expert": 2}, "expert is 2, but FOLDER holds experts 0 to 1."),
        ({"concurrent_experts": 3}, "concurrent_experts is 3, but FOLDER holds 2."),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer: Buffer, recipe, tmp_path: Path, wrong, message: str) -> None:
    with pytest.raises(UserError) as refused:
        distill(replace(recipe(), **wrong), buffer, tmp_path / "run")
    assert str(refused.value).endswith(message.replace("FOLDER", str(buffer.folder)))
    assert not (tmp_path / "run").exists()


def test_long_runs_are_compiled_unless_told_otherwise(buffer: Buffer, recipe) -> None:
    def decided(**overrides: object) -> bool | None:
        return with_compilation(recipe(**overrides), buffer, CPU).compute.compiled

    least = next(n for n in (2**k for k in range(60)) if decided(iterations=n))
    assert least > 10_000, "the digits of the tests earn it late"
    assert not decided(iterations=least // 2) and not decided(iterations=least, compiled=False)
    assert decided(iterations=5, compiled=True)
    for more in ({"segments": 4}, {"student_steps": 2 * recipe().student.student_steps}, {"ipc": 2}):
        assert decided(iterations=least // 2, **more)
