"""The published protocol, by which networks learn a synthetic set in evaluation and in validation.

SGD with momentum 0.9 and weight decay 5e-4, a tenth of the learning rate from half time on, DSA on every batch. Unlike
the published loop, momentum survives the drop of the rate, and there are 1000 epochs, not 1001.

Images do not change while a network learns them, so the batches of many steps are augmented at once. On a GPU these
steps are one graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.data import augment
from cddlib.matching.student import StudentStep, student_batches
from cddlib.networks.convnet import Network
from cddlib.runtime.distributed import Ranks
from cddlib.runtime.errors import require
from cddlib.runtime.random import generator
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.engine import make_step
from cddlib.training.epoch import Fetch
from cddlib.training.graphs import graph
from cddlib.training.step import ComputeConfig, TrainingStep

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
AT_ONCE = 2**24
"""Bytes of the batches that are augmented at once, or those of one batch."""
MOST_STEPS = 256
"""Most steps that are taken at once; on a GPU they are one graph."""
MOST_EPOCHS = 100_000
"""Epochs of an evaluation's training. The published protocol has 1000; a file that asks for more is not believed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How networks are trained on a synthetic set, in evaluation and in validation during distillation."""

    evaluation_epochs: int = 1000
    """Passes over the synthetic set."""
    evaluation_batch: int = 256
    """Images a step."""

    def __post_init__(self) -> None:
        require(1, most=MOST_EPOCHS, evaluation_epochs=self.evaluation_epochs)
        require(1, evaluation_batch=self.evaluation_batch)


def train_network(
    network: Network,
    fetch: Fetch,
    size: int,
    config: EvaluateConfig,
    strategy: str,
    compute: ComputeConfig,
    learning_rate: float,
    *,
    purpose: str,
    seed: int,
    device: torch.device,
    begun: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, " p"]:
    """Train a network by the published protocol on `size` examples; returns its parameters.

    It is fresh, or goes on from `begun`. A fresh one's initialisation belongs to `purpose` (validation, evaluation) and
    `seed`: no expert ever started there, and a network that helped to select a synthetic set does not test it.
    """
    theta = network.init(generator(purpose, seed, "init")) if begun is None else begun
    theta = theta.to(device)[None]
    velocity = torch.zeros_like(theta)
    step, epochs, batch_size = make_step(network, compute, device), config.evaluation_epochs, config.evaluation_batch
    rng = generator(purpose, seed, "epochs")
    plan = [
        StudentStep(indices, augment.draw(strategy, len(indices), rng))
        for _ in range(epochs)
        for indices in torch.randperm(size, generator=rng).split(batch_size)
    ]
    rates = torch.full((len(plan),), learning_rate)
    rates[(epochs + 1) // 2 * -(-size // batch_size) :] *= 0.1
    rates = rates.to(device)
    image = fetch(torch.zeros(1, dtype=torch.int64, device=device))[0]
    number = max(1, min(MOST_STEPS, AT_ONCE // (min(batch_size, size) * image.nbytes)))
    what = {"total": len(plan), "desc": f"a network on {size:,} images", "unit": "step", "delay": 2, "leave": False}
    with Ranks().progress(**what) as bar:
        for first in range(0, len(plan), number):
            steps = plan[first : first + number]
            inputs, targets = fetch(torch.cat([indices for indices, _ in steps]).to(device))
            places = torch.arange(len(inputs)).split([len(indices) for indices, _ in steps])
            again = [StudentStep(place, draw) for place, (_, draw) in zip(places, steps, strict=True)]
            inputs, targets, sizes = student_batches([again], inputs[None], targets[None])
            descend: Callable[..., tuple[Tensor, ...]] = functools.partial(_descend, step, sizes)
            if theta.is_cuda and isinstance(step, ConvNetStep):
                descend = graph(theta.device, functools.partial, _descend, step, sizes, key=targets.dtype)
            theta, velocity = descend(theta, velocity, inputs, targets, rates[first : first + number])
            bar.update(len(steps))
    return theta[0]


def _descend(
    step: TrainingStep,
    sizes: Sequence[int],
    theta: Tensor,
    velocity: Tensor,
    inputs: Tensor,
    targets: Tensor,
    rates: Tensor,
) -> tuple[Tensor, Tensor]:
    """Parameters and momentum after a step on each of the batches, whose `sizes` add up to the second axis."""
    batches = zip(inputs.split(sizes, 1), targets.split(sizes, 1), rates, strict=True)
    for images, answers, rate in batches:
        _, gradient = step.gradient(theta, images, answers)
        velocity = (velocity * MOMENTUM).add_(gradient.add(theta, alpha=WEIGHT_DECAY))
        theta = torch.addcmul(theta, rate, velocity, value=-1)
    return theta, velocity


def fetch_synthetic(images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n classes"]) -> Fetch:
    """Synthetic images, which are in the network's input space already."""
    return lambda indices: (images[indices], targets[indices])
