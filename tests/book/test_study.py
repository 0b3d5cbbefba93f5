"""Studies: what is run, that it resumes, that one failing run spares the others, and the record's numbers."""

import importlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from works import contents, refusal, steady, stop_before

import cddlib
from cddbook import records, study
from cddbook.records import study_record
from cddbook.study import StudyConfig, comparison_runs, correlation_runs, run_study, segment_counts, study_recipe
from cddlib.runtime import config as configs
from cddlib.runtime import files
from cddlib.runtime.config import replace
from cddlib.runtime.device import resolve_device
from cddlib.runtime.errors import UserError
from cddlib.runtime.run_folder import read_metrics

Recipe = Callable[..., StudyConfig]


@pytest.fixture(scope="session")
def recipe(quick: dict[str, object]) -> Recipe:
    """Configurations that match four segments in all."""
    tiny = {**quick, "iterations": 4, "student_steps": 3, "validate_every": 2, "evaluation_epochs": 3}
    return lambda **overrides: study_recipe(**{**tiny, "segments": 1, **overrides})


# --- What is run ------------------------------------------------------------------------------------------------


def differences(config: StudyConfig, base: StudyConfig) -> dict[str, object]:
    """The fields in which a configuration differs from another, with its values."""
    found, other = configs.as_dict(config), configs.as_dict(base)
    return {key: value for key, value in found.items() if value != other[key]}


def test_a_correlation_study_has_a_run_for_each_probe_and_two_controls(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="name them with --probe-starts"):
        correlation_runs(recipe(), 1, 1)
    base = recipe(probe_starts=(0, 1, 3), seed=5, segments=2, window_end_initial=3, validate_every=2)
    found = correlation_runs(base, 3, 2)
    names = ["matched-00", "matched-01", "matched-03", "sequential", "concurrent"]
    assert list(found) == [f"replicate-{replicate}/{name}" for replicate, name in itertools.product(range(3), names)]
    for name, config in found.items():
        replicate, kind = int(name[10]), name[12:]
        shared = {"seed": 5 + replicate, "expert": replicate % 2, "probe_expert": replicate % 2, "validate_every": 0}
        if kind.startswith("matched"):
            start = int(kind[-2:])
            changes = {"segments": 1, "window_start": start, "window_end": start + 1, "window_end_initial": None}
        else:
            changes = {"segments": 1 if kind == "sequential" else 3, "similarity_every": 4}
        assert config == replace(base, **shared, **changes)


COSTS = {"K=1": 1, "K=2": 2, "K=3": 3, "replay": 4}


