"""The figures of the reliability page show what the records say."""

import numpy as np
from matplotlib.figure import Figure
from scaling import Parts

from cddbook.figures import ch7_reliability as reliability


def lengths(figure: Figure) -> dict[str, list[float]]:
    """The lengths of the bars by row."""
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    return {name: [bars[row].get_width() for bars in axis.containers] for row, name in enumerate(names)}


def test_bars_are_sums_by_row_and_stacked():
    kills = {"kills": [{"work": w, "kills": n} for w, n in (("buffer", 3), ("distill", 4), ("buffer", 5))]}
    assert lengths(reliability.kills(kills)) == {"buffer": [8], "distill": [4]}
    rows = [("a.json", 1, 2), ("a.json", 3, 0), ("b.json", 5, 1)]
    record = {"damage": [{"file": file, "refused": r, "harmless": h} for file, r, h in rows]}
    figure = reliability.damage(record)
    assert lengths(figure) == {"a.json": [4, 2], "b.json": [5, 1]}
    assert [bar.get_x() for bar in figure.axes[0].containers[1]] == [4, 5]
    loader = {"loader": "expert", "kind": "lying", "refused": 70, "unchanged": 10, "valid": 20}
    assert lengths(reliability.fuzzed({"loaders": [loader]})) == {"expert, lying": [70, 10, 20]}


def test_no_difference_is_drawn_at_the_bottom():
    variants = {"here": {"1": 0.0, "10": 0.0}, "again": {"1": 0.0, "10": 0.0}, "AVX2": {"1": 1e-7, "10": 1e-4}}
    figure = reliability.drift({"variants": {name: {"losses": losses} for name, losses in variants.items()}})
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert lines.keys() == {"again", "AVX2"}  # the first is what the others are compared with
    assert list(lines["again"]) == [1e-9, 1e-9] and list(lines["AVX2"]) == [1e-7, 1e-4]


def test_speedups_are_those_of_one_process():
    rows = [("digits", 4, 2, 1.25, 1.0), ("digits", 4, 1, 2.0, 2.0)]
    names = ("work", "segments", "processes", "seconds", "predicted")
    figure = reliability.speedups({"measured": [dict(zip(names, row, strict=True)) for row in rows]})
    measured, predicted, ideal = figure.axes[0].get_lines()
    np.testing.assert_allclose(measured.get_ydata(), [1, 1.6])
    np.testing.assert_allclose(predicted.get_ydata(), [1, 2])
    assert list(ideal.get_ydata()) == [1, 2]


def test_the_table_says_where_something_begins_to_bind_and_the_figure_has_a_line_a_curve():
    rows = [("strong", 1, 1, 1.0, "compute"), ("strong", 1, 2, 0.96, "compute"), ("strong", 1, 4, 0.5, "idle")]
    rows += [("weak", 1, 1, 1.0, "compute"), ("weak", 2, 2, 0.75, "compute")]
    names = ("scaling", "concurrent_experts", "devices", "efficiency", "binds")
    model = {"model": [{"set": "S", "segments": 8, **dict(zip(names, row, strict=True))} for row in rows]}
    assert reliability.binding_table(model).splitlines()[2:] == [
        "| S, 8 segments | from 1 | 100% | computing itself |",
        "| S, 8 segments | from 4 | 50% | devices that have no segment |",
        "| S, 8 segments a device | from 1 | 100% | computing itself |",
    ]
    strong, weak = reliability.efficiencies(model).axes[0].get_lines()
    assert list(strong.get_ydata()) == [1, 0.96, 0.5] and list(weak.get_ydata()) == [1, 0.75]


def test_every_part_of_an_iteration_has_words():
    assert tuple(reliability.PARTS) == Parts._fields
