"""Forgetting and transfer on small tables, by hand and against the textbooks' loops; the accumulated error by hand."""

import dataclasses
import math
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cddlib
from cddbook import probes
from cddbook.continual import (
    average_forgetting,
    backward_transfer,
    changes_between_visits,
    forward_transfer,
    probe_table,
)
from cddbook.probes import accumulated_error
from cddlib.data import augment
from cddlib.synthetic import initialise

IN_TURN = np.eye(3, dtype=bool)  # stage k visits task k
SCORES = np.array(
    [
        [-1.0, -2.0, -4.0],  # before the first stage
        [-0.2, -1.5, -4.5],
        [-0.5, -0.4, -3.0],
        [-0.9, -0.3, -1.0],
    ]
)


def visits_of(*stages: tuple[int, ...], tasks: int) -> np.ndarray:
    """Which tasks each stage visits."""
    return np.array([[task in stage for task in range(tasks)] for stage in stages])


# --- Forgetting and transfer ------------------------------------------------------------------------------------


def test_forgetting_of_three_tasks_by_hand() -> None:
    task_0 = -0.2 - -0.9  # best after stage 1, out of stages 1 and 2
    task_1 = -0.4 - -0.3  # stage 2 alone; it went on improving
    assert average_forgetting(SCORES, IN_TURN) == pytest.approx((task_0 + task_1) / 2)
    assert average_forgetting(SCORES, IN_TURN) == pytest.approx(0.3)


def test_backward_transfer_of_three_tasks_by_hand() -> None:
    task_0 = -0.9 - -0.2
    task_1 = -0.3 - -0.4
    assert backward_transfer(SCORES, IN_TURN) == pytest.approx((task_0 + task_1) / 2)
    assert backward_transfer(SCORES, IN_TURN) == pytest.approx(-0.3)


def test_forward_transfer_of_three_tasks_by_hand() -> None:
    task_1 = -1.5 - -2.0  # after stage 1, before its own
    task_2 = -3.0 - -4.0  # after stage 2
    assert forward_transfer(SCORES, IN_TURN) == pytest.approx((task_1 + task_2) / 2)
    assert forward_transfer(SCORES, IN_TURN) == pytest.approx(0.75)


def test_the_signs_of_forgetting_and_transfer() -> None:
    lost = np.array([[0.0, 0.0], [5.0, -1.0], [1.0, 9.0]])
    assert average_forgetting(lost, np.eye(2, dtype=bool)) == 4
    assert backward_transfer(lost, np.eye(2, dtype=bool)) == -4
    assert forward_transfer(lost, np.eye(2, dtype=bool)) == -1
    helped = np.array([[0.0, 0.0], [5.0, 2.0], [7.0, 9.0]])
    assert average_forgetting(helped, np.eye(2, dtype=bool)) == -2
    assert backward_transfer(helped, np.eye(2, dtype=bool)) == 2
    assert forward_transfer(helped, np.eye(2, dtype=bool)) == 2


def test_the_best_score_may_come_long_after_the_first_visit() -> None:
    scores = np.array([[9.0, 0.0], [1.0, 0.0], [6.0, 0.0], [2.0, 0.0]])  # 9 was before the first visit
    visits = visits_of((0,), (1,), (1,), tasks=2)
    assert average_forgetting(scores, visits) == pytest.approx(((6 - 2) + (0 - 0)) / 2)
    assert backward_transfer(scores, visits) == 2 - 1


def test_transfer_is_backward_from_the_last_visit_and_forward_to_the_first() -> None:
    scores = np.array([[0.0, 0.0], [0.0, 7.0], [8.0, 0.0], [6.0, 0.0], [5.0, 0.0], [2.0, 1.0]])
    visits = visits_of((1,), (1,), (0,), (0,), (1,), tasks=2)
    assert backward_transfer(scores, visits) == 2 - 5
    assert forward_transfer(scores, visits) == 8 - 0


def test_a_task_that_is_never_visited_does_not_count() -> None:
    never = np.array([[5.0], [9.0], [-9.0], [3.0]])
    scores, visits = np.hstack([never, SCORES]), np.hstack([np.zeros((3, 1), dtype=bool), IN_TURN])
    for measure in (average_forgetting, backward_transfer, forward_transfer):
        assert measure(scores, visits) == measure(SCORES, IN_TURN)


