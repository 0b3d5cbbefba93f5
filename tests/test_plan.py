"""The cost plan: operations and memory against a count by hand, and how they grow with the run."""

import itertools
import re
import time

import pytest
import torch

import cddlib
from cddlib.data.dataset import sizes_of
from cddlib.networks.convnet import NetworkConfig, parameter_count
from cddlib.plan import Cost, buffer_of, costs_table, plan
from cddlib.runtime.errors import UserError
from cddlib.training import counting
from cddlib.training.counting import PeakMemory, count


def count_wide(step: counting.Step, batch: int) -> tuple[float, int]:
    """Operations and memory of a step of the usual ConvNet on CIFAR-10."""
    return count(step, NetworkConfig(), (3, 32, 32), 10, batch)


def by_hand(width: int = 128) -> int:
    """Multiply-adds times two of the ConvNet-3 on a 32-pixel image: three convolutions and the classifier."""
    convolutions = 9 * (3 * width * 32**2 + width**2 * 16**2 + width**2 * 8**2)
    return 2 * (convolutions + 16 * width * 10)


def test_operations_are_those_of_the_convolutions() -> None:
    """A step of SGD takes three times a test, without the first convolution's input, which needs no gradient."""
    assert count_wide(counting.classify, 2)[0] == by_hand() == 101_490_688
    flops, memory = count_wide(counting.descend, 4)
    assert flops == 3 * by_hand() - 2 * 9 * 3 * 128 * 32**2
    assert memory > 4 * 128 * 32**2 * 4  # the largest map of four images
    back = count_wide(counting.walk_back, 3)[0]
    assert back / by_hand() == pytest.approx(8.79, abs=0.01)  # as a profile of MTT's loop shows


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    with PeakMemory() as memory:
        one = torch.empty(1000, device="meta")
        two = one + one  # 8,000 bytes
        view = two[:10]
        del one
        three = view + 1
        four = torch.empty(500, device="meta")  # 4,000 + 40 + 2,000
    assert memory.peak == 8000
    assert (memory.now, three.nbytes, four.nbytes) == (6040, 40, 2000)


def cost(**changes: object) -> list[Cost]:
    config = cddlib.distill_recipe("mtt", "cifar10", 10, **{"validate_every": 0, **changes})
    return plan(buffer_of(config, experts=4), config, measure=False)


def test_the_plan_grows_with_the_run() -> None:
    usual = cost()
    for changes, factor in (({"segments": 4}, 4), ({"student_steps": 60}, 2), ({"iterations": 2500}, 0.5)):
        assert cost(**changes)[1].flops == pytest.approx(factor * usual[1].flops)
    assert cost(student_batch=10)[1].flops == pytest.approx(usual[1].flops / 10)
    assert cost(validate_every=100)[1].flops > usual[1].flops
    assert usual[1].disk == 4 * cost(milestones=0)[1].disk, "the set, and a checkpoint of three; four milestones more"
    assert cost(evaluation_epochs=2000)[2].flops == pytest.approx(2 * usual[2].flops, rel=0.05)
    vectors = 4 * parameter_count(cddlib.build_network(NetworkConfig(), (3, 32, 32), 10))
    assert cost(student_steps=31)[1].memory - usual[1].memory == vectors


def test_flat_experts_take_twice_the_steps_and_a_curriculum_its_part() -> None:
    config = cddlib.distill_recipe("mtt", "cifar10", 1)
    plain, flat, staged = (
        plan(buffer_of(config, holdout=False, **changes), config, measure=False)[0].flops
        for changes in ({}, {"sharpness_radius": 0.01}, {"easiest_fraction": 0.5, "all_from_epoch": 25})
    )
    tests = 100 * (51 * 5000 + 10_000) * by_hand()
    assert flat - tests == pytest.approx(2 * (plain - tests))
    ranking = 50 * 50_000 * count_wide(counting.descend, 256)[0]
    assert (staged - ranking - tests) / (plain - tests) == pytest.approx((25 * 0.5 + 0.5 * 12 + 25) / 50, abs=0.01)


