"""Tables and sentences of chapter 8: what `make gpu` recorded of speed and precision on a GPU."""

import pandas as pd

from cddbook.findings import Record
from cddbook.tables import markdown

SIZES = {"IPC": "ipc", "N =": "steps", "images:": "images", "epochs:": "epochs"}
"""What the sizes of a measurement are called."""
GATE = {"median": 0.999, "min": 0.99}
"""Cosines to the float64 gradient that a precision has to reach to be a default."""


def _timed(speed: Record) -> pd.DataFrame:
    """A row a measurement, with its work in words, the textbook's ms for that work, and the commit."""
    columns = ["what", "way", *SIZES.values(), "segments", "ms", "least", "most"]
    table = pd.DataFrame(speed["rows"]).reindex(columns=columns)
    alone = table["what"] == "without a graph"
    table.loc[alone, ["what", "way"]] = "an iteration's gradient", "cddlib, launched one by one"
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
        "times as fast as the textbook": (table["ms_textbook"] / table["ms"]).map("{:.1f}".format, na_action="ignore"),
        "commit": table["commit"].map("`{}`".format),
    }
    return markdown(pd.DataFrame(shown))


def segments_table(speed: Record) -> str:
    """What an iteration with K segments takes by cddlib's usual way, with one image a class; Markdown."""
    table = _timed(speed).query("way == 'cddlib' and ipc == 1").sort_values("segments")
    k, ms = table["segments"], table["ms"]
    rates = {"K": k, "ms": ms, "times as long as K = 1": ms / ms.iloc[0], "segments a second": 1000 * k / ms}
    return str(pd.DataFrame(rates).to_markdown(index=False, floatfmt=(".0f", ".1f", ".2f", ".1f")))


def runs_table(at_once: Record) -> str:
    """Segments a second of several runs that share the GPU; Markdown."""
    names = {"runs": "runs at once", "segments": "K", "segments_a_second": "segments a second, of all"}
    table = pd.DataFrame(at_once["rows"])
    table["times as many as one run with K = 1"] = table["segments_a_second"] / table["segments_a_second"].iloc[0]
    return str(table.rename(columns=names).to_markdown(index=False, floatfmt=(".0f", ".0f", ".1f", ".2f")))


def gradients_table(gradients: Record) -> str:
    """How far walks on random images are from float64, and one from itself; how often the CPU waits. Markdown."""
    table = pd.DataFrame([*gradients["walks"], {"what": "the same walk again", **gradients["same"]["twice"]}])
    table = table.assign(distance=1 - table["cosine"])
    names = {"what": "walk", "loss": "loss", "images": "images' gradient", "distance": "1 − cosine of it"}
    names |= {"targets": "targets' gradient", "step_size": "step size's gradient"}
    shown = table[list(names)].rename(columns=names).to_markdown(index=False, floatfmt=".0e")
    return f"{shown}\n\nThe CPU waits for the GPU {gradients['synchronisations']} times a walk."


def precision_table(precision: Record) -> str:
    """Cosines to the float64 gradient of the images, by precision, and whether they pass the `GATE`; Markdown."""
    columns = {"walks": ("cosine", "size"), "median cosine": ("cosine", "median"), "least cosine": ("cosine", "min")}
    columns |= {"largest error of the gradient": ("images", "max")}
    table = pd.DataFrame(precision["rows"]).groupby("precision", sort=False).agg(**columns).reset_index()
    passes = (table["median cosine"] >= GATE["median"]) & (table["least cosine"] >= GATE["min"])
    table[f"at least {GATE['median']} and {GATE['min']}"] = passes.map({True: "yes", False: "no"})
    return str(table.to_markdown(index=False, floatfmt=("", "", ".5f", ".5f", ".3f")))
