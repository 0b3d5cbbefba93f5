"""The matching loss: its gradient against brute force through the whole student, and against MTT written plainly."""

import dataclasses
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cddlib
from cddlib import augment
from cddlib.matching import MatchingConfig, Step, roll_out
from cddlib.networks import Network
from cddlib.synthetic import initialise

CLASSES = 3
DSA = "color_crop_cutout_flip_scale_rotate"


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def unrolled(
    network: Network,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    targets: Tensor,
    step_size: Tensor,
    steps: list[Step],
    *,
    truncated: bool = False,
) -> Tensor:
    """The matching loss with the graph of all steps, or with TESLA's, in which no step sees where the last one led."""
    theta = start.clone().requires_grad_()
    here = theta
    for indices, draw in steps:
        here = theta.detach().requires_grad_() if truncated else theta
        loss = F.cross_entropy(network(here, augment.apply(draw, images[indices])), targets[indices])
        (gradient,) = torch.autograd.grad(loss, here, create_graph=True)
        theta = theta - step_size * gradient
    return ((theta - target) ** 2).sum() / ((start - target) ** 2).sum()


class Problem:
    """A small float64 problem: variables that need gradients, and the arguments of `matching_loss`."""

    def __init__(
        self,
        *,
        soft: bool = True,
        size: int = 7,
        batch: int | None = None,
        n: int = 5,
        dsa: str = "none",
        **network: Any,
    ) -> None:
        rng = cddlib.generator("problem")
        config = cddlib.NetworkConfig(**{"depth": 2, "width": 4, **network})
        self.network = cddlib.ConvNet(config, (2, 8, 8), CLASSES)
        self.start = self.network.init(rng).double()
        self.target = self.start + 0.1 * torch.randn(self.start.shape, generator=rng, dtype=torch.double)
        self.images = torch.randn(size, 2, 8, 8, generator=rng, dtype=torch.double, requires_grad=True)
        self.logits = torch.randn(size, CLASSES, generator=rng, dtype=torch.double, requires_grad=True)
        self.step_size = torch.tensor(0.3, dtype=torch.double, requires_grad=True)
        self.variables = [self.images, self.logits, self.step_size] if soft else [self.images, self.step_size]
        self.soft = soft
        self.steps = cddlib.plan_student(MatchingConfig(student_steps=n, student_batch=batch), size, dsa, rng)

    def arguments(self) -> tuple[Any, ...]:
        hard = F.one_hot(torch.arange(len(self.images)) % CLASSES, CLASSES).double()
        targets = self.logits.softmax(1) if self.soft else hard
        return self.network, self.start, self.target, self.images, targets, self.step_size, self.steps

    def check(self) -> None:
        """Loss and gradients equal the unrolled ones."""
        loss, reference = cddlib.matching_loss(*self.arguments()), unrolled(*self.arguments())
        assert relative(loss, reference) < 1e-12
        found = torch.autograd.grad(loss, self.variables)
        wanted = torch.autograd.grad(reference, self.variables)
        assert all(relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dsa", ["none", DSA, *augment.CHANGES])
def test_gradient_is_exact_with_every_augmentation(dsa: str) -> None:
    Problem(dsa=dsa).check()


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 3, 5, 7, 100])
def test_gradient_is_exact_with_mini_batches(batch: int | None, soft: bool) -> None:
    Problem(batch=batch, soft=soft, n=6, dsa=DSA).check()


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    network=st.fixed_dictionaries(
        {
            "depth": st.integers(1, 3),
            "norm": st.sampled_from(["instance", "batch", "group", "layer", "none"]),
            "activation": st.sampled_from(["relu", "leakyrelu", "sigmoid"]),
            "pooling": st.sampled_from(["avg", "max", "none"]),
        }
    ),
    size=st.integers(2, 6),
    batch=st.none() | st.integers(1, 6),
    n=st.integers(1, 6),
    soft=st.booleans(),
)
def test_gradient_is_exact_for_every_network(
    network: dict[str, Any], size: int, batch: int | None, n: int, soft: bool
) -> None:
    Problem(soft=soft, size=size, batch=batch, n=n, dsa=DSA, **network).check()


def test_gradient_scales_with_what_follows_the_loss() -> None:
    problem = Problem()
    (once,) = torch.autograd.grad(cddlib.matching_loss(*problem.arguments()), problem.images)
    (thrice,) = torch.autograd.grad(3 * cddlib.matching_loss(*problem.arguments()), problem.images)
    torch.testing.assert_close(thrice, 3 * once)


