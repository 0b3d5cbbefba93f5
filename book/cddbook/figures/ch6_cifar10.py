"""Figures and tables of chapter 6: runs of CIFAR-10 on a CPU, and those that `make gpu` began on a GPU."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cddbook.figures.style import MARKERS, band
from cddbook.findings import Effect, Record, effect
from cddbook.tables import markdown, mean_sd
from cddlib.methods.recipes import buffer_recipe, distill_recipe

WINDOW = 50
"""Matched segments of a running mean."""
STOPPED = "when they were stopped"
EQUAL = {"matched": "matched segments", "iteration": "iterations", "stopped": STOPPED}
"""At what runs with different K are compared."""
NAMES = {"loss": "matching loss", "accuracy": "test accuracy"}


def run_table(records: Mapping[str, Record]) -> pd.DataFrame:
    """What distillation runs cost and reached, a column each, from their records."""
    columns = {}
    for name, record in records.items():
        losses = [line["loss"] for line in record["metrics"] if "loss" in line]
        columns[name] = {
            "iterations": record["config"]["iterations"],
            "seconds an iteration (median)": f"{record['result']['seconds_per_iteration']:.1f}",
            "whole run, minutes": f"{record['result']['seconds'] / 60:.1f}",
            "peak memory of the process, MB": f"{record['result']['peak_memory_mb']:.0f}",
            "matching loss, first 10 iterations": f"{np.mean(losses[:10]):.3f}",
            "matching loss, last 10 iterations": f"{np.mean(losses[-10:]):.3f}",
            "step size, last": f"{record['metrics'][-1]['step_size']:.4f}",
            "iteration selected by validation": record["result"]["selected_iteration"],
        }
    return pd.DataFrame(columns)


# --- Runs on a GPU ----------------------------------------------------------------------------------------------


def losses(distil: Record) -> pd.DataFrame:
    """A row an iteration: K, seed, `iteration`, segments `matched`, if it is the last one, and a running mean loss."""
    tables = []
    for run in distil["runs"]:
        k, reached = run["segments"], run["iterations"]
        table = pd.DataFrame({"K": k, "seed": run["seed"], "iteration": range(1, reached + 1)})
        loss = pd.DataFrame(run["losses"]).mean(axis=1).rolling(max(1, WINDOW // k)).mean()
        tables.append(table.assign(matched=k * table["iteration"], stopped=table["iteration"] == reached, loss=loss))
    return pd.concat(tables, ignore_index=True)


def accuracies(evaluated: Record, distil: Record) -> pd.DataFrame:
    """A row a set that was tested: as `losses`, with the mean test `accuracy` of its `networks` in place of a loss."""
    reached = {(run["segments"], run["seed"]): run["iterations"] for run in distil["runs"]}
    table = pd.DataFrame(evaluated["rows"]).rename(columns={"segments": "K"})
    last = [reached[key] for key in zip(table["K"], table["seed"], strict=True)]
    means = table["accuracies"].map(np.mean)
    table = table.assign(accuracy=means, networks=table["accuracies"].map(len), stopped=table["iteration"] == last)
    return table.sort_values(["K", "matched", "seed"])


def at_equal(table: pd.DataFrame, value: str) -> dict[str, pd.DataFrame]:
    """`value`, a row a seed and a column a K, by where it was taken: the last place that all runs have in common."""
    found, table = {}, table.dropna(subset=value)
    for column, words in EQUAL.items():
        common = set.intersection(*(set(run[column]) for _, run in table.groupby(["K", "seed"])))
        place = max(common, default=False)
        if place:
            where = words if column == "stopped" else f"after {place} {words}"
            found[where] = table[table[column] == place].pivot(index="seed", columns="K", values=value).dropna()
    return found


def _difference(by_seed: pd.DataFrame) -> Effect:
    """The largest K's value minus the smallest's, seed by seed."""
    return effect((by_seed[max(by_seed)] - by_seed[min(by_seed)]).tolist())


def equal_table(table: pd.DataFrame, value: str) -> str:
    """`at_equal`, mean ± standard deviation over seeds, with the difference's 95 % interval; Markdown."""
    scale, digits, unit = (100.0, 1, ", %") if value == "accuracy" else (1.0, 3, "")
    rows = []
    for where, by_seed in at_equal(table, value).items():
        found, row = _difference(by_seed), {NAMES[value] + unit: where}
        for k in by_seed:
            row[f"K = {k}"] = mean_sd(by_seed[k], scale=scale, digits=digits)
        mean, low, high = (f"{scale * number:+.{digits}f}" for number in (found.mean, found.low, found.high))
        row[f"K = {max(by_seed)} minus K = {min(by_seed)}"] = f"{mean} [{low}, {high}]"
        rows.append({**row, "seeds": found.count})
    return markdown(rows)


