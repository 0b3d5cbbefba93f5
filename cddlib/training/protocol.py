"""The published protocol, by which networks learn a synthetic set in evaluation and in validation.

SGD with momentum 0.9 and weight decay 5e-4, a tenth of the learning rate from half time on, DSA on every batch. Unlike
the published loop, momentum survives the drop of the rate, and there are 1000 epochs, not 1001.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from cddlib.networks.convnet import Network
from cddlib.runtime.random import generator
from cddlib.training.epoch import Fetch, train_epoch
from cddlib.training.step import ComputeConfig


def train_network(
    network: Network,
    fetch: Fetch,
    size: int,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    strategy: str,
    purpose: str,
    seed: int,
    device: torch.device,
    begun: Float[Tensor, " p"] | None = None,
    compute: ComputeConfig | None = None,
) -> Float[Tensor, " p"]:
    """Train a network by the published protocol on `size` examples; returns its parameters.

    It is fresh, or goes on from `begun`. A fresh one's initialisation belongs to `purpose` (validation, evaluation) and
    `seed`: no expert ever started there, and a network that helped to select a synthetic set does not test it.
    """
    theta = network.init(generator(purpose, seed, "init")) if begun is None else begun
    theta = theta.to(device).requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[(epochs + 1) // 2], gamma=0.1)
    rng = generator(purpose, seed, "epochs")
    for _ in range(epochs):
        train_epoch(
            network,
            theta,
            optimizer,
            fetch,
            size,
            batch_size=batch_size,
            strategy=strategy,
            generator=rng,
            compute=compute,
        )
        schedule.step()
    return theta.detach()


def fetch_synthetic(images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n classes"]) -> Fetch:
    """Synthetic images, which are in the network's input space already."""
    return lambda indices: (images[indices], targets[indices])
