"""The benchmark runs, and its figures show what it recorded."""

import dataclasses
import json
from typing import Any

import pandas as pd
import pytest
import speed
import torch

from cddbook.figures import ch8_speed as speed_figures
from cddlib.training import compiling, engine

LITTLE = {"student_steps": 2, "images": 512, "epochs": 2, "width": 8, "least_seconds": 0.1}
NAMES = ["textbook", "textbook, keeping memory", "cddlib", "cddlib, least memory"]
WANTED = [("match", name, 1) for name in NAMES]
WANTED += [(work, name, ipc) for work, ipc in (("expert", 1), ("evaluate", 10)) for name in NAMES[:3]]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the benchmark writes of little work, in this process, where nothing is compiled; in two parts."""
    compiling.not_compiled.cache_clear()  # what other tests of this process were told
    path, every, most = tmp_path_factory.mktemp("speed") / "speed.json", speed.points, [5]

    def few(*options: Any) -> list[Any]:
        points = [point for point in every(*options) if "compiled" not in point.implementation]
        first = [next(p for p in points if p.work == w and p.implementation == n and p.ipc == i) for w, n, i in WANTED]
        return [dataclasses.replace(point, **{**LITTLE, "least_seconds": 0.02}) for point in first][: most[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "points", few)
        patch.setattr(speed, "in_a_process", speed.measure)
        speed.main(path, threads=1)
        begun = json.loads(path.read_text())["measurements"]
        most[0] = None
        speed.main(path, threads=1)
    whole = json.loads(path.read_text())
    assert whole["measurements"][:5] == begun
    return whole


def test_all_is_measured_side_by_side(record: dict) -> None:
    rows = record["measurements"]
    assert [(row["work"], row["implementation"], row["ipc"]) for row in rows[: len(WANTED)]] == WANTED
    for row in rows:
        assert 0 < row["seconds"] <= row["slowest"] and row["start_memory_mb"] <= row["peak_memory_mb"] + 1
        assert row["rate"] == pytest.approx(row["operations"] / row["seconds"])


def test_operations_are_those_counted_by_hand(record: dict) -> None:
    """A step of training: forward, and backward by weights and by all inputs but the first."""
    width, images = 8, 512
    first, others = 2 * 3 * width * 9 * 32**2, [2 * width**2 * 9 * side**2 for side in (16, 8)]
    linear = 2 * width * 4**2 * 10
    expected = images * (2 * first + 3 * sum(others) + 3 * linear)
    found = {row["implementation"]: row["operations"] for row in record["measurements"] if row["work"] == "expert"}
    assert found == dict.fromkeys(found, expected)


def test_a_process_of_its_own_measures_the_same() -> None:
    point = speed.Point(work="match", implementation="cddlib, least memory", operations=1e6, **LITTLE)
    found = speed.in_a_process(point, 100.0)
    assert found["seconds"] > 0 and found["rate"] == pytest.approx(1e6 / found["seconds"])
    assert speed.measure(point, 1e-9) == {"left_out": "more than 0 seconds"}


def test_what_is_not_compiled_is_not_called_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "can_compile", lambda: False)
    point = speed.Point(work="match", implementation="cddlib, compiled", operations=1e6, **LITTLE)
    assert speed.measure(point, 100.0) == {"left_out": "cannot be compiled here"}
    compiling.not_compiled.cache_clear()


def test_all_ways_give_one_gradient() -> None:
    """Where the benchmark runs them."""
    theirs, *others = (
        speed.match(speed.Point(work="match", implementation=name, segments=3, **LITTLE))
        for name in ("textbook", "cddlib", "cddlib, one by one", "cddlib, side by side")
    )
    for ours in others:
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_side_by_side_is_measured_where_steps_are_small_and_where_not() -> None:
    apart = [p for p in speed.points(1, 128, 10.0) if p.implementation.endswith(speed_figures.APART)]
    small = [point for point in apart if point.side == speed_figures.SMALL_SIDE]
    assert {point.segments for point in small} == {1, 4}
    large = [point for point in apart if point not in small]
    assert {point.width for point in large} == {128}


def test_the_way_s_name_says_how_many_segments_walk_together(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(speed, "segment_chunks", lambda *given: taken.append(given[1].side_by_side) or [])
    for name in ("cddlib, one by one", "cddlib, side by side", "cddlib"):
        speed.match(speed.Point(work="match", implementation=name, segments=4, **LITTLE))
    assert taken == [1, 4, None]


def test_a_record_s_parts_are_for_two_tables() -> None:
    names = ["textbook", "cddlib, compiled", "cddlib, one by one", "cddlib, side by side"]
    rows = [{"name": "large", "implementation": name, "side": 32} for name in names]
    rows += [{"name": "alone", "implementation": name, "side": 32} for name in names[:2]]
    rows += [{"name": "small", "implementation": name, "side": 8} for name in (names[0], *names[2:])]
    table = speed_figures.measurements({"measurements": rows})
    usual, apart = (speed_figures.part(table, apart=apart).index.tolist() for apart in (False, True))
    assert usual == [0, 1, 4, 5]
    assert apart == [0, 2, 3, 6, 7, 8]


def test_ratios_are_to_the_faster_textbook() -> None:
    names = ("name", "implementation", "seconds", "peak_memory_mb", "rate", "convolution_rate")
    rows = [("a", "textbook", 4.0, 110.0, 1.0, 2.0), ("a", "textbook, kept", 3.0, 210.0, 1.0, 2.0)]
    rows += [("a", "cddlib", 2.0, 60.0, 1.0, 4.0), ("b", "cddlib", 5.0, 60.0, 1.0, 2.0)]
    measured = [{**dict(zip(names, row, strict=True)), "start_memory_mb": 10.0} for row in rows]
    measured += [{"name": "b", "implementation": "textbook", "left_out": "not enough memory"}]
    measured += [{"name": "c", "implementation": name, "left_out": "too long"} for name in ("textbook", "cddlib")]
    found = speed_figures.measurements({"measurements": measured})
    assert speed_figures.ratio_table(found, "seconds").splitlines()[2:] == [
        "| a | 3 s | 2 s, 1.50 |",
        "| b | not enough memory | 5 s |",
        "| c | too long | too long |",
    ]
    assert speed_figures.ratio_table(found, "memory_mb").splitlines()[2:4] == [
        "| a | 200 MB | 50 MB, 0.25 |",
        "| b | not enough memory | 50 MB |",
    ]
    assert speed_figures.rate_table(found).splitlines()[2:] == ["| a | 50% | 50% | 25% |", "| b |  |  | 50% |"]
    figure = speed_figures.bars(found, "seconds", "seconds")
    (axis,) = figure.axes
    assert sorted(text.get_text() for text in axis.texts) == ["not enough memory", "too long", "too long"]
    widths = {c.get_label(): [bar.get_width() for bar in c] for c in axis.containers}
    assert widths["cddlib"][:2] == [2, 5] and widths["textbook, kept"][0] == 3


def test_precisions_are_drawn_by_their_distance() -> None:
    walks = [{"way": way, "ipc": ipc, "cosine": 0.99} for way in ("float32", "bfloat16") for ipc in (1, 10)]
    (axis,) = speed_figures.precision(pd.DataFrame(walks)).axes
    found = [float(x) for points in axis.collections for x, _ in points.get_offsets()]
    assert found == pytest.approx([0.01] * 4)