def test_tesla_s_truncated_gradient_is_another_one() -> None:
    problem = Problem(n=5)
    exact = torch.autograd.grad(cddlib.matching_loss(*problem.arguments()), problem.variables)
    tesla = torch.autograd.grad(unrolled(*problem.arguments(), truncated=True), problem.variables)
    assert all(relative(t, e) > 0.02 for t, e in zip(tesla, exact, strict=True))
    problem = Problem(n=1)  # one step leaves nothing to truncate
    exact = torch.autograd.grad(cddlib.matching_loss(*problem.arguments()), problem.variables)
    tesla = torch.autograd.grad(unrolled(*problem.arguments(), truncated=True), problem.variables)
    assert all(relative(t, e) < 1e-9 for t, e in zip(tesla, exact, strict=True))


def test_student_steps_are_those_of_sgd() -> None:
    problem = Problem(batch=3, dsa=DSA)
    network, start, _, images, targets, step_size, steps = problem.arguments()
    theta = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theta], lr=step_size.item())
    path = roll_out(network, start, images, targets, step_size, steps)
    assert len(path) == len(steps) + 1
    assert torch.equal(path[0], start)
    for (indices, draw), found in zip(steps, path[1:], strict=True):
        optimizer.zero_grad()
        inputs = augment.apply(draw, images[indices].detach())
        F.cross_entropy(network(theta, inputs), targets[indices].detach()).backward()
        optimizer.step()
        assert relative(found, theta.detach()) < 1e-12


def test_arguments_are_left_alone() -> None:
    problem = Problem(dsa=DSA)
    before = [problem.start.clone(), problem.target.clone(), *(v.detach().clone() for v in problem.variables)]
    cddlib.matching_loss(*problem.arguments()).backward()
    assert all(map(torch.equal, before, [problem.start, problem.target, *problem.variables]))


def test_a_segment_that_starts_where_it_ends_is_refused() -> None:
    problem = Problem()
    problem.target = problem.start.clone()
    with pytest.raises(cddlib.UserError, match="starts where it ends"):
        cddlib.matching_loss(*problem.arguments())


# --- The student's plan -----------------------------------------------------------------------------------------


