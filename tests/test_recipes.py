"""Recipes: the published numbers, overrides, and concurrent matching on each cell."""

import pytest

from cddlib import buffer_recipe, distill_recipe
from cddlib.runs import UserError

# (data set, IPC): N, M, T+, synthetic images a step, images' rate, step size's rate, first step size, ZCA.
# As the authors gave them (dc_benchmark, methods/tm/readme.md).
PUBLISHED = {
    ("cifar10", 1): (50, 2, 2, None, 100, 1e-7, 0.01, True),
    ("cifar10", 10): (30, 2, 20, None, 100, 1e-5, 0.001, True),
    ("cifar10", 50): (30, 2, 40, None, 1000, 1e-5, 0.001, False),
    ("cifar100", 1): (20, 3, 20, None, 1000, 1e-5, 0.01, True),
    ("cifar100", 10): (20, 2, 20, None, 1000, 1e-5, 0.01, False),
    ("cifar100", 50): (80, 2, 40, 125, 1000, 1e-5, 0.01, True),
    ("tiny_imagenet", 1): (10, 2, 10, None, 1e4, 1e-4, 0.01, False),
    ("tiny_imagenet", 10): (20, 2, 40, 200, 1e4, 1e-4, 0.01, False),
    ("tiny_imagenet", 50): (20, 2, 40, 300, 1e4, 1e-4, 0.01, False),
}
DSA = "color_crop_cutout_flip_scale_rotate"
cells = pytest.mark.parametrize(("data", "ipc"), PUBLISHED)


@cells
def test_mtt_has_the_published_numbers(data: str, ipc: int) -> None:
    c = distill_recipe("mtt", data, ipc)
    found = (c.student_steps, c.expert_epochs, c.window_end, c.student_batch, c.lr_images, c.lr_step_size, c.step_size)
    assert found == PUBLISHED[data, ipc][:-1]
    assert (c.method, c.data, c.ipc, c.segments, c.window_start, c.iterations) == ("mtt", data, ipc, 1, 0, 5000)
    assert (c.momentum_images, c.momentum_step_size, c.augment, c.init) == (0.5, 0.5, DSA, "real")
    assert (c.soft_labels, c.ema, c.loss_threshold, c.window_end_initial) == (False, None, None, None)
    assert (c.evaluation_epochs, c.evaluation_batch) == (1000, 256)
    assert (c.depth, c.width, c.norm) == (4 if data == "tiny_imagenet" else 3, 128, "instance")


@cells
def test_mtt_whitens_where_the_authors_do(data: str, ipc: int) -> None:
    assert distill_recipe("mtt", data, ipc).zca is PUBLISHED[data, ipc][-1]


@cells
def test_contra_matches_four_segments_of_each_cell(data: str, ipc: int) -> None:
    mtt, contra = (distill_recipe(method, data, ipc) for method in ("mtt", "contra"))
    assert contra.segments == 4
    assert contra.window_end == max(mtt.window_end, 4)
    differing = {name for name, value in vars(mtt).items() if value != getattr(contra, name)}
    assert differing <= {"method", "segments", "window_end"}
    contra.check_epochs(buffer_recipe(data).epochs)


@pytest.mark.parametrize("segments", [1, 2, 7])
def test_contra_widens_a_window_that_is_too_narrow(segments: int) -> None:
    config = distill_recipe("contra", "cifar10", 1, segments=segments)
    assert (config.segments, config.window_end) == (segments, max(2, segments))


@cells
def test_experts_and_students_fit(data: str, ipc: int) -> None:
    experts, student = buffer_recipe(data, zca=PUBLISHED[data, ipc][-1]), distill_recipe("mtt", data, ipc)
    shared = ("data", "depth", "width", "norm", "activation", "pooling", "augment")
    assert [getattr(experts, name) for name in shared] == [getattr(student, name) for name in shared]


def test_experts_are_mtts() -> None:
    c = buffer_recipe("cifar10")
    assert (c.experts, c.epochs, c.learning_rate, c.batch_size) == (100, 50, 0.01, 256)
    assert (c.momentum, c.weight_decay) == (0, 0)


@pytest.mark.parametrize("method", ["mtt", "contra"])
@pytest.mark.parametrize("data", ["digits", "fashion_mnist", "imagefolder"])
@pytest.mark.parametrize("ipc", [1, 3, 50, 1000])
def test_every_data_set_and_ipc_has_a_recipe_that_fits_its_experts(method: str, data: str, ipc: int) -> None:
    config = distill_recipe(method, data, ipc)
    assert (config.data, config.ipc) == (data, ipc)
    config.check_epochs(buffer_recipe(data).epochs)


def test_an_unpublished_ipc_takes_the_nearest() -> None:
    near, published = distill_recipe("mtt", "cifar100", 40), distill_recipe("mtt", "cifar100", 50)
    assert {name for name, value in vars(near).items() if value != getattr(published, name)} == {"ipc"}


def test_overrides_by_name() -> None:
    config = distill_recipe("contra", "cifar10", 10, segments=2, window_end=30, lr_images=7.0, zca=False)
    assert (config.segments, config.window_end, config.lr_images, config.zca) == (2, 30, 7.0, False)
    assert buffer_recipe("digits", experts=3, width=4).experts == 3
    with pytest.raises(TypeError, match="colour"):
        distill_recipe("mtt", "digits", colour=1)


def test_an_explicit_window_is_not_widened() -> None:
    with pytest.raises(UserError, match=r"segments is 4, but the window \[0, 2\) has only 2 start epochs; use at most"):
        distill_recipe("contra", "cifar10", 1, window_end=2)


def test_mtt_refuses_more_segments() -> None:
    assert distill_recipe("mtt", segments=1).segments == 1
    with pytest.raises(UserError, match=r"^segments is 2; mtt matches one segment: use --method contra for more\.$"):
        distill_recipe("mtt", segments=2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^unknown method 'ftd2'; choose one of mtt, contra"):
        distill_recipe("ftd2")
    for call in (buffer_recipe, lambda name: distill_recipe("mtt", name)):
        with pytest.raises(UserError, match=r"^unknown data set 'mnist'; choose one of digits, "):
            call("mnist")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ipc": 0}, "ipc is 0; it must be at least 1."),
        ({"segments": 0}, "segments is 0; it must be at least 1."),
        ({"student_steps": 0}, "student_steps is 0; it must be at least 1."),
        ({"evaluation_epochs": 0}, "evaluation_epochs is 0; it must be at least 1."),
        ({"iterations": 0}, "iterations is 0; it must be at least 1."),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1."),
        ({"lr_images": -1.0}, "lr_images is -1.0; it must be 0 or more."),
        ({"ema": 1.0}, "ema is 1.0; it must lie between 0 and 1."),
        ({"balance": -1.0}, "balance is -1.0; it must be a finite number, 0 or more."),
        ({"augment": "blur"}, "augment is 'blur'; join some of "),
        ({"momentum_images": -0.5}, "momentum_images is -0.5; it must "),
        ({"momentum_labels": 1.5}, "momentum_labels is 1.5; it must "),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        distill_recipe("contra", **wrong)
    assert str(caught.value).startswith(message)
