"""The heart: K segments into one gradient of the synthetic set, on one process or divided among several."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data.augment import AugmentConfig
from cddlib.distillation.optimizer import OptimizerConfig
from cddlib.experts.buffer import Buffer
from cddlib.matching.combine import CombineConfig, fixed_weights, gramian, weighted_sum, weights
from cddlib.matching.loss import matching_losses
from cddlib.matching.segments import SegmentsConfig, active_subset, draw_earlier, draw_matched, draw_others
from cddlib.matching.student import MatchingConfig, Step, plan_student, turns
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.random import generator
from cddlib.synthetic import SyntheticConfig, SyntheticSet
from cddlib.training.epoch import predict


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcurrentConfig(OptimizerConfig, SyntheticConfig, CombineConfig, MatchingConfig, SegmentsConfig, AugmentConfig):
    """Everything that the gradient of an iteration depends on."""

    seed: int = 0
    """Seed of everything random."""


def concurrent_gradient(
    config: ConcurrentConfig, buffer: Buffer, synthetic: SyntheticSet, iteration: int, ranks: Ranks | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """The combined gradient of K segments with respect to `synthetic.variables`, and what was matched.

    The segments share an expert, drawn uniformly; each has its own batches and augmentation. That is our choice: the
    paper's is not known. Nothing random depends on earlier iterations, or on how many ranks there are. Each rank
    differentiates its share of the segments, side by side or one after the other, and keeps one gradient, or all where
    the weights depend on them.

    Returns:
        A gradient for each variable, in its shape; and the iteration's loss, losses, gradient norms, start epochs,
        anchor and expert.
    """
    ranks = ranks or Ranks()
    rng = generator(config.seed, "iteration", iteration)
    experts = len(buffer.experts)
    expert, segments = draw_matched(config, experts, iteration, rng)
    others = draw_others(config, config.seed, experts, iteration, expert)
    replayed = draw_earlier(config, config.seed, experts, iteration)
    matched = [(expert, start) for start in segments.starts] + others + replayed
    rows = synthetic.subset(active_subset(config, iteration))
    students = [plan_student(config, len(rows), config.augment, rng) for _ in matched]
    variables = synthetic.variables()
    shares = fixed_weights(config, len(matched), segments.anchor)
    kept = synthetic.images.new_zeros(1 if shares else len(matched), sum(variable.numel() for variable in variables))
    losses, norms = kept.new_zeros(len(matched)), kept.new_zeros(len(matched))
    mine = ranks.share(range(len(matched)))
    for turn in turns(buffer.network, config, synthetic.images, len(students[0][0].indices), len(mine)):
        here = [matched[k] for k in mine[turn]]
        differentiated = _segment_gradients(config, buffer, synthetic, rows, here, [students[k] for k in mine[turn]])
        for k, loss, gradient in zip(mine[turn], *differentiated, strict=True):
            losses[k], norms[k] = loss, gradient.norm()
            kept[0 if shares else k] += shares[k] * gradient if shares else gradient
    ranks.sum(kept, losses, norms)

    gradients = [_by_variable(row, variables) for row in kept]
    found = losses.tolist()
    if shares is None:
        shares = weights(config, gramian(gradients, config.rates(synthetic)), found, segments.anchor, rng)
        gradients = [weighted_sum(gradients, shares)]
    averaged = shares if config.combine == "mean" else [1 / len(found)] * len(found)
    return gradients[0], {
        "loss": sum(share * loss for share, loss in zip(averaged, found, strict=True)),
        "losses": found,
        "gradient_norms": norms.tolist(),
        "starts": segments.starts,
        "anchor": segments.anchor,
        "expert": expert,
        **({"others": others} if others else {}),
        **({"replayed": replayed} if config.replay else {}),
        **({"weights": shares} if config.combine != "mean" else {}),
    }


def _segment_gradients(
    config: ConcurrentConfig,
    buffer: Buffer,
    synthetic: SyntheticSet,
    rows: Tensor,
    matched: list[tuple[int, int | float]],
    students: list[list[Step]],
) -> tuple[Tensor, Tensor]:
    """The losses of segments, each an expert and its start epoch, and their gradients, a row each for all variables.

    Every student has a copy of the set, so that gradients do not add up.
    """
    device, later = synthetic.images.device, config.expert_epochs
    copies = synthetic.copies(len(matched))
    taught = config.labels == "teacher"
    if taught:
        targets = torch.stack([teacher_logits(config, buffer, synthetic, *segment).softmax(1) for segment in matched])
    else:
        targets = synthetic.targets_of(copies)
    losses = matching_losses(
        buffer.network,
        torch.stack([buffer.parameters_on(device, expert, start) for expert, start in matched]),
        torch.stack([buffer.parameters_on(device, expert, start + later) for expert, start in matched]),
        copies["images"],
        targets,
        copies["step_size"],
        [[step._replace(indices=rows[step.indices]) for step in steps] for steps in students],
        config,
    )
    gradients = torch.autograd.grad(losses.sum(), list(copies.values()), allow_unused=taught, materialize_grads=taught)
    return losses.detach(), torch.cat([gradient.reshape(len(matched), -1) for gradient in gradients], 1)


def matched_segments(record: dict[str, Any]) -> list[tuple[int, int | float]]:
    """Expert and start epoch of every segment that an iteration matched, in the order of its losses."""
    own = [(record["expert"], start) for start in record["starts"]]
    return own + [(expert, start) for key in ("others", "replayed") for expert, start in record.get(key, [])]


def _by_variable(vector: Tensor, variables: list[Tensor]) -> list[Tensor]:
    """A gradient in one vector, cut into the variables' shapes."""
    parts = vector.split([variable.numel() for variable in variables])
    return [part.view_as(variable) for part, variable in zip(parts, variables, strict=True)]


def teacher_logits(
    config: SegmentsConfig, buffer: Buffer, synthetic: SyntheticSet, expert: int, start: int | float
) -> Float[Tensor, "n classes"]:
    """What the network at the end of a segment says of the synthetic images (TESLA's labels for 1000 classes)."""
    theta = buffer.parameters_on(synthetic.images.device, expert, start + config.expert_epochs)
    images = synthetic.images.detach()
    return predict(buffer.network, theta, lambda indices: (images[indices], synthetic.labels[indices]), len(images))
