"""Training one network for an epoch and testing it, for buffering and for evaluation.

The optimiser follows the gradient, or a direction that also avoids sharp minima (GSAM, Zhuang et al. 2022), as FTD and
its successors do for experts.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cddlib.data import augment
from cddlib.data.dataset import Images
from cddlib.data.preprocessing import Preprocessing, Whitening
from cddlib.networks.convnet import Network
from cddlib.runtime.device import upload
from cddlib.runtime.errors import require
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.engine import make_step
from cddlib.training.graphs import graph
from cddlib.training.step import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharpnessConfig:
    """Whether experts avoid sharp minima."""

    sharpness_radius: float = 0.0
    """Radius ρ of the surroundings in which the loss should be flat; 0 is plain SGD."""
    sharpness_weight: float = 0.3
    """Weight α of the sharpness beside the loss."""
    sharpness_adaptive: bool = True
    """Measure the radius relative to the size of each parameter (Kwon et al. 2021)."""

    def __post_init__(self) -> None:
        numbers = {"sharpness_radius": self.sharpness_radius, "sharpness_weight": self.sharpness_weight}
        require(0, below=float("inf"), **numbers)


Fetch = Callable[[Int64[Tensor, " b"]], tuple[Tensor, Tensor]]
"""Network inputs, and targets (classes or class probabilities), at some indices."""


def fetch_real(data: Images, preprocessing: Preprocessing) -> Fetch:
    """Real images: whitened once if memory allows, otherwise preprocessed batch by batch."""
    whitened = preprocessing.whitened(data) if isinstance(preprocessing, Whitening) else None
    if whitened is not None:
        return lambda indices: (whitened[indices], data.labels[indices])
    return lambda indices: (preprocessing(data.take(indices)), data.labels[indices])


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
    sharpness: SharpnessConfig | None = None,
    compute: ComputeConfig | None = None,
    progress: Callable[[int], object] = int,
) -> float:
    """One pass over `size` examples in random order; `optimizer` updates `theta`. Returns the mean loss.

    After each batch, `progress` is called with the number of its examples.
    """
    compute = compute or ComputeConfig()
    uncompiled = dataclasses.replace(compute, compiled=False)
    step, rest = (make_step(network, how, theta.device) for how in (compute, uncompiled))
    captured = theta.is_cuda and isinstance(step, ConvNetStep)
    total = torch.zeros((), device=theta.device)
    for indices in upload(torch.randperm(size, generator=generator), theta.device).split(batch_size):
        inputs, targets = fetch(indices)
        inputs = augment.apply(augment.draw(strategy, len(indices), generator), inputs)
        gradient: Callable[..., tuple[Tensor, ...]] = step.gradient
        if len(indices) < batch_size:  # the last batch: it would not pay to compile and capture its size
            gradient = rest.gradient
        elif captured:
            gradient = graph(theta.device, functools.partial, step.gradient, key=(inputs.shape, targets.dtype))
        loss, theta.grad = _descent(gradient, theta, inputs, targets, sharpness or SharpnessConfig())
        optimizer.step()
        total += loss * len(indices)
        progress(len(indices))
    return float(total) / size


def _descent(
    gradient: Callable[..., tuple[Tensor, ...]],
    theta: Tensor,
    inputs: Tensor,
    targets: Tensor,
    sharpness: SharpnessConfig,
) -> tuple[Tensor, Tensor]:
    """A batch's loss, and the vector that takes the place of its gradient.

    GSAM: let g be the gradient at θ and h that at θ + e, where e is the step of length ρ that raises the loss most. The
    vector is h − α (g − g's projection on h). It lowers the loss at θ + e; the second term raises the loss at θ in a
    direction that, to first order, leaves the loss at θ + e as it is.
    """
    (loss,), (here,) = gradient(theta[None], inputs[None], targets[None])
    if sharpness.sharpness_radius == 0:
        return loss, here
    unit = theta.detach().abs() if sharpness.sharpness_adaptive else torch.ones_like(here)
    rise = unit.square() * here * (sharpness.sharpness_radius / ((unit * here).norm() + 1e-12))
    _, (there,) = gradient((theta.detach() + rise)[None], inputs[None], targets[None])
    across = here - there * (here @ there / (there @ there).clamp(min=1e-24))
    return loss, there - sharpness.sharpness_weight * across


@torch.no_grad()
def predict(network: Network, theta: Float[Tensor, " p"], fetch: Fetch, size: int) -> Float[Tensor, "n classes"]:
    """Logits for all of `size` examples."""
    batches = torch.arange(size, device=theta.device).split(500)
    return torch.cat([network(theta, fetch(indices)[0]) for indices in batches])


def correct(
    network: Network, theta: Float[Tensor, " p"], data: Images, preprocessing: Preprocessing
) -> Float[Tensor, " n"]:
    """1 for every image of `data` that the network classifies correctly, else 0; nan if its output is not finite."""
    logits = predict(network, theta, fetch_real(data, preprocessing), len(data.labels))
    right = (logits.argmax(1) == data.labels).double()
    return right if bool(logits.isfinite().all()) else torch.full_like(right, float("nan"))


def accuracy(network: Network, theta: Float[Tensor, " p"], data: Images, preprocessing: Preprocessing) -> float:
    """Fraction of `data` that the network classifies correctly; nan if its output is not finite."""
    return correct(network, theta, data, preprocessing).mean().item()
