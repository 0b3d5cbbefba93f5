"""The book's tables in Markdown: methods, and what records say. Most are made while the book is built."""

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from cddbook import correlation, findings
from cddbook.findings import SETTLED, ComparedRun, Correlations, Record, effect, paired
from cddbook.records import read_record
from cddbook.study import settings_by_accuracy
from cddlib.methods.catalogue import METHODS, Method
from cddlib.methods.recipes import CELLS, ROWS, distill_recipe, recipes_table
from cddlib.networks.convnet import ConvNet
from cddlib.plan import buffer_of, plan
from cddlib.runtime.config import config_hash
from cddlib.training.engine import operations


def markdown(rows: Iterable[Mapping[str, Any]] | pd.DataFrame) -> str:
    """A table in Markdown; every row has its cells by the column's title, and a missing one is empty."""
    return pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True, stralign=None, numalign=None)


def mean_sd(values: Sequence[float] | pd.Series, *, scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation of `scale` times the values; of a single value, that one; of none, –."""
    numbers = pd.Series(values)
    if not numbers.count():
        return "–"
    spread = f" ± {scale * numbers.std():.{digits}f}" if numbers.count() > 1 else ""
    return f"{scale * numbers.mean():.{digits}f}{spread}"


def methods_table() -> str:
    """What the configuration of every method sets that its base's does not."""
    return markdown({"method": f"`{m.name}`", "sets": _settings(m)} for m in METHODS.values())


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


def recipes_by_method() -> str:
    """Every recipe, folded away by method."""
    return "\n\n".join(f":::{{dropdown}} `{name}`\n{recipes_table(name)}\n:::" for name in METHODS)


def published() -> pd.DataFrame:
    """Test accuracies that were published, in percent: a row a `method` (or random_real), `data` set and `ipc`."""
    return pd.read_csv(Path(__file__).with_name("published.csv"))


def published_tables() -> str:
    """Published test accuracies, in percent, of every data set that has some; a table's sources below it."""
    titles = {**{name: f"`{name}`" for name in METHODS}, "random_real": "random real images"}
    blocks = []
    for data, table in published().groupby("data", sort=False):
        sources = sorted(table["source"].unique())
        spread = table["std"].map(" ± {:g}".format, na_action="ignore").fillna("")
        number = table["source"].map({source: f" <sup>{number}</sup>" for number, source in enumerate(sources, 1)})
        table = table.assign(cell=table["mean"].map("{:.1f}".format) + spread + number)
        cells = table.pivot(index="method", columns="ipc", values="cell").reindex(columns=CELLS[data])
        cells = cells.loc[[name for name in titles if name in cells.index]].rename(titles)
        notes = "; ".join(f"{number} {source}" for number, source in enumerate(sources, 1))
        shown = cells.rename(columns="IPC {}".format).rename_axis(data).reset_index()
        blocks.append(f"{markdown(shown)}\n\nSources: {notes}.")
    return "\n\n".join(blocks)


BENCHMARK = ("cifar10", "cifar100", "tiny_imagenet", "imagenet")
"""The paper's data sets."""


def benchmark_runs(studies: Mapping[str, Sequence[ComparedRun]], buffers: Iterable[Record]) -> pd.DataFrame:
    """A row a K of comparisons on `BENCHMARK`, given by what makes them: test accuracy, what it depends on and took.

    `buffers` are the records of the experts that they matched.
    """
    trained = {config_hash(record["buffer"]): record["buffer"]["config"] for record in buffers}
    fields = {"data": "data", "ipc": "IPC", "width": "width", "student_steps": "N", "iterations": "updates"}
    rows = []
    for command, runs in studies.items():
        for run in runs:
            row = {title: run.config[field] for field, title in fields.items()}
            row |= {"K": run.variant, "made by": f"`{command}`", "hardware": run.result["device"]}
            row |= {"test": np.mean(run.own["synthetic"]), "hours": run.result["seconds"] / 3600}
            rows.append({**row, "experts": "{experts} of {epochs} epochs".format_map(trained[run.config["buffer_id"]])})
    words = {
        "updates": ("updates", lambda found: " to ".join(f"{n:,}" for n in sorted({found.min(), found.max()}))),
        "sets": ("test", "size"),
        "test accuracy, %": ("test", functools.partial(mean_sd, scale=100.0)),
        "hours": ("hours", lambda found: f"{found.sum():.1f}"),
        "hardware": ("hardware", lambda found: ", ".join(found.unique())),
    }
    cell = ["data", "IPC", "width", "N", "experts", "K"]
    table = pd.DataFrame(rows).groupby([*cell, "made by"], sort=False).agg(**words).reset_index()
    return table[[*cell, *words, "made by"]]


def benchmark_table(runs: pd.DataFrame, speed: Record) -> str:
    """Every cell of the paper's benchmark: what was published, what `runs` measured, and what DATM's recipe would take.

    The hours are those of the GPU in the record `speed`, at the rate at which it trains experts of the usual ConvNet.
    """
    measured: dict[tuple[str, int], list[str]] = {}
    apart = ["data", "IPC", "width", "hardware", "made by"]
    for (data, ipc, width, device, _), mine in runs.groupby(apart, sort=False):
        tested = ", ".join(f"{row['K']} {row['test accuracy, %']}" for row in mine.to_dict("records"))
        measured.setdefault((data, ipc), []).append(f"{tested} (width {width}, {device})")
    (epoch,) = (row for row in speed["rows"] if row["what"] == "an expert's epoch")
    network = ConvNet(distill_recipe("datm", "cifar10", 1).network, (3, 32, 32), 10)
    rate = 3 * operations(network) * epoch["images"] / epoch["ms"] * 1000  # a step costs three forward passes
    names = ["random_real", "mtt", "tesla", "ftd", "datm"]
    cells = published().pivot(index=["data", "ipc"], columns="method", values="mean")
    table = cells.reindex([(data, ipc) for data in BENCHMARK for ipc in CELLS[data]], columns=names)
    table = table.rename_axis(["data", "IPC"]).map("{:.1f}".format, na_action="ignore")
    table["measured here"] = ["<br>".join(measured.get(cell, ["not run"])) for cell in table.index]
    recipes = [distill_recipe("datm", *cell) for cell in table.index]
    costs = [sum(stage.flops for stage in plan(buffer_of(config), config, measure=False)) for config in recipes]
    table["DATM would take, hours"] = [f"{cost / rate / 3600:,.0f}" for cost in costs]
    return markdown(table.rename(columns={"random_real": "random real"}).reset_index())


def measured_table() -> str:
    """Test accuracies of every method on the digits, from the committed records ``method-digits-*.json``."""
    rows = []
    for name in METHODS:
        record = read_record(f"method-digits-{name}")
        config, evaluation = record["config"], record["evaluations"][0]
        row = {"method": f"`{name}`", "IPC": config["ipc"], "K": config["segments"], "iterations": config["iterations"]}
        for kind, title in (("synthetic", "distilled (%)"), ("random_real", "random real (%)")):
            accuracies = evaluation["accuracies"][kind]
            row[title] = f"{mean_sd(accuracies, scale=100.0)} ({len(accuracies)})"
        rows.append({**row, "seconds": f"{record['result']['seconds']:.0f}"})
    device = f"{evaluation['device']}, {evaluation['threads']} thread, torch {evaluation['versions']['torch']}"
    return markdown(rows) + f"\n\nMeasured on: {device}."


def plan_table() -> str:
    """What `cddlib plan` said and what runs took, from the committed record ``plan.json``."""
    record = read_record("plan")
    rows = []
    for run in record["runs"]:
        for stage, took in run["measured"].items():
            planned = run["planned"][stage]
            row = {"run": run["what"], "stage": stage, "planned (s)": f"{planned:.1f}", "took (s)": f"{took:.1f}"}
            rows.append({**row, "off by": f"{planned / took - 1:+.0%}"})
    return markdown(rows) + f"\n\nMeasured on: {record['device']}, {record['threads']} thread."


SETTINGS = ["{data}", "IPC {ipc}", "{experts} experts", "{epochs} epochs", "{images} images", "width {width}"]
SETTINGS += ["{precision}", "N = {student_steps}", "M = {expert_epochs}", "window [{window_start}, {window_end})"]
SETTINGS += ["{iterations} iterations or segments", "image rate {lr_images:g}", "α {step_size:g}"]
SETTINGS += ["{evaluation_epochs} epochs of a test"]
"""What `provenance` says of a configuration that has these fields."""


def provenance(records: Mapping[str, Record]) -> str:
    """What records, given by name, are of, and where, when and by which code they were made; a Markdown list."""
    lines = []
    for name, record in records.items():
        runs, buffer = record.get("runs", []), record.get("buffer", {})
        results = [run["result"] for run in runs.values()] if isinstance(runs, dict) else [record.get("result", record)]
        config: Record = record.get("config", buffer.get("config", {}))
        said, made = [f"{len(runs)} runs"] if runs else [], results[0]
        for words in SETTINGS:
            with contextlib.suppress(KeyError):
                said.append(words.format_map(config))
        if buffer:
            said.append(f"test accuracy {mean_sd([e['test_accuracy'] for e in buffer['experts']], scale=100.0)} %")
        said.append(f"{math.fsum(result['seconds'] for result in results) / 60:.1f} minutes on {made['device']}")
        said += [f"threads: {made['threads']}", f"PyTorch {made['versions']['torch']}"]
        commits = sorted({f"`{row.get('commit', made['commit'])[:7]}`" for row in record.get("rows", results)})
        lines.append(f"- {name}: {', '.join(said)}, commit {' and '.join(commits)}.")
    return "\n".join(lines)


def negative_table(studies: Mapping[str, Correlations]) -> str:
    """Markdown: share of negative pairs below and above the diagonal, mean ± standard error, a row a measure."""
    rows = []
    for name, study in studies.items():
        measures = {
            "correlation of losses (the paper's)": study.pearson(),
            f"fall of the loss from measurement {SETTLED + 1} on": -study.net_change(),
            "cosine of gradients, first images": study.cosines("sequential", 0),
            "cosine of gradients, last images": study.cosines("sequential", -1),
        }
        for measure, matrices in measures.items():
            shares = correlation.negative_shares(matrices, study.below)
            said = (f"{x.mean():.0%} ± {scipy.stats.sem(x):.0%}" for x in shares)
            off, on = (x.mean(axis=1) for x in (correlation.off_diagonal(matrices), np.einsum("rii->ri", matrices)))
            rows.append((name, measure, *said, *(f"{x.mean():+.2f} ± {scipy.stats.sem(x):.2f}" for x in (off, on))))
    titles = ["study", "what is negative", "below the diagonal", "above the diagonal", "mean off the diagonal", "on it"]
    return markdown(pd.DataFrame(rows, columns=titles))


def transient_table(records: Mapping[str, Record]) -> str:
    """Markdown: C3's change of earlier segments' losses, by how many measurements are left out."""
    rows = []
    for name, record in records.items():
        row = {"study": name}
        for skip in (0, SETTLED, 10):
            study = findings.correlations(record, skip)
            changed = effect(study.net_change()[..., study.below].mean(axis=1))
            row[f"{skip} left out"] = changed.shown(100.0, 1)
        rows.append(row)
    return markdown(rows)


def comparison_table(record: Record) -> str:
    """Markdown of `findings.comparison`: a row a variant, mean ± standard deviation over seeds; and the baselines."""
    columns = {"test": ("test accuracy, %", 100.0, 1), "error": ("ε / way", 1.0, 3)}
    columns |= {"forgetting": ("forgetting", 1.0, 3), "backward": ("backward transfer", 1.0, 3)}
    table = findings.comparison(record)
    runs = table.groupby("variant", observed=True)
    shown = {key: how for key, how in columns.items() if table[key].notna().any()}
    means = {title: runs[key].agg(mean_sd, scale=by, digits=digits) for key, (title, by, digits) in shown.items()}
    rows = pd.DataFrame(means).reset_index().to_dict("records")
    for name, accuracies in findings.baselines(record).items():
        said = f"{name} ({len(accuracies)} networks)"
        rows.append({"variant": said, "test accuracy, %": mean_sd(accuracies, scale=100.0)})
    seeds = table["seed"].nunique()
    note = f"Mean ± standard deviation over {seeds} distillations" if seeds > 1 else "One distillation of each"
    note += ", at equal compute."
    for key in ("forgetting", "backward"):  # where every stage visits the probes, none is left behind
        counts = runs[key].count().items() if key in shown else []
        if few := [f"{name} in {number} of {seeds} seeds" for name, number in counts if number < seeds]:
            note += f" {columns[key][0].capitalize()} can be computed for {', '.join(few)}."
    if first := table["undistilled"].sum():
        note += f" Of {first} of {len(table)} runs the best set, by validation, was the one before the first iteration."
    return f"{markdown(rows)}\n\n{note}"


def paired_table(title: str, tables: Mapping[str, pd.DataFrame], column: str = "test") -> str:
    """Accuracies in percent, a line for each of `tables`, in Markdown; the first column is called `title`.

    Mean ± standard deviation over seeds of every variant; and the last minus the first with its 95 % interval.
    """
    rows = []
    for name, table in tables.items():
        first, *_, last = table["variant"].unique()
        means = table.groupby("variant", sort=False)[column].agg(mean_sd, scale=100.0)
        ahead = paired(table, column, last, first)
        difference = {f"{last} minus {first} [95 % interval]": ahead.shown(100.0, 1), "seeds": ahead.count}
        rows.append({title: name, **means, **difference})
    return markdown(rows)


def search_table(searches: Mapping[str, Record]) -> str:
    """Validation accuracies of every setting that searches, given by name, tried, from the best to the worst."""
    rows = []
    for name, record in searches.items():
        for setting, accuracies in settings_by_accuracy(record).items():
            row = {"search": name, "setting": setting.replace(",", ", "), "seeds": len(accuracies)}
            rows.append({**row, "validation accuracy, %": mean_sd(accuracies, scale=100.0)})
    return markdown(rows)


def rates_table(searches: Sequence[Record], used: Mapping[str, Any]) -> str:
    """The setting that is best on validation images, a row a search, and beside it the one that a study `used`."""
    rows = []
    for record in searches:
        settings, config = settings_by_accuracy(record), record["config"]
        best = next(iter(settings))
        fields = [part.split("=")[0] for part in best.split(",")]
        same = ",".join(f"{field}={used[field]}" for field in fields)
        row = {"window": f"[0, {config['window_end']})", "K": config["segments"], "settings": len(settings)}
        row |= {"seeds": len(settings[best]), "best setting": best.replace(",", ", ")}
        row["its validation accuracy, %"] = mean_sd(settings[best], scale=100.0)
        rows.append({**row, f"with {same.replace(',', ', ')}, %": mean_sd(settings[same], scale=100.0)})
    return markdown(rows)
