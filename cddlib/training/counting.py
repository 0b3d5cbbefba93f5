"""How many operations a step takes, and how much memory, counted on tensors that have shapes but no data."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cddlib.networks.convnet import Network, NetworkConfig, parameter_count
from cddlib.networks.zoo import build_network
from cddlib.training.step import AutogradStep

Step = Callable[[Network, Tensor, Tensor, Tensor], object]
"""A step of some kind, given a network, its parameters, images and targets."""


@functools.cache
def count(step: Step, config: NetworkConfig, shape: tuple[int, ...], classes: int, batch: int) -> tuple[float, int]:
    """Floating-point operations of a step for each image of its batch, and the step's peak memory in bytes."""
    network = build_network(config, (shape[0], shape[1], shape[2]), classes)
    theta = torch.empty(parameter_count(network), device="meta", requires_grad=True)
    images, targets = (torch.empty(batch, *sizes, device="meta") for sizes in (shape, (classes,)))
    with FlopCounterMode(display=False) as counter, PeakMemory() as memory:
        step(network, theta, images, targets)
    return counter.get_total_flops() / batch, memory.peak


def classify(network: Network, theta: Tensor, images: Tensor, targets: Tensor) -> object:
    """Logits."""
    return network(theta.detach(), images)


def descend(network: Network, theta: Tensor, images: Tensor, targets: Tensor) -> object:
    """The gradient of a step of SGD."""
    return torch.autograd.grad(F.cross_entropy(network(theta, images), targets), theta)


def walk_back(network: Network, theta: Tensor, images: Tensor, targets: Tensor) -> object:
    """The derivatives of a student's step, on the way back."""
    engine = AutogradStep(network)
    return engine.vjp(engine.forward(theta[None], images[None], targets[None])[1], theta.detach()[None])


class PeakMemory(TorchDispatchMode):
    """The most bytes that the results of operations held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return results

    def _free(self, size: int) -> None:
        self.now -= size
