"""What the book says of a GPU follows from records: a record that says the opposite turns it."""

from typing import Any

import pytest

from cddbook import tables
from cddbook.figures import ch8_gpu


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
