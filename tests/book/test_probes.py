"""Probes and the accumulated error, against plain autograd in float64; and the hook that measures them in a run."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import textbook
import torch
from torch import Tensor

import cddlib
from cddbook import probes
from cddbook.probes import ProbeHook
from cddlib.distillation.hooks import Run
from cddlib.runtime.run_folder import read_metrics
from cddlib.synthetic import initialise

CPU = torch.device("cpu")
STARTS = (0, 1, 4)
PROBES = ProbeHook(probe_starts=STARTS, probe_expert=1)


class Doubles(cddlib.Buffer):
    """A buffer read as float64."""

    def parameters(self, expert: int, epoch: int) -> Tensor:
        return super().parameters(expert, epoch).double()


class Problem:
    """A synthetic set in float64 for the experts of a buffer; the students' plans are overheard."""

    def __init__(self, buffer: cddlib.Buffer, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
        self.config = cddlib.distill_recipe("contra", "digits", 1, **overrides)
        self.length = self.config.schedule.expert_epochs
        self.buffer: cddlib.Buffer = Doubles(buffer.folder)
        initial = initialise(self.config.synthetic, cddlib.load("digits"), buffer, 0, CPU)
        doubles = {name: tensor.double() for name, tensor in initial.variable_tensors().items()}
        self.synthetic = dataclasses.replace(initial, **doubles)
        self.plans: list[Any] = []

        def overhear(*arguments: Any) -> Any:
            self.plans.append(cddlib.plan_student(*arguments))
            return self.plans[-1]

        monkeypatch.setattr(probes, "plan_student", overhear)

    def run(self, synthetic: cddlib.SyntheticSet | None = None, seed: int = 7) -> Run:
        """As a hook sees it."""
        config = dataclasses.replace(self.config, seed=seed)
        return Run(config, self.buffer, Path(), 0, synthetic or self.synthetic, {})

    def student(self, theta: Tensor, plan: Any, synthetic: cddlib.SyntheticSet) -> Tensor:
        """Where N steps of SGD lead from `theta`, with the graph of all of them."""
        learned = synthetic.images, synthetic.targets(), synthetic.step_size
        return textbook.walk(self.buffer.network, theta, *learned, steps=plan)[-1]

    def unrolled(self, synthetic: cddlib.SyntheticSet, start: int, plan: Any) -> Tensor:
        """The second expert's segment's matching loss."""
        ends = (self.buffer.parameters(1, epoch) for epoch in (start, start + self.length))
        learned = synthetic.images, synthetic.targets(), synthetic.step_size
        return textbook.matching_loss(self.buffer.network, *ends, *learned, plan)

    def ftd(self, plans: list[Any], expert: int) -> dict[str, list[float]]:
        """FTD's Eqs. 6-8; a plan for each segment."""
        stars = [self.buffer.parameters(expert, epoch) for epoch in range(0, self.buffer.epochs + 1, self.length)]
        hats, deltas, initials = [stars[0]], [], []
        found: dict[str, list[float]] = {"epoch": [self.length * (t + 1) for t in range(len(plans))]}
        for t, plan in enumerate(plans):
            hats.append(self.student(hats[t], plan, self.synthetic).detach())
            on_path = self.student(stars[t], plan, self.synthetic).detach() - stars[t]
            deltas.append(on_path - (stars[t + 1] - stars[t]))  # Eq. 6
            initials.append(hats[t + 1] - hats[t] - on_path)  # Eq. 7
            for name, vector in {
                "error": hats[t + 1] - stars[t + 1],
                "matching": deltas[t],
                "initialisation": initials[t],
                "matching_sum": torch.stack(deltas).sum(0),
                "initialisation_sum": torch.stack(initials).sum(0),
                "travelled": stars[t + 1] - stars[0],
            }.items():
                found.setdefault(name, []).append(vector.norm().item())
        return found


@pytest.fixture
def problem(buffer: cddlib.Buffer, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Problem]:
    """A problem with soft labels, mini-batches and augmentation, unless told otherwise."""
    usual = {**quick, "labels": "learned", "student_batch": 4}
    return lambda **overrides: Problem(buffer, monkeypatch, **{**usual, **overrides})


# --- Losses and gradients ---------------------------------------------------------------------------------------


def test_probes_losses_depend_on_the_synthetic_set_alone(problem: Callable[..., Problem]) -> None:
    usual = problem()
    first, error = PROBES.losses(usual.run()), PROBES.accumulated_error(usual.run())
    torch.rand(1)
    assert (PROBES.losses(usual.run()), PROBES.accumulated_error(usual.run())) == (first, error)
    assert PROBES.accumulated_error(usual.run(seed=6))["error"] != error["error"]
    assert ProbeHook(probe_starts=(1,), probe_expert=1).losses(usual.run()) == pytest.approx([first[1]], rel=1e-12)
    moved = usual.synthetic.copy()
    moved.images[0] += 0.1
    for other in (
        PROBES.losses(usual.run(moved)),
        [loss for losses, _ in PROBES.in_turns(usual.run(), draw=1) for loss in losses.tolist()],
        PROBES.losses(usual.run(seed=8)),
        dataclasses.replace(PROBES, probe_expert=0).losses(usual.run()),
    ):
        assert all(a != b for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize(("side_by_side", "turns"), [(1, 3), (2, 2), (None, 1)])
def test_similarities_are_those_of_autograd(
    problem: Callable[..., Problem], side_by_side: int | None, turns: int
) -> None:
    usual = problem(side_by_side=side_by_side)
    assert len(list(PROBES.in_turns(usual.run()))) == turns
    usual.plans.clear()
    found = PROBES.gradient_similarity(usual.run())
    plans = usual.plans[:6]  # first students of the three probes, then second ones
    for variable in usual.synthetic.variables():
        variable.requires_grad_()
    losses = [usual.unrolled(usual.synthetic, *pair) for pair in zip(STARTS * 2, plans, strict=True)]
    gradients = [torch.autograd.grad(loss, usual.synthetic.variables()) for loss in losses]
    assert found["losses"] == pytest.approx([loss.item() for loss in losses[:3]], rel=1e-9)
    assert list(found["products"]) == ["images", "label_logits", "step_size"]
    for v, products in enumerate(found["products"].values()):
        wanted = [[(a[v] * b[v]).sum().item() for b in gradients] for a in gradients]
        np.testing.assert_allclose(products, wanted, rtol=1e-7, atol=1e-9 * max(map(max, wanted)))


@pytest.mark.parametrize("labels", ["learned", "hard"])
def test_after_is_the_first_real_step_of_sgd(problem: Callable[..., Problem], labels: str) -> None:
    usual = problem(labels=labels, lr_images=20.0, lr_labels=3.0, lr_step_size=1e-3)
    rates = usual.config.optimizer.rates(usual.synthetic)
    found = PROBES.gradient_similarity(usual.run())["after"]
    before = PROBES.losses(usual.run())
    for probe in range(3):
        stepped = usual.synthetic.copy()
        groups = [{"params": [v], "lr": rate} for v, rate in zip(stepped.variables(), rates, strict=True)]
        optimizer = torch.optim.SGD(groups, momentum=0.5)
        for variable in stepped.variables():
            variable.requires_grad_()
        usual.unrolled(stepped, STARTS[probe], usual.plans[probe]).backward()
        optimizer.step()
        assert found[probe] == pytest.approx(PROBES.losses(usual.run(stepped)), rel=1e-10)
        assert found[probe] != pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_measuring_leaves_the_synthetic_set_alone(problem: Callable[..., Problem], needs_gradients: bool) -> None:
    usual = problem()
    variables = usual.synthetic.variables()
    for variable in variables:
        variable.requires_grad_(needs_gradients)
    before = usual.synthetic.copy().variables()
    PROBES.gradient_similarity(usual.run())
    PROBES.accumulated_error(usual.run())
    assert all(map(torch.equal, before, variables))
    assert all(v.requires_grad == needs_gradients and v.grad is None for v in variables)


# --- The error that accumulates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 3, 4])  # 4 fill no second one
def test_accumulated_error_is_ftd_s(problem: Callable[..., Problem], expert: int, length: int) -> None:
    usual = problem(expert_epochs=length, step_size=0.3, window_end=3, segments=1)
    found = ProbeHook(probe_expert=expert).accumulated_error(usual.run())
    firsts, seconds = usual.plans[::2], usual.plans[1::2]  # both students of a segment see the same batches
    for first, second in itertools.chain(*(zip(*plans, strict=True) for plans in zip(firsts, seconds, strict=True))):
        assert torch.equal(first.indices, second.indices) and torch.equal(first.draw.numbers, second.draw.numbers)
    wanted = usual.ftd(firsts, expert)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name
    assert found["epoch"] == list(range(length, 7, length))
    assert found["initialisation"][0] == 0
    assert min(found["initialisation"][1:], default=1.0) > 1e-3


# --- The hook ---------------------------------------------------------------------------------------------------


def test_probes_are_measured_on_time(buffer: cddlib.Buffer, quick: dict[str, Any], tmp_path: Path) -> None:
    hook = ProbeHook(probe_starts=(0, 2, 4), probe_expert=1, probe_every=2, similarity_every=3, error_every=5)
    config = cddlib.distill_recipe("contra", "digits", 1, **{**quick, "iterations": 7, "validate_every": 0})
    cddlib.distill(config, buffer, tmp_path, hooks=[hook], device="cpu")
    lines = read_metrics(tmp_path)
    wanted = {"probe_losses": [0, 2, 4, 6, 7], "gradient_similarity": [0, 3, 6, 7], "accumulated_error": [0, 5, 7]}
    assert {name: [line["iteration"] for line in lines if name in line] for name in wanted} == wanted
    assert all(len(line["probe_losses"]) == 3 for line in lines if "probe_losses" in line)
    for line in (lines[0], lines[6], lines[7]):
        assert line["gradient_similarity"]["losses"] == line["probe_losses"]
    assert lines[0]["probe_losses"] != lines[2]["probe_losses"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"probe_starts": (1, 1)}, r"^probe_starts is \(1, 1\); epochs must be 0 or more, ascending, each once\.$"),
        ({"error_every": -1}, r"^error_every is -1; it must be at least 0\.$"),
        ({"similarity_every": 5}, r"^similarity_every is 5, but probe_starts names no segments\.$"),
        ({"probe_starts": (0, 5)}, r"^probe_starts is \(0, 5\), but the experts stop at epoch 6 .* at epoch 4 at "),
        ({"probe_expert": -1}, r"^probe_expert is -1, but .* holds experts 0 to 1\.$"),
    ],
)
def test_impossible_probes_are_refused(
    buffer: cddlib.Buffer, quick: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(cddlib.UserError, match=sentence):
        ProbeHook(**fields).check(cddlib.distill_recipe("contra", "digits", 1, **quick), buffer)
