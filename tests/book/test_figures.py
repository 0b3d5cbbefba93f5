"""Tables and the slider say what the runs say."""

import matplotlib.pyplot as plt
import pandas as pd

from cddbook.figures import ch5_concurrent, style


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
    frames = {}
    for value in (1, 2):
        frames[value] = plt.figure(figsize=(1, 1))
    html = style.slider(frames, {1: 'a "quoted" alt', 2: "b"}, label="K", name="turn")
    assert html.count("<figure") == 2 and html.count(" hidden>") == 1
    assert "a &quot;quoted&quot; alt" in html and "http" not in html
    assert not any(plt.fignum_exists(figure.number) for figure in frames.values())
