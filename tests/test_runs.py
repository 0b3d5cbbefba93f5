"""Run folders: atomic writes, seeds, metrics, refusals, devices, provenance."""

import dataclasses
import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cddlib import runs
from cddlib.files import UserError


def write_half_then(error: BaseException):
    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("now")])
def test_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    runs.write_json(path, {"old": 1})
    with pytest.raises(type(error), match=str(error)):
        runs.write_atomically(path, write_half_then(error))
    assert runs.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_replaces_the_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    for value in ({"x": 1}, {"x": 2}):
        runs.write_json(path, value)
        assert json.loads(path.read_text()) == value
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_whole_before_it_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("whole")
        seen.append((path.exists(), temporary.parent))

    runs.write_atomically(path, write)
    assert seen == [(False, tmp_path)]  # same folder, so that renaming is atomic
    assert path.read_text() == "whole"


def test_an_error_of_safetensors_in_writing_is_an_oserror_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: full"):
        runs.write_atomically(tmp_path / "a.safetensors", write_half_then(SafetensorError("full")))
    assert list(tmp_path.iterdir()) == []


def test_streams_are_reproducible_and_ignore_the_global_seed() -> None:
    first = torch.rand(5, generator=runs.generator(3, "expert", 1))
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(5, generator=runs.generator(3, "expert", 1)))


def test_streams_are_independent() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), ("0", "a"), (0, "a", 0), ("a", 0), (0,), (1,), (2,), (3,), ()]
    draws = torch.stack([torch.randn(4000, generator=runs.generator(*key)) for key in keys])
    correlations = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlations.abs().max() < 0.08  # 5 standard errors of 4000 draws


def test_metrics_drop_lines_after_the_checkpoint_and_half_written_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(6)) + '{"iteration": 2, "lo')
    metrics = runs.Metrics(path, resume_at=3)
    metrics.write(iteration=4, loss=0.5)
    assert runs.Metrics.read(path) == [*({"iteration": i} for i in range(4)), {"iteration": 4, "loss": 0.5}]
    metrics.close()


def test_metrics_start_empty(tmp_path: Path) -> None:
    metrics = runs.Metrics(tmp_path / "metrics.jsonl", resume_at=-1)
    metrics.close()
    assert runs.Metrics.read(tmp_path / "metrics.jsonl") == []


def test_another_run_is_refused_with_the_fields_that_differ() -> None:
    with pytest.raises(UserError) as caught:
        runs.refuse_other_run(Path("out"), {"a": 1, "b": 2, "old": 3}, {"a": 1, "b": 5, "new": "x"})
    assert str(caught.value) == (
        "out holds another run (b is 2 there and 5 here; new is None there and 'x' here; "
        "old is 3 there and None here); choose another folder with --out."
    )
    runs.refuse_other_run(Path("out"), {"a": 1}, {"a": 1})


@pytest.mark.parametrize("name", ["cuda:99", "banana", ""])
def test_a_missing_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device '{name}' is not available here .*use 'cpu' or 'auto'\.$"):
        runs.resolve_device(name)


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert runs.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runs.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("read", [runs.read_json, runs.open_tensors])
def test_a_missing_file_is_named(tmp_path: Path, read) -> None:
    with pytest.raises(UserError, match=r"none\.x does not exist\.$"):
        read(tmp_path / "none.x")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", None])
def test_broken_json_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON: "):
        runs.read_json(path)


def test_broken_tensor_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    runs.write_tensors(whole, {"a": torch.arange(100)}, {})
    for content in (b"", b"garbage" * 99, whole.read_bytes()[:-1], whole.read_bytes() + b"x", None):
        path = tmp_path / "a.safetensors"
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.safetensors is truncated or not a safetensors file \("):
            runs.open_tensors(path)
        path.rmdir() if content is None else path.unlink()


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3)
    runs.write_tensors(path, {"transposed": matrix.T.requires_grad_()}, {"classes": ["α", "b"]})
    file = runs.open_tensors(path)
    assert torch.equal(file.get_tensor("transposed"), matrix.T)
    assert runs.read_metadata(file, path, "classes") == ["α", "b"]
    with pytest.raises(UserError, match=r"a\.safetensors has no readable 'other' in its header"):
        runs.read_metadata(file, path, "other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5


def test_configurations_survive_json_and_hash_by_value() -> None:
    assert runs.as_dict(Config()) == {"sizes": [1, 2], "rate": 0.5}
    assert runs.from_dict(Config, {"sizes": (3,), "rate": 1.0, "more": 0}) == Config(sizes=(3,), rate=1.0)
    with pytest.raises(KeyError, match="rate"):
        runs.from_dict(Config, {"sizes": (3,)})
    assert runs.config_hash({"a": 1, "b": 2}) == runs.config_hash({"b": 2, "a": 1})
    assert runs.config_hash({"a": 1}) != runs.config_hash({"a": 2})
    assert len(runs.config_hash({})) == 12


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert runs.file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea")


def test_recorder_says_what_it_took_and_where() -> None:
    report = runs.Recorder(torch.device("cpu"), elapsed=1000.0).report()
    fields = {"seconds", "peak_memory_mb", "versions", "device", "threads", "commit", "finished"}
    assert report.keys() == fields
    assert report["seconds"] >= 1000
    assert report["peak_memory_mb"] > 50  # Python with torch
    assert report["versions"].keys() == {"python", "cddlib", "torch", "torchvision", "numpy"}
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert report["device"]
    assert datetime.fromisoformat(report["finished"]).utcoffset() is not None
    json.dumps(report)


def test_recorder_notes_the_commit_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_commit", lambda: "at the start")
    recorder = runs.Recorder(torch.device("cpu"))
    monkeypatch.setattr(runs, "_commit", lambda: "later")
    assert recorder.report()["commit"] == "at the start"


def test_commit_is_that_of_the_checkout_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert runs._commit() is None
    (tmp_path / "runs.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "runs.py")
    git("commit", "-q", "--no-verify", "-m", "first")
    assert runs._commit() == git("rev-parse", "HEAD")
    (tmp_path / "runs.py").write_text("a = 2\n")
    assert runs._commit() == git("rev-parse", "HEAD") + "+dirty"


def test_a_record_gathers_what_a_run_wrote(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished run: result\.json is missing\.$"):
        runs.collect(tmp_path)
    for name in ("config", "result", "evaluation-b", "evaluation-a"):
        runs.write_json(tmp_path / f"{name}.json", name)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert runs.collect(tmp_path) == {
        "config": "config",
        "result": "result",
        "metrics": [{"iteration": 0}],
        "evaluations": ["evaluation-a", "evaluation-b"],
    }
