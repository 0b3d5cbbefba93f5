"""Steps of the field's standard ConvNet, written out: forward, backward, and the derivatives of both in a direction.

Compiled code merges everything between two convolutions, and the convolutions may have another precision.
"""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cddlib.networks.convnet import ConvNet, fold_networks, unflatten, unfold_networks
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import UserError, is_out_of_memory
from cddlib.training.step import Residuals, StepVJP

OPTIONS: dict[str, Any] = {"combo_kernels": True, "split_reductions": False}
"""Options of the compiler: fewer and larger kernels, since a GPU's time for a small step grows with their number."""
MOST_SHAPES = 256
"""Most batch shapes that one process compiles."""
EPSILON = 1e-5
"""What the norm adds to a variance; PyTorch's default."""
Blocks = list[list[Tensor]]
"""Some tensors of each block."""


def is_standard_convnet(network: ConvNet) -> bool:
    """Whether `ConvNetStep` computes this ConvNet: instance norm, ReLU, average pooling that leaves no pixel out."""
    config = network.config
    usual = (config.norm, config.activation, config.pooling) == ("instance", "relu", "avg")
    return usual and network.side % 2**config.depth == 0


class ConvNetStep:
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
        if compiled and not can_compile():
            not_compiled("there is no C++ compiler")
        elif compiled:
            names = ("training steps", "a student's steps", "their derivatives")
            functions = [_compiled(function, name) for function, name in zip(functions, names, strict=True)]
        self._gradient, self._forward, self._vjp = functions

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `TrainingStep`."""
        if targets.dtype == torch.int64:
            targets = F.one_hot(targets, self._network.shapes["classifier.bias"][0]).to(theta)
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            return self._gradient(theta.detach(), _channels_last(fold_networks(self.prepared(inputs))), targets)

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `TrainingStep`. On a GPU, channels of zeros are added up to a multiple of four, which is faster there."""
        missing = -inputs.shape[2] % 4 if inputs.is_cuda else 0
        if missing:
            inputs = F.pad(inputs, (0, 0, 0, 0, 0, missing))
        return _channels_last(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        """See `TrainingStep`."""
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            x = _channels_last(fold_networks(self.prepared(inputs)))
            _, gradient, blocks, head = self._forward(theta.detach(), x, targets.detach())
        size = sum(tensor.nbytes for part in (*blocks, head) for tensor in part)
        return gradient, Residuals((theta.detach(), blocks, head), size)

    def vjp(self, residuals: Residuals, direction: Tensor) -> StepVJP:
        """See `TrainingStep`."""
        theta, blocks, head = residuals.content
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            inner, by_theta, by_inputs, by_targets = self._vjp(theta, blocks, head, direction)
        return StepVJP(inner, by_theta, unfold_networks(by_inputs, len(theta))[:, :, : self._channels], by_targets)

    def _loss_and_gradient(self, theta: Tensor, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._all_of_forward(theta, x, targets)[:2]

    def _all_of_forward(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Blocks, list[Tensor]]:
        """ℓ and g; each block's x, n, r, u_x of its output, and u_a; and the classifier's features, p, u_logits, y."""
        w = self._views(theta, x)
        blocks = []
        for block, padding in enumerate(self._paddings):
            x = self._lowered(x)
            a = self._convolve(x, w[f"conv{block}.weight"], padding)
            a = a - _mean(a)
            r = (_mean(a * a) + EPSILON).rsqrt()
            n = a * r
            blocks.append([x, n, r])
            x = F.avg_pool2d(F.relu(self._scaled(n, w, block)), 2)
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
            u_n = _wide(w[f"norm{block}.weight"]) * u_z
            u_a = self._lowered(r * (u_n - _mean(u_n) - n * _mean(u_n * n)))
            blocks[block] += [u_x, u_a]
            gradient[f"norm{block}.weight"] = (u_z * n).sum((2, 3)).sum(0)
            gradient[f"norm{block}.bias"] = u_z.sum((2, 3)).sum(0)
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
            x, n, r, u_x, u_a = blocks[block]
            d_n, d_r, *d_xs = tangents[block]
            weight, d_weight = w[f"conv{block}.weight"], d_w[f"conv{block}.weight"]
            gamma, d_gamma = _wide(w[f"norm{block}.weight"]), _wide(d_w[f"norm{block}.weight"])
            on = self._scaled(n, w, block) > 0
            u_z, d_u_z = torch.where(on, _unpooled(u_x), 0), torch.where(on, _unpooled(d_u_x), 0)
            u_n, d_u_n = gamma * u_z, d_gamma * u_z + gamma * d_u_z
            slope = _mean(u_n * n)
            d_u_a = d_r * (u_n - _mean(u_n) - n * slope)
            d_u_a += r * (d_u_n - _mean(d_u_n) - d_n * slope - n * _mean(d_u_n * n + u_n * d_n))
            d_u_a = self._lowered(d_u_a)
            gradient[f"norm{block}.weight"] = (d_u_z * n + u_z * d_n).sum((2, 3)).sum(0)
            gradient[f"norm{block}.bias"] = d_u_z.sum((2, 3)).sum(0)
            xs, u_as = torch.cat([x, *d_xs]), torch.cat([d_u_a, u_a]) if d_xs else d_u_a
            _, d_u_weight = _convolution_backward(u_as, xs, self._kernel(weight), padding, len(theta), inputs=False)
            gradient[f"conv{block}.weight"] = d_u_weight.to(theta)
            both = self._kernel(torch.cat([weight, d_weight], 1))
            u_both = torch.cat([u.unflatten(1, (len(theta), -1)) for u in (d_u_a, u_a)], 2).flatten(1, 2)
            u_both = u_both.contiguous(memory_format=torch.channels_last)
            d_u_x = _convolution_backward(u_both, x, both, padding, len(theta), weights=False)[0].to(theta)
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
            d_n = r * (d_a - _mean(d_a) - n * shift)
            tangents.append([d_n, -r * r * shift, *d_xs])
            d_z = self._scaled(n, d_w, block) + _wide(w[f"norm{block}.weight"]) * d_n
            d_xs = [F.avg_pool2d(torch.where(self._scaled(n, w, block) > 0, d_z, 0), 2)]
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


def _unpooled(x: Tensor) -> Tensor:
    """The gradient before an average pooling whose output's gradient is `x`."""
    return F.interpolate(x, scale_factor=2, mode="nearest") / 4


def _compiled(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`function`, compiled for each shape of its second argument, a batch of images or the residuals of its blocks.

    PyTorch keeps compiled code on disk for other processes. If it cannot compile on a CPU, the function runs as it is.
    """
    faster = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS)
    known: dict[torch.Size, Callable[..., Any]] = {}

    def run(*arguments: Any) -> Any:
        batch = arguments[1][0][0] if isinstance(arguments[1], list) else arguments[1]
        if batch.shape in known:
            return known[batch.shape](*arguments)
        progress = Ranks().progress(total=1, desc=f"compiling {what} for batches of {len(batch)}", leave=False)
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES), progress:
            try:
                result = faster(*arguments)
                known[batch.shape] = faster
                progress.update()
                return result
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                reason = f"PyTorch cannot compile here ({' '.join(str(error).split())[:200]})"
                if arguments[0].is_cuda:  # uncompiled steps take much longer, and a GPU's time is expensive
                    raise UserError(f"{reason}; --compiled False does without.") from error
                not_compiled(reason)
        known[batch.shape] = function
        return function(*arguments)

    return run


@functools.cache
def can_compile() -> bool:
    """Whether there is a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))


@functools.cache
def not_compiled(reason: str) -> None:
    """Say once why steps are not compiled."""
    print(f"{reason}: steps run uncompiled, which takes longer.", file=sys.stderr)
