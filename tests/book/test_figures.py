"""Figures, tables and the slider say what the records say."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scaling import Parts

from cddbook import findings, tables
from cddbook.figures import ch5_concurrent, style
from cddbook.figures import ch7_reliability as reliability
from cddbook.figures import ch8_speed as speed
from cddlib.runtime.files import write_json
from cddlib.runtime.run_folder import Metrics


def lengths(figure: Figure) -> dict[str, list[float]]:
    """The lengths of the bars by row."""
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    return {name: [bars[row].get_width() for bars in axis.containers] for row, name in enumerate(names)}


def test_bars_are_sums_by_row_and_stacked():
    rows = [("a.json", 1, 2), ("a.json", 3, 0), ("b.json", 5, 1)]
    damage = [{"file": file, "kind": "flip", "refused": r, "harmless": h} for file, r, h in rows]
    figure = reliability.bars(damage, ["file", "kind"], {"refused": "refused", "harmless": "no harm"}, "copies")
    assert lengths(figure) == {"a.json, flip": [4, 2], "b.json, flip": [5, 1]}
    assert [bar.get_x() for bar in figure.axes[0].containers[1]] == [4, 5]
    assert lengths(reliability.bars(damage, ["file"], {"refused": "no"}, "copies")) == {"a.json": [4], "b.json": [5]}


def test_no_difference_is_drawn_at_the_bottom():
    variants = {"here": {"1": 0.0, "10": 0.0}, "again": {"1": 0.0, "10": 0.0}, "AVX2": {"1": 1e-7, "10": 1e-4}}
    figure = reliability.drift({"variants": {name: {"losses": losses} for name, losses in variants.items()}})
    lines = [list(line.get_ydata()) for line in figure.axes[0].get_lines() if len(line.get_ydata())]
    assert lines == [[1e-9, 1e-9], [1e-7, 1e-4]]  # the first variant is what the others are compared with


def test_tables_of_what_was_done_to_break_it():
    done = {"SIGKILL": [{"kills": 999}, {"kills": 1}], "disk full": [{"times": 2}, {"times": 3}]}
    assert reliability.times_table(done).splitlines()[2:] == ["| SIGKILL | 1,000 |", "| disk full | 5 |"]
    cases = [("a", "iteration 1", "a sentence"), ("b", None, "finished")]
    found = [dict(zip(("case", "stopped_at", "sentence"), case, strict=True)) for case in cases]
    rows = reliability.divergence_table({"divergence": found}).splitlines()[2:]
    assert rows == ["| a | stopped in iteration 1 |", "| b | finished |"]
    ranks = [("mean", 2, 1e-7), ("balance", 2, 3e-7), ("mean, 60 iterations", 2, 0.01)]
    found = [dict(zip(("rule", "ranks", "largest_relative_difference"), row, strict=True)) for row in ranks]
    rows = reliability.agreement_table({"agreement": found}).splitlines()[2:]
    assert rows == [
        "| short runs: the largest of 2 rules and settings | 2 | 3e-07 |",
        "| mean, 60 iterations | 2 | 1e-02 |",
    ]
    verify = {"losses": 2e-3, "accuracies of networks": 0.5}
    found = {"AVX2": {"verify": verify, "same_bytes": False, "test_accuracies": [[0.5, 0.5], [0.9, 0.9]]}}
    assert reliability.drift_table({"variants": found}).splitlines()[2] == "| AVX2 | no | 50.0 ± 0.0 | 2.0e-03 |"
    errors = [{"processes": 1, "error": 9.0}, {"processes": 2, "error": -0.1}, {"processes": 4, "error": 0.05}]
    assert reliability.model_sentence({"measured": errors}).endswith("off by at most 10%.")


def test_precisions_in_tables():
    """A longer step turns the gradient of one walk."""
    kinds = {"ipc": 1, "student_steps": 20, "seed": 0, "loss": 1.5, "step_size_error": -0.25}
    rows = [("early", 0.01, 0.75), ("late", 0.01, 1.0), ("late", 0.1, 0.5)]
    walks = [
        {**kinds, "way": "float32", "where": w, "step_size": s, "cosine": c, "cosines_of_images": [c, c / 2]}
        for w, s, c in rows
    ]
    usual, longer = (speed.walks({"walks": walks}, longer=longer) for longer in (False, True))
    assert usual.index.tolist() == [0, 1] and longer.index.tolist() == [1, 2]
    words = [cell.strip() for cell in speed.precision_table(longer).splitlines()[3].split("|")[1:-1]]
    assert words == ["0.1", "float32", "1", "1.5000", "0.5000", "0.5000", "0.2500", "0.2500"]
    runs = [{"work": "IPC 1", "precision": name, "accuracies": [0.5, 0.5]} for name in ("float32", "bfloat16")]
    table = speed.accuracies_by_precision([{"data": "digits", "runs": runs}]).splitlines()
    assert table[2] == "| digits | IPC 1 | 50.0 ± 0.0 (2) | 50.0 ± 0.0 (2) |"


def test_speedups_are_those_of_one_process():
    rows = [("digits", 4, 2, 1.25, 1.0), ("digits", 4, 1, 2.0, 2.0)]
    names = ("work", "segments", "processes", "seconds", "predicted")
    figure = reliability.speedups({"measured": [dict(zip(names, row, strict=True)) for row in rows]})
    predicted, ideal = (line for line in figure.axes[0].get_lines() if len(line.get_xdata()))
    points = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, [[1, 1], [2, 1.6]])
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
    lines = [line for axis in reliability.efficiencies(model).axes for line in axis.get_lines()]
    strong, weak = (line for line in lines if len(line.get_xdata()))
    assert list(strong.get_ydata()) == [1, 0.96, 0.5] and list(weak.get_ydata()) == [1, 0.75]


def test_every_part_of_an_iteration_has_words():
    assert tuple(reliability.PARTS) == Parts._fields


def test_values_are_compared_at_the_last_place_that_all_runs_share() -> None:
    curves = {"K=1": {0: 0.1, 4: 0.5, 8: 0.6}, "K=2": {0: 0.1, 2: 0.6, 4: 0.8}}
    rows = [
        (variant, seed, i, int(variant[-1]) * i, accuracy + seed / 100)
        for variant, curve in curves.items()
        for seed in (0, 1)
        for i, accuracy in curve.items()
    ]
    table = pd.DataFrame(rows, columns=["variant", "seed", "iteration", "matched", "accuracy"])
    found = tables.paired_table("validation accuracy, %", findings.at_equal(table, "accuracy"), "accuracy")
    assert found.splitlines()[2:] == [
        "| after 8 matched segments | 60.5 ± 0.7 | 80.5 ± 0.7 | +20.0, the same in all | 2 |",
        "| after 4 iterations | 50.5 ± 0.7 | 80.5 ± 0.7 | +30.0, the same in all | 2 |",
    ]
    alone = tables.paired_table("", findings.at_equal(table[table["seed"] == 0], "accuracy"), "accuracy")
    assert alone.splitlines()[2] == "| after 8 matched segments | 60.0 | 80.0 | +20.0 | 1 |"
    assert not findings.at_equal(table[table["matched"] < 4], "accuracy")  # the start is no place to compare at
    levels = {"all training images": [0.8, 1.0]}
    figure = ch5_concurrent.curves(table.assign(elapsed=1.0 * table["iteration"]), "accuracy", levels)
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["all training images"] * 3
    drawn = [[max(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 3] for axis in figure.axes]
    assert drawn == [[8, 4], [8, 8], [8, 4]] and figure.axes[0].lines[-1].get_ydata()[0] == 0.9


def test_slider_shows_one_frame_and_escapes_words():
    frames = {1: (plt.figure(figsize=(1, 1)), 'a "quoted" alt'), 2: (plt.figure(figsize=(1, 1)), "b")}
    html = style.slider(frames, label="K", name="turn")
    assert html.count("<figure") == 2 and html.count(" hidden>") == 1
    assert "a &quot;quoted&quot; alt" in html and "http" not in html
    assert not any(plt.fignum_exists(figure.number) for figure, _ in frames.values())


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([0.25, 0.5], "K = 2: the distilled images of iteration 1; validation accuracy 25.0% at the start, 50.0% with"),
        ([0.25, 0.2], "K = 2: no iteration was better than the start, so these are its random real images; validation"),
    ],
)
def test_a_picture_says_which_set_it_shows(tmp_path: Path, accuracies: list[float], words: str) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_at=-1)
    for iteration, accuracy in enumerate(accuracies):
        metrics.write({"iteration": iteration, "validation_accuracy": [accuracy]})
    best = accuracies.index(max(accuracies))
    result = {"selected_iteration": best, "validation_accuracy": accuracies[best], "metrics_sha256": metrics.sync()}
    metrics.close()
    write_json(tmp_path / "result.json", result)
    assert ch5_concurrent.selection_sentence(2, tmp_path).startswith(words)
