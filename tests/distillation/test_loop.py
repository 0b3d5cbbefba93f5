"""The loop: it optimises, resumes with the same bytes, selects on validation images, and refuses what does not fit."""

import contextlib
import dataclasses
import importlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import cddlib
from cddlib import cli
from cddlib.data import dataset as data
from cddlib.distillation import gradient as concurrent
from cddlib.distillation.checkpoint import State, milestone_path, milestones
from cddlib.distillation.config import DistillConfig
from cddlib.distillation.consolidation import ConsolidateConfig
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.distillation.loop import Diverged
from cddlib.experts.buffer import Buffer
from cddlib.matching import combine
from cddlib.matching.segments import draw_segments
from cddlib.runtime import config as configs
from cddlib.runtime import files, run_folder
from cddlib.runtime import random as random_streams
from cddlib.runtime.config import replace
from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticSet, initialise

module = importlib.import_module("cddlib.distillation.loop")  # the package's attribute of this name is the function
distill = partial(cddlib.distill, device="cpu")
CPU = torch.device("cpu")


@pytest.fixture
def recipe(quick: dict[str, object]):
    """Configurations of a second; `validate_every=0` for those that need the last iterate."""
    return lambda **overrides: cddlib.distill_recipe("contra", **{**quick, "segments": 2, **overrides})


def first(config: DistillConfig, buffer: Buffer) -> SyntheticSet:
    return initialise(config, data.load("digits"), buffer, config.seed, CPU)


def metrics(folder: Path) -> list[dict[str, object]]:
    """All lines, without what depends on the clock."""
    iterations = files.read_json(folder / "config.json")["iterations"]
    lines = run_folder.Metrics.read(folder / "metrics.jsonl", until=iterations)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def outcome(folder: Path) -> tuple[object, ...]:
    """What must not depend on interruptions."""
    result = files.read_json(folder / "result.json")
    kept = {key: result[key] for key in ("selected_iteration", "validation_accuracy", "iterations_skipped")}
    return (
        {path.name for path in folder.iterdir()},
        (folder / "synthetic.safetensors").read_bytes(),
        metrics(folder),
        kept,
        files.read_json(folder / "config.json"),
    )


