"""The methods. Each one distils the digits better than random real images; searched values are what was found."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import cddlib
from cddbook.study import settings_by_accuracy
from cddbook.tables import measured_table, methods_table, plan_table, published_tables
from cddlib.evaluate import correct_of_set
from cddlib.methods import recipes
from cddlib.methods.catalogue import METHODS
from cddlib.methods.recipes import ROWS
from cddlib.runtime.config import flat
from cddlib.synthetic import initialise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
SHORT = {"width": 16, "student_steps": 12, "window_end": 8, "validate_every": 0, "evaluation_epochs": 100}
IPC = 2  # so that two subsets have images of every class


def validated(synthetic: cddlib.SyntheticSet, config: cddlib.DistillConfig, seed: int) -> float:
    """Validation accuracy of a network trained on a set."""
    network, validation = cddlib.build_network(config.network, (1, 8, 8), 10), cddlib.load("digits").split[1]
    how = (config.evaluation, config.augmentation.augment, config.compute)
    return correct_of_set(synthetic, network, *how, validation, purpose="evaluation", seed=seed).mean().item()


@pytest.fixture(scope="module")
def random_accuracy(buffer: cddlib.Buffer) -> float:
    """Mean validation accuracy of networks trained on random real images, by the same protocol."""
    config = cddlib.distill_recipe("mtt", "digits", IPC, init="real", step_size=0.05, **SHORT)
    real = [initialise(config.synthetic, cddlib.load("digits"), buffer, seed, torch.device("cpu")) for seed in range(6)]
    return statistics.fmean(validated(images, config, seed) for seed, images in enumerate(real))


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_beats_random_real_images(method: str, random_accuracy: float, tmp_path: Path) -> None:
    experts = cddlib.buffer_recipe("digits", method, IPC, width=16, experts=2, epochs=12)
    buffer = cddlib.train_buffer(experts, tmp_path / "buffer", device="cpu")
    iterations = 30 if method == "contra" else 60
    config = cddlib.distill_recipe(method, "digits", IPC, iterations=iterations, **SHORT)
    synthetic = cddlib.distill(config, buffer, tmp_path / "run", device="cpu")
    assert statistics.fmean(validated(synthetic, config, seed) for seed in range(3)) > random_accuracy + 0.02


# --- Values found by search ---------------------------------------------------------------------------------------

SEARCHES = sorted(RESULTS.glob("search-*.json"))


def test_every_searched_row_has_a_record() -> None:
    records = {tuple(path.stem.split("-")[1:]) for path in SEARCHES}
    for (method, data, ipc), row in ROWS.items():
        if row.kind == "searched":
            assert (data.removesuffix("_mnist"), method, f"ipc{ipc}") in records


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_recipes_are_among_the_best_that_was_found(path: Path) -> None:
    """No setting is better by more than one standard error of its difference over the seeds."""
    record = json.loads(path.read_text())
    config = record["config"]
    recipe = cddlib.distill_recipe(config["method"], config["data"], config["ipc"])
    found = settings_by_accuracy(record)
    used = ",".join(f"{field}={flat(recipe)[field]}" for field in re.findall(r"(\w+)=", next(iter(found))))
    assert used in found
    for setting, accuracies in found.items():
        gains = [a - b for a, b in zip(accuracies, found[used], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0
        assert statistics.fmean(gains) <= error + 1e-9, setting


# --- The book's tables --------------------------------------------------------------------------------------------


def test_the_overview_has_a_row_for_every_method_with_what_it_sets() -> None:
    rows = methods_table().splitlines()[2:]
    for row, method in zip(rows, METHODS.values(), strict=True):
        assert f"`{method.name}`" in row
        assert f"| `{method.name}`<br>" in (ROOT / "book" / "methods.md").read_text(), "no line says what it is about"
        assert all(f"`{field}={value!r}`" in row for field, value in method.settings.items())
    assert "by cell `window_start`" in rows[list(METHODS).index("datm")]


def test_published_tables_hold_the_accuracies_and_their_sources() -> None:
    text = published_tables()
    assert "| `datm` | 46.9 ± 0.5 <sup>" in text and "Sources: 1 " in text and "DATM README" in text
    assert "| random real images | 15.4 ± 0.3" in text


def test_measured_tables_are_the_records() -> None:
    text = measured_table()
    for method in METHODS:
        record = json.loads((RESULTS / f"method-digits-{method}.json").read_text())
        summary = record["evaluations"][0]["summary"]["synthetic"]
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{method}`")]
        assert f"{100 * summary['mean']:.1f} ± {100 * summary['std']:.1f} ({summary['runs']})" in row
    for run in json.loads((RESULTS / "plan.json").read_text())["runs"]:
        assert plan_table().count(run["what"]) == 3


def test_the_committed_plans_are_within_thirty_percent() -> None:
    for run in json.loads((RESULTS / "plan.json").read_text())["runs"]:
        for stage, took in run["measured"].items():
            assert abs(run["planned"][stage] / took - 1) < 0.3, (run["what"], stage)


def test_the_worked_example_of_a_new_method_runs(capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "book" / "adding-a-method.md").read_text(), re.DOTALL)
    try:
        exec(example, {})
        assert capsys.readouterr().out == "5 10 2\n"
        assert recipes.resolve("late", "digits", 1)[1][0] == "searched"
        assert "| late " in recipes.recipes_table("late")
        assert recipes.distill_recipe("late", "digits", 1).student.match_step == "nearest"
    finally:
        METHODS.pop("late", None)
        ROWS.pop(("late", "digits", 1), None)
