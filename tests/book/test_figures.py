"""Tables and the slider say what the runs say."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cddbook.figures import ch5_concurrent, style
from cddlib.runtime.files import write_json
from cddlib.runtime.run_folder import Metrics


def test_values_are_compared_at_the_last_place_that_all_runs_share() -> None:
    curves = {"K=1": {0: 0.1, 4: 0.5, 8: 0.6}, "K=2": {0: 0.1, 2: 0.6, 4: 0.8}}
    rows = [
        (variant, seed, i, int(variant[-1]) * i, accuracy + seed / 100)
        for variant, curve in curves.items()
        for seed in (0, 1)
        for i, accuracy in curve.items()
    ]
    table = pd.DataFrame(rows, columns=["variant", "seed", "iteration", "matched", "accuracy"])
    assert ch5_concurrent.equal_table(table, "accuracy").splitlines()[2:] == [
        "| after 8 matched segments | 60.5 ± 0.7 | 80.5 ± 0.7 | +20.0 [+20.0, +20.0] | 2 |",
        "| after 4 iterations | 50.5 ± 0.7 | 80.5 ± 0.7 | +30.0 [+30.0, +30.0] | 2 |",
    ]
    early = table[table["matched"] < 4]  # the start is no place to compare at
    assert len(ch5_concurrent.equal_table(early, "accuracy").splitlines()) < 3


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
