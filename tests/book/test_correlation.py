"""How matching one segment changes the others: measures and tests against loops, probes against plain autograd."""

import dataclasses
import itertools
import math
from collections.abc import Callable
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
from cddbook import correlation, probes
from cddbook.probes import ProbeConfig, Probes
from cddlib.data import augment
from cddlib.synthetic import initialise

CPU = torch.device("cpu")
STARTS = (0, 1, 4)


def small_integers(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Arrays whose sums are exact, so that a constant curve is constant."""
    return hnp.arrays(np.float64, shape, elements=st.integers(-9, 9).map(float))


# --- Curves of losses -------------------------------------------------------------------------------------------

UP, DOWN, BUMP, FLAT = ([1.0, 2, 3, 4], [8.0, 6, 4, 2], [0.0, 1, 1, 0], [5.0, 5, 5, 5])


def run_of(*curves: list[float]) -> np.ndarray:
    """One run: times by measured segments."""
    return np.array(curves).T


def test_pearson_of_curves_with_known_correlations() -> None:
    losses = np.stack([run_of(UP, DOWN, BUMP, FLAT)] * 4)
    wanted = [[1, -1, 0, np.nan], [-1, 1, 0, np.nan], [0, 0, 1, np.nan], [np.nan] * 4]
    np.testing.assert_allclose(correlation.pearson(losses), wanted, atol=1e-12)


def test_rows_of_pearson_are_matched_and_columns_measured() -> None:
    losses = np.stack([run_of(UP, DOWN), run_of(UP, UP)])  # matching 0 hurts 1; matching 1 helps 0
    np.testing.assert_allclose(correlation.pearson(losses), [[1, -1], [1, 1]])


def test_changes_remove_a_common_trend() -> None:
    noise = np.array([0.1, -0.2, 0.3, -0.1, 0.2, -0.3])
    trend = 10.0 - np.arange(6)
    losses = np.stack([run_of((trend + noise).tolist(), (trend - noise).tolist())] * 2)
    assert correlation.pearson(losses)[0, 1] > 0.9
    assert correlation.pearson(correlation.changes(losses))[0, 1] == pytest.approx(-1)


def test_changes_are_ranks_of_each_curve_by_itself() -> None:
    losses = np.stack([run_of([9.0, 1, 2, 2, 4], [0.0, 1, 2, 4, 4]), run_of([0.0, 5, 9, 12, 14], [4.0, 3, 3, 3, 3])])
    wanted = [run_of([1.0, 3, 2, 4], [2.5, 2.5, 4, 1]), run_of([4.0, 3, 2, 1], [1.0, 3, 3, 3])]  # equals share a rank
    assert correlation.changes(losses).tolist() == np.stack(wanted).tolist()


def test_a_huge_first_step_does_not_decide_the_correlation_of_changes() -> None:
    own, other = [200.0, 109, 108, 106, 103, 99, 94], [200.0, 118, 113, 109, 106, 104, 103]
    losses = np.stack([run_of(own, other)] * 2)
    assert correlation.pearson(np.diff(losses, axis=1))[0, 1] > 0.99
    assert correlation.pearson(correlation.changes(losses))[0, 1] == pytest.approx(-1 / 7)


@hypothesis.given(losses=small_integers(3, 5, 3), changes=st.booleans())
def test_pearson_against_corrcoef(losses: np.ndarray, changes: bool) -> None:
    def ranks(values: np.ndarray) -> list[float]:
        """One more than how many are smaller, and half of the others that are equal."""
        return [1 + (values < value).sum() + ((values == value).sum() - 1) / 2 for value in values]

    found = correlation.pearson(correlation.changes(losses) if changes else losses)
    for i, j in itertools.product(range(3), repeat=2):
        own, other = losses[i, :, i], losses[i, :, j]
        if changes:
            own, other = ranks(own[1:] - own[:-1]), ranks(other[1:] - other[:-1])
        if len(set(own)) == 1 or len(set(other)) == 1:
            assert math.isnan(found[i, j])
        else:
            assert found[i, j] == pytest.approx(np.corrcoef(own, other)[0, 1], abs=1e-12)


@pytest.mark.parametrize(("constant", "times"), [(0.1, 3), (0.7, 6), (0.9, 7)])
def test_pearson_of_a_constant_curve_is_nan_whatever_the_constant(constant: float, times: int) -> None:
    losses = np.stack([run_of([float(t**2) for t in range(times)], [constant] * times)] * 2)
    assert np.isnan(correlation.pearson(losses)[0, 1])


def test_net_change_by_hand() -> None:
    losses = np.array([[[2.0, 4.0], [9.0, 9.0], [1.0, 5.0]], [[1.0, 8.0], [9.0, 9.0], [3.0, 2.0]]])
    np.testing.assert_allclose(correlation.net_change(losses), [[-0.5, 0.25], [2.0, -0.75]])


def test_a_rise_is_what_was_won_and_lost_again() -> None:
    losses = np.array([[[2.0, 4.0], [0.5, 9.0], [1.0, 5.0]], [[1.0, 8.0], [9.0, 4.0], [3.0, 2.0]]])
    np.testing.assert_allclose(correlation.rise(losses), [[1.0, 0.25], [2.0, 0.0]])


# --- Gradients --------------------------------------------------------------------------------------------------


def inner(*vectors: list[float]) -> np.ndarray:
    return np.array(vectors) @ np.array(vectors).T


def test_opposite_equal_and_orthogonal_gradients() -> None:
    here, opposite, longer, orthogonal = [1.0, 2.0], [-3.0, -6.0], [2.0, 4.0], [2.0, -1.0]
    found = correlation.cosines(inner(here, opposite, longer, orthogonal))
    np.testing.assert_allclose(found[0], [1, -1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(np.diagonal(found), 1)


def test_the_noise_ceiling_is_the_cosine_between_two_students_of_a_segment() -> None:
    def at(degrees: float, length: float) -> list[float]:
        return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]

    products = inner(at(0, 1), at(90, 2), at(60, 3), at(135, 4))  # first students of two segments, then second ones
    found = correlation.between_draws(products)
    assert np.diagonal(found).tolist() == pytest.approx([math.cos(math.radians(60)), math.cos(math.radians(45))])
    across = (math.cos(math.radians(135)) + math.cos(math.radians(30))) / 2
    assert [found[0, 1], found[1, 0]] == pytest.approx([across, across])


@hypothesis.given(vectors=small_integers(6, 4))
def test_cosines_and_their_summaries_against_loops(vectors: np.ndarray) -> None:
    hypothesis.assume(all(vector.any() for vector in vectors))
    products = vectors @ vectors.T
    across, ratios = correlation.between_draws(products), correlation.length_ratios(products)
    cosines = correlation.cosines(products)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for i, j in itertools.product(range(6), repeat=2):
        assert cosines[i, j] == pytest.approx(cosine(vectors[i], vectors[j]), abs=1e-12)
    for i, j in itertools.product(range(3), repeat=2):
        both = cosine(vectors[i], vectors[3 + j]) + cosine(vectors[j], vectors[3 + i])
        assert across[i, j] == pytest.approx(both / 2, abs=1e-12)
        assert ratios[i, j] == pytest.approx(np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j]))


def test_length_ratios_by_hand() -> None:
    products = inner([2.0, 0.0], [0.0, 6.0], [100.0, 0.0], [0.0, 100.0])
    np.testing.assert_allclose(correlation.length_ratios(products), [[1, 1 / 3], [3, 1]])


def test_transfer_by_hand() -> None:
    found = correlation.transfer(np.array([1.0, 2.0]), np.array([[0.5, 3.0], [1.5, 1.0]]))
    np.testing.assert_allclose(found, [[0.5, -0.5], [-0.5, 0.5]])


def test_predicted_transfer_by_hand() -> None:
    images = [[4.0, -1.0, 9, 9], [-1.0, 2.0, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9]]
    step_size = [[3.0, 5.0, 7, 7], [5.0, 1.0, 7, 7], [7, 7, 7, 7], [7, 7, 7, 7]]
    geometry = {"losses": [2.0, 0.5], "products": {"images": images, "step_size": step_size}}
    found = correlation.predicted_transfer(geometry, {"step_size": 0.01, "images": 0.1})
    np.testing.assert_allclose(found, [[0.43 / 2, -0.05 / 0.5], [-0.05 / 2, 0.21 / 0.5]])


# --- Summaries and tests ----------------------------------------------------------------------------------------


def test_off_diagonal_drops_the_diagonal_alone() -> None:
    assert correlation.off_diagonal(np.arange(9.0).reshape(3, 3)).tolist() == [1, 2, 3, 5, 6, 7]


def test_negative_shares_are_of_the_lower_then_of_the_upper_triangle() -> None:
    late_hurts_early = np.array([[-1.0, 1, 1], [-1, -1, 1], [-1, -1, -1]])
    assert correlation.negative_shares(late_hurts_early) == (1.0, 0.0)
    assert correlation.negative_shares(late_hurts_early.T) == (0.0, 1.0)
    one_of_each = np.array([[1.0, -1, 0], [0, 1, 0], [-1, 2, 1]])
    assert correlation.negative_shares(one_of_each) == pytest.approx((1 / 3, 1 / 3))


def curves(slope: float, *, replicates: int = 3, times: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and `slope` times that noise plus other noise."""
    rng = np.random.default_rng(seed)
    first, other = rng.normal(size=(2, replicates, times))
    return first, slope * first + other


def test_permutation_test_is_small_for_negative_correlation_alone() -> None:
    assert correlation.permutation_test(*curves(-1.0), permutations=999) == 1 / 1000
    assert correlation.permutation_test(*curves(1.0), permutations=999) > 0.99


def test_permutation_test_is_uniform_without_correlation() -> None:
    found = np.sort(
        [
            correlation.permutation_test(
                *curves(0.0, replicates=2, times=8, seed=seed), permutations=199, seed=1000 + seed
            )
            for seed in range(400)
        ]
    )
    empirical = np.arange(1, 401) / 400
    assert np.abs(empirical - found).max() < 1.63 / 20  # Kolmogorov-Smirnov at 1 %


def test_permutation_test_depends_on_its_seed_alone() -> None:
    first, second = curves(-0.1)
    found = [correlation.permutation_test(first, second, permutations=99, seed=seed) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_permutation_test_approaches_all_permutations_of_each_replicate() -> None:
    first = np.array([[1.0, 4, 2, 7], [3.0, 0, 1, 5]])
    second = np.array([[100.0, 30, 70, 60], [0.4, 0.1, 0.5, 0.2]])  # of different scale, which must not count
    chance = [
        np.corrcoef(first[0], one)[0, 1] + np.corrcoef(first[1], other)[0, 1]
        for one in itertools.permutations(second[0])
        for other in itertools.permutations(second[1])
    ]
    observed = sum(np.corrcoef(first[r], second[r])[0, 1] for r in range(2))
    exact = np.mean([value <= observed + 1e-9 for value in chance])
    assert 0.02 < exact < 0.5
    assert correlation.permutation_test(first, second) == pytest.approx(exact, abs=0.015)


def test_permutation_test_of_a_constant_curve_says_nothing() -> None:
    assert correlation.permutation_test(np.array([UP]), np.array([FLAT]), permutations=99) == 1


def test_t_test_against_a_table_of_student_s_t() -> None:
    values = np.array([-3.0, -1.0, -2.0, -2.0])  # mean −2, standard deviation √(2/3), so t = −2 / √(1/6) = −4.899
    mirrored = correlation.t_test(-values)
    assert correlation.t_test(values) == pytest.approx(0.00814, abs=1e-5)
    assert mirrored == pytest.approx(1 - 0.00814, abs=1e-5)
    assert correlation.t_test(np.array([-1.0, 1.0])) == pytest.approx(0.5)
    two_values = np.array([-3.0, -1.0])  # t = −2, one degree of freedom: Cauchy's distribution
    assert correlation.t_test(two_values) == pytest.approx(0.5 + math.atan(-2) / math.pi)


def test_t_test_runs_over_the_replicates_of_every_entry() -> None:
    matrices = np.random.default_rng(0).normal(-0.3, 1, size=(5, 2, 3))
    found = correlation.t_test(matrices)
    assert found.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        assert found[i, j] == pytest.approx(float(correlation.t_test(matrices[:, i, j])))


def test_holm_s_textbook_example() -> None:
    found = correlation.holm(np.array([0.01, 0.04, 0.03, 0.005]))  # the example of Wikipedia's article
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])


