"""Tables of chapter 6: the runs that `make gpu` began on a GPU."""

import pandas as pd

from cddbook.figures.ch5_concurrent import equal_table
from cddbook.findings import STOPPED, Record, gpu_accuracies
from cddbook.tables import markdown, mean_sd


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


def tested(evaluated: Record, distil: Record) -> str:
    """Test accuracies, in percent: all sets, beside random real images; K at equal places; what that says. Markdown."""
    table = gpu_accuracies(evaluated, distil)
    when = table["iteration"].astype(str).mask(table["stopped"], STOPPED)
    rows = []
    for (variant, iteration), mine in table.groupby(["variant", when], sort=False):
        row = {"set": variant, "iterations": iteration, "matched segments": _range(mine["matched"])}
        row |= {"test accuracy, %": mean_sd(mine["test"], scale=100.0), "sets": str(len(mine))}
        rows.append({**row, "networks a set": _range(mine["networks"])})
    real = pd.Series(evaluated["random_real"])
    row = {"set": "random real images", "test accuracy, %": mean_sd(real, scale=100.0)}
    rows.append({**row, "networks a set": str(len(real))})
    better = f"{(table['test'] > real.max()).sum()} of {len(table)} sets"
    said = (
        "Mean ± standard deviation over sets, whose accuracy is the mean over their networks; for random real images "
        f"over networks. {better} have a higher accuracy than any network on random real images has."
    )
    return "\n\n".join([markdown(rows), equal_table(table, "test"), said])


def _range(values: pd.Series) -> str:
    return " to ".join(f"{value:,}" for value in sorted({values.min(), values.max()}))
