"""The book's tables of methods, made from `cddlib.methods.catalogue` and from records while the book is built."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cddbook import correlation
from cddbook.findings import Correlations, Record, effect
from cddbook.records import read_record
from cddlib.data.dataset import DATA_NAMES
from cddlib.methods.catalogue import METHODS, Method
from cddlib.methods.recipes import CELLS, ROWS, recipes_table


class Accuracy(NamedTuple):
    """A published test accuracy, in percent."""

    data: str
    ipc: int
    mean: float
    std: float | None
    source: str


def accuracies(method: str) -> list[Accuracy]:
    """The accuracies that were published for a method, or for `random_real`: real images under the same protocol."""
    published = pd.read_csv(Path(__file__).with_name("published.csv")).replace({np.nan: None})
    mine = published[published["method"] == method].drop(columns="method")
    return [Accuracy(*row) for row in mine.itertuples(index=False)]


def negative_table(studies: Mapping[str, Correlations]) -> str:
    """Markdown: share of negative pairs below and above the diagonal, mean ± standard error, a row a measure."""
    lines = [
        "| study | what is negative | below the diagonal | above the diagonal | mean off the diagonal |",
        "|---|---|---|---|---|",
    ]
    for name, study in studies.items():
        measures = {
            "correlation of losses (the paper's)": study.pearson(),
            "correlation of their changes": study.pearson(changes=True),
            "what a loss has fallen in the end": -study.net_change(),
            "cosine of gradients, first images": study.cosines("sequential", 0),
            "cosine of gradients, last images": study.cosines("sequential", -1),
        }
        for measure, matrices in measures.items():
            below, above = zip(*[correlation.negative_shares(matrix) for matrix in matrices], strict=True)
            off = [float(correlation.off_diagonal(matrix).mean()) for matrix in matrices]
            shares = [f"{np.mean(side):.0%} ± {_standard_error(side):.0%}" for side in (below, above)]
            lines.append(
                f"| {name} | {measure} | {shares[0]} | {shares[1]} | {np.mean(off):+.2f} ± {_standard_error(off):.2f} |"
            )
    return "\n".join(lines)


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; nan for a single value."""
    found = effect(values)
    return found.std / math.sqrt(found.count)


