"""Stops every rank with one and the same sentence when attention weights are not finite.

A rank that finds a NaN cannot simply raise: the others would wait for it in the next collective. So the finding is
coded into one number that travels with the refresh's only all-reduce; after it, every rank of the job knows the
layer, the head and the matrix, and raises.
"""

from __future__ import annotations

import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.spectral.projections import Projections

MATRICES = ("W_Q", "W_K", "W_V", "q_layernorm", "k_layernorm")
_MAX_HEADS = 1 << 20


class NonFiniteWeightsError(RuntimeError):
    """Attention weights, their norm gain or their bias hold NaN or Inf; raised on every rank alike."""


def find_nonfinite(
    projections: Projections,
    head_norms: tuple[HeadNorm, HeadNorm] | None = None,
    *,
    first_head: int,
    heads_per_group: int,
) -> int:
    """Code of the first non-finite folded projection or QK-norm, 0 when all are finite.

    A key or value matrix is reported under the first query head of its group, a norm under the rank's first head. One
    host synchronisation a matrix.
    """
    matrices = (
        (projections.q, projections.q_bias, 1),
        (projections.k, projections.k_bias, heads_per_group),
        (projections.v, projections.v_bias, heads_per_group),
    )
    for matrix, (weight, bias, heads_per_matrix) in enumerate(matrices):
        # float64 sums of float32 products cannot overflow: such a sum is finite exactly when every term is.
        finite = weight.sum(dim=(-2, -1)).isfinite()
        if bias is not None:
            finite &= bias.sum(dim=-1).isfinite()
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0, 0])
            head = first_head + index * heads_per_matrix
            return 1 + matrix * _MAX_HEADS + head - head % heads_per_matrix
    for matrix, norm in enumerate(head_norms or (), start=len(matrices)):
        shift = norm.gain if norm.shift is None else norm.shift
        if not bool((norm.gain.isfinite() & shift.isfinite()).all()):
            return 1 + matrix * _MAX_HEADS + first_head
    return 0


def raise_if_nonfinite(codes: torch.Tensor) -> None:
    """Raise NonFiniteWeightsError if any layer has a code. codes: [num_layers], one `find_nonfinite` a layer."""
    found = codes.nonzero()
    if found.numel() == 0:
        return
    layer = int(found[0, 0])
    matrix, head = divmod(int(codes[layer]) - 1, _MAX_HEADS)
    raise NonFiniteWeightsError(
        f"non-finite attention weights in layer {layer + 1}, head {head}, {MATRICES[matrix]} "
        "(with its norm gain and bias folded in): no FP8 scale can be made from them, training stops before the "
        "forward pass"
    )
