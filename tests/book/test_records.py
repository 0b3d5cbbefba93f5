"""Records: plain JSON beside the book, and what a finished run wrote about itself."""

from pathlib import Path

import pytest

from cddbook import records
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import write_json
from cddlib.runtime.run_folder import Metrics


def test_records_are_plain_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "book" / "results"
    for indent, text in ((1, '{\n "x": [\n  1\n ]\n}\n'), (None, '{"x": [1]}\n')):
        records.write_record(folder / "r.json", {"x": [1]}, indent=indent)
        assert (folder / "r.json").read_text() == text
        assert records.read_record(folder / "r.json") == {"x": [1]}
    monkeypatch.setattr(records, "RESULTS", folder)
    assert records.read_record("r") == {"x": [1]}


def test_a_record_gathers_what_a_run_wrote(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished run: result\.json is missing\.$"):
        records.collect(tmp_path)
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_at=-1)
    metrics.write({"iteration": 0, "loss": 0.5})
    written = {name: {"name": name} for name in ("config", "evaluation-b", "evaluation-a")}
    written["result"] = {"metrics_sha256": metrics.sync()}
    metrics.close()
    for name, value in written.items():
        write_json(tmp_path / f"{name}.json", value)
    assert records.collect(tmp_path) == {
        "config": written["config"],
        "result": written["result"],
        "metrics": [{"iteration": 0, "loss": 0.5}],
        "evaluations": [written["evaluation-a"], written["evaluation-b"]],
    }
