"""Recipes: the published numbers, overrides, and concurrent matching on each cell."""

from collections.abc import Callable
from typing import Any

import pytest
from works import refusal

from cddbook.__main__ import parse_grid
from cddbook.tables import published
from cddlib import DistillConfig, buffer_recipe, build_network, distill_recipe
from cddlib.data.dataset import sizes_of
from cddlib.methods.catalogue import METHODS
from cddlib.methods.recipes import CELLS, ROWS, read_rows, recipes_table, resolve
from cddlib.networks.convnet import parameter_count
from cddlib.plan import buffer_of, plan
from cddlib.runtime.config import flat
from cddlib.runtime.errors import UserError

EVERY_CELL = [(data, ipc) for data, ipcs in CELLS.items() for ipc in ipcs]


def differing(one: DistillConfig, other: DistillConfig) -> set[str]:
    """The fields that have different values in two configurations."""
    return {name for name, value in flat(one).items() if value != flat(other)[name]}


# --- Published values -------------------------------------------------------------------------------------------

PLAIN = {"student_steps": 50, "window_end": 2, "student_batch": None, "lr_images": 100, "lr_step_size": 1e-7}
DSA = {"augment": "color_crop_cutout_flip_scale_rotate", "init": "real", "labels": "hard", "ema": None, "segments": 1}
LARGE = {"student_batch": 300, "window_end": 40, "lr_images": 1e4, "depth": 4, "width": 128, "evaluation_epochs": 1000}
EXPERTS = {"experts": 100, "epochs": 50, "learning_rate": 0.01, "batch_size": 256, "momentum": 0, "sharpness_radius": 0}


@pytest.mark.parametrize(
    ("method", "data", "ipc", "student", "experts"),
    [
        ("mtt", "cifar10", 1, PLAIN | DSA | {"zca": True}, EXPERTS),
        ("mtt", "cifar100", 50, {"student_batch": 125, "expert_epochs": 2, "step_size": 0.01, "iterations": 5000}, {}),
        ("mtt", "tiny_imagenet", 50, LARGE, EXPERTS),
        ("datm", "cifar10", 1, {"window_end": 4, "student_batch": 10, "lr_labels": 5, "loss_threshold": 1.1}, {}),
        ("datm", "cifar10", 10, {"labels": "learned", "expansion_iterations": 1000}, {"sharpness_radius": 0.01}),
        ("datm", "cifar100", 10, {"window_end_initial": 30, "window_end": 50, "iterations": 10000}, {"epochs": 100}),
        ("datm", "cifar100", 50, {"init": "real", "lr_images": 1000, "zca": True}, {"sharpness_weight": 0.3}),
        ("datm", "tiny_imagenet", 10, {"window_start": 10, "ema": None, "evaluation_batch": 128}, {"experts": 100}),
        ("ftd", "cifar10", 1, {"ema": 0.9999, "step_size": 0.01}, {"sharpness_weight": 0.3, "sharpness_radius": 0.01}),
        ("ftd", "cifar10", 10, {"ema": 0.9995, "step_size": 0.001}, {"sharpness_weight": 0.3, "epochs": 50}),
        ("ftd", "cifar10", 50, {"ema": 0.999}, {"sharpness_weight": 1, "sharpness_adaptive": True}),
        ("tesla", "cifar10", 1, {"gradient": "halved", "labels": "hard", "window_end": 5, "zca": False}, {}),
        ("tesla", "imagenet", 1, {"labels": "teacher", "student_batch": 100, "depth": 4}, {"experts": 50}),
        ("pad", "cifar10", 1, {"dropped_fraction": 0}, {}),
        ("pad", "cifar10", 50, {"dropped_fraction": 0.25, "labels": "learned"}, {"drop_epochs": (40, 60)}),
        ("att", "cifar10", 1, {"match_step": "nearest", "expert_epochs": 4, "iterations": 6000}, {"batch_size": 512}),
        ("att", "tiny_imagenet", 50, {"student_batch": 300, "ema": 0.999, "iterations": 80_000}, {"batch_size": 512}),
        ("ftd", "cifar100", 10, {"zca": True, "ema": 0.9995}, {"zca": True}),
        ("ftd", "tiny_imagenet", 50, {"student_batch": 300, "ema": 0.999}, {"sharpness_weight": 1}),
        ("mct", "cifar10", 1, {"convex": True, "zca": False, "expert_epochs": 6}, {"zca": False}),
        ("mct", "cifar10", 50, {"gradient": "halved", "step_size": 0.01}, {}),
        ("seqmatch", "cifar10", 50, {"subsets": 3, "window_end": 48, "iterations": 15_000}, {}),
    ],
)
def test_methods_have_the_published_numbers(
    method: str, data: str, ipc: int, student: dict[str, Any], experts: dict[str, Any]
) -> None:
    for wanted, found in ((student, distill_recipe(method, data, ipc)), (experts, buffer_recipe(data, method, ipc))):
        assert {name: flat(found)[name] for name in wanted} == wanted


# --- Every recipe of every cell -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "ipc"), EVERY_CELL)
@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_fits_its_experts_is_planned_and_says_where_it_is_from(method: str, data: str, ipc: int) -> None:
    config, experts = distill_recipe(method, data, ipc), buffer_recipe(data, method, ipc)
    config.schedule.check_epochs(experts.epochs)
    assert buffer_of(config) == experts
    training, distillation, evaluation = plan(experts, config, measure=False)
    sizes = sizes_of(data, None)
    parameters = parameter_count(build_network(config.network, sizes.shape, sizes.classes))
    assert training.disk == 4 * experts.experts * (experts.epochs + 1) * parameters
    assert min(training.flops, distillation.flops, evaluation.flops) > 1e9
    assert min(training.memory, distillation.memory, evaluation.memory) > 1e5
    kind, text = resolve(method, data, ipc)[1]
    assert kind == (ROWS[method, data, ipc].kind if (method, data, ipc) in ROWS else "derived")
    assert text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segments", [2, 7])