@pytest.mark.parametrize(
    ("stages", "defined"),
    [
        (((), (), ()), ()),
        (((0, 1, 2), (), ()), ("average_forgetting", "backward_transfer")),
        (((), (), (0, 1, 2)), ("forward_transfer",)),
        (((0, 1, 2), (), (0, 1, 2)), ("average_forgetting",)),
        (((), (0,), ()), ("average_forgetting", "backward_transfer", "forward_transfer")),
    ],
)
def test_measures_without_a_task_to_judge_are_nan(stages: tuple[tuple[int, ...], ...], defined: tuple[str]) -> None:
    visits = visits_of(*stages, tasks=3)
    for measure in (average_forgetting, backward_transfer, forward_transfer):
        assert math.isnan(measure(SCORES, visits)) == (measure.__name__ not in defined)


@hypothesis.given(data=st.data(), tasks=st.integers(2, 6))
def test_one_task_a_stage_gives_the_textbook_measures(data: st.DataObject, tasks: int) -> None:
    """R[k][j]: score on task j after stage k, both from 1; b[j]: before training (GEM, RWalk)."""
    table = data.draw(hnp.arrays(np.float64, (tasks + 1, tasks), elements=st.floats(-10, 10)))
    r = {k: {j: table[k, j - 1] for j in range(1, tasks + 1)} for k in range(1, tasks + 1)}
    b = {j: table[0, j - 1] for j in range(1, tasks + 1)}
    forgetting = backward = forward = 0.0
    for j in range(1, tasks):
        forgetting += max(r[k][j] - r[tasks][j] for k in range(j, tasks))
        backward += r[tasks][j] - r[j][j]
    for i in range(2, tasks + 1):
        forward += r[i - 1][i] - b[i]
    visits = np.eye(tasks, dtype=bool)
    assert average_forgetting(table, visits) == pytest.approx(forgetting / (tasks - 1), abs=1e-9)
    assert backward_transfer(table, visits) == pytest.approx(backward / (tasks - 1), abs=1e-9)
    assert forward_transfer(table, visits) == pytest.approx(forward / (tasks - 1), abs=1e-9)


@hypothesis.given(data=st.data(), stages=st.integers(1, 7), tasks=st.integers(1, 4))
def test_measures_of_any_visits_against_loops(data: st.DataObject, stages: int, tasks: int) -> None:
    scores = data.draw(hnp.arrays(np.float64, (stages + 1, tasks), elements=st.floats(1, 10)))
    visits = data.draw(hnp.arrays(bool, (stages, tasks)))
    forgetting, backward, forward, changes = [], [], [], []
    for task in range(tasks):
        seen = [stage for stage in range(1, stages + 1) if visits[stage - 1, task]]
        if not seen:
            continue
        if seen[0] != stages:
            forgetting.append(max(scores[stage, task] for stage in range(seen[0], stages)) - scores[stages, task])
        if seen[-1] != stages:
            backward.append(scores[stages, task] - scores[seen[-1], task])
        if seen[0] != 1:
            forward.append(scores[seen[0] - 1, task] - scores[0, task])
        for i in range(len(seen) - 1):
            if seen[i + 1] != seen[i] + 1:
                after, before = scores[seen[i], task], scores[seen[i + 1] - 1, task]
                changes.append((before - after) / after)
    for measure, wanted in (
        (average_forgetting, forgetting),
        (backward_transfer, backward),
        (forward_transfer, forward),
    ):
        mean = sum(wanted) / len(wanted) if wanted else math.nan
        assert measure(scores, visits) == pytest.approx(mean, abs=1e-9, nan_ok=True)
    assert changes_between_visits(scores, visits).tolist() == pytest.approx(changes, abs=1e-9)


def test_changes_between_visits_by_hand() -> None:
    losses = np.array([[9.0, 9.0], [2.0, 9.0], [3.0, 4.0], [3.5, 3.0], [1.0, 2.0], [1.5, 2.5], [9.0, 9.0]])
    visits = visits_of((0,), (1,), (), (0, 1), (1,), (), tasks=2)
    assert changes_between_visits(losses, visits).tolist() == pytest.approx([3.5 / 2 - 1, 3 / 4 - 1])


def test_nothing_lies_between_adjoining_or_single_visits() -> None:
    visits = visits_of((0,), (0,), (0, 1), tasks=3)
    found = changes_between_visits(np.full((4, 3), 2.0), visits)
    assert found.shape == (0,)


