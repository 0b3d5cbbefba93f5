"""The matching loss: its gradient against brute force through the whole student."""

from typing import Any
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import pytest
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor

import cddlib
from cddlib.data import augment
from cddlib.matching.loss import matching_losses, nearest_step
from cddlib.matching.student import MatchingConfig, chunk_size, segment_chunks
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.engine import make_step
from cddlib.training.step import ComputeConfig

CLASSES = 3
DSA = "color_crop_cutout_flip_scale_rotate"


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


class Problem:
    """A small float64 problem: students side by side, each with parameters, images, labels and steps of its own."""

    def __init__(
        self,
        *,
        students: int = 1,
        soft: bool = True,
        size: int = 7,
        batch: int | None = None,
        n: int = 5,
        dsa: str = "none",
        step_size: float = 0.3,
        **network: Any,
    ) -> None:
        rng = cddlib.generator("problem")
        doubles: dict[str, Any] = {"generator": rng, "dtype": torch.double}
        config = cddlib.NetworkConfig(**{"depth": 2, "width": 4, **network})
        self.network = cddlib.build_network(config, (2, 8, 8), CLASSES)
        self.start = torch.stack([self.network.init(rng) for _ in range(students)]).double()
        self.start += 0.01 * torch.randn(self.start.shape, **doubles)  # a new transformer answers 0 to every image
        self.target = self.start + 0.1 * torch.randn(self.start.shape, **doubles)
        self.images = torch.randn(students, size, 2, 8, 8, **doubles, requires_grad=True)
        self.logits = torch.randn(students, size, CLASSES, **doubles, requires_grad=True)
        self.step_size = (step_size * torch.tensor([1.0, 0.3, 0.6])[:students].double()).requires_grad_()
        self.variables = [self.images, self.logits, self.step_size] if soft else [self.images, self.step_size]
        self.soft = soft
        plan = MatchingConfig(student_steps=n, student_batch=batch)
        self.steps = [cddlib.plan_student(plan, size, dsa, rng) for _ in range(students)]

    def arguments(self) -> tuple[Any, ...]:
        hard = F.one_hot(torch.arange(self.images.shape[1]) % CLASSES, CLASSES).double()
        targets = self.logits.softmax(2) if self.soft else hard.expand(len(self.images), -1, -1)
        return self.network, self.start, self.target, self.images, targets, self.step_size, self.steps

    def alone(self) -> tuple[Any, ...]:
        """The arguments of `matching_loss` for the first student."""
        network, *rest = self.arguments()
        return network, *(tensor[0] for tensor in rest)

    def check(self, **config: Any) -> None:
        """Losses, and gradients of a weighted sum of them, equal the unrolled ones."""
        asked = MatchingConfig(**config)
        network, *rest = self.arguments()
        losses = matching_losses(network, *rest, asked)
        students = zip(*rest, strict=True)
        references = torch.stack([textbook.matching_loss(network, *student, asked) for student in students])
        assert relative(losses, references) < 1e-12
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)[: len(losses)]
        found, wanted = (
            torch.autograd.grad(loss @ weights, self.variables, retain_graph=True) for loss in (losses, references)
        )
        for student in range(len(losses)):
            assert all(relative(f[student], w[student]) < 1e-9 for f, w in zip(found, wanted, strict=True))


NETWORKS = st.just({"network": "mlp"}) | st.fixed_dictionaries(
    {
        "depth": st.integers(1, 3),
        "norm": st.sampled_from(["instance", "batch", "group", "layer", "none"]),
        "activation": st.sampled_from(["relu", "leakyrelu", "sigmoid"]),
        "pooling": st.sampled_from(["avg", "max", "none"]),
    }
)


