"""Networks as pure functions, against the same network made of torch.nn modules."""

import itertools
import math
from typing import Any, cast, get_args

import pytest
import torch
from torch import nn

import cddlib
from cddlib.networks import ConvNet, Network, NetworkConfig, Norm, parameter_count, views

NORMS = get_args(Norm)
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}
POOLINGS: dict[str, type[nn.Module]] = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}


def module(config: NetworkConfig, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """The ConvNet as the published codes build it."""
    channels, size, _ = shape
    layers: list[nn.Module] = []
    for block in range(config.depth):
        padding = 3 if block == 0 and size == 28 else 1
        layers.append(nn.Conv2d(channels, config.width, 3, padding=padding))
        channels, size = config.width, size + 2 * padding - 2
        if config.norm == "instance":
            layers.append(nn.GroupNorm(channels, channels))
        elif config.norm == "group":
            layers.append(nn.GroupNorm(4, channels))
        elif config.norm == "layer":
            layers.append(nn.LayerNorm([channels, size, size]))
        elif config.norm == "batch":
            layers.append(nn.BatchNorm2d(channels))
        layers.append(ACTIVATIONS[config.activation]())
        if config.pooling != "none":
            layers.append(POOLINGS[config.pooling](2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes)).train()


def check_against_module(config: NetworkConfig, shape: tuple[int, int, int], classes: int = 5) -> None:
    """Same order and shapes of parameters, same logits."""
    rng = cddlib.generator("networks")
    network, reference = ConvNet(config, shape, classes), module(config, shape, classes).double()
    assert list(network.shapes.values()) == [tuple(p.shape) for p in reference.parameters()]
    theta = torch.randn(parameter_count(network), generator=rng, dtype=torch.double) * 0.3
    nn.utils.vector_to_parameters(theta, reference.parameters())
    images = torch.randn(4, *shape, generator=rng, dtype=torch.double)
    found, wanted = network(theta, images), reference(images)
    assert found.dtype == torch.double
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("norm", "activation", "pooling"), [*itertools.product(NORMS, ACTIVATIONS, ["avg", "max", "none"])]
)
def test_equal_to_modules(norm: Any, activation: Any, pooling: Any) -> None:
    config = NetworkConfig(depth=2, width=8, norm=norm, activation=activation, pooling=pooling)
    check_against_module(config, (3, 8, 8))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 9, 9)])
def test_equal_to_modules_at_other_sizes(norm: Any, shape: tuple[int, int, int]) -> None:
    check_against_module(NetworkConfig(depth=3, width=4, norm=norm), shape)


def test_28_pixels_are_padded_to_32() -> None:
    wide = NetworkConfig(depth=3, width=4)
    assert ConvNet(wide, (1, 28, 28), 10).shapes == ConvNet(wide, (1, 32, 32), 10).shapes
    assert ConvNet(wide, (1, 28, 28), 10).shapes["classifier.weight"] == (10, 4 * 4 * 4)
    network = ConvNet(wide, (1, 28, 28), 10)
    theta = network.init(cddlib.generator("init"))
    images = torch.randn(2, 1, 28, 28, generator=cddlib.generator("images"))
    bordered = nn.functional.pad(images, (2, 2, 2, 2))
    torch.testing.assert_close(network(theta, images), ConvNet(wide, (1, 32, 32), 10)(theta, bordered))


def test_the_published_size() -> None:
    network = ConvNet(NetworkConfig(), (3, 32, 32), 10)
    assert isinstance(network, Network)
    assert parameter_count(network) == 320_010  # MTT's ConvNetD3, width 128
    assert len(network.init(cddlib.generator(0))) == 320_010


def test_the_order_of_the_parameters() -> None:
    shapes = ConvNet(NetworkConfig(depth=2, width=4), (3, 8, 8), 5).shapes
    assert list(shapes.items()) == [
        ("conv0.weight", (4, 3, 3, 3)),
        ("conv0.bias", (4,)),
        ("norm0.weight", (4,)),
        ("norm0.bias", (4,)),
        ("conv1.weight", (4, 4, 3, 3)),
        ("conv1.bias", (4,)),
        ("norm1.weight", (4,)),
        ("norm1.bias", (4,)),
        ("classifier.weight", (5, 16)),
        ("classifier.bias", (5,)),
    ]
    plain = ConvNet(NetworkConfig(depth=1, width=4, norm="none", pooling="none"), (3, 8, 8), 5).shapes
    assert list(plain) == ["conv0.weight", "conv0.bias", "classifier.weight", "classifier.bias"]


