"""The matching loss: its gradient against brute force through the whole student, and against MTT written plainly."""

import dataclasses
from typing import Any
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import pytest
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cddlib
from cddlib.data import augment
from cddlib.matching.loss import kept_parameters, matching_losses, nearest_step
from cddlib.matching.student import MatchingConfig, StudentStep, chunk_size, roll_out, segment_chunks
from cddlib.networks.convnet import Network
from cddlib.synthetic import initialise
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.engine import make_step
from cddlib.training.step import ComputeConfig

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
    steps: list[StudentStep],
    config: MatchingConfig | None = None,
) -> Tensor:
    """The matching loss with the graph of all steps, or with TESLA's, in which no step sees where the last one led."""
    config = config or MatchingConfig()
    theta = start.clone().requires_grad_()
    path = []
    for indices, draw in steps:
        here = theta if config.gradient == "exact" else theta.detach().requires_grad_()
        loss = F.cross_entropy(network(here, augment.apply(draw, images[indices])), targets[indices])
        (gradient,) = torch.autograd.grad(loss, here, create_graph=True)
        theta = theta - step_size * gradient
        path.append(theta)
    if config.match_step == "nearest":
        best = path[0]
        for later in path[1:]:
            if (later - target).abs().sum() <= (best - target).abs().sum():
                best = later
        theta = best
    errors, scales = (theta - target) ** 2, (start - target) ** 2
    by_size = sorted(range(len(errors)), key=errors.tolist().__getitem__)
    kept = by_size[int(config.dropped_fraction * len(errors)) :]
    return errors[kept].sum() / scales[kept].sum()


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
        doubles: dict[str, Any] = {"generator": rng, "dtype": torch.double}
        config = cddlib.NetworkConfig(**{"depth": 2, "width": 4, **network})
        self.network = cddlib.ConvNet(config, (2, 8, 8), CLASSES)
        self.start = self.network.init(rng).double()
        self.target = self.start + 0.1 * torch.randn(self.start.shape, **doubles)
        self.images = torch.randn(size, 2, 8, 8, **doubles, requires_grad=True)
        self.logits = torch.randn(size, CLASSES, **doubles, requires_grad=True)
        self.step_size = torch.tensor(0.3, dtype=torch.double, requires_grad=True)
        self.variables = [self.images, self.logits, self.step_size] if soft else [self.images, self.step_size]
        self.soft = soft
        self.steps = cddlib.plan_student(MatchingConfig(student_steps=n, student_batch=batch), size, dsa, rng)

    def arguments(self) -> tuple[Any, ...]:
        hard = F.one_hot(torch.arange(len(self.images)) % CLASSES, CLASSES).double()
        targets = self.logits.softmax(1) if self.soft else hard
        return self.network, self.start, self.target, self.images, targets, self.step_size, self.steps

    def check(self, **config: Any) -> None:
        """Loss and gradients equal the unrolled ones."""
        asked = MatchingConfig(**config)
        loss, reference = cddlib.matching_loss(*self.arguments(), asked), unrolled(*self.arguments(), asked)
        assert relative(loss, reference) < 1e-12
        found = torch.autograd.grad(loss, self.variables)
        wanted = torch.autograd.grad(reference, self.variables)
        assert all(relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dsa", ["none", DSA, *augment.CHANGES])
def test_gradient_is_exact_with_every_augmentation(dsa: str) -> None:
    Problem(dsa=dsa).check()


@pytest.mark.parametrize(("norm", "largest"), [("instance", 3), ("layer", 3), ("none", 3), ("batch", 7)])
@pytest.mark.parametrize("kept", ["0", "1000"])
def test_gradient_is_exact_in_parts(norm: str, largest: int, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images do not depend on their batch, a step takes at most `PART` pixels of them at a time."""
    monkeypatch.setattr("cddlib.matching.student.PART", 3 * 8**2)
    monkeypatch.setattr("cddlib.matching.loss.residual_budget", lambda device: int(kept) * 2**20)
    problem = Problem(dsa=DSA, norm=norm)
    step = make_step(problem.network, ComputeConfig(), torch.device("cpu"))
    forward = Mock(wraps=step.forward)
    monkeypatch.setattr(step, "forward", forward)
    problem.check()
    sizes = [call.args[1].shape[1] for call in forward.call_args_list]
    assert set(sizes) == ({2, 3} if largest == 3 else {7})
    assert sum(sizes) == 5 * 7 * (2 if kept == "0" else 1)


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


@pytest.mark.parametrize("gradient", ["exact", "truncated", "halved"])
def test_gradient_scales_with_what_follows_the_loss(gradient: str) -> None:
    problem = Problem()
    loss = cddlib.matching_loss(*problem.arguments(), MatchingConfig(gradient=gradient))
    once, thrice = (torch.autograd.grad(factor * loss, problem.variables, retain_graph=True) for factor in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


# --- TESLA ------------------------------------------------------------------------------------------------------


def tesla(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TESLA's loss and its gradients of images, targets and step size, as the paper writes them (Cui et al. 2023)."""
    network, start, target, images, targets, step_size, steps = problem.arguments()
    b, x, y = step_size.detach(), images.detach(), targets.detach()
    theta, path, summed = start.clone(), [], torch.zeros_like(start)
    for indices, draw in steps:
        path.append(theta)
        here = theta.clone().requires_grad_()
        loss = F.cross_entropy(network(here, augment.apply(draw, x[indices])), y[indices])
        (gradient,) = torch.autograd.grad(loss, here)
        summed += gradient
        theta = theta - b * gradient
    scale = ((start - target) ** 2).sum()
    weight = 2 * (b * (target - start) + b**2 * summed) / scale
    d_images, d_targets = torch.zeros_like(x), torch.zeros_like(y)
    for here, (indices, draw) in zip(path, steps, strict=True):
        leaves = [tensor.clone().requires_grad_() for tensor in (here, x[indices], y[indices])]
        loss = F.cross_entropy(network(leaves[0], augment.apply(draw, leaves[1])), leaves[2])
        (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        parts = torch.autograd.grad(weight @ gradient, leaves[1:])
        for row, d_image, d_target in zip(indices.tolist(), *parts, strict=True):
            d_images[row] += d_image
            d_targets[row] += d_target
    d_step_size = 2 * ((target - start + b * summed) @ summed) / scale
    return ((start - b * summed - target) ** 2).sum() / scale, d_images, d_targets, d_step_size


@pytest.mark.parametrize(("gradient", "share"), [("truncated", 1.0), ("halved", 0.5)])
@pytest.mark.parametrize(
    ("n", "batch", "dsa"), [(1, None, "none"), (2, 3, DSA), (5, None, DSA), (8, 3, "none"), (8, 2, DSA)]
)
def test_truncated_gradient_is_the_one_that_tesla_writes(
    n: int, batch: int | None, dsa: str, gradient: str, share: float
) -> None:
    problem = Problem(n=n, batch=batch, dsa=dsa)
    loss = cddlib.matching_loss(*problem.arguments(), MatchingConfig(gradient=gradient))
    reference, by_images, by_targets, by_step_size = tesla(problem)
    assert relative(loss, reference) < 1e-12
    (by_logits,) = torch.autograd.grad(problem.logits.softmax(1), problem.logits, by_targets)
    found = torch.autograd.grad(loss, problem.variables)
    wanted = [share * by_images, by_logits, by_step_size]
    assert all(relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))


# --- ATT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["exact", "truncated"])
@pytest.mark.parametrize("nearest", [1, 2, 4, 6])
def test_the_walk_starts_at_the_nearest_step(nearest: int, gradient: str) -> None:
    problem = Problem(n=6, batch=3, dsa=DSA)
    path = roll_out(*(problem.arguments()[k] for k in (0, 1, 3, 4, 5, 6)))
    noise = torch.randn(path[0].shape, generator=cddlib.generator("noise"), dtype=torch.double)
    problem.target = path[nearest] + 1e-4 * noise
    assert nearest_step(path, problem.target) == nearest
    problem.check(match_step="nearest", gradient=gradient)
    last = cddlib.matching_loss(*problem.arguments())
    assert (cddlib.matching_loss(*problem.arguments(), MatchingConfig(match_step="nearest")) < last) == (nearest < 6)


@hypothesis.given(
    path=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=2, max_size=8),
    target=st.tuples(*[st.integers(-3, 3)] * 3),
)
def test_no_later_step_is_as_near(path: list[tuple[int, ...]], target: tuple[int, ...]) -> None:
    found = nearest_step([torch.tensor(place).float() for place in path], torch.tensor(target).float())
    distances = [sum(abs(a - b) for a, b in zip(place, target, strict=True)) for place in path]
    assert 1 <= found < len(path)
    assert distances[found] == min(distances[1:])
    assert distances[found] < min(distances[found + 1 :], default=float("inf"))


# --- PAD --------------------------------------------------------------------------------------------------------


@hypothesis.given(
    errors=st.lists(st.integers(-4, 4), min_size=1, max_size=12), dropped=st.floats(0, 1, exclude_max=True)
)
def test_every_parameter_kept_is_at_least_as_far_as_any_left_out(errors: list[int], dropped: float) -> None:
    target = torch.arange(len(errors)).float()
    kept = torch.arange(len(errors))[kept_parameters(target + torch.tensor(errors), target, dropped)].tolist()
    left_out = set(range(len(errors))) - set(kept)
    assert len(kept) == len(set(kept)) == len(errors) - int(dropped * len(errors)) > 0
    assert max((abs(errors[i]) for i in left_out), default=0) <= min(abs(errors[i]) for i in kept)


# --- Side by side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 10**5, 10**9])
@pytest.mark.parametrize(
    "network",
    [
        {},
        {"step": ConvNetStep},
        {"norm": "batch", "activation": "sigmoid", "pooling": "max"},
        {"norm": "group", "pooling": "none"},
        {"norm": "layer"},
        {"network": "mlp"},
    ],
)
@pytest.mark.parametrize(
    "config", [{}, {"gradient": "truncated"}, {"dropped_fraction": 0.3}, {"student_batch": 3}], ids=str
)
def test_students_side_by_side_are_students_one_by_one(
    network: dict[str, Any], config: dict[str, Any], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own parameters, images, labels, step size, batches and augmentation; residuals may fit in part."""
    fields = {"depth": 2, "width": 4, **network}
    step = fields.pop("step", None)
    asked, rng = MatchingConfig(student_steps=4, **config), cddlib.generator("side by side")
    built = cddlib.build_network(cddlib.NetworkConfig(**fields), (2, 8, 8), CLASSES)
    monkeypatch.setattr("cddlib.matching.student.PART", 4 * 8**2)
    monkeypatch.setattr("cddlib.matching.loss.residual_budget", lambda device: budget)
    if step:
        monkeypatch.setattr("cddlib.matching.student.make_step", lambda *given: step(built, "float32", False))
    start = torch.stack([built.init(rng) for _ in range(3)]).double()
    target = start + 0.1 * torch.randn(start.shape, generator=rng, dtype=torch.double)
    images = torch.randn(3, 7, 2, 8, 8, generator=rng, dtype=torch.double, requires_grad=True)
    targets = torch.rand(3, 7, CLASSES, generator=rng, dtype=torch.double, requires_grad=True)
    step_size = torch.tensor([0.3, 0.1, 0.2], dtype=torch.double, requires_grad=True)
    students = [cddlib.plan_student(asked, 7, DSA, rng) for _ in range(3)]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)

    losses = matching_losses(built, start, target, images, targets, step_size, students, asked)
    found = torch.autograd.grad(losses @ weights, (images, targets, step_size))
    for k in range(3):
        variables = [tensor[k].detach().requires_grad_() for tensor in (images, targets, step_size)]
        alone = unrolled(built, start[k], target[k], *variables, students[k], asked)
        assert relative(losses[k], alone) < 1e-12
        for together, wanted in zip(found, torch.autograd.grad(weights[k] * alone, variables), strict=True):
            assert relative(together[k], wanted) < 1e-9


def test_one_student_that_overflows_does_not_touch_the_others() -> None:
    problem = Problem(n=2)
    network, start, target, images, targets, step_size, steps = problem.arguments()
    alone = torch.autograd.grad(cddlib.matching_loss(*problem.arguments()), images)[0]
    two = [torch.stack([tensor, tensor]) for tensor in (start, target, images, targets.detach())]
    rates = torch.stack([step_size.detach(), torch.tensor(1e300).double()])
    losses = matching_losses(network, *two, rates, [steps, steps])
    assert losses[0].isfinite()
    assert not losses[1].isfinite()
    (found,) = torch.autograd.grad(losses.sum(), two[2])
    assert relative(found[0], alone) < 1e-9


@pytest.mark.parametrize(
    ("network", "config", "batch", "sizes"),
    [
        ("convnet", {}, 3000, [2, 2, 1]),
        ("convnet", {}, 10**5, [1] * 5),
        ("convnet", {"side_by_side": 2}, 10**5, [2, 2, 1]),
        ("convnet", {"side_by_side": 9}, 10, [5]),
        ("convnet", {"match_step": "nearest"}, 10, [1] * 5),
        ("mlp", {}, 10, [1] * 5),
    ],
)
def test_students_of_convnets_with_small_batches_are_trained_side_by_side(
    network: str, config: dict[str, Any], batch: int, sizes: list[int]
) -> None:
    built = cddlib.build_network(cddlib.NetworkConfig(network=network, depth=2, width=4), (2, 8, 8), CLASSES)
    chunks = segment_chunks(built, MatchingConfig(**config), torch.zeros(1, 2, 8, 8), batch, 5)
    assert [len(range(5)[chunk]) for chunk in chunks] == sizes
    assert [k for chunk in chunks for k in range(5)[chunk]] == list(range(5))


@pytest.mark.parametrize(("device", "fills"), [("cpu", 1e8), ("cuda", 4e9)])
def test_so_many_students_go_side_by_side_as_fill_the_processor(device: str, fills: float) -> None:
    network = Problem().network  # 2 channels of 8x8 pixels, width 4; then 4 channels of 4x4; then 16 numbers
    a_pass = 2 * (9 * 2 * 4 * 8 * 8 + 9 * 4 * 4 * 4 * 4 + 16 * CLASSES)
    for students in (2, 7):
        most = int(fills / (a_pass * students))
        for batch, wanted in ((most, students), (most + 1, students - 1)):
            assert chunk_size(network, MatchingConfig(), device, batch) == wanted


def test_students_that_end_at_different_steps_are_not_taken_side_by_side() -> None:
    sentence = r"^side_by_side is 2; with match_step 'nearest', where students end at different steps, it must be 1\.$"
    with pytest.raises(cddlib.UserError, match=sentence):
        MatchingConfig(match_step="nearest", side_by_side=2)
    network, *tensors, steps = Problem().arguments()
    two = [torch.stack([tensor, tensor]) for tensor in tensors]
    with pytest.raises(cddlib.UserError, match=sentence):
        matching_losses(network, *two, [steps, steps], MatchingConfig(match_step="nearest"))


# --- Together ---------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=50)
@hypothesis.given(
    config=st.fixed_dictionaries(
        {
            "gradient": st.sampled_from(["exact", "truncated"]),
            "match_step": st.sampled_from(["last", "nearest"]),
            "dropped_fraction": st.sampled_from([0.0, 1e-9, 0.2, 0.7, 0.9999]),
        }
    ),
    batch=st.none() | st.integers(1, 6),
    n=st.integers(1, 6),
    step_size=st.sampled_from([0.1, 1.0, 3.0]),
    soft=st.booleans(),
)
def test_the_methods_go_together(
    config: dict[str, Any], batch: int | None, n: int, step_size: float, soft: bool
) -> None:
    problem = Problem(soft=soft, size=5, batch=batch, n=n, dsa=DSA)
    problem.step_size.data.fill_(step_size)
    problem.check(**config)


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
        config, rng = MatchingConfig(student_steps=9, student_batch=4), torch.Generator().manual_seed(seed)
        steps = cddlib.plan_student(config, 10, DSA, rng)
        return [(s.indices.tolist(), s.draw.change, s.draw.numbers.tolist()) for s in steps if s.draw]

    first = plan(0)
    torch.rand(1)
    assert plan(0) == first != plan(1)
    assert first[0][0] != first[3][0]  # a new order in the second pass


FRACTIONS = (-0.1, 1.0, 1.5, float("nan"), float("inf"))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *((field, 0, "at least 1") for field in ("student_steps", "student_batch", "side_by_side")),
        *(("dropped_fraction", value, "at least 0 and below 1") for value in FRACTIONS),
    ],
)
def test_impossible_students_are_refused(field: str, value: float, allowed: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        MatchingConfig(**{field: value})
    assert str(refused.value) == f"{field} is {value}; it must be {allowed}."


# --- K segments of an iteration ---------------------------------------------------------------------------------


class Doubles(cddlib.Buffer):
    """A buffer read as float64."""

    def parameters(self, expert: int, epoch: int) -> Tensor:
        return super().parameters(expert, epoch).double()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[list[StudentStep]]:
    """The plans of the segments that `concurrent_gradient` matches, overheard."""
    found: list[list[StudentStep]] = []

    def overhear(*arguments: Any) -> Tensor:
        found.extend(arguments[6])
        return matching_losses(*arguments)

    monkeypatch.setattr("cddlib.distillation.gradient.matching_losses", overhear)
    return found


def synthetic_set(config: cddlib.DistillConfig, buffer: cddlib.Buffer) -> cddlib.SyntheticSet:
    """The initial set in float64, with variables that need gradients."""
    found = initialise(config.synthetic, cddlib.load("digits"), buffer, 0, torch.device("cpu"))
    doubles = {name: tensor.double().requires_grad_() for name, tensor in found.variable_tensors().items()}
    return dataclasses.replace(found, **doubles)


def segment_ends(config: cddlib.DistillConfig, buffer: cddlib.Buffer, expert: int, start: int) -> list[Tensor]:
    """The expert's parameters where a segment starts and where it ends."""
    return [buffer.parameters(expert, epoch).double() for epoch in (start, start + config.schedule.expert_epochs)]


CONTRA = {"segments": 3, "labels": "learned", "student_batch": 4}


@pytest.mark.parametrize(
    ("overrides", "anchor_weight"),
    [
        *(({**CONTRA, "side_by_side": number}, 1 / 3) for number in (None, 1, 2, 5)),
        ({**CONTRA, "balance": 0.0}, 1.0),
        ({**CONTRA, "balance": 0.5}, 2 / 3),
        ({**CONTRA, "gradient": "truncated"}, 1 / 3),
        ({**CONTRA, "match_step": "nearest", "step_size": 1.0}, 1 / 3),
        ({**CONTRA, "dropped_fraction": 0.3}, 1 / 3),
        ({**CONTRA, "labels": "teacher", "ipc": 2}, 1 / 3),
    ],
    ids=str,
)
def test_concurrent_gradient_is_the_weighted_sum(
    buffer: cddlib.Buffer,
    quick: dict[str, Any],
    plans: list[list[StudentStep]],
    overrides: dict[str, Any],
    anchor_weight: float,
) -> None:
    """Each segment has its own batches, and may have labels from its own target network, which are constant."""
    config = cddlib.distill_recipe("contra", "digits", **{**quick, **overrides})
    synthetic = synthetic_set(config, buffer)
    found, record = cddlib.concurrent_gradient(config, Doubles(buffer.folder), synthetic, iteration=1)

    assert len(plans) == len(record["matched"]) == len(set(map(tuple, record["matched"]))) == 3
    assert not torch.equal(plans[0][0].indices, plans[1][0].indices)
    wanted = [torch.zeros_like(variable) for variable in synthetic.variables()]
    total = 0.0
    for k, ((expert, start), plan) in enumerate(zip(record["matched"], plans, strict=True)):
        ends, targets = segment_ends(config, buffer, expert, start), synthetic.targets()
        if config.synthetic.labels == "teacher":
            targets = buffer.network(ends[1], synthetic.images.detach()).softmax(1)
        arguments = (buffer.network, *ends, synthetic.images, targets, synthetic.step_size, plan)
        loss = unrolled(*arguments, config.student)
        assert record["losses"][k] == pytest.approx(loss.item(), rel=1e-9)
        weight = anchor_weight if k == record["anchor"] else (1 - anchor_weight) / 2
        total += weight * loss.item()
        gradients = torch.autograd.grad(loss, synthetic.variables(), allow_unused=True, materialize_grads=True)
        for sum_, gradient in zip(wanted, gradients, strict=True):
            sum_ += weight * gradient
    assert record["loss"] == pytest.approx(total, rel=1e-9)
    assert all(torch.equal(f, w) or relative(f, w) < 1e-9 for f, w in zip(found, wanted, strict=True))


def test_one_segment_is_mtt(buffer: cddlib.Buffer, quick: dict[str, Any]) -> None:
    """MTT's loss for the digits with modules of torch.nn, sharing only the expert's parameters with cddlib."""
    config = cddlib.distill_recipe("mtt", "digits", ipc=2, **{**quick, "augment": "none"})
    synthetic = synthetic_set(config, buffer)
    found, record = cddlib.concurrent_gradient(config, Doubles(buffer.folder), synthetic, iteration=0)
    model = textbook.convnet(config.network, (1, 8, 8), 10)
    ((expert, start),) = record["matched"]
    first, target = segment_ends(config, buffer, expert, start)
    pieces = first.split([parameter.numel() for parameter in model.parameters()])
    student = {
        name: piece.view(parameter.shape).requires_grad_()
        for (name, parameter), piece in zip(model.named_parameters(), pieces, strict=True)
    }
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
