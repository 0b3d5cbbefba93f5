"""What the book says of a GPU follows from records: a record that says the opposite turns the sentence."""

from typing import Any

import matplotlib.pyplot as plt
import pytest

from cddbook import findings, tables
from cddbook.figures import ch5_concurrent, ch6_cifar10, ch8_gpu
from cddlib import distill_recipe
from cddlib.runtime.config import as_dict


def cells(table: str) -> list[list[str]]:
    """Of a table in Markdown."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def speed_of(**ms: float) -> dict[str, Any]:
    """A record of `make gpu`; keywords replace milliseconds."""
    found = {"one": 30, "two": 36, "four": 60, "bfloat16": 20, "textbook": 300, "apart": 90} | ms
    ways = {"bfloat16": "cddlib, bfloat16", "textbook": "textbook"}
    counts = {"two": 2, "four": 4}
    rows: list[dict[str, Any]] = [
        {"what": "an iteration's gradient", "way": ways.get(name, "cddlib"), "segments": counts.get(name, 1)}
        for name in found
    ]
    rows[-1] = {"what": "without a graph", "way": "cddlib"}
    for row, value in zip(rows, found.values(), strict=True):
        row |= {"ipc": 1, "steps": 50, "ms": value, "least": value - 1, "most": value + 1}
    epoch = {"what": "an expert's epoch", "way": "cddlib", "images": 50_000, "ms": 400, "least": 399, "most": 401}
    return {"rows": [*rows, epoch], "commit": "0123456789", "device": "a GPU", "versions": {"torch": "2.11"}}


@pytest.mark.parametrize(
    ("ms", "said"),
    [
        ({}, "gradient takes 30 ms, 10.0 times as fast as the textbook's way (300 ms)"),
        ({}, "takes 30 ms, 3.0 times as fast as the same steps launched one by one (90"),
        ({}, "bfloat16 takes 20 ms, 1.5 times as fast as in float32 (30 ms)"),
        ({"one": 600}, "gradient takes 600 ms, 2.0 times as slow as the textbook's way"),
        ({"one": 301}, "about as fast as the textbook's way"),
        ({}, "K = 2 takes 1.2 times, K = 4 takes 2.0 times as long as K = 1. Every K is"),
        ({"two": 60}, "K = 4 takes 2.0 times as long as K = 1. K = 4 is more than"),
        ({"two": 60, "four": 130}, "K = 1. No K is more than a tenth faster"),
    ],
)
def test_speeds_turn(ms: dict[str, float], said: str) -> None:
    speed = speed_of(**ms)
    assert said in ch8_gpu.faster_sentences(speed) + ch8_gpu.segments_sentence(speed)


def test_only_rows_of_one_commit_are_compared() -> None:
    speed = speed_of()
    speed["rows"][0]["commit"] = "abcdefghij"
    assert "one by one" not in ch8_gpu.faster_sentences(speed) and "bfloat16" not in ch8_gpu.faster_sentences(speed)
    speed["rows"].append({**speed["rows"][0], "way": ch8_gpu.OWN[1], "ms": 45, "commit": "0123456789"})
    assert "takes 45 ms, 2.0 times as fast" in ch8_gpu.faster_sentences(speed)
    assert tables.provenance({"speed": speed}) == "- speed: a GPU, PyTorch 2.11, commit `0123456` and `abcdefg`."


def test_tables_of_speed() -> None:
    rows = cells(ch8_gpu.speed_table(speed_of()))
    work = "an iteration's gradient, IPC 1, N = 50"
    assert rows[2] == [work, "cddlib", "30.0", "29.0 to 31.0", "10.0", "`0123456`"]
    assert rows[5][:3] == [work, ch8_gpu.APART, "90.0"]
    assert rows[6] == ["an expert's epoch, images: 50,000", "cddlib", "400.0", "399.0 to 401.0", "", "`0123456`"]
    assert cells(ch8_gpu.segments_table(speed_of()))[-1] == ["4", "60.0", "2.00", "66.7"]


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([20, 30, 40, 39], "1.9 times as many segments a second as one run. It pays to start 4 at once. More"),
        ([20, 30, 40, 60], "It pays to start 8 at once. More were not tried."),
        ([20, 20, 19, 18], "It does not pay to start several at once."),
    ],
)
def test_how_many_runs_pay_turns(rates: list[int], said: str) -> None:
    rows = [{"runs": 2**i, "segments": 1, "segments_a_second": rate} for i, rate in enumerate(rates)]
    record = {"rows": [*rows, {"runs": 4, "segments": 2, "segments_a_second": 99.0}]}
    assert said in ch8_gpu.runs_sentence(record)
    assert cells(ch8_gpu.runs_table(record))[-1] == ["4", "2", "99.0"]


def test_gradients_in_words() -> None:
    walk = {"loss": 1e-8, "images": 1e-6, "cosine": 1.0, "targets": 1e-6, "step_size": 1e-6}
    walks = [{"what": "ieee, flip", **walk}, {"what": "ieee, crop", **walk, "images": 2e-3}]
    walks.append({"what": "float32", **walk, "loss": 1.0, "images": 1.0, "cosine": 0.5})
    record = {"walks": walks, "same": {"twice": walk}, "synchronisations": 2}
    said = ch8_gpu.gradients_sentence(record)
    assert "at most 1e-08 of themselves" in said and "at most 2e-03 of its length (in the walk 'ieee, crop')" in said
    assert "The same walk again differs by 1e-06 in that gradient. The CPU waits for the GPU 2 times" in said
    exact = record | {"same": {"twice": walk | {"images": 0.0}}}
    assert "The same walk again gives the same numbers." in ch8_gpu.gradients_sentence(exact)
    assert "5e-01" in ch8_gpu.gradients_table(record).split("\n")[-1]


@pytest.mark.parametrize(
    ("cosines", "tf32"),
    [((0.9995, 0.9999, 0.995), "passes"), ((0.9995, 0.9985, 0.998), "does not pass"), ((1, 1, 0.98), "does not pass")],
)
def test_the_gate_needs_the_median_and_the_least(cosines: tuple[float, ...], tf32: str) -> None:
    rows = [{"precision": "float32", "cosine": cosine, "images": 0.01} for cosine in cosines]
    record = {"rows": [*rows, {"precision": "bfloat16", "cosine": 0.999, "images": 0.02}]}
    assert ch8_gpu.gate_sentence(record).endswith(f"TF32 (`--precision float32`) {tf32}. bfloat16 passes.")
    assert cells(ch8_gpu.precision_table(record))[3][:2] == ["bfloat16", "1"]


# --- Runs -------------------------------------------------------------------------------------------------------


def distil_of(gap: float, *, apart: float = 0.0, finished: bool = False) -> dict[str, Any]:
    """Runs with K = 1 and 2, whose losses are `gap` higher with K = 2; its seeds lie further `apart`."""
    runs = []
    for seed in range(3):
        for k, iterations in ((1, 120 + seed), (2, 80 + seed)):
            level = 0.6 + 0.001 * seed + (k - 1) * (gap + apart * (seed - 1))
            runs.append(
                {
                    "segments": k, "seed": seed, "iterations": iterations, "finished": finished,
                    "config": as_dict(distill_recipe("mtt", "cifar10", ipc=1, segments=k)),
                    "losses": [[level + 0.3 * (i < 10)] * k for i in range(iterations)],
                    "seconds": [9.0] + [0.1] * (iterations - 1), "step_size": [0.01] * iterations,
                }
            )  # fmt: skip
    return {"runs": runs}


def test_losses_that_differ_by_less_than_their_seeds_cannot_be_told_apart() -> None:
    table = findings.gpu_losses(distil_of(0.05, apart=0.1))
    assert ch5_concurrent.equal_sentence(table, "loss") == (
        "After 120 matched segments and after 80 iterations and when they were stopped the matching loss of K=2 cannot "
        "be told apart, with these seeds, from that of K=1."
    )
    rows = ch5_concurrent.equal_table(table, "loss").split("\n")
    assert len(rows) == 5 and "+0.050 [" in rows[2] and rows[2].endswith("| 3 |")


def test_comparisons_may_differ() -> None:
    """An iteration with K = 2 lowers the loss by more than one with K = 1, and by less than two of them."""
    distil = distil_of(0.0)
    for run in distil["runs"]:
        run["losses"] = [[1 - 0.001 * i * (1 + 0.5 * (run["segments"] - 1))] for i in range(run["iterations"])]
    said = ch5_concurrent.equal_sentence(findings.gpu_losses(distil), "loss")
    assert "After 80 iterations and when they were stopped the matching loss of K=2 is lower" in said
    assert "After 120 matched segments the matching loss of K=2 is higher" in said


def test_the_curves_are_drawn_where_all_seeds_are() -> None:
    table = findings.gpu_losses(distil_of(0.0))
    figure = ch5_concurrent.curves(table, "loss")
    drawn = [[max(line.get_xdata()) for line in axis.lines if len(line.get_xdata())] for axis in figure.axes]
    assert drawn == [[120, 80], [120, 160]]
    plt.close("all")


def test_how_far_from_the_published_cell() -> None:
    experts = {"buffer": {"experts": [{}] * 20, "config": {"epochs": 3}}}
    said = ch6_cifar10.stopped_sentence(distil_of(0.0), experts)
    assert "stopped 6 of 6 runs; after 21 seconds they had 80 to 122 iterations" in said
    assert "5,000 iterations, and 100 experts of 50 epochs; these runs had 20 experts of 3 epochs" in said
    assert "stopped 0 of 6 runs" in ch6_cifar10.stopped_sentence(distil_of(0.0, finished=True), experts)
    assert len(ch6_cifar10.runs_table(distil_of(0.0)).split("\n")) == 8


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
    text = ch6_cifar10.tested(evaluated_of(gain), distil_of(0.0))
    assert f"After 100 matched segments and when they were stopped the test accuracy of K=2 is {how} than" in text
    assert f"{better} sets have a higher accuracy than any network on random real images" in text
    rows = cells(text)
    assert rows[2] == ["K=1", "100", "100", "40.1 ± 0.1", "3", "2"]
    assert rows[3] == ["K=1", "when they were stopped", "120 to 122", "40.1 ± 0.1", "3", "2"]
    assert rows[6] == ["random real images", "", "", "15.0 ± 1.4", "", "2"]
