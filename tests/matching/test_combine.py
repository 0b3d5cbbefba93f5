"""K gradients into one: the weights, by every rule against its published formula, and the weighted sum."""

import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.optimize
import torch

import cddlib
from cddlib.matching.combine import (
    CAGRAD_RADIUS,
    GRADNORM_POWER,
    CombineConfig,
    fixed_weights,
    gramian,
    weighted_sum,
    weights,
)

SHAPES = [(4, 2, 3), (4, 5), ()]
RULES = ("gradnorm", "pcgrad", "cagrad", "upgrad", "mgda", "gem")


def mean_weights(config: CombineConfig, segments: int, anchor: int) -> list[float]:
    """Weights of the rule mean, which looks at neither inner products nor losses."""
    return weights(config, torch.eye(segments).double(), [1.0] * segments, anchor, cddlib.generator("combine"))


@hypothesis.given(balance=st.none() | st.floats(0, 1e6), segments=st.integers(2, 50), data=st.data())
def test_the_others_weigh_beta_times_the_anchor(balance: float | None, segments: int, data: st.DataObject) -> None:
    anchor = data.draw(st.integers(0, segments - 1))
    config = CombineConfig(balance=balance)
    found = mean_weights(config, segments, anchor)
    others = found[:anchor] + found[anchor + 1 :]
    assert len(set(others)) == 1
    assert min(found) >= 0
    assert sum(found) == pytest.approx(1)
    assert sum(others) == pytest.approx((segments - 1 if balance is None else balance) * found[anchor])
    assert fixed_weights(config, segments, anchor) == found
    assert all(fixed_weights(CombineConfig(combine=rule), segments, anchor) is None for rule in RULES)


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_weighted_sum_against_a_loop(segments: int) -> None:
    rng = cddlib.generator("combine")
    gradients = [[torch.randn(shape, generator=rng) for shape in SHAPES] for _ in range(segments)]
    before = [[gradient.clone() for gradient in segment] for segment in gradients]
    used = torch.rand(segments, generator=rng).tolist()
    found = weighted_sum(gradients, used)
    for variable, shape in enumerate(SHAPES):
        wanted = torch.zeros(shape)
        for k in range(segments):
            wanted += used[k] * gradients[k][variable]
        torch.testing.assert_close(found[variable], wanted)
    assert all(all(map(torch.equal, *pair)) for pair in zip(gradients, before, strict=True))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        *(
            ({"balance": value}, f"balance is {value}; it must be a finite number, 0 or more.")
            for value in (-0.1, float("inf"), float("nan"))
        ),
        (
            {"balance": 0.5, "combine": "gem"},
            "balance is 0.5, but combine is 'gem'; balance is part of 'mean'.",
        ),
    ],
)
def test_impossible_balances_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        CombineConfig(**values)
    assert str(refused.value) == sentence


@pytest.mark.parametrize("rule", ["mean", *RULES])
@pytest.mark.parametrize("product", [2.0, 0.0, float("nan")])
def test_one_segment_has_all_the_weight_by_every_rule(rule: str, product: float) -> None:
    config = CombineConfig(combine=rule)
    assert weights(config, torch.tensor([[product]]).double(), [0.5], 0, torch.Generator()) == [1.0]
    assert fixed_weights(config, 1, 0) == [1.0]


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


