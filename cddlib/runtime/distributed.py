"""The processes that share one piece of work, and their wish to stop.

``torchrun --nproc-per-node 4 -m cddlib distill …`` starts four ranks; without torchrun there is one. Buffering divides
its experts among them, distillation the segments of an iteration, evaluation its networks. Rank 0 writes the run's
folder, which all of them have to see. A rank that dies takes the others with it, and torchrun starts them again, as
many as there are now: they go on from what the folder holds.

The first SIGINT or SIGTERM, of which clusters send one before they take a machine away, asks the work to stop where
nothing is lost. A second one stops a single process at once. Ranks heed it no more than the first: it may be the same
one, from the cluster and from torchrun, which kills what does not end in its time.
"""

import contextlib
import datetime
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

from cddlib.runtime.errors import UserError

T = TypeVar("T")

_asked = 0
"""The signal that asked this process to stop, whichever of its threads are at work; or 0."""
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
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        store, rank, count = next(rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun keeps its store, with addresses of ranks that died
            store = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    except RuntimeError as error:
        number, others = os.environ["RANK"], int(os.environ["WORLD_SIZE"]) - 1
        raise UserError(f"process {number} did not find the other {others} ({_reason(error)}).") from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """The first sentence of a message of gloo, without the line of its code."""
    return re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]


class Ranks:
    """This process among those that share the work: `rank` of `count`. Alone, it is 0 of 1."""

    def __init__(self) -> None:
        """The ranks of torch's default process group, if there is one."""
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.stopping = False
        """Whether any rank had been asked to stop at the last `sum`: the same on all of them."""

    @property
    def asked(self) -> int:
        """The signal that asked this process, or another rank at the last `sum`, to stop; or 0."""
        return _asked

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def portion(self, work: Sequence[T]) -> Sequence[T]:
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
                f"another process of this run is gone ({_reason(error)}); what was saved is kept, and torchrun with "
                f"--max-restarts, or the same command, goes on from there."
            ) from None
        *parts, wishes = packed.split([*(tensor.numel() for tensor in tensors), 1])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        self.stopping = bool(wishes > 0)
        if self.stopping:
            global _asked
            _asked = _asked or signal.SIGTERM

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.sum(torch.zeros(1))

    def stop(self, message: str) -> NoReturn:
        """Raise `Interrupted` when all ranks have come here, for torchrun ends all when one ends."""
        self.wait()
        raise Interrupted(message, self.asked)

    def agree(self, found: int, what: str) -> None:
        """Go on when all ranks have come here and found the same number in the folder of the run.

        Raises:
            UserError: they have not, and `what` says what the number is.
        """
        numbers = torch.zeros(self.count, dtype=torch.float64)
        numbers[self.rank] = found
        self.sum(numbers)
        if len(numbers.unique()) > 1:
            every = ", ".join(f"{number:.0f}" for number in numbers)
            raise UserError(f"{what} is {every} for the processes of this run; all have to see the same files.")

    @contextlib.contextmanager
    def graceful_stop(self, what: str) -> Iterator[None]:
        """Within, the first SIGINT or SIGTERM only sets `asked`. `what` says what is finished before stopping.

        The system tells only the main thread: other threads hear of it while that one heeds signals.

        Raises:
            Interrupted: a process alone was asked to stop when there was nothing left to do.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        insisted: list[int] = []

        def ask(number: int, _frame: Any) -> None:
            global _asked
            if self.asked and self.count == 1:
                insisted.append(number)
                raise Interrupted("stopped at once", number)
            if self.first and not self.asked:
                second = "; a second signal stops at once" if self.count == 1 else ""
                with contextlib.suppress(OSError, RuntimeError):  # nobody reads, or it came while printing
                    print(f"\ncddlib: finishing {what}{second}.", file=sys.stderr, flush=True)
            _asked = self.asked or number

        global _asked
        _asked = 0
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception as error:
            if insisted:  # compiled code may have turned the interruption into an error of its own
                raise Interrupted("stopped at once", insisted[-1]) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            wish, _asked = self.asked, 0
        if wish and self.count == 1:
            raise Interrupted("stopped when all was finished", wish)  # lest a script or a study go on

    def progress(self, *arguments: Any, **options: Any) -> Any:
        """A progress bar of tqdm, on the first rank."""
        return tqdm(*arguments, miniters=1, **options, **({} if self.first else {"disable": True}))
