"""Evaluation: the published protocol, its baselines, and records that grow and survive interruptions."""

import dataclasses
import itertools
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loaders import small_set

import cddlib
from cddlib import evaluate
from cddlib.data import augment
from cddlib.data import dataset as data
from cddlib.evaluate import correct_of_set, summarise
from cddlib.experts.buffer import Buffer
from cddlib.networks.convnet import ConvNet, Network, NetworkConfig
from cddlib.networks.zoo import build_network
from cddlib.protocol import EvaluateConfig, fetch_synthetic, train_network
from cddlib.runtime import config as configs
from cddlib.runtime import files
from cddlib.runtime.errors import UserError
from cddlib.synthetic import SyntheticSet
from cddlib.training.step import ComputeConfig

evaluate_run = partial(cddlib.evaluate_run, device="cpu")
CPU = torch.device("cpu")
DSA = "color_crop_cutout_flip_scale_rotate"
NETWORK = ConvNet(NetworkConfig(width=4, depth=1), (1, 8, 8), 10)


def accuracy_on(
    test: data.Images, synthetic: SyntheticSet, network: Network, epochs: int, batch: int, strategy: str, seed: int
) -> float:
    """The accuracy of one network by the function that the library tests a set with."""
    how = (EvaluateConfig(evaluation_epochs=epochs, evaluation_batch=batch), strategy, ComputeConfig(compiled=False))
    return correct_of_set(synthetic, network, *how, test, purpose="evaluation", seed=seed).mean().item()


def reference(images: torch.Tensor, targets: torch.Tensor, *, epochs: int, rate: float, batch: int, seed: int):
    """The protocol written out: SGD, momentum 0.9, weight decay 5e-4, a tenth of the rate from half time on."""
    theta = NETWORK.init(cddlib.generator("evaluation", seed, "init"))
    velocity = torch.zeros_like(theta)
    rng = cddlib.generator("evaluation", seed, "epochs")
    for epoch in range(epochs):
        for chosen in torch.randperm(len(images), generator=rng).split(batch):
            theta.requires_grad_()
            inputs = augment.apply(augment.draw(DSA, len(chosen), rng), images[chosen])
            loss = F.cross_entropy(NETWORK(theta, inputs), targets[chosen])
            (gradient,) = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                velocity = 0.9 * velocity + gradient + 5e-4 * theta
                theta = theta - (rate if epoch < epochs / 2 else rate / 10) * velocity
    return theta


@pytest.mark.parametrize("steps_at_once", [1, 4, 100])
@pytest.mark.parametrize("epochs", [1, 2, 4, 5])
def test_networks_are_trained_by_the_published_protocol(
    epochs: int, steps_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cddlib.protocol.AT_ONCE", steps_at_once * 4 * 8 * 8 * 4)
    rng = torch.Generator().manual_seed(0)
    images, targets = torch.randn(10, 1, 8, 8, generator=rng), torch.rand(10, 10, generator=rng).softmax(1)
    fetch, config = fetch_synthetic(images, targets), EvaluateConfig(evaluation_epochs=epochs, evaluation_batch=4)
    which = {"purpose": "evaluation", "seed": 3, "device": CPU}
    found = train_network(NETWORK, fetch, 10, config, DSA, ComputeConfig(), 0.5, **which)
    wanted = reference(images, targets, epochs=epochs, rate=0.5, batch=4, seed=3)
    assert (wanted - NETWORK.init(cddlib.generator("evaluation", 3, "init"))).abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not found.requires_grad


def test_a_set_is_trained_at_its_own_step_size_on_its_soft_labels(buffer: Buffer) -> None:
    digits = data.load("digits")
    rng = torch.Generator().manual_seed(0)
    images, logits = torch.randn(20, 1, 8, 8, generator=rng), 3 * torch.randn(20, 10, generator=rng)
    own = {"images": images, "labels": torch.arange(10).repeat_interleave(2), "label_logits": logits, "subsets": 1}
    own |= {"step_size": torch.tensor(0.25), "preprocessing": buffer.preprocessing, "classes": digits.classes}
    synthetic = small_set(0, **own)
    found = accuracy_on(digits.split[1], synthetic, NETWORK, 6, 8, DSA, seed=5)
    theta = reference(synthetic.images, synthetic.label_logits.softmax(1), epochs=6, rate=0.25, batch=8, seed=5)
    right = NETWORK(theta, buffer.preprocessing(digits.split[1].images)).argmax(1) == digits.split[1].labels
    assert found == pytest.approx(right.double().mean().item(), abs=0.01)


def test_summary_has_the_sample_standard_deviation() -> None:
    values = [0.1, 0.4, 0.25, 0.9]
    summary = summarise(values)
    assert summary == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1)), "runs": 4}
    assert summarise([0.5]) == {"mean": 0.5, "std": None, "runs": 1}


