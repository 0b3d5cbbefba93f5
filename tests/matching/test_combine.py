"""K gradients into one: the weights, by every rule against its published formula."""

import itertools
import math
import typing
from collections.abc import Sequence

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import torch

import cddlib
from cddlib.matching import combine
from cddlib.matching.combine import CAGRAD_RADIUS, Combine, CombineConfig, fixed_weights, gramian, weights

RULES = typing.get_args(Combine)[1:]


@hypothesis.given(balance=st.none() | st.floats(0, 1e6), segments=st.integers(2, 50), data=st.data())
def test_the_others_weigh_beta_times_the_anchor(balance: float | None, segments: int, data: st.DataObject) -> None:
    anchor = data.draw(st.integers(0, segments - 1))
    config = CombineConfig(balance=balance)
    found = fixed_weights(config, segments, anchor)
    assert found is not None
    others = found[:anchor] + found[anchor + 1 :]
    assert len(set(others)) == 1
    assert min(found) >= 0
    assert sum(found) == pytest.approx(1)
    assert sum(others) == pytest.approx((segments - 1 if balance is None else balance) * found[anchor])
    assert all(fixed_weights(CombineConfig(combine=rule), segments, anchor) is None for rule in RULES)
    assert all(fixed_weights(CombineConfig(combine=rule), 1, 0) == [1.0] for rule in ("mean", *RULES))


def test_a_balance_of_another_rule_is_refused() -> None:
    with pytest.raises(cddlib.UserError, match=r"^balance is 0\.5, but combine is 'gem'; balance is part of 'mean'\.$"):
        CombineConfig(balance=0.5, combine="gem")


# --- The rules --------------------------------------------------------------------------------------------------

DRAWS = 12


def random_vectors(
    count: int, draw: int, *, dimensions: int = 12, conflict: float = 0.0, spread: float = 0.0
) -> np.ndarray:
    """Gradients as rows. `conflict` takes a share of their sum from each; lengths are 10 to the ± spread / 2."""
    rng = np.random.default_rng([count, draw])
    found = rng.standard_normal((count, dimensions))
    found -= conflict * found.sum(axis=0)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found * 10 ** (spread * (rng.random((count, 1)) - 0.5))


def rule_weights(
    rule: str, vectors: np.ndarray, *, losses: list[float] | None = None, anchor: int = 0, seed: int = 0
) -> np.ndarray:
    """Weights of a rule for these gradients."""
    products = gramian([[torch.from_numpy(vector)] for vector in vectors], [1.0])
    losses = [1.0] * len(vectors) if losses is None else losses
    found = weights(CombineConfig(combine=rule), products, losses, anchor, cddlib.generator("pcgrad", seed))
    assert all(type(weight) is float for weight in found)
    return np.array(found)