@pytest.mark.parametrize(("devices", "share"), [(1, 4), (2, 2), (3, 2), (8, 1)])
def test_devices_share_segments_and_experts_and_students_take_steps_side_by_side(
    monkeypatch, devices: int, share: int
) -> None:
    monkeypatch.setattr("cddlib.plan._seconds", lambda run, images, at_least, device: 1.0)
    config = cddlib.distill_recipe("mtt", "digits", 1, segments=4, validate_every=0, side_by_side=1)
    together = cddlib.replace(config, side_by_side=None)
    experts, one, _ = plan(buffer_of(config), config, devices=devices, device="cpu")
    beside = plan(buffer_of(config), together, devices=devices, device="cpu")[1]
    assert one.seconds == pytest.approx(share * config.schedule.iterations * config.student.student_steps * 10 / 2)
    assert beside.seconds == pytest.approx(one.seconds / share)
    assert (beside.flops, beside.disk) == (one.flops, one.disk)
    alone = plan(buffer_of(config, experts=1), config, device="cpu")[0]
    assert experts.seconds == pytest.approx(-(-5 // devices) * alone.seconds)
    p = parameter_count(cddlib.build_network(config.network, (1, 8, 8), 10))
    # parameters on the way; gradients of the set
    least = 4 * (p * (config.student.student_steps + 3) + 2 * 10 * (64 + 10))
    assert (share - 1) * least <= beside.memory - one.memory <= (share - 1) * one.memory


def test_a_gpu_that_is_not_here_is_planned_for() -> None:
    """There, the steps of one image a class are small."""
    config = cddlib.distill_recipe("mtt", "cifar10", 1, segments=4)
    here, there = (plan(buffer_of(config), config, measure=False, device=d)[1].memory for d in ("cpu", "cuda:7"))
    assert 2 * here < there < 4 * here


def test_a_batch_that_takes_long_is_not_timed_whole(monkeypatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr("cddlib.plan._seconds", lambda run, images, at_least, device: timed.append(images) or 0.01)
    config = cddlib.distill_recipe("datm", "cifar10", 50)
    plan(buffer_of(config), config, device="cpu")
    assert set(timed) == {4, 30}  # 0.3 seconds at 0.01 an image


def test_time_is_measured_and_said_in_words(monkeypatch) -> None:
    monkeypatch.setattr("cddlib.plan.MEASURED_SECONDS", 0.05)
    config = cddlib.distill_recipe("datm", "digits", 1, width=4, evaluation_epochs=2)
    began = time.process_time()
    costs = plan(buffer_of(config, experts=1), config, device="cpu")
    assert time.process_time() - began < 10
    assert all(cost.seconds is not None and 0 < cost.seconds < 1000 for cost in costs)
    assert len(re.findall(r"\d (?:seconds|minutes|hours)(?:$| on )", costs_table(costs), re.MULTILINE)) == 4


@pytest.mark.parametrize(
    ("seconds", "memory", "devices", "sentence"),
    [
        (1100.0, 1_940_000_000, 1, "About 55 minutes on this machine; 1.9 GB of memory."),
        (86400.0, 2_000_000, 4, "About 3.0 days on 4 devices like this machine's; 2 MB of memory on each."),
        (None, 2_000_000, 1, "No time was measured; 2 MB of memory."),
    ],
)
def test_the_sentence_comes_first(seconds: float | None, memory: int, devices: int, sentence: str) -> None:
    costs = [Cost(stage, 1e12, memory, 0, seconds) for stage in ("experts", "distillation", "evaluation")]
    assert costs_table(costs, devices).splitlines()[0] == sentence


def test_experts_are_those_of_the_method_on_the_students_network() -> None:
    config = cddlib.distill_recipe("datm", "cifar10", 50, width=32, zca=False)
    experts = buffer_of(config, epochs=60)
    assert (experts.network.width, experts.data.zca, experts.epochs) == (32, False, 60)
    assert cddlib.replace(experts, epochs=100, width=128, zca=True) == cddlib.buffer_recipe("cifar10", "datm", 50)


def test_impossible_values_are_refused() -> None:
    config = cddlib.distill_recipe()
    for name, value in itertools.product(("devices", "networks"), (0, -1)):
        with pytest.raises(UserError, match=rf"^{name} is {value}; it must be at least 1\.$"):
            plan(buffer_of(config), config, measure=False, **{name: value})
    with pytest.raises(UserError, match=r"^device is 'gpu'; it must be auto, or one that PyTorch knows\.$"):
        plan(buffer_of(config), config, measure=False, device="gpu")


def test_sizes_of_data_without_a_file() -> None:
    assert sizes_of("digits", None) == ((1, 8, 8), 10, 1438, 359)