def near(found: np.ndarray, wanted: np.ndarray, scale: np.ndarray, tolerance: float) -> bool:
    """Whether the two differ by less than the tolerance, relative to the length of `scale`."""
    return bool(np.linalg.norm(found - wanted) < tolerance * np.linalg.norm(scale))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_pcgrad_projects_in_the_order_drawn(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    monkeypatch.setattr(torch, "randperm", lambda _: torch.tensor(order))
    for draw in range(DRAWS):
        vectors = random_vectors(5, draw, conflict=0.3, spread=1)
        wanted = projected(vectors, [order] * 5)
        assert near(rule_weights("pcgrad", vectors) @ vectors, wanted, vectors.mean(axis=0), 1e-9)


def test_pcgrad_draws_every_order_of_the_others() -> None:
    vectors = random_vectors(3, 0, conflict=0.4, spread=1)
    orders = [[order for order in itertools.permutations(range(3)) if order[0] != i] for i in range(3)]
    possible = [projected(vectors, chosen) for chosen in itertools.product(*orders)]
    distinct = {tuple(vector.round(9)) for vector in possible}
    assert len(distinct) == 8  # two orders for each of three
    found = {tuple((rule_weights("pcgrad", vectors, seed=seed) @ vectors).round(9)) for seed in range(80)}
    assert found == distinct


@pytest.mark.parametrize("draw", range(DRAWS))
def test_cagrad_of_two_against_every_angle(draw: int) -> None:
    vectors = random_vectors(2, draw, conflict=0.3, spread=1)
    mean = vectors.mean(axis=0)
    plane, _ = np.linalg.qr(vectors.T)
    angles = np.linspace(0, 2 * np.pi, 100_000)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    steps = mean + CAGRAD_RADIUS * np.linalg.norm(mean) * around  # the best step lies on the border of the ball
    wanted = steps[(steps @ vectors.T).min(axis=1).argmax()]
    assert near(rule_weights("cagrad", vectors) @ vectors, wanted, mean, 1e-3)


@pytest.mark.parametrize("count", [3, 5])
def test_cagrad_is_the_best_of_its_ball_for_the_segment_that_gains_least(count: int) -> None:
    rng = np.random.default_rng(count)
    for draw in range(DRAWS):
        vectors = random_vectors(count, draw, conflict=0.15, spread=1)
        mean = vectors.mean(axis=0)
        radius = CAGRAD_RADIUS * np.linalg.norm(mean)
        found = rule_weights("cagrad", vectors) @ vectors
        assert np.linalg.norm(found - mean) == pytest.approx(radius, rel=1e-3)
        others = rng.standard_normal((2000, count)) @ vectors
        others *= radius / np.linalg.norm(others, axis=1, keepdims=True)
        nearby = found - mean + 0.05 * others
        nearby *= radius / np.linalg.norm(nearby, axis=1, keepdims=True)
        for steps in (mean + others, mean + nearby):
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
            assert near(rule_weights(rule, vectors, anchor=anchor) @ vectors, wanted, scale, 1e-3)


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
        ratios = (losses / losses.mean()) ** GRADNORM_POWER
        assert lengths / lengths.sum() == pytest.approx(ratios / ratios.sum())
        assert found.sum() == pytest.approx(1)
        assert found.min() > 0


# --- What the rules promise -------------------------------------------------------------------------------------


def least_gain(rule: str, vectors: np.ndarray, anchor: int) -> float:
    """Lowest inner product of the step with any gradient, relative to that gradient and the longest that is stepped."""
    found = rule_weights(rule, vectors, anchor=anchor) @ vectors
    longest = np.linalg.norm(vectors[anchor] if rule == "gem" else vectors, axis=-1).max()
    return float((vectors @ found / np.linalg.norm(vectors, axis=1)).min() / longest)


@hypothesis.given(
    count=st.integers(2, 6),
    draw=st.integers(0, 10**6),
    conflict=st.floats(0, 0.4),
    spread=st.floats(0, 3),
    data=st.data(),
)
def test_upgrad_and_gem_hurt_no_segment(
    count: int, draw: int, conflict: float, spread: float, data: st.DataObject
) -> None:
    vectors = random_vectors(count, draw, conflict=conflict, spread=spread)
    anchor = data.draw(st.integers(0, count - 1))
    for rule in ("upgrad", "gem"):
        assert least_gain(rule, vectors, anchor) > -1e-3


@pytest.mark.parametrize("rule", ["mean", "pcgrad", "cagrad", "upgrad", "mgda", "gem"])
@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_opposite_gradients_leave_nothing(rule: str, ratio: float) -> None:
    vector = random_vectors(1, 0)[0]
    vectors = np.stack([vector, -ratio * vector])
    found = rule_weights(rule, vectors) @ vectors
    wanted = vectors.mean(axis=0) if rule in ("mean", "cagrad") else 0 * vector
    if rule == "cagrad":  # the mean cannot help both, so that the shortest allowed step is best
        wanted = (1 - CAGRAD_RADIUS) * wanted
    assert near(found, wanted, vector, 1e-3)


@pytest.mark.parametrize("rule", RULES)
@hypothesis.given(
    count=st.integers(2, 5), draw=st.integers(0, 10**6), conflict=st.floats(0, 0.4), power=st.floats(-6, 6)
)
@hypothesis.settings(max_examples=25)
def test_the_gradients_scale_does_not_matter(rule: str, count: int, draw: int, conflict: float, power: float) -> None:
    vectors = random_vectors(count, draw, conflict=conflict, spread=1)
    found, scaled = (rule_weights(rule, factor * vectors) for factor in (1.0, 10**power))
    assert near(found @ vectors, scaled @ vectors, vectors[0], 1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [2, 5])
def test_identical_gradients_give_their_direction(rule: str, count: int) -> None:
    vector = random_vectors(1, 3)[0]
    found = rule_weights(rule, np.stack([vector] * count)).sum()
    assert found == pytest.approx(1 + CAGRAD_RADIUS if rule == "cagrad" else 1, rel=1e-6)


@pytest.mark.parametrize("rule", ["gradnorm", "cagrad", "upgrad", "mgda", "gem"])
@pytest.mark.parametrize("draw", range(4))
def test_the_order_of_the_segments_does_not_matter(rule: str, draw: int) -> None:
    vectors, losses = random_vectors(4, draw, conflict=0.15, spread=1), [1.0, 0.5, 0.8, 1.2]
    order = [2, 0, 3, 1]
    found = rule_weights(rule, vectors, losses=losses, anchor=3) @ vectors
    permuted = rule_weights(rule, vectors[order], losses=[losses[k] for k in order], anchor=2) @ vectors[order]
    assert near(permuted, found, vectors[0], 1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", [(0, 2), (1, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_products_that_are_not_finite_give_the_mean(rule: str, where: tuple[int, int], value: float) -> None:
    products = torch.eye(3).double()
    products[where] = products[where[::-1]] = value
    assert weights(CombineConfig(combine=rule), products, [1.0] * 3, 1, torch.Generator()) == [1 / 3] * 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("zeros", [1, 3])
def test_a_gradient_of_zero_gives_the_mean(rule: str, zeros: int) -> None:
    vectors = random_vectors(3, 0)
    vectors[:zeros] = 0
    assert rule_weights(rule, vectors).tolist() == [1 / 3] * 3


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
    gradients = [[torch.randn(shape, generator=rng) for shape in SHAPES] for _ in range(segments)]
    found = gramian(gradients, rates)
    assert (found.dtype, found.device.type) == (torch.float64, "cpu")
    for i, j in itertools.product(range(segments), repeat=2):
        pairs = zip(rates, gradients[i], gradients[j], strict=True)
        wanted = sum(rate * (g.double() * h.double()).sum().item() for rate, g, h in pairs)
        assert found[i, j].item() == pytest.approx(wanted, rel=1e-9)


def test_an_inner_product_is_what_a_step_takes_off_the_other_loss() -> None:
    rng = cddlib.generator("first order")
    rates = [0.5, 0.01]
    slopes = [[torch.randn(6, generator=rng).double(), torch.randn((), generator=rng).double()] for _ in range(2)]
    variables = [torch.zeros(6, requires_grad=True), torch.zeros((), requires_grad=True)]
    optimizer = torch.optim.SGD([{"params": [v], "lr": r} for v, r in zip(variables, rates, strict=True)])
    for variable, slope in zip(variables, slopes[0], strict=True):
        variable.grad = slope.float()
    optimizer.step()  # along the first gradient
    taken_off = -sum(float((v.detach().double() * h).sum()) for v, h in zip(variables, slopes[1], strict=True))
    assert gramian(slopes, rates)[0, 1].item() == pytest.approx(taken_off, rel=1e-5)
