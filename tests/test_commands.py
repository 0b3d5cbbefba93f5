"""Commands beside the main way: recipes, plan, other networks, files of other programs."""

from pathlib import Path

import pytest
from children import exit_code as run

import cddlib
from cddlib.experts.buffer import Buffer
from cddlib.runtime.files import read_json


@pytest.fixture(scope="module")
def distilled(buffer: Buffer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with learned labels, and two images a class."""
    folder = tmp_path_factory.mktemp("run")
    short = {"width": 8, "window_end": 4, "iterations": 2, "student_steps": 3, "evaluation_epochs": 2}
    config = cddlib.distill_recipe("datm", "digits", 2, **short)
    cddlib.distill(config, buffer, folder, device="cpu")
    return folder


def test_recipes_prints_the_chosen_ones(capsys) -> None:
    assert run("recipes", "--method", "datm", "--data", "cifar10") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5
    assert all("NUS-HPC-AI-Lab/DATM" in line for line in lines[2:])


def test_plan_says_what_each_stage_takes(capsys) -> None:
    options = ["--method", "datm", "--data", "cifar100", "--ipc", "10", "--no-measure"]
    assert run("plan", *options, "--experts", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["experts", "distillation", "evaluation"]
    assert "611 MB" in lines[2]  # 3 experts x 101 vectors x 504,420 numbers x 4 bytes


def test_another_network_is_evaluated_and_recorded_apart(distilled: Path, capsys) -> None:
    before = set(distilled.glob("evaluation-*.json"))
    options = ["--runs", "1", "--no-baselines", "--device", "cpu"]
    assert run("evaluate", distilled, *options, "--network", "mlp") == 0
    assert run("evaluate", distilled, *options, "--norm", "batch") == 0
    assert run("evaluate", distilled, *options) == 0
    records = [read_json(path)["network"] for path in set(distilled.glob("evaluation-*.json")) - before]
    assert sorted((r["network"], r["norm"], r["width"]) for r in records) == [
        ("convnet", "batch", 8),
        ("convnet", "instance", 8),
        ("mlp", "instance", 128),
    ]
    assert run("evaluate", distilled / "none", "--network", "mlp") == 1
    assert "config.json does not exist." in capsys.readouterr().err


def test_a_set_goes_out_as_pt_and_comes_back_to_be_evaluated(distilled: Path, tmp_path: Path, capsys) -> None:
    assert run("export", distilled, "--to", tmp_path / "pt", "--form", "pt") == 0
    files = [tmp_path / "pt" / name for name in ("images_best.pt", "labels_best.pt")]
    options = ["--data", "digits", "--width", "8", "--evaluation-epochs", "2", "--out", tmp_path / "theirs"]
    assert run("import-set", *files, *options) == 1
    assert "whether their images are whitened; give --zca or --no-zca." in capsys.readouterr().err
    options.append("--no-zca")
    assert run("import-set", *files, "--lr", tmp_path / "pt" / "lr_best.pt", *options) == 0
    assert "20 images of 10 classes" in capsys.readouterr().out
    ours, theirs = (cddlib.SyntheticSet.load(run / "synthetic.safetensors") for run in (distilled, tmp_path / "theirs"))
    assert ours.images.equal(theirs.images) and theirs.ipc == 2
    assert run("evaluate", tmp_path / "theirs", "--runs", "1", "--device", "cpu") == 0
    assert read_json(tmp_path / "theirs" / "config.json")["ipc"] == 2
    capsys.readouterr()
    assert run("import-set", *files, *options) == 1
    assert capsys.readouterr().err.endswith("exists and is not an empty folder; choose another.\n")


def test_pictures_and_parquet_are_written(distilled: Path, tmp_path: Path, capsys) -> None:
    assert run("export", distilled, "--to", tmp_path / "png") == 0
    assert len(list((tmp_path / "png").rglob("*.png"))) == 20
    assert run("export", distilled, "--to", tmp_path / "set.parquet", "--form", "parquet") == 0
    assert (tmp_path / "set.parquet").stat().st_size > 1000
    assert run("export", tmp_path / "none", "--to", tmp_path / "x") == 1
    assert capsys.readouterr().err.endswith("synthetic.safetensors does not exist.\n")


def test_a_buffer_goes_out_and_comes_back(buffer: Buffer, tmp_path: Path, capsys) -> None:
    assert run("export", buffer.folder, "--to", tmp_path / "pt", "--form", "pt") == 0
    options = ["--data", "digits", "--width", "8", "--no-zca", "--device", "cpu", "--out", tmp_path / "back"]
    assert run("import-buffer", tmp_path / "pt", *options) == 0
    assert "2 experts of 6 epochs and 1,026 parameters in" in capsys.readouterr().out
    assert Buffer(tmp_path / "back").config["holdout"] is False  # as the published codes train, unless told otherwise
    assert run("import-buffer", tmp_path / "pt", *options[:-1], tmp_path / "held", "--holdout") == 0
    assert Buffer(tmp_path / "held").config["holdout"] is True
    assert run("export", buffer.folder, "--to", tmp_path / "png") == 1
    assert "holds a buffer, which can be written as pt only, not as png." in capsys.readouterr().err


def test_the_buffer_command_trains_experts_as_the_method_does(tmp_path: Path) -> None:
    options = ["--experts", "1", "--epochs", "1", "--width", "4", "--device", "cpu"]
    assert run("buffer", "--method", "ftd", "--ipc", "10", *options, "--out", tmp_path / "b") == 0
    assert Buffer(tmp_path / "b").config["sharpness_radius"] == 0.01