@pytest.fixture(scope="module")
def finished(buffer: Buffer, quick: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    cddlib.distill(cddlib.distill_recipe("contra", **quick, ipc=2), buffer, folder, device="cpu")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished distillation that a test may write to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_record_says_what_was_measured_and_how(run: Path) -> None:
    record = evaluate_run(run, runs=2)
    assert [record] == [*map(files.read_json, run.glob("evaluation-*.json"))]
    assert record["synthetic_sha256"] == files.file_digest(run / "synthetic.safetensors")
    how = {"evaluation_epochs": 5, "evaluation_batch": 256, "precision": "float32", "compiled": False}
    assert record["evaluation"] == how
    assert record["seed"] == 0
    assert record["classes"] == [str(digit) for digit in range(10)]
    counts = np.bincount(data.load("digits").test.labels, minlength=10)
    rate = SyntheticSet.load(run / "synthetic.safetensors").step_size.item()
    assert record["learning_rates"] == {"synthetic": rate, "random_real": 0.01, "full": 0.01}
    assert record["accuracies"].keys() == {"synthetic", "random_real", "full"}
    for name, accuracies in record["accuracies"].items():
        assert len(accuracies) == 2
        assert record["summary"][name] == summarise(accuracies)
        assert np.allclose(np.array(record["by_class"][name]) @ counts / counts.sum(), accuracies)
    assert {"seconds", "peak_memory_mb", "versions", "device", "commit", "finished"} <= record.keys()


@pytest.mark.parametrize("network", [None, NetworkConfig(network="mlp"), NetworkConfig(network="alexnet")])
def test_networks_are_tested_on_the_test_images(run: Path, network: NetworkConfig | None) -> None:
    synthetic = SyntheticSet.load(run / "synthetic.safetensors")
    chosen = network or NetworkConfig(width=8, depth=2)
    built, test = build_network(chosen, (1, 8, 8), 10), data.load("digits").test
    how = (synthetic, built, 5, 256, "crop_scale_rotate")
    wanted = [accuracy_on(test, *how, seed) for seed in (4, 5)]
    threes = data.Images(test.images[test.labels == 3], test.labels[test.labels == 3])
    record = evaluate_run(run, runs=2, baselines=False, seed=4, network=network)
    assert record["accuracies"]["synthetic"] == wanted
    assert [of[3] for of in record["by_class"]["synthetic"]] == [accuracy_on(threes, *how, seed) for seed in (4, 5)]
    assert record["network"] == configs.as_dict(chosen)


def test_no_network_starts_where_an_expert_or_another_purpose_did(buffer: Buffer) -> None:
    """At a learning rate of 0, it ends where it starts."""
    starts = [buffer.parameters(expert, 0) for expert in range(len(buffer.experts))]
    fetch, config = fetch_synthetic(torch.zeros(1, 1, 8, 8), torch.eye(10)[:1]), EvaluateConfig(evaluation_epochs=1)
    for purpose, seed in itertools.product(("validation", "evaluation"), range(3)):
        which = {"purpose": purpose, "seed": seed, "device": CPU}
        starts.append(train_network(buffer.network, fetch, 1, config, "none", ComputeConfig(), 0.0, **which))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(starts, 2))


