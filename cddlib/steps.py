"""One step of training, and what becomes of its gradient when the parameters move: all the arithmetic that takes time.

A step has the gradient g = ∇_θ ℓ(θ; X, Y), where ℓ is the cross-entropy with class probabilities, mean over the batch.
Training needs g alone. Walking back over a student (`cddlib.matching`) needs, for a direction λ, the scalar ⟨g, λ⟩ and
its derivatives with respect to θ, X and Y. They are the derivatives of ℓ and of its gradients along λ::

    ⟨g, λ⟩ = d/dε ℓ      (∂g/∂θ)ᵀ λ = d/dε ∇_θ ℓ      (∂g/∂X)ᵀ λ = d/dε ∇_X ℓ      at θ + ελ, ε = 0

`Autograd` finds them for every network, by differentiating ⟨g, λ⟩. `Derived` has them written out for the field's
usual ConvNet: there compiled code merges all that lies between two convolutions, and the convolutions may have another
precision. What a step must remember for its derivatives, its memory, can be kept or computed again: to the same bits.

Several networks of one kind take a step each, side by side: with parameters, a batch and a direction of its own.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import psutil
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cddlib.files import UserError, is_want_of_memory
from cddlib.networks import ConvNet, Network, apart, beside, parameter_count, side_by_side, views
from cddlib.ranks import Ranks

WORTH_COMPILING = {"cpu": 1e13, "cuda": 1e14}
"""Floating-point operations of a run from which on compiling saves more time than it takes, about a minute."""
CGROUP = Path("/sys/fs/cgroup")
OPTIONS: dict[str, str | int | bool] = {"combo_kernels": True, "split_reductions": False}
"""Of the compiler: fewer and larger kernels, for on a GPU small steps take as long as their kernels are many."""
MOST_SHAPES = 256
"""Of batches, for which one process compiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the usual ConvNet (instance norm, ReLU, average pooling) is computed in training; others ignore it."""

    precision: Literal["float32", "ieee", "bfloat16"] = "float32"
    """Of what convolutions take and give; all else is float32. A GPU's convolutions round float32 to TF32 before they
    multiply, unless precision is ieee; on a CPU the two are the same."""
    compiled: bool | None = None
    """Compile the steps, which takes up to a minute, once on a machine; by default, if the run is long enough or
    precision is bfloat16, which is slow otherwise."""


class Along(NamedTuple):
    """⟨g, λ⟩ and its derivatives, of each network."""

    inner: Float[Tensor, " s"]
    by_theta: Float[Tensor, "s p"]
    by_inputs: Float[Tensor, "s b c h w"]
    by_targets: Float[Tensor, "s b classes"]


class Memory(NamedTuple):
    """What a step remembers for its derivatives."""

    content: Any
    size: int
    """Bytes."""


@runtime_checkable
class Steps(Protocol):
    """Steps of s networks, on parameters θ [s p], inputs X [s b c h w] and class probabilities Y [s b classes]."""

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ [s] and g [s p]. `targets` may be classes [s b]."""

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs as steps take them fastest, those of many steps at once; `take` accepts others too."""

    def take(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Memory]:
        """g, and what `along` needs."""

    def along(self, memory: Memory, direction: Tensor) -> Along:
        """⟨g, λ⟩ for a `direction` λ, and its derivatives; a memory serves once."""


def steps_of(network: Network, config: ComputeConfig, device: torch.device) -> Steps:
    """The steps of networks of one kind on a device; not compiled unless `config` says so.

    The usual ConvNet's derived steps need compiling to be fast on a CPU. A GPU differentiates convolutions twice so
    slowly that they are faster there in any case.
    """
    derived = bool(config.compiled) or config.precision == "bfloat16" or device.type == "cuda"
    return _steps(network, config.precision, bool(config.compiled), derived)  # type: ignore[arg-type]  # it has a hash


@functools.lru_cache(maxsize=16)
def _steps(network: Network, precision: str, compiled: bool, derived: bool) -> Steps:
    if derived and isinstance(network, ConvNet) and fits(network):
        return Derived(network, precision, compiled)
    return Autograd(network)


def worth_compiling(
    network: Network, config: ComputeConfig, device: torch.device, image_shape: tuple[int, int, int], images: int
) -> bool:
    """Whether to compile a run that differentiates the network for so many `images`, counted each time."""
    if config.compiled is not None:
        return config.compiled
    if not (isinstance(network, ConvNet) and fits(network)):
        return False
    enough = 3 * operations(network, image_shape) * images >= WORTH_COMPILING[device.type]
    return config.precision == "bfloat16" or enough


@functools.lru_cache(maxsize=16)
def operations(network: Network, image_shape: tuple[int, ...]) -> float:
    """Floating-point operations with which the network classifies an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(parameter_count(network), device="meta"), torch.empty(1, *image_shape, device="meta"))
    return float(counter.get_total_flops())


