"""Continual-learning remedies that protect what earlier segments need: EWC and SI on the synthetic images.

Both keep a reference X̄ (the images at the last consolidation) and an importance Ω of every pixel, and pull pixels
back in proportion to it::

    ewc   elastic weight consolidation (Kirkpatrick et al. 2017): Ω sums squared gradients
    si    synaptic intelligence (Zenke et al. 2017): Ω sums what the pixel's path took off the loss, over its length²

The paper compares with them and gives no formula for images; this is our reconstruction. A consolidation comes every
`consolidate_every` iterations, because segments drawn at random have no borders between tasks. Ω is divided by its
mean, and the penalty is taken as a proximal step after the optimiser's, x ← X̄ + (x − X̄) / (1 + strength · Ω): no
strength makes it unstable.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from cddlib.runtime.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsolidateConfig:
    """Whether, and how strongly, images are held where earlier segments need them."""

    consolidation: Literal["none", "ewc", "si"] = "none"
    """Importance of a pixel; see `cddlib.distillation.consolidation`."""
    consolidation_strength: float = 0.1
    """Pull towards the reference at mean importance, relative to one step of the optimiser."""
    consolidate_every: int = 10
    """Iterations between consolidations."""

    def __post_init__(self) -> None:
        require(above=0, below=float("inf"), consolidation_strength=self.consolidation_strength)
        require(1, consolidate_every=self.consolidate_every)


class Consolidation:
    """Reference, importance, and what has been gathered since the last consolidation; all of the images' shape."""

    def __init__(self, config: ConsolidateConfig, images: Tensor) -> None:
        """Begin at `images`, with nothing important."""
        self.config = config
        self.tensors = {
            "reference": images.detach().clone(),
            "importance": torch.zeros_like(images),
            "gathered": torch.zeros_like(images),
        }

    @torch.no_grad()
    def after_step(self, images: Tensor, before: Tensor, gradient: Tensor, rows: Tensor, iteration: int) -> None:
        """Gather what the step did, pull `images` towards the reference in place, and consolidate if it is time.

        Args:
            images: after the optimiser's step.
            before: the images before it.
            gradient: of the matching loss, at `before`.
            rows: which images the step moved, and the pull may move.
            iteration: its number, from 1. One that the loss guard skips does not come here and consolidates nothing.
        """
        reference, importance, gathered = self.tensors.values()
        gathered += gradient.square() if self.config.consolidation == "ewc" else -gradient * (images - before)
        if importance.any():
            pull = self.config.consolidation_strength * importance / importance.mean()
            images[rows] = (reference + (images - reference) / (1 + pull))[rows]
        if iteration % self.config.consolidate_every == 0:
            if self.config.consolidation == "si":
                moved = (images - reference).square()
                gathered = gathered.clamp(min=0) / (moved + moved.mean()).clamp(min=1e-12)  # images may stand still
            importance += gathered
            reference.copy_(images)
            self.tensors["gathered"].zero_()
