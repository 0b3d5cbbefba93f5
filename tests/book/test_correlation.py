"""How matching one segment changes the others: measures and tests against loops and libraries."""

import itertools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from cddbook import correlation


def small_integers(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Arrays whose sums are exact, so that a constant curve is constant."""
    return hnp.arrays(np.float64, shape, elements=st.integers(-9, 9).map(float))


@pytest.mark.parametrize(("constant", "times"), [(0.1, 3), (0.7, 6), (0.9, 7)])  # whose mean is rounded
def test_pearson_of_a_constant_curve_is_nan_whatever_the_constant(constant: float, times: int) -> None:
    losses = np.stack([np.array([[t**2, constant] for t in range(times)])] * 2)
    assert np.isnan(correlation.pearson(losses)[0, 1])


@hypothesis.given(losses=small_integers(3, 5, 3))
def test_pearson_against_corrcoef(losses: np.ndarray) -> None:
    found = correlation.pearson(losses)
    for i, j in itertools.product(range(3), repeat=2):
        own, other = losses[i, :, i], losses[i, :, j]
        if len(set(own)) == 1 or len(set(other)) == 1:
            assert math.isnan(found[i, j])
        else:
            assert found[i, j] == pytest.approx(np.corrcoef(own, other)[0, 1], abs=1e-12)


@hypothesis.given(vectors=small_integers(6, 4))
def test_cosines_between_draws_against_loops(vectors: np.ndarray) -> None:
    hypothesis.assume(all(vector.any() for vector in vectors))
    across = correlation.between_draws(vectors @ vectors.T)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i, j in itertools.product(range(3), repeat=2):
        assert across[i, j] == pytest.approx((units[i] @ units[3 + j] + units[j] @ units[3 + i]) / 2, abs=1e-12)


def test_predicted_transfer_by_hand() -> None:
    images = [[4.0, -1.0, 9, 9], [-1.0, 2.0, 9, 9], [9, 9, 9, 9], [9, 9, 9, 9]]
    step_size = [[3.0, 5.0, 7, 7], [5.0, 1.0, 7, 7], [7, 7, 7, 7], [7, 7, 7, 7]]
    geometry = {"losses": [2.0, 0.5], "products": {"images": images, "step_size": step_size}}
    found = correlation.predicted_transfer(geometry, {"step_size": 0.01, "images": 0.1})
    np.testing.assert_allclose(found, [[0.43 / 2, -0.05 / 0.5], [-0.05 / 2, 0.21 / 0.5]])


def test_negative_shares_are_of_the_pairs_below_then_of_those_above_the_diagonal() -> None:
    late_hurts_early = np.array([[-1.0, 1, 1], [-1, -1, 1], [-1, -1, -1]])
    mixed = np.array([[1.0, -1, 0], [0, 1, 0], [-1, 2, 1]])
    matrices, lower = np.stack([late_hurts_early, late_hurts_early.T, mixed]), np.tri(3, k=-1, dtype=bool)
    below, above = correlation.negative_shares(matrices, lower)
    assert below == pytest.approx([1, 0, 1 / 3]) and above == pytest.approx([0, 1, 1 / 3])
    lower[2, 0] = False
    below, above = correlation.negative_shares(matrices, lower)
    assert below == pytest.approx([1, 0, 0]) and above == pytest.approx([0, 1, 1 / 2])
    assert correlation.off_diagonal(mixed).tolist() == [-1, 0, 0, 0, -1, 2]


@hypothesis.given(st.sampled_from([2, 6]).flatmap(lambda n: st.lists(st.integers(0, 20), min_size=n, max_size=n)))
def test_holm_is_the_closed_test_of_bonferroni_s(twentieths: list[int]) -> None:
    """A hypothesis falls where every set of hypotheses that it belongs to falls by Bonferroni's test."""
    p_values, count = [i / 20 for i in twentieths], len(twentieths)
    matrix = correlation.holm(p_values)
    assert (np.diagonal(matrix) == 1).all()
    found = correlation.off_diagonal(matrix)
    for i in range(count):
        worst = 0.0
        for size in range(1, count + 1):
            for members in itertools.combinations(range(count), size):
                if i in members:
                    worst = max(worst, min(1.0, size * min(p_values[m] for m in members)))
        assert found[i] == pytest.approx(worst)
