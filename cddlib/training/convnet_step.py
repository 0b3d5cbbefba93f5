"""Steps of the field's standard ConvNet, written out: forward, backward, and the derivatives of both in a direction.

Compiled code merges everything between two convolutions, and the convolutions may have another precision.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cddlib.networks.convnet import ConvNet, fold_networks, unflatten, unfold_networks
from cddlib.training.compiling import compile_function
from cddlib.training.step import Residuals, StepVJP, TrainingStep

EPSILON = 1e-5
"""What the norm adds to a variance; PyTorch's default."""
Blocks = list[list[Tensor]]
"""Some tensors of each block."""


def is_standard_convnet(network: ConvNet) -> bool:
    """Whether `ConvNetStep` computes this ConvNet: instance norm, ReLU, average pooling that leaves no pixel out."""
    config = network.config
    usual = (config.norm, config.activation, config.pooling) == ("instance", "relu", "avg")
    return usual and network.side % 2**config.depth == 0


class ConvNetStep(TrainingStep):
    """Steps of the ConvNet with instance norm, ReLU and average pooling, from written-out derivatives.

    A block maps x to pool(relu(γ n + β)), where n = r (a − mean(a)), a = conv(x; w), and r is the inverse of a's
    standard deviation, for each image and channel. The convolution's bias changes nothing, so it is left out, and its
    gradient is 0. Below, `d_` marks a derivative in the direction λ, and `u_` the gradient of ℓ with respect to a
    quantity. The channels of several networks are folded into one tensor, and each network is a group of a convolution.
    """

    def __init__(self, network: ConvNet, precision: str, compiled: bool) -> None:
        """Steps of `network`; see `is_standard_convnet`."""
        self._network = network
        self._precision = precision
        self._paddings = network.paddings
        self._channels = network.shapes["conv0.weight"][1]
        functions: list[Callable[..., Any]] = [self._loss_and_gradient, self._all_of_forward, self._derivatives]
        if compiled:
            names = ("training steps", "a student's steps", "their derivatives")
            functions = [compile_function(function, name) for function, name in zip(functions, names, strict=True)]
        self._gradient, self._forward, self._vjp = functions

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if targets.dtype == torch.int64:
            targets = F.one_hot(targets, self._network.shapes["classifier.bias"][0]).to(theta)
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            return self._gradient(theta.detach(), *self._ordered(inputs, targets))

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `TrainingStep`. On a GPU, channels of zeros are added up to a multiple of four, which is faster there."""
        missing = -inputs.shape[2] % 4 if inputs.is_cuda else 0
        if missing:
            inputs = F.pad(inputs, (0, 0, 0, 0, 0, missing))
        return _channels_last(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            _, gradient, blocks, head = self._forward(theta.detach(), *self._ordered(inputs, targets))
        size = sum(tensor.nbytes for part in (*blocks, head) for tensor in part)
        return gradient, Residuals((theta.detach(), blocks, head), size)

    def _ordered(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Folded inputs, and targets, each in the one memory order of its shape, wherever they were cut out."""
        targets = targets.detach().flatten(0, 1).unflatten(0, targets.shape[:2])
        return _channels_last(fold_networks(self.prepared(inputs))), targets

    def vjp(self, residuals: Residuals, direction: Tensor) -> StepVJP:
        theta, blocks, head = residuals.content
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            inner, by_theta, by_inputs, by_targets = self._vjp(theta, blocks, head, direction)
        return StepVJP(inner, by_theta, unfold_networks(by_inputs, len(theta))[:, :, : self._channels], by_targets)

    def _loss_and_gradient(self, theta: Tensor, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._all_of_forward(theta, x, targets)[:2]

    def _all_of_forward(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Blocks, list[Tensor]]:
        """ℓ and g, and the residuals: each block's x, n, r, u_x of its output, u_a, and means over the pixels of u_z
        and of u_z n, where z = γ n + β; and the classifier's features, p, u_logits, y.
        """
        w = self._views(theta, x)
        blocks = []
        for block, padding in enumerate(self._paddings):
            x = self._lowered(x)
            a = self._convolve(x, w[f"conv{block}.weight"], padding)
            a = a - _mean(a)
            r = (_mean(a * a) + EPSILON).rsqrt()
            n = self._lowered(a * r)
            blocks.append([x, n, r])
            x = _pooled(F.relu(self._scaled(n, w, block)))
        maps = unfold_networks(x, len(theta))
        features = maps.flatten(2)
        log_p = torch.baddbmm(w["classifier.bias"][:, None], features, w["classifier.weight"].mT).log_softmax(2)
        p, loss = log_p.exp(), -(y * log_p).sum(2).mean(1)
        u_logits = (p * y.sum(2, keepdim=True) - y) / y.shape[1]
        gradient = {"classifier.weight": u_logits.mT @ features, "classifier.bias": u_logits.sum(1)}
        u_x = _channels_last(fold_networks((u_logits @ w["classifier.weight"]).view_as(maps)))
        for block, padding in reversed(list(enumerate(self._paddings))):
            x, n, r = blocks[block]
            weight = w[f"conv{block}.weight"]
            u_z = torch.where(self._scaled(n, w, block) > 0, _unpooled(u_x), 0)
            level, slope = _mean(u_z), _mean(u_z * n)
            u_a = self._lowered(r * _wide(w[f"norm{block}.weight"]) * (u_z - level - n * slope))
            blocks[block] += [u_x, u_a, level, slope]
            self._norm_gradient(gradient, block, n, level, slope)
            u_x, u_weight = _convolution_backward(u_a, x, self._kernel(weight), padding, len(theta), inputs=block > 0)
            u_x = u_x.to(theta) if block else x
            gradient[f"conv{block}.weight"] = u_weight.to(theta)
        return loss, self._vector(gradient, len(theta)), blocks, [features, p, u_logits, y]

    def _derivatives(self, theta: Tensor, blocks: Blocks, head: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
        """⟨g, λ⟩ for λ = `direction`, and its derivatives by θ, X and Y."""
        w, d_w = self._views(theta, blocks[0][0]), self._views(direction, blocks[0][0])
        tangents, d_x = self._tangents(w, d_w, blocks)
        features, p, u_logits, y = head
        d_maps = unfold_networks(d_x, len(theta))
        d_features = d_maps.flatten(2)
        top, d_top = w["classifier.weight"], d_w["classifier.weight"]
        d_logits = torch.baddbmm(d_w["classifier.bias"][:, None], features, d_top.mT) + d_features @ top.mT
        d_log_p = d_logits - (p * d_logits).sum(2, keepdim=True)
        d_u_logits = y.sum(2, keepdim=True) * p * d_log_p / y.shape[1]
        gradient = {
            "classifier.weight": d_u_logits.mT @ features + u_logits.mT @ d_features,
            "classifier.bias": d_u_logits.sum(1),
        }
        d_u_x = _channels_last(fold_networks((d_u_logits @ top + u_logits @ d_top).view_as(d_maps)))
        for block, padding in reversed(list(enumerate(self._paddings))):
            x, n, r, u_x, u_a, level, slope = blocks[block]
            d_n, d_r, *d_xs = tangents[block]
            weight, d_weight = w[f"conv{block}.weight"], d_w[f"conv{block}.weight"]
            gamma, d_gamma = _wide(w[f"norm{block}.weight"]), _wide(d_w[f"norm{block}.weight"])
            on = self._scaled(n, w, block) > 0
            u_z, d_u_z = torch.where(on, _unpooled(u_x), 0), torch.where(on, _unpooled(d_u_x), 0)
            d_level, d_slope = _mean(d_u_z), _mean(d_u_z * n + u_z * d_n)
            d_u_a = (d_r * gamma + r * d_gamma) * (u_z - level - n * slope)
            d_u_a = self._lowered(d_u_a + r * gamma * (d_u_z - d_level - d_n * slope - n * d_slope))
            self._norm_gradient(gradient, block, n, d_level, d_slope)
            xs, u_as = torch.cat([x, *d_xs]), torch.cat([d_u_a, u_a]) if d_xs else d_u_a
            _, d_u_weight = _convolution_backward(u_as, xs, self._kernel(weight), padding, len(theta), inputs=False)
            gradient[f"conv{block}.weight"] = d_u_weight.to(theta)
            ways = ((d_u_a, self._kernel(weight)), (u_a, self._kernel(d_weight)))
            d_u_x, other = (
                _convolution_backward(u, x, kernel, padding, len(theta), weights=False)[0] for u, kernel in ways
            )
            d_u_x = d_u_x.to(theta) + other
        return (u_logits * d_logits).sum((1, 2)), self._vector(gradient, len(theta)), d_u_x, -d_log_p / y.shape[1]

    def _tangents(self, w: dict[str, Tensor], d_w: dict[str, Tensor], blocks: Blocks) -> tuple[Blocks, Tensor]:
        """Each block's d_n, d_r and, but for the first, d_x; and d_x of the last block's output."""
        tangents: Blocks = []
        d_xs: list[Tensor] = []
        for block, padding in enumerate(self._paddings):
            x, n, r, *_ = blocks[block]
            d_xs = [self._lowered(d_x) for d_x in d_xs]
            d_a = self._convolve(x, d_w[f"conv{block}.weight"], padding)
            for d_x in d_xs:
                d_a = d_a + self._convolve(d_x, w[f"conv{block}.weight"], padding)
            shift = _mean(n * d_a)
            d_n = self._lowered(r * (d_a - _mean(d_a) - n * shift))
            tangents.append([d_n, -r * r * shift, *d_xs])
            d_z = self._scaled(n, d_w, block) + _wide(w[f"norm{block}.weight"]) * d_n
            d_xs = [_pooled(torch.where(self._scaled(n, w, block) > 0, d_z, 0))]
        return tangents, d_xs[0]

    def _views(self, theta: Tensor, x: Tensor) -> dict[str, Tensor]:
        """The parameters by name; those of the first convolution get zeros for the inputs' added channels."""
        w, missing = unflatten(self._network, theta), x.shape[1] // len(theta) - self._channels
        if missing:
            w["conv0.weight"] = F.pad(w["conv0.weight"], (0, 0, 0, 0, 0, missing))
        return w

    def _lowered(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16) if self._precision == "bfloat16" else x

    def _kernel(self, weight: Tensor) -> Tensor:
        """A convolution's weights, channels last like its inputs."""
        return self._lowered(weight).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def _convolve(self, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self._kernel(weight), padding=padding, groups=len(weight)).to(weight.dtype)

    def _scaled(self, n: Tensor, w: dict[str, Tensor], block: int) -> Tensor:
        return _wide(w[f"norm{block}.weight"]) * n + _wide(w[f"norm{block}.bias"])

    @staticmethod
    def _norm_gradient(gradient: dict[str, Tensor], block: int, n: Tensor, level: Tensor, slope: Tensor) -> None:
        """Enter a norm's gradient, from the means over the pixels of u_z and of u_z n."""
        pixels = n.shape[2] * n.shape[3]
        gradient[f"norm{block}.weight"], gradient[f"norm{block}.bias"] = pixels * slope.sum(0), pixels * level.sum(0)

    def _vector(self, pieces: dict[str, Tensor], count: int) -> Tensor:
        pieces["conv0.weight"] = pieces["conv0.weight"][:, : self._channels]
        for block in range(len(self._paddings)):
            pieces[f"conv{block}.bias"] = torch.zeros_like(pieces[f"norm{block}.bias"])
        return torch.cat([pieces[name].reshape(count, -1) for name in self._network.shapes], 1)


def _channels_last(x: Tensor) -> Tensor:
    """`x` in the memory order that is fastest; always the same one, since another would be compiled again."""
    x = x.detach()
    if x.stride(1) == 1:  # PyTorch calls other orders of a single channel channels last too
        return x.contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def _convolution_backward(
    u: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int, *, inputs: bool = True, weights: bool = True
) -> tuple[Any, Any]:
    """The gradients with respect to a convolution's inputs x and weights, from that with respect to its output, u.

    Unlike `torch.nn.grad.conv2d_input` it is given x, which is channels last: cuDNN then computes in that order.
    """
    if not inputs:  # then only the shape and memory order of the weights matter
        weight = weight.new_empty([weight.shape[axis] for axis in (0, 2, 3, 1)]).permute(0, 3, 1, 2)
    geometry = ([1, 1], [padding, padding], [1, 1], False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(u, x, weight, None, *geometry, [inputs, weights, False])[:2]


@contextlib.contextmanager
def _multiplying(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, a GPU's convolutions round float32 to TF32 before they multiply, unless precision is ieee."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "ieee" if precision == "ieee" else "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel.flatten()[:, None, None]


def _pooled(x: Tensor) -> Tensor:
    """Average pooling over 2x2 pixels, as arithmetic that the compiler merges with what comes before it."""
    upper, lower = x[:, :, ::2], x[:, :, 1::2]
    return (upper[..., ::2] + upper[..., 1::2] + lower[..., ::2] + lower[..., 1::2]) / 4


def _unpooled(x: Tensor) -> Tensor:
    """The gradient before an average pooling whose output's gradient is `x`."""
    return F.interpolate(x, scale_factor=2, mode="nearest") / 4
