"""The cost plan: operations and memory against a count by hand, and how they grow with the run."""

import dataclasses

import pytest
import torch

import cddlib
from cddlib.networks.convnet import NetworkConfig, parameter_count
from cddlib.plan import Cost, Sizes, _PeakMemory, _student, _test, _training, buffer_of, costs_table, plan, sizes_of
from cddlib.runtime.errors import UserError

WIDE = NetworkConfig()
CIFAR = Sizes((3, 32, 32), 10, 50_000, 10_000)


def by_hand(width: int = 128) -> int:
    """Multiply-adds times two of the ConvNet-3 on a 32-pixel image: three convolutions and the classifier."""
    convolutions = 9 * (3 * width * 32**2 + width**2 * 16**2 + width**2 * 8**2)
    return 2 * (convolutions + 16 * width * 10)


def test_operations_of_a_test_are_those_of_the_convolutions() -> None:
    assert _test(WIDE, CIFAR) == by_hand() == 101_490_688


def test_training_takes_three_times_a_test_without_the_images_gradient() -> None:
    """The first convolution's input needs no gradient."""
    flops, memory = _training(WIDE, CIFAR, 4)
    assert flops == 3 * by_hand() - 2 * 9 * 3 * 128 * 32**2
    assert memory > 4 * 128 * 32**2 * 4  # the largest map of four images


def test_a_students_step_takes_eight_to_nine_tests_back_and_one_training_forward() -> None:
    """8.79 is what a profile of MTT's loop shows."""
    flops, _ = _student(WIDE, CIFAR, 3)
    assert (flops - _training(WIDE, CIFAR, 3)[0]) / by_hand() == pytest.approx(8.79, abs=0.01)


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    with _PeakMemory() as memory:
        one = torch.empty(1000, device="meta")
        two = one + one  # 8,000 bytes
        view = two[:10]
        del one
        three = view + 1
        four = torch.empty(500, device="meta")  # 4,000 + 40 + 2,000
    assert memory.peak == 8000
    assert (memory.now, three.nbytes, four.nbytes) == (6040, 40, 2000)


def cost(**changes: object) -> list[Cost]:
    config = cddlib.distill_recipe("mtt", "cifar10", 10, **changes)
    return plan(buffer_of(config, experts=4), config, measure=False)


def test_the_plan_grows_with_the_run() -> None:
    usual = cost(validate_every=0)
    assert cost(validate_every=0, segments=4)[1].flops == 4 * usual[1].flops
    assert cost(validate_every=0, student_steps=60)[1].flops == 2 * usual[1].flops
    assert cost(validate_every=0, iterations=2500)[1].flops == usual[1].flops / 2
    assert cost(validate_every=0, student_batch=10)[1].flops == usual[1].flops / 10
    vectors = 4 * parameter_count(cddlib.build_network(WIDE, (3, 32, 32), 10))
    assert cost(validate_every=0, student_steps=31)[1].memory - usual[1].memory == vectors
    assert cost(validate_every=100)[1].flops > usual[1].flops
    assert cost(evaluation_epochs=2000)[2].flops == pytest.approx(2 * cost()[2].flops, rel=0.05)


def test_flat_experts_take_twice_the_steps_and_a_curriculum_its_share() -> None:
    config = cddlib.distill_recipe("mtt", "cifar10", 1)
    plain, flat, staged = (
        plan(buffer_of(config, holdout=False, **changes), config, measure=False)[0].flops
        for changes in ({}, {"sharpness_radius": 0.01}, {"easiest_fraction": 0.5, "all_from_epoch": 25})
    )
    tests = 100 * (51 * 5000 + 10_000) * _test(WIDE, CIFAR)
    assert flat - tests == 2 * (plain - tests)
    ranking = 50 * 50_000 * _training(WIDE, CIFAR, 10)[0]
    assert (staged - ranking - tests) / (plain - tests) == pytest.approx((25 * 0.5 + 0.5 * 12 + 25) / 50, abs=0.01)