def interrupt_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Make the loop stop as by Ctrl-C when it begins this iteration."""
    iterate = module.iterate

    def interrupted(state, *rest):
        if state.iteration == iteration:
            raise KeyboardInterrupt
        return iterate(state, *rest)

    monkeypatch.setattr(module, "iterate", interrupted)


@pytest.mark.parametrize("segments", [1, 3])
def test_distillation_lowers_the_matching_loss(buffer: Buffer, recipe, tmp_path: Path, segments: int) -> None:
    config = recipe(segments=segments, iterations=12, validate_every=0)
    before, after = first(config, buffer), distill(config, buffer, tmp_path)

    def loss(synthetic: SyntheticSet) -> float:
        for variable in synthetic.variables():
            variable.requires_grad_()
        return sum(concurrent_gradient(config, buffer, synthetic, i)[1]["loss"] for i in range(1000, 1008)) / 8

    assert not torch.equal(before.images, after.images)
    assert loss(after) < loss(before) - 0.01
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(13))
    for line in lines[1:]:
        assert len(set(line["starts"])) == len(line["losses"]) == segments
        assert line["loss"] == pytest.approx(sum(line["losses"]) / segments)
    result = files.read_json(tmp_path / "result.json")
    assert (result["selected_iteration"], result["selected_by"]) == (12, "last iterate")
    assert {"seconds", "peak_memory_mb", "versions", "device", "commit", "finished"} <= result.keys()
    assert files.read_json(tmp_path / "config.json") == {
        **configs.as_dict(config),
        "compiled": False,  # too short to earn it
        "buffer_id": buffer.id,
        "data_fingerprint": buffer.data["fingerprint"],
    }


FULL = {"labels": "learned", "ema": 0.9, "momentum_labels": 0.9, "lr_labels": 0.5}


SUBSETS = {"subsets": 2, "ipc": 3, "segments": 2, "momentum_images": 0.9}


OTHERS = ({"student_batch": 4, "balance": 0.5}, {"precision": "bfloat16"})


@pytest.mark.parametrize("overrides", [{}, FULL, {**FULL, "validate_every": 0}, *OTHERS])
@pytest.mark.parametrize("iteration", [1, 4, 5])
def test_interrupted_and_resumed_gives_the_same(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, overrides: dict[str, object], iteration: int
) -> None:
    config = recipe(**overrides)
    distill(config, buffer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, iteration)
        with pytest.raises(KeyboardInterrupt):
            distill(config, buffer, tmp_path / "parts")
    assert not (tmp_path / "parts" / "synthetic.safetensors").exists()
    assert (tmp_path / "parts" / "checkpoint.safetensors").exists()
    distill(config, buffer, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "milestone-000000.safetensors",
        "milestone-000003.safetensors",
        "synthetic.safetensors",
        "result.json",
    ],
)
def test_interrupted_before_any_file_it_gives_the_same(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, file: str
) -> None:
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.name == file:
            raise KeyboardInterrupt
        replace(source, target)

    distill(recipe(**FULL), buffer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe(**FULL), buffer, tmp_path / "parts")
    distill(recipe(**FULL), buffer, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_long_runs_are_compiled_unless_told_otherwise(buffer: Buffer, recipe) -> None:
    def decided(**overrides: object) -> bool:
        return module._decided(recipe(**overrides), buffer, torch.device("cpu")).compiled

    least = next(n for n in (2**k for k in range(60)) if decided(iterations=n))
    assert least > 10_000, "the digits of the tests earn it late"
    assert not decided(iterations=least // 2) and not decided(iterations=least, compiled=False)
    assert decided(iterations=5, compiled=True)
    for more in ({"segments": 4}, {"student_steps": 2 * recipe().student_steps}, {"ipc": 2}):
        assert decided(iterations=least // 2, **more)


def kill_at_random(arguments: list[str], metrics_file: Path, lines: int, rng: random.Random) -> int:
    """Start the command line, wait for some lines of metrics, then kill it within a tenth of a second."""
    command = [str(Path(sys.executable).with_name("cddlib")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def written() -> int:
        return metrics_file.read_text().count("\n") if metrics_file.exists() else 0

    while written() < lines and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    return process.wait()


def test_killed_runs_end_with_the_same_bytes(buffer: Buffer, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        options = (
            "--iterations 60 --student-steps 5 --window-end 4 --segments 2 --checkpoint-every 3 --validate-every 7"
        )
        options += " --evaluation-epochs 5 --labels learned --ema 0.9 --device cpu"
        return ["distill", "--buffer", str(buffer.folder), "--out", str(tmp_path / name), *options.split()]

    assert cli.main(arguments("whole")) == 0
    rng = random.Random(0)
    file = tmp_path / "killed" / "metrics.jsonl"
    codes = [kill_at_random(arguments("killed"), file, lines, rng) for lines in (1, 15, 34)]
    assert codes == [-signal.SIGKILL] * 3
    assert not (tmp_path / "killed" / "result.json").exists()
    assert cli.main(arguments("killed")) == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_finished_run_is_returned(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    fresh = distill(recipe(), buffer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(module, "concurrent_gradient", None)  # calling it fails
    monkeypatch.setattr(module, "accuracy_of_set", None)  # calling it fails
    again = distill(recipe(), buffer.folder, tmp_path)
    for name, tensor in fresh.variable_tensors().items():
        assert torch.equal(tensor, again.variable_tensors()[name])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_run_in_the_folder_is_refused(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            distill(recipe(), buffer, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=r"run holds another run \(seed is 0 there and 1 here\); choose another folder"):
        distill(recipe(seed=1), buffer, tmp_path / "run")
    other = cddlib.train_buffer(
        cddlib.buffer_recipe("digits", width=8, experts=1, epochs=6, seed=9), tmp_path / "other", device="cpu"
    )
    with pytest.raises(UserError, match=r"holds another run \(buffer_id is '\w+' there and '\w+' here\)"):
        distill(recipe(), other, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 16}, r"^width is 16, but the experts in .* were trained with 8\.$"),
        ({"norm": "batch"}, r"^norm is 'batch', but the experts in .* were trained with 'instance'\.$"),
        ({"data": "fashion_mnist"}, r"^data is 'fashion_mnist', but the experts in .* were trained with 'digits'\.$"),
        ({"zca": True}, r"^zca is True, but the experts in .* were trained with False\.$"),
        ({"augment": "flip"}, r"^augment is 'flip', but the experts in .* were trained with 'crop_scale_rotate'\.$"),
        ({"window_end": 6}, r"the experts stop at epoch 6; window_end \+ expert_epochs may be at most 7\.$"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer: Buffer, recipe, tmp_path: Path, wrong, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(replace(recipe(), **wrong), buffer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experts_of_another_version_of_the_data_are_refused(buffer: Buffer, recipe, tmp_path: Path) -> None:
    shutil.copytree(buffer.folder, tmp_path / "b")
    manifest = files.read_json(tmp_path / "b" / "buffer.json")
    manifest["data"]["fingerprint"] = "0" * 16
    files.write_json(tmp_path / "b" / "buffer.json", manifest)
    with pytest.raises(
        UserError, match=r"another version of digits: its fingerprint is 0{16}, this one's [0-9a-f]{16}"
    ):
        distill(recipe(), tmp_path / "b", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_guard_skips_iterations_of_high_loss(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    config = recipe(validate_every=0, iterations=4, ema=0.5)

    def told(config, buffer, synthetic, iteration, *ranks):
        gradients, record = concurrent_gradient(config, buffer, synthetic, iteration, *ranks)
        return gradients, {**record, "loss": (0.5, 1.5, 1.0, 2.0)[iteration]}

    monkeypatch.setattr(module, "concurrent_gradient", told)
    distill(replace(config, loss_threshold=1.0), buffer, tmp_path / "some")
    lines = metrics(tmp_path / "some")
    assert [line["skipped"] for line in lines[1:]] == [False, True, False, True]
    assert lines[2]["step_size"] == lines[1]["step_size"] != lines[3]["step_size"]
    assert files.read_json(tmp_path / "some" / "result.json")["iterations_skipped"] == 2
    never = distill(replace(config, loss_threshold=0.1), buffer, tmp_path / "none")
    assert torch.equal(never.images, first(config, buffer).images)
    assert never.step_size == torch.tensor(config.synthetic.step_size)


def iterates(config: DistillConfig, buffer: Buffer, steps: int) -> list[dict[str, torch.Tensor]]:
    """Textbook SGD with momentum on the combined gradient: v ← m v + g, x ← x − r v. Also the average of images."""
    synthetic = first(config, buffer)
    for variable in synthetic.variables():
        variable.requires_grad_()
    kinds = {"images": "images", "label_logits": "labels", "step_size": "step_size"}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in synthetic.variable_tensors().items()}
    average = synthetic.images.detach().clone()
    found = []
    for iteration in range(steps):
        gradients, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        with torch.no_grad():
            for (name, x), gradient in zip(synthetic.variable_tensors().items(), gradients, strict=True):
                velocity[name] = getattr(config, f"momentum_{kinds[name]}") * velocity[name] + gradient
                x -= getattr(config, f"lr_{kinds[name]}") * velocity[name]
        if config.optimizer.ema is not None:
            average = config.optimizer.ema * average + (1 - config.optimizer.ema) * synthetic.images.detach()
        found.append({**synthetic.copy().variable_tensors(), "average": average})
    return found


def test_the_optimiser_is_sgd_with_momentum(buffer: Buffer, recipe, tmp_path: Path) -> None:
    overrides = {"momentum_images": 0.7, "momentum_step_size": 0.3, "lr_step_size": 1e-3, "lr_labels": 2.0}
    config = recipe(iterations=4, validate_every=0, labels="learned", **overrides)
    found = distill(config, buffer, tmp_path).variable_tensors()
    wanted, start = iterates(config, buffer, 4)[-1], first(config, buffer).variable_tensors()
    for name, tensor in found.items():
        moved = (wanted[name] - start[name]).abs().max()
        assert moved > 1e-5
        assert (tensor - wanted[name]).abs().max() < 1e-3 * moved


def test_the_moving_average_is_saved_in_place_of_the_images(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(iterations=4, validate_every=0, ema=0.8)
    found, wanted = distill(config, buffer, tmp_path), iterates(config, buffer, 4)[-1]
    moved = (wanted["average"] - first(config, buffer).images).abs().max()
    assert (found.images - wanted["average"]).abs().max() < 1e-3 * moved
    assert (found.images - wanted["images"]).abs().max() > 0.1 * moved


# --- Divergence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segment", "spoiled"), [(0, "loss"), (1, "loss"), (1, "gradient")])
def test_numbers_that_are_not_finite_stop_and_name_the_segment(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, segment: int, spoiled: str
) -> None:
    losses = concurrent.matching_losses
    calls = []

    def spoil(*arguments):
        found = losses(*arguments)
        calls.append(1)
        if len(calls) < 5:
            return found
        each = list(found)
        each[segment] = (
            each[segment] * float("nan") if spoiled == "loss" else each[segment] + (0 * each[segment]).sqrt()
        )
        return torch.stack(each)

    config = recipe(validate_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(concurrent, "matching_losses", spoil)
        with pytest.raises(Diverged) as stopped:
            distill(config, buffer, tmp_path / "run")
    distill(config, buffer, tmp_path / "whole")
    fifth = metrics(tmp_path / "whole")[5]
    numbers = "nan" if spoiled == "loss" else f"{fifth['losses'][segment]:g}"
    assert str(stopped.value) == (
        f"iteration 5, the segment from epoch {fifth['starts'][segment]} of expert {fifth['expert']}: its loss is "
        f"{numbers} and its gradient's norm nan; the checkpoint holds iteration 4; start again in another folder with "
        f"a lower --lr-images or --step-size."
    )
    assert files.read_tensors(tmp_path / "run" / "checkpoint.safetensors", "state")[1]["iteration"] == 4
    distill(config, buffer, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_segments_of_other_experts_are_named(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    config = recipe(segments=1, concurrent_experts=2, validate_every=0)
    ((expert, start),) = concurrent_gradient(config, buffer, ready(config, buffer), 0)[1]["others"]
    losses = concurrent.matching_losses
    monkeypatch.setattr(
        concurrent, "matching_losses", lambda *given: losses(*given) * torch.tensor([1.0, float("inf")])
    )
    sentence = rf"^iteration 1, the segment from epoch {start} of expert {expert}: its loss is inf and "
    with pytest.raises(Diverged, match=sentence):
        distill(config, buffer, tmp_path)


def test_the_best_set_before_a_divergence_can_be_evaluated(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(lr_images=1e30)
    with pytest.raises(Diverged) as stopped:
        distill(config, buffer, tmp_path)
    assert re.fullmatch(
        r"iteration 2, the segment from epoch \d of expert \d: its loss is (nan|inf) and its gradient's norm (nan|inf)"
        r"; the checkpoint holds iteration 1; start again in another folder with a lower --lr-images or --step-size\. "
        r"The best set so far, of iteration 0, can be evaluated\.",
        str(stopped.value),
    )
    best = SyntheticSet.load(tmp_path / "synthetic.safetensors")
    assert torch.equal(best.images, first(config, buffer).images)
    record = cddlib.evaluate_run(tmp_path, runs=1, baselines=False, device="cpu")
    assert record["accuracies"]["synthetic"] == [pytest.approx(0.5, abs=0.4)]
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(Diverged) as again:
        distill(config, buffer, tmp_path)
    assert str(again.value) == str(stopped.value)


def test_without_validation_no_set_is_saved_at_a_divergence(buffer: Buffer, recipe, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"lower --lr-images or --step-size\.$"):
        distill(recipe(lr_images=1e30, validate_every=0), buffer, tmp_path)
    assert not (tmp_path / "synthetic.safetensors").exists()


def test_images_that_are_not_finite_are_never_saved(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    def huge(*arguments):
        gradients, record = concurrent_gradient(*arguments)
        return [gradient.sign() * 1e38 for gradient in gradients], record  # finite, but not times the rate

    monkeypatch.setattr(module, "concurrent_gradient", huge)
    with pytest.raises(
        Diverged,
        match=r"^iteration 1, segments from epochs \[\d, \d\] of expert \d: images or label logits are no longer "
        r"finite; the checkpoint holds iteration 0; start again in another folder with a lower --lr-images or --lr-la",
    ):
        distill(recipe(iterations=1, validate_every=0, lr_step_size=0.0), buffer, tmp_path)
    assert not (tmp_path / "synthetic.safetensors").exists()
    assert files.read_tensors(tmp_path / "checkpoint.safetensors", "state")[1]["iteration"] == 0


@pytest.mark.parametrize(("gradient", "became"), [(1.0, "-9.95"), (-0.49, "4.95"), (-0.5, "5.05")])
def test_a_step_size_that_leaves_its_bounds_stops_the_run(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, gradient: float, became: str
) -> None:
    """0 and a hundred times its first value."""

    def steered(*arguments):
        (*others, last), record = concurrent_gradient(*arguments)
        return [*others, torch.full_like(last, gradient)], record

    monkeypatch.setattr(module, "concurrent_gradient", steered)
    config = recipe(lr_step_size=10.0, lr_images=0.0, step_size=0.05, iterations=1, validate_every=0)
    stopped = pytest.raises(
        Diverged,
        match=rf"^iteration 1, segments from epochs \[\d, \d\] of expert \d: the step size became {became}, from 0\.05 "
        r"at first; the checkpoint holds iteration 0; start again in another folder with a lower --lr-step-size "
        r"\(10\)\.$",
    )
    with contextlib.nullcontext() if gradient == -0.49 else stopped:
        assert distill(config, buffer, tmp_path).step_size.item() == pytest.approx(float(became))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_losses_that_stay_above_the_guard_stop_the_run(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, threshold: float | None
) -> None:
    """Without a threshold of the user's, no iteration is skipped; an interruption forgets nothing."""
    guard = 100.0 if threshold is None else threshold

    def told(config, buffer, synthetic, iteration, *ranks):
        gradients, record = concurrent_gradient(config, buffer, synthetic, iteration, *ranks)
        return gradients, {**record, "loss": guard if iteration == 1 else 1.01 * guard}  # guard: not above it

    monkeypatch.setattr(module, "concurrent_gradient", told)
    monkeypatch.setattr(module, "MOST_ABOVE", 3)
    config = recipe(loss_threshold=threshold, validate_every=0, iterations=20)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            distill(config, buffer, tmp_path)
    lines = run_folder.Metrics.read(tmp_path / "metrics.jsonl", until=4)[1:]
    assert [line["skipped"] for line in lines] == [threshold is not None and index != 1 for index in range(4)]
    with pytest.raises(
        Diverged,
        match=rf"^iteration 5, segments from .*: the loss has been above {guard:g} for 3 iterations; the checkpoint "
        r"holds iteration 4; .* lower --step-size or --lr-images, or with a higher --loss-threshold\.$",
    ):
        distill(config, buffer, tmp_path)


