"""Studies on the command line: from the command to the record."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Any

import pytest

import cddbook.__main__ as studies
from cddbook import study
from cddbook.study import remedies
from cddlib import cli, commands
from cddlib.experts.buffer import Buffer
from cddlib.experts.config import BufferConfig
from cddlib.matching.combine import Combine
from cddlib.runtime.config import as_dict
from cddlib.runtime.files import write_json

SHORT = ["--student-steps", "2", "--window-end", "4", "--evaluation-epochs", "2", "--device", "cpu"]


def run(buffer: Buffer, out: Path, command: str, *options: object) -> int:
    """The exit code of a study with small distillations."""
    arguments = [command, *SHORT, *options, "--buffer", buffer.folder, "--out", out / "study"]
    return studies.main([str(argument) for argument in arguments])


def recorded(out: Path) -> dict[str, Any]:
    assert studies.main(["record", str(out / "study"), "--to", str(out / "r.json")]) == 0
    return json.loads((out / "r.json").read_text())


def test_a_correlation_study(buffer: Buffer, tmp_path: Path, capsys) -> None:
    options = ["--probe-starts", 0, 3, "--iterations", 2, "--replicates", 2]
    assert run(buffer, tmp_path, "correlate", *options) == 0
    said = f"8 runs are finished; `python -m cddbook record {tmp_path / 'study'} --to FILE` gathers them\n"
    assert capsys.readouterr().out == said
    found = recorded(tmp_path)
    assert capsys.readouterr().out == f"wrote {tmp_path / 'r.json'}\n"
    assert (found["networks"], found["buffer_id"], found["config"]["width"]) == (0, buffer.id, 8)


def test_segment_counts_are_compared(buffer: Buffer, tmp_path: Path, capsys) -> None:
    options = ["--iterations", 4, "--validate-every", 2, "--counts", 1, 2, "--seeds", 1]
    assert run(buffer, tmp_path, "compare", *options, "--networks", 1) == 0
    found = recorded(tmp_path)["runs"]
    assert {name: len(entry["metrics"]["loss"]) for name, entry in found.items()} == {"K=1/seed-0": 4, "K=2/seed-0": 2}
    assert all(len(entry["evaluations"][0]["synthetic"]) == 1 for entry in found.values())
    assert run(buffer, tmp_path, "compare", *options, "--networks", 2) == 1
    assert "networks is 1 there and 2 here" in capsys.readouterr().err
    assert run(buffer, tmp_path, "compare", *options, "--change", "K=9.lr_images=1") == 1
    assert "'K=9.lr_images=1' changes none of the variants K=1, K=2." in capsys.readouterr().err


def test_all_remedies_are_compared(buffer: Buffer, tmp_path: Path) -> None:
    options = ["--what", "remedies", "--segments", 2, "--iterations", 4, "--validate-every", 0]
    options += ["--consolidate-every", 1, "--seeds", 1, "--networks", 1, "--no-baselines"]
    options += ["--change", "mgda.lr_images=7", "balance.lr_images=7"]
    assert run(buffer, tmp_path, "compare", *options) == 0
    record = recorded(tmp_path)
    found = {name.removesuffix("/seed-0"): entry for name, entry in record["runs"].items()}
    assert found.keys() == remedies(2).keys()
    assert {len(entry["evaluations"][0]["random_real"]) for entry in found.values()} == {0}
    configs = {name: {**record["config"], **entry["changes"]} for name, entry in found.items()}
    assert all(remedies(2)[name].items() <= config.items() for name, config in configs.items())
    assert [name for name, config in configs.items() if config["lr_images"] == 7.0] == ["balance", "mgda"]
    assert {config["combine"] for config in configs.values()} == set(typing.get_args(Combine))
    assert {config["consolidation"] for config in configs.values()} == {"none", "ewc", "si"}
    losses = {name: entry["metrics"]["loss"] for name, entry in found.items()}
    held = [losses.pop(name) for name in ("sequential", "ewc", "si")]
    assert {len(values) for values in held} == {4} and {len(values) for values in losses.values()} == {2}
    assert held[0][:2] == held[1][:2] == held[2][:2]  # nothing is pulled before the second iteration
    assert len({values[-1] for values in held}) == 3


def test_a_search_ranks_settings_and_one_that_diverges_is_the_last(buffer: Buffer, tmp_path: Path, capsys) -> None:
    varied = ["lr_step_size=1e9,1e-5", "step_size=0.05"]
    for _ in range(2):  # the second time it is only read, and what diverged diverges again
        assert run(buffer, tmp_path, "search", "--iterations", 2, "--segments", 1, "--vary", *varied) == 0
        said = capsys.readouterr().out.splitlines()
        assert re.match(r"counted as 0 %: iteration 1, .*: the step size became", said[0]) and len(said) == 4
        assert said[3] == "  0.0 %  lr_step_size=1000000000.0  step_size=0.05"
    found = recorded(tmp_path)["runs"]
    assert [("stopped" in entry) for entry in found.values()] == [True, True, False, False]
    accuracies = [entry["result"]["validation_accuracy"] for entry in found.values() if "result" in entry]
    assert said[2] == f"{50 * sum(accuracies):5.1f} %  lr_step_size=1e-05  step_size=0.05"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vary", "window_end=4,40"], "the experts stop at epoch 6"),
        (["--vary", "colour=1"], "'colour=1' is not a field of a distillation with values, like lr_images=10,30."),
        (["--vary", "lr_images=many"], "'lr_images=many' has a value that lr_images cannot take."),
        (["--vary", "lr_images=1", "--validate-every", 0], "validate_every is 0; a search needs validations to choose"),
    ],
)
def test_a_search_that_cannot_begin_says_so(
    buffer: Buffer, tmp_path: Path, capsys, options: list[object], message: str
) -> None:
    assert run(buffer, tmp_path, "search", *options) == 1
    assert message in capsys.readouterr().err


def test_every_command_of_the_campaign_is_one(buffer: Buffer, tmp_path: Path, monkeypatch) -> None:
    """What `book/record.sh` would run is understood, and finds the experts that a command before it trained."""
    told, fake = tmp_path / "told", tmp_path / "bin" / "python"
    for folder in (fake.parent, tmp_path / "runs/segments-cifar10-ipc1-published/K=1/seed-0"):
        folder.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    fake.chmod(0o755)
    script, path = Path(__file__).parents[2] / "book" / "record.sh", f"{fake.parent}:{os.environ['PATH']}"
    silent: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "env": os.environ | {"PATH": path}}
    subprocess.run(["bash", str(script), "data", "runs"], cwd=tmp_path, **silent)

    def train(*, config: BufferConfig, out: Path, **_: object) -> None:
        experts = {"config": as_dict(config), "data": buffer.data, "experts": [{}] * config.experts}
        write_json(out / "buffer.json", experts)

    for name in ("record", "buffer", "distill_data", "evaluate", "export"):
        module, double = studies if name == "record" else commands, train if name == "buffer" else lambda *_, **__: None
        monkeypatch.setattr(module, name, functools.wraps(getattr(module, name))(double))
    monkeypatch.setattr(study, "run_study", lambda *_, **__: {"runs": {}})
    monkeypatch.chdir(tmp_path)
    lines = told.read_text().splitlines()
    for module, *words in (line.split()[1:] for line in lines):
        assert (studies.main if module == "cddbook" else cli.main)(words) == 0
    assert len(lines) > 80


def test_the_campaign_is_killed_and_goes_on(buffer: Buffer, tmp_path: Path) -> None:
    """`book/record.sh`, with tiny distillations, in a folder of its own."""
    script, name = Path(__file__).parents[2] / "book" / "record.sh", "search-digits-tesla-ipc1"
    first, record = tmp_path / "runs" / name / "lr_images=10.0/seed-0/result.json", tmp_path / "book" / "results"
    record.mkdir(parents=True)
    shutil.copytree(buffer.folder, tmp_path / "runs" / "digits")
    how = {"OPTIONS": " ".join([*SHORT, "--iterations", "2"]), "JOBS": "0", "OMP_NUM_THREADS": "1"}
    how["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(script), str(tmp_path), "runs", name]
    where: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | how, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, **where) as begun:
        while not first.exists() and begun.poll() is None:
            time.sleep(0.01)
        os.killpg(begun.pid, signal.SIGKILL)
    kept = first.stat().st_mtime_ns
    assert not list(record.iterdir())
    where["env"]["MINUTES"] = "0"
    assert subprocess.run(command, check=True, **where).stdout == f"The time is over; left: {name}\n"
    where["env"]["MINUTES"] = "9"
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, **where)
    assert first.stat().st_mtime_ns == kept
    assert len(json.loads((record / f"{name}.json").read_text())["runs"]) == 6
