"""K gradients into one: the weights and the weighted sum."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import cddlib
from cddlib.combine import CombineConfig, weighted_sum, weights


def mean_weights(config: CombineConfig, segments: int, anchor: int) -> list[float]:
    """Weights of the rule mean, which looks at neither inner products nor losses."""
    return weights(config, torch.eye(segments).double(), [1.0] * segments, anchor, cddlib.generator("combine"))


BETAS = st.none() | st.floats(0, 1e6)


@hypothesis.given(balance=BETAS, segments=st.integers(1, 50), data=st.data())
def test_weights_sum_to_one(balance: float | None, segments: int, data: st.DataObject) -> None:
    anchor = data.draw(st.integers(0, segments - 1))
    found = mean_weights(CombineConfig(balance=balance), segments, anchor)
    assert len(found) == segments
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0


@hypothesis.given(balance=st.floats(0, 1e6), segments=st.integers(2, 50), data=st.data())
def test_the_others_share_beta_times_the_anchor(balance: float, segments: int, data: st.DataObject) -> None:
    anchor = data.draw(st.integers(0, segments - 1))
    found = mean_weights(CombineConfig(balance=balance), segments, anchor)
    others = found[:anchor] + found[anchor + 1 :]
    assert len(set(others)) == 1
    assert sum(others) == pytest.approx(balance * found[anchor])


@pytest.mark.parametrize("anchor", [0, 1, 3])
def test_the_known_betas(anchor: int) -> None:
    alone = [float(k == anchor) for k in range(4)]
    assert mean_weights(CombineConfig(balance=0.0), 4, anchor) == alone
    assert mean_weights(CombineConfig(balance=3.0), 4, anchor) == pytest.approx([0.25] * 4)
    assert mean_weights(CombineConfig(balance=None), 4, anchor) == [0.25] * 4
    assert mean_weights(CombineConfig(balance=0.5), 4, anchor)[anchor] == pytest.approx(2 / 3)


@pytest.mark.parametrize("balance", [None, 0.0, 0.3, 10.0])
def test_one_segment_has_all_the_weight(balance: float | None) -> None:
    assert mean_weights(CombineConfig(balance=balance), 1, 0) == [1]


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_weighted_sum_against_a_loop(segments: int) -> None:
    rng = cddlib.generator("combine")
    shapes = [(4, 2, 3), (4, 5), ()]
    gradients = [[torch.randn(shape, generator=rng) for shape in shapes] for _ in range(segments)]
    before = [[gradient.clone() for gradient in segment] for segment in gradients]
    shares = torch.rand(segments, generator=rng).tolist()
    found = weighted_sum(gradients, shares)
    assert len(found) == len(shapes)
    for variable, shape in enumerate(shapes):
        wanted = torch.zeros(shape)
        for k in range(segments):
            wanted += shares[k] * gradients[k][variable]
        torch.testing.assert_close(found[variable], wanted)
    for segment, copies in zip(gradients, before, strict=True):
        assert all(map(torch.equal, segment, copies))


def test_weighted_sum_refuses_a_missing_weight() -> None:
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([[torch.ones(2)], [torch.ones(2)]], [1.0])


@pytest.mark.parametrize("balance", [-0.1, float("inf"), float("nan")])
def test_bad_betas_are_refused(balance: float) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        CombineConfig(balance=balance)
    assert str(refused.value) == f"balance is {balance}; it must be a finite number, 0 or more."
