"""The benchmark runs, and its figures show what it recorded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cddlib import speed_figures

SPEED = Path(__file__).parent / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the benchmark writes of little work."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    subprocess.run(
        [sys.executable, SPEED, "--small", "--width", "8", "--threads", "1", "--device", "cpu", "--to", path],
        check=True,
    )
    return json.loads(path.read_text())


def test_all_is_measured_side_by_side(record: dict) -> None:
    rows = record["measurements"]
    assert [(row["work"], row["implementation"]) for row in rows] == [
        (work, name)
        for work in ("match", "expert", "evaluate")
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