@pytest.mark.parametrize(("devices", "together"), [(1, 4), (2, 2), (3, 2), (8, 1)])
def test_students_side_by_side_share_the_time_and_need_memory_each(monkeypatch, devices: int, together: int) -> None:
    monkeypatch.setattr("cddlib.plan._time", lambda run, device: 1.0)
    found = []
    for side_by_side in (None, 1):
        changes = {"segments": 4, "validate_every": 0, "side_by_side": side_by_side}
        config = cddlib.distill_recipe("mtt", "digits", 1, **changes)
        found.append(plan(buffer_of(config), config, devices=devices, device="cpu")[1])
    beside, one = found
    assert beside.seconds == pytest.approx(one.seconds / together)
    assert (beside.flops, beside.disk) == (one.flops, one.disk)
    p = parameter_count(cddlib.build_network(config, (1, 8, 8), 10))
    least = 4 * (p * (config.student_steps + 3) + 2 * 10 * (64 + 10))  # parameters on the way; gradients of the set
    assert beside.memory - one.memory >= (together - 1) * least
    assert beside.memory <= together * one.memory


def test_a_gpu_that_is_not_here_is_planned_for() -> None:
    """There, the steps of one image a class are small."""
    config = cddlib.distill_recipe("mtt", "cifar10", 1, segments=4)
    here, there = (plan(buffer_of(config), config, measure=False, device=d)[1].memory for d in ("cpu", "cuda:7"))
    assert 2 * here < there < 4 * here


@pytest.mark.parametrize(("devices", "segments", "share"), [(1, 4, 4), (2, 4, 2), (3, 4, 2), (8, 4, 1)])
def test_devices_share_segments_and_experts(monkeypatch, devices: int, segments: int, share: int) -> None:
    monkeypatch.setattr("cddlib.plan.MEASURED_SECONDS", 0)
    monkeypatch.setattr("cddlib.plan._time", lambda run, device: 1.0)
    config = cddlib.distill_recipe("mtt", "digits", 1, segments=segments, validate_every=0, side_by_side=1)
    experts, distillation, _ = plan(buffer_of(config), config, devices=devices, device="cpu")
    in_one = config.iterations * config.student_steps / 2
    assert distillation.seconds == pytest.approx(share * in_one)
    alone = plan(buffer_of(config, experts=1), config, device="cpu")[0]
    assert experts.seconds == pytest.approx(-(-5 // devices) * alone.seconds)


def test_time_is_measured_and_every_stage_has_one(monkeypatch) -> None:
    monkeypatch.setattr("cddlib.plan.MEASURED_SECONDS", 0.05)
    config = cddlib.distill_recipe("datm", "digits", 1, width=4, evaluation_epochs=2)
    costs = plan(buffer_of(config, experts=1), config, device="cpu")
    assert all(cost.seconds is not None and 0 < cost.seconds < 1000 for cost in costs)
    lines = costs_table(costs).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["experts", "distillation", "evaluation"]


def test_experts_are_those_of_the_method_on_the_students_network() -> None:
    config = cddlib.distill_recipe("datm", "cifar10", 50, width=32, zca=False)
    experts = buffer_of(config, epochs=60)
    assert (experts.width, experts.zca, experts.epochs, experts.sharpness_radius) == (32, False, 60, 0.01)
    assert dataclasses.replace(experts, epochs=100, width=128, zca=True) == cddlib.buffer_recipe("cifar10", "datm", 50)


def test_sizes_of_prepared_and_of_known_data() -> None:
    assert sizes_of("digits", None) == Sizes((1, 8, 8), 10, 1438, 359)
    assert sizes_of("cifar10", None) == CIFAR
    with pytest.raises(UserError, match="imagefolder is not in"):
        sizes_of("imagefolder", None)


@pytest.mark.parametrize("name", ["devices", "networks"])
def test_impossible_values_are_refused(name: str) -> None:
    config = cddlib.distill_recipe()
    with pytest.raises(UserError, match=rf"^{name} is 0; it must be at least 1\.$"):
        plan(buffer_of(config), config, measure=False, **{name: 0})
