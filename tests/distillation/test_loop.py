"""The loop: it optimises, ends with the same bytes after any interruption, and selects on validation images."""

import dataclasses
from pathlib import Path

import pytest
import torch
from running import SOFT, SUBSETS, distill, first, loop, rows_of, stop_at
from works import assert_same, metrics

import cddlib
from cddlib.data.dataset import Images
from cddlib.distillation.gradient import concurrent_gradient
from cddlib.distillation.optimizer import SetOptimizer
from cddlib.evaluate import evaluations_of
from cddlib.experts.buffer import Buffer
from cddlib.runtime.config import as_dict
from cddlib.runtime.errors import UserError
from cddlib.runtime.files import read_json
from cddlib.synthetic import SyntheticSet
from cddlib.verify import verify


@pytest.mark.parametrize("segments", [1, 3])
def test_distillation_lowers_the_matching_loss(buffer: Buffer, recipe, tmp_path: Path, segments: int) -> None:
    config = recipe(segments=segments, iterations=12, validate_every=0)
    before, after = first(config, buffer), distill(config, buffer, tmp_path)

    def loss(synthetic: SyntheticSet) -> float:
        for variable in synthetic.variables():
            variable.requires_grad_()
        return sum(concurrent_gradient(config, buffer, synthetic, i)[1]["loss"] for i in range(1000, 1008)) / 8

    assert loss(after) < loss(before) - 0.01
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines] == list(range(13))
    assert not any("weights" in line for line in lines)
    result = read_json(tmp_path / "result.json")
    assert (result["selected_iteration"], result["selected_by"]) == (12, "last iterate")
    assert {"seconds", "peak_memory_mb", "versions", "device", "commit", "finished"} <= result.keys()
    assert read_json(tmp_path / "config.json") == {
        **as_dict(config),
        "compiled": False,  # too short to earn it
        "buffer_id": buffer.id,
        "data_fingerprint": buffer.data["fingerprint"],
    }


@pytest.mark.parametrize("overrides", [SOFT, {**SUBSETS, "labels": "learned"}])
def test_the_optimiser_steps_the_combined_gradient_of_each_iteration(
    buffer: Buffer, recipe, tmp_path: Path, overrides: dict[str, object]
) -> None:
    config = recipe(**overrides, lr_step_size=1e-3, validate_every=0)
    found = distill(config, buffer, tmp_path)
    assert found.subsets == config.schedule.subsets
    synthetic = dataclasses.replace(first(config, buffer), subsets=config.schedule.subsets)
    start, optimizer = (
        synthetic.copy().variable_tensors(),
        SetOptimizer(config.optimizer, config.consolidation, synthetic),
    )
    for iteration in range(6):
        gradients, _ = concurrent_gradient(config, buffer, synthetic, iteration)
        optimizer.step(gradients, torch.tensor(rows_of(config, iteration)), iteration + 1)
    for name, wanted in optimizer.candidates()[-1].variable_tensors().items():
        assert not torch.equal(found.variable_tensors()[name], start[name])
        assert torch.equal(found.variable_tensors()[name], wanted)


@pytest.mark.parametrize(
    "overrides",
    [
        {**SOFT, "validate_every": 3},
        {"student_batch": 4, "balance": 0.5, "precision": "bfloat16"},
        {"consolidation": "ewc", "consolidate_every": 3, "replay": 1},
        {"consolidation": "si", "consolidate_every": 3, "combine": "pcgrad", "segments": 3, "ema": 0.9},
        {"replay": 2, "combine": "gem", "expert": 0},
        {"labels": "teacher", "gradient": "truncated", "ema": 0.9},
        {"convex": True, "match_step": "nearest", "replay": 1, "concurrent_experts": 2},
        {**SUBSETS, "labels": "learned", "dropped_fraction": 0.2, "iterations": 8},
    ],
)
def test_interrupted_and_resumed_gives_the_same(
    buffer: Buffer, recipe, tmp_path: Path, overrides: dict[str, object]
) -> None:
    config = recipe(**{"iterations": 7, "validate_every": 0, **overrides})
    distill(config, buffer, tmp_path / "whole")
    for iteration in (1, 3, 5):  # with a checkpoint of 0; of 2, before the first consolidation; of 4, between two
        stop_at(iteration, config, buffer, tmp_path / "parts")
        assert not (tmp_path / "parts" / "synthetic.safetensors").exists()
    distill(config, buffer, tmp_path / "parts")
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_goes_on_when_asked_for_more_iterations(buffer: Buffer, recipe, tmp_path: Path) -> None:
    """As if it had been asked for all from the start; a test of its former set no longer counts."""
    how = {**SOFT, "validate_every": 2, "milestones": 0, "evaluation_epochs": 1}
    distill(recipe(**how, iterations=7), buffer, tmp_path / "whole")
    parts = tmp_path / "parts"
    for iterations in (2, 4):
        distill(recipe(**how, iterations=iterations), buffer, parts)
    cddlib.evaluate_run(parts, runs=1, baselines=False, device="cpu")
    stop_at(5, recipe(**how, iterations=7), buffer, parts)
    assert not (parts / "result.json").exists()
    distill(recipe(**how, iterations=7), buffer, parts)
    assert evaluations_of(parts) == []
    verify(parts, buffer.folder, device="cpu")  # which computes only tests of this set again
    next(parts.glob("evaluation-*.json")).unlink()
    assert_same(parts, tmp_path / "whole")
    with pytest.raises(UserError, match=r"holds another run \(iterations is 7 there and 4 here\)"):
        distill(recipe(**how, iterations=4), buffer, parts)
    stop_at(1, recipe(**SUBSETS, iterations=2), buffer, tmp_path)
    with pytest.raises(UserError, match=r"holds another run \(iterations is 2 there and 4 here\)"):
        distill(recipe(**SUBSETS, iterations=4), buffer, tmp_path)


