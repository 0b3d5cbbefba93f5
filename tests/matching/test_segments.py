"""Which segments are matched: spacing, uniform draws, curricula, subsets, real epochs, and what is refused."""

import itertools
from collections import Counter
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import cddlib
from cddlib.matching.segments import SegmentsConfig, active_subset, draw_segments, window


@st.composite
def configurations(draw: st.DrawFn, **fixed: Any) -> SegmentsConfig:
    """Any possible configuration: with a curriculum, with subsets, or with neither."""
    start = draw(st.integers(0, 10))
    subsets = draw(st.just(1) | st.integers(1, 7))
    initial = draw(st.none() | st.integers(start + 1, start + 30)) if subsets == 1 else None
    end = draw(st.integers(initial or start + subsets, start + 40))
    return SegmentsConfig(
        **fixed,
        iterations=draw(st.integers(1, 70)),
        subsets=subsets,
        segments=draw(st.integers(1, ((initial or end) - start) // subsets)),
        window_start=start,
        window_end=end,
        window_end_initial=initial,
        expansion_iterations=draw(st.integers(1, 50)),
    )


def all_draws(
    config: SegmentsConfig, iteration: int, monkeypatch: pytest.MonkeyPatch
) -> list[cddlib.matching.segments.Segments]:
    """What comes of every value that the generator can return; they are equally likely."""
    lower, upper = window(config, iteration)
    found = []
    for value in range(upper - lower):

        def randint(
            high: int, size: tuple[int, ...], *, generator: torch.Generator, value: int = value
        ) -> torch.Tensor:
            assert (high, size) == (upper - lower, ())
            return torch.tensor(value)

        monkeypatch.setattr(torch, "randint", randint)
        found.append(draw_segments(config, iteration, torch.Generator()))
    monkeypatch.undo()
    return found


@hypothesis.given(config=configurations(), iteration=st.integers(0, 60))
def test_every_draw_is_spaced_inside_the_window(config: SegmentsConfig, iteration: int) -> None:
    lower, upper = window(config, iteration)
    with pytest.MonkeyPatch.context() as patch:
        draws = all_draws(config, iteration, patch)
    for starts, anchor in draws:
        assert len(starts) == len(set(starts)) == config.segments
        assert lower <= min(starts) <= max(starts) < upper
        assert {b - a for a, b in itertools.pairwise(starts)} <= {(upper - lower) // config.segments}
        assert 0 <= anchor < config.segments
    anchors = sorted(starts[anchor] for starts, anchor in draws)
    assert anchors == list(range(lower, upper))  # MTT's uniform draw, exactly; so every epoch can be drawn


def test_the_spacing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SegmentsConfig(segments=3, window_start=2, window_end=10)  # R = floor(8 / 3) = 2
    assert [(*starts, anchor) for starts, anchor in all_draws(config, 0, monkeypatch)] == [
        (2, 4, 6, 0),
        (3, 5, 7, 0),
        (2, 4, 6, 1),
        (3, 5, 7, 1),
        (2, 4, 6, 2),
        (3, 5, 7, 2),
        (4, 6, 8, 2),
        (5, 7, 9, 2),
    ]


@pytest.mark.parametrize("segments", [1, 4])
def test_the_generator_draws_anchors_uniformly(segments: int) -> None:
    config = SegmentsConfig(segments=segments, window_start=3, window_end=13)
    rng = cddlib.generator("anchors")
    counts: Counter[int] = Counter()
    for _ in range(2000):
        starts, anchor = draw_segments(config, 0, rng)
        counts[starts[anchor]] += 1
    assert sorted(counts) == list(range(3, 13))
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9  # chi-square, 9 degrees, p = 0.001


def test_the_draw_depends_on_the_generator_alone() -> None:
    config = SegmentsConfig(segments=3, window_end=40)

    def draws(seed: int) -> list[Any]:
        rng = torch.Generator().manual_seed(seed)
        return [draw_segments(config, 0, rng) for _ in range(10)]

    assert draws(0) == draws(0) != draws(1)


# --- Curriculum -------------------------------------------------------------------------------------------------


@hypothesis.given(config=configurations(), iteration=st.integers(0, 60))
def test_the_window_grows_as_datm_s(config: SegmentsConfig, iteration: int) -> None:
    hypothesis.assume(config.subsets == 1)
    initial = config.window_end if config.window_end_initial is None else config.window_end_initial
    grown = initial + ((config.window_end - initial) * iteration) // config.expansion_iterations
    assert window(config, iteration) == (config.window_start, min(config.window_end, grown))


def test_the_curriculum_by_hand() -> None:
    config = SegmentsConfig(window_start=1, window_end=20, window_end_initial=10, expansion_iterations=100)
    assert [window(config, it) for it in (0, 9, 10, 99, 100, 10**6)] == [
        (1, 10),
        (1, 10),
        (1, 11),
        (1, 19),
        (1, 20),
        (1, 20),
    ]


# --- Subsets ----------------------------------------------------------------------------------------------------


def test_subsets_by_hand() -> None:
    config = SegmentsConfig(subsets=3, iterations=7, window_start=1, window_end=12)
    assert [active_subset(config, iteration) for iteration in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [window(config, iteration) for iteration in (0, 2, 3, 4, 5, 6)] == [(1, 4)] * 2 + [(4, 8)] * 2 + [
        (8, 12)
    ] * 2
    assert (active_subset(config, 7), window(config, 7)) == (2, (8, 12))  # measured after the last
    assert active_subset(SegmentsConfig(iterations=2), 1) == 0


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


# --- Real start epochs ------------------------------------------------------------------------------------------


@hypothesis.given(config=configurations(convex=True), iteration=st.integers(0, 80), share=st.floats(0, 1 - 1e-9))
def test_real_start_epochs_are_spaced_inside_the_window(config: SegmentsConfig, iteration: int, share: float) -> None:
    def rand(size: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        assert (size, dtype) == ((), torch.float64)
        return torch.tensor(share, dtype=dtype)

    lower, upper = window(config, iteration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        starts, anchor = draw_segments(config, iteration, torch.Generator())
    assert all(isinstance(start, float) for start in starts)
    assert len(starts) == config.segments
    assert lower <= starts[0]
    assert starts[-1] < upper
    spacing = (upper - lower) // config.segments
    assert [b - a for a, b in itertools.pairwise(starts)] == pytest.approx([spacing] * (len(starts) - 1))
    assert starts[anchor] == pytest.approx(lower + share * (upper - lower))


@pytest.mark.parametrize("segments", [1, 4])
def test_real_anchors_are_uniform(segments: int) -> None:
    config = SegmentsConfig(segments=segments, window_start=3, window_end=13, convex=True)
    rng = cddlib.generator("real anchors")
    anchors = []
    for _ in range(2000):
        starts, anchor = draw_segments(config, 0, rng)
        anchors.append(starts[anchor])
    assert len(set(anchors)) == 2000
    for bins in ([int(anchor) - 3 for anchor in anchors], [int(10 * (anchor % 1)) for anchor in anchors]):
        counts = Counter(bins)
        assert sorted(counts) == list(range(10))
        assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 27.9  # as above


# --- Refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"segments": 0}, "segments is 0; it must be at least 1."),
        ({"expert": -1}, "expert is -1; it must be 0 or more."),
        ({"replay": -1}, "replay is -1; it must be 0 or more."),
        ({"expert_epochs": 0}, "expert_epochs is 0; it must be at least 1."),
        ({"expansion_iterations": 0}, "expansion_iterations is 0; it must be at least 1."),
        ({"iterations": 0}, "iterations is 0; it must be at least 1."),
        ({"subsets": 0}, "subsets is 0; it must be at least 1."),
        (
            {"subsets": 2, "window_end_initial": 10},
            "subsets is 2 and window_end_initial is 10; a window is either cut into parts or grows.",
        ),
        (
            {"segments": 6, "subsets": 4, "window_end": 20},
            "segments is 6, but the window [0, 20) has only 5 start epochs for each of 4 subsets; use at most 5.",
        ),
        (
            {"segments": 7, "subsets": 3, "window_end": 20},
            "segments is 7, but the window [0, 20) has only 6 start epochs for each of 3 subsets; use at most 6.",
        ),
        (
            {"window_start": 20, "window_end": 20},
            "the window [20, 20) is empty or starts before epoch 0; "
            "window_start must be 0 or more and below window_end.",
        ),
        (
            {"window_start": -1, "window_end": 20},
            "the window [-1, 20) is empty or starts before epoch 0; "
            "window_start must be 0 or more and below window_end.",
        ),
        (
            {"segments": 21, "window_end": 20},
            "segments is 21, but the window [0, 20) has only 20 start epochs; use at most 20.",
        ),
        (
            {"segments": 4, "window_start": 1, "window_end": 20, "window_end_initial": 4},
            "segments is 4, but the window [1, 4) has only 3 start epochs; use at most 3.",
        ),
        (
            {"window_start": 2, "window_end": 20, "window_end_initial": 2},
            "window_end_initial is 2; it must lie above window_start (2) and not above window_end (20).",
        ),
        (
            {"window_end": 20, "window_end_initial": 21},
            "window_end_initial is 21; it must lie above window_start (0) and not above window_end (20).",
        ),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        SegmentsConfig(**values)
    assert str(refused.value) == sentence


def test_more_subsets_than_start_epochs_are_refused() -> None:
    with pytest.raises(cddlib.UserError) as refused:
        SegmentsConfig(subsets=21, window_end=20)
    assert str(refused.value) == "subsets is 21, but the window [0, 20) has only 20 start epochs; use at most 20."


def test_expert_and_replay_change_no_segment() -> None:
    plain = SegmentsConfig(segments=3)
    assert (plain.expert, plain.replay) == (None, 0)
    for values in ({"expert": 0}, {"expert": 7}, {"replay": 1}):
        changed = SegmentsConfig(segments=3, **values)
        for iteration in range(5):
            found, wanted = (draw_segments(c, iteration, cddlib.generator(iteration)) for c in (changed, plain))
            assert found == wanted


def test_segments_end_inside_the_trajectory() -> None:
    config = SegmentsConfig(window_end=4, expert_epochs=3)
    config.check_epochs(6)  # the last segment goes from epoch 3 to epoch 6
    with pytest.raises(cddlib.UserError) as refused:
        config.check_epochs(5)
    assert str(refused.value) == (
        "segments start before epoch 4 and are 3 epochs long, but the experts stop at epoch 5; "
        "window_end + expert_epochs may be at most 6."
    )


def test_real_segments_end_inside_the_trajectory() -> None:
    """The last may start just before epoch 4, and so end just before epoch 7."""
    config = SegmentsConfig(window_end=4, expert_epochs=3, convex=True)
    config.check_epochs(7)
    with pytest.raises(cddlib.UserError) as refused:
        config.check_epochs(6)
    assert str(refused.value) == (
        "segments start before epoch 4 and are 3 epochs long, but the experts stop at epoch 6; "
        "window_end + expert_epochs may be at most 6."
    )


def test_the_last_segment_of_a_buffer_can_be_read(buffer: cddlib.Buffer) -> None:
    config = SegmentsConfig(window_end=5, expert_epochs=2)
    config.check_epochs(buffer.epochs)
    last = config.window_end - 1 + config.expert_epochs
    assert last == buffer.epochs
    assert not torch.equal(buffer.parameters(0, last), buffer.parameters(0, last - 1))