@hypothesis.given(p_values=st.lists(st.integers(0, 20).map(lambda i: i / 20), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni_s(p_values: list[float]) -> None:
    """A hypothesis falls where every set of hypotheses that it belongs to falls by Bonferroni's test."""
    count = len(p_values)
    found = correlation.holm(np.array(p_values))
    for i in range(count):
        worst = 0.0
        for size in range(1, count + 1):
            for members in itertools.combinations(range(count), size):
                if i in members:
                    worst = max(worst, min(1.0, size * min(p_values[m] for m in members)))
        assert found[i] == pytest.approx(worst)


# --- Probes -----------------------------------------------------------------------------------------------------


class Doubles(cddlib.Buffer):
    """A buffer read as float64."""

    def parameters(self, expert: int, epoch: int) -> Tensor:
        return super().parameters(expert, epoch).double()


class Problem:
    """Probes of a buffer's second expert and a synthetic set, in float64; the students' plans are overheard."""

    def __init__(self, buffer: cddlib.Buffer, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> None:
        self.config = cddlib.distill_recipe("contra", "digits", 1, **overrides)
        self.buffer = Doubles(buffer.folder)
        initial = initialise(self.config, cddlib.load("digits"), buffer, 0, CPU)
        doubles = {name: tensor.double() for name, tensor in initial.variable_tensors().items()}
        self.synthetic = dataclasses.replace(initial, **doubles)
        self.plans: list[Any] = []
        plan_student = cddlib.plan_student

        def overhear(*arguments: Any) -> Any:
            self.plans.append(plan_student(*arguments))
            return self.plans[-1]

        monkeypatch.setattr(probes, "plan_student", overhear)
        self.probes = self.probes_of(STARTS)

    def probes_of(self, starts: tuple[int, ...], expert: int = 1, seed: int = 7) -> Probes:
        return Probes(self.config, self.buffer, starts=starts, expert=expert, seed=seed, device=CPU)

    def unrolled(self, synthetic: cddlib.SyntheticSet, start: int, plan: Any = None) -> Tensor:
        """The second expert's segment's matching loss with the graph of all steps; without a plan, on all images."""
        first, last = (self.buffer.parameters(1, epoch) for epoch in (start, start + self.config.expert_epochs))
        theta = first.clone().requires_grad_()
        everything = torch.arange(len(synthetic.labels))
        for indices, draw in plan or [(everything, None)] * self.config.student_steps:
            logits = self.buffer.network(theta, augment.apply(draw, synthetic.images[indices]))
            loss = F.cross_entropy(logits, synthetic.targets()[indices])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - synthetic.step_size * gradient
        return ((theta - last) ** 2).sum() / ((first - last) ** 2).sum()


@pytest.fixture
def problem(buffer: cddlib.Buffer, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Problem]:
    """A problem with soft labels, mini-batches and augmentation, unless told otherwise."""
    usual = {**quick, "labels": "learned", "student_batch": 4}

    def make(**overrides: Any) -> Problem:
        return Problem(buffer, monkeypatch, **{**usual, **overrides})

    return make


def test_probes_losses_are_matching_losses(problem: Callable[..., Problem]) -> None:
    plain = problem(augment="none", student_batch=None)
    wanted = [plain.unrolled(plain.synthetic, start).item() for start in STARTS]
    assert plain.probes.losses(plain.synthetic) == pytest.approx(wanted, rel=1e-9)


def test_probes_losses_are_those_of_their_students_batches(problem: Callable[..., Problem]) -> None:
    usual = problem()
    found = usual.probes.losses(usual.synthetic)
    assert [len(plan) for plan in usual.plans] == [5, 5, 5]
    assert {len(step.indices) for plan in usual.plans for step in plan} == {4, 2}
    wanted = [usual.unrolled(usual.synthetic, *pair).item() for pair in zip(STARTS, usual.plans, strict=True)]
    assert found == pytest.approx(wanted, rel=1e-9)


def test_probes_losses_depend_on_the_synthetic_set_alone(problem: Callable[..., Problem]) -> None:
    usual = problem()
    first = usual.probes.losses(usual.synthetic)
    torch.rand(1)
    assert usual.probes.losses(usual.synthetic) == first
    assert usual.probes_of((1,)).losses(usual.synthetic) == pytest.approx([first[1]], rel=1e-12)
    moved = usual.synthetic.copy()
    moved.images[0] += 0.1
    assert all(a != b for a, b in zip(usual.probes.losses(moved), first, strict=True))


def test_probes_are_the_same_side_by_side_and_one_by_one(problem: Callable[..., Problem]) -> None:
    rates, found = [30.0, 2.0, 1e-5], []
    for side_by_side in (1, 2, None):
        usual = problem(side_by_side=side_by_side)
        turns = list(usual.probes.in_turns(usual.synthetic))
        assert len(turns) == {1: 3, 2: 2, None: 1}[side_by_side]
        found.append(usual.probes.gradient_similarity(usual.synthetic, rates))
    for other in found[1:]:
        for name in ("losses", "after"):
            np.testing.assert_allclose(other[name], found[0][name], rtol=1e-9)
        for variable, products in other["products"].items():
            wanted = np.array(found[0]["products"][variable])
            np.testing.assert_allclose(products, wanted, rtol=1e-7, atol=1e-9 * np.abs(wanted).max())


def test_other_seeds_draws_and_experts_give_other_probes(problem: Callable[..., Problem]) -> None:
    usual = problem()
    first = usual.probes.losses(usual.synthetic)
    other_draw = [loss for losses, _ in usual.probes.in_turns(usual.synthetic, draw=1) for loss in losses.tolist()]
    for other in (
        other_draw,
        usual.probes_of(STARTS, seed=8).losses(usual.synthetic),
        usual.probes_of(STARTS, expert=0).losses(usual.synthetic),
    ):
        assert all(a != b for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_geometry_leaves_the_synthetic_set_alone(problem: Callable[..., Problem], needs_gradients: bool) -> None:
    usual = problem()
    for variable in usual.synthetic.variables():
        variable.requires_grad_(needs_gradients)
    before = usual.synthetic.copy().variables()
    usual.probes.gradient_similarity(usual.synthetic, [30.0, 2.0, 1e-5])
    assert all(map(torch.equal, before, usual.synthetic.variables()))
    assert all(v.requires_grad == needs_gradients and v.grad is None for v in usual.synthetic.variables())


def test_geometry_s_products_are_those_of_autograd(problem: Callable[..., Problem]) -> None:
    usual = problem()
    found = usual.probes.gradient_similarity(usual.synthetic, [30.0, 2.0, 1e-5])
    plans = usual.plans[:6]  # first students of the three probes, then second ones
    for variable in usual.synthetic.variables():
        variable.requires_grad_()
    gradients = []
    for start, plan in zip(STARTS * 2, plans, strict=True):
        loss = usual.unrolled(usual.synthetic, start, plan)
        gradients.append(torch.autograd.grad(loss, usual.synthetic.variables()))
    assert found["losses"] == pytest.approx(usual.probes.losses(usual.synthetic), rel=1e-9)
    assert list(found["products"]) == ["images", "label_logits", "step_size"]
    for v, products in enumerate(found["products"].values()):
        wanted = [[(a[v] * b[v]).sum().item() for b in gradients] for a in gradients]
        np.testing.assert_allclose(products, wanted, rtol=1e-7, atol=1e-9 * max(map(max, wanted)))


@pytest.mark.parametrize("labels", ["learned", "hard"])
def test_after_is_the_first_real_step_of_sgd(problem: Callable[..., Problem], labels: str) -> None:
    usual = problem(labels=labels, lr_images=20.0, lr_labels=3.0, lr_step_size=1e-3)
    rates = {"images": 20.0, "label_logits": 3.0, "step_size": 1e-3}
    momenta = {"images": 0.5, "label_logits": 0.9, "step_size": 0.5}
    found = usual.probes.gradient_similarity(usual.synthetic, usual.config.rates(usual.synthetic))["after"]
    before = usual.probes.losses(usual.synthetic)
    for probe in range(3):
        stepped = usual.synthetic.copy()
        variables = stepped.variable_tensors()
        groups = [{"params": [v], "lr": rates[name], "momentum": momenta[name]} for name, v in variables.items()]
        optimizer = torch.optim.SGD(groups)
        for variable in stepped.variables():
            variable.requires_grad_()
        usual.unrolled(stepped, STARTS[probe], usual.plans[probe]).backward()
        optimizer.step()
        assert found[probe] == pytest.approx(usual.probes.losses(stepped), rel=1e-10)
        assert found[probe] != pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("alone", ["images", "label_logits", "step_size", None])
def test_small_steps_transfer_as_predicted(problem: Callable[..., Problem], alone: str | None) -> None:
    usual = problem()
    tiny = {"images": 1e-3, "label_logits": 1e-3, "step_size": 1e-9}
    rates = {name: rate if alone in (name, None) else 0.0 for name, rate in tiny.items()}
    geometry = usual.probes.gradient_similarity(usual.synthetic, list(rates.values()))
    found = correlation.transfer(np.array(geometry["losses"]), np.array(geometry["after"]))
    predicted = correlation.predicted_transfer(geometry, rates)
    np.testing.assert_allclose(found, predicted, rtol=1e-3, atol=1e-3 * np.abs(predicted).max())
    if alone is not None:
        cosines = correlation.cosines(np.array(geometry["products"][alone]))[:3, :3]
        clear = np.abs(cosines) > 0.05
        assert clear.sum() > 3
        assert (np.sign(found) == np.sign(cosines))[clear].all()


class Made(cddlib.Buffer):
    """Segments made by hand: from the first parameters one way, then from the same start the other way."""

    back = -1.0

    def parameters(self, expert: int, epoch: int) -> Tensor:
        origin = super().parameters(expert, 0).double()
        way = torch.randn(origin.shape, generator=cddlib.generator("way"), dtype=torch.double)
        return origin + [0.0, 1.0, 0.0, self.back][epoch] * way


@pytest.mark.parametrize(("back", "wanted"), [(-1.0, -1.0), (1.0, 1.0)])
def test_segments_that_lead_opposite_ways_conflict(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch, back: float, wanted: float
) -> None:
    usual = problem(augment="none", student_batch=None, expert_epochs=1)
    usual.buffer = Made(usual.buffer.folder)
    monkeypatch.setattr(Made, "back", back)
    found = usual.probes_of((0, 2)).gradient_similarity(usual.synthetic, [1e-3, 1e-3, 1e-9])
    for products in found["products"].values():
        np.testing.assert_allclose(correlation.cosines(np.array(products))[0, 1], wanted, atol=0.01)
    transfer = correlation.transfer(np.array(found["losses"]), np.array(found["after"]))
    assert np.sign(transfer).tolist() == [[1, wanted], [wanted, 1]]


# --- Configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"probe_starts": (-1, 2)}, "probe_starts is (-1, 2); epochs must be 0 or more, ascending, each once."),
        ({"probe_starts": (2, 1)}, "probe_starts is (2, 1); epochs must be 0 or more, ascending, each once."),
        ({"probe_starts": (1, 1)}, "probe_starts is (1, 1); epochs must be 0 or more, ascending, each once."),
        ({"probe_expert": -1}, "probe_expert is -1; it must be 0 or more."),
        ({"probe_every": 0}, "probe_every is 0; it must be at least 1."),
        ({"similarity_every": -1}, "similarity_every is -1; it must be at least 0."),
        ({"error_every": -1}, "error_every is -1; it must be at least 0."),
        ({"similarity_every": 5}, "similarity_every is 5, but probe_starts names no segments."),
    ],
)
def test_impossible_probes_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        ProbeConfig(**fields)
    assert str(refused.value) == sentence


def test_possible_probes_are_not_refused() -> None:
    assert ProbeConfig(error_every=3).probe_starts == ()
    assert ProbeConfig(probe_starts=(0, 3, 9), probe_expert=0, probe_every=1, similarity_every=1).similarity_every == 1
