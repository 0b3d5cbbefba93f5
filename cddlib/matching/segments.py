"""Which segments of a trajectory one iteration matches: windows, curricula, subsets, K concurrent start epochs.

MTT draws one start epoch uniformly from a window. ConTra matches K of them at once, spaced
R = floor((T+ - T-) / K) apart. The paper's text is not public; the spacing is its Eq. 8 as public reviews report it,
and the rest is our reconstruction: draw one epoch t as MTT does (the *anchor*), let it be the k-th of the K with
k = min(floor((t - T-) / R), K - 1), and take the others R apart on both sides. For K = 1 this is MTT. If K does not
divide the window, its last epochs are matched only when one of them is the anchor.
"""

import dataclasses
from typing import NamedTuple

import torch

from cddlib.runtime.errors import UserError, require
from cddlib.runtime.random import generator


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentsConfig:
    """Which segments are matched, and when."""

    iterations: int = 5000
    """Optimiser steps on the synthetic set. A finished run goes on when asked for more."""
    segments: int = 1
    """How many segments K one iteration matches; 1 is MTT, FTD, DATM."""
    expert_epochs: int = 2
    """Length M of a segment in expert epochs."""
    window_start: int = 0
    """First start epoch T-."""
    window_end: int = 20
    """End T+ of the window; the last start epoch is T+ - 1."""
    window_end_initial: int | None = None
    """The window's end at iteration 0 of a curriculum (DATM); without it the whole window at once."""
    expansion_iterations: int = 1000
    """Iterations until the curriculum's window has grown to T+."""
    subsets: int = 1
    """Parts of the synthetic set, optimised one after the other, each on its own part of the window (SeqMatch)."""
    convex: bool = False
    """Match segments of the convexified trajectory, from start epochs that need not be whole (MCT)."""
    concurrent_experts: int = 1
    """Experts whose K segments one iteration matches, each drawn anew; with several devices, more work to divide."""
    expert: int | None = None
    """Match only this expert's segments; without it, an expert is drawn every iteration."""
    replay: int = 0
    """Earlier iterations, drawn at random, whose anchors are matched again beside the K (rehearsal)."""

    def __post_init__(self) -> None:
        start, end, first_end = self.window_start, self.window_end, self.window_end_initial
        counts = ("iterations", "segments", "expert_epochs", "expansion_iterations", "subsets", "concurrent_experts")
        require(1, **{name: getattr(self, name) for name in counts})
        require(0, expert=self.expert, replay=self.replay)
        if self.expert is not None and self.concurrent_experts > 1:
            raise UserError(
                f"expert is {self.expert} and concurrent_experts is {self.concurrent_experts}; leave one of them out."
            )
        if self.subsets > 1 and first_end is not None:
            raise UserError(
                f"subsets is {self.subsets} and window_end_initial is {first_end}; a window is either cut into parts "
                f"or grows."
            )
        require(0, below=end, window_start=start)
        require(above=start, most=end, window_end_initial=first_end)
        epochs = (first_end or end) - start
        each = f" for each of {self.subsets} subsets" if self.subsets > 1 else ""
        for name, most, where in (("subsets", epochs, ""), ("segments", epochs // self.subsets, each)):
            if getattr(self, name) > most:
                raise UserError(
                    f"{name} is {getattr(self, name)}, but the window [{start}, {first_end or end}) has only {most} "
                    f"start epochs{where}; use at most {most}."
                )

    @property
    def segments_in_all(self) -> int:
        """How many segments an iteration matches, of all experts and times."""
        return self.segments * self.concurrent_experts + self.replay

    def latest_end(self, epochs: int) -> int:
        """The largest `window_end` for which all segments end inside trajectories of epochs 0 … `epochs`."""
        return epochs + (not self.convex) - self.expert_epochs

    def check_epochs(self, epochs: int) -> None:
        """Raise `UserError` unless the last segment ends inside trajectories of epochs 0 … `epochs`."""
        if self.window_end > self.latest_end(epochs):
            raise UserError(
                f"window_end is {self.window_end} and expert_epochs is {self.expert_epochs}, but the experts stop at "
                f"epoch {epochs}; window_end may be at most {self.latest_end(epochs)}."
            )


Segment = tuple[int, int | float]
"""An expert and a start epoch."""


class Segments(NamedTuple):
    """The segments of one iteration."""

    starts: list[int] | list[float]
    """K start epochs, ascending; whole, unless the trajectory is convexified."""
    anchor: int
    """Which of them is the one that MTT would have drawn."""


def active_subset(config: SegmentsConfig, iteration: int) -> int:
    """Which subset is optimised at an iteration: each in turn, for equally many iterations."""
    return min(iteration * config.subsets // config.iterations, config.subsets - 1)


def learned_images(ipc: int, classes: int, subsets: int) -> list[int]:
    """How many images students and networks learn in each stage: those of the subsets so far."""
    return [classes * -(-ipc * (number + 1) // subsets) for number in range(subsets)]


def window(config: SegmentsConfig, iteration: int) -> tuple[int, int]:
    """The window [T-, T+) at an iteration.

    DATM: the end grows linearly to T+, rounded down. SeqMatch: the active subset's part, as equal as whole epochs
    allow.
    """
    if config.subsets > 1:
        subset, length = active_subset(config, iteration), config.window_end - config.window_start
        lower, upper = (config.window_start + length * part // config.subsets for part in (subset, subset + 1))
        return lower, upper
    if config.window_end_initial is None or iteration >= config.expansion_iterations:
        return config.window_start, config.window_end
    grown = (config.window_end - config.window_end_initial) * iteration // config.expansion_iterations
    return config.window_start, config.window_end_initial + grown


def draw_segments(config: SegmentsConfig, iteration: int, generator: torch.Generator) -> Segments:
    """K distinct start epochs inside the window, spaced R; the anchor is uniform over the window."""
    lower, upper = window(config, iteration)
    spacing = (upper - lower) // config.segments
    if config.convex:
        drawn = lower + (upper - lower) * torch.rand((), generator=generator, dtype=torch.float64).item()
    else:
        drawn = lower + int(torch.randint(upper - lower, (), generator=generator))
    anchor = min(int(drawn - lower) // spacing, config.segments - 1)
    first = drawn - anchor * spacing
    return Segments([first + k * spacing for k in range(config.segments)], anchor)


def draw_matched(
    config: SegmentsConfig, seed: int, experts: int, iteration: int, rng: torch.Generator
) -> tuple[list[Segment], int]:
    """Every segment that an iteration matches, and which of them is the anchor.

    First the K segments of the drawn expert, then K of each of `concurrent_experts` - 1 others, then `replay` earlier
    anchors, or as many as there are. The earlier anchors are drawn again, so nothing is stored.
    """
    expert, segments = _draw(config, experts, iteration, rng)
    matched: list[Segment] = [(expert, start) for start in segments.starts]
    other_rng = generator(seed, "others", iteration)
    others = [other for other in torch.randperm(experts, generator=other_rng).tolist() if other != expert]
    for other in others[: config.concurrent_experts - 1]:
        matched += [(other, start) for start in draw_segments(config, iteration, other_rng).starts]
    order = torch.randperm(iteration, generator=generator(seed, "replay", iteration))
    for earlier in order[: config.replay].tolist():
        expert, replayed = _draw(config, experts, earlier, generator(seed, "iteration", earlier))
        matched.append((expert, replayed.starts[replayed.anchor]))
    return matched, segments.anchor


def _draw(config: SegmentsConfig, experts: int, iteration: int, rng: torch.Generator) -> tuple[int, Segments]:
    """The expert of an iteration and its K segments."""
    expert = int(torch.randint(experts, (), generator=rng))
    segments = draw_segments(config, iteration, rng)
    return (expert if config.expert is None else config.expert), segments