def fits(network: ConvNet) -> bool:
    """Whether `Derived` computes this ConvNet: instance norm, ReLU, average pooling that leaves no pixel out."""
    config = network.config
    usual = (config.norm, config.activation, config.pooling) == ("instance", "relu", "avg")
    return usual and network.side % 2**config.depth == 0


def room(device: torch.device) -> int:
    """Bytes that memories may take: CDDLIB_KEPT_MB, or a part of what is free.

    It is half of what is free on a GPU now, and an eighth of what was free on the machine when a process first asked.
    """
    if "CDDLIB_KEPT_MB" in os.environ:
        return _kept_mb(os.environ["CDDLIB_KEPT_MB"]) * 2**20
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return _room_of_machine()


@functools.cache
def _room_of_machine() -> int:
    free = max(0, min(psutil.virtual_memory().available, _of_container()))
    return int(free) // (8 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _of_container() -> int | float:
    """Bytes that the container leaves its processes."""
    limit = CGROUP / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return float("inf")
    return int(limit.read_text()) - int((CGROUP / "memory.current").read_text())


def _kept_mb(text: str) -> int:
    if not (text.isdecimal() and text.isascii()):
        raise UserError(f"CDDLIB_KEPT_MB is {text!r}; it must be a number of MB, 0 or more.")
    return int(text)


# --- Every network ----------------------------------------------------------------------------------------------