def test_asking_for_more_adds_to_what_is_there(run: Path, monkeypatch) -> None:
    one = evaluate_run(run, runs=1, baselines=False)
    assert one["summary"].keys() == {"synthetic"}
    three = evaluate_run(run, runs=3)
    assert three["accuracies"]["synthetic"][:1] == one["accuracies"]["synthetic"]
    assert {name: len(values) for name, values in three["accuracies"].items()} == dict.fromkeys(evaluate.SETS, 3)
    monkeypatch.setattr(evaluate, "train_network", None)  # calling it fails
    assert evaluate_run(run, runs=2) == evaluate_run(run, runs=3, baselines=False) == three  # fewer takes none away
    assert len(list(run.glob("evaluation-*.json"))) == 1


def test_each_seed_network_and_set_has_a_record_of_its_own(run: Path) -> None:
    one, plain = partial(evaluate_run, run, runs=1, baselines=False), NetworkConfig(width=8, depth=2)
    own = one()
    assert own["network"] == configs.as_dict(plain) and one(network=plain) == own
    others = [{"seed": 7}, {"network": NetworkConfig(network="mlp")}, {"network": NetworkConfig(width=4, depth=1)}]
    records = [own, *(one(**other) for other in others)]
    assert [one(**other) for other in [{}, *others]] == records
    assert own["accuracies"] != records[1]["accuracies"]
    identity = {key: own[key] for key in ("synthetic_sha256", "seed", "evaluation")}
    assert (run / f"evaluation-{configs.config_hash(identity)}.json").exists()  # as records were named from the start
    path = run / "synthetic.safetensors"
    synthetic = SyntheticSet.load(path)
    dataclasses.replace(synthetic, images=-synthetic.images).save(path)
    one()
    assert len(list(run.glob("evaluation-*.json"))) == 5


def test_baselines_train_on_real_images_under_the_same_protocol(run: Path, monkeypatch) -> None:
    digits = data.load("digits")
    preprocessing = SyntheticSet.load(run / "synthetic.safetensors").preprocessing
    seen = {}
    train = train_network

    def spy(network, fetch, size, config, strategy, compute, rate, **which):
        assert network.shapes["1.weight"] == (128, 64)
        inputs, labels = fetch(torch.arange(size))
        how = (config.evaluation_epochs, config.evaluation_batch, strategy, rate)
        seen.setdefault(size, []).append((inputs, labels, how, which["seed"]))
        return train(network, fetch, size, config, strategy, compute, rate, **which)

    monkeypatch.setattr(evaluate, "train_network", spy)
    evaluate_run(run, runs=2, network=NetworkConfig(network="mlp"))
    few = [found for found in seen[20] if found[1].dtype == torch.int64]  # the synthetic set has probabilities
    assert len(few) == 2
    assert not torch.equal(few[0][0], few[1][0])
    train_rows = {row.numpy().tobytes() for row in preprocessing(digits.split[0].images)}
    for seed, (inputs, labels, *how) in enumerate(few):
        assert labels.tolist() == [label for label in range(10) for _ in range(2)]
        assert {row.numpy().tobytes() for row in inputs} <= train_rows
        assert how == [(5, 256, "crop_scale_rotate", 0.01), seed]
    for inputs, labels, how, _ in seen[len(digits.train.labels)]:
        assert torch.equal(inputs, preprocessing(digits.train.images))
        assert torch.equal(labels, digits.train.labels)
        assert how == (1, 256, "crop_scale_rotate", 0.01)  # 5 steps: one epoch has 6


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^runs is 0; it must be at least 1\.$"):
        evaluate_run(run, runs=0)
    with pytest.raises(UserError, match=r"^depth is 4; images of 8 pixels allow at most 3 blocks with pooling\.$"):
        evaluate_run(run, network=NetworkConfig(depth=4))
    with pytest.raises(UserError, match=r"none holds no finished distillation: synthetic\.safetensors is missing\.$"):
        evaluate_run(tmp_path / "none")
    path = run / "synthetic.safetensors"
    dataclasses.replace(SyntheticSet.load(path), classes=tuple("abcdefghij")).save(path)
    with pytest.raises(UserError, match=r"synthetic\.safetensors has other classes, or images of another shape"):
        evaluate_run(run)
    files.write_json(run / "config.json", {})
    with pytest.raises(UserError, match=r"config\.json is not a distillation's configuration \(it has no '.*'\)\.$"):
        evaluate_run(run)
