"""Training one network by SGD and measuring it: what buffering and evaluation share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cddlib import augment
from cddlib.data import Images
from cddlib.networks import Network
from cddlib.preprocessing import Preprocessing

Fetch = Callable[[Int64[Tensor, " b"]], tuple[Tensor, Tensor]]
"""Network inputs and targets (classes, or a probability for each) at some indices."""


def fetch_real(data: Images, preprocessing: Preprocessing) -> Fetch:
    """Real images, preprocessed batch by batch so that only their bytes are kept."""
    return lambda indices: (preprocessing(data.images[indices]), data.labels[indices])


def train_epoch(
    network: Network,
    theta: Float[Tensor, " p"],
    optimizer: torch.optim.Optimizer,
    fetch: Fetch,
    size: int,
    *,
    batch_size: int,
    strategy: str,
    generator: torch.Generator,
) -> float:
    """One pass over `size` examples in random order; `optimizer` updates `theta`. Returns the mean loss."""
    total = torch.zeros((), device=theta.device)
    for indices in torch.randperm(size, generator=generator).split(batch_size):
        inputs, targets = fetch(indices.to(theta.device))
        inputs = augment.apply(augment.draw(strategy, len(indices), generator), inputs)
        loss = F.cross_entropy(network(theta, inputs), targets)
        (theta.grad,) = torch.autograd.grad(loss, theta)
        optimizer.step()
        total += loss.detach() * len(indices)
    return float(total) / size


@torch.no_grad()
def predict(network: Network, theta: Float[Tensor, " p"], fetch: Fetch, size: int) -> Float[Tensor, "n classes"]:
    """Logits for all of `size` examples."""
    batches = torch.arange(size, device=theta.device).split(500)
    return torch.cat([network(theta, fetch(indices)[0]) for indices in batches])


def accuracy(network: Network, theta: Float[Tensor, " p"], data: Images, preprocessing: Preprocessing) -> float:
    """Fraction of `data` that the network gets right."""
    logits = predict(network, theta, fetch_real(data, preprocessing), len(data.labels))
    return (logits.argmax(1) == data.labels).double().mean().item()
