"""Buffers: the files on disk, reading them lazily, and training experts that survive any interruption."""

import dataclasses
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from works import assert_same, contents, refusal, stop_before

import cddlib
from cddlib.data import dataset as data
from cddlib.experts import curriculum
from cddlib.experts import train as training
from cddlib.experts.buffer import Buffer, expert_path, read_expert_record, write_trajectory
from cddlib.experts.train import ExpertTraining
from cddlib.networks.convnet import ConvNet, NetworkConfig
from cddlib.runtime import config as configs
from cddlib.runtime import files
from cddlib.runtime.errors import UserError
from cddlib.training import engine

recipe = partial(cddlib.buffer_recipe, "digits", width=8, experts=2, epochs=6)
train = partial(cddlib.train_buffer, device="cpu")


def test_files_are_those_of_the_design(buffer: Buffer) -> None:
    names = {".lock", "buffer.json", "result.json", "preprocessing.safetensors", "expert-000.safetensors"}
    assert {path.name for path in buffer.folder.iterdir()} == names | {"expert-001.safetensors"}
    manifest = files.read_json(buffer.folder / "buffer.json")
    assert manifest["config"] == {**configs.as_dict(recipe()), "compiled": False}
    digits = data.load("digits")
    fingerprint = {"name": "digits", "fingerprint": digits.fingerprint, "shape": [1, 8, 8], "classes": 10}
    assert manifest["data"] == fingerprint
    for index, expert in enumerate(manifest["experts"]):
        path = buffer.folder / expert["file"]
        assert path == expert_path(buffer.folder, index)
        assert expert["sha256"] == files.file_digest(path)
        assert (expert["seed"], expert["buffer"]) == (index, buffer.experts[0]["buffer"])
        assert len(expert["train_loss"]) == 6
        assert len(expert["validation_accuracy"]) == 7
        shapes = {name: (7, *shape) for name, shape in buffer.network.shapes.items()}
        assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == shapes


def test_recorded_accuracies_are_those_of_the_stored_parameters(buffer: Buffer) -> None:
    digits = data.load("digits")
    for part, epoch, name in ((digits.split[1], 0, "validation_accuracy"), (digits.test, 6, "test_accuracy")):
        logits = buffer.network(buffer.parameters(1, epoch), buffer.preprocessing(part.images))
        found = buffer.experts[1][name]
        accuracy = (logits.argmax(1) == part.labels).double().mean().item()
        assert accuracy == pytest.approx(found[0] if isinstance(found, list) else found)


READ_ONE_EPOCH = """
import sys
from pathlib import Path
from cddlib.experts.buffer import Buffer

def kb(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

Buffer(Path(sys.argv[1])).parameters(0, 3)  # imports and allocates all that reading needs
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = kb("VmRSS")
theta = Buffer(Path(sys.argv[2])).parameters(0, 150)
print(kb("VmHWM") - before, float(theta[0]))
"""


