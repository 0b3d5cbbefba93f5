"""Networks as pure functions of (parameters, images).

The parameters are one flat vector: an expert's epoch is a vector, a student's step is vector arithmetic, and a
trajectory is a sequence of points. `views` gives the tensors inside it their names and shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cddlib.files import UserError

Architecture = Literal["convnet", "alexnet", "vgg11", "resnet18", "densenet121", "vit", "mlp"]
Norm = Literal["instance", "batch", "group", "layer", "none"]

LARGEST = {"depth": 64, "width": 4096}
"""The deepest and the widest ConvNet: a file that asks for more is not believed."""
MOST_CHANNELS, LONGEST_SIDE, MOST_CLASSES = 1024, 4096, 2**20
"""Of the images that a network is built for, for the same reason."""


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
        for name, most in LARGEST.items():
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1 and at most {most}.")
        if self.network == "convnet" and self.norm == "group" and self.width % 4:
            raise UserError(f"width is {self.width}; with norm 'group' it must be a multiple of 4.")
        if self.network in ("vgg11", "resnet18", "densenet121") and self.norm not in _NORMS:
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


def build_network(config: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> Network:
    """The network of `config` for images of `image_shape` (channels, height, width).

    Raises:
        UserError: the images are not square, have too many or no pixels, channels or classes, or are too small for the
            ConvNet's depth.
    """
    if image_shape[1] != image_shape[2]:
        raise UserError(f"images are {image_shape[1]} by {image_shape[2]} pixels; they must be square.")
    for value, most, what in (
        (image_shape[0], MOST_CHANNELS, "channels"),
        (image_shape[1], LONGEST_SIDE, "pixels a side"),
        (classes, MOST_CLASSES, "classes"),
    ):
        if not 1 <= value <= most:
            raise UserError(f"the images have {value} {what}; networks are built for 1 to {most}.")
    if config.network == "convnet":
        return _convnet(config, image_shape, classes)
    builder = _BUILDERS[config.network]
    return TorchNetwork(lambda: builder(config, image_shape[0], image_shape[1], classes))


@functools.lru_cache(maxsize=16)
def _convnet(config: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> "ConvNet":
    """One object for each kind, so that its steps are compiled once a process."""
    return ConvNet(config, image_shape, classes)


def parameter_count(network: Network) -> int:
    """Length of the parameter vector."""
    return sum(math.prod(shape) for shape in network.shapes.values())


def views(network: Network, theta: Float[Tensor, "*s p"]) -> dict[str, Tensor]:
    """The parameter vector, or several, as named tensors that share its memory."""
    pieces = theta.split([math.prod(shape) for shape in network.shapes.values()], dim=-1)
    return {
        name: piece.view(*theta.shape[:-1], *shape)
        for (name, shape), piece in zip(network.shapes.items(), pieces, strict=True)
    }


def side_by_side(
    network: Network, thetas: Float[Tensor, "s p"], images: Float[Tensor, "s b c h w"]
) -> Float[Tensor, "s b classes"]:
    """Logits of several networks of one kind, each for images of its own: of ConvNets in one pass."""
    if isinstance(network, ConvNet):
        return network.side_by_side(thetas, images)
    return torch.stack([network(theta, batch) for theta, batch in zip(thetas, images, strict=True)])


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
        count, p = len(thetas), views(self, thetas)
        weight, bias = p.pop("classifier.weight"), p.pop("classifier.bias")
        p = {name: tensor.flatten(0, 1) for name, tensor in p.items()}
        x = beside(images)
        for block in range(self.config.depth):
            x = F.conv2d(x, p[f"conv{block}.weight"], p[f"conv{block}.bias"], 1, self.paddings[block], groups=count)
            if self.config.norm != "none":
                x = self._normalise(x, p[f"norm{block}.weight"], p[f"norm{block}.bias"], count)
            x = _ACTIVATIONS[self.config.activation](x)
            if self.config.pooling != "none":
                x = _POOLINGS[self.config.pooling](x, 2)
        return torch.baddbmm(bias[:, None], apart(x, count).flatten(2), weight.mT)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor, count: int) -> Tensor:
        if self.config.norm == "layer":
            return F.group_norm(x, count) * weight + bias
        if self.config.norm == "batch":
            return F.batch_norm(x, None, None, weight, bias, training=True)
        return F.group_norm(x, 4 * count if self.config.norm == "group" else x.shape[1], weight, bias)


def beside(x: Float[Tensor, "s b c h w"]) -> Float[Tensor, "b sc h w"]:
    """The channels of several networks side by side."""
    return x.transpose(0, 1).flatten(1, 2)


def apart(x: Float[Tensor, "b sc h w"], count: int) -> Float[Tensor, "s b c h w"]:
    """The channels of `count` networks, which lie side by side, each network's for itself."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


# --- Other architectures ----------------------------------------------------------------------------------------
#
# One rule for images below 32 pixels: where a norm or a convolution follows, no map is halved to less than 4 pixels a
# side. Of one pixel an instance norm leaves nothing, and of four too little: VGG-11 did not learn the digits so.