def test_nothing_depends_on_the_test_images(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    distill(recipe(), buffer, tmp_path / "plain")
    digits = cddlib.load("digits")
    poisoned = dataclasses.replace(digits, test=Images(digits.test.images * 0, digits.test.labels))
    poisoned.__dict__["fingerprint"] = digits.fingerprint
    monkeypatch.setattr(loop, "load", lambda *_: poisoned)
    distill(recipe(), buffer, tmp_path / "poisoned")
    assert_same(tmp_path / "poisoned", tmp_path / "plain")


@pytest.mark.parametrize(("accuracies", "best"), [((0.1, 0.9, 0.5), 2), ((0.9, 0.8, 0.9), 0), ((0.0, 0.1, 0.2), 3)])
def test_the_best_iterate_on_the_validation_images_is_selected(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, accuracies: tuple[float, ...], best: int
) -> None:
    """Two networks are trained for each validation, before the first iteration, every second, and after the last."""
    told, validated = iter(accuracy for mean in accuracies for accuracy in (mean / 2, mean * 3 / 2)), []
    config = recipe(iterations=3, validate_every=2, validation_runs=2)
    validation = cddlib.load("digits").split[1]

    def accuracy(synthetic, _network, _config, strategy, _compute, real, *, purpose, seed) -> torch.Tensor:
        assert torch.equal(real.images, validation.images)
        assert (strategy, purpose) == (config.augmentation.augment, "validation")
        validated.append((seed, synthetic))
        return torch.tensor([next(told)], dtype=torch.float64)

    monkeypatch.setattr(loop, "correct_of_set", accuracy)
    found = distill(config, buffer, tmp_path)
    assert [seed for seed, _ in validated] == [config.seed, config.seed + 1] * 3
    result = read_json(tmp_path / "result.json")
    assert (result["selected_iteration"], result["selected_by"]) == (best, "validation accuracy")
    assert result["validation_accuracy"] == pytest.approx(max(accuracies))
    assert torch.equal(found.images, validated[2 * accuracies.index(max(accuracies))][1].images)
    lines = {line["iteration"]: line.get("validation_accuracy") for line in metrics(tmp_path)}
    zero, two, three = ([mean / 2, mean * 3 / 2] for mean in accuracies)
    assert lines == {0: zero, 1: None, 2: two, 3: three}


@pytest.mark.parametrize("better", [0, 1])
def test_the_images_or_their_average_are_kept_whichever_is_better(
    buffer: Buffer, recipe, tmp_path: Path, monkeypatch, better: int
) -> None:
    validated = []

    def accuracy(synthetic, *_, **which) -> torch.Tensor:
        validated.append(synthetic)
        mean = 0.5 + len(validated) / 100 + 0.2 * ((len(validated) - 1) % 2 == better)
        return torch.tensor([mean], dtype=torch.float64)

    monkeypatch.setattr(loop, "correct_of_set", accuracy)
    found = distill(recipe(ema=0.9, validate_every=3), buffer, tmp_path)
    assert len(validated) == 6 and torch.equal(found.images, validated[4 + better].images)
    assert not torch.equal(validated[4].images, validated[5].images)
    assert metrics(tmp_path)[6]["validation_accuracy"] == [pytest.approx(0.7 + (5 + better) / 100)]


def test_the_anchor_s_target_labels_the_images(buffer: Buffer, recipe, tmp_path: Path, monkeypatch) -> None:
    """With the network at the end of the anchor's segment, before the step, in the active subset alone."""
    config = recipe(**SUBSETS, labels="teacher", iterations=8, validate_every=0, lr_labels=100.0)
    iterate, anchors = loop.iterate, set()

    def watched(state, *rest):
        rows, before = rows_of(config, state.iteration), state.synthetic.copy()
        line = iterate(state, *rest)
        anchors.add(line["anchor"])
        expert, start = line["matched"][line["anchor"]]
        target = buffer.parameters(expert, start + config.schedule.expert_epochs)
        wanted = before.label_logits.clone()
        wanted[rows] = buffer.network(target, before.images)[rows]
        torch.testing.assert_close(state.synthetic.label_logits, wanted)
        assert (before.images != state.synthetic.images).flatten(1).any(1).nonzero().flatten().tolist() == rows
        return line

    monkeypatch.setattr(loop, "iterate", watched)
    distill(config, buffer, tmp_path)
    assert len(anchors) > 1
