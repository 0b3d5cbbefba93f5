"""Devices: which one, how much memory is free, copies to it."""

import ctypes
import os
import re
import sys
from pathlib import Path

import psutil
import torch
from torch import Tensor

from cddlib.runtime.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def resolve_device(name: str) -> torch.device:
    """`auto` is this process's GPU if there is one, else the CPU; raises `UserError` for a device that is not here."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        process, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()  # torchrun's, one a GPU
        if process >= here:
            raise UserError(
                f"torchrun started process {process} of this machine, counted from 0, but it has {here} GPUs; give "
                f"--nproc-per-node {here}, or --device cpu."
            )
        return torch.device("cuda", process)
    if name == "auto":
        return torch.device("cpu")
    try:
        torch.zeros(1, device=name).item()  # `meta` has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} is not available here ({str(error).splitlines()[0]}); use 'cpu' or 'auto'."
        ) from None
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU; or on the machine, as far as the container leaves them to its processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch still holds then belongs to tensors, or to graphs alone
        return torch.cuda.mem_get_info(device)[0]
    free, limit = psutil.virtual_memory().available, CGROUP / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        cached = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        used = int((CGROUP / "memory.current").read_text()) - int(cached[1] if cached else 0)  # files' pages give way
        free = min(free, int(limit.read_text()) - used)
    return max(0, free)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; a CUDA device gets it from the CPU while the CPU goes on."""
    if tensor.device == device:
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Ask glibc, for the whole process, to keep freed memory for the next allocation.

    Every operation on the CPU allocates its result, and giving pages back to the system only to ask for them again
    takes time. The command line calls this; a program that uses the library may.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names in malloc.h
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            ctypes.CDLL(None).mallopt(parameter, value)
