"""Which implementation computes a network's steps on a device, whether it is compiled, and how much it may keep."""

import functools
import math
import os

import torch

from cddlib.networks.convnet import ConvNet, Network
from cddlib.runtime.device import free_memory
from cddlib.runtime.errors import UserError
from cddlib.training.compiling import can_compile, not_compiled
from cddlib.training.convnet_step import ConvNetStep, is_standard_convnet
from cddlib.training.step import AutogradStep, ComputeConfig, TrainingStep

WORTH_COMPILING = {"cpu": 1e13, "cuda": 4e13}
"""Floating-point operations above which compiling saves a run more time than it takes: about a minute on two cores, a
quarter of that on an NVIDIA H200."""


def make_step(network: Network, config: ComputeConfig, device: torch.device) -> TrainingStep:
    """The steps of a network on a device; not compiled unless `config` says so.

    The standard ConvNet's written-out steps need compiling to be fast on a CPU. On a GPU they are faster in any case,
    because differentiating convolutions twice is slow there.
    """
    written_out = bool(config.compiled) or config.precision == "bfloat16" or device.type == "cuda"
    compiled = bool(config.compiled)
    if compiled and device.type != "cuda" and not can_compile():
        not_compiled("there is no C++ compiler")
        compiled = False
    return _make_step(network, config.precision, compiled, written_out)  # type: ignore[arg-type]  # hashable


@functools.lru_cache(maxsize=16)
def _make_step(network: Network, precision: str, compiled: bool, written_out: bool) -> TrainingStep:
    if written_out and isinstance(network, ConvNet) and is_standard_convnet(network):
        return ConvNetStep(network, precision, compiled)
    return AutogradStep(network)


def worth_compiling(network: Network, config: ComputeConfig, device: torch.device, images: int) -> bool:
    """Whether to compile a run's steps, if these differentiate the network for `images` images in total."""
    if config.compiled is not None:
        return config.compiled
    if not (isinstance(network, ConvNet) and is_standard_convnet(network)):
        return False
    enough = WORTH_COMPILING["cuda" if device.type == "cuda" else "cpu"]
    return config.precision == "bfloat16" or 3 * operations(network) * images >= enough


def operations(network: ConvNet) -> int:
    """Floating-point operations of classifying one image: those of the convolutions and the classifier."""
    shrinks = 1 if network.config.pooling == "none" else 2
    pixels = {f"conv{block}.weight": (network.side // shrinks**block) ** 2 for block in range(network.config.depth)}
    pixels["classifier.weight"] = 1
    return sum(2 * math.prod(network.shapes[name]) * count for name, count in pixels.items())


def residual_budget(device: torch.device) -> int:
    """Bytes of residuals that may be kept: CDDLIB_KEPT_MB, or a fraction of the free memory.

    On a GPU it is half of what is free now; on a CPU an eighth of what was free when the process first asked.

    Raises:
        UserError: CDDLIB_KEPT_MB is no number.
    """
    text = os.environ.get("CDDLIB_KEPT_MB")
    if text is not None:
        if not (text.isdecimal() and text.isascii()):
            raise UserError(f"CDDLIB_KEPT_MB is {text!r}; it must be a number of MB, 0 or more.")
        return int(text) * 2**20
    if device.type == "cuda":
        return free_memory(device) // 2
    return _budget_of_machine()


@functools.cache
def _budget_of_machine() -> int:
    return free_memory(torch.device("cpu")) // (8 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
