"""The book's tables of methods, made from `cddlib.methods` and from records while the book is built."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cddlib.data import DATA_NAMES
from cddlib.files import read_record
from cddlib.methods import METHODS, REFERENCES, Method
from cddlib.recipes import CELLS, Accuracy, accuracies, read_accuracies, recipes_table

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
    """The fields that the method's rows set."""
    return method.cells.strip().splitlines()[0].split()[2:]


def published_table(data: str) -> str:
    """Published test accuracies on a data set, in percent; their sources below."""
    found = {name: [a for a in accuracies(name) if a.data == data] for name in METHODS}
    for line in REFERENCES.strip().splitlines():
        name, _, rest = line.strip().partition(" ")
        found[TITLES[name]] = [*found.get(TITLES[name], []), *(a for a in read_accuracies(rest) if a.data == data)]
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
