"""Probes: a fixed set of segments that a run follows, whatever it matches.

Each has students whose batches and augmentation never change. So its loss is a function of the synthetic set alone, and
two of its values differ only by what happened to the set.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.distillation.config import DistillConfig
from cddlib.distillation.hooks import Run
from cddlib.experts.buffer import Buffer
from cddlib.matching.combine import gramian
from cddlib.matching.loss import matching_losses
from cddlib.matching.student import (
    MatchingConfig,
    StudentStep,
    make_walk,
    plan_student,
    segment_chunks,
    student_batches,
)
from cddlib.networks.convnet import Network
from cddlib.runtime.errors import UserError, require
from cddlib.runtime.random import generator
from cddlib.training.step import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeHook:
    """Follows segments, their gradients, and the accumulated error through a run."""

    probe_starts: tuple[int, ...] = ()
    """Start epochs of the probes, ascending; none follows nothing."""
    probe_expert: int = 0
    """The expert whose segments they are."""
    probe_every: int = 1
    """Iterations between measurements of the probes' losses."""
    similarity_every: int = 0
    """Iterations between measurements of their gradients and of transfer between them; 0 means never."""
    error_every: int = 0
    """Iterations between measurements of the accumulated error, on `probe_expert`'s trajectory; 0 means never."""

    def __post_init__(self) -> None:
        if list(self.probe_starts) != sorted({start for start in self.probe_starts if start >= 0}):
            raise UserError(f"probe_starts is {self.probe_starts}; epochs must be 0 or more, ascending, each once.")
        require(1, probe_every=self.probe_every)
        require(0, similarity_every=self.similarity_every, error_every=self.error_every)
        if self.similarity_every and not self.probe_starts:
            raise UserError(f"similarity_every is {self.similarity_every}, but probe_starts names no segments.")

    def after_iteration(self, run: Run) -> dict[str, Any]:
        """`probe_losses`, `gradient_similarity` and `accumulated_error`, each where it is due."""
        measures: dict[str, tuple[Callable[[Run], Any], int]] = {
            "probe_losses": (self.losses, self.probe_every if self.probe_starts else 0),
            "gradient_similarity": (self.gradient_similarity, self.similarity_every),
            "accumulated_error": (self.accumulated_error, self.error_every),
        }
        return {name: measure(run) for name, (measure, every) in measures.items() if run.due(every)}

    def check(self, config: DistillConfig, buffer: Buffer) -> None:
        """Raise `UserError` unless the experts have every segment that it follows."""
        buffer.check_expert("probe_expert", self.probe_expert)
        length = config.schedule.expert_epochs
        latest = buffer.epochs - length
        if self.probe_starts and self.probe_starts[-1] > latest:
            raise UserError(
                f"probe_starts is {self.probe_starts}, but the experts stop at epoch {buffer.epochs} and segments are "
                f"{length} epochs long; probes may start at epoch {latest} at the latest."
            )

    def in_turns(self, run: Run, *, draw: int = 0) -> Iterator[tuple[Float[Tensor, " s"], list[Tensor]]]:
        """Matching losses of the probes, turn by turn, and the variables they depend on, a row for each loss.

        Another `draw` is another student on every segment.
        """
        config, network, synthetic = run.config, run.buffer.network, run.synthetic
        parameters = functools.partial(run.buffer.parameters_on, synthetic.images.device, self.probe_expert)
        students = [
            plan_student(config.student, len(synthetic.labels), config.augmentation.augment, stream)
            for stream in (generator(config.seed, "probe", start, draw) for start in self.probe_starts)
        ]
        plain = MatchingConfig(side_by_side=config.student.side_by_side)
        for turn in segment_chunks(network, plain, synthetic.images, len(students[0][0].indices), len(students)):
            starts, targets = (
                torch.stack([parameters(start + ahead) for start in self.probe_starts[turn]])
                for ahead in (0, config.schedule.expert_epochs)
            )
            copies = synthetic.copies(len(starts))
            held_by_each = (copies["images"], synthetic.targets_of(copies), copies["step_size"])
            losses = matching_losses(network, starts, targets, *held_by_each, students[turn], plain)
            yield losses, list(copies.values())

    def losses(self, run: Run) -> list[float]:
        """Matching loss of every probe."""
        with torch.no_grad():
            return [loss for losses, _ in self.in_turns(run) for loss in losses.tolist()]

    def gradient_similarity(self, run: Run) -> dict[str, Any]:
        """Inner products of the probes' gradients, and the losses after a fresh optimiser's step on each probe.

        Returns:
            JSON values. `losses` (P), `after` (P x P: row stepped on, column measured) and `products`, for each
            variable the 2P x 2P inner products, without learning rates, of the gradients of two students a probe, first
            all the first ones.
        """
        gradients: list[tuple[Tensor, ...]] = []
        losses: list[float] = []
        for found, variables in (turn for draw in (0, 1) for turn in self.in_turns(run, draw=draw)):
            gradients += zip(*torch.autograd.grad(found.sum(), variables), strict=True)
            losses += found.tolist()
        count, rates, after = len(self.probe_starts), run.config.optimizer.rates(run.synthetic), []
        for gradient in gradients[:count]:
            stepped = run.synthetic.copy()
            for variable, rate, slope in zip(stepped.variables(), rates, gradient, strict=True):
                variable -= rate * slope  # the first step of torch.optim.SGD, with or without momentum
            after.append(self.losses(run._replace(synthetic=stepped)))
        products = {
            name: gramian([[gradient[v]] for gradient in gradients], [1.0]).tolist()
            for v, name in enumerate(run.synthetic.variable_tensors())
        }
        return {"losses": losses[:count], "after": after, "products": products}

    def accumulated_error(self, run: Run) -> dict[str, list[Any]]:
        """How far a student that never returns to the expert's path ends up from it, and why (FTD, Eqs. 6-8).

        One student is trained on the synthetic set from θ*_0 along the trajectory, N steps for every M epochs that it
        has; another starts each of these segments where the expert is. With A(θ) the way that a student goes from θ::

            δ_{t+1} = A(θ*_t) − (θ*_{t+M} − θ*_t)        matching error: what the loss sees
            I_t     = A(θ*_t + ε_t) − A(θ*_t)            initialisation error: what starting elsewhere adds
            ε_{t+1} = ε_t + I_t + δ_{t+1}                accumulated error: the first student minus the expert

        Both students of a segment see the same batches and augmentations.

        Returns:
            A value for each segment's end. `epoch`; the lengths `error` ‖ε‖, `matching` ‖δ‖, `initialisation` ‖I‖;
            `matching_sum` ‖Σδ‖ and `initialisation_sum` ‖ΣI‖; and `travelled` ‖θ*_t − θ*_0‖.
        """
        config, buffer, synthetic, expert = run.config, run.buffer, run.synthetic, self.probe_expert
        device, targets = synthetic.images.device, synthetic.targets().detach()

        def way(theta: Tensor, epoch: int) -> Tensor:
            stream = generator(config.seed, "accumulated error", epoch)
            steps = plan_student(config.student, len(targets), config.augmentation.augment, stream)
            learned = synthetic.images.detach(), targets, synthetic.step_size.detach()
            return roll_out(buffer.network, theta, *learned, steps)[-1] - theta

        origin = buffer.parameters(expert, 0).to(device)
        student, star, length = origin, origin, config.schedule.expert_epochs
        vectors: dict[str, list[Tensor]] = {"error": [], "matching": [], "initialisation": [], "travelled": []}
        ends = range(length, buffer.epochs + 1, length)
        for end in ends:
            following = buffer.parameters(expert, end).to(device)
            from_expert, from_student = way(star, end), way(student, end)
            vectors["matching"].append(from_expert - (following - star))
            vectors["initialisation"].append(from_student - from_expert)
            student, star = student + from_student, following
            vectors["error"].append(student - star)
            vectors["travelled"].append(star - origin)
        vectors |= {f"{part}_sum": list(itertools.accumulate(vectors[part])) for part in ("matching", "initialisation")}
        return {"epoch": [*ends], **{name: [v.norm().item() for v in found] for name, found in vectors.items()}}


@torch.no_grad()
def roll_out(
    network: Network, start: Tensor, images: Tensor, targets: Tensor, step_size: Tensor, steps: list[StudentStep]
) -> list[Tensor]:
    """The student's parameters θ_0 … θ_N, N + 1 vectors of length p; arguments are those of `matching_loss`."""
    inputs, batch_targets, sizes = student_batches([steps], images[None], targets[None])
    walk = make_walk(network, ComputeConfig(), start.device, sizes, 0)
    path, _ = walk.forward(start[None], walk.step.prepared(inputs), batch_targets, step_size[None])
    return [thetas[0] for thetas in path]
