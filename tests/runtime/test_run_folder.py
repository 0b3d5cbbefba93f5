"""Run folders: seeds, metrics, locks, refusals, devices, memory, provenance."""

import ast
import dataclasses
import errno
import fcntl
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from cddbook import records
from cddlib.runtime import config as configs
from cddlib.runtime import device as devices
from cddlib.runtime import errors, provenance, run_folder
from cddlib.runtime import random as random_streams
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import write_json


def test_streams_are_reproducible_and_ignore_the_global_seed() -> None:
    first = torch.rand(5, generator=random_streams.generator(3, "expert", 1))
    torch.manual_seed(1)
    assert torch.equal(first, torch.rand(5, generator=random_streams.generator(3, "expert", 1)))


def test_streams_are_independent() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), ("0", "a"), (0, "a", 0), ("a", 0), (0,), (1,), (2,), (3,), ()]
    draws = torch.stack([torch.randn(4000, generator=random_streams.generator(*key)) for key in keys])
    correlations = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlations.abs().max() < 0.08  # 5 standard errors of 4000 draws


# --- Metrics ----------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    """Lines of the iterations 0 … 5."""
    metrics = run_folder.Metrics(tmp_path / "metrics.jsonl", resume_at=-1)
    for iteration in range(6):
        metrics.write(iteration=iteration, loss=0.5)
    metrics.close()
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("rest", [b"", b'{"iteration": 2, "lo', b"\xff\n\n"])
def test_metrics_drop_what_follows_the_checkpoint(metrics_file: Path, rest: bytes) -> None:
    metrics_file.write_bytes(metrics_file.read_bytes() + rest)
    metrics = run_folder.Metrics(metrics_file, resume_at=3)
    metrics.write(iteration=4, loss=0.25)
    found = [*({"iteration": i, "loss": 0.5} for i in range(4)), {"iteration": 4, "loss": 0.25}]
    assert run_folder.Metrics.read(metrics_file, until=4) == found
    assert run_folder.Metrics.read(metrics_file, until=2) == found[:3]
    metrics.close()
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: it ends before iteration 5\.$"):
        run_folder.Metrics.read(metrics_file, until=5)


def test_metrics_start_empty(metrics_file: Path) -> None:
    run_folder.Metrics(metrics_file, resume_at=-1).close()
    assert metrics_file.read_bytes() == b""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"0.5", b"0.6"), *lines[3:]], "line 3, is damaged: its contents"),
        (lambda lines: [*lines[:2], b"\n", *lines[3:]], "line 3, cannot be read as JSON: "),
        (lambda lines: [*lines[:2], b'{"iteration": 2}\n', *lines[3:]], "line 3, has no checksum: it is damaged, or"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "is damaged: line 2 is not that of iteration 1."),
        (lambda lines: lines[:2] + lines[3:], "is damaged: line 3 is not that of iteration 2."),
        (lambda lines: [lines[0], *lines], "is damaged: line 2 is not that of iteration 1."),
        (lambda lines: lines[:4], "is damaged: it ends before iteration 4."),
        (lambda lines: [*lines[:4], lines[4][:-1]], "is damaged: it ends before iteration 4."),
        (lambda lines: [*lines[:4], lines[4][:-9]], "line 5, cannot be read as JSON: "),
        (lambda lines: [], "is damaged: it ends before iteration 4."),
    ],
)
def test_damaged_missing_and_reordered_lines_are_named(metrics_file: Path, damage, message: str) -> None:
    metrics_file.write_bytes(b"".join(damage(metrics_file.read_bytes().splitlines(keepends=True))))
    before = metrics_file.read_bytes()
    for call in (
        lambda: run_folder.Metrics.read(metrics_file, until=4),
        lambda: run_folder.Metrics(metrics_file, resume_at=4),
    ):
        with pytest.raises(UserError) as refused:
            call()
        assert str(refused.value).removeprefix(str(metrics_file)).lstrip(", ").startswith(message)
    assert metrics_file.read_bytes() == before


def test_a_metrics_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: it ends before iteration 0\.$"):
        run_folder.Metrics(tmp_path / "metrics.jsonl", resume_at=0)


# --- Folders, devices, memory -----------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from cddlib.runtime.run_folder import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_has_a_folder(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **pipes) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError) as refused, run_folder.locked(lock):
            pass
        holder.kill()  # nothing that it could clean up
    assert str(refused.value) == (
        f"{tmp_path / 'run'} is in use by another process, which holds .lock; wait until it ends, or choose another "
        f"folder."
    )
    for _ in range(2):
        with run_folder.locked(lock) as file:
            file.write(b"x")
    assert lock.read_bytes() == b"x"