@hypothesis.settings(max_examples=120)
@hypothesis.given(
    network=st.just({}) | NETWORKS,
    written_out=st.booleans(),
    sizes=st.fixed_dictionaries(
        {
            "students": st.integers(1, 3),
            "size": st.integers(2, 7),
            "batch": st.none() | st.integers(1, 6),
            "n": st.integers(1, 6),
            "dsa": st.sampled_from(["none", DSA, *augment.CHANGES]),
            "step_size": st.sampled_from([0.1, 0.3, 1.0, 3.0]),
            "soft": st.booleans(),
        }
    ),
    config=st.fixed_dictionaries(
        {
            "gradient": st.sampled_from(["exact", "exact", "truncated", "halved"]),
            "match_step": st.sampled_from(["last", "nearest"]),
            "dropped_fraction": st.sampled_from([0.0, 0.0, 1e-9, 0.3, 0.9999]),
        }
    ),
    part=st.sampled_from([2, 4, 1000]),
    budget=st.sampled_from([0, 10**5, 10**9]),
)
def test_the_gradient_is_exact_whatever_goes_together(
    network: dict[str, Any], written_out: bool, sizes: dict[str, Any], config: dict[str, Any], part: int, budget: int
) -> None:
    """Any network, augmentation, batch and method; in parts of so many images, with residuals kept as far as they fit.

    An exact gradient is the one through the graph of all steps; TESLA's takes each step's parameters as given.
    """
    problem = Problem(**{**sizes, "students": 1 if config["match_step"] == "nearest" else sizes["students"]}, **network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cddlib.matching.student.PART", part * 8**2)
        patch.setattr("cddlib.matching.loss.residual_budget", lambda device: budget)
        if written_out and not network:
            step = ConvNetStep(problem.network, "float32", False)
            patch.setattr("cddlib.matching.student.make_step", lambda *given: step)
        problem.check(**config)


@pytest.mark.parametrize(
    ("network", "norm", "n"),
    [("resnet18", "instance", 1), ("alexnet", "instance", 2), ("densenet121", "batch", 1), ("vit", "instance", 1)],
)
def test_the_gradient_is_exact_in_every_architecture(network: str, norm: str, n: int) -> None:
    Problem(network=network, norm=norm, n=n, size=3).check()


@pytest.mark.parametrize(("norm", "largest"), [("instance", 3), ("layer", 3), ("none", 3), ("batch", 7)])
def test_batches_are_cut_into_parts(norm: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images do not depend on their batch, a step takes at most `PART` pixels of them at a time."""
    monkeypatch.setattr("cddlib.matching.student.PART", 3 * 8**2)
    problem = Problem(norm=norm)
    step = make_step(problem.network, ComputeConfig(), torch.device("cpu"))
    forward = Mock(wraps=step.forward)
    monkeypatch.setattr(step, "forward", forward)
    cddlib.matching_loss(*problem.alone())
    sizes = [call.args[1].shape[1] for call in forward.call_args_list]
    assert set(sizes) == ({2, 3} if largest == 3 else {7})
    assert sum(sizes) == 5 * 7


# --- ATT --------------------------------------------------------------------------------------------------------


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


# --- Side by side -----------------------------------------------------------------------------------------------


def test_one_student_that_overflows_does_not_touch_the_others() -> None:
    problem = Problem(students=2, n=2)
    (alone,) = torch.autograd.grad(cddlib.matching_loss(*problem.alone()), problem.images)
    problem.step_size.data[1] = 1e300
    losses = matching_losses(*problem.arguments())
    assert losses.isfinite().tolist() == [True, False]
    (found,) = torch.autograd.grad(losses.sum(), problem.images)
    assert relative(found[0], alone[0]) < 1e-9


@pytest.mark.parametrize(
    ("network", "config", "sizes"),
    [
        ("convnet", {"side_by_side": 2}, [2, 2, 1]),
        ("convnet", {"match_step": "nearest"}, [1] * 5),
        ("mlp", {}, [1] * 5),
        ("convnet", {}, [5]),
    ],
)
def test_students_of_convnets_are_trained_side_by_side(network: str, config: dict[str, Any], sizes: list[int]) -> None:
    built = Problem(network=network).network
    chunks = segment_chunks(built, MatchingConfig(**config), torch.zeros(1, 2, 8, 8), 10, 5)
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
    with pytest.raises(cddlib.UserError, match=sentence):
        matching_losses(*Problem(students=2).arguments(), MatchingConfig(match_step="nearest"))


def test_a_segment_that_starts_where_it_ends_is_refused() -> None:
    problem = Problem()
    problem.target = problem.start.clone()
    with pytest.raises(cddlib.UserError, match="starts where it ends"):
        cddlib.matching_loss(*problem.alone())


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

    assert plan(0) == plan(0) != plan(1)
    assert plan(0)[0][0] != plan(0)[3][0]  # a new order in the second pass
