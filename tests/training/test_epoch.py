"""Training an epoch: plain SGD, and GSAM against the two-pass optimiser on a module of torch.nn."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cddlib
from cddlib.data import augment, preprocessing
from cddlib.training import epoch as epoch_module
from cddlib.training.engine import make_step
from cddlib.training.epoch import SharpnessConfig, fetch_real, train_epoch
from cddlib.training.step import ComputeConfig

SIZE, BATCH, CLASSES = 22, 8, 3


def gsam(
    model: nn.Module, sgd: torch.optim.Optimizer, config: SharpnessConfig, inputs: Tensor, targets: Tensor
) -> float:
    """A step of GSAM around another optimiser, in two passes (Zhuang et al. 2022, after the public one)."""
    parameters = list(model.parameters())
    w = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(at: Tensor) -> tuple[float, Tensor]:
        nn.utils.vector_to_parameters(at, parameters)
        loss = F.cross_entropy(model(inputs), targets)
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    loss, old = gradient(w.clone())
    scale = w.abs() if config.sharpness_adaptive else torch.ones_like(w)
    _, perturbed = gradient(w + config.sharpness_radius * scale**2 * old / (scale * old).norm())
    nn.utils.vector_to_parameters(w, parameters)
    across = old - old @ perturbed / perturbed.norm() ** 2 * perturbed
    vector = perturbed - config.sharpness_weight * across
    for parameter, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    sgd.step()
    return loss


def problem(dtype: torch.dtype = torch.double) -> tuple[cddlib.ConvNet, Tensor, Tensor, Tensor]:
    """A network, its parameters, images and classes."""
    rng = cddlib.generator("training")
    network = cddlib.ConvNet(cddlib.NetworkConfig(depth=2, width=4), (1, 8, 8), CLASSES)
    theta = network.init(rng).to(dtype)
    theta += 0.1 * torch.randn(theta.shape, generator=rng, dtype=dtype)  # norms too
    return network, theta, torch.randn(SIZE, 1, 8, 8, generator=rng, dtype=dtype), torch.arange(SIZE) % CLASSES


def train(
    network: cddlib.ConvNet, theta: Tensor, images: Tensor, labels: Tensor, epochs: int = 2, **rest: Any
) -> tuple[Tensor, list[float]]:
    """Some epochs of `train_epoch` with momentum and weight decay."""
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.2, momentum=0.5, weight_decay=0.01)
    rest |= {"batch_size": BATCH, "strategy": "crop_scale_rotate"}

    def epoch(number: int) -> float:
        rng = cddlib.generator("epoch", number)
        return train_epoch(network, theta, optimizer, lambda i: (images[i], labels[i]), SIZE, generator=rng, **rest)

    losses = [epoch(number) for number in range(epochs)]
    return theta.detach(), losses


def batches(images: Tensor, labels: Tensor, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """The epoch's augmented batches."""
    rng = cddlib.generator("epoch", epoch)
    return [
        (augment.apply(augment.draw("crop_scale_rotate", len(indices), rng), images[indices]), labels[indices])
        for indices in torch.randperm(SIZE, generator=rng).split(BATCH)
    ]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(("radius", "weight"), [(0.01, 0.3), (0.5, 0.0), (2.0, 1.0)])
def test_gsam_is_the_optimiser_s(radius: float, weight: float, adaptive: bool) -> None:
    network, theta, images, labels = problem()
    sharpness = SharpnessConfig(sharpness_radius=radius, sharpness_weight=weight, sharpness_adaptive=adaptive)
    found, losses = train(network, theta, images, labels, sharpness=sharpness)
    model = textbook.convnet(network.config, (1, 8, 8), CLASSES).double()  # the same network of modules
    nn.utils.vector_to_parameters(theta.clone(), model.parameters())
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5, weight_decay=0.01)
    wanted_losses = [
        sum(gsam(model, sgd, sharpness, *batch) * len(batch[1]) for batch in batches(images, labels, epoch)) / SIZE
        for epoch in range(2)
    ]
    wanted = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert ((found - wanted).norm() / (wanted - theta).norm()).item() < 1e-9
    assert losses == pytest.approx(wanted_losses, rel=1e-6)  # of the parameters, not of their surroundings
    plain, _ = train(network, theta, images, labels)
    assert ((found - plain).norm() / (wanted - theta).norm()).item() > 1e-4


def test_only_full_batches_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch may have another size in every epoch, and is one of many."""
    network, theta, images, labels = problem(torch.float32)
    sizes: list[tuple[bool | None, int]] = []

    def watched(_: Any, compute: ComputeConfig, device: torch.device) -> Any:
        step = make_step(network, ComputeConfig(), device)
        note = lambda *x: sizes.append((compute.compiled, x[1].shape[1])) or step.gradient(*x)  # noqa: E731
        return SimpleNamespace(gradient=note)

    monkeypatch.setattr(epoch_module, "make_step", watched)
    train(network, theta, images, labels, compute=ComputeConfig(compiled=True))
    assert set(sizes) == {(True, BATCH), (False, SIZE % BATCH)}


@pytest.mark.parametrize("sharpness", [None, SharpnessConfig(), SharpnessConfig(sharpness_weight=2.0)])
def test_without_a_radius_it_is_sgd_to_the_bit(sharpness: SharpnessConfig | None) -> None:
    network, theta, images, labels = problem(torch.float32)
    found, _ = train(network, theta, images, labels, sharpness=sharpness)
    wanted = theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([wanted], lr=0.2, momentum=0.5, weight_decay=0.01)
    for epoch in range(2):
        for inputs, targets in batches(images, labels, epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(wanted, inputs), targets).backward()
            optimizer.step()
    assert found.numpy().tobytes() == wanted.detach().numpy().tobytes()


def test_whitening_all_images_at_once_is_whitening_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory allows; whoever asks again gets the same, as long as the images live."""
    digits = cddlib.load("digits")
    part = digits.train.select(torch.arange(1000))
    whitening = preprocessing.fit_preprocessing(digits, zca=True)
    rows = torch.tensor([5, 0, 800, 5])
    needed, found = 4 * 4 * part.labels.numel() * 64, []
    for free in (needed - 4, needed):
        monkeypatch.setattr(preprocessing, "free_memory", lambda device, free=free: free)
        found.append(fetch_real(part, whitening)(rows))
        assert len(whitening._whitened) == (free == needed)
    for batchwise, at_once in zip(*found, strict=True):
        torch.testing.assert_close(at_once, batchwise)
    assert whitening.whitened(part) is whitening.whitened(part)
    del part
    gc.collect()
    assert not len(whitening._whitened)
