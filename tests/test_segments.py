"""Which segments are matched: spacing, uniform draws, curricula, and what is refused."""

import itertools
from collections import Counter
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import cddlib
from cddlib.segments import SegmentsConfig, draw_segments, window


@st.composite
def configurations(draw: st.DrawFn) -> SegmentsConfig:
    """Any possible configuration, with or without a curriculum."""
    start = draw(st.integers(0, 10))
    initial = draw(st.none() | st.integers(start + 1, start + 30))
    end = draw(st.integers(initial or start + 1, start + 40))
    return SegmentsConfig(
        segments=draw(st.integers(1, (initial or end) - start)),
        window_start=start,
        window_end=end,
        window_end_initial=initial,
        expansion_iterations=draw(st.integers(1, 50)),
    )


def all_draws(
    config: SegmentsConfig, iteration: int, monkeypatch: pytest.MonkeyPatch
) -> list[cddlib.segments.Segments]:
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


# --- Refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"segments": 0}, "segments is 0; it must be at least 1."),
        ({"expert": -1}, "expert is -1; it must be 0 or more."),
        ({"replay": -1}, "replay is -1; it must be 0 or more."),
        ({"expert_epochs": 0}, "expert_epochs is 0; it must be at least 1."),
        ({"expansion_iterations": 0}, "expansion_iterations is 0; it must be at least 1."),
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


def test_the_last_segment_of_a_buffer_can_be_read(buffer: cddlib.Buffer) -> None:
    config = SegmentsConfig(window_end=5, expert_epochs=2)
    config.check_epochs(buffer.epochs)
    last = config.window_end - 1 + config.expert_epochs
    assert last == buffer.epochs
    assert not torch.equal(buffer.parameters(0, last), buffer.parameters(0, last - 1))
