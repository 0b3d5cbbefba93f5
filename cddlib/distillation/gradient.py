"""K segments into one gradient of the synthetic set, on one process or divided among several."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.distillation.config import DistillConfig
from cddlib.experts.buffer import Buffer
from cddlib.matching.combine import fixed_weights, gramian, weights
from cddlib.matching.loss import matching_losses
from cddlib.matching.segments import Segment, active_subset, draw_matched
from cddlib.matching.student import StudentStep, plan_student, segment_chunks
from cddlib.runtime.device import upload
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.random import generator
from cddlib.synthetic import SyntheticSet
from cddlib.training.epoch import predict


def concurrent_gradient(
    config: DistillConfig, buffer: Buffer, synthetic: SyntheticSet, iteration: int, ranks: Ranks | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """The combined gradient of K segments with respect to `synthetic.variables`, and what was matched.

    The segments share an expert, drawn uniformly; each has its own batches and augmentation. That is our choice: the
    paper's is not known. Students learn the subsets up to the active one, which alone is optimised. Nothing random
    depends on earlier iterations, or on how many ranks there are. Each rank differentiates its portion of the segments,
    side by side or one after the other, and adds up one gradient, or keeps all where the weights depend on them.

    Returns:
        A gradient for each variable, in its shape; and the iteration's `loss`, and `losses`, `gradient_norms` and
        `matched` (expert and start epoch) of all segments, and which of them is the `anchor`.
    """
    ranks = ranks or Ranks()
    rng = generator(config.seed, "iteration", iteration)
    matched, anchor = draw_matched(config.schedule, config.seed, len(buffer.experts), iteration, rng)
    active = active_subset(config.schedule, iteration)
    learned, held = synthetic.learned(active), upload(synthetic.learned(active - 1), synthetic.images.device)
    how = dataclasses.replace(config.student, student_batch=config.student.batch(len(learned), active))
    plans = [plan_student(how, len(learned), config.augmentation.augment, rng) for _ in matched]
    students = [[step._replace(indices=learned[step.indices]) for step in plan] for plan in plans]
    variables = synthetic.variables()
    fixed = fixed_weights(config.combination, len(matched), anchor)
    sums = synthetic.images.new_zeros(1 if fixed else len(matched), sum(variable.numel() for variable in variables))
    losses, norms = sums.new_zeros(len(matched)), sums.new_zeros(len(matched))
    mine = ranks.portion(range(len(matched)))
    batch = len(students[0][0].indices)
    for turn in segment_chunks(buffer.network, config.student, synthetic.images, batch, len(mine)):
        here = [matched[k] for k in mine[turn]]
        differentiated = _segment_gradients(config, buffer, synthetic, held, here, [students[k] for k in mine[turn]])
        for k, loss, gradient in zip(mine[turn], *differentiated, strict=True):
            losses[k], norms[k] = loss, gradient.norm()
            sums[0 if fixed else k] += fixed[k] * gradient if fixed else gradient
    ranks.sum(sums, losses, norms)

    sizes, each = [variable.numel() for variable in variables], losses.tolist()
    combined, used = sums[0], fixed
    if used is None:
        products = gramian([row.split(sizes) for row in sums], config.optimizer.rates(synthetic))
        used = weights(config.combination, products, each, anchor, rng)
        combined = torch.stack([weight * row for weight, row in zip(used, sums, strict=True)]).sum(0)
    averaged = used if config.combination.combine == "mean" else [1 / len(each)] * len(each)
    parts = combined.split(sizes)
    return [part.view_as(variable) for part, variable in zip(parts, variables, strict=True)], {
        "loss": sum(weight * loss for weight, loss in zip(averaged, each, strict=True)),
        "losses": each,
        "gradient_norms": norms.tolist(),
        "matched": [list(segment) for segment in matched],
        "anchor": anchor,
        **({"weights": used} if config.combination.combine != "mean" else {}),
    }


def _segment_gradients(
    config: DistillConfig,
    buffer: Buffer,
    synthetic: SyntheticSet,
    held: Tensor,
    matched: list[Segment],
    students: list[list[StudentStep]],
) -> tuple[Tensor, Tensor]:
    """The losses of segments and their gradients, a row each for all variables; 0 for the images that are `held`.

    Every student has a copy of the set, so that gradients do not add up.
    """
    device, later = synthetic.images.device, config.schedule.expert_epochs
    copies = synthetic.copies(len(matched))
    if config.synthetic.labels == "teacher":
        targets = torch.stack([teacher_logits(buffer, synthetic, e, start + later).softmax(1) for e, start in matched])
    else:
        targets = synthetic.targets_of(copies)
    losses = matching_losses(
        buffer.network,
        torch.stack([buffer.parameters_on(device, expert, start) for expert, start in matched]),
        torch.stack([buffer.parameters_on(device, expert, start + later) for expert, start in matched]),
        copies["images"],
        targets,
        copies["step_size"],
        students,
        config.student,
        config.compute,
    )
    gradients = torch.autograd.grad(losses.sum(), list(copies.values()), materialize_grads=True)
    for gradient in gradients[:-1]:  # the last is the step size's
        gradient.index_fill_(1, held, 0)
    return losses.detach(), torch.cat([gradient.reshape(len(matched), -1) for gradient in gradients], 1)


def teacher_logits(
    buffer: Buffer, synthetic: SyntheticSet, expert: int, epoch: int | float
) -> Float[Tensor, "n classes"]:
    """What an expert at the end of a segment says of the synthetic images (TESLA's labels for 1000 classes)."""
    theta, images = buffer.parameters_on(synthetic.images.device, expert, epoch), synthetic.images.detach()
    return predict(buffer.network, theta, lambda indices: (images[indices], synthetic.labels[indices]), len(images))