def test_two_quadratics_in_turn_forget_as_computed_by_hand() -> None:
    """Losses a (x − 1)² and a (x + 1)², a gradient step on each in turn.

    With r = 1 − 2 a η a step leads from x to ±1 + r (x ∓ 1). From x = 0 it is then y_k = (1 − r) / (1 + r) (1 − (−r)^k)
    towards the task of stage k, and its loss is a (1 − y_k)², the other's a (1 + y_k)².
    """
    a, rate, stages = 0.7, 0.2, 6
    x, rows, visits = 0.0, [[a, a]], np.zeros((stages, 2), dtype=bool)
    for stage in range(stages):
        goal = 1 if stage % 2 == 0 else -1
        x -= rate * 2 * a * (x - goal)
        rows.append([a * (x - 1) ** 2, a * (x + 1) ** 2])
        visits[stage, stage % 2] = True
    losses = np.array(rows)

    r = 1 - 2 * a * rate

    def y(k: int) -> float:
        return (1 - r) / (1 + r) * (1 - (-r) ** k)

    def near(k: int) -> float:
        return a * (1 - y(k)) ** 2

    def far(k: int) -> float:
        return a * (1 + y(k)) ** 2

    first, second = far(6) - near(1), near(6) - near(4)  # y falls over odd stages and rises over even ones
    assert average_forgetting(-losses, visits) == pytest.approx((first + second) / 2)
    assert backward_transfer(-losses, visits) == pytest.approx(near(5) - far(6))
    assert forward_transfer(-losses, visits) == pytest.approx(a - far(1))
    between = [far(k + 1) / near(k) - 1 for k in (1, 3, 2, 4)]
    assert changes_between_visits(losses, visits).tolist() == pytest.approx(between)
    assert first > 0
    assert min(between) > 0


# --- Lines of metrics -------------------------------------------------------------------------------------------


def line(expert: int, starts: list[int], losses: list[float] | None = None, **rest: Any) -> dict[str, Any]:
    """A line of metrics, as far as it matters."""
    return {"loss": 0.5, "expert": expert, "starts": starts, **({"probe_losses": losses} if losses else {}), **rest}


def test_the_probe_table_by_hand() -> None:
    lines = [
        {"iteration": 0, "probe_losses": [1.0, 2.0], "validation_accuracy": [0.1]},
        line(3, [4], [0.9, 2.1]),
        line(3, [0, 8], [0.8, 1.9]),
        line(3, [5], [0.7, 1.8]),
        line(3, [0, 4], [0.6, 1.7]),
    ]
    losses, visits = probe_table(lines, [4, 8], 3)
    assert losses.tolist() == [[1, 2], [0.9, 2.1], [0.8, 1.9], [0.7, 1.8], [0.6, 1.7]]
    assert visits.tolist() == [[True, False], [False, True], [False, False], [True, False]]
    assert visits.dtype == bool


def test_a_segment_of_another_expert_is_no_visit() -> None:
    lines = [{"probe_losses": [1.0, 2.0]}, line(0, [4, 8], [0.9, 1.9]), line(1, [8], [0.9, 1.8])]
    assert probe_table(lines, [4, 8], 1)[1].tolist() == [[False, False], [False, True]]
    assert probe_table(lines, [4, 8], 0)[1].tolist() == [[True, True], [False, False]]


def test_replayed_segments_are_visits_of_their_own_expert() -> None:
    lines = [
        {"probe_losses": [1.0, 2.0]},
        line(0, [0], [0.9, 1.9], replayed=[]),
        line(0, [0], [0.9, 1.8], replayed=[[1, 4], [0, 8]]),
        line(1, [8], [0.9, 1.7], replayed=[[0, 4]]),
    ]
    assert probe_table(lines, [4, 8], 1)[1].tolist() == [[False, False], [True, False], [False, True]]
    assert probe_table(lines, [4, 8], 0)[1].tolist() == [[False, False], [False, True], [True, False]]


def test_a_stage_is_what_happens_between_two_measurements() -> None:
    lines = [
        {"probe_losses": [1.0, 2.0]},
        line(0, [4]),
        line(0, [8]),
        line(0, [6], [0.9, 1.9]),
        line(0, [6]),
        line(0, [4], [0.8, 1.8]),
        line(0, [8], [0.7, 1.7]),  # the last iteration is always measured
    ]
    losses, visits = probe_table(lines, [4, 8], 0)
    assert losses.shape == (4, 2)
    assert visits.tolist() == [[True, True], [True, False], [False, True]]


def test_a_run_that_was_measured_once_has_no_stage() -> None:
    losses, visits = probe_table([{"probe_losses": [1.0, 2.0]}, line(0, [4])], [4, 8], 0)
    assert losses.tolist() == [[1, 2]]
    assert visits.shape == (0, 2)
    assert math.isnan(average_forgetting(-losses, visits))


def test_an_iteration_that_was_skipped_is_no_visit() -> None:
    lines = [{"probe_losses": [1.0]}, line(0, [4], [1.0], skipped=True), line(0, [4], [0.9], skipped=False)]
    assert probe_table(lines, [4], 0)[1].tolist() == [[False], [True]]


