"""Which steps a network takes on a device, whether they are compiled, and how much they may remember."""

import functools
import os

import torch
from torch.utils.flop_counter import FlopCounterMode

from cddlib.networks.convnet import ConvNet, Network, parameter_count
from cddlib.runtime.device import free_memory
from cddlib.runtime.errors import UserError
from cddlib.training.convnet_step import ConvNetStep, can_compile, is_standard_convnet
from cddlib.training.step import AutogradStep, ComputeConfig, TrainingStep

WORTH_COMPILING = {"cpu": 1e13, "cuda": 4e13}
"""Floating-point operations of a run from which on compiling saves more time than it takes: about a minute on two
cores, a quarter of that on an NVIDIA H200."""


def make_step(network: Network, config: ComputeConfig, device: torch.device) -> TrainingStep:
    """The steps of networks of one kind on a device; not compiled unless `config` says so.

    The usual ConvNet's derived steps need compiling to be fast on a CPU. A GPU differentiates convolutions twice so
    slowly that they are faster there in any case.
    """
    derived = bool(config.compiled) or config.precision == "bfloat16" or device.type == "cuda"
    return _steps(network, config.precision, bool(config.compiled), derived)  # type: ignore[arg-type]  # it has a hash


@functools.lru_cache(maxsize=16)
def _steps(network: Network, precision: str, compiled: bool, derived: bool) -> TrainingStep:
    if derived and isinstance(network, ConvNet) and is_standard_convnet(network):
        return ConvNetStep(network, precision, compiled)
    return AutogradStep(network)


def worth_compiling(
    network: Network, config: ComputeConfig, device: torch.device, image_shape: tuple[int, int, int], images: int
) -> bool:
    """Whether to compile a run that differentiates the network for so many `images`, counted each time.

    Raises:
        UserError: `config` asks for it, and there is no compiler.
    """
    if config.compiled and device.type != "cuda" and not can_compile():
        raise UserError("compiled is True, but there is no C++ compiler here; install one, or leave the choice open.")
    if config.compiled is not None:
        return config.compiled
    if not (isinstance(network, ConvNet) and is_standard_convnet(network)):
        return False
    enough = (
        3 * operations(network, image_shape) * images >= WORTH_COMPILING["cuda" if device.type == "cuda" else "cpu"]
    )
    return config.precision == "bfloat16" or enough


@functools.lru_cache(maxsize=16)
def operations(network: Network, image_shape: tuple[int, ...]) -> float:
    """Floating-point operations with which the network classifies an image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(parameter_count(network), device="meta"), torch.empty(1, *image_shape, device="meta"))
    return float(counter.get_total_flops())


def residual_budget(device: torch.device) -> int:
    """Bytes that memories may take: CDDLIB_KEPT_MB, or a part of what is free.

    It is half of what is free on a GPU now, and an eighth of what was free on the machine when a process first asked.
    """
    if "CDDLIB_KEPT_MB" in os.environ:
        return _kept_mb(os.environ["CDDLIB_KEPT_MB"]) * 2**20
    if device.type == "cuda":
        return free_memory(device) // 2
    return _budget_of_machine()


@functools.cache
def _budget_of_machine() -> int:
    return free_memory(torch.device("cpu")) // (8 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _kept_mb(text: str) -> int:
    if not (text.isdecimal() and text.isascii()):
        raise UserError(f"CDDLIB_KEPT_MB is {text!r}; it must be a number of MB, 0 or more.")
    return int(text)