class Autograd:
    """Steps by differentiating twice; the memory is the graph."""

    def __init__(self, network: Network) -> None:
        """Steps of `network`."""
        self._network = network
        self._sizes: dict[torch.Size, int] = {}

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Steps`."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            logits = side_by_side(self._network, theta, inputs)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
            loss = losses.unflatten(0, targets.shape[:2]).mean(1)
            return loss.detach(), torch.autograd.grad(loss.sum(), theta)[0]

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `Steps`."""
        return inputs

    def take(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Memory]:
        """See `Steps`."""
        if inputs.shape in self._sizes:
            return self._take(theta, inputs, targets)
        storages: dict[int, int] = {}

        def count(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved.detach()  # the graph would hold itself otherwise

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            gradient, memory = self._take(theta, inputs, targets)
        self._sizes[inputs.shape] = sum(storages.values())
        return gradient, memory._replace(size=self._sizes[inputs.shape])

    def _take(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Memory]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (theta, inputs, targets)]
            log_p = side_by_side(self._network, leaves[0], leaves[1]).log_softmax(2)
            loss = -(leaves[2] * log_p).sum(2).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaves[0], create_graph=True)
        return gradient.detach(), Memory((gradient, leaves), self._sizes.get(inputs.shape, 0))

    def along(self, memory: Memory, direction: Tensor) -> Along:
        """See `Steps`."""
        gradient, leaves = memory.content
        with torch.enable_grad():
            inner = torch.linalg.vecdot(gradient, direction)
            derivatives = torch.autograd.grad(inner.sum(), leaves)
        return Along(inner.detach(), *derivatives)


# --- The usual ConvNet ------------------------------------------------------------------------------------------

EPSILON = 1e-5
"""Of the norm, as PyTorch has it."""


class Derived:
    """Steps of the ConvNet with instance norm, ReLU and average pooling, by its derivatives.

    A block maps x to pool(relu(γ n + β)), where n is conv(x; w) less its mean, times r, the inverse of its standard
    deviation, for each image and channel. The convolution's bias changes nothing, so it is left out, and its gradient
    is 0. Below, `d_` is a derivative along the direction λ, and `u_` the gradient of ℓ with respect to a quantity.
    Channels of several networks lie side by side, and each convolution has its own as a group.
    """

    def __init__(self, network: ConvNet, precision: str, compiled: bool) -> None:
        """Steps of `network`; see `fits`."""
        self._network = network
        self._precision = precision
        self._low = torch.bfloat16 if precision == "bfloat16" else None
        self._paddings = network.paddings
        self._channels = network.shapes["conv0.weight"][1]
        self._gradient, self._take, self._along = self._step, self._remembered, self._derivatives
        if compiled and _can_compile():
            self._gradient = _compiled(self._step, "training steps")
            self._take = _compiled(self._remembered, "a student's steps")
            self._along = _compiled(self._derivatives, "their derivatives")

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Steps`."""
        if targets.dtype == torch.int64:
            targets = F.one_hot(targets, self._network.shapes["classifier.bias"][0]).to(theta)
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            return self._gradient(theta.detach(), _channels_last(beside(self.prepared(inputs))), targets)

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `Steps`: a GPU's get channels of zeros, up to a multiple of four, as its convolutions like them."""
        missing = -inputs.shape[2] % 4 if inputs.is_cuda else 0
        if missing:
            inputs = F.pad(inputs, (0, 0, 0, 0, 0, missing))
        return _channels_last(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    def take(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Memory]:
        """See `Steps`."""
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            x = _channels_last(beside(self.prepared(inputs)))
            _, gradient, blocks, head = self._take(theta.detach(), x, targets.detach())
        size = sum(tensor.nbytes for part in (*blocks, head) for tensor in part)
        return gradient, Memory((theta.detach(), blocks, head), size)

    def along(self, memory: Memory, direction: Tensor) -> Along:
        """See `Steps`."""
        theta, blocks, head = memory.content
        with torch.no_grad(), _multiplying(self._precision, theta.device):
            inner, by_theta, by_inputs, by_targets = self._along(theta, blocks, head, direction)
        return Along(inner, by_theta, apart(by_inputs, len(theta))[:, :, : self._channels], by_targets)

    def _step(self, theta: Tensor, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._remembered(theta, x, targets)[:2]

    def _remembered(
        self, theta: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, list[list[Tensor]], list[Tensor]]:
        """ℓ, g; of each block x, n, r, and the gradients at its convolution and its output; and what the loss needs."""
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
        maps = apart(x, len(theta))
        features = maps.flatten(2)
        log_p = torch.baddbmm(w["classifier.bias"][:, None], features, w["classifier.weight"].mT).log_softmax(2)
        p, loss = log_p.exp(), -(y * log_p).sum(2).mean(1)
        u_logits = (p * y.sum(2, keepdim=True) - y) / y.shape[1]
        gradient = {"classifier.weight": u_logits.mT @ features, "classifier.bias": u_logits.sum(1)}
        u_x = _channels_last(beside((u_logits @ w["classifier.weight"]).view_as(maps)))
        for block, padding in reversed(list(enumerate(self._paddings))):
            x, n, r = blocks[block]
            weight = w[f"conv{block}.weight"]
            u_z = torch.where(self._scaled(n, w, block) > 0, _unpooled(u_x), 0)
            u_n = _wide(w[f"norm{block}.weight"]) * u_z
            u_a = self._lowered(r * (u_n - _mean(u_n) - n * _mean(u_n * n)))
            blocks[block] += [u_x, u_a]
            gradient[f"norm{block}.weight"] = (u_z * n).sum((2, 3)).sum(0)
            gradient[f"norm{block}.bias"] = u_z.sum((2, 3)).sum(0)
            found = _convolution_backward(u_a, x, self._kernel(weight), padding, len(theta), inputs=block > 0)
            u_x, gradient[f"conv{block}.weight"] = (u if u is None else u.to(theta) for u in found)
            gradient[f"conv{block}.bias"] = torch.zeros_like(w[f"conv{block}.bias"])
        return loss, self._vector(gradient, len(theta)), blocks, [features, p, u_logits, y]

    def _derivatives(
        self, theta: Tensor, blocks: list[list[Tensor]], head: list[Tensor], direction: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of `_remembered` along `direction`, and that of the loss."""
        w, d_w = self._views(theta, blocks[0][0]), self._views(direction, blocks[0][0])
        moved: list[list[Tensor]] = []
        d_x = None
        for block, padding in enumerate(self._paddings):
            x, n, r, *_ = blocks[block]
            weight, d_weight = w[f"conv{block}.weight"], d_w[f"conv{block}.weight"]
            if d_x is None:
                d_a = self._convolve(x, d_weight, padding)
            else:
                d_x = self._lowered(d_x)
                d_a = self._convolve(x, d_weight, padding) + self._convolve(d_x, weight, padding)
            shift = _mean(n * d_a)
            d_n = r * (d_a - _mean(d_a) - n * shift)
            moved.append([d_n, -r * r * shift] + ([] if d_x is None else [d_x]))
            d_z = self._scaled(n, d_w, block) + _wide(w[f"norm{block}.weight"]) * d_n
            d_x = F.avg_pool2d(torch.where(self._scaled(n, w, block) > 0, d_z, 0), 2)
        features, p, u_logits, y = head
        assert d_x is not None  # there is at least one block
        d_maps = apart(d_x, len(theta))
        d_features = d_maps.flatten(2)
        top, d_top = w["classifier.weight"], d_w["classifier.weight"]
        d_logits = torch.baddbmm(d_w["classifier.bias"][:, None], features, d_top.mT) + d_features @ top.mT
        d_log_p = d_logits - (p * d_logits).sum(2, keepdim=True)
        d_u_logits = y.sum(2, keepdim=True) * p * d_log_p / y.shape[1]
        found = {
            "classifier.weight": d_u_logits.mT @ features + u_logits.mT @ d_features,
            "classifier.bias": d_u_logits.sum(1),
        }
        d_u_x = _channels_last(beside((d_u_logits @ top + u_logits @ d_top).view_as(d_maps)))
        for block, padding in reversed(list(enumerate(self._paddings))):
            x, n, r, u_x, u_a = blocks[block]
            d_n, d_r, *d_xs = moved[block]
            weight, d_weight = w[f"conv{block}.weight"], d_w[f"conv{block}.weight"]
            gamma, d_gamma = _wide(w[f"norm{block}.weight"]), _wide(d_w[f"norm{block}.weight"])
            on = self._scaled(n, w, block) > 0
            u_z, d_u_z = torch.where(on, _unpooled(u_x), 0), torch.where(on, _unpooled(d_u_x), 0)
            u_n, d_u_n = gamma * u_z, d_gamma * u_z + gamma * d_u_z
            slope = _mean(u_n * n)
            d_u_a = d_r * (u_n - _mean(u_n) - n * slope)
            d_u_a += r * (d_u_n - _mean(d_u_n) - d_n * slope - n * _mean(d_u_n * n + u_n * d_n))
            d_u_a = self._lowered(d_u_a)
            found[f"norm{block}.weight"] = (d_u_z * n + u_z * d_n).sum((2, 3)).sum(0)
            found[f"norm{block}.bias"] = d_u_z.sum((2, 3)).sum(0)
            xs, u_as = torch.cat([x, *d_xs]), torch.cat([d_u_a, u_a]) if d_xs else d_u_a
            _, d_u_weight = _convolution_backward(u_as, xs, self._kernel(weight), padding, len(theta), inputs=False)
            found[f"conv{block}.weight"] = d_u_weight.to(theta)
            found[f"conv{block}.bias"] = torch.zeros_like(w[f"conv{block}.bias"])
            both = self._kernel(torch.cat([weight, d_weight], 1))
            u_both = torch.cat([u.unflatten(1, (len(theta), -1)) for u in (d_u_a, u_a)], 2).flatten(1, 2)
            d_u_x, _ = _convolution_backward(u_both, x, both, padding, len(theta), weights=False)
            d_u_x = d_u_x.to(theta)
        return (u_logits * d_logits).sum((1, 2)), self._vector(found, len(theta)), d_u_x, -d_log_p / y.shape[1]

    def _views(self, theta: Tensor, x: Tensor) -> dict[str, Tensor]:
        """The parameters by name, with weights of zeros for the channels of zeros that inputs x have more."""
        w = views(self._network, theta)
        missing = x.shape[1] // len(theta) - self._channels
        if missing:
            w["conv0.weight"] = F.pad(w["conv0.weight"], (0, 0, 0, 0, 0, missing))
        return w

    def _lowered(self, x: Tensor) -> Tensor:
        return x if self._low is None else x.to(self._low)

    def _kernel(self, weight: Tensor) -> Tensor:
        """The weights of a convolution, channels last like what it sees."""
        return self._lowered(weight).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def _convolve(self, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self._kernel(weight), padding=padding, groups=len(weight)).to(weight.dtype)

    def _scaled(self, n: Tensor, w: dict[str, Tensor], block: int) -> Tensor:
        return _wide(w[f"norm{block}.weight"]) * n + _wide(w[f"norm{block}.bias"])

    def _vector(self, pieces: dict[str, Tensor], count: int) -> Tensor:
        pieces["conv0.weight"] = pieces["conv0.weight"][:, : self._channels]
        return torch.cat([pieces[name].reshape(count, -1) for name in self._network.shapes], 1)


def _channels_last(x: Tensor) -> Tensor:
    """The order in memory in which compiled code is fastest, and one order: for another it would be compiled anew."""
    x = x.detach()
    if x.stride(1) == 1:  # of one channel, others count as this order too
        return x.contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def _convolution_backward(
    u: Tensor, x: Tensor, weight: Tensor, padding: int, groups: int, *, inputs: bool = True, weights: bool = True
) -> tuple[Any, Any]:
    """The gradients at a convolution's inputs x and weights, from that at its output, of those that are wanted.

    Unlike `torch.nn.grad.conv2d_input` it sees x, which lies channels last: cuDNN then computes in that order.
    """
    if not inputs:  # of the weights only the shape counts, and the order in memory
        weight = weight.new_empty([weight.shape[axis] for axis in (0, 2, 3, 1)]).permute(0, 3, 1, 2)
    geometry = ([1, 1], [padding, padding], [1, 1], False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(u, x, weight, None, *geometry, [inputs, weights, False])[:2]


@contextlib.contextmanager
def _multiplying(precision: str, device: torch.device) -> Iterator[None]:
    """Within, a GPU's float32 convolutions multiply TF32 numbers, or float32 ones where precision is ieee."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cudnn.conv
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


# --- Compiling --------------------------------------------------------------------------------------------------


def _compiled(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`function`, of which the second argument is a batch of tensors, compiled for each shape when it first comes.

    PyTorch keeps the result on disk for other processes. If it cannot compile, the function runs as it is.
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
            except Exception as error:
                if (
                    is_want_of_memory(error) or arguments[0].is_cuda
                ):  # where uncompiled steps would take ten times longer
                    raise
                not_compiled(f"PyTorch cannot compile here ({' '.join(str(error).split())[:200]})")
                known[batch.shape] = function
                return function(*arguments)
            progress.update()
        known[batch.shape] = faster
        return result

    return run


@functools.cache
def _can_compile() -> bool:
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "c++"))
    if not found:
        not_compiled("there is no C++ compiler")
    return found


@functools.cache
def not_compiled(reason: str) -> None:
    """Say once why."""
    print(f"{reason}: steps run uncompiled, which takes longer.", file=sys.stderr)