def test_a_folder_is_free_when_the_work_in_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_folder.locked(tmp_path / ".lock"):
        raise ZeroDivisionError
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    assert subprocess.run(command, capture_output=True, text=True, input="").stdout == "locked\n"


def test_file_systems_without_locks_are_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with run_folder.locked(tmp_path / ".lock") as file:
        assert file.writable()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["python", "GPU", "CPU", "mmap", "C++", "system"],
)
def test_a_want_of_memory_says_what_to_lower(error: Exception) -> None:
    @errors.out_of_memory_hint("--width or --ipc")
    def work() -> None:
        raise error

    with pytest.raises(UserError) as refused:
        work()
    reason = " ".join(str(error).split())
    assert str(refused.value) == (
        f"there is not enough memory ({reason}); lower --width or --ipc, in another folder, or go on with the same "
        f"command where there is more: what was saved is kept."
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left on device"), UserError("ipc is 0.")]
)
def test_other_errors_are_not_taken_for_a_want_of_memory(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, errors.out_of_memory_hint("--width"):
        raise error
    assert caught.value is error


def test_an_allocation_that_fails_is_a_want_of_memory() -> None:
    sentence = r"^there is not enough memory \(.*; lower --width, "
    with pytest.raises(UserError, match=sentence), errors.out_of_memory_hint("--width"):
        torch.empty(2**60)


def test_another_run_is_refused_with_the_fields_that_differ() -> None:
    with pytest.raises(UserError) as caught:
        run_folder.refuse_other_run(Path("out"), {"a": 1, "b": 2, "old": 3}, {"a": 1, "b": 5, "new": "x"})
    assert str(caught.value) == (
        "out holds another run (b is 2 there and 5 here; new is None there and 'x' here; "
        "old is 3 there and None here); choose another folder with --out."
    )
    run_folder.refuse_other_run(Path("out"), {"a": 1}, {"a": 1})


@pytest.mark.parametrize("name", ["cuda:99", "banana", ""])
def test_a_missing_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device '{name}' is not available here .*use 'cpu' or 'auto'\.$"):
        devices.resolve_device(name)


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert devices.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.resolve_device("cpu") == torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    sizes: tuple[int, ...] = (1, 2)
    rate: float = 0.5


def test_configurations_survive_json_and_hash_by_value() -> None:
    assert configs.as_dict(Config()) == {"sizes": [1, 2], "rate": 0.5}
    assert configs.from_dict(Config, {"sizes": (3,), "rate": 1.0, "more": 0}) == Config(sizes=(3,), rate=1.0)
    with pytest.raises(KeyError, match="rate"):
        configs.from_dict(Config, {"sizes": (3,)})
    assert configs.config_hash({"a": 1, "b": 2}) == configs.config_hash({"b": 2, "a": 1})
    assert configs.config_hash({"a": 1}) != configs.config_hash({"a": 2})
    assert len(configs.config_hash({})) == 12


def test_recorder_says_what_it_took_and_where() -> None:
    report = provenance.Recorder(torch.device("cpu"), elapsed=1000.0).report()
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


def test_the_peak_is_of_the_process_and_not_of_the_one_that_started_it() -> None:
    large = b"x" * 1_500_000_000
    script = "import torch; from cddlib.runtime.provenance import Recorder as R; print(R(torch.device('cpu')).report())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 50 < ast.literal_eval(done.stdout)["peak_memory_mb"] < len(large) / 1e6


def test_recorder_notes_the_commit_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_commit", lambda: "at the start")
    recorder = provenance.Recorder(torch.device("cpu"))
    monkeypatch.setattr(provenance, "_commit", lambda: "later")
    assert recorder.report()["commit"] == "at the start"


def test_commit_is_that_of_the_checkout_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance._commit() is None
    (tmp_path / "runs.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "runs.py")
    git("commit", "-q", "--no-verify", "-m", "first")
    assert provenance._commit() == git("rev-parse", "HEAD")
    (tmp_path / "runs.py").write_text("a = 2\n")
    assert provenance._commit() == git("rev-parse", "HEAD") + "+dirty"


def test_a_record_gathers_what_a_run_wrote(metrics_file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("run")
    with pytest.raises(UserError, match=r"holds no finished run: result\.json is missing\.$"):
        records.collect(tmp_path)
    written = {name: {"iterations": 5, "name": name} for name in ("config", "result", "evaluation-b", "evaluation-a")}
    for name, value in written.items():
        write_json(tmp_path / f"{name}.json", value)
    wanted = {"config": written["config"], "result": written["result"]}
    assert records.collect(tmp_path) == wanted
    shutil.copy(metrics_file, tmp_path)
    assert records.collect(tmp_path) == {
        **wanted,
        "metrics": [{"iteration": i, "loss": 0.5} for i in range(6)],
        "evaluations": [written["evaluation-a"], written["evaluation-b"]],
    }
