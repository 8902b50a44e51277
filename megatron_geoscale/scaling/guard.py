"""Stops every rank with one and the same sentence when attention weights are not finite.

A rank that finds a NaN cannot simply raise: the others would wait for it in the next collective. So the finding is
coded into one number that travels with the refresh's only all-reduce; after it, every rank of the job knows the
layer, the head and the matrix, and raises.
"""

from __future__ import annotations

import torch

from megatron_geoscale.bounds.qk_norm import HeadNorm
from megatron_geoscale.spectral.gram import trace
from megatron_geoscale.spectral.moments import Moments

MATRICES = ("W_Q", "W_K", "W_V", "q_layernorm", "k_layernorm")
_MAX_HEADS = 1 << 20


class NonFiniteWeightsError(RuntimeError):
    """Attention weights, their norm gain or their bias hold NaN or Inf; raised on every rank alike."""


def find_nonfinite(
    moments: Moments,
    head_norms: tuple[HeadNorm, HeadNorm] | None,
    *,
    num_layers: int,
    first_head: int,
    heads_per_group: int,
) -> torch.Tensor:
    """Code of each layer's first non-finite folded projection or QK-norm, 0 where all are finite: [num_layers] float64.

    moments: of `num_layers` layers of equal shape. Entries of a Gram matrix cannot overflow float64, so its trace is
    finite exactly when every weight is. A key or value matrix is reported under the first query head of its group, a
    norm under the rank's first head. Stays on the device.
    """
    codes = moments.q.new_zeros(num_layers)
    matrices = (
        (moments.q, moments.q_bias, 1),
        (moments.k, moments.k_bias, heads_per_group),
        (moments.v, moments.v_bias, heads_per_group),
    )
    for matrix, (gram, bias, heads_per_matrix) in enumerate(matrices):
        bad = ~trace(gram).isfinite()
        if bias is not None:
            bad |= ~bias.sum(dim=-1).isfinite()
        bad = bad.view(num_layers, -1)
        head = first_head + bad.int().argmax(dim=1) * heads_per_matrix  # argmax: the first of equals
        code = 1.0 + matrix * _MAX_HEADS + (head - head % heads_per_matrix)
        codes = torch.where((codes == 0) & bad.any(dim=1), code.to(codes.dtype), codes)
    for matrix, norm in enumerate(head_norms or (), start=len(matrices)):
        shift = norm.gain if norm.shift is None else norm.shift
        bad = ~(norm.gain.isfinite() & shift.isfinite()).all(dim=-1)
        codes = torch.where((codes == 0) & bad, 1.0 + matrix * _MAX_HEADS + first_head, codes)
    return codes


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


class DeferredCheck:
    """`raise_if_nonfinite` of the codes of now, for a host that runs ahead of the device: it waits, when it asks, until
    the device has passed this point, not until it has nothing left to do."""

    def __init__(self, codes: torch.Tensor) -> None:
        self._codes = codes.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def ask(self) -> None:
        """Raise NonFiniteWeightsError if any layer has a code."""
        self._copied.synchronize()
        raise_if_nonfinite(self._codes)
