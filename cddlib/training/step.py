"""One step of SGD and its vector-Jacobian product: all the arithmetic that takes time.

A step's gradient is g = ∇_θ ℓ(θ; X, Y), where ℓ is the cross-entropy with class probabilities, averaged over the batch.
Training needs only g. Differentiating a student (`cddlib.matching`) also needs, for a direction λ, the scalar ⟨g, λ⟩
and its derivatives with respect to θ, X and Y. They are derivatives of ℓ and of its gradients in the direction λ::

    ⟨g, λ⟩ = d/dε ℓ      (∂g/∂θ)ᵀ λ = d/dε ∇_θ ℓ      (∂g/∂X)ᵀ λ = d/dε ∇_X ℓ      at θ + ελ, ε = 0

`AutogradStep` finds them for every network, by differentiating ⟨g, λ⟩. `convnet_step` has them written out for the
field's standard ConvNet, and `engine` chooses. A step's residuals, which its derivatives need, can be kept or computed
again, with the same bits.

Several networks of one kind take their steps side by side, each with its own parameters, batch and direction.
"""

import contextlib
import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cddlib.networks.convnet import Network
from cddlib.networks.zoo import side_by_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the standard ConvNet (instance norm, ReLU, average pooling) is computed in training; others ignore it."""

    precision: Literal["float32", "ieee", "bfloat16"] = "float32"
    """Precision of a convolution's inputs and outputs; all else is float32. A GPU's convolutions round float32 to TF32
    before they multiply, unless precision is ieee; on a CPU the two are the same."""
    compiled: bool | None = None
    """Compile the steps, which takes up to a minute, once on a machine; by default, if the run is long enough or
    precision is bfloat16, which is slow otherwise."""


class StepVJP(NamedTuple):
    """⟨g, λ⟩ and its derivatives, of each network."""

    inner: Float[Tensor, " s"]
    by_theta: Float[Tensor, "s p"]
    by_inputs: Float[Tensor, "s b c h w"]
    by_targets: Float[Tensor, "s b classes"]


class Residuals(NamedTuple):
    """What a step keeps for its derivatives."""

    content: Any
    size: int
    """Bytes."""


@runtime_checkable
class TrainingStep(Protocol):
    """Steps of s networks, on parameters θ [s p], inputs X [s b c h w] and class probabilities Y [s b classes]."""

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ [s] and g [s p]. `targets` may be classes [s b]."""

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs of any number of steps in the layout that is fastest; `forward` accepts others too."""
        return inputs

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        """g, and what `vjp` needs."""

    def vjp(self, residuals: Residuals, direction: Tensor) -> StepVJP:
        """⟨g, λ⟩ for a `direction` λ, and its derivatives; residuals can be used once."""


class AutogradStep(TrainingStep):
    """Steps by differentiating twice; the residuals are the graph."""

    def __init__(self, network: Network) -> None:
        """Steps of `network`."""
        self._network = network
        self._sizes: dict[tuple[torch.Size, torch.dtype], int] = {}
        """Bytes of a step's residuals, counted once for each kind of input, because counting takes time."""

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            logits = side_by_side(self._network, theta, inputs)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
            loss = losses.unflatten(0, targets.shape[:2]).mean(1)
            return loss.detach(), torch.autograd.grad(loss.sum(), theta)[0]

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        key, sizes = (inputs.shape, inputs.dtype), dict[int, int]()

        def count(saved: Tensor) -> Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved.detach()  # the graph would hold itself otherwise

        counting = torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved)
        with torch.enable_grad(), contextlib.nullcontext() if key in self._sizes else counting:
            leaves = [x.detach().requires_grad_() for x in (theta, inputs, targets)]
            log_p = side_by_side(self._network, leaves[0], leaves[1]).log_softmax(2)
            loss = -(leaves[2] * log_p).sum(2).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaves[0], create_graph=True)
        for leaf in leaves:  # these live without the graph, too
            sizes.pop(leaf.untyped_storage().data_ptr(), None)
        self._sizes.setdefault(key, sum(sizes.values()))
        return gradient.detach(), Residuals((gradient, leaves), self._sizes[key])

    def vjp(self, residuals: Residuals, direction: Tensor) -> StepVJP:
        gradient, leaves = residuals.content
        with torch.enable_grad():
            inner = torch.linalg.vecdot(gradient, direction)
            derivatives = torch.autograd.grad(inner.sum(), leaves)
        return StepVJP(inner.detach(), *derivatives)