TITLES = {"random_real": "random real images"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods_table() -> str:
    """Every method: its idea, its loss, and what its configuration sets that its base's does not."""
    rows = [[f"`{m.name}`<br>{m.paper}", m.idea, m.loss, _settings(m)] for m in METHODS.values()]
    return table(["method", "idea", "loss", "sets"], rows)


def _settings(method: Method) -> str:
    """The base; what the method sets on every data set; and which fields its rows set that the base's do not."""
    if method.base is None:
        return "everything that the others take over"
    fixed = [f"`{field}={value!r}`" for field, value in method.settings.items()]
    own = [f"`{field}`" for field in _columns(method) if field not in _columns(method.base)]
    return f"on `{method.base.name}`: " + ", ".join(fixed + [f"by cell {', '.join(own)}"] * bool(own))


def _columns(method: Method) -> list[str]:
    """The fields that the method's rows set, except those found by search."""
    rows = [row for (name, _, _), row in ROWS.items() if name == method.name and row.kind != "searched"]
    return list(dict.fromkeys(field for row in rows for field in row.values))


def published_table(data: str) -> str:
    """Published test accuracies on a data set, in percent; their sources below."""
    names = {**{name: name for name in METHODS}, **TITLES}
    found = {title: [a for a in accuracies(name) if a.data == data] for name, title in names.items()}
    found = {name: values for name, values in found.items() if values}
    sources = sorted({a.source for values in found.values() for a in values})
    rows = [
        [f"`{name}`" if name in METHODS else name, *(_cell(values, ipc, sources) for ipc in CELLS[data])]
        for name, values in found.items()
    ]
    notes = "; ".join(f"{number} {source}" for number, source in enumerate(sources, 1))
    return table([data, *(f"IPC {ipc}" for ipc in CELLS[data])], rows) + f"\n\nSources: {notes}."


def _cell(values: list[Accuracy], ipc: int, sources: list[str]) -> str:
    for a in values:
        if a.ipc == ipc:
            spread = "" if a.std is None else f" ± {a.std:g}"
            return f"{a.mean:.1f}{spread} <sup>{sources.index(a.source) + 1}</sup>"
    return ""


def published_tables() -> str:
    """All of them, one after the other."""
    return "\n\n".join(
        published_table(data) for data in DATA_NAMES if data in ("cifar10", "cifar100", "tiny_imagenet", "imagenet")
    )


def measured_table(results: Path) -> str:
    """Test accuracies of every method on the digits, from the committed records ``method-digits-*.json``."""
    rows = []
    for name in METHODS:
        path = results / f"method-digits-{name}.json"
        record = read_record(path)
        config, evaluation = record["config"], record["evaluations"][0]
        cells = [f"`{name}`", str(config["ipc"]), str(config["segments"]), str(config["iterations"])]
        for kind in ("synthetic", "random_real"):
            s = evaluation["summary"][kind]
            cells.append(f"{100 * s['mean']:.1f} ± {100 * s['std']:.1f} ({s['runs']})")
        rows.append([*cells, f"{record['result']['seconds']:.0f}"])
    device = f"{evaluation['device']}, {evaluation['threads']} thread, torch {evaluation['versions']['torch']}"
    header = ["method", "IPC", "K", "iterations", "distilled (%)", "random real (%)", "seconds"]
    return table(header, rows) + f"\n\nMeasured on: {device}."


def plan_table(results: Path) -> str:
    """What `cddlib plan` said and what runs took, from the committed record ``plan.json``."""
    record = read_record(results / "plan.json")
    rows = [
        [run["what"], stage, f"{run['planned'][stage]:.1f}", f"{took:.1f}", f"{run['planned'][stage] / took - 1:+.0%}"]
        for run in record["runs"]
        for stage, took in run["measured"].items()
    ]
    header = ["run", "stage", "planned (s)", "took (s)", "off by"]
    return table(header, rows) + f"\n\nMeasured on: {record['device']}, {record['threads']} thread."


def streaming_table(results: Path) -> str:
    """What streaming a folder took, and what a mapped cache holds in memory, from the record ``streaming.json``."""
    record = read_record(results / "streaming.json")
    streamed, mapped = record["streamed"], record["mapped"]
    few, whole, resumed = (streamed[name] for name in ("few", "whole", "resumed"))
    rows = [
        [f"{part['images']:,} images into the cache", f"{part['seconds']:.0f}", f"{_peak(part):.0f}"]
        for part in (few, whole)
    ]
    rows.append(
        [f"resumed after being killed at {resumed['durable_images']:,}, same bytes", f"{resumed['seconds']:.0f}", ""]
    )
    last = mapped["fingerprint"]
    rows.append([f"a cache of {record['config']['mapped_gb']:g} GB, all of it read", "", f"{last['anonymous_mb']:.0f}"])
    rows.append(["before it was opened", "", f"{mapped['before']['anonymous_mb']:.0f}"])
    header = ["what", "seconds", "memory, without mapped files (MB)"]
    return table(header, rows) + f"\n\nMeasured on: {record['device']}, {streamed['workers']} processes."


def _peak(part: dict[str, Any]) -> float:
    return part["peak_anonymous"]["all_shared_once_mb"]


def recipes_by_method() -> str:
    """Every recipe, folded away by method."""
    return "\n\n".join(f":::{{dropdown}} `{name}`\n{recipes_table(name)}\n:::" for name in METHODS)


def _effect_cell(values: pd.Series, *, scale: float, digits: int) -> str:
    if values.isna().all():
        return "–"
    spread = f" ± {scale * values.std():.{digits}f}" if values.count() > 1 else ""
    return f"{scale * values.mean():.{digits}f}{spread}"


def comparison_table(table: pd.DataFrame) -> str:
    """Markdown of `findings.comparison`: a row a variant, mean ± standard deviation over seeds."""
    columns = {
        "test": ("test accuracy, %", 100.0, 1),
        "error": ("ε / way", 1.0, 3),
        "forgetting": ("forgetting", 1.0, 3),
        "backward": ("backward transfer", 1.0, 3),
        "events": ("events, %", 100.0, 0),
        "wall": ("matching, s", 1.0, 1),
        "memory": ("memory, MB", 1.0, 0),
    }
    lines = [
        "| variant | " + " | ".join(title for title, _, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for variant, mine in table.groupby("variant", sort=False, observed=True):
        cells = [_effect_cell(mine[key], scale=scale, digits=digits) for key, (_, scale, digits) in columns.items()]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    seeds = table["seed"].nunique()
    note = (
        f"Mean ± standard deviation over {seeds} distillations, at equal compute. Memory is the peak of the process, "
        "with data and validation: a run's own only if it had a process of its own, as in the records, not in the "
        "runs of this build."
    )
    return "\n".join([*lines, "", note])


def baselines_in_words(record: Record) -> str:
    """Test accuracy of networks trained on random real images and on all training images, under the same protocol."""
    found: dict[str, list[float]] = {"random_real": [], "full": []}
    for run in record["runs"].values():
        for entry in run["evaluations"]:
            for key, values in found.items():
                values += entry[key]
    parts = [
        f"{name} {100 * np.mean(found[key]):.1f} ± {100 * np.std(found[key], ddof=1):.1f} ({len(found[key])} networks)"
        for key, name in (("random_real", "random real images"), ("full", "all training images for as many steps"))
    ]
    return "Test accuracy in percent under the same protocol: " + "; ".join(parts) + "."


def provenance_in_words(record: Record) -> str:
    """Where and for how long the runs of a study ran."""
    results: list[dict[str, Any]] = [run["result"] for run in record["runs"].values()]
    seconds = math.fsum(result["seconds"] for result in results)
    config, first = record["config"], results[0]
    commit = (first["commit"] or "unknown")[:12]
    return (
        f"{len(results)} runs, {seconds / 60:.0f} minutes of distillation in all; threads a run: {first['threads']}, "
        f"{first['device']}, torch {first['versions']['torch']}, commit `{commit}`; {config['data']}, "
        f"IPC {config['ipc']}, width {config['width']}, N = {config['student_steps']}, M = {config['expert_epochs']}, "
        f"window [{config['window_start']}, {config['window_end']})."
    )
