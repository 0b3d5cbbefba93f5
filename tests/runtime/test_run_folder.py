"""Run folders: seeds, metrics, locks, refusals, devices, memory, provenance."""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from works import refusal

from cddlib.runtime import device as devices
from cddlib.runtime import errors, provenance, run_folder
from cddlib.runtime import random as random_streams
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import write_json


def test_streams_are_independent() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), ("0", "a"), (0, "a", 0), ("a", 0), (0,), (1,), (2,), (3,), ()]
    draws = torch.stack([torch.randn(4000, generator=random_streams.generator(*key)) for key in keys])
    correlations = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlations.abs().max() < 0.08  # 5 standard errors of 4000 draws


# --- Metrics ----------------------------------------------------------------------------------------------------

LINES = [{"iteration": i, "loss": 0.5} for i in range(6)]


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    """Lines of the iterations 0 … 5."""
    metrics = run_folder.Metrics(tmp_path / "metrics.jsonl", resume_at=-1)
    for line in LINES:
        metrics.write(line)
    metrics.close()
    return tmp_path / "metrics.jsonl"


def digest_until(path: Path, iteration: int) -> str:
    """What a checkpoint of that iteration, or a result, knows of the lines so far."""
    return hashlib.sha256(b"".join(path.read_bytes().splitlines(keepends=True)[: iteration + 1])).hexdigest()


@pytest.mark.parametrize("rest", [b"", b'{"iteration": 2, "lo', b"\xff\n\n"])
def test_metrics_drop_what_follows_the_checkpoint(metrics_file: Path, rest: bytes) -> None:
    digest = digest_until(metrics_file, 3)
    metrics_file.write_bytes(metrics_file.read_bytes() + rest)
    metrics = run_folder.Metrics(metrics_file, resume_at=3, digest=digest)
    assert metrics.sync() == digest
    metrics.write({"iteration": 4, "loss": 0.25})
    wanted = [*LINES[:4], {"iteration": 4, "loss": 0.25}]
    assert run_folder.parse_metrics(metrics_file, metrics.sync()) == wanted
    metrics.close()
    run_folder.Metrics(metrics_file, resume_at=-1).close()
    assert metrics_file.read_bytes() == b""


def test_a_finished_run_s_metrics_are_those_that_its_result_knows(metrics_file: Path) -> None:
    result = metrics_file.with_name("result.json")
    write_json(result, {"metrics_sha256": digest_until(metrics_file, 5)})
    assert run_folder.read_metrics(metrics_file.parent) == LINES
    write_json(result, {"seconds": 1})
    with pytest.raises(UserError, match=r"result\.json is not the result of a distillation \(it has no"):
        run_folder.read_metrics(metrics_file.parent)
    metrics_file.unlink()
    write_json(result, {"metrics_sha256": "0"})
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged or missing: "):
        run_folder.read_metrics(metrics_file.parent)


# --- Folders, devices, memory -----------------------------------------------------------------------------------


def test_one_thread_at_a_time_has_a_folder(tmp_path: Path) -> None:
    def enter() -> str:
        try:
            with run_folder.locked(tmp_path / ".lock"):
                return "entered"
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        with contextlib.suppress(ZeroDivisionError), run_folder.locked(tmp_path / ".lock"):
            for said in (enter(), other.submit(enter).result()):
                assert said == (
                    f"{tmp_path} is in use: other work holds .lock; wait until it ends, or choose another folder."
                )
            raise ZeroDivisionError
        assert (enter(), other.submit(enter).result()) == ("entered", "entered")


def test_file_systems_without_locks_are_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    for _ in range(2):
        with run_folder.locked(tmp_path / "run" / ".lock"):
            (tmp_path / "run" / "a").write_text("")


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
    with pytest.raises(UserError) as refused, errors.out_of_memory_hint("--width or --ipc"):
        raise error
    assert str(refused.value) == (
        f"there is not enough memory ({' '.join(str(error).split())}); lower --width or --ipc, in another folder, or "
        f"go on with the same command where there is more: what was saved is kept."
    )


def test_only_a_want_of_memory_is_one() -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as caught, errors.out_of_memory_hint("--width"):
        raise error
    assert caught.value is error
    with pytest.raises(UserError, match=r"^there is not enough memory "), errors.out_of_memory_hint("--width"):
        torch.empty(2**60)


def test_another_run_is_refused_with_the_fields_that_differ() -> None:
    there, here = {"a": 1, "b": 2, "old": 3}, {"a": 1, "b": 5, "new": "x"}
    assert refusal(run_folder.refuse_other_run, Path("out"), there, here) == (
        "out holds another run (b is 2 there and 5 here; new is None there and 'x' here; "
        "old is 3 there and None here); choose another folder with --out."
    )
    run_folder.refuse_other_run(Path("out"), {"a": 1}, {"a": 1})


@pytest.mark.parametrize("name", ["cuda:99", "banana", "meta", ""])
def test_a_missing_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device '{name}' is not available here .*use 'cpu' or 'auto'\.$"):
        devices.resolve_device(name)
    assert devices.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_recorder_says_what_it_took_and_where() -> None:
    """The peak is that of the process, and not of the one that started it."""
    large = b"x" * 1_500_000_000
    script = "import json, torch; from cddlib.runtime.provenance import Recorder as R; "
    script += "print(json.dumps(R(torch.device('cpu'), elapsed=1000.0).report()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["seconds"] >= 1000
    assert 50 < report["peak_memory_mb"] < len(large) / 1e6  # Python with torch
    assert report["versions"].keys() == {"python", "cddlib", "torch", "torchvision", "numpy"}
    assert report["threads"] == 1  # as all tests have it
    assert datetime.fromisoformat(report["finished"]).utcoffset() is not None


def test_the_commit_is_that_of_the_checkout_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def recorded() -> str | None:
        return provenance.Recorder(torch.device("cpu")).report()["commit"]

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "runtime" / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert recorded() is None
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "__init__.py").touch()
    git("init", "-q")
    git("add", "a.py")
    git("commit", "-q", "--no-verify", "-m", "another project, into which the package is installed")
    assert recorded() is None
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "first")
    commit, recorder = git("rev-parse", "HEAD"), provenance.Recorder(torch.device("cpu"))
    (tmp_path / "a.py").write_text("a = 2\n")
    assert (recorder.report()["commit"], recorded()) == (commit, f"{commit}+dirty")