def test_views_share_memory_with_the_vector() -> None:
    network = ConvNet(NetworkConfig(depth=2, width=4), (3, 8, 8), 5)
    theta = torch.arange(parameter_count(network)).float()
    named = views(network, theta)
    assert {name: tuple(view.shape) for name, view in named.items()} == network.shapes
    assert torch.equal(torch.cat([view.flatten() for view in named.values()]), theta)
    named["norm1.bias"].fill_(-1)
    assert (theta == -1).sum() == 4
    assert all(view.untyped_storage().data_ptr() == theta.untyped_storage().data_ptr() for view in named.values())


# --- Fresh parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_init_has_the_ranges_of_pytorch(norm: Any) -> None:
    config = NetworkConfig(depth=2, width=32, norm=norm)
    network = ConvNet(config, (3, 16, 16), 10)
    ours = views(network, network.init(cddlib.generator("init")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = module(config, (3, 16, 16), 10).parameters()
    fan_in = {"conv0": 3 * 9, "conv1": 32 * 9, "classifier": 32 * 4 * 4}
    for (name, mine), torchs in zip(ours.items(), theirs, strict=True):
        layer, kind = name.split(".")
        if layer.startswith("norm"):
            assert torch.equal(mine, torchs)
            continue
        bound = 1 / math.sqrt(fan_in[layer])
        assert max(mine.abs().max(), torchs.abs().max()) <= bound
        if kind == "weight":
            assert min(mine.max(), -mine.min()) > 0.98 * bound
            assert abs(mine.mean()) < 0.1 * bound
            assert mine.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # uniform
        else:
            assert mine.abs().max() > 0.5 * bound


def test_init_depends_on_its_generator_alone() -> None:
    network = ConvNet(NetworkConfig(depth=1, width=4), (1, 8, 8), 3)
    state = torch.get_rng_state()
    first, second, other = (network.init(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float


# --- Purity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_the_logits_depend_on_the_arguments_alone(norm: Any) -> None:
    network = ConvNet(NetworkConfig(depth=2, width=4, norm=norm), (2, 8, 8), 3)
    rng = cddlib.generator("purity")
    theta, images = network.init(rng), torch.randn(5, 2, 8, 8, generator=rng)
    before = theta.clone(), images.clone()
    logits = network(theta, images)
    network(2 * theta, images + 1)
    assert torch.equal(network(theta, images), logits)
    assert torch.equal(theta, before[0])
    assert torch.equal(images, before[1])


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "batch"])
def test_images_do_not_see_each_other(norm: Any) -> None:
    network = ConvNet(NetworkConfig(depth=2, width=4, norm=norm), (2, 8, 8), 3)
    rng = cddlib.generator("alone")
    theta, images = network.init(rng), torch.randn(5, 2, 8, 8, generator=rng)
    torch.testing.assert_close(network(theta, images)[2:3], network(theta, images[2:3]))


# --- Refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1."),
        ({"width": 0}, "width is 0; it must be at least 1."),
        ({"width": 6, "norm": "group"}, "width is 6; with norm 'group' it must be a multiple of 4."),
    ],
)
def test_impossible_networks_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cddlib.UserError) as refused:
        NetworkConfig(**values)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("size", "blocks"), [(8, 3), (9, 3), (28, 5), (32, 5)])
def test_depth_is_limited_by_the_pixels(size: int, blocks: int) -> None:
    check_against_module(NetworkConfig(depth=blocks, width=4), (1, size, size))
    with pytest.raises(cddlib.UserError) as refused:
        ConvNet(NetworkConfig(depth=blocks + 1, width=4), (1, size, size), 5)
    assert str(refused.value) == (
        f"depth is {blocks + 1}; images of {size} pixels allow at most {blocks} blocks with pooling."
    )
    deep = ConvNet(NetworkConfig(depth=blocks + 1, width=4, pooling="none"), (1, size, size), 5)
    assert cast(Any, deep).shapes["classifier.weight"][0] == 5
