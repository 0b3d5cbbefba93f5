"""What cddlib is measured against: matching, expert training and evaluation, written as one first would."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cddlib
from cddlib.data import augment
from cddlib.data.preprocessing import Normalisation
from cddlib.matching.student import MatchingConfig, StudentStep
from cddlib.networks.convnet import Network


def walk(
    network: Network, start: Tensor, *learned: Tensor, steps: list[StudentStep], exact: bool = True
) -> list[Tensor]:
    """A student's parameters from `start` on, with the graph of all steps; it learns images, targets and step size."""
    (images, targets, step_size), path = learned, [start.clone().requires_grad_()]
    for indices, draw in steps:
        chosen = indices.to(images.device)
        theta = path[-1] if exact else path[-1].detach().requires_grad_()
        loss = F.cross_entropy(network(theta, augment.apply(draw, images[chosen])), targets[chosen])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        path.append(path[-1] - step_size * gradient)
    return path


def matching_loss(
    network: Network,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    targets: Tensor,
    step_size: Tensor,
    steps: list[StudentStep],
    config: MatchingConfig | None = None,
) -> Tensor:
    """The matching loss with the graph of all steps, as MTT's code has it.

    With TESLA's gradient no step sees where the last one led. ATT's end is the nearest step, of equal ones the last.
    """
    config = config or MatchingConfig()
    if config.gradient == "halved":
        images = (images + images.detach()) / 2
    path = walk(network, start, images, targets, step_size, steps=steps, exact=config.gradient == "exact")
    ends = path[:0:-1] if config.match_step == "nearest" else path[-1:]
    end = min(ends, key=lambda theta: (theta - target).abs().sum())
    errors, scales = (end - target).square(), (start - target).square()
    if config.dropped_fraction:
        kept = errors.argsort()[int(config.dropped_fraction * len(errors)) :]
        errors, scales = errors[kept], scales[kept]
    return errors.sum() / scales.sum()


def noise(
    network: cddlib.ConvNet, shape: tuple[int, int, int], size: int, rng: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Parameters where a segment starts and ends, images and labels of ten classes, and a step size."""
    start = network.init(rng)
    target = start + 0.01 * torch.randn(start.shape, generator=rng)
    images = torch.randn(size, *shape, generator=rng)
    targets = F.one_hot(torch.arange(size) % 10, 10).float()
    return [tensor.to(device) for tensor in (start, target, images, targets, torch.tensor(0.01))]


def real_images(size: int, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor, Normalisation]:
    """Pixels of random bytes, labels of ten classes, and what normalises them."""
    rng = cddlib.generator("real images")
    pixels = torch.randint(256, (size, *shape), generator=rng, dtype=torch.uint8).to(device)
    normalisation = Normalisation(torch.full((3,), 0.5), torch.full((3,), 0.25)).to(device)
    return pixels, torch.randint(10, (size,), generator=rng).to(device), normalisation


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "instance": lambda width, side: nn.GroupNorm(width, width),
    "group": lambda width, side: nn.GroupNorm(4, width),
    "layer": lambda width, side: nn.LayerNorm([width, side, side]),
    "batch": lambda width, side: nn.BatchNorm2d(width),
    "none": lambda width, side: nn.Identity(),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d, "none": nn.Identity}


def convnet(config: cddlib.NetworkConfig, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The ConvNet as a module, as the published codes build it."""
    channels, side, _ = shape
    layers: list[nn.Module] = []
    for block in range(config.depth):
        padding = 3 if block == 0 and side == 28 else 1
        layers.append(nn.Conv2d(channels, config.width, 3, padding=padding))
        channels, side = config.width, side + 2 * padding - 2
        layers += [NORMS[config.norm](channels, side), ACTIVATIONS[config.activation](), POOLINGS[config.pooling](2)]
        side //= 1 if config.pooling == "none" else 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, classes))


def train_epoch(
    module: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, batch_size: int, strategy: str
) -> None:
    """One pass in random order, with augmentation of whole batches; labels are classes or probabilities."""
    for indices in torch.randperm(len(images)).split(batch_size):
        chosen = indices.to(images.device)
        inputs = augment.apply(augment.draw(strategy, len(indices), torch.default_generator), images[chosen])
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction that the module gets right."""
    found = [module(batch).argmax(1) for batch in images.split(500)]
    return (torch.cat(found) == labels).double().mean().item()