def test_nothing_depends_on_the_test_images(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    distill(recipe(), buffer, tmp_path / "plain")
    digits = data.load("digits")
    poisoned = dataclasses.replace(digits, test=data.Images(digits.test.images * 0, digits.test.labels))
    poisoned.__dict__["fingerprint"] = digits.fingerprint
    monkeypatch.setattr(module, "load", lambda *_: poisoned)
    distill(recipe(), buffer, tmp_path / "poisoned")
    assert outcome(tmp_path / "poisoned") == outcome(tmp_path / "plain")


@pytest.mark.parametrize(("accuracies", "best"), [((0.1, 0.9, 0.5), 2), ((0.9, 0.8, 0.9), 0), ((0.0, 0.1, 0.2), 4)])
def test_the_best_iterate_on_the_validation_images_is_selected(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, accuracies: tuple[float, ...], best: int
) -> None:
    told = iter(accuracies)
    seen = []

    def accuracy(synthetic: SyntheticSet, *rest, **streams) -> float:
        seen.append((synthetic, (*rest, streams)))
        return next(told)

    monkeypatch.setattr(module, "accuracy_of_set", accuracy)
    config = recipe(iterations=4, validate_every=2)
    found = distill(config, buffer, tmp_path)
    validation = data.load("digits").split[1]
    for _, (_network, _config, strategy, real, streams) in seen:
        assert torch.equal(real.images, validation.images)
        assert (strategy, streams) == (config.augmentation.augment, {"purpose": "validation", "seed": config.seed})
    result = files.read_json(tmp_path / "result.json")
    assert result["selected_iteration"] == best
    assert result["selected_by"] == "validation accuracy"
    assert result["validation_accuracy"] == max(accuracies)
    wanted = [first(config, buffer).images, *(step["images"] for step in iterates(config, buffer, best))][-1]
    assert torch.allclose(found.images, wanted, atol=1e-4)
    lines = {line["iteration"]: line.get("validation_accuracy") for line in metrics(tmp_path)}
    assert lines == {0: [accuracies[0]], 1: None, 2: [accuracies[1]], 3: None, 4: [accuracies[2]]}


def test_the_last_iterate_is_validated_too(buffer: Buffer, recipe, tmp_path: Path) -> None:
    distill(recipe(iterations=5, validate_every=3, validation_runs=2), buffer, tmp_path)
    validated = {line["iteration"]: len(line.get("validation_accuracy", [])) for line in metrics(tmp_path)}
    assert validated == {0: 2, 1: 0, 2: 0, 3: 2, 4: 0, 5: 2}


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 4 KB: a checkpoint does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_gives_a_message_and_keeps_what_was_there(
    buffer: Buffer, tmp_path: Path, monkeypatch, capsys, full_disk
) -> None:
    options = "--iterations 6 --student-steps 5 --window-end 4 --checkpoint-every 2 --validate-every 0 --device cpu"
    arguments = ["distill", "--buffer", str(buffer.folder), "--out", str(tmp_path / "run"), *options.split()]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert cli.main(arguments) == 130
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    assert len(before) > 4096
    full_disk()
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "what was finished before is kept, and the same command resumes" in error
    assert checkpoint.read_bytes() == before
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


# --- Checkpoints and milestones ---------------------------------------------------------------------------------


def stop_at(iteration: int, config: DistillConfig, buffer: Buffer, folder: Path) -> None:
    """Begin the run and stop it there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, iteration)
        distill(config, buffer, folder)


@pytest.mark.parametrize(
    ("count", "kept"), [(0, []), (1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_milestones_are_evenly_spaced_checkpoints(
    buffer: Buffer, recipe, tmp_path: Path, count: int, kept: list[int]
) -> None:
    config = recipe(milestones=count, labels="learned", ema=0.9)
    distill(config, buffer, tmp_path / "run")
    assert milestones(tmp_path / "run") == kept
    for iteration in kept:
        often = replace(config, checkpoint_every=1, milestones=0)
        stop_at(iteration, often, buffer, tmp_path / str(iteration)) if iteration else None
        state, header = files.read_tensors(milestone_path(tmp_path / "run", iteration), "state")
        assert header["iteration"] == iteration
        if iteration:
            other, also = files.read_tensors(tmp_path / str(iteration) / "checkpoint.safetensors", "state")
            assert {**header, "seconds": 0} == {**also, "seconds": 0}
            assert state.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
@pytest.mark.parametrize("count", [0, 4])
def test_a_checkpoint_that_is_deleted_costs_the_way_from_the_last_milestone(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, damage: str, count: int
) -> None:
    config = recipe(**FULL, milestones=count)
    distill(config, buffer, tmp_path / "whole")
    stop_at(3, config, buffer, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    if damage != "deleted":
        whole = checkpoint.read_bytes()
        checkpoint.write_bytes(whole[:-10] if damage == "truncated" else whole[:-10] + b"?" + whole[-9:])
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        with pytest.raises(UserError) as refused:
            distill(config, buffer, tmp_path / "run")
        reason = {"truncated": r"is truncated or not .*", "flipped": r"is damaged: .* does not have the digest .*"}
        place = "iteration 3" if count else "the start"
        assert re.fullmatch(rf"{checkpoint} {reason[damage]}\. Delete it to go on from {place}\.", str(refused.value))
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    checkpoint.unlink()
    begun = []
    iterate = module.iterate
    monkeypatch.setattr(module, "iterate", lambda state, *rest: begun.append(state.iteration) or iterate(state, *rest))
    distill(config, buffer, tmp_path / "run")
    assert begun == list(range(3 if count else 0, 6))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_damaged_milestones_are_named_one_after_the_other(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(validate_every=0)
    distill(config, buffer, tmp_path / "whole")
    stop_at(3, config, buffer, tmp_path / "run")
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    names = ["checkpoint.safetensors", *(f"milestone-00000{kept}.safetensors" for kept in (3, 1, 0))]
    for name, place in zip(names, ("iteration 3", "iteration 1", "iteration 0", "the start"), strict=True):
        with pytest.raises(UserError, match=rf"/{name} is truncated or not .*\. Delete it to go on from {place}\.$"):
            distill(config, buffer, tmp_path / "run")
        (tmp_path / "run" / name).unlink()
    distill(config, buffer, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_damaged_metrics_are_named_before_anything_is_lost(buffer: Buffer, recipe, tmp_path: Path) -> None:
    stop_at(4, recipe(), buffer, tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"anchor": ', b'"anchor":1', 1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is damaged: its contents do not have the checksum"):
        distill(recipe(), buffer, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_use_is_refused(buffer: Buffer, recipe, tmp_path: Path) -> None:
    command = "import sys\nfrom pathlib import Path\nfrom cddlib.runtime.run_folder import locked\n"
    command += "with locked(Path(sys.argv[1])):\n print(flush=True)\n sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "run" / ".lock")], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(
            UserError, match=r"run is in use: other work holds \.lock; wait until it ends"
        ):
            distill(recipe(), buffer, tmp_path / "run")
        other.communicate()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    distill(recipe(iterations=1, validate_every=0), buffer, tmp_path / "run")


# --- Combining, holding, replaying, measuring -------------------------------------------------------------------

RULES = ("gradnorm", "pcgrad", "cagrad", "upgrad", "mgda", "gem")


def segment_gradients(
    config: DistillConfig, buffer: Buffer, synthetic: SyntheticSet, iteration: int, matched: list[tuple[int, int]]
) -> list[tuple[float, tuple[torch.Tensor, ...]]]:
    """Loss and gradient of each (expert, start epoch), with the iteration's batches and augmentations in this order."""
    rng = random_streams.generator(config.seed, "iteration", iteration)
    torch.randint(len(buffer.experts), (), generator=rng)
    draw_segments(config, iteration, rng)
    found = []
    for expert, start in matched:
        steps = cddlib.plan_student(config, len(synthetic.labels), config.augmentation.augment, rng)
        loss = cddlib.matching_loss(
            buffer.network,
            buffer.parameters(expert, start),
            buffer.parameters(expert, start + config.schedule.expert_epochs),
            synthetic.images,
            synthetic.targets(),
            synthetic.step_size,
            steps,
        )
        found.append((loss.item(), torch.autograd.grad(loss, synthetic.variables())))
    return found


def ready(config: DistillConfig, buffer: Buffer) -> SyntheticSet:
    """The first set, to be differentiated."""
    synthetic = first(config, buffer)
    for variable in synthetic.variables():
        variable.requires_grad_()
    return synthetic


def test_one_expert_is_matched_at_the_start_epochs_that_all_would_be(buffer: Buffer, recipe, tmp_path: Path) -> None:
    for expert in (None, 0, 1):
        distill(recipe(expert=expert, iterations=8, validate_every=0), buffer, tmp_path / f"{expert}")
    every, zero, one = (metrics(tmp_path / name)[1:] for name in ("None", "0", "1"))
    assert {line["expert"] for line in every} == {0, 1}
    assert {line["expert"] for line in zero} == {0}
    assert {line["expert"] for line in one} == {1}
    draws = [[(line["starts"], line["anchor"]) for line in lines] for lines in (every, zero, one)]
    assert draws[0] == draws[1] == draws[2]
    assert every[0]["losses"] == (zero, one)[every[0]["expert"]][0]["losses"]  # before the sets part


@pytest.mark.parametrize("expert", [None, 1])
def test_replay_matches_anchors_of_earlier_iterations(buffer: Buffer, recipe, tmp_path: Path, expert) -> None:
    distill(recipe(replay=2, iterations=9, validate_every=0, expert=expert), buffer, tmp_path)
    lines = metrics(tmp_path)[1:]
    anchors = [(line["expert"], line["starts"][line["anchor"]]) for line in lines]
    for index, line in enumerate(lines):
        replayed = Counter(tuple(pair) for pair in line["replayed"])
        assert replayed.total() == min(2, index)
        assert replayed <= Counter(anchors[:index])  # each earlier iteration at most once
        assert len(line["losses"]) == len(line["starts"]) + len(line["replayed"])
    assert lines[0]["replayed"] == []
    assert len({tuple(map(tuple, line["replayed"])) for line in lines[3:]}) > 1


def test_without_replay_no_line_names_any(buffer: Buffer, recipe, tmp_path: Path) -> None:
    distill(recipe(validate_every=0), buffer, tmp_path)
    assert all({"replayed", "weights"}.isdisjoint(line) for line in metrics(tmp_path))


@pytest.mark.parametrize("overrides", [{}, {"balance": 0.7}, {"combine": "gem"}, {"combine": "gradnorm"}])
def test_replays_gradient_is_the_weighted_sum_of_all(buffer: Buffer, recipe, overrides: dict[str, object]) -> None:
    config = recipe(replay=2, **overrides)
    synthetic = ready(config, buffer)
    found, record = concurrent_gradient(config, buffer, synthetic, 5)
    matched = [(record["expert"], start) for start in record["starts"]] + record["replayed"]
    assert len(matched) == 4
    parts = segment_gradients(config, buffer, synthetic, 5, matched)
    assert record["losses"] == pytest.approx([loss for loss, _ in parts])
    shares = record.get("weights", [0.25] * 4)
    if "balance" in overrides:
        shares = [1 / 1.7 if k == record["anchor"] else 0.7 / 3 / 1.7 for k in range(4)]
    for v, gradient in enumerate(found):
        wanted = sum(share * part[v] for share, (_, part) in zip(shares, parts, strict=True))
        torch.testing.assert_close(gradient, wanted)
    losses = [loss for loss, _ in parts]
    averaged = shares if "combine" not in overrides else [0.25] * 4
    assert record["loss"] == pytest.approx(sum(share * loss for share, loss in zip(averaged, losses, strict=True)))


def test_several_experts_give_the_mean_of_their_gradients(buffer: Buffer, recipe) -> None:
    config = recipe(concurrent_experts=2, labels="learned", segments=2)
    synthetic = ready(config, buffer)
    for iteration in (0, 3):
        found, record = concurrent_gradient(config, buffer, synthetic, iteration)
        own = [(record["expert"], start) for start in record["starts"]]
        assert {expert for expert, _ in own} | {expert for expert, _ in record["others"]} == {0, 1}
        starts = [start for _, start in record["others"]]
        assert len(starts) == 2 and starts[1] - starts[0] == 2 and starts[0] >= 0
        parts = segment_gradients(config, buffer, synthetic, iteration, own + record["others"])
        assert record["losses"] == pytest.approx([loss for loss, _ in parts])
        assert record["loss"] == pytest.approx(sum(record["losses"]) / 4)
        for v, gradient in enumerate(found):
            by_expert = [(parts[k][1][v] + parts[k + 1][1][v]) / 2 for k in (0, 2)]
            torch.testing.assert_close(gradient, (by_expert[0] + by_expert[1]) / 2)
        for norm, (_, gradient) in zip(record["gradient_norms"], parts, strict=True):
            assert norm == pytest.approx(torch.cat([part.flatten() for part in gradient]).norm().item(), rel=1e-4)


def test_other_experts_change_no_draw_of_the_first(buffer: Buffer, recipe, tmp_path: Path) -> None:
    for count in (1, 2):
        distill(recipe(concurrent_experts=count, validate_every=0), buffer, tmp_path / str(count))
    one, two = (metrics(tmp_path / name)[1:] for name in "12")
    drawn = ("expert", "starts", "anchor")
    assert [[line[name] for name in drawn] for line in one] == [[line[name] for name in drawn] for line in two]
    assert two[0]["losses"][:2] == pytest.approx(one[0]["losses"])
    assert not any("others" in line for line in one)
    assert len({str(line["others"]) for line in two}) > 1


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_in_the_loop_and_records_its_weights(buffer: Buffer, recipe, tmp_path: Path, rule: str) -> None:
    config = recipe(combine=rule, segments=3, iterations=2, validate_every=0, student_steps=3)
    for name in ("one", "two"):
        distill(config, buffer, tmp_path / name)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    lines = metrics(tmp_path / "one")[1:]
    for line in lines:
        assert len(line["weights"]) == 3
        assert line["loss"] == pytest.approx(sum(line["losses"]) / 3)
    synthetic = ready(config, buffer)
    found, record = concurrent_gradient(config, buffer, synthetic, 0)
    assert record["weights"] == lines[0]["weights"]
    parts = segment_gradients(config, buffer, synthetic, 0, [(record["expert"], start) for start in record["starts"]])
    gradients = [gradient for _, gradient in parts]
    products = combine.gramian(gradients, config.optimizer.rates(synthetic))
    wanted = combine.weights(config, products, record["losses"], record["anchor"], stream_after(config, buffer, 0))
    assert record["weights"] == pytest.approx(wanted, rel=1e-4)
    for v, gradient in enumerate(found):
        summed = sum(share * part[v] for share, part in zip(record["weights"], gradients, strict=True))
        torch.testing.assert_close(gradient, summed)


def stream_after(config: DistillConfig, buffer: Buffer, iteration: int) -> torch.Generator:
    """The iteration's generator after the segments' students are drawn."""
    rng = random_streams.generator(config.seed, "iteration", iteration)
    torch.randint(len(buffer.experts), (), generator=rng)
    draw_segments(config, iteration, rng)
    for _ in range(config.schedule.segments):
        cddlib.plan_student(config, len(first(config, buffer).labels), config.augmentation.augment, rng)
    return rng


def test_the_rule_draws_from_the_iterations_own_stream(buffer: Buffer, recipe, monkeypatch) -> None:
    config = recipe(combine="pcgrad", segments=3)
    seen = []

    def overheard(*arguments):
        seen.append(arguments[-1].get_state())
        return combine.weights(*arguments)

    monkeypatch.setattr(concurrent, "weights", overheard)
    for iteration in (0, 4):
        concurrent_gradient(config, buffer, ready(config, buffer), iteration)
    assert torch.equal(seen[0], stream_after(config, buffer, 0).get_state())
    assert torch.equal(seen[1], stream_after(config, buffer, 4).get_state())


@pytest.mark.parametrize("kind", ["ewc", "si"])
def test_images_are_held_after_the_optimisers_step(buffer: Buffer, recipe, tmp_path: Path, kind: str) -> None:
    held = {"consolidation": kind, "consolidation_strength": 0.5, "consolidate_every": 2}
    config = recipe(iterations=5, validate_every=0, ema=0.8, **held)
    found = distill(config, buffer, tmp_path)
    synthetic = ready(config, buffer)
    x = synthetic.images.detach()
    velocity, anchor, average = torch.zeros_like(x), x.clone(), x.clone()
    omega, gathered = torch.zeros_like(x), torch.zeros_like(x)
    rate = {"lr_images": 0.0, "lr_labels": 0.0}
    state = State(replace(config, **rate), ConsolidateConfig(), synthetic)
    for iteration in range(5):
        gradients, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        state.step(gradients, torch.arange(len(x)))  # the step size alone
        velocity = config.optimizer.momentum_images * velocity + gradients[0]
        step = -config.optimizer.lr_images * velocity
        x += step
        gathered += gradients[0] ** 2 if kind == "ewc" else -gradients[0] * step
        if iteration >= 2:
            x -= (x - anchor) * (1 - 1 / (1 + 0.5 * omega / omega.mean()))
        if iteration % 2 == 1:
            way = (x - anchor) ** 2
            omega += gathered if kind == "ewc" else gathered.clamp(min=0) / (way + way.mean())
            anchor, gathered = x.clone(), torch.zeros_like(x)
        average = 0.8 * average + 0.2 * x
    moved = (average - first(config, buffer).images).abs().max()
    assert (found.images - average).abs().max() < 1e-3 * moved
    free = distill(recipe(iterations=5, validate_every=0, ema=0.8), buffer, tmp_path / "free")
    assert (found.images - free.images).abs().max() > 0.02 * moved


PROBES = {"probe_starts": (0, 2, 4), "probe_expert": 1, "probe_every": 2, "similarity_every": 3, "error_every": 5}


@pytest.mark.parametrize(
    "overrides",
    [
        {"consolidation": "ewc", "consolidate_every": 3, "replay": 1},
        {"consolidation": "si", "consolidate_every": 3, "combine": "pcgrad", "segments": 3, "ema": 0.9},
        {"replay": 2, "combine": "gem", "expert": 0},
        {**PROBES, "probe_starts": (1, 4), "combine": "pcgrad", "student_steps": 3},
        {"labels": "teacher", "gradient": "truncated", "ema": 0.9},
        {"convex": True, "match_step": "nearest", "replay": 1, "concurrent_experts": 2},
        {**SUBSETS, "labels": "learned", "dropped_fraction": 0.2, "iterations": 8},
    ],
)
def test_interrupted_with_remedies_and_probes_it_gives_the_same(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, overrides: dict[str, object]
) -> None:
    config = recipe(**{"iterations": 7, "validate_every": 0, **overrides})
    distill(config, buffer, tmp_path / "whole")
    for iteration in (3, 5):  # a checkpoint of 2, before the first consolidation; and of 4, between two
        with monkeypatch.context() as patch:
            interrupt_at(patch, iteration)
            with pytest.raises(KeyboardInterrupt):
                distill(config, buffer, tmp_path / "parts")
    distill(config, buffer, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_probes_are_measured_on_time(buffer: Buffer, recipe, tmp_path: Path) -> None:
    distill(recipe(iterations=7, validate_every=0, **PROBES), buffer, tmp_path)
    lines = metrics(tmp_path)
    measured = {name: [line["iteration"] for line in lines if name in line] for name in lines[0]}
    assert measured["probe_losses"] == [0, 2, 4, 6, 7]
    assert measured["gradient_similarity"] == [0, 3, 6, 7]
    assert measured["accumulated_error"] == [0, 5, 7]
    for line in lines:
        assert len(line.get("probe_losses", [0, 0, 0])) == 3
        if "gradient_similarity" in line and "probe_losses" in line:
            assert line["gradient_similarity"]["losses"] == line["probe_losses"]
    assert lines[0]["probe_losses"] != lines[2]["probe_losses"]


@pytest.mark.parametrize(
    ("overrides", "measured"), [({"probe_starts": (1,)}, {"probe_losses"}), ({"error_every": 1}, {"accumulated_error"})]
)
def test_each_is_measured_without_the_others(buffer: Buffer, recipe, tmp_path: Path, overrides, measured) -> None:
    distill(recipe(iterations=2, validate_every=0, **overrides), buffer, tmp_path)
    names = {"probe_losses", "gradient_similarity", "accumulated_error", "validation_accuracy"}
    assert [line.keys() & names for line in metrics(tmp_path)] == [measured] * 3


def test_measuring_changes_nothing(buffer: Buffer, recipe, tmp_path: Path) -> None:
    for name, overrides in (("plain", {}), ("measured", PROBES)):
        distill(recipe(labels="learned", **overrides), buffer, tmp_path / name)
    found = [SyntheticSet.load(tmp_path / name / "synthetic.safetensors") for name in ("plain", "measured")]
    for name, tensor in found[0].variable_tensors().items():
        assert tensor.numpy().tobytes() == found[1].variable_tensors()[name].numpy().tobytes()
    plain, measured = (metrics(tmp_path / name) for name in ("plain", "measured"))
    assert [{key: line[key] for key in before} for before, line in zip(plain, measured, strict=True)] == plain


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"probe_starts": (0, 5)},
            "probe_starts is (0, 5), but the experts stop at epoch 6 and segments are 2 epochs long; probes may start "
            "at epoch 4 at the latest.",
        ),
        ({"probe_expert": 2}, "probe_expert is 2, but FOLDER holds experts 0 to 1."),
        ({"expert": 2}, "expert is 2, but FOLDER holds experts 0 to 1."),
        ({"concurrent_experts": 3}, "concurrent_experts is 3, but FOLDER holds 2."),
    ],
)
def test_segments_that_the_buffer_does_not_hold_are_refused(
    buffer: Buffer, recipe, tmp_path: Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        distill(recipe(**wrong), buffer, tmp_path / "run")
    assert str(refused.value) == message.replace("FOLDER", str(buffer.folder))
    assert not (tmp_path / "run").exists()


def test_the_last_probe_that_the_buffer_holds_is_followed(buffer: Buffer, recipe, tmp_path: Path) -> None:
    distill(recipe(probe_starts=(4,), probe_expert=1, expert=1, iterations=1, validate_every=0), buffer, tmp_path)
    assert [len(line["probe_losses"]) for line in metrics(tmp_path)] == [1, 1]


# --- Teacher labels, real epochs, subsets -----------------------------------------------------------------------


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]]:
    """What each iteration of the loop makes of the set: before, after, and the line for the metrics."""
    iterate, seen = module.iterate, []

    def watched(state, *rest):
        before = state.synthetic.copy().variable_tensors()
        record = iterate(state, *rest)
        seen.append((before, state.synthetic.copy().variable_tensors(), record))
        return record

    monkeypatch.setattr(module, "iterate", watched)
    return seen