def test_variants_are_compared_at_equal_compute(recipe: Recipe) -> None:
    base = recipe(iterations=26, validate_every=7, probe_every=5, probe_starts=(0,), seed=3)
    often = comparison_runs(replace(base, error_every=7), {"K=3": {"segments": 3}}, 1, 1)
    assert [config.probes.error_every for config in often.values()] == [2]
    variants = {**segment_counts([1, 2, 3]), "replay": {"segments": 2, "replay": 2, "combine": "gem"}}
    found = comparison_runs(base, variants, 2, 2)
    assert list(found) == [f"{name}/seed-{seed}" for seed, name in itertools.product((3, 4), COSTS)]
    for name, config in found.items():
        variant, seed = name.split("/seed-")
        cost, values = COSTS[variant], configs.as_dict(config)
        assert (values["seed"], values["probe_expert"]) == (int(seed), int(seed) - 3)
        assert 26 - cost < values["iterations"] * cost <= 26
        assert 7 <= values["validate_every"] * cost < 7 + cost
        assert 5 - cost < values["probe_every"] * cost <= max(5, cost)
        assert values["error_every"] == values["iterations"]
        assert values["expansion_iterations"] == base.distillation.schedule.expansion_iterations // cost
        paced = {"seed", "iterations", "validate_every", "probe_every", "error_every", "expansion_iterations"}
        assert differences(config, base).keys() - paced - {"probe_expert"} <= variants[variant].keys()
        assert {key: values[key] for key in variants[variant]} == variants[variant]


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (segment_counts([1, 4]), {}, r"^iterations is 3; K=4 matches 4 segments an iteration\.$"),
        ({"replay": study.remedies(4)["replay"]}, {}, r"^iterations is 3; replay matches 4 segments an iteration\.$"),
        (segment_counts([0]), {}, r"^segments is 0; it must be at least 1\.$"),
        (segment_counts([1]), {"jobs": -1}, r"^jobs is -1; it must be at least 0\.$"),
        (segment_counts([1]), {"networks": -1}, r"^networks is -1; it must be at least 0\.$"),
        ({}, {}, "^there is nothing to run; give at least one seed, replicate and variant"),
    ],
)
def test_impossible_studies_are_refused(
    recipe: Recipe, buffer: cddlib.Buffer, tmp_path: Path, variants: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned = comparison_runs(recipe(iterations=3), variants, 1, 2)
        run_study(recipe(iterations=3), planned, buffer.folder, tmp_path / "out", device="cpu", **options)
    assert not (tmp_path / "out").exists()


# --- Running it -------------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> tuple[StudyConfig, dict[str, StudyConfig]]:
    """A comparison of two variants with two seeds each."""
    base = recipe(probe_starts=(0, 2), probe_every=2)
    variants = {"K=1": {"segments": 1}, "replay": {"segments": 1, "replay": 1, "combine": "pcgrad"}}
    return base, comparison_runs(base, variants, 2, 2)


def run(recipe: Recipe, buffer: cddlib.Buffer, out: Path, **options: Any) -> dict[str, Any]:
    return run_study(*plan(recipe), buffer.folder, out, **{"networks": 2, "device": "cpu", **options})


@pytest.fixture(scope="module")
def whole(recipe: Recipe, buffer: cddlib.Buffer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; tests that write take a copy."""
    out = tmp_path_factory.mktemp("study") / "whole"
    run(recipe, buffer, out)
    return out


def test_the_record_has_every_run_and_what_it_changes(recipe: Recipe, whole: Path) -> None:
    base, planned = plan(recipe)
    record = study_record(whole)
    assert record["config"] == configs.as_dict(base)
    assert list(record["runs"]) == list(planned)
    for name, config in planned.items():
        found = record["runs"][name]
        assert found["changes"] == differences(config, base)
        result = files.read_json(whole / name / "result.json")
        assert found["result"] == {key: value for key, value in result.items() if key != "metrics_sha256"}
        (accuracies,) = found["evaluations"]
        networks = 2 if name.startswith("K=1") else 0  # that test baselines: once a seed
        assert [len(accuracies[kind]) for kind in ("synthetic", "random_real", "full")] == [2, networks, networks]
    assert record["runs"]["K=1/seed-0"]["changes"] == {"error_every": 4}
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_record_keeps_the_metrics_to_six_digits(whole: Path) -> None:
    for name, found in study_record(whole)["runs"].items():
        text = json.dumps(read_metrics(whole / name))
        lines = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5e}"))
        assert found["metrics"].keys() == {*records.DENSE, "validation_accuracy", "probe_losses", "accumulated_error"}
        for key, values in found["metrics"].items():
            sparse = [[line["iteration"], line[key]] for line in lines if line.get(key)]
            assert values == ([line[key] for line in lines[1:]] if key in records.DENSE else sparse)


def test_a_study_that_was_interrupted_while_it_tested_goes_on(
    recipe: Recipe, buffer: cddlib.Buffer, whole: Path, tmp_path: Path
) -> None:
    evaluate, calls = importlib.import_module("cddlib.evaluate"), itertools.count(1)
    stop_before(evaluate, "train_network", lambda *_: next(calls) == 12, lambda: run(recipe, buffer, tmp_path))
    with pytest.raises(UserError, match="holds a study that is not finished"):
        study_record(tmp_path)
    done = contents(tmp_path / "K=1/seed-0")
    assert steady(run(recipe, buffer, tmp_path)) == steady(study_record(whole))
    assert done.items() <= contents(tmp_path / "K=1/seed-0").items()


def test_a_process_gives_the_same_numbers(recipe: Recipe, buffer: cddlib.Buffer, whole: Path, tmp_path: Path) -> None:
    (base, planned), name = plan(recipe), "K=1/seed-0"
    found = run_study(base, {name: planned[name]}, buffer.folder, tmp_path, networks=2, jobs=2, device="cpu")["runs"]
    assert steady(found[name]) == steady(study_record(whole)["runs"][name])


def test_a_failing_run_is_named_and_the_others_finish(recipe: Recipe, buffer: cddlib.Buffer, tmp_path: Path) -> None:
    base = recipe(validate_every=0)
    planned = {"bad": replace(base, lr_images=1e30), "wide": replace(base, width=16), "good": base}
    said = refusal(run_study, base, planned, buffer.folder, tmp_path, device="cpu")
    assert said.startswith("2 of 3 runs failed, the others are finished: bad: iteration 2, the segment from epoch ")
    assert said.endswith(f"; wide: width is 16, but the experts in {buffer.folder} were trained with 8.")
    assert (tmp_path / "good" / "result.json").exists()
    with pytest.raises(UserError, match=r"a study that is not finished: bad is missing; run it again to finish\.$"):
        study_record(tmp_path)


def test_another_study_in_the_folder_is_refused(recipe: Recipe, buffer: cddlib.Buffer, whole: Path) -> None:
    base, planned = plan(recipe)
    before = contents(whole)
    narrower = {name: config for name, config in planned.items() if not name.startswith("K=1")}
    for other, runs, difference in (
        (replace(base, lr_images=1.0), planned, r"lr_images is 30\.0 there and 1\.0 here"),
        (base, narrower, r"runs is 'K=1, replay' there and 'replay' here"),
    ):
        with pytest.raises(UserError, match=rf"whole holds another run \({difference}\); choose another folder with"):
            run_study(other, runs, buffer.folder, whole, networks=2, device="cpu")
    assert contents(whole) == before


def test_a_study_grows_and_keeps_what_it_has(
    recipe: Recipe, buffer: cddlib.Buffer, whole: Path, tmp_path: Path
) -> None:
    base, planned = plan(recipe)
    fewer = {name: config for name, config in planned.items() if name.endswith("seed-0")}
    place = Path(shutil.copytree(whole, tmp_path / "study"))
    description = files.read_json(place / "study.json")
    files.write_json(place / "study.json", {**description, "runs": list(fewer)})
    assert list(study_record(place)["runs"]) == list(fewer)
    for runs in (planned, fewer):
        assert run_study(base, runs, buffer.folder, place, networks=2, device="cpu") == study_record(whole)


def test_children_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "_end_with_parent", lambda: None)
    monkeypatch.setattr(study.tqdm, "__init__", study.tqdm.__init__)  # which a child silences for good
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "")
    devices = []
    for number in range(4):
        study._prepare(1, number)
        devices.append(str(resolve_device("auto")))
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]


# --- Records ----------------------------------------------------------------------------------------------------


def test_records_are_plain_json(tmp_path: Path) -> None:
    folder = tmp_path / "book" / "results"
    for indent, text in ((1, '{\n "x": [\n  1\n ]\n}\n'), (None, '{"x":[1]}\n')):
        records.write_record(folder / "r.json", {"x": [1]}, indent=indent)
        assert (folder / "r.json").read_text() == text
        assert records.read_record(folder / "r.json") == {"x": [1]}