class TorchNetwork:
    """A `torch.nn.Module` as a pure function of (parameters, images).

    Its parameters are laid out in the order of `named_parameters`. The module may hold no state but these: no
    running averages, no dropout.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """Take the structure of the module that `build` returns."""
        self._build = build
        with torch.device("meta"):  # the numbers come with every call
            self._module = build()
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._module.named_parameters()
        }

    def init(self, generator: torch.Generator) -> Float[Tensor, " p"]:
        """Fresh parameters as the module draws them, from a seed that `generator` gives."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            module = self._build()
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    def __call__(self, theta: Float[Tensor, " p"], images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention cannot be differentiated twice
            return cast(Tensor, torch.func.functional_call(self._module, views(self, theta), (images,)))


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "batch": functools.partial(nn.BatchNorm2d, track_running_stats=False),
}


def _too_small(image_side: int, side: int) -> bool:
    return image_side < 32 and side < 4


def _stages(
    channels: int, side: int, kernels: Sequence[int], stages: Sequence[Sequence[int]], norm: str = "none"
) -> tuple[list[nn.Module], int]:
    """Stages of convolution, norm and ReLU with a 2x2 max pooling after each, and the side of the last map."""
    layers: list[nn.Module] = []
    image_side = side
    for stage, (kernel, widths) in enumerate(zip(kernels, stages, strict=True), start=1):
        for width in widths:
            layers += [nn.Conv2d(channels, width, kernel, padding="same")]
            layers += [_NORMS[norm](width)] if norm != "none" else []
            layers += [nn.ReLU()]
            channels = width
        if stage == len(stages) or not _too_small(image_side, side // 2):
            layers += [nn.MaxPool2d(2)]
            side //= 2
    return layers, side


def _alexnet(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """AlexNet (Krizhevsky et al. 2012) as in DC and MTT: first convolution 5x5 with stride 1, one linear classifier.

    Pooling is over 2x2 pixels, and there is no dropout.
    """
    layers, side = _stages(channels, side, (5, 5, 3), ((128,), (192,), (256, 192, 192)))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * side * side, classes))


def _vgg11(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """VGG-11 (Simonyan & Zisserman 2015) as in DC and MTT: a norm after each convolution, one linear classifier.

    The last map is averaged, so that images may have more than 32 pixels; there is no dropout.
    """
    stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    layers, _ = _stages(channels, side, [3] * 5, stages, config.norm)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def _resnet18(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """ResNet-18 (He et al. 2016) with a stem for small images: convolution 3x3 with stride 1, no pooling."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    net = ResNet(BasicBlock, [2, 2, 2, 2], classes, norm_layer=_NORMS[config.norm])
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    net.maxpool = nn.Identity()
    for halvings, layer in enumerate((net.layer2, net.layer3, net.layer4), start=1):
        if _too_small(side, -(-side // 2**halvings)):
            layer[0].conv1.stride = layer[0].downsample[0].stride = (1, 1)
    return net


def _densenet121(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """DenseNet-121 (Huang et al. 2017) with a stem for small images: convolution 3x3 with stride 1, no pooling."""
    from torchvision.models import DenseNet

    net = DenseNet(num_classes=classes)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, _NORMS[config.norm](child.num_features))
    net.features.conv0 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)  # as torchvision's
    net.features.pool0 = nn.Identity()
    features = net.features
    for halvings, transition in enumerate((features.transition1, features.transition2, features.transition3), start=1):
        if _too_small(side, side // 2**halvings):
            transition.pool = nn.Identity()
    return net


def _vit(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021), our choice: half of DeiT-Ti, 6 layers of 192 channels.

    Patches are the smallest that cut the side into at most 8 pieces: 4x4 pixels of 28 or 32, one of 8, 8x8 of 64.
    As torchvision initialises it, the classifier starts at zero.
    """
    from torchvision.models import VisionTransformer

    patch = next(size for size in range(-(-side // 8), side + 1) if side % size == 0)
    net = VisionTransformer(side, patch, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=classes)
    net.conv_proj = nn.Conv2d(channels, 192, patch, stride=patch)
    nn.init.trunc_normal_(net.conv_proj.weight, std=1 / math.sqrt(channels * patch * patch))  # as torchvision's
    nn.init.zeros_(cast(Tensor, net.conv_proj.bias))
    return net


def _mlp(config: NetworkConfig, channels: int, side: int, classes: int) -> nn.Module:
    """The perceptron of DC and MTT: two hidden layers of 128."""
    hidden = [nn.Linear(channels * side * side, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, classes))


_BUILDERS: dict[str, Callable[[NetworkConfig, int, int, int], nn.Module]] = {
    "alexnet": _alexnet,
    "vgg11": _vgg11,
    "resnet18": _resnet18,
    "densenet121": _densenet121,
    "vit": _vit,
    "mlp": _mlp,
}
