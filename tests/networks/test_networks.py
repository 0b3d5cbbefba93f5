"""Networks as pure functions, against the same networks made of torch.nn modules or written out."""

import itertools
import math
from typing import Any, get_args

import pytest
import textbook
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from works import refusal

import cddlib
from cddlib.networks.convnet import Architecture, ConvNet, Network, NetworkConfig, Norm, parameter_count, unflatten
from cddlib.networks.zoo import build_network

NORMS = get_args(Norm)
ARCHITECTURES = get_args(Architecture)
NORMED = ("vgg11", "resnet18", "densenet121")


def check_against_module(config: NetworkConfig, shape: tuple[int, int, int], classes: int = 5) -> None:
    """Same order and shapes of parameters, same logits."""
    rng = cddlib.generator("networks")
    network, reference = ConvNet(config, shape, classes), textbook.convnet(config, shape, classes).double()
    assert list(network.shapes.values()) == [tuple(p.shape) for p in reference.parameters()]
    theta = torch.randn(parameter_count(network), generator=rng, dtype=torch.double) * 0.3
    nn.utils.vector_to_parameters(theta, reference.parameters())
    images = torch.randn(4, *shape, generator=rng, dtype=torch.double)
    found, wanted = network(theta, images), reference(images)
    assert found.dtype == torch.double
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_equal_to_modules(norm: Any) -> None:
    for activation, pooling in itertools.product(textbook.ACTIVATIONS, textbook.POOLINGS):
        config = NetworkConfig(depth=2, width=8, norm=norm, activation=activation, pooling=pooling)
        check_against_module(config, (3, 8, 8))
    for shape in ((1, 28, 28), (3, 32, 32), (2, 9, 9)):
        check_against_module(NetworkConfig(depth=3, width=4, norm=norm), shape)


# --- Fresh parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_init_has_the_ranges_of_pytorch(norm: Any) -> None:
    config = NetworkConfig(depth=2, width=32, norm=norm)
    network = ConvNet(config, (3, 16, 16), 10)
    ours = unflatten(network, network.init(cddlib.generator("init")))
    fan_in = {"conv0": 3 * 9, "conv1": 32 * 9, "classifier": 32 * 4 * 4}
    for name, mine in ours.items():
        layer, kind = name.split(".")
        if layer.startswith("norm"):
            assert (mine == float(kind == "weight")).all()
            continue
        bound = 1 / math.sqrt(fan_in[layer])
        assert 0.5 * bound < mine.abs().max() <= bound
        if kind == "weight":
            assert mine.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # uniform


# --- Refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1 and at most 64."),
        ({"width": 0}, "width is 0; it must be at least 1 and at most 4096."),
        ({"width": 6, "norm": "group"}, "width is 6; with norm 'group' it must be a multiple of 4."),
        *(
            ({"network": name, "norm": norm}, f"norm is '{norm}'; {name} takes 'instance' or 'batch'.")
            for name in NORMED
            for norm in ("group", "layer", "none")
        ),
    ],
)
def test_impossible_networks_are_refused(values: dict[str, Any], sentence: str) -> None:
    assert refusal(NetworkConfig, **values) == sentence


@pytest.mark.parametrize(("size", "blocks"), [(8, 3), (9, 3), (28, 5), (32, 5)])
def test_depth_is_limited_by_the_pixels(size: int, blocks: int) -> None:
    check_against_module(NetworkConfig(depth=blocks, width=4), (1, size, size))
    assert refusal(ConvNet, NetworkConfig(depth=blocks + 1, width=4), (1, size, size), 5) == (
        f"depth is {blocks + 1}; images of {size} pixels allow at most {blocks} blocks with pooling."
    )
    check_against_module(NetworkConfig(depth=blocks + 1, width=4, pooling="none"), (1, size, size))


@pytest.mark.parametrize(
    ("shape", "classes", "sentence"),
    [
        ((1, 8, 16), 5, "images are 8 by 16 pixels; they must be square."),
        ((2000, 8, 8), 5, "the images have 2000 channels; networks are built for 1 to 1024."),
        ((1, 8, 8), 0, "the images have 0 classes; networks are built for 1 to 1048576."),
    ],
)
def test_other_images_are_refused(shape: tuple[int, int, int], classes: int, sentence: str) -> None:
    for name in ARCHITECTURES:
        assert refusal(build_network, NetworkConfig(network=name), shape, classes) == sentence


# --- Other architectures ----------------------------------------------------------------------------------------


def start(network: Network) -> Tensor:
    """Fresh parameters in float64, all of them away from zero: a new transformer answers 0 to every image."""
    rng = cddlib.generator("start")
    theta = network.init(rng).double()
    return theta + 0.01 * torch.randn(theta.shape, generator=rng, dtype=torch.double)


