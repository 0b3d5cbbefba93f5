"""What can be found of a GPU without one: an iteration, an epoch and an evaluation's step on fake CUDA tensors.

A fake tensor has a device and strides but no numbers. Whatever mixes devices, or asks a tensor for its numbers, fails.
"""

import collections
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cddlib.augment import AugmentConfig

CUDA = torch.device("cuda:0")
SIDE, CLASSES = 16, 10
STRATEGY = AugmentConfig().augment


class PretendedGPU(TorchDispatchMode):
    """Tensors on `cuda` are fake, those on the CPU real; operations on the GPU, copies and waits are counted.

    Whoever waits for a number is told 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.launches: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.waits = 0
        self.not_channels_last: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, FakeTensor) and x.is_cuda for x in given)
        goal = (kwargs or {}).get("device")
        if not there and (goal is None or torch.device(goal).type == "cpu"):
            return function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal"):
            self.waits += 1
            return 0
        if there and goal is not None and torch.device(goal).type == "cpu":
            self.waits += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        self.copies[name] += any(not x.is_cuda and x.dim() for x in given)
        with self.fakes:
            result = function(*args, **(kwargs or {}))
        self.launches[name] += not function.is_view
        if name.startswith("convolution"):
            results = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
            for x in (*given, *results):
                if x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last):
                    self.not_channels_last.append(f"{name}: {tuple(x.shape)} {x.stride()}")
        return result
