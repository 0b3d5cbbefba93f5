"""Verification finds nothing in an honest run, and every number that was changed with its checksum."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cddlib
from cddlib import cli
from cddlib.distillation.checkpoint import milestone_path, milestones
from cddlib.experts.buffer import Buffer, expert_path, write_trajectory
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import file_digest, read_json, read_tensors, write_json, write_tensors
from cddlib.verify import _compare, verify


@pytest.fixture(scope="module")
def run(buffer: Buffer, quick: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished distillation of three segments at once, with one evaluation."""
    folder = tmp_path_factory.mktemp("verify") / "run"
    config = cddlib.distill_recipe("contra", "digits", ipc=1, segments=3, **quick)
    cddlib.distill(config, buffer, folder, device="cpu")
    cddlib.evaluate_run(folder, runs=2, baselines=False, device="cpu")
    return folder


@pytest.fixture
def copies(run: Path, buffer: Buffer, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the run and of the buffer, to be tampered with."""
    return Path(shutil.copytree(run, tmp_path / "run")), Path(shutil.copytree(buffer.folder, tmp_path / "buffer"))


def test_an_honest_run_and_an_honest_buffer_are_the_same_to_the_last_bit(run: Path, buffer: Buffer):
    checks = verify(run, buffer.folder, sample=3, tolerance=0.0, device="cpu")
    checks += verify(buffer.folder, sample=2, tolerance=0.0, device="cpu")
    assert {check.difference for check in checks} == {0.0} and all(check.passed for check in checks)
    counted = {check.what: check.numbers for check in checks}
    assert counted["step sizes"] == sum(min(3, 6 - kept) for kept in milestones(run)) == 11
    assert counted["losses"] == counted["lengths of gradients"] == 3 * 11
    assert counted["accuracies of networks trained on the set"] == 2
    assert counted["training losses"] == 2 and counted["checksums of the experts"] == 2


@pytest.mark.parametrize("method", ["datm", "mct", "pad", "seqmatch"])
def test_other_methods_are_the_same_too(method: str, quick: dict[str, Any], tmp_path: Path):
    small = {"width": 8, "experts": 2, "epochs": 6}
    trained = cddlib.train_buffer(cddlib.buffer_recipe("digits", method, 2, **small), tmp_path / "b", device="cpu")
    lowered = {"window_end_initial": None, "replay": 1, "expert_epochs": 2, "validation_runs": 2}
    config = cddlib.distill_recipe(method, "digits", ipc=2, **{**quick, **lowered})
    cddlib.distill(config, trained, tmp_path / "run", device="cpu")
    found = verify(tmp_path / "run", trained.folder, device="cpu") + verify(trained.folder, device="cpu")
    assert {check.difference for check in found} == {0.0}


def tamper_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a sealed JSON file and seal it again, as someone would who wants to be believed."""
    value = read_json(path)
    change(value)
    write_json(path, value)


def tamper_line(run: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    change(lines[number])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tamper_json(run / "result.json", lambda result: result.update(metrics_sha256=file_digest(run / "metrics.jsonl")))


def tamper_parameters(folder: Path) -> None:
    """Other parameters of an expert, with the digests and checksums that belong to them."""
    opened, path = Buffer(folder), expert_path(folder, 0)
    vectors = [opened.parameters(0, epoch) * (1 + 0.1 * epoch) for epoch in range(opened.epochs + 1)]
    record = {key: value for key, value in opened.experts[0].items() if key not in ("file", "sha256")}
    write_trajectory(path, opened.network, vectors, record)
    tamper_json(folder / "buffer.json", lambda value: value["experts"][0].update(sha256=file_digest(path)))


def tamper_milestone(run: Path) -> None:
    path = milestone_path(run, 0)
    tensors, header = read_tensors(path, "state")
    write_tensors(path, tensors | {"images": 1.5 * tensors["images"]}, "state", header)


TAMPERED: dict[str, Callable[[Path, Path], None]] = {
    "losses": lambda run, _: tamper_line(run, 1, lambda line: line["losses"].__setitem__(2, line["losses"][2] * 0.9)),
    "lengths of gradients": lambda run, _: tamper_line(run, 1, lambda line: line["gradient_norms"].__setitem__(0, 1e9)),
    "the set before the first iteration": lambda run, _: tamper_milestone(run),
    "steps of an epoch": lambda _, buffer: tamper_parameters(buffer),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_changed_is_found(copies: tuple[Path, Path], what: str):
    run, buffer = copies
    TAMPERED[what](run, buffer)
    checks = verify(buffer, device="cpu") if "epoch" in what else verify(run, buffer, device="cpu")
    assert what in {check.what for check in checks if not check.passed}


@pytest.mark.parametrize(
    ("what", "pairs", "check"),
    [
        ("losses", [(0.9, 1.0), (4.5, 5.0)], (2, 0.1, 0.02)),
        ("lengths", [([3.0, 0.0], [3.0, 4.0])], (2, 0.8, 0.02)),
        ("accuracies", [(0.5, 0.25)], (1, 0.25, 0.05)),
        ("nothing", [], (0, 0.0, 0.02)),
        ("losses", [(1.0, 1.0), (math.nan, 1.0), (2.0, 2.0)], (3, math.nan, 0.02)),
    ],
)
def test_differences(what: str, pairs: list[Any], check: tuple[int, float, float]):
    found = _compare(what, pairs, 0.02)
    assert found[1:] == pytest.approx(check, nan_ok=True)
    assert found.passed == (found.difference == 0)


def test_what_cannot_be_verified_is_said(run: Path, buffer: Buffer, copies: tuple[Path, Path]):
    with pytest.raises(UserError, match="holds no buffer; to verify a distillation, give its experts with --buffer"):
        verify(run, device="cpu")
    with pytest.raises(UserError, match="sample is 0; it must be at least 1"):
        verify(run, buffer.folder, sample=0, device="cpu")
    with pytest.raises(UserError, match=r"tolerance is -0.1; it must be"):
        verify(run, buffer.folder, tolerance=-0.1, device="cpu")
    run, folder = copies
    tamper_line(run, 1, lambda line: line["matched"][0].__setitem__(0, 1 - line["matched"][0][0]))
    with pytest.raises(UserError, match="matched other segments in iteration 1 than its seed draws"):
        verify(run, folder, device="cpu")
    tamper_json(folder / "buffer.json", lambda value: value["experts"][0].update(test_accuracy=0.0))
    with pytest.raises(UserError, match=rf"matched the buffer {buffer.id}, but .* is \w+: another"):
        verify(run, folder, device="cpu")


def test_a_run_that_kept_nothing_is_not_verified(buffer: Buffer, recipe, tmp_path: Path) -> None:
    cddlib.distill(recipe(milestones=0, validate_every=0, iterations=1), buffer, tmp_path, device="cpu")
    with pytest.raises(UserError, match="kept no milestones and tested no set; nothing in it can be recomputed"):
        verify(tmp_path, buffer.folder, device="cpu")


def test_a_whitening_with_other_eigenvectors_is_the_same(tmp_path: Path) -> None:
    config = cddlib.buffer_recipe("digits", experts=1, epochs=1, width=4, zca=True)
    folder = cddlib.train_buffer(config, tmp_path, device="cpu").folder
    tensors, _ = read_tensors(folder / "preprocessing.safetensors", "preprocessing")
    tensors["eigenvectors"] *= torch.tensor([-1.0, 1.0]).repeat(32)
    write_tensors(folder / "preprocessing.safetensors", tensors, "preprocessing")
    assert all(check.passed for check in verify(folder, device="cpu"))


def test_command(copies: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    run, buffer = copies
    arguments = ["verify", str(run), "--buffer", str(buffer), "--tolerance", "0", "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count(" none\n") == 6
    tamper_line(run, 1, lambda line: line.update(step_size=1.0))
    path = next(run.glob("evaluation-*.json"))
    tamper_json(path, lambda record: record["accuracies"]["synthetic"].__setitem__(0, 0.99))
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out.count("MORE THAN 0") == 2
    assert "is not what it says: step sizes, accuracies of networks trained on the set differ by more" in captured.err
