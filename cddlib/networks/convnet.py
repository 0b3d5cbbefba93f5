"""Networks as pure functions of (parameters, images).

The parameters are one flat vector: an expert's epoch is a vector, a student's step is vector arithmetic, and a
trajectory is a sequence of points. `unflatten` gives the tensors inside it their names and shapes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cddlib.runtime.errors import UserError, require

Architecture = Literal["convnet", "alexnet", "vgg11", "resnet18", "densenet121", "vit", "mlp"]
Norm = Literal["instance", "batch", "group", "layer", "none"]

LIMITS = {"depth": 64, "width": 4096, "channels": 1024, "pixels a side": 4096, "classes": 2**20}
"""The largest network that is built, and the largest images: a file that asks for more is not believed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network, and how it is built. By default the reference codes' ConvNet."""

    network: Architecture = "convnet"
    """Architecture. The ConvNet is blocks of convolution, norm, activation, pooling."""
    depth: int = 3
    """Number of blocks; of the ConvNet, others ignore it."""
    width: int = 128
    """Channels of every block; of the ConvNet, others ignore it."""
    norm: Norm = "instance"
    """Normalisation after each convolution; group means four groups. vgg11, resnet18 and densenet121 take instance
    or batch; alexnet, vit and mlp ignore it."""
    activation: Literal["relu", "leakyrelu", "sigmoid"] = "relu"
    """Activation after each norm; of the ConvNet, others ignore it."""
    pooling: Literal["avg", "max", "none"] = "avg"
    """Pooling over 2x2 pixels at the end of each block; of the ConvNet, others ignore it."""

    def __post_init__(self) -> None:
        require(1, most=LIMITS["depth"], depth=self.depth)
        require(1, most=LIMITS["width"], width=self.width)
        if self.network == "convnet" and self.norm == "group" and self.width % 4:
            raise UserError(f"width is {self.width}; with norm 'group' it must be a multiple of 4.")
        if self.network in ("vgg11", "resnet18", "densenet121") and self.norm not in ("instance", "batch"):
            raise UserError(f"norm is {self.norm!r}; {self.network} takes 'instance' or 'batch'.")


@runtime_checkable
class Network(Protocol):
    """What buffering, matching and evaluation need of a network."""

    shapes: dict[str, tuple[int, ...]]
    """Names and shapes of the parameters, in the order in which the vector holds them."""

    def init(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Fresh parameters, on the CPU."""

    def __call__(self, theta: Float[Tensor, " p"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""


def parameter_count(network: Network) -> int:
    """Length of the parameter vector."""
    return sum(math.prod(shape) for shape in network.shapes.values())


def unflatten(network: Network, theta: Float[Tensor, "*s p"]) -> dict[str, Tensor]:
    """The parameter vector, or several, as named tensors that share its memory."""
    pieces = theta.split([math.prod(shape) for shape in network.shapes.values()], dim=-1)
    return {
        name: piece.view(*theta.shape[:-1], *shape)
        for (name, shape), piece in zip(network.shapes.items(), pieces, strict=True)
    }


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}
_POOLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"avg": F.avg_pool2d, "max": F.max_pool2d}


class ConvNet:
    """The field's ConvNet (Gidaris & Komodakis 2018, as in DC and MTT), a pure function of (parameters, images).

    Instance norm is a group norm with one channel a group, with scale and shift. Batch norm uses the statistics of
    the batch in hand, in testing too: a pure function keeps no running averages. Images of 28 pixels are padded to
    32 by the first convolution.
    """

    def __init__(self, config: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> None:
        """Lay out the parameters for square images of `image_shape` (channels, height, width)."""
        self.config = config
        self.paddings = [3 if image_shape[1] == 28 else 1] + [1] * (config.depth - 1)
        self.side = image_shape[1] + 2 * (self.paddings[0] - 1)
        channels, size = image_shape[0], self.side
        self.shapes: dict[str, tuple[int, ...]] = {}
        for block in range(config.depth):
            self.shapes[f"conv{block}.weight"] = (config.width, channels, 3, 3)
            self.shapes[f"conv{block}.bias"] = (config.width,)
            if config.norm != "none":
                scale = (config.width, size, size) if config.norm == "layer" else (config.width,)
                self.shapes[f"norm{block}.weight"] = scale
                self.shapes[f"norm{block}.bias"] = scale
            channels, size = config.width, size if config.pooling == "none" else size // 2
            if size == 0:
                raise UserError(
                    f"depth is {config.depth}; images of {image_shape[1]} pixels allow at most {block} blocks "
                    f"with pooling."
                )
        self.shapes["classifier.weight"] = (classes, config.width * size * size)
        self.shapes["classifier.bias"] = (classes,)

    def init(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Fresh parameters as PyTorch draws them: uniform within 1 / sqrt(fan-in); norms scale by 1 and shift by 0."""
        pieces = []
        fan_in = 0
        for name, shape in self.shapes.items():
            if name.startswith("norm"):
                pieces.append(torch.full(shape, float(name.endswith("weight"))).flatten())
                continue
            if name.endswith("weight"):
                fan_in = math.prod(shape[1:])
            uniform = torch.rand(math.prod(shape), generator=generator)
            pieces.append((2 * uniform - 1) / math.sqrt(fan_in))
        return torch.cat(pieces)

    def __call__(self, theta: Float[Tensor, " p"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        return self.side_by_side(theta[None], images[None])[0]

    def side_by_side(
        self, thetas: Float[Tensor, "s p"], images: Float[Tensor, "s b c h w"]
    ) -> Float[Tensor, "s b classes"]:
        """Logits of s networks. Their channels lie side by side, and each convolution sees those of its own network."""
        count, p = len(thetas), unflatten(self, thetas)
        weight, bias = p.pop("classifier.weight"), p.pop("classifier.bias")
        p = {name: tensor.flatten(0, 1) for name, tensor in p.items()}
        x = fold_networks(images)
        for block in range(self.config.depth):
            x = F.conv2d(x, p[f"conv{block}.weight"], p[f"conv{block}.bias"], 1, self.paddings[block], groups=count)
            if self.config.norm != "none":
                x = self._normalise(x, p[f"norm{block}.weight"], p[f"norm{block}.bias"], count)
            x = _ACTIVATIONS[self.config.activation](x)
            if self.config.pooling != "none":
                x = _POOLINGS[self.config.pooling](x, 2)
        return torch.baddbmm(bias[:, None], unfold_networks(x, count).flatten(2), weight.mT)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor, count: int) -> Tensor:
        if self.config.norm == "layer":
            return F.group_norm(x, count) * weight + bias
        if self.config.norm == "batch":
            return F.batch_norm(x, None, None, weight, bias, training=True)
        return F.group_norm(x, 4 * count if self.config.norm == "group" else x.shape[1], weight, bias)


def fold_networks(x: Float[Tensor, "s b c h w"]) -> Float[Tensor, "b sc h w"]:
    """The channels of several networks side by side."""
    return x.transpose(0, 1).flatten(1, 2)


def unfold_networks(x: Float[Tensor, "b sc h w"], count: int) -> Float[Tensor, "s b c h w"]:
    """The channels of `count` networks, which lie side by side, each network's for itself."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)