@hypothesis.given(n=st.integers(1, 20), size=st.integers(1, 12), batch=st.none() | st.integers(1, 15))
def test_every_pass_covers_every_image_once(n: int, size: int, batch: int | None) -> None:
    plan = cddlib.plan_student(
        MatchingConfig(student_steps=n, student_batch=batch), size, "crop", cddlib.generator("plan")
    )
    assert len(plan) == n
    assert all(step.draw is not None and len(step.draw.numbers) == len(step.indices) for step in plan)
    assert all(len(step.indices) <= min(batch or size, size) for step in plan)
    a_pass = -(-size // min(batch or size, size))  # steps, rounded up
    for first in range(0, n, a_pass):
        seen = torch.cat([step.indices for step in plan[first : first + a_pass]]).tolist()
        assert len(set(seen)) == len(seen)
        if first + a_pass <= n:
            assert sorted(seen) == list(range(size))


def test_the_plan_depends_on_the_generator_alone() -> None:
    def plan(seed: int) -> list[Any]:
        found = cddlib.plan_student(
            MatchingConfig(student_steps=9, student_batch=4), 10, DSA, torch.Generator().manual_seed(seed)
        )
        return [(s.indices.tolist(), s.draw.change, s.draw.numbers.tolist()) for s in found if s.draw]

    first = plan(0)
    torch.rand(1)
    assert plan(0) == first
    assert plan(1) != first
    assert first[0][0] != first[3][0]  # a new order in the second pass


@pytest.mark.parametrize("field", ["student_steps", "student_batch"])
def test_impossible_students_are_refused(field: str) -> None:
    with pytest.raises(cddlib.UserError, match=rf"^{field} is 0; it must be at least 1\.$"):
        MatchingConfig(**{field: 0})


# --- K segments of an iteration ---------------------------------------------------------------------------------


class Doubles(cddlib.Buffer):
    """A buffer read as float64."""

    def parameters(self, expert: int, epoch: int) -> Tensor:
        return super().parameters(expert, epoch).double()


def synthetic_set(config: cddlib.DistillConfig, buffer: cddlib.Buffer) -> cddlib.SyntheticSet:
    """The initial set in float64, with variables that need gradients."""
    found = initialise(config, cddlib.load("digits"), buffer, 0, torch.device("cpu"))
    doubles = {name: tensor.double().requires_grad_() for name, tensor in found.variable_tensors().items()}
    return dataclasses.replace(found, **doubles)


@pytest.mark.parametrize(
    ("balance", "shares"), [(None, [1 / 3, 1 / 3, 1 / 3]), (0.0, [1.0, 0.0, 0.0]), (0.5, [2 / 3, 1 / 6, 1 / 6])]
)
def test_concurrent_gradient_is_the_weighted_sum(
    buffer: cddlib.Buffer,
    quick: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    balance: float | None,
    shares: list[float],
) -> None:
    """`shares` are those of the anchor and of the two others. The segments' plans are overheard."""
    overrides = {**quick, "segments": 3, "soft_labels": True, "student_batch": 4, "balance": balance}
    config = cddlib.distill_recipe("contra", "digits", **overrides)
    synthetic = synthetic_set(config, buffer)
    plans = []

    def overhear(*arguments: Any) -> Tensor:
        plans.append(arguments[-1])
        return cddlib.matching_loss(*arguments)

    monkeypatch.setattr(sys.modules["cddlib.distill"], "matching_loss", overhear)  # cddlib.distill is the function
    found, record = cddlib.concurrent_gradient(config, Doubles(buffer.folder), synthetic, iteration=1)

    assert len(plans) == len(record["starts"]) == len(set(record["starts"])) == 3
    assert not torch.equal(plans[0][0].indices, plans[1][0].indices)  # each segment has batches of its own
    wanted = [torch.zeros_like(variable) for variable in synthetic.variables()]
    total = 0.0
    for k, (start, plan) in enumerate(zip(record["starts"], plans, strict=True)):
        ends = [buffer.parameters(record["expert"], epoch).double() for epoch in (start, start + config.expert_epochs)]
        loss = unrolled(buffer.network, *ends, synthetic.images, synthetic.targets(), synthetic.step_size, plan)
        assert record["losses"][k] == pytest.approx(loss.item(), rel=1e-9)
        share = shares[0] if k == record["anchor"] else shares[1]
        total += share * loss.item()
        for sum_, gradient in zip(wanted, torch.autograd.grad(loss, synthetic.variables()), strict=True):
            sum_ += share * gradient
    assert record["loss"] == pytest.approx(total, rel=1e-9)
    assert all(relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))


def test_one_segment_is_mtt(buffer: cddlib.Buffer, quick: dict[str, Any]) -> None:
    """MTT's loss for the digits with modules of torch.nn, sharing nothing with cddlib but the expert's numbers."""
    config = cddlib.distill_recipe("mtt", "digits", ipc=2, **{**quick, "augment": "none"})
    synthetic = synthetic_set(config, buffer)
    found, record = cddlib.concurrent_gradient(config, Doubles(buffer.folder), synthetic, iteration=0)

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, 8, 3, padding=1), nn.GroupNorm(8, 8), nn.ReLU(), nn.AvgPool2d(2)]

    model = nn.Sequential(*block(1), *block(8), nn.Flatten(), nn.Linear(8 * 2 * 2, 10))
    (start,) = record["starts"]
    first = buffer.parameters(record["expert"], start).double()
    target = buffer.parameters(record["expert"], start + 2).double()
    student, read = {}, 0
    for name, parameter in model.named_parameters():
        piece = first[read : read + parameter.numel()]
        student[name] = piece.view(parameter.shape).requires_grad_()
        read += parameter.numel()
    assert read == len(first)
    labels = torch.arange(10).repeat_interleave(2)
    for _ in range(5):
        loss = F.cross_entropy(torch.func.functional_call(model, student, (synthetic.images,)), labels)
        gradients = torch.autograd.grad(loss, list(student.values()), create_graph=True)
        student = {
            name: parameter - synthetic.step_size * gradient
            for (name, parameter), gradient in zip(student.items(), gradients, strict=True)
        }
    last = torch.cat([parameter.flatten() for parameter in student.values()])
    mtt = F.mse_loss(last, target, reduction="sum") / F.mse_loss(first, target, reduction="sum")

    assert record["losses"] == [record["loss"]] == [pytest.approx(mtt.item(), rel=1e-9)]
    wanted = torch.autograd.grad(mtt, [synthetic.images, synthetic.step_size])
    assert all(relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))
