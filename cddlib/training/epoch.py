"""Training one network and measuring it: what buffering and evaluation share.

Plain SGD, or SGD along a direction that also makes the surroundings flat (GSAM, Zhuang et al. 2022), which is how FTD
and its successors train experts.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cddlib.data import augment
from cddlib.data.dataset import Images
from cddlib.data.preprocessing import Preprocessing, Whitening
from cddlib.networks.convnet import Network
from cddlib.runtime.device import upload
from cddlib.runtime.errors import UserError
from cddlib.training.convnet_step import ConvNetStep
from cddlib.training.engine import make_step
from cddlib.training.graphs import Graph
from cddlib.training.step import ComputeConfig, TrainingStep


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
        for name in ("sharpness_radius", "sharpness_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be a finite number, 0 or more.")


Fetch = Callable[[Int64[Tensor, " b"]], tuple[Tensor, Tensor]]
"""Network inputs and targets (classes, or a probability for each) at some indices."""


def fetch_real(data: Images, preprocessing: Preprocessing) -> Fetch:
    """Real images: whitened once, where memory allows; else preprocessed batch by batch, and only bytes are kept."""
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
) -> float:
    """One pass over `size` examples in random order; `optimizer` updates `theta`. Returns the mean loss."""
    steps = make_step(network, compute or ComputeConfig(), theta.device)
    captured = theta.is_cuda and isinstance(steps, ConvNetStep)
    total = torch.zeros((), device=theta.device)
    for indices in upload(torch.randperm(size, generator=generator), theta.device).split(batch_size):
        inputs, targets = fetch(indices)
        inputs = augment.apply(augment.draw(strategy, len(indices), generator), inputs)
        shape = (inputs.shape, targets.dtype, threading.get_ident())
        gradient = _graph(steps, *shape) if captured else steps.gradient  # type: ignore[arg-type]  # it has a hash
        loss, theta.grad = _descent(gradient, theta, inputs, targets, sharpness or SharpnessConfig())
        optimizer.step()
        total += loss * len(indices)
    return float(total) / size


@functools.lru_cache(maxsize=16)
def _graph(steps: TrainingStep, shape: torch.Size, targets: torch.dtype, thread: int) -> Graph:
    """A step's gradient as a graph, for inputs of a `shape` and targets of a type; every thread has its own."""
    return Graph(steps.gradient)


def _descent(
    gradient: Callable[..., tuple[Tensor, ...]],
    theta: Tensor,
    inputs: Tensor,
    targets: Tensor,
    sharpness: SharpnessConfig,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the direction to descend along.

    GSAM: with g at θ and h at θ + e, where e is the step of length ρ along which the loss rises fastest, it is
    h − α (g − its part along h): down in the surroundings' loss, and up in what of the loss does not change that.
    """
    loss, here = (found[0] for found in gradient(theta[None], inputs[None], targets[None]))
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


def accuracy(network: Network, theta: Float[Tensor, " p"], data: Images, preprocessing: Preprocessing) -> float:
    """Fraction of `data` that the network gets right; nan if its output is not finite, where argmax still finds one."""
    logits = predict(network, theta, fetch_real(data, preprocessing), len(data.labels))
    if not bool(logits.isfinite().all()):
        return float("nan")
    return (logits.argmax(1) == data.labels).double().mean().item()
