"""The combined gradient: against each segment's own by the matching loss, and which segments are drawn."""

import dataclasses
from collections import Counter
from typing import get_args

import pytest
import torch
from running import SUBSETS, first, learned_and_held

import cddlib
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.experts.buffer import Buffer
from cddlib.matching import combine
from cddlib.matching.segments import draw_segments
from cddlib.synthetic import SyntheticSet


def segment_gradients(
    config: DistillConfig, buffer: Buffer, synthetic: SyntheticSet, iteration: int, matched: list[list[int | float]]
) -> tuple[list[float], list[tuple[torch.Tensor, ...]], torch.Generator]:
    """Loss and gradient of each segment, with the iteration's batches and augmentations; and its stream after that."""
    rng, losses, gradients = cddlib.generator(config.seed, "iteration", iteration), [], []
    torch.randint(len(buffer.experts), (), generator=rng)
    draw_segments(config.schedule, iteration, rng)
    learned, held = learned_and_held(config, iteration)
    for expert, start in matched:
        steps = cddlib.plan_student(config.student, len(learned), config.augmentation.augment, rng)
        ends = [buffer.parameters(expert, epoch) for epoch in (start, start + config.schedule.expert_epochs)]
        targets = synthetic.targets()
        if config.synthetic.labels == "teacher":
            targets = buffer.network(ends[1], synthetic.images.detach()).softmax(1)
        loss = cddlib.matching_loss(
            buffer.network,
            *ends,
            synthetic.images,
            targets,
            synthetic.step_size,
            [step._replace(indices=torch.tensor(learned)[step.indices]) for step in steps],
            config.student,
        )
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, synthetic.variables(), materialize_grads=True))
        for gradient in gradients[-1][:-1]:
            gradient[held] = 0
    return losses, gradients, rng


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ({"segments": 1}, 1),
        *(({"replay": 2, **more}, 4) for more in ({}, {"balance": 0.7}, {"combine": "gem"})),
        ({"concurrent_experts": 2, "labels": "learned"}, 4),
        ({"convex": True}, 2),
        *(({"segments": 3, "side_by_side": count}, 3) for count in (1, 2)),
        ({"gradient": "truncated", "dropped_fraction": 0.3}, 2),
        ({"match_step": "nearest", "step_size": 1.0}, 2),
        ({"labels": "teacher", "ipc": 2}, 2),
        ({**SUBSETS, "labels": "learned", "student_batch": 7}, 2),
        *(({"combine": rule, "segments": 3}, 3) for rule in get_args(combine.Combine)[1:]),
    ],
)
@pytest.mark.parametrize("iteration", [2, 5])
def test_it_is_the_weighted_sum_of_all_segments_gradients(
    buffer: Buffer, recipe, overrides: dict[str, object], count: int, iteration: int
) -> None:
    config = recipe(**overrides)
    buffer = Buffer(buffer.folder, convex=True) if config.schedule.convex else buffer
    synthetic = dataclasses.replace(first(config, buffer), subsets=config.schedule.subsets)
    found, record = concurrent_gradient(config, buffer, synthetic, iteration)
    assert len(record["matched"]) == count
    losses, gradients, rng = segment_gradients(config, buffer, synthetic, iteration, record["matched"])
    weights = averaged = [1 / count] * count
    if config.combination.balance is not None:
        weights = averaged = [1 / 1.7 if k == record["anchor"] else 0.7 / 3 / 1.7 for k in range(count)]
    elif config.combination.combine != "mean":
        products = combine.gramian(gradients, config.optimizer.rates(synthetic))
        weights = combine.weights(config.combination, products, losses, record["anchor"], rng)
        assert record["weights"] == pytest.approx(weights, rel=1e-4)
    assert record["losses"] == pytest.approx(losses)
    assert record["loss"] == pytest.approx(sum(weight * loss for weight, loss in zip(averaged, losses, strict=True)))
    lengths = [torch.cat([part.flatten() for part in gradient]).norm().item() for gradient in gradients]
    assert record["gradient_norms"] == pytest.approx(lengths, rel=1e-4)
    for v, gradient in enumerate(found):
        wanted = sum(weight * part[v] for weight, part in zip(weights, gradients, strict=True))
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def drawn(config: DistillConfig, buffer: Buffer, iterations: int) -> list[tuple[list[list[int]], int]]:
    """What each iteration matches of the first set, and its anchor."""
    synthetic = first(config, buffer)
    records = [concurrent_gradient(config, buffer, synthetic, iteration)[1] for iteration in range(iterations)]
    return [(record["matched"], record["anchor"]) for record in records]


def test_one_expert_is_matched_at_the_start_epochs_that_all_would_be(buffer: Buffer, recipe) -> None:
    every, one = (drawn(recipe(expert=expert, student_steps=1), buffer, 8) for expert in (None, 1))
    assert {expert for matched, _ in every for expert, _ in matched} == {0, 1}
    assert [([[1, start] for _, start in matched], anchor) for matched, anchor in every] == one


def test_replay_and_other_experts_come_after_the_segments_of_the_first(buffer: Buffer, recipe) -> None:
    """And change no draw of them; replayed are anchors of earlier iterations, each at most once."""
    plain, more = drawn(recipe(student_steps=1), buffer, 9), {"replay": 2, "concurrent_experts": 2, "student_steps": 1}
    anchors = [tuple(matched[anchor]) for matched, anchor in plain]
    for index, (matched, anchor) in enumerate(drawn(recipe(**more), buffer, 9)):
        assert (matched[:2], anchor) == plain[index]
        (other, start), (same, later) = matched[2:4]
        assert other == same != matched[0][0] and later - start == 2 and start >= 0
        replayed = Counter(map(tuple, matched[4:]))
        assert replayed.total() == min(2, index)
        assert replayed <= Counter(anchors[:index])
