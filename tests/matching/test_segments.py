"""Which segments are matched: spacing, uniform draws, curricula, subsets, real epochs, and what is refused."""

import dataclasses
import itertools
from collections import Counter
from unittest.mock import Mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from works import refusal

from cddlib.matching.segments import Segments, SegmentsConfig, active_subset, draw_segments, window


@st.composite
def configurations(draw: st.DrawFn) -> SegmentsConfig:
    """Any possible configuration: with a curriculum, with subsets, or with neither."""
    start = draw(st.integers(0, 10))
    subsets = draw(st.just(1) | st.integers(1, 7))
    initial = draw(st.none() | st.integers(start + 1, start + 30)) if subsets == 1 else None
    end = draw(st.integers(initial or start + subsets, start + 40))
    return SegmentsConfig(
        iterations=draw(st.integers(1, 70)),
        subsets=subsets,
        segments=draw(st.integers(1, ((initial or end) - start) // subsets)),
        window_start=start,
        window_end=end,
        window_end_initial=initial,
        expansion_iterations=draw(st.integers(1, 50)),
    )


def all_draws(config: SegmentsConfig, iteration: int, fraction: float = 0.0) -> list[Segments]:
    """What comes of every value that the generator can return, all equally likely; of real ones at that fraction."""
    lower, upper = window(config, iteration)
    draws = []
    for value in range(upper - lower):
        randint = Mock(return_value=torch.tensor(value))
        rand = Mock(return_value=torch.tensor((value + fraction) / (upper - lower), dtype=torch.float64))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", randint)
            patch.setattr(torch, "rand", rand)
            draws.append(draw_segments(config, iteration, torch.Generator()))
        assert rand.called if config.convex else randint.call_args.args == (upper - lower, ())
    return draws


@hypothesis.given(config=configurations(), iteration=st.integers(0, 60))
def test_every_draw_is_spaced_inside_the_window(config: SegmentsConfig, iteration: int) -> None:
    lower, upper = window(config, iteration)
    draws = all_draws(config, iteration)
    for starts, anchor in draws:
        assert len(starts) == len(set(starts)) == config.segments
        assert lower <= min(starts) <= max(starts) < upper
        assert {b - a for a, b in itertools.pairwise(starts)} <= {(upper - lower) // config.segments}
        assert 0 <= anchor < config.segments
    anchors = sorted(starts[anchor] for starts, anchor in draws)
    assert anchors == list(range(lower, upper))  # MTT's uniform draw, exactly; so every epoch can be drawn


def test_the_spacing_by_hand() -> None:
    config = SegmentsConfig(segments=3, window_start=2, window_end=10)  # R = floor(8 / 3) = 2
    found = [(starts[0], starts[-1], anchor) for starts, anchor in all_draws(config, 0)]
    assert found == [(2, 6, 0), (3, 7, 0), (2, 6, 1), (3, 7, 1), (2, 6, 2), (3, 7, 2), (4, 8, 2), (5, 9, 2)]


def test_the_curriculum_by_hand() -> None:
    config = SegmentsConfig(window_start=1, window_end=20, window_end_initial=10, expansion_iterations=100)
    ends = [window(config, iteration) for iteration in (0, 9, 10, 99, 100, 10**6)]
    assert ends == [(1, 10), (1, 10), (1, 11), (1, 19), (1, 20), (1, 20)]


@hypothesis.given(config=configurations())
def test_subsets_take_equal_turns_and_parts(config: SegmentsConfig) -> None:
    turns = [active_subset(config, iteration) for iteration in range(config.iterations)]
    assert turns == sorted(turns)
    assert set(turns) <= set(range(config.subsets))
    counts = Counter(turns)
    assert max(counts.values()) - min(counts[subset] for subset in range(config.subsets)) <= 1
    if config.subsets > 1 and config.iterations >= config.subsets:
        parts = sorted({window(config, iteration) for iteration in range(config.iterations)})
        assert len(parts) == config.subsets
        assert [lower for lower, _ in parts] == [config.window_start, *(upper for _, upper in parts[:-1])]
        assert parts[-1][1] == config.window_end
        lengths = [upper - lower for lower, upper in parts]
        assert max(lengths) - min(lengths) <= 1
        assert [window(config, iteration) for iteration in range(config.iterations)] == [parts[turn] for turn in turns]


@hypothesis.given(config=configurations(), iteration=st.integers(0, 80), fraction=st.floats(0.01, 0.99))
def test_real_start_epochs_lie_between_whole_ones(config: SegmentsConfig, iteration: int, fraction: float) -> None:
    found = all_draws(dataclasses.replace(config, convex=True), iteration, fraction)
    for (starts, anchor), whole in zip(found, all_draws(config, iteration), strict=True):
        assert all(isinstance(start, float) for start in starts)
        assert (starts, anchor) == (pytest.approx([start + fraction for start in whole.starts]), whole.anchor)


FEW = "has only {} start epochs{}; use at most {}."


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"subsets": 2, "window_end_initial": 10},
            "subsets is 2 and window_end_initial is 10; a window is either cut into parts or grows.",
        ),
        (
            {"segments": 6, "subsets": 4},
            f"segments is 6, but the window [0, 20) {FEW.format(5, ' for each of 4 subsets', 5)}",
        ),
        (
            {"segments": 4, "window_start": 1, "window_end_initial": 4},
            f"segments is 4, but the window [1, 4) {FEW.format(3, '', 3)}",
        ),
        ({"window_start": 20}, "window_start is 20; it must be at least 0 and below 20."),
        ({"window_start": -1}, "window_start is -1; it must be at least 0 and below 20."),
        ({"window_start": 2, "window_end_initial": 2}, "window_end_initial is 2; it must be above 2 and at most 20."),
        ({"window_start": 2, "window_end_initial": 21}, "window_end_initial is 21; it must be above 2 and at most 20."),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, int], sentence: str) -> None:
    assert refusal(SegmentsConfig, window_end=20, **values) == sentence


@pytest.mark.parametrize(("convex", "epochs"), [(False, 6), (True, 7)])
def test_segments_end_inside_the_trajectory(convex: bool, epochs: int) -> None:
    """The last segment goes from epoch 3 to 6; a convexified one may start just before epoch 4."""
    config = SegmentsConfig(window_end=4, expert_epochs=3, convex=convex)
    config.check_epochs(epochs)
    assert refusal(config.check_epochs, epochs - 1) == (
        f"window_end is 4 and expert_epochs is 3, but the experts stop at epoch {epochs - 1}; "
        f"window_end may be at most 3."
    )
