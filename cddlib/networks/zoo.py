"""Networks by name: the ConvNet, and the architectures that test how a set generalises."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cddlib.networks.convnet import LIMITS, ConvNet, Network, NetworkConfig, unflatten
from cddlib.runtime.errors import UserError


def build_network(config: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> Network:
    """The network of `config` for images of `image_shape` (channels, height, width).

    Raises:
        UserError: the images are not square, have too many or no pixels, channels or classes, or are too small for the
            ConvNet's depth.
    """
    if image_shape[1] != image_shape[2]:
        raise UserError(f"images are {image_shape[1]} by {image_shape[2]} pixels; they must be square.")
    for what, value in {"channels": image_shape[0], "pixels a side": image_shape[1], "classes": classes}.items():
        if not 1 <= value <= LIMITS[what]:
            raise UserError(f"the images have {value} {what}; networks are built for 1 to {LIMITS[what]}.")
    if config.network == "convnet":
        return _convnet(config, image_shape, classes)
    builder = _BUILDERS[config.network]
    return TorchNetwork(lambda: builder(config, image_shape[0], image_shape[1], classes))


@functools.lru_cache(maxsize=16)
def _convnet(config: NetworkConfig, image_shape: tuple[int, int, int], classes: int) -> "ConvNet":
    """One object for each kind, so that its steps are compiled once a process."""
    return ConvNet(config, image_shape, classes)


def side_by_side(
    network: Network, thetas: Float[Tensor, "s p"], images: Float[Tensor, "s b c h w"]
) -> Float[Tensor, "s b classes"]:
    """Logits of several networks of one kind, each for images of its own: of ConvNets in one pass."""
    if isinstance(network, ConvNet):
        return network.side_by_side(thetas, images)
    return torch.stack([network(theta, batch) for theta, batch in zip(thetas, images, strict=True)])


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
            return cast(Tensor, torch.func.functional_call(self._module, unflatten(self, theta), (images,)))


NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "batch": functools.partial(nn.BatchNorm2d, track_running_stats=False),
}
"""The norms that an architecture other than the ConvNet can have, made for a number of channels."""


def _too_small(image_side: int, side: int) -> bool:
    """Whether a map is too small to be pooled to: images below 32 pixels keep maps of 4."""
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
            layers += [NORM_LAYERS[norm](width)] if norm != "none" else []
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
    """ResNet-18 (He et al. 2016) with a stem for small images: convolution 3x3 with stride 1, no pooling.

    Its convolutions begin as in MTT, with PyTorch's numbers and not with torchvision's.
    """
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    net = ResNet(BasicBlock, [2, 2, 2, 2], classes, norm_layer=NORM_LAYERS[config.norm])
    net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
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
                setattr(module, name, NORM_LAYERS[config.norm](child.num_features))
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