def test_reading_one_epoch_reads_only_its_bytes(buffer: Buffer, tmp_path: Path) -> None:
    manifest = files.read_json(buffer.folder / "buffer.json")
    manifest["config"] |= {"width": 64, "depth": 3, "epochs": 300, "experts": 1}
    files.write_json(tmp_path / "buffer.json", manifest)
    network = ConvNet(NetworkConfig(width=64, depth=3), (1, 8, 8), 10)
    size = len(network.init(torch.Generator()))
    write_trajectory(expert_path(tmp_path, 0), network, [torch.full((size,), float(t)) for t in range(301)], {})
    assert expert_path(tmp_path, 0).stat().st_size > 90e6
    arguments = [sys.executable, "-c", READ_ONE_EPOCH, str(buffer.folder), str(tmp_path)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    growth_kb, first = printed.split()
    assert float(first) == 150
    assert int(growth_kb) < 10_000


def test_experts_differ_only_by_their_seed(buffer: Buffer, tmp_path: Path) -> None:
    train(recipe(seed=1, experts=1), tmp_path)
    alone, second = (load_file(path) for path in (expert_path(tmp_path, 0), expert_path(buffer.folder, 1)))
    assert all(torch.equal(alone[name], second[name]) for name in second)
    records = [read_expert_record(path) for path in (expert_path(tmp_path, 0), expert_path(buffer.folder, 1))]
    assert records[0].pop("buffer") != records[1].pop("buffer")
    assert records[0] == records[1]


def test_experts_of_long_training_are_compiled_unless_told_otherwise(
    buffer: Buffer, tmp_path: Path, monkeypatch
) -> None:
    compiled: list[object] = []
    enough = 3 * 2 * 1257 * engine.operations(buffer.network)  # more than an epoch, less than two
    monkeypatch.setitem(engine.WORTH_COMPILING, "cpu", enough)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    wanted = {(1, None): False, (2, None): True, (2, False): False, (1, True): True}
    for number, ((epochs, asked), answer) in enumerate(wanted.items()):
        compiled.clear()
        engine._make_step.cache_clear()
        trained = train(recipe(experts=1, epochs=epochs, compiled=asked), tmp_path / str(number))
        assert trained.config["compiled"] is answer and bool(compiled) is answer
    monkeypatch.setitem(engine.WORTH_COMPILING, "cpu", 0)
    assert not train(recipe(experts=1, epochs=1), tmp_path / "0").config["compiled"], "as it was begun elsewhere"


def test_finished_experts_are_not_trained_again(buffer: Buffer, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(buffer.folder, tmp_path / "b")
    monkeypatch.setattr(training, "train_expert", None)  # calling it fails
    assert train(recipe(), tmp_path / "b").id == buffer.id
    assert train(recipe(experts=1), tmp_path / "b").id == buffer.id  # asking for fewer takes none away


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Expert and number of each epoch that is trained from now on; all are saved at once."""
    seen: list[tuple[int, int]] = []
    epoch = ExpertTraining.epoch

    def overheard(self: ExpertTraining, number: int, counted: int, *rest: object) -> float:
        seen.append((number, counted))
        return epoch(self, number, counted, *rest)

    monkeypatch.setattr(ExpertTraining, "epoch", overheard)
    monkeypatch.setattr(training, "UNFINISHED_SECONDS", -1.0)
    return seen


@pytest.mark.parametrize("number", [0, 1])
def test_a_deleted_expert_is_trained_again(buffer: Buffer, tmp_path: Path, trained, number: int) -> None:
    folder = tmp_path / "b"
    shutil.copytree(buffer.folder, folder)
    expert_path(folder, number).unlink()
    assert train(recipe(), folder).id == buffer.id
    assert {again for again, _ in trained} == {number}
    assert_same(folder, buffer.folder)


def train_until(stop: tuple[int, int], config: cddlib.BufferConfig, folder: Path) -> None:
    """Train, and stop as by Ctrl-C at this expert's epoch of that number."""
    stop_before(ExpertTraining, "epoch", lambda _, *which: which[:2] == stop, partial(train, config, folder))


FLAT = {"sharpness_radius": 0.1, "sharpness_weight": 0.5}
STAGED = {"easiest_fraction": 0.5, "all_from_epoch": 2, "drop_epochs": (3, 4), "drop_fractions": (0.25, 0.5)}


@pytest.fixture
def quick_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Difficulties in no time."""
    monkeypatch.setattr(curriculum, "SCORERS", 2)
    monkeypatch.setattr(curriculum, "SCORER_EPOCHS", 1)


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize(
    ("overrides", "stop"),
    [({}, (0, 2)), ({"momentum": 0.9}, (1, 4)), ({**STAGED, **FLAT, "momentum": 0.9, "weight_decay": 1e-3}, (1, 6))],
)
def test_an_unfinished_expert_goes_on(
    tmp_path: Path, trained, monkeypatch, overrides: dict[str, object], stop: tuple[int, int]
) -> None:
    config = recipe(**overrides)
    train(config, tmp_path / "whole")
    every = list(trained)
    assert every == [(expert, epoch) for expert in (0, 1) for epoch in range(1, 7)]
    trained.clear()
    train_until(stop, config, tmp_path / "parts")
    unfinished = tmp_path / "parts" / f".expert-00{stop[0]}.unfinished.safetensors"
    tensors, header = files.read_tensors(unfinished, "unfinished")
    assert (len(tensors["snapshots"]), len(header["losses"])) == (stop[1], stop[1] - 1)
    monkeypatch.setattr(training, "difficulty", None)  # images are ranked once
    train(config, tmp_path / "parts")
    assert trained == every
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.usefixtures("trained")
def test_another_buffers_unfinished_expert_is_not_taken(buffer: Buffer, tmp_path: Path) -> None:
    unfinished = tmp_path / ".expert-000.unfinished.safetensors"
    snapshots = torch.zeros(3, len(buffer.parameters(0, 0)))
    header = {"buffer": "another", "losses": [1.0, 1.0], "accuracies": [0.1, 0.1, 0.1]}
    files.write_tensors(unfinished, {"snapshots": snapshots}, "unfinished", header)
    assert train(recipe(), tmp_path).id == buffer.id
    assert_same(tmp_path, buffer.folder)


def test_a_finished_buffer_grows(buffer: Buffer, tmp_path: Path) -> None:
    train(recipe(experts=1), tmp_path)
    assert len(train(recipe(experts=2), tmp_path).experts) == 2
    assert_same(tmp_path, buffer.folder)


def test_another_configuration_is_refused(buffer: Buffer) -> None:
    before = contents(buffer.folder)
    with pytest.raises(UserError, match=r"holds another run \(learning_rate is 0\.1 there and 0\.2 here\); choose"):
        train(recipe(learning_rate=0.2), buffer.folder)
    assert contents(buffer.folder) == before


def test_an_unfinished_buffer_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no buffer; train one with `cddlib buffer --out "):
        Buffer(tmp_path)
    train_until((1, 1), recipe(), tmp_path)
    with pytest.raises(UserError, match=r"lacks some of its experts; run the same `cddlib buffer` again to finish"):
        Buffer(tmp_path)


def test_another_buffers_expert_is_named(buffer: Buffer, tmp_path: Path) -> None:
    train(recipe(experts=1, learning_rate=0.05), tmp_path / "other")
    shutil.copytree(buffer.folder, tmp_path / "b")
    shutil.copy(expert_path(tmp_path / "other", 0), tmp_path / "b")
    path, manifest = expert_path(tmp_path / "b", 0), tmp_path / "b" / "buffer.json"
    assert refusal(Buffer(tmp_path / "b").parameters, 0, 0) == f"{path} is not the expert that {manifest} describes."
    assert train(recipe(), tmp_path / "b").id == buffer.id  # it is trained again
    assert_same(tmp_path / "b", buffer.folder)


def test_divergence_is_reported_although_the_loss_is_finite(tmp_path: Path) -> None:
    last_step = {"learning_rate": 3e38, "epochs": 1, "batch_size": 2000, "weight_decay": 1e3}
    with pytest.raises(UserError, match=r"^expert 0 diverged in epoch 1 \(loss [0-9.]+\); lower --learning-rate\.$"):
        train(recipe(**last_step), tmp_path)
    assert not expert_path(tmp_path, 0).exists()


def test_check_data_refuses_other_images(buffer: Buffer) -> None:
    digits = data.load("digits")
    buffer.check_data(digits)
    others = [dataclasses.replace(digits, name="cifar10"), dataclasses.replace(digits, test=digits.split[1])]
    for other in others:
        with pytest.raises(UserError, match=rf"experts of digits \({digits.fingerprint}\), not of {other.name} \("):
            buffer.check_data(other)


# --- Curriculum and sharpness -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_scores")
@pytest.mark.parametrize("holdout", [True, False])
def test_every_epoch_sees_the_images_of_its_stage(tmp_path: Path, monkeypatch, holdout: bool) -> None:
    seen, sources, fetch, epoch = [], [], training.fetch_real, training.train_epoch
    monkeypatch.setattr(training, "fetch_real", lambda images, map_: sources.append(images) or fetch(images, map_))
    monkeypatch.setattr(
        training, "train_epoch", lambda *work, **how: seen.append(work[3](torch.arange(work[4]))) or epoch(*work, **how)
    )
    config = recipe(**STAGED, holdout=holdout)
    opened = train(config, tmp_path)
    digits = data.load("digits")
    images = digits.split[0] if holdout else digits.train
    (scores,) = load_file(tmp_path / "difficulty.safetensors").values()
    assert scores.shape == images.labels.shape
    assert len(seen) == config.experts * config.epochs
    bounds = [(0, 0.5), (0, 0.75), (0, 1), (0, 1), (0.25, 1), (0.5, 1)]
    assert all(source is sources[0] for source in sources), "a set that is whitened is whitened once"
    for number, (inputs, labels) in enumerate(seen):
        lower, upper = bounds[number % 6]
        wanted = []
        for label in range(10):
            members = sorted(torch.nonzero(images.labels == label).flatten().tolist(), key=scores.tolist().__getitem__)
            wanted += [m for k, m in enumerate(members) if lower <= k / (len(members) - 1) <= upper]
        assert torch.equal(inputs, opened.preprocessing(images.images[sorted(wanted)]))
        assert torch.equal(labels, images.labels[sorted(wanted)])
    how = (config.batch_size, config.learning_rate, config.augmentation.augment)
    scored = curriculum.difficulty(opened.network, images, opened.preprocessing, *how)
    assert torch.equal(scores, scored)


@pytest.mark.parametrize("overrides", [FLAT, {**FLAT, "sharpness_adaptive": False}, {**FLAT, "sharpness_weight": 0.0}])
def test_flat_experts_are_others(buffer: Buffer, tmp_path: Path, overrides: dict[str, object]) -> None:
    flat = train(recipe(**overrides, experts=1), tmp_path)
    assert torch.equal(flat.parameters(0, 0), buffer.parameters(0, 0))
    moved = (flat.parameters(0, 6) - buffer.parameters(0, 6)).norm() / buffer.parameters(0, 6).norm()
    assert 1e-3 < moved < 1
    assert flat.experts[0]["test_accuracy"] > 0.5
