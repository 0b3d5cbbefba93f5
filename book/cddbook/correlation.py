"""How matching one segment changes the others: functions of what was measured of *probes*, a fixed set of segments.

In every matrix the row is the segment that is matched and the column the one that is measured::

    pearson             correlation of two segments' losses while one of them is matched: the paper's figure, as
                        reviews describe it. Losses that fall for a common reason correlate too
    between_draws       cosines between the segments' gradients: −1 is conflict, +1 agreement
    predicted_transfer  what a step on one segment takes off another's loss, relative to it (Fifty et al. 2021)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

Matrix = Float[np.ndarray, "matched measured"]
Matrices = Float[np.ndarray, "*replicates matched measured"]
Curves = Float[np.ndarray, "*replicates matched times measured"]
Pairs = Bool[np.ndarray, "matched measured"]
Shares = Float[np.ndarray, "*replicates"]


def pearson(curves: Curves) -> Matrices:
    """C_ij = corr(L_i, L_j) over the times of the run that matched i; nan where a curve is constant.

    `curves[..., i, s, j]` is the loss of segment j at time s of the run that matched segment i.
    """
    moving = np.where(np.ptp(curves, axis=-2, keepdims=True) > 0, curves, np.nan)
    centred = moving - moving.mean(axis=-2, keepdims=True)
    own = np.einsum("...isi->...is", centred)
    norms = np.linalg.norm(own, axis=-1)[..., None] * np.linalg.norm(centred, axis=-2)
    return np.asarray(np.einsum("...is,...isj->...ij", own, centred) / norms)


def between_draws(products: Float[np.ndarray, "n n"]) -> Matrix:
    """Cosines between segment i's gradient by one student and segment j's by another, from 2P x 2P inner products.

    The diagonal is the noise ceiling: what the cosine of a segment with itself comes to, given how much two students
    on the same segment differ. Symmetric: both orders are averaged.
    """
    count, lengths = len(products) // 2, np.sqrt(np.diagonal(products))
    across = (products / np.outer(lengths, lengths))[:count, count:]
    return (across + across.T) / 2


def predicted_transfer(similarity: dict[str, Any], rates: Mapping[str, float]) -> Matrix:
    """Z_ij to first order, Σ_v η_v ⟨g_i,v, g_j,v⟩ / L_j, from what `ProbeHook.gradient_similarity` returned."""
    count = len(similarity["losses"])
    inner = sum(rate * np.asarray(similarity["products"][name])[:count, :count] for name, rate in rates.items())
    return np.asarray(inner) / np.asarray(similarity["losses"])


def off_diagonal(matrices: Matrices) -> Float[np.ndarray, "*replicates pairs"]:
    """The entries off the diagonal, row by row."""
    return matrices[..., ~np.eye(matrices.shape[-1], dtype=bool)]


def negative_shares(matrices: Matrices, below: Pairs) -> tuple[Shares, Shares]:
    """Share of negative entries among some pairs `below` the diagonal (a later segment matched, an earlier one
    measured), and among their mirror images above it."""
    return (matrices[..., below] < 0).mean(axis=-1), (matrices[..., below.T] < 0).mean(axis=-1)


def holm(p_values: Sequence[float] | np.ndarray) -> Matrix:
    """P-values of a test for each pair off the diagonal, row by row, corrected (Holm 1979); 1 on the diagonal."""
    values, order = np.asarray(p_values), np.argsort(p_values)
    scaled = values[order] * np.arange(len(values), 0, -1)
    corrected = np.ones([math.isqrt(len(values)) + 1] * 2)
    corrected[~np.eye(len(corrected), dtype=bool)] = np.minimum(np.maximum.accumulate(scaled), 1)[np.argsort(order)]
    return corrected