def test_the_anchor_s_target_labels_the_images(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    """With the network at the end of the anchor's segment, before the step."""
    seen = spy(monkeypatch)
    config = recipe(labels="teacher", segments=3, ipc=2, iterations=8, validate_every=0)
    found = distill(config, buffer, tmp_path)
    anchors = set()
    for before, after, record in seen:
        start = record["starts"][record["anchor"]]
        anchors.add(record["anchor"])
        target = buffer.parameters(record["expert"], start + config.schedule.expert_epochs)
        torch.testing.assert_close(after["label_logits"], buffer.network(target, before["images"]))
        assert not torch.equal(after["images"], before["images"])
    assert len(anchors) > 1
    assert torch.equal(found.label_logits, seen[-1][1]["label_logits"])
    torch.testing.assert_close(seen[0][0]["label_logits"], first(config, buffer).label_logits)


def test_a_skipped_iteration_labels_nothing_anew(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(labels="teacher", iterations=3, validate_every=0, loss_threshold=1e-3)
    assert torch.equal(distill(config, buffer, tmp_path).label_logits, first(config, buffer).label_logits)


def test_label_rates_and_momentum_do_not_move_teacher_labels(buffer: Buffer, recipe, tmp_path: Path) -> None:
    runs_ = [{}, {"lr_labels": 100.0, "momentum_labels": 0.9}]
    found = [
        distill(recipe(labels="teacher", iterations=3, validate_every=0, **rates), buffer, tmp_path / str(k))
        for k, rates in enumerate(runs_)
    ]
    for name, tensor in found[0].variable_tensors().items():
        assert torch.equal(tensor, found[1].variable_tensors()[name])


@pytest.mark.parametrize("segments", [1, 2])
def test_segments_of_the_convexified_trajectory_are_matched(
    buffer: Buffer, recipe, tmp_path: Path, segments: int
) -> None:
    config = recipe(convex=True, segments=segments, iterations=4, validate_every=0, augment=buffer.config["augment"])
    distill(config, buffer, tmp_path)
    lines = metrics(tmp_path)[1:]
    starts = [start for line in lines for start in line["starts"]]
    assert all(isinstance(start, float) and 0 <= start < 4 for start in starts)
    assert len(set(starts)) == len(starts)
    convex = buffer.convexified()
    parts = segment_gradients(
        config, convex, ready(config, buffer), 0, [(lines[0]["expert"], s) for s in starts[:segments]]
    )
    assert lines[0]["losses"] == pytest.approx([loss for loss, _ in parts], rel=1e-4)


def rows_of(config: DistillConfig, iteration: int) -> list[int]:
    """Which images an iteration optimises: of every class those whose place is in the active share."""
    turn = next(
        k
        for k in range(config.schedule.subsets)
        if iteration < config.schedule.iterations * (k + 1) / config.schedule.subsets
    )
    places = [
        place
        for place in range(config.synthetic.ipc)
        if turn <= place * config.schedule.subsets / config.synthetic.ipc < turn + 1
    ]
    return [label * config.synthetic.ipc + place for label in range(10) for place in places]


@pytest.mark.parametrize("labels", ["hard", "learned", "teacher"])
@pytest.mark.parametrize("ipc", [2, 5])
def test_only_the_active_subset_changes(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, ipc: int, labels: str
) -> None:
    seen = spy(monkeypatch)
    config = recipe(**{**SUBSETS, "ipc": ipc}, labels=labels, iterations=6, validate_every=0, momentum_labels=0.9)
    found = distill(config, buffer, tmp_path)
    assert found.subsets == SyntheticSet.load(tmp_path / "synthetic.safetensors").subsets == 2
    for iteration, (before, after, record) in enumerate(seen):
        rows = rows_of(config, iteration)
        others = [row for row in range(10 * ipc) if row not in rows]
        assert rows
        assert others
        assert [row in rows for row in (0, ipc - 1)] == [iteration < 3, iteration >= 3]
        for name in before.keys() - {"step_size"}:
            assert before[name][others].numpy().tobytes() == after[name][others].numpy().tobytes()
            changed = (before[name][rows] != after[name][rows]).flatten(1).any(1)
            assert changed.all()
        assert before["step_size"] != after["step_size"]
        assert record["starts"] == ([0, 1] if iteration < 3 else [2, 3])  # two halves of [0, 4), two starts in each


def test_students_see_the_active_subset_alone(buffer: Buffer, recipe) -> None:
    config = recipe(**SUBSETS, labels="learned", iterations=6, student_batch=7, student_steps=9)
    synthetic = dataclasses.replace(ready(config, buffer), subsets=2)
    for iteration in (0, 5):
        gradients, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        rows = rows_of(config, iteration)
        for gradient in gradients[:2]:
            assert torch.nonzero(gradient.flatten(1).any(1)).flatten().tolist() == rows
        with torch.no_grad():
            others = [row for row in range(30) if row not in rows]
            synthetic.images[others] += 1.0
            synthetic.label_logits[others] -= 1.0
        again, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        assert all(map(torch.equal, gradients, again))


def test_each_subset_has_sgd_of_its_own(buffer: Buffer, recipe, tmp_path: Path) -> None:
    config = recipe(**SUBSETS, labels="learned", iterations=6, validate_every=0, momentum_labels=0.9)
    found = distill(config, buffer, tmp_path)
    synthetic = dataclasses.replace(ready(config, buffer), subsets=2)
    start = synthetic.copy()
    rates = {
        "images": config.optimizer.lr_images,
        "label_logits": config.optimizer.lr_labels,
        "step_size": config.optimizer.lr_step_size,
    }
    momenta = {"images": 0.9, "label_logits": 0.9, "step_size": config.optimizer.momentum_step_size}
    velocity: dict[tuple[str, int], torch.Tensor] = {}
    for iteration in range(6):
        rows = rows_of(config, iteration)
        gradients, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        with torch.no_grad():
            for (name, x), gradient in zip(synthetic.variable_tensors().items(), gradients, strict=True):
                part = gradient if name == "step_size" else gradient[rows]
                key = (name, 0 if name == "step_size" else rows[0])
                velocity[key] = momenta[name] * velocity.get(key, 0.0) + part
                if name == "step_size":
                    x -= rates[name] * velocity[key]
                else:
                    x[rows] -= rates[name] * velocity[key]
    for name, tensor in found.variable_tensors().items():
        moved = (synthetic.variable_tensors()[name] - start.variable_tensors()[name]).abs().max()
        assert moved > 0
        assert (tensor - synthetic.variable_tensors()[name]).abs().max() < 1e-3 * moved


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"iterations": 0}, "iterations is 0; it must be at least 1."),
        ({"milestones": -1}, "milestones is -1; it must be 0 or more."),
        ({"concurrent_experts": 0}, "concurrent_experts is 0; it must be at least 1."),
        (
            {"concurrent_experts": 2, "expert": 1},
            "expert is 1 and concurrent_experts is 2; leave one of them out.",
        ),
        ({"subsets": 0}, "subsets is 0; it must be at least 1."),
        ({"dropped_fraction": 1.0}, "dropped_fraction is 1.0; it must be 0 or more and below 1."),
        ({"ipc": 1, "subsets": 2}, "ipc is 1; 2 subsets need at least 2 images a class."),
    ],
)
def test_impossible_distillations_are_refused(recipe, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(recipe(), **wrong)
    assert str(refused.value) == message


def test_real_segments_beyond_the_experts_are_refused(buffer: Buffer, recipe, tmp_path: Path) -> None:
    """A real epoch just before 5 is two epochs before one just before 7, and the experts stop at 6."""
    with pytest.raises(UserError, match=r"experts stop at epoch 6; window_end \+ expert_epochs may be at most 6\.$"):
        distill(recipe(convex=True, window_end=5), buffer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