def some_images(number: int, shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(number, *shape, generator=cddlib.generator("images"), dtype=torch.double)


COUNTS = {"convnet": 320_010, "alexnet": 1_872_202, "vgg11": 9_231_114, "resnet18": 11_173_962}
COUNTS |= {"densenet121": 6_956_426, "vit": 2_693_578, "mlp": 411_146}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_number_of_parameters(name: Any) -> None:
    for norm in ("instance", "batch"):
        network = build_network(NetworkConfig(network=name, norm=norm), (3, 32, 32), 10)
        assert isinstance(network, Network)
        assert isinstance(network, ConvNet) == (name == "convnet")
        assert parameter_count(network) == COUNTS[name]


@pytest.mark.parametrize(("name", "norm"), [*((name, "instance") for name in ARCHITECTURES), ("convnet", "layer")])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64)])
def test_logits_depend_on_the_image_and_on_nothing_else(name: Any, norm: Any, shape: tuple[int, int, int]) -> None:
    network = build_network(NetworkConfig(network=name, norm=norm), shape, 5)
    theta, images = start(network).float(), some_images(2, shape).float()
    before = theta.clone(), images.clone()
    with torch.no_grad():  # where attention would take another path
        logits = network(theta, images)
        alone = network(theta, images[1:])
    assert logits.shape == (2, 5)
    assert (logits[0] - logits[1]).abs().mean() > 1e-3
    torch.testing.assert_close(alone, logits[1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(network(theta, images), logits, rtol=0, atol=1e-4)
    assert all(map(torch.equal, (theta, images), before))


@pytest.mark.parametrize("name", ["convnet", *NORMED])
def test_batch_norm_uses_the_batch_in_hand(name: Any) -> None:
    network = build_network(NetworkConfig(network=name, norm="batch"), (1, 8, 8), 5)
    theta, images = start(network).float(), some_images(4, (1, 8, 8)).float()
    with torch.no_grad():
        logits, fewer = network(theta, images), network(theta, images[:2])
        assert (logits[:2] - fewer).abs().mean() > 1e-3
        assert torch.equal(network(theta, images), logits)


# Each architecture written out, with instance norm, for images of 8, 28 or 32 pixels.


def convolutions(p: list[Tensor], x: Tensor, stages: list[int], *, norm: bool, pooled: list[bool]) -> Tensor:
    """`stages` holds the number of convolutions before each pooling."""
    for convolutions, pool in zip(stages, pooled, strict=True):
        for _ in range(convolutions):
            weight, bias, *p = p
            x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
            if norm:
                weight, bias, *p = p
                x = F.group_norm(x, x.shape[1], weight, bias)
            x = F.relu(x)
        x = F.max_pool2d(x, 2) if pool else x
    return F.linear((x.mean((2, 3)) if norm else x.flatten(1)), *p)


def alexnet(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return convolutions([*p.values()], x, [1, 1, 3], norm=False, pooled=[True, x.shape[-1] > 8, True])


def vgg11(p: dict[str, Tensor], x: Tensor) -> Tensor:
    pooled = {8: [True, False, False, False, True], 28: [True, True, False, False, True], 32: [True] * 5}[x.shape[-1]]
    return convolutions([*p.values()], x, [1, 1, 2, 2, 2], norm=True, pooled=pooled)


def resnet18(p: dict[str, Tensor], x: Tensor) -> Tensor:
    def unit(conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
        weight = p[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.group_norm(x, x.shape[1], p[f"{norm}.weight"], p[f"{norm}.bias"])

    strides = [1, 2, 1, 1] if x.shape[-1] == 8 else [1, 2, 2, 2]
    x = F.relu(unit("conv1", "bn1", x, 1))
    for layer, stride in enumerate(strides, start=1):
        for block in (f"layer{layer}.0", f"layer{layer}.1"):
            here = stride if block.endswith("0") else 1
            inside = F.relu(unit(f"{block}.conv1", f"{block}.bn1", x, here))
            inside = unit(f"{block}.conv2", f"{block}.bn2", inside, 1)
            projected = f"{block}.downsample.0.weight" in p
            x = F.relu(inside + (unit(f"{block}.downsample.0", f"{block}.downsample.1", x, here) if projected else x))
    return F.linear(x.mean((2, 3)), p["fc.weight"], p["fc.bias"])


def mlp(p: dict[str, Tensor], x: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = p.values()
    assert len(b1) == len(b2) == 128
    return F.linear(F.relu(F.linear(F.relu(F.linear(x.flatten(1), w1, b1)), w2, b2)), w3, b3)


@pytest.mark.parametrize("reference", [alexnet, vgg11, resnet18, mlp])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_equal_to_the_network_written_out(reference: Any, shape: tuple[int, int, int]) -> None:
    network = build_network(NetworkConfig(network=reference.__name__), shape, 5)
    theta, images = start(network), some_images(2, shape)
    with torch.no_grad():
        logits = network(theta, images)
        torch.testing.assert_close(logits, reference(unflatten(network, theta), images))
    assert (logits[0] - logits[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_init_of_every_architecture_depends_on_its_generator_alone(name: Any) -> None:
    network = build_network(NetworkConfig(network=name), (1, 8, 8), 3)
    state = torch.get_rng_state()
    theta, again, other = (network.init(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again, theta) and not torch.equal(other, theta)
    assert (theta.dtype, theta.shape) == (torch.float, (parameter_count(network),))
    assert bool(theta.isfinite().all())