def equal_sentence(table: pd.DataFrame, value: str) -> str:
    """In which of these comparisons the largest K differs from the smallest beyond the spread of the seeds."""
    low, high = f"that of K = {min(table['K'])}", f"the {NAMES[value]} of K = {max(table['K'])}"
    signs = {-1: f"is lower than {low}", 1: f"is higher than {low}"}
    signs[0] = f"cannot be told apart from {low} with these seeds"
    places: dict[int, list[str]] = {sign: [] for sign in signs}
    for where, by_seed in at_equal(table, value).items():
        found = _difference(by_seed)
        places[(found.low > 0) - (found.high < 0)].append(where)
    said = [f"{_listed(places[sign])} {high} {how}." for sign, how in signs.items() if places[sign]]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in said)


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _curves(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Of one K's losses, a row a seed, where all seeds have one."""
    return table.pivot(index="seed", columns=column, values="loss").dropna(axis=1)


def loss_curves(table: pd.DataFrame) -> Figure:
    """The matching loss against matched segments and against iterations; mean ± sd over the runs of a K."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.5), sharey=True)
    for axis, column in zip(axes, ("matched", "iteration"), strict=True):
        for (k, mine), marker in zip(table.groupby("K"), MARKERS, strict=False):
            by_seed = _curves(mine, column)
            band(axis, by_seed.columns, by_seed, marker=marker, markevery=0.15, markersize=4, label=f"K = {k}")
        axis.set(xlabel=EQUAL[column])
    axes[0].set_ylabel("matching loss")
    axes[1].legend()
    return figure


def loss_caption(table: pd.DataFrame) -> str:
    """What `loss_curves` shows."""
    return (
        f"{equal_sentence(table, 'loss')} A point is the mean of the last {WINDOW} matched segments; with K = 1 it "
        f"also moves with the start epochs that were drawn. Lines: mean over {table['seed'].nunique()} seeds; bands: "
        "standard deviation. Record: book/results/gpu/distil.json."
    )


def loss_alt(table: pd.DataFrame) -> str:
    """What `loss_curves` looks like."""
    ends = {k: _curves(mine, "iteration").mean().iloc[[0, -1]] for k, mine in table.groupby("K")}
    parts = [f"that of K = {k} {'falls' if b < a else 'rises'} from {a:.2f} to {b:.2f}" for k, (a, b) in ends.items()]
    return f"Lines of the matching loss against matched segments, left, and iterations, right: {_listed(parts)}."


def runs_table(distil: Record) -> str:
    """What each run reached before it was stopped; Markdown."""
    rows = [
        {
            "K": run["segments"],
            "seed": run["seed"],
            "iterations reached": f"{run['iterations']:,} of {run['config']['iterations']:,}",
            "segments matched": f"{run['segments'] * run['iterations']:,}",
            "seconds, first iteration": f"{run['seconds'][0]:.0f}",
            "seconds an iteration, median": f"{pd.Series(run['seconds']).median():.3f}",
            "step size, last": f"{run['step_size'][-1]:.4f}",
        }
        for run in sorted(distil["runs"], key=lambda run: (run["segments"], run["seed"]))
    ]
    return markdown(rows)


def stopped_sentence(distil: Record, experts: Record) -> str:
    """How far the runs are from the published cell."""
    runs, own = distil["runs"], experts["buffer"]
    cell, published = distill_recipe("mtt", "cifar10", ipc=1).schedule, buffer_recipe("cifar10", "mtt")
    stopped = sum(not run["finished"] for run in runs)
    reached = [run["iterations"] for run in runs]
    seconds = max(sum(run["seconds"]) for run in runs)
    config = runs[0]["config"]
    return (
        f"MTT on {config['data']} with IPC {config['ipc']}, width {config['width']}, N = {config['student_steps']}, "
        f"M = {config['expert_epochs']}, window [{config['window_start']}, {config['window_end']}). The time limit "
        f"stopped {stopped} of {len(runs)} runs; after {seconds:.0f} seconds they had {min(reached)} to {max(reached)} "
        f"iterations. The published cell has {cell.iterations:,} iterations, and {published.experts} experts of "
        f"{published.epochs} epochs; these runs had {len(own['experts'])} experts of {own['config']['epochs']} epochs."
    )


def tested(evaluated: Record | None, distil: Record) -> str:
    """Test accuracies, in percent: all sets, beside random real images; K at equal places; what that says. Markdown."""
    if evaluated is None:
        return "These sets have not been tested yet: there is no `book/results/gpu/evaluate.json`."
    table = accuracies(evaluated, distil)
    when = table["iteration"].astype(str).mask(table["stopped"], STOPPED)
    rows = []
    for (k, iteration), mine in table.groupby(["K", when], sort=False):
        row = {"set": f"K = {k}", "iterations": iteration, "matched segments": _range(mine["matched"])}
        row |= {"test accuracy, %": mean_sd(mine["accuracy"], scale=100.0), "sets": str(len(mine))}
        rows.append({**row, "networks a set": _range(mine["networks"])})
    real = pd.Series(evaluated["random_real"])
    row = {"set": "random real images", "test accuracy, %": mean_sd(real, scale=100.0)}
    rows.append({**row, "networks a set": str(len(real))})
    better = f"{(table['accuracy'] > real.max()).sum()} of {len(table)} sets"
    said = (
        "Mean ± standard deviation over sets, whose accuracy is the mean over their networks; for random real images "
        f"over networks. {better} have a higher accuracy than any network on random real images has. "
    )
    return "\n\n".join([markdown(rows), equal_table(table, "accuracy"), said + equal_sentence(table, "accuracy")])


def _range(values: pd.Series) -> str:
    return " to ".join(f"{value:,}" for value in sorted({values.min(), values.max()}))