def test_the_table_of_a_real_run(buffer: cddlib.Buffer, quick: dict[str, Any], tmp_path: Any) -> None:
    overrides = {**quick, "segments": 1, "replay": 1, "probe_starts": (1, 2), "probe_every": 2, "probe_expert": 1}
    config = cddlib.distill_recipe("contra", "digits", 1, **{**overrides, "iterations": 5, "validate_every": 0})
    cddlib.distill(config, buffer, tmp_path, device="cpu")
    lines = cddlib.runtime.run_folder.Metrics.read(tmp_path / "metrics.jsonl", until=5)
    losses, visits = probe_table(lines, config.probe_starts, config.probe_expert)
    assert losses.tolist() == [lines[i]["probe_losses"] for i in (0, 2, 4, 5)]
    matched = [{(entry["expert"], *entry["starts"]), *map(tuple, entry["replayed"])} for entry in lines[1:]]
    stages = [matched[0] | matched[1], matched[2] | matched[3], matched[4]]
    assert visits.tolist() == [[(1, start) in stage for start in (1, 2)] for stage in stages]
    assert visits.any()


# --- The error that accumulates ---------------------------------------------------------------------------------


class Doubles(cddlib.Buffer):
    """A buffer read as float64."""

    def parameters(self, expert: int, epoch: int) -> Tensor:
        return super().parameters(expert, epoch).double()