def test_every_method_becomes_concurrent_by_one_number(method: str, segments: int) -> None:
    for data, ipc in EVERY_CELL:
        one, concurrent = (distill_recipe(method, data, ipc, segments=k) for k in (1, segments))
        assert concurrent.schedule.segments == segments
        assert differing(one, concurrent) <= {"segments", "window_end", "window_end_initial"}
        concurrent.schedule.check_epochs(buffer_recipe(data, method, ipc).epochs)


def test_a_window_that_is_too_narrow_is_widened_unless_it_is_given() -> None:
    assert distill_recipe("mtt", "cifar10", 1, segments=7).schedule.window_end == 7
    assert distill_recipe("mtt", "cifar10", 1, segments=2).schedule.window_end == 2
    late = distill_recipe("pad", "cifar100", 50, segments=30).schedule
    assert (late.window_start, late.window_end_initial, late.window_end) == (40, 70, 80)
    with pytest.raises(UserError, match=r"segments is 4, but the window \[0, 2\) has only 2 start epochs; use at most"):
        distill_recipe("contra", "cifar10", 1, window_end=2)


@pytest.mark.parametrize(("data", "ipc"), [cell for cell in EVERY_CELL if cell[0] != "imagenet"])
def test_contra_is_datm_or_on_small_data_mtt_with_four_segments(data: str, ipc: int) -> None:
    base = "mtt" if data in ("digits", "fashion_mnist") else "datm"
    contra = distill_recipe("contra", data, ipc)
    assert differing(distill_recipe(base, data, ipc), contra) == {"method", "segments"}
    assert contra.schedule.segments == 4
    assert buffer_recipe(data, base, ipc) == buffer_recipe(data, "contra", ipc)


@pytest.mark.parametrize(
    ("method", "data", "ipc", "cell"),
    [
        ("contra", "fashion_mnist", 3, ("fashion_mnist", 1)),
        ("contra", "imagefolder", 1000, ("tiny_imagenet", 50)),
        ("mtt", "cifar100", 40, ("cifar100", 50)),
    ],
)
def test_other_data_and_an_unpublished_ipc_take_the_nearest(
    method: str, data: str, ipc: int, cell: tuple[str, int]
) -> None:
    config = distill_recipe(method, data, ipc)
    assert (config.data.data, config.synthetic.ipc) == (data, ipc)
    kind, words = resolve(method, data, ipc)[1]
    assert kind == "derived" and words.endswith(f"'s values for {cell[0]}, IPC {cell[1]}")
    assert differing(config, distill_recipe(method, *cell)) <= {"data", "ipc", "zca"}
    config.schedule.check_epochs(buffer_recipe(data, method, ipc).epochs)


# --- Tables -------------------------------------------------------------------------------------------------------


def test_lines_are_read_by_the_types_of_their_fields() -> None:
    lines = ["method,data,ipc,kind,lr_images,student_batch,zca,labels,ema", "a,digits,1,searched,30,none,true,hard,"]
    values = {"lr_images": 30.0, "student_batch": None, "zca": True, "labels": "hard"}
    assert read_rows(lines) == {("a", "digits", 1): ("searched", values)}
    assert {row.kind for row in ROWS.values()} == {"published", "searched", "derived"}
    assert {(method, data) for method, data, _ in ROWS} <= {(method, data) for method in METHODS for data in CELLS}


def test_a_grid_is_read_by_the_types_of_its_fields() -> None:
    grid = parse_grid(["lr_images=10,30", "student_batch=none,5", "labels=hard", "convex=true"])
    assert grid == {"lr_images": [10.0, 30.0], "student_batch": [None, 5], "labels": ["hard"], "convex": [True]}
    for wrong in ("lr_images", "lr_images=", "colour=1", "lr_images=many", "convex=perhaps"):
        with pytest.raises(UserError, match=wrong):
            parse_grid([wrong])


def test_every_published_accuracy_has_a_recipe() -> None:
    for data in CELLS:
        table = published().query("data == @data")
        assert set(table["ipc"]) <= set(CELLS[data]) and table["mean"].between(0, 100).all()
        assert table["source"].notna().all()


def test_the_table_has_a_line_for_every_cell() -> None:
    lines = recipes_table().splitlines()
    assert len(lines) == 2 + len(METHODS) * len(EVERY_CELL)
    assert len({len(line) for line in lines}) == 1
    (line,) = [line for line in recipes_table("datm", "cifar100").splitlines() if "| 10 " in line[:40]]
    assert [cell.strip() for cell in line.strip("|").split("|")][:12] == [
        *("datm", "cifar100", "10", "1", "2", "80", "1000", "[0, 30→50)", "10000", "1000", "10", "1e-05"),
    ]


# --- Refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: recipes_table("ftd2"), "unknown method 'ftd2'; choose one of mtt, tesla, ftd, datm, "),
        (lambda: buffer_recipe("mnist"), "unknown data set 'mnist'; choose one of digits, "),
        (lambda: recipes_table("mtt", "imagefolder"), "data is 'imagefolder'; there are recipes for digits, "),
        (lambda: distill_recipe(colour=1), "'colour' is not a field of DistillConfig."),
        (lambda: buffer_recipe(ipc=0), "ipc is 0; it must be at least 1."),
        (lambda: distill_recipe(iterations="many"), "iterations is 'many', which is not of type int."),
    ],
)
def test_what_no_recipe_has_is_refused(call: Callable[[], object], sentence: str) -> None:
    assert refusal(call).startswith(sentence)
