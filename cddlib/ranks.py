"""The processes that share one piece of work, and their wish to stop.

``torchrun --nproc-per-node 4 -m cddlib distill …`` starts four ranks; without torchrun there is one. Buffering divides
its experts among them, distillation the segments of an iteration, evaluation its networks. Rank 0 writes the run's
folder, which all of them have to see. A rank that dies takes the others with it, and torchrun starts them again, as
many as there are now: they go on from what the folder holds.

The first SIGINT or SIGTERM, of which clusters send one before they take a machine away, asks the work to stop where
nothing is lost; the second stops it at once.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from cddlib.files import UserError

T = TypeVar("T")

PATIENCE = datetime.timedelta(hours=12)
"""How long a rank waits for another; one that died is noticed at once, so this is for slow ones."""


class Interrupted(KeyboardInterrupt):
    """The work stopped because a signal asked it to; the message says what is kept."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        """Stopped by the signal of that number."""
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that torchrun started, if it did: NCCL between GPUs, gloo between CPUs."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Ranks:
    """This process among those that share the work: `rank` of `count`. Alone, it is 0 of 1."""

    def __init__(self) -> None:
        """The ranks of torch's default process group, if there is one."""
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.asked = 0
        """The signal that asked this process to stop, or 0."""
        self.stopping = False
        """Whether any rank had been asked to stop at the last `sum`: the same on all of them."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's part of `work`."""
        return work[self.rank :: self.count]

    def sum(self, *tensors: Tensor) -> None:
        """Add up each tensor over the ranks, in place, all in one all-reduce. They have one dtype and device.

        Raises:
            UserError: another rank is gone.
        """
        if self.count == 1:
            self.stopping = bool(self.asked)
            return
        packed = torch.cat([*(tensor.flatten() for tensor in tensors), tensors[0].new_tensor([float(self.asked > 0)])])
        try:
            dist.all_reduce(packed)
        except RuntimeError as error:
            raise UserError(
                f"another process of this run is gone ({str(error).splitlines()[0]}); what was saved is kept, and "
                f"torchrun with --max-restarts, or the same command, goes on from there."
            ) from None
        *parts, wishes = packed.split([*(tensor.numel() for tensor in tensors), 1])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        self.stopping = bool(wishes > 0)

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def heeding_signals(self, what: str) -> Iterator[None]:
        """Within, the first SIGINT or SIGTERM only sets `asked`. `what` says what is finished before stopping."""
        if threading.current_thread() is not threading.main_thread():
            yield  # the system tells only the main thread
            return

        def ask(number: int, _frame: Any) -> None:
            if self.asked:
                raise Interrupted("stopped at once", number)
            self.asked = number
            if self.first:
                print(f"\ncddlib: finishing {what}; a second signal stops at once.", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def progress(self, *arguments: Any, **options: Any) -> Any:
        """A progress bar of tqdm, on the first rank."""
        return tqdm(*arguments, **options, **({} if self.first else {"disable": True}))
