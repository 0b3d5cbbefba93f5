"""One step of training, and what becomes of its gradient when the parameters move: all the arithmetic that takes time.

A step has the gradient g = ∇_θ ℓ(θ; X, Y), where ℓ is the cross-entropy with class probabilities, mean over the batch.
Training needs g alone. Walking back over a student (`cddlib.matching`) needs, for a direction λ, the scalar ⟨g, λ⟩ and
its derivatives with respect to θ, X and Y. They are the derivatives of ℓ and of its gradients along λ::

    ⟨g, λ⟩ = d/dε ℓ      (∂g/∂θ)ᵀ λ = d/dε ∇_θ ℓ      (∂g/∂X)ᵀ λ = d/dε ∇_X ℓ      at θ + ελ, ε = 0

`AutogradStep` finds them for every network, by differentiating ⟨g, λ⟩; `convnet_step` has them written out for the field's
usual ConvNet, and `engine` chooses. What a step must remember for its derivatives, its memory, can be kept or computed
again: to the same bits.

Several networks of one kind take a step each, side by side: with parameters, a batch and a direction of its own.
"""

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
    """How the usual ConvNet (instance norm, ReLU, average pooling) is computed in training; others ignore it."""

    precision: Literal["float32", "ieee", "bfloat16"] = "float32"
    """Of what convolutions take and give; all else is float32. A GPU's convolutions round float32 to TF32 before they
    multiply, unless precision is ieee; on a CPU the two are the same."""
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
    """What a step remembers for its derivatives."""

    content: Any
    size: int
    """Bytes."""


@runtime_checkable
class TrainingStep(Protocol):
    """Steps of s networks, on parameters θ [s p], inputs X [s b c h w] and class probabilities Y [s b classes]."""

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ [s] and g [s p]. `targets` may be classes [s b]."""

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs as steps take them fastest, those of many steps at once; `forward` accepts others too."""

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        """g, and what `vjp` needs."""

    def vjp(self, memory: Residuals, direction: Tensor) -> StepVJP:
        """⟨g, λ⟩ for a `direction` λ, and its derivatives; a memory serves once."""


class AutogradStep:
    """Steps by differentiating twice; the memory is the graph."""

    def __init__(self, network: Network) -> None:
        """Steps of `network`."""
        self._network = network
        self._sizes: dict[torch.Size, int] = {}

    def gradient(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `TrainingStep`."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            logits = side_by_side(self._network, theta, inputs)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
            loss = losses.unflatten(0, targets.shape[:2]).mean(1)
            return loss.detach(), torch.autograd.grad(loss.sum(), theta)[0]

    def prepared(self, inputs: Tensor) -> Tensor:
        """See `TrainingStep`."""
        return inputs

    def forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        """See `TrainingStep`."""
        if inputs.shape in self._sizes:
            return self._forward(theta, inputs, targets)
        storages: dict[int, int] = {}

        def count(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved.detach()  # the graph would hold itself otherwise

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            gradient, memory = self._forward(theta, inputs, targets)
        self._sizes[inputs.shape] = sum(storages.values())
        return gradient, memory._replace(size=self._sizes[inputs.shape])

    def _forward(self, theta: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Residuals]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (theta, inputs, targets)]
            log_p = side_by_side(self._network, leaves[0], leaves[1]).log_softmax(2)
            loss = -(leaves[2] * log_p).sum(2).mean(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaves[0], create_graph=True)
        return gradient.detach(), Residuals((gradient, leaves), self._sizes.get(inputs.shape, 0))

    def vjp(self, memory: Residuals, direction: Tensor) -> StepVJP:
        """See `TrainingStep`."""
        gradient, leaves = memory.content
        with torch.enable_grad():
            inner = torch.linalg.vecdot(gradient, direction)
            derivatives = torch.autograd.grad(inner.sum(), leaves)
        return StepVJP(inner.detach(), *derivatives)
