"""Tables and sentences of chapter 8: what `make gpu` recorded of speed and precision on a GPU."""

from typing import Any

import pandas as pd

from cddbook.findings import Record
from cddbook.tables import markdown

OWN = ("cddlib", "cddlib, each kernel as the compiler makes it")
"""cddlib's usual way on a GPU, compiled and replayed as a graph: now, and before its kernels were combined."""
APART = "cddlib, launched one by one"
"""The same compiled steps without a graph."""
SIZES = {"IPC": "ipc", "N =": "steps", "images:": "images", "epochs:": "epochs"}
"""What the sizes of a measurement are called."""
GATE = {"median": 0.999, "min": 0.99}
"""Cosines to the float64 gradient that a precision has to reach to be a default."""


def _timed(speed: Record) -> pd.DataFrame:
    """A row a measurement, with its work in words, the textbook's ms for that work, and the commit."""
    columns = ["what", "way", *SIZES.values(), "segments", "ms", "least", "most"]
    table = pd.DataFrame(speed["rows"]).reindex(columns=columns)
    table.loc[table["what"] == "without a graph", ["what", "way"]] = "an iteration's gradient", APART
    table["work"] = [
        ", ".join([row["what"], *(f"{word} {row[size]:,.0f}" for word, size in SIZES.items() if pd.notna(row[size]))])
        for row in table.to_dict("records")
    ]
    table["segments"] = table["segments"].fillna(1).astype(int)
    table["commit"] = [row.get("commit", speed["commit"])[:7] for row in speed["rows"]]
    theirs = table[table["way"] == "textbook"].drop_duplicates(["work", "segments"])
    return table.merge(theirs[["work", "segments", "ms"]], "left", ["work", "segments"], suffixes=("", "_textbook"))


def speed_table(speed: Record) -> str:
    """Milliseconds of everything with one segment, and how many times as fast as the textbook's way; Markdown."""
    table = _timed(speed).query("segments == 1")
    table = table.sort_values("work", key=lambda work: pd.Series(pd.factorize(work)[0], work.index), kind="stable")
    shown = {
        "work": table["work"],
        "way": table["way"],
        "ms": table["ms"].map("{:.1f}".format),
        "least to most": table["least"].map("{:.1f} to ".format) + table["most"].map("{:.1f}".format),
        "times as fast as the textbook": (table["ms_textbook"] / table["ms"]).map("{:.1f}".format).replace("nan", ""),
        "commit": table["commit"].map("`{}`".format),
    }
    return markdown(pd.DataFrame(shown))


COMPARED = {
    ("cddlib",): (("textbook",), "a segment's gradient", "the textbook's way"),
    OWN: ((APART,), "a walk as one graph", "the same steps launched one by one"),
    ("cddlib, bfloat16",): (OWN, "a gradient in bfloat16", "in float32"),
}
"""Ways, the others that each is compared with, and both in words."""


def faster_sentences(speed: Record) -> str:
    """How times for the same work compare: those of the same commit, unless they are beside the textbook's."""
    table, said = _timed(speed), []
    for ways, (others, what, whose) in COMPARED.items():
        same = ["work", "segments"] + ["commit"] * (others != ("textbook",))
        theirs = table.loc[table["way"].isin(others), [*same, "ms"]]
        pairs = table[table["way"].isin(ways)].merge(theirs, on=same, suffixes=("", "_other"))
        for row in pairs.query("segments == 1").to_dict("records"):
            ratio = row["ms_other"] / row["ms"]
            much = f"{ratio:.1f} times as fast as" if ratio > 1 else f"{1 / ratio:.1f} times as slow as"
            much = "about as fast as" if 0.95 < ratio < 1.05 else much
            work = f"With IPC {row['ipc']:.0f} and N = {row['steps']:.0f}"
            said.append(f"{work} {what} takes {row['ms']:.0f} ms, {much} {whose} ({row['ms_other']:.0f} ms).")
    return " ".join(said)


def _segments(speed: Record) -> pd.DataFrame:
    """Of cddlib's way with one image a class: K, its ms, and how many times as long as K = 1 that is."""
    table = _timed(speed).query("way == @OWN[0] and ipc == 1").sort_values("segments")
    return table.assign(times=table["ms"] / table["ms"].iloc[0], rate=1000 * table["segments"] / table["ms"])


