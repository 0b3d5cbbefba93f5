"""The benchmark runs, and its figures show what it recorded."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cddlib import speed_figures

LITTLE = {"student_steps": 2, "images": 512, "epochs": 2, "width": 8, "least_seconds": 0.1}


@pytest.fixture(scope="module")
def speed() -> Any:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "benchmarks")
        return importlib.import_module("speed")


@pytest.fixture(scope="module")
def record(speed: Any, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the benchmark writes of little work, in this process."""
    path, every = tmp_path_factory.mktemp("speed") / "speed.json", speed.points

    def few(options: Any) -> list[Any]:
        points = [dataclasses.replace(point, **LITTLE) for point in every(options)]
        return [*points[:3], *points[-6:-3], *points[-9:-6]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "points", few)
        patch.setattr(speed, "in_a_process", speed.measure)
        speed.main(["--threads", "1", "--device", "cpu", "--to", str(path)])
    return json.loads(path.read_text())


def test_all_is_measured_side_by_side(record: dict) -> None:
    rows = record["measurements"]
    assert [(row["work"], row["implementation"]) for row in rows] == [
        (work, name)
        for work in ("match", "evaluate", "expert")
        for name in ("textbook", "textbook, keeping memory", "cddlib")
    ]
    for row in rows:
        assert 0 < row["seconds"] <= row["slowest"] and row["start_memory_mb"] <= row["peak_memory_mb"]
        assert row["rate"] == pytest.approx(row["operations"] / row["seconds"])


def test_operations_are_those_counted_by_hand(record: dict) -> None:
    """A step of training: forward, and backward by weights and by all inputs but the first."""
    width, images = 8, 512
    first, others = 2 * 3 * width * 9 * 32**2, [2 * width**2 * 9 * side**2 for side in (16, 8)]
    linear = 2 * width * 4**2 * 10
    expected = images * (2 * first + 3 * sum(others) + 3 * linear)
    found = {row["implementation"]: row["operations"] for row in record["measurements"] if row["work"] == "expert"}
    assert found == dict.fromkeys(found, expected)


def test_a_process_of_its_own_measures_the_same(speed: Any) -> None:
    point = speed.Point(work="match", implementation="textbook, keeping memory", **LITTLE)
    found = speed.in_a_process(point, 100.0)
    assert found["operations"] == speed.operations(point) and found["seconds"] > 0
    assert speed.in_a_process(point, 1e-9) == {"left_out": "more than 0 seconds"}


def test_both_ways_give_one_gradient(speed: Any) -> None:
    """Where the benchmark runs them."""
    found = []
    for name in ("cddlib", "textbook"):
        point = speed.Point(work="match", implementation=name, **LITTLE)
        found.append(speed.match(point, torch.device("cpu")))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_ratios_are_to_the_faster_textbook() -> None:
    names = ("name", "implementation", "seconds", "peak_memory_mb", "rate", "convolution_rate")
    rows = [("a", "textbook", 4.0, 100.0, 1.0, 2.0), ("a", "textbook, kept", 3.0, 200.0, 1.0, 2.0)]
    rows += [("a", "cddlib", 2.0, 50.0, 1.0, 4.0), ("b", "cddlib", 5.0, 50.0, 1.0, 2.0)]
    measurements = [dict(zip(names, row, strict=True)) for row in rows]
    measurements += [{"name": "b", "implementation": "textbook", "left_out": "not enough memory"}]
    measurements += [{"name": "c", "implementation": name, "left_out": "too long"} for name in ("textbook", "cddlib")]
    found = {"measurements": measurements}
    assert speed_figures.ratio_table(found).splitlines()[2:] == [
        "| a | 3 | 2 | 1.50 | 0.25 | 25% |",
        "| b | not enough memory | 5 | | | 50% |",
        "| c | | too long | | | |",
    ]
    figure = speed_figures.bars(found, "seconds", "seconds")
    (axis,) = figure.axes
    assert sorted(text.get_text() for text in axis.texts) == ["not enough memory", "too long", "too long"]
    widths = {c.get_label(): [bar.get_width() for bar in c] for c in axis.containers}
    assert widths["cddlib"][:2] == [2, 5] and widths["textbook, kept"][0] == 3
