"""Numbers that leave their bounds: named at once, with the iteration; nothing that is not finite is ever written."""

import importlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Note

import cddlib
from cddlib import cli
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.exchange.published import export_buffer, import_buffer
from cddlib.experts.buffer import Buffer, expert_path, read_expert_record, write_trajectory
from cddlib.runtime import files, run_folder
from cddlib.runtime.errors import Diverged
from cddlib.synthetic import SyntheticSet
from cddlib.verify import verify

module = importlib.import_module("cddlib.distillation.loop")  # the package's attribute of this name is the function
distill = partial(cddlib.distill, device="cpu")
Recipe = Callable[..., DistillConfig]
Stops = Callable[..., str]


def check_finite(folder: Path) -> None:
    """No file in `folder` holds a number that is not finite."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a file")

    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            file = files.open_tensors(path)
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys()), path  # noqa: SIM118
            json.loads(json.dumps(file.metadata()), parse_constant=refuse)
        elif path.suffix in (".json", ".jsonl"):
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text, parse_constant=refuse)


def check_stopped(out: Path, sentence: str) -> None:
    """What a run that stopped leaves: its last good state, the metrics up to it, and the best set, ready to be tested.

    Nothing is ever finished, and the iteration that the sentence names is not among the metrics.
    """
    check_finite(out)
    assert not (out / "result.json").exists()
    stopped = int(re.findall(r"iteration (\d+)[,:]", sentence)[0])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == stopped, "one line for each iteration before, from 0 on"
    if not lines:
        assert not (out / "checkpoint.safetensors").exists()
        return
    saved = int(re.findall(r"checkpoint holds iteration (\d+)", sentence)[0])
    assert files.read_tensors(out / "checkpoint.safetensors", "state")[1]["iteration"] == saved < stopped
    assert json.loads(lines[saved])["iteration"] == saved
    best = int(re.findall(r"best set so far, of iteration (\d+), can be evaluated", sentence)[0])
    assert files.read_tensors(out / "synthetic.safetensors", "synthetic")[1]["iteration"] == best <= saved
    assert 0 < cddlib.evaluate_run(out, runs=1, baselines=False, device="cpu")["summary"]["synthetic"]["mean"] < 1


@pytest.fixture
def stops(tmp_path: Path, note: Note) -> Stops:
    """Run a distillation; returns what it said when it stopped, twice the same, or `finished`."""

    def stop(case: str, config: DistillConfig, buffer: Buffer) -> str:
        said = "finished"
        try:
            distill(config, buffer, tmp_path / "run")
            assert 0 < files.read_json(tmp_path / "run" / "result.json")["validation_accuracy"] < 1
            check_finite(tmp_path / "run")
        except Diverged as error:
            said = str(error)
            check_stopped(tmp_path / "run", said)
            with pytest.raises(Diverged, match=rf"^{re.escape(said)}$"):
                distill(config, buffer, tmp_path / "run")
            check_stopped(tmp_path / "run", said)
        note("divergence", **stopped(case, said.replace(str(buffer.folder), "buffer")))
        return said

    return stop


def stopped(case: str, sentence: str) -> dict[str, str | None]:
    """Where a case stopped, for the book; without a sentence it did not."""
    place = re.search(r"(iteration|epoch) (\d+)", sentence)
    return {"case": case, "stopped_at": place and place[0], "sentence": sentence}


# --- Distillation -----------------------------------------------------------------------------------------------

ABOVE = {"segments": 1, "student_steps": 2, "iterations": 120, "checkpoint_every": 15, "validate_every": 60}
SHORT = {"segments": 1, "iterations": 15, "validate_every": 5}
README = {**SHORT, "lr_images": 1e5, "lr_step_size": 1e-4, "step_size": 0.01}
CASES = {
    "the step size learns far too fast, downwards": (
        {"step_size": 0.5, "lr_step_size": 10.0},
        r"iteration 1, segments .*: the step size became -[\d.]+, from 0\.5 at first; .* a lower --lr-step-size ",
    ),
    "the step size learns far too fast, upwards": (
        {"step_size": 1e-3, "lr_step_size": 10.0},
        r"iteration 1, segments .*: the step size became [\d.]+, from 0\.001 at first; .* a lower --lr-step-size ",
    ),
    "label logits overflow": (
        {"labels": "learned", "lr_images": 0.0, "lr_labels": 3e38, "momentum_labels": 0.99, "step_size": 2.0},
        r"iteration \d+, segments .*: images or label logits are no longer finite; .* --lr-images or --lr-labels\.",
    ),
    "no loss is below the threshold": (
        {**ABOVE, "student_steps": 1, "loss_threshold": 1e-3},
        r"iteration 100, .*: the loss has been above 0\.001 for 100 iterations; the checkpoint holds iteration 90; ",
    ),
    "the student ends far away, without a threshold": (
        {**ABOVE, "step_size": 15.0, "lr_images": 0.0, "lr_step_size": 0.0, "window_end": 1},
        r"iteration 100, .*: the loss has been above 100 for 100 iterations; the checkpoint holds iteration 90; ",
    ),
    "a network trained for validation overflows": (
        {"step_size": 1e3, "evaluation_epochs": 50},
        "iteration 0: validation_accuracy is not finite, at the step size 1000; ",
    ),
    # rates, steps and starts of settings that users of the published codes report, or that the codes' own files name
    "MTT#31, #42: the README's row for CIFAR-10, IPC 10": (README, ""),
    "MTT#42: the same from noise": ({**README, "init": "noise"}, ""),
    "MTT#20: N 20, M 3": ({**SHORT, "lr_images": 1e3, "student_steps": 20, "expert_epochs": 3, "window_end": 3}, ""),
    "MTT#16: Tiny ImageNet's rates": ({**README, "lr_images": 1e4, "student_steps": 10}, ""),
    "MTT#24: slower images, a faster step size": ({**README, "lr_images": 100.0, "lr_step_size": 1e-2}, ""),
    "ATT's row for CIFAR-10, IPC 10": (
        {**SHORT, "lr_images": 1e4, "lr_step_size": 1e-4, "match_step": "nearest", "ipc": 2},
        "",
    ),
}
"""Settings, and how the sentence begins with which they have to stop; the others stop with one or end well."""


@pytest.mark.parametrize("case", CASES)
def test_settings_stop_with_a_sentence_or_end_well(buffer: Buffer, recipe: Recipe, stops: Stops, case: str) -> None:
    settings, sentence = CASES[case]
    assert re.match(sentence, stops(case, recipe(**settings), buffer))


def spoiled(buffer: Buffer, folder: Path, expert: int, epoch: int, number: float) -> Buffer:
    """A copy of `buffer` with `number` in one expert's parameters of one epoch."""
    shutil.copytree(buffer.folder, folder)
    snapshots = [buffer.parameters(expert, time) for time in range(buffer.epochs + 1)]
    snapshots[epoch][7] = number
    path = expert_path(folder, expert)
    write_trajectory(path, buffer.network, snapshots, read_expert_record(path))
    return Buffer(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named(
    buffer: Buffer, recipe: Recipe, stops: Stops, tmp_path: Path, number: float
) -> None:
    config = recipe(iterations=12)
    distill(config, buffer, tmp_path / "whole")
    lines = run_folder.read_metrics(tmp_path / "whole")[1:]
    met = next(line["iteration"] for line in lines if any(segment in ([1, 1], [1, 3]) for segment in line["matched"]))
    saved = max(iteration for iteration in range(met) if iteration % 2 == 0 or iteration % 3 == 0)
    bad = spoiled(buffer, tmp_path / "bad", 1, 3, number)
    assert stops(f"a parameter of an expert is {number}", config, bad).startswith(
        f"iteration {met}: {expert_path(bad.folder, 1)} holds parameters that are not finite at epoch 3; train this "
        f"expert anew. The checkpoint holds iteration {saved}. The best set so far, of iteration "
    )


@pytest.mark.parametrize("overrides", [{"labels": "learned"}, {"init": "correct"}])
def test_an_expert_that_is_not_finite_begins_nothing(
    buffer: Buffer, recipe: Recipe, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    bad = spoiled(spoiled(buffer, tmp_path / "one", 0, 6, float("nan")), tmp_path / "bad", 1, 6, float("nan"))
    with pytest.raises(Diverged, match=r"expert-00\d.* that are not finite at epoch 6; train this expert anew\.$"):
        distill(recipe(**overrides), bad, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_validation_that_overflows_later_stops_the_run(
    buffer: Buffer, recipe: Recipe, stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steered(*arguments: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        (*others, last), record = concurrent_gradient(*arguments)
        return [*others, torch.full_like(last, -300.0 if arguments[3] == 5 else 0.0)], record

    monkeypatch.setattr(module, "concurrent_gradient", steered)
    config = recipe(step_size=4.0, lr_step_size=1.0, momentum_step_size=0.0, evaluation_epochs=20)
    assert stops("a later network trained for validation overflows", config, buffer).startswith(
        "iteration 6: validation_accuracy is not finite, at the step size 304; the "
        "checkpoint holds iteration 4; start again in another folder with a lower --step-size, --lr-step-size or "
        "--lr-images. The best set so far, of iteration "
    )


# --- Experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("learning_rate", "sharpness_radius"), [(100.0, 0.0), (1e4, 0.01)])
def test_experts_that_diverge_stop_with_a_sentence(
    tmp_path: Path, note: Note, learning_rate: float, sharpness_radius: float
) -> None:
    settings = {"learning_rate": learning_rate, "sharpness_radius": sharpness_radius}
    config = cddlib.buffer_recipe("digits", width=8, experts=1, epochs=3, **settings)
    said = []
    for _ in range(2):
        with pytest.raises(
            Diverged, match=r"^expert 0 diverged in epoch [123] \(loss .*\); lower --learning-rate\.$"
        ) as e:
            cddlib.train_buffer(config, tmp_path, device="cpu")
        said.append(str(e.value))
        check_finite(tmp_path)
        assert not expert_path(tmp_path, 0).exists()
    assert said[0] == said[1]
    case = f"experts at learning rate {learning_rate:g}, sharpness radius {sharpness_radius:g}"
    note("divergence", **stopped(case, said[0]))


def test_experts_that_diverged_elsewhere_are_not_imported(buffer: Buffer, tmp_path: Path) -> None:
    (path,) = export_buffer(buffer, tmp_path / "pt")
    trajectories = torch.load(path)
    trajectories[1][6][-1][:] = 3e38  # finite, but its output is not
    trajectories[1][6][-2][:] = 3e38
    torch.save(trajectories, path)
    config = cddlib.buffer_recipe("digits", width=8)
    with pytest.raises(Diverged, match=r"pt, expert 1, diverged: its output at the last epoch is not finite\.$"):
        import_buffer(path, tmp_path / "out", config, device="cpu")
    assert not (tmp_path / "out").exists()


# --- Evaluation -------------------------------------------------------------------------------------------------


def test_networks_that_diverge_in_evaluation_count_as_0_and_are_named(
    buffer: Buffer, recipe: Recipe, tmp_path: Path, note: Note, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    found = distill(recipe(), buffer, run)
    settings = files.read_json(run / "config.json")
    before = verify(run, buffer.folder)
    assert all(check.passed for check in before)
    found.step_size.fill_(1e4)
    found.save(run / "synthetic.safetensors", config=settings, buffer_id=buffer.id, iteration=0)
    assert SyntheticSet.load(run / "synthetic.safetensors").step_size == 1e4
    cddlib.evaluate_run(run, runs=1, baselines=False, device="cpu")
    assert cli.main(["evaluate", str(run), "--runs", "2", "--device", "cpu"]) == 0  # goes on with the second network
    (path,) = run.glob("evaluation-*.json")
    record = files.read_json(path)
    check_finite(run)
    wanted = [
        f"network {index} trained on synthetic at learning rate 10000 diverged: it counts as 0." for index in (0, 1)
    ]
    assert record["diverged"] == wanted
    assert capsys.readouterr().out.splitlines()[-2:] == wanted
    assert record["accuracies"]["synthetic"] == [0.0, 0.0]
    assert all(0.05 < accuracy < 1 for name in ("random_real", "full") for accuracy in record["accuracies"][name])
    after = verify(run, buffer.folder)
    assert [check.passed for check in after] == [True] * (len(before) - 1) + [False]
    note("divergence", **stopped("a set with a step size of 10000, evaluated", wanted[0]))
