"""Records: JSON that runs and studies wrote, committed under `book/results`."""

import json
from pathlib import Path
from typing import Any

from cddlib.evaluate import evaluations_of
from cddlib.runtime.errors import UserError, as_user_error
from cddlib.runtime.files import parse_json, read_bytes, read_json, write_atomically
from cddlib.runtime.run_folder import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""The committed records, beside this package in the repository."""


def write_record(path: Path, value: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write a record for the book, which git guards: plain JSON; without `indent` half the size for many numbers."""
    text = json.dumps(value, indent=indent, separators=(",", ": " if indent else ":")) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_record(record: str | Path) -> Any:
    """A record that `write_record` wrote, by its file or by its name in `RESULTS`."""
    path = record if isinstance(record, Path) else RESULTS / f"{record}.json"
    return parse_json(read_bytes(path), str(path))


def collect(folder: Path) -> dict[str, Any]:
    """Everything a finished run wrote about itself: configuration, result, metrics, evaluations.

    Raises:
        UserError: `folder` holds no finished run.
    """
    named = {name: folder / f"{name}.json" for name in ("buffer", "config", "result")}
    if not named["result"].exists():
        raise UserError(f"{folder} holds no finished run: result.json is missing.")
    record: dict[str, Any] = {name: read_json(path) for name, path in named.items() if path.exists()}
    if (folder / "metrics.jsonl").exists():
        record["metrics"] = read_metrics(folder)
        record["evaluations"] = evaluations_of(folder)
    return record


STOPPED = "stopped.json"
"""File in the folder of a run that stopped on its own."""

DENSE = ("loss", "matched", "seconds")
SPARSE = ("skipped", "validation_accuracy", "probe_losses", "gradient_similarity", "accumulated_error")


def study_record(out: Path) -> dict[str, Any]:
    """Everything that the runs of a finished study wrote, small enough to commit.

    Returns:
        JSON values. `config` of the base; and for each of `runs` its `changes` of that configuration, its `metrics`
        (a list of values for what every iteration has, and of [iteration, value] for what only some have), `result`,
        and `evaluations`, one for every architecture; or `stopped`, the reason why there is nothing but its changes.

    Raises:
        UserError: `out` holds no study, or one that is not finished.
    """
    with as_user_error(out / "study.json", "the description of a finished study"):
        description, runs = read_json(out / "study.json"), {}
        for name in description["runs"]:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UserError(f"{out / 'study.json'} names the run {name!r}, which is not below its folder.")
            finished = (out / name / "result.json").exists()
            if not (finished or (description.get("keep_stopped") and (out / name / STOPPED).exists())):
                raise UserError(f"{out} holds a study that is not finished: {name} is missing; run it again to finish.")
            config = read_json(out / name / "config.json")
            changes = {key: config[key] for key, value in description["config"].items() if config[key] != value}
            if description["config"].get("compiled") is None:  # each run decided by itself, which is no change
                changes.pop("compiled", None)
            own = _measured(out / name) if finished else {"stopped": read_json(out / name / STOPPED)["reason"]}
            runs[name] = {"changes": changes, **own}
    return {**description, "runs": runs}


def _measured(run: Path) -> dict[str, Any]:
    """Metrics by name instead of by line, in six digits; the result; and the evaluations."""
    lines, result = read_metrics(run), read_json(run / "result.json")
    del result["metrics_sha256"]  # of lines that the record does not keep
    iterations = [line for line in lines if "loss" in line]
    metrics = {key: [line[key] for line in iterations] for key in DENSE if key in iterations[0]}
    sparse = {key: [[line["iteration"], line[key]] for line in lines if line.get(key)] for key in SPARSE}
    metrics |= {key: values for key, values in sparse.items() if values}
    return {
        "metrics": json.loads(json.dumps(metrics), parse_float=lambda digits: float(f"{float(digits):.6g}")),
        "result": result,
        "evaluations": [_tested(record) for record in evaluations_of(run)],
    }


def _tested(record: dict[str, Any]) -> dict[str, Any]:
    """Accuracies by what networks were trained on; their architecture; and what the set taught of each class."""
    fractions = map(list, zip(*record["by_class"]["synthetic"], strict=True))
    by_class = dict(zip(record["classes"], fractions, strict=True))
    return {**record["accuracies"], "network": record["network"]["network"], "by_class": by_class}