def segments_table(speed: Record) -> str:
    """What an iteration with K segments takes; Markdown."""
    names = {"segments": "K", "ms": "ms", "times": "times K = 1", "rate": "segments a second"}
    rows = _segments(speed)[list(names)].rename(columns=names)
    return str(rows.to_markdown(index=False, floatfmt=(".0f", ".1f", ".2f", ".1f")))


def segments_sentence(speed: Record) -> str:
    """Whether K segments as branches of one graph take less than K times as long as one."""
    times = _segments(speed).set_index("segments")["times"].drop(1)
    cheap = [f"K = {k}" for k, ratio in times.items() if ratio < 0.9 * k]
    which = "Every K" if len(cheap) == len(times) else " and ".join(cheap) or "No K"
    parts = ", ".join(f"K = {k} takes {ratio:.1f} times" for k, ratio in times.items())
    saves = "is more than a tenth faster than its segments one after the other would be"
    return f"{parts} as long as K = 1. {which} {saves}."


def runs_table(at_once: Record) -> str:
    """Segments a second of several runs that share the GPU; Markdown."""
    names = {"runs": "runs at once", "segments": "K", "segments_a_second": "segments a second, of all"}
    table = pd.DataFrame(at_once["rows"]).rename(columns=names)
    return str(table.to_markdown(index=False, floatfmt=(".0f", ".0f", ".1f")))


def runs_sentence(at_once: Record) -> str:
    """How many runs with K = 1 are worth starting at once."""
    rates = pd.DataFrame(at_once["rows"]).query("segments == 1").set_index("runs")["segments_a_second"]
    rates /= rates[1]
    enough = int(rates[rates >= 0.95 * rates.max()].index.min())
    parts = ", ".join(f"{count} runs match {rate:.1f} times" for count, rate in rates.items() if count > 1)
    more = "More gain nothing" if enough < rates.index.max() else "More were not tried"
    worth = f"It pays to start {enough} at once. {more}" if enough > 1 else "It does not pay to start several at once"
    return f"{parts} as many segments a second as one run. {worth}."


def gradients_table(gradients: Record) -> str:
    """How far whole walks on random images are from float64; Markdown."""
    table = pd.DataFrame(gradients["walks"]).assign(distance=lambda rows: 1 - rows["cosine"])
    names = {"what": "walk", "loss": "loss", "images": "images' gradient", "distance": "1 − cosine of it"}
    names |= {"targets": "targets' gradient", "step_size": "step size's gradient"}
    return str(table[list(names)].rename(columns=names).to_markdown(index=False, floatfmt=".0e"))


def gradients_sentence(gradients: Record) -> str:
    """The largest errors where float32 is multiplied, whether a walk repeats itself, and how often the CPU waits."""
    table = pd.DataFrame(gradients["walks"])
    ieee = table[table["what"].str.startswith("ieee")]
    worst, again = ieee.loc[ieee["images"].idxmax()], gradients["same"]["twice"]["images"]
    return (
        f"With `--precision ieee` losses are off by at most {ieee['loss'].max():.0e} of themselves, and the images' "
        f"gradient by at most {worst['images']:.0e} of its length (in the walk '{worst['what']}'). The same walk again "
        + (f"differs by {again:.0e} in that gradient." if again else "gives the same numbers.")
        + f" The CPU waits for the GPU {gradients['synchronisations']} times a walk."
    )


def precision_table(precision: Record) -> str:
    """Cosines to the float64 gradient of the images, by precision; Markdown."""
    found = pd.DataFrame(precision["rows"]).groupby("precision", sort=False)
    columns: dict[str, Any] = {"walks": found.size(), "median cosine": found["cosine"].median()}
    columns |= {"least cosine": found["cosine"].min(), "largest error of the gradient": found["images"].max()}
    table = pd.DataFrame(columns).reset_index()
    return str(table.to_markdown(index=False, floatfmt=("", "", ".5f", ".5f", ".3f")))


def gate_sentence(precision: Record) -> str:
    """Whether TF32 and bfloat16 may be defaults."""
    table = pd.DataFrame(precision["rows"]).groupby("precision")["cosine"].agg(list(GATE))
    passed = (table >= pd.Series(GATE)).all(axis=1)
    names = {"float32": "TF32 (`--precision float32`)", "bfloat16": "bfloat16"}
    parts = [f"{name} {'passes' if passed[key] else 'does not pass'}." for key, name in names.items() if key in passed]
    gate = f"a median cosine of {GATE['median']} and a least cosine of {GATE['min']}"
    return f"The gate for a default was set before the measurement: {gate}. {' '.join(parts)}"