class Problem:
    """A synthetic set in float64 for the experts of a buffer; the students' plans are overheard."""

    def __init__(self, buffer: cddlib.Buffer, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
        self.config = cddlib.distill_recipe("contra", "digits", 1, **overrides)
        self.buffer = Doubles(buffer.folder)
        initial = initialise(self.config, cddlib.load("digits"), buffer, 0, torch.device("cpu"))
        doubles = {name: tensor.double() for name, tensor in initial.variable_tensors().items()}
        self.synthetic = dataclasses.replace(initial, **doubles)
        self.plans: list[Any] = []
        plan_student = cddlib.plan_student

        def overhear(*arguments: Any) -> Any:
            self.plans.append(plan_student(*arguments))
            return self.plans[-1]

        monkeypatch.setattr(probes, "plan_student", overhear)

    def found(self, expert: int = 0, seed: int = 5) -> dict[str, list[float]]:
        return accumulated_error(self.config, self.buffer, self.synthetic, expert=expert, seed=seed)

    def student(self, theta: Tensor, plan: Any = None) -> Tensor:
        """Where N steps of SGD lead from `theta`; without a plan, on all images."""
        everything = torch.arange(len(self.synthetic.labels))
        for indices, draw in plan or [(everything, None)] * self.config.student_steps:
            theta = theta.detach().requires_grad_()
            logits = self.buffer.network(theta, augment.apply(draw, self.synthetic.images[indices]))
            loss = F.cross_entropy(logits, self.synthetic.targets()[indices])
            (gradient,) = torch.autograd.grad(loss, theta)
            theta = theta - self.synthetic.step_size * gradient
        return theta.detach()

    def ftd(self, plans: list[Any], expert: int = 0) -> dict[str, list[float]]:
        """FTD's Eqs. 6-8, with A[g, n] the way from θ_0 to θ_n; a plan for each segment."""
        m = self.config.expert_epochs
        stars = [self.buffer.parameters(expert, epoch) for epoch in range(0, self.buffer.epochs + 1, m)]
        hats = [stars[0]]
        for plan in plans:
            hats.append(self.student(hats[-1], plan))
        found: dict[str, list[float]] = {"epoch": [m * (t + 1) for t in range(len(plans))]}
        deltas, initials = [], []
        for t, plan in enumerate(plans):
            epsilon = hats[t] - stars[t]
            on_path = self.student(stars[t], plan) - stars[t]
            off_path = self.student(stars[t] + epsilon, plan) - (stars[t] + epsilon)
            deltas.append(on_path - (stars[t + 1] - stars[t]))  # Eq. 6
            initials.append(off_path - on_path)  # Eq. 7
        for t in range(len(plans)):
            for name, vector in {
                "error": hats[t + 1] - stars[t + 1],
                "matching": deltas[t],
                "initialisation": initials[t],
                "matching_sum": torch.stack(deltas[: t + 1]).sum(0),
                "initialisation_sum": torch.stack(initials[: t + 1]).sum(0),
                "travelled": stars[t + 1] - stars[0],
            }.items():
                found.setdefault(name, []).append(vector.norm().item())
        return found


@pytest.fixture
def problem(buffer: cddlib.Buffer, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A problem with soft labels, mini-batches, augmentation and long steps, unless told otherwise."""
    usual = {**quick, "labels": "learned", "student_batch": 4, "step_size": 0.3}
    return lambda **overrides: Problem(buffer, monkeypatch, **{**usual, **overrides})


def check(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert set(found) == {*wanted, "identity"}
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-9, abs=1e-12), name
    assert max(found["identity"]) < 1e-5


@pytest.mark.parametrize("expert", [0, 1])
@pytest.mark.parametrize("expert_epochs", [1, 2, 3])
def test_accumulated_error_is_ftd_s(problem: Any, expert: int, expert_epochs: int) -> None:
    plain = problem(augment="none", student_batch=None, expert_epochs=expert_epochs)
    found = plain.found(expert)
    assert found["epoch"] == list(range(expert_epochs, 7, expert_epochs))
    check(found, plain.ftd([None] * (6 // expert_epochs), expert))
    assert min(found["initialisation"][1:]) > 1e-3


def test_both_students_of_a_segment_see_the_same_batches(problem: Any) -> None:
    usual = problem()
    found = usual.found()
    firsts, seconds = usual.plans[::2], usual.plans[1::2]

    def draws(plan: Any) -> list[Any]:
        return [(step.indices.tolist(), step.draw.change, step.draw.numbers.tolist()) for step in plan]

    assert list(map(draws, firsts)) == list(map(draws, seconds))
    assert len({str(draws(plan)) for plan in firsts}) == 3
    check(found, usual.ftd(firsts))


def test_the_first_segment_starts_without_an_error(problem: Any) -> None:
    found = problem().found()
    assert found["initialisation"][0] == found["initialisation_sum"][0] == 0
    assert found["error"][0] == pytest.approx(found["matching"][0], rel=1e-12)
    assert found["matching_sum"][0] == found["matching"][0]
    assert min(found["initialisation"][1:]) > 0


def test_the_matching_error_is_what_the_loss_sees(problem: Any) -> None:
    usual = problem()
    found = usual.found()
    for t, plan in enumerate(usual.plans[::2]):
        start, end = (usual.buffer.parameters(0, epoch) for epoch in (2 * t, 2 * t + 2))
        synthetic = usual.synthetic
        loss = cddlib.matching_loss(
            usual.buffer.network, start, end, synthetic.images, synthetic.targets(), synthetic.step_size, plan
        )
        assert found["matching"][t] ** 2 / (end - start).norm().item() ** 2 == pytest.approx(loss.item(), rel=1e-9)


def test_the_identity_holds_in_single_precision(problem: Any, buffer: cddlib.Buffer) -> None:
    usual = problem()
    singles = {name: tensor.float() for name, tensor in usual.synthetic.variable_tensors().items()}
    usual.buffer, usual.synthetic = buffer, dataclasses.replace(usual.synthetic, **singles)
    found = usual.found()
    assert max(found["identity"]) < 1e-5
    summed = np.add(found["matching_sum"], found["initialisation_sum"])
    assert (np.array(found["error"]) <= summed * (1 + 1e-5)).all()


def test_a_student_that_stands_still_errs_by_what_the_expert_travelled(problem: Any) -> None:
    still = problem()
    still.synthetic = dataclasses.replace(still.synthetic, step_size=torch.tensor(0.0, dtype=torch.double))
    found = still.found()
    origin = still.buffer.parameters(0, 0)
    travelled = [(still.buffer.parameters(0, epoch) - origin).norm().item() for epoch in (2, 4, 6)]
    assert found["travelled"] == found["error"] == found["matching_sum"] == pytest.approx(travelled, rel=1e-12)
    assert found["initialisation"] == found["initialisation_sum"] == [0, 0, 0]


def test_the_accumulated_error_depends_on_the_seed_alone(problem: Any) -> None:
    usual = problem()
    first = usual.found()
    torch.rand(1)
    assert usual.found() == first
    assert usual.found(seed=6)["error"] != first["error"]
    assert usual.found(seed=6)["travelled"] == first["travelled"]


def test_accumulated_error_leaves_the_synthetic_set_alone(problem: Any) -> None:
    usual = problem()
    for variable in usual.synthetic.variables():
        variable.requires_grad_()
    before = usual.synthetic.copy().variables()
    usual.found()
    assert all(map(torch.equal, before, usual.synthetic.variables()))
    assert all(variable.grad is None for variable in usual.synthetic.variables())


def test_epochs_that_fill_no_segment_are_left_out(problem: Any) -> None:
    assert problem(expert_epochs=4, window_end=3, segments=1).found()["epoch"] == [4]
