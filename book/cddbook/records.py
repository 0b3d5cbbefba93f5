"""Records: JSON that runs wrote, committed under `book/results`."""

import json
from pathlib import Path
from typing import Any

from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_bytes, read_json, write_atomically
from cddlib.runtime.run_folder import read_metrics


def write_record(path: Path, value: dict[str, Any], *, indent: int | None = 1) -> None:
    """Write a record for the book, which git guards: plain JSON; without `indent` half the size for many numbers."""
    text = json.dumps(value, indent=indent) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def record_path(name: str) -> Path:
    """`book/results/<name>.json`, found from the repository's root or from notebooks/; the record need not be there."""
    folders = [folder / "book" / "results" for folder in (Path.cwd(), Path.cwd().parent)]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise UserError(f"book/results is not in {Path.cwd()} or above it; run the notebook inside the repository.")
    return found / f"{name}.json"


def read_record(record: str | Path) -> Any:
    """A record that `write_record` wrote.

    Args:
        record: its file, or its name.
    """
    if isinstance(record, str):
        record = record_path(record)
    data = read_bytes(record)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record} cannot be read as JSON: {error}.") from None


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
        record["evaluations"] = [read_json(path) for path in sorted(folder.glob("evaluation-*.json"))]
    return record
