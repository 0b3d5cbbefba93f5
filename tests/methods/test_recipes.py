"""Recipes: the published numbers, overrides, and concurrent matching on each cell."""

import pytest

from cddbook.study import parse_grid
from cddbook.tables import accuracies
from cddlib import DistillConfig, buffer_recipe, distill_recipe
from cddlib.methods.catalogue import METHODS
from cddlib.methods.recipes import CELLS, recipes_table, source
from cddlib.plan import buffer_of, plan, sizes_of
from cddlib.runtime.errors import UserError

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
    assert (c.labels, c.ema, c.loss_threshold, c.window_end_initial) == ("hard", None, None, None)
    assert (c.evaluation_epochs, c.evaluation_batch) == (1000, 256)
    assert (c.depth, c.width, c.norm) == (4 if data == "tiny_imagenet" else 3, 128, "instance")


@cells
def test_mtt_whitens_where_the_authors_do(data: str, ipc: int) -> None:
    assert distill_recipe("mtt", data, ipc).zca is PUBLISHED[data, ipc][-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segments", [1, 2, 7])
def test_every_method_becomes_concurrent_by_one_number(method: str, segments: int) -> None:
    for data, ipcs in CELLS.items():
        for ipc in ipcs:
            one, concurrent = (distill_recipe(method, data, ipc, segments=k) for k in (1, segments))
            assert concurrent.segments == segments
            differing = {name for name, value in vars(one).items() if value != getattr(concurrent, name)}
            assert differing <= {"segments", "window_end", "window_end_initial"}
            concurrent.check_epochs(buffer_recipe(data, method, ipc).epochs)


def test_a_window_that_is_too_narrow_is_widened() -> None:
    assert distill_recipe("mtt", "cifar10", 1, segments=7).window_end == 7
    assert distill_recipe("mtt", "cifar10", 1, segments=2).window_end == 2
    late = distill_recipe("pad", "cifar100", 50, segments=30)
    assert (late.window_start, late.window_end_initial, late.window_end) == (40, 70, 80)


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny_imagenet"])
def test_contra_is_datm_with_four_segments(data: str) -> None:
    for ipc in CELLS[data]:
        datm, contra = (distill_recipe(method, data, ipc) for method in ("datm", "contra"))
        differing = {name for name, value in vars(datm).items() if value != getattr(contra, name)}
        assert differing == {"method", "segments"}
        assert contra.segments == 4
        assert buffer_recipe(data, "datm", ipc) == buffer_recipe(data, "contra", ipc)


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_on_small_data_contra_differs_from_mtt_in_k_alone(data: str, ipc: int) -> None:
    mtt, contra = (distill_recipe(method, data, ipc) for method in ("mtt", "contra"))
    assert {n for n, value in vars(mtt).items() if value != getattr(contra, n)} == {"method", "segments"}
    assert buffer_recipe(data, "contra", ipc) == buffer_recipe(data, "mtt", ipc)


# --- Values of the other methods, as published (facts kept apart from the code) ----------------------------------

# N, M, window, images a step, images' rate, labels' rate, step size's rate, threshold, initial images
DATM = {
    ("cifar10", 1): (80, 2, (0, None, 4), 10, 100, 5, 1e-7, 1.1, "correct"),
    ("cifar10", 50): (80, 2, (0, 20, 40), 500, 1000, 2, 1e-5, 1, "correct"),
    ("cifar10", 1000): (100, 2, (40, None, 60), 1000, 50, 10, 1e-5, 1, "correct"),
    ("cifar100", 1): (40, 3, (0, 10, 20), 1000, 1000, 10, 1e-5, 1, "correct"),
    ("cifar100", 10): (80, 2, (0, 30, 50), 1000, 1000, 10, 1e-5, 1, "correct"),
    ("cifar100", 50): (80, 2, (20, None, 70), 1000, 1000, 10, 1e-5, 1, "real"),
    ("tiny_imagenet", 10): (40, 2, (10, None, 50), 500, 100, 10, 1e-4, 1, "correct"),
}


@pytest.mark.parametrize(("data", "ipc"), DATM)
def test_datm_has_the_published_numbers(data: str, ipc: int) -> None:
    c = distill_recipe("datm", data, ipc)
    found = (
        *(c.student_steps, c.expert_epochs, (c.window_start, c.window_end_initial, c.window_end), c.student_batch),
        *(c.lr_images, c.lr_labels, c.lr_step_size, c.loss_threshold, c.init),
    )
    assert found == DATM[data, ipc]
    assert (c.labels, c.momentum_labels, c.iterations, c.step_size, c.zca) == ("learned", 0.9, 10000, 0.01, True)
    assert (c.ema, c.evaluation_batch, c.evaluation_epochs) == (None, 128, 1000)
    e = buffer_recipe(data, "datm", ipc)
    assert (e.experts, e.epochs, e.sharpness_radius, e.sharpness_weight, e.zca) == (100, 100, 0.01, 0.3, True)
    assert (e.learning_rate, e.batch_size, e.momentum, e.easiest_fraction) == (0.01, 256, 0, 1)


def test_the_curriculum_of_datm_ends_when_published() -> None:
    ends = {cell: distill_recipe("datm", *cell).expansion_iterations for cell in [("cifar10", 10), ("cifar10", 50)]}
    assert ends == {("cifar10", 10): 1000, ("cifar10", 50): 2000}


@pytest.mark.parametrize(
    ("ipc", "alpha", "ema", "step_size"), [(1, 0.3, 0.9999, 0.01), (10, 0.3, 0.9995, 0.001), (50, 1, 0.999, 0.01)]
)
def test_ftd_trains_flat_experts_and_averages(ipc: int, alpha: float, ema: float, step_size: float) -> None:
    c, e = distill_recipe("ftd", "cifar10", ipc), buffer_recipe("cifar10", "ftd", ipc)
    assert (e.sharpness_radius, e.sharpness_weight, e.sharpness_adaptive) == (0.01, alpha, True)
    assert (e.experts, e.epochs, c.ema, c.step_size) == (100, 50, ema, step_size)
    assert buffer_recipe("cifar10").sharpness_radius == 0


def test_tesla_is_truncated_and_labels_imagenet_by_the_target() -> None:
    c = distill_recipe("tesla", "imagenet", 1)
    assert (c.gradient, c.labels, c.student_steps, c.expert_epochs, c.window_end) == ("halved", "teacher", 10, 3, 10)
    assert (c.student_batch, c.lr_images, c.lr_step_size, c.depth, c.iterations) == (100, 1e4, 1e-4, 4, 10000)
    assert buffer_recipe("imagenet", "tesla", 1).experts == 50
    c = distill_recipe("tesla", "cifar10", 1)
    assert (c.gradient, c.labels, c.window_end, c.lr_images, c.zca) == ("halved", "hard", 5, 1000, False)


def test_pad_selects_parameters_and_images() -> None:
    c, e = distill_recipe("pad", "cifar10", 50), buffer_recipe("cifar10", "pad", 50)
    assert (c.dropped_fraction, c.labels, c.student_steps) == (0.5, "learned", 80)
    assert distill_recipe("pad", "cifar10", 1).dropped_fraction == 0
    assert (e.easiest_fraction, e.all_from_epoch, e.drop_epochs, e.drop_fractions) == (0.75, 20, (40, 60), (0.1, 0.2))
    assert (e.epochs, e.sharpness_radius) == (100, 0.01)


def test_att_mct_and_seqmatch_each_set_their_idea() -> None:
    att, mct, seqmatch = (distill_recipe(method, "cifar10", 50) for method in ("att", "mct", "seqmatch"))
    assert (att.match_step, mct.match_step, att.ema) == ("nearest", "last", 0.999)
    assert (buffer_recipe("cifar10", "att", 50).batch_size, buffer_recipe("cifar10", "mct", 50).batch_size) == (
        512,
        256,
    )
    assert (mct.convex, att.convex, mct.zca) == (True, False, False)
    assert (seqmatch.subsets, seqmatch.student_steps, seqmatch.lr_images) == (3, 30, 100)
    assert (distill_recipe("att", "cifar10", 1).student_steps, distill_recipe("att", "cifar10", 1).expert_epochs) == (
        80,
        4,
    )
    assert (distill_recipe("mct", "cifar10", 10).expert_epochs, distill_recipe("seqmatch", "cifar10", 1).subsets) == (
        15,
        1,
    )


# --- Every recipe of every cell -----------------------------------------------------------------------------------

every_cell = pytest.mark.parametrize(("data", "ipc"), [(data, ipc) for data, ipcs in CELLS.items() for ipc in ipcs])


@every_cell
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_fits_its_experts_and_is_planned(method: str, data: str, ipc: int) -> None:
    config, experts = distill_recipe(method, data, ipc), buffer_recipe(data, method, ipc)
    config.check_epochs(experts.epochs)
    assert buffer_of(config) == experts
    training, distillation, evaluation = plan(experts, config, measure=False)
    assert training.disk == 4 * experts.experts * (experts.epochs + 1) * distillation_parameters(config)
    assert min(training.flops, distillation.flops, evaluation.flops) > 1e9
    assert min(training.memory, distillation.memory, evaluation.memory) > 1e5


def distillation_parameters(config: DistillConfig) -> int:
    """Parameters of the ConvNet: 9 c w + 3 w in each block, then the classifier."""
    size = sizes_of(config.data, None)
    channels, side = size.shape[0], 32 if size.shape[1] == 28 else size.shape[1]
    blocks = 9 * channels * config.width + (config.depth - 1) * 9 * config.width**2 + 3 * config.depth * config.width
    return blocks + (config.width * (side // 2**config.depth) ** 2 + 1) * size.classes


@every_cell
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_says_where_its_values_are_from(method: str, data: str, ipc: int) -> None:
    kind, text = source(method, data, ipc)
    published = {(d, i) for d, i in PUBLISHED_CELLS[method]}
    assert (kind == "published") == ((data, ipc) in published)
    assert text


PUBLISHED_CELLS = {
    "mtt": list(PUBLISHED),
    "tesla": [("cifar10", 1), ("cifar100", 50), ("imagenet", 1)],
    "ftd": [cell for cell in PUBLISHED if cell != ("tiny_imagenet", 50)],
    "datm": [(data, ipc) for data in ("cifar10", "cifar100", "tiny_imagenet") for ipc in CELLS[data]],
    "pad": [(data, ipc) for data in ("cifar10", "cifar100", "tiny_imagenet") for ipc in CELLS[data]],
    "att": [cell for cell in PUBLISHED if cell != ("tiny_imagenet", 50)],
    "mct": [("cifar10", 1), ("cifar10", 10), ("cifar10", 50)],
    "seqmatch": [("cifar10", 50)],
    "contra": [],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_published_accuracy_has_a_recipe(method: str) -> None:
    for accuracy in accuracies(method):
        assert accuracy.ipc in CELLS[accuracy.data]
        assert 0 < accuracy.mean < 100 and accuracy.source
        distill_recipe(method, accuracy.data, accuracy.ipc)


def test_accuracies_are_read_from_the_tables() -> None:
    found = {(a.data, a.ipc): (a.mean, a.std) for a in accuracies("datm")}
    assert found["cifar10", 1] == (46.9, 0.5)
    assert found["tiny_imagenet", 50] == (39.7, 0.3)
    assert len(found) == 12
    assert [(a.mean, a.std) for a in accuracies("contra")] == [(50.0, None), (68.3, None)]


def test_the_table_has_a_line_for_every_cell() -> None:
    lines = recipes_table().splitlines()
    assert len(lines) == 2 + len(METHODS) * sum(map(len, CELLS.values()))
    assert len({len(line) for line in lines}) == 1
    (line,) = [line for line in recipes_table("datm", "cifar100").splitlines() if "| 10 " in line[:40]]
    assert [cell.strip() for cell in line.strip("|").split("|")][:12] == [
        *("datm", "cifar100", "10", "1", "2", "80", "1000", "[0, 30→50)", "10000", "1000", "10", "1e-05"),
    ]
    for wrong in ({"method": "ftd2"}, {"data": "imagefolder"}):
        with pytest.raises(UserError):
            recipes_table(**wrong)


def test_a_grid_is_read_by_the_types_of_its_fields() -> None:
    grid = parse_grid(["lr_images=10,30", "student_batch=none,5", "labels=hard", "convex=true"])
    assert grid == {"lr_images": [10.0, 30.0], "student_batch": [None, 5], "labels": ["hard"], "convex": [True]}
    for wrong in ("lr_images", "lr_images=", "colour=1", "lr_images=many", "convex=perhaps"):
        with pytest.raises(UserError, match=wrong):
            parse_grid([wrong])


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
    config.check_epochs(buffer_recipe(data, method, ipc).epochs)


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


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"^unknown method 'ftd2'; choose one of mtt, tesla, ftd, datm, "):
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