def onto_the_dual_cone(vectors: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The vector nearest to `target` whose inner product with no gradient is negative: target + Jᵀλ, λ ≥ 0."""
    multipliers, _ = scipy.optimize.nnls(vectors.T, -target)
    return target + vectors.T @ multipliers


def shortest_in_the_hull(vectors: np.ndarray) -> np.ndarray:
    """Shortest convex combination: non-negative least squares with a heavy row for the sum of 1."""
    heavy = 1e4 * np.linalg.norm(vectors, axis=1).max()
    rows = np.vstack([vectors.T, np.full(len(vectors), heavy)])
    shares, _ = scipy.optimize.nnls(rows, np.append(np.zeros(vectors.shape[1]), heavy))
    return shares / shares.sum() @ vectors


def projected(vectors: np.ndarray, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """Algorithm 1 of PCGrad on the vectors themselves; `orders[i]` is the order in which i meets the others."""
    total = np.zeros(vectors.shape[1])
    for i, order in enumerate(orders):
        changed = vectors[i].copy()
        for j in order:
            if j != i and changed @ vectors[j] < 0:
                changed = changed - changed @ vectors[j] / (vectors[j] @ vectors[j]) * vectors[j]
        total += changed
    return total / len(vectors)


def test_pcgrad_draws_every_order_of_the_others() -> None:
    vectors = random_vectors(3, 0, conflict=0.4, spread=1)
    orders = [[order for order in itertools.permutations(range(3)) if order[0] != i] for i in range(3)]
    possible = [projected(vectors, chosen) for chosen in itertools.product(*orders)]
    distinct = {tuple(vector.round(9)) for vector in possible}
    assert len(distinct) == 8  # two orders for each of three
    found = {tuple((rule_weights("pcgrad", vectors, seed=seed) @ vectors).round(9)) for seed in range(80)}
    assert found == distinct


@pytest.mark.parametrize("count", [2, 3, 5])
def test_cagrad_is_the_best_of_its_ball_for_the_segment_that_gains_least(count: int) -> None:
    rng = np.random.default_rng(count)
    for draw in range(DRAWS):
        vectors = random_vectors(count, draw, conflict=0.15, spread=1)
        mean = vectors.mean(axis=0)
        found = rule_weights("cagrad", vectors) @ vectors
        radius = CAGRAD_RADIUS * np.linalg.norm(mean)
        assert np.linalg.norm(found - mean) == pytest.approx(radius, rel=1e-3)
        distances = rng.exponential(0.3, (2000, 1))  # near and far
        others = (found - mean) / radius + distances * rng.standard_normal((2000, count)) @ vectors
        steps = mean + radius * others / np.linalg.norm(others, axis=1, keepdims=True)
        assert (vectors @ found).min() >= (steps @ vectors.T).min(axis=1).max() - 1e-3 * radius


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("conflict", [0.0, 0.3])
def test_upgrad_and_gem_project_onto_the_dual_cone(count: int, conflict: float) -> None:
    for draw in range(DRAWS):
        vectors, anchor = random_vectors(count, draw, conflict=conflict, spread=2), draw % count
        projections = [onto_the_dual_cone(vectors, vector) for vector in vectors]
        for rule, wanted, scale in (
            ("upgrad", np.mean(projections, axis=0), vectors.mean(axis=0)),
            ("gem", projections[anchor], vectors[anchor]),
        ):
            found = rule_weights(rule, vectors, anchor=anchor) @ vectors
            assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(scale)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_mgda_is_about_the_shortest_convex_combination(count: int) -> None:
    for draw in range(DRAWS):
        vectors = random_vectors(count, draw, conflict=0.15)
        found = rule_weights("mgda", vectors)
        assert found.min() >= 0
        assert found.sum() == pytest.approx(1)
        assert np.linalg.norm(found @ vectors) < 1.05 * np.linalg.norm(shortest_in_the_hull(vectors))


@pytest.mark.parametrize("count", [2, 5])
def test_gradnorms_lengths_follow_the_losses(count: int) -> None:
    for draw in range(DRAWS):
        vectors = random_vectors(count, draw, spread=4)
        losses = np.random.default_rng(draw).uniform(0.1, 3, count)
        found = rule_weights("gradnorm", vectors, losses=losses.tolist())
        lengths = np.linalg.norm(found[:, None] * vectors, axis=1)
        ratios = (losses / losses.mean()) ** combine.GRADNORM_POWER
        assert lengths / lengths.sum() == pytest.approx(ratios / ratios.sum())
        assert found.sum() == pytest.approx(1)
        assert found.min() > 0


# --- What the rules promise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@hypothesis.given(
    count=st.integers(2, 5), draw=st.integers(0, 10**6), conflict=st.floats(0, 0.4), power=st.floats(-6, 6)
)
@hypothesis.settings(max_examples=25)
def test_the_gradients_scale_does_not_matter(rule: str, count: int, draw: int, conflict: float, power: float) -> None:
    vectors = random_vectors(count, draw, conflict=conflict, spread=1)
    found, scaled = (rule_weights(rule, factor * vectors) for factor in (1.0, 10**power))
    assert np.linalg.norm((found - scaled) @ vectors) < 1e-4 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [2, 5])
def test_identical_gradients_give_their_direction(rule: str, count: int) -> None:
    vector = random_vectors(1, 3)[0]
    found = rule_weights(rule, np.stack([vector] * count)).sum()
    assert found == pytest.approx(1 + CAGRAD_RADIUS if rule == "cagrad" else 1, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("where", "value"), [((0, 2), math.nan), ((0, 2), math.inf), ((1, 1), -math.inf), ((1, 1), 0)])
def test_products_that_are_not_finite_and_a_gradient_of_zero_give_the_mean(
    rule: str, where: tuple[int, int], value: float
) -> None:
    products = torch.eye(3).double()
    products[where] = products[where[::-1]] = value
    assert weights(CombineConfig(combine=rule), products, [1.0] * 3, 1, torch.Generator()) == [1 / 3] * 3


@pytest.mark.parametrize("rule", RULES)
def test_global_randomness_is_neither_used_nor_touched(rule: str) -> None:
    vectors = random_vectors(5, 1, conflict=0.3, spread=1)
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            results.append(rule_weights(rule, vectors).tolist())
            assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


# --- Inner products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_gramian_against_a_loop(segments: int) -> None:
    rng, rates = cddlib.generator("gramian", segments), [30.0, 0.0, 1e-5]
    gradients = [[torch.randn(shape, generator=rng) for shape in [(4, 2, 3), (4, 5), ()]] for _ in range(segments)]
    found = gramian(gradients, rates)
    assert (found.dtype, found.device.type) == (torch.float64, "cpu")
    for i, j in itertools.product(range(segments), repeat=2):
        pairs = zip(rates, gradients[i], gradients[j], strict=True)
        wanted = sum(rate * (g.double() * h.double()).sum().item() for rate, g, h in pairs)
        assert found[i, j].item() == pytest.approx(wanted, rel=1e-9)
