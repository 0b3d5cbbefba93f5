"""What the book says of a GPU follows from records: a record that says the opposite turns it."""

from typing import Any

import matplotlib.pyplot as plt
import pytest

from cddbook import findings, tables
from cddbook.figures import ch5_concurrent, ch8_gpu
from cddlib import distill_recipe
from cddlib.runtime.config import as_dict


def cells(table: str) -> list[list[str]]:
    """Of a table in Markdown."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_tables_of_speed() -> None:
    iteration, epoch = {"ipc": 1, "steps": 50}, {"images": 50_000}
    rows: list[dict[str, Any]] = [
        {"what": what, "way": way, "ms": ms, "least": ms - 1, "most": ms + 1, **sizes}
        for what, way, ms, sizes in (
            ("an iteration's gradient", "cddlib", 30, {**iteration, "segments": 1, "commit": "abcdefghij"}),
            ("an iteration's gradient", "cddlib", 60, {**iteration, "segments": 4}),
            ("an expert's epoch", "cddlib", 400, epoch),
            ("an iteration's gradient", "textbook", 300, {**iteration, "segments": 1}),
            ("without a graph", "cddlib", 90, iteration),
        )
    ]
    speed = {"rows": rows, "commit": "0123456789"}
    found = cells(ch8_gpu.speed_table(speed))
    work = "an iteration's gradient, IPC 1, N = 50"
    assert found[2] == [work, "cddlib", "30.0", "29.0 to 31.0", "10.0", "`abcdefg`"]
    assert found[4][:3] == [work, "cddlib, launched one by one", "90.0"]
    assert found[5] == ["an expert's epoch, images: 50,000", "cddlib", "400.0", "399.0 to 401.0", "", "`0123456`"]
    assert cells(ch8_gpu.segments_table(speed))[-1] == ["4", "60.0", "2.00", "66.7"]
    speed |= {"device": "a GPU", "versions": {"torch": "2.11"}, "threads": 16, "seconds": 100}
    said = "- speed: 1.7 minutes on a GPU, threads: 16, PyTorch 2.11, commit `0123456` and `abcdefg`."
    assert tables.provenance({"speed": speed}) == said


def test_runs_at_once_are_compared_with_one_run() -> None:
    rows = [{"runs": runs, "segments": k, "segments_a_second": rate} for runs, k, rate in ((1, 1, 20.0), (4, 2, 99.0))]
    assert cells(ch8_gpu.runs_table({"rows": rows}))[-1] == ["4", "2", "99.0", "4.95"]


def test_gradients_and_a_walk_that_is_repeated() -> None:
    walk = {"loss": 1e-8, "images": 1e-6, "cosine": 1.0, "targets": 1e-6, "step_size": 1e-6}
    record = {"walks": [{"what": "float32", **walk, "cosine": 0.5}], "same": {"twice": walk}, "synchronisations": 2}
    *rows, _, waits = ch8_gpu.gradients_table(record).split("\n")
    assert "5e-01" in rows[2] and rows[3].startswith("| the same walk again |")
    assert waits == "The CPU waits for the GPU 2 times a walk."


@pytest.mark.parametrize(
    ("cosines", "passes"), [((0.9995, 0.9999, 0.995), "yes"), ((0.9995, 0.9985, 0.998), "no"), ((1, 1, 0.98), "no")]
)
def test_the_gate_needs_the_median_and_the_least(cosines: tuple[float, ...], passes: str) -> None:
    rows = [{"precision": "float32", "cosine": cosine, "images": 0.01} for cosine in cosines]
    table = cells(ch8_gpu.precision_table({"rows": rows}))
    assert table[0][-1] == "at least 0.999 and 0.99" and table[2][-1] == passes


# --- Runs -------------------------------------------------------------------------------------------------------


def distil_of(gap: float, *, apart: float = 0.0) -> dict[str, Any]:
    """Runs with K = 1 and 2, whose losses are `gap` higher with K = 2; its seeds lie further `apart`."""
    runs = []
    for seed in range(3):
        for k, iterations in ((1, 120 + seed), (2, 80 + seed)):
            level = 0.6 + 0.001 * seed + (k - 1) * (gap + apart * (seed - 1))
            runs.append(
                {
                    "segments": k, "seed": seed, "iterations": iterations,
                    "config": as_dict(distill_recipe("mtt", "cifar10", ipc=1, segments=k)),
                    "losses": [[level + 0.3 * (i < 10)] * k for i in range(iterations)],
                    "seconds": [9.0] + [0.1] * (iterations - 1), "step_size": [0.01] * iterations,
                }
            )  # fmt: skip
    return {"runs": runs}


def test_losses_that_differ_by_less_than_their_seeds_settle_nothing() -> None:
    table = findings.gpu_losses(distil_of(0.05, apart=0.1))
    rows = cells(ch5_concurrent.equal_table(table, "loss"))[2:]
    assert [row[0] for row in rows] == ["after 120 matched segments", "after 80 iterations", "when they were stopped"]
    assert rows[0][3].startswith("+0.050 [") and {tuple(row[4:]) for row in rows} == {("3", "not settled")}


def test_comparisons_may_differ() -> None:
    """An iteration with K = 2 lowers the loss by more than one with K = 1, and by less than two of them."""
    distil = distil_of(0.0)
    for run in distil["runs"]:
        run["losses"] = [[1 - 0.001 * i * (1 + 0.5 * (run["segments"] - 1))] for i in range(run["iterations"])]
    rows = cells(ch5_concurrent.equal_table(findings.gpu_losses(distil), "loss"))[2:]
    assert [row[-1] for row in rows] == ["higher", "lower", "lower"]


def test_the_curves_are_drawn_where_all_seeds_are() -> None:
    table = findings.gpu_losses(distil_of(0.0))
    figure = ch5_concurrent.curves(table, "loss")
    drawn = [[max(line.get_xdata()) for line in axis.lines if len(line.get_xdata())] for axis in figure.axes]
    assert drawn == [[120, 80], [120, 160]]
    plt.close("all")


def test_what_runs_reached() -> None:
    rows = cells(ch5_concurrent.runs_table(distil_of(0.0)))
    assert len(rows) == 8 and rows[2] == ["1", "0", "120 of 5,000", "120", "9", "0.100", "0.0100"]


def evaluated_of(gain: float) -> dict[str, Any]:
    """Tests of all these runs after 100 matched segments and at their end; K = 2 is better by `gain`."""
    rows = []
    for run in distil_of(0.0)["runs"]:
        k, level = run["segments"], 0.4 + 0.001 * run["seed"] + gain * (run["segments"] - 1)
        row = {"segments": k, "seed": run["seed"], "accuracies": [level - 0.01, level + 0.01]}
        rows += [{**row, "iteration": i, "matched": k * i} for i in (100 // k, run["iterations"])]
    return {"rows": rows, "random_real": [0.14, 0.16]}


@pytest.mark.parametrize(("gain", "how", "better"), [(0.1, "higher", "12 of 12"), (-0.3, "lower", "6 of 12")])
def test_accuracies_turn(gain: float, how: str, better: str) -> None:
    text = ch5_concurrent.tested(evaluated_of(gain), distil_of(0.0))
    assert f"{better} sets have a higher accuracy than any network on random real images" in text
    rows = cells(text)
    assert [row[-1] for row in rows[10:12]] == [how, how]
    assert rows[2] == ["K=1", "100", "100", "40.1 ± 0.1", "3", "2"]
    assert rows[3] == ["K=1", "when they were stopped", "120 to 122", "40.1 ± 0.1", "3", "2"]
    assert rows[6] == ["random real images", "", "", "15.0 ± 1.4", "", "2"]
