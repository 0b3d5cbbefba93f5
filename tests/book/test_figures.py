"""Tables and the slider say what the runs say."""

import matplotlib.pyplot as plt
import pandas as pd

from cddbook.figures import ch5_concurrent as concurrent
from cddbook.figures import style


def runs(accuracies: dict[int, dict[int, float]]) -> pd.DataFrame:
    """Two seeds of every K; the second is a point better."""
    rows = [
        {"segments": k, "seed": seed, "iteration": i, "matched": i * k, "seconds": 0.1 * k, "accuracy": a + seed / 100}
        for k, curve in accuracies.items()
        for seed in (0, 1)
        for i, a in curve.items()
    ]
    return pd.DataFrame(rows)


def test_equal_compute_takes_what_was_validated_within_the_budget():
    table = concurrent.accuracy_table(runs({1: {0: 0.1, 4: 0.5, 8: 0.6}, 2: {0: 0.1, 4: 0.7, 8: 0.8}}))
    assert "after 8 iterations | after at most 8 matched segments" in table
    one, two = table.splitlines()[-2:]
    assert one.startswith("| 1 | 60.5% ± 0.7% (8) | 60.5% ± 0.7% (8) |")
    assert two.startswith(
        "| 2 | 80.5% ± 0.7% (16)<br>+20.0 ± 0.0 points | 70.5% ± 0.7% (8)<br>+10.0 ± 0.0 points | 0.200 |"
    )


def test_the_start_is_not_taken_for_an_iterate():
    table = concurrent.accuracy_table(runs({1: {0: 0.1, 4: 0.5}, 8: {0: 0.1, 4: 0.9}}))
    assert "not validated that early" in table.splitlines()[-1]


def test_slider_shows_one_frame_and_escapes_words():
    frames = {}
    for value in (1, 2):
        frames[value] = plt.figure(figsize=(1, 1))
    html = style.slider(frames, {1: 'a "quoted" alt', 2: "b"}, label="K", name="turn")
    assert html.count("<figure") == 2 and html.count(" hidden>") == 1
    assert "a &quot;quoted&quot; alt" in html and "http" not in html
    assert not any(plt.fignum_exists(figure.number) for figure in frames.values())


def test_accuracies_in_words():
    assert concurrent.accuracies_in_words({"a": [0.5, 0.7], "b": [0.25]}) == (
        "Test accuracy in percent, mean ± standard deviation over 1 or 2 networks: a 60.0 ± 14.1; b 25.0."
    )
