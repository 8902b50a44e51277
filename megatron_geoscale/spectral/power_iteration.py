"""Implicit power iteration on M = A^T B, per head or for the whole layer, distributed by all-reduce (THEORY 2.1).

M is applied as two thin products, v -> A^T (B v), and a key group's d_h-vector is shared by its query heads: neither M
nor expanded keys exist. An estimate is a Rayleigh quotient, so it never exceeds the norm, and a warm vector can lag
behind a jump of the weights: `gram.trace_power_bound` is the certificate (THEORY 2.3). Float64, see `projections`.

Granularity:
- head: the norm of every head. Heads are whole on a rank, so nothing is communicated; MAX over ranks is the caller's.
- layer: ||sum_h A_h^T B_g(h)||, the sum over all heads of all ranks in `group`. It is not a bound for any head: with
  heads (A, B) and (-A, B) it is zero. Each half-iteration all-reduces one d-vector per layer, stacked over the layers.

All functions take one layer (w_q [n_q, d_h, d], w_k [n_kv, d_h, d]) or a stack (w_q [layers, n_q, d_h, d], w_k
likewise); state and sigma have the leading `layers` then, and the number of collectives does not depend on it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_geoscale.spectral.gram import check_shapes

Granularity = Literal["head", "layer"]

CONVERGENCE_TOLERANCE = 1e-6
MAX_STEPS = 2000


def start_vectors(hidden_size: int, *, layer: int, heads: range | None = None) -> Tensor:
    """Unit start vectors, float64 on the CPU: [len(heads), d], or [d] for layer granularity (`heads` None).

    `layer` and `heads` are global numbers and the only seed, so all ranks that hold a head start it alike (THEORY 2.1).
    """

    def draw(seed: int) -> Tensor:
        vector = torch.randn(hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        unit: Tensor = vector / torch.linalg.vector_norm(vector)
        return unit

    base = layer << 20  # room for a million heads per layer
    if heads is None:
        return draw(base)
    return torch.stack([draw(base + 1 + head) for head in heads])


def power_iteration(
    w_q: Tensor,
    w_k: Tensor,
    state: Tensor,
    steps: int,
    *,
    granularity: Granularity,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `steps` iterations from `state`: (sigma, new state), float64 (THEORY 2.1).

    head: state [n_q, d], sigma [n_q]. layer: state [d], sigma 0-dim. With stacked layers both gain a leading dimension.
    `group`: the tensor-parallel group over which a layer's heads are spread (layer granularity), None if they are not.
    sigma is ||M^T u|| for the unit vector u that M made of the last vector. A zero or non-finite M gives a sigma of
    zero or a non-finite one, and keeps the state as it was. ValueError for a wrong shape, granularity or step count.
    """
    if steps < 1:
        raise ValueError(f"Power iteration needs at least one step, got {steps}.")
    layers = _Layers(w_q, w_k, state, granularity, group)
    for _ in range(steps):
        layers.step()
    return layers.result()


def converge(
    w_q: Tensor,
    w_k: Tensor,
    state: Tensor,
    *,
    granularity: Granularity,
    group: dist.ProcessGroup | None = None,
    tolerance: float = CONVERGENCE_TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> tuple[Tensor, Tensor, int]:
    """Iterate until sigma has settled to `tolerance`, relative: (sigma, state, steps taken) (THEORY 2.1).

    For the first call, a load without state and a jump of the weights. Each head (or layer) stops on its own sequence
    of estimates and is then frozen, so its result does not depend on what else is in the batch. The error that is left
    is judged by the geometric rate at which the estimates still grow, not by their last change alone, which is small
    for slow convergence as well. In layer granularity every estimate is made from all-reduced vectors, hence equal
    on all ranks, and so is the decision to stop; in head granularity ranks may stop at different steps, for no
    collective waits.
    """
    layers = _Layers(w_q, w_k, state, granularity, group)
    steps = layers.converge(tolerance, max_steps)
    return *layers.result(), steps


class _Layers:
    """The running iteration: sigma and state of a stack of layers."""

    def __init__(
        self, w_q: Tensor, w_k: Tensor, state: Tensor, granularity: Granularity, group: dist.ProcessGroup | None
    ) -> None:
        if granularity not in ("head", "layer"):
            raise ValueError(f"Granularity must be 'head' or 'layer', got {granularity!r}.")
        self.stacked = w_q.dim() == 4
        if not self.stacked:
            w_q, w_k, state = w_q[None], w_k[None], state[None]
        if w_k.dim() != 4 or w_k.shape[0] != w_q.shape[0]:
            raise ValueError(f"Query and key weights differ in layers: {list(w_q.shape)} and {list(w_k.shape)}.")
        check_shapes(w_q[0], w_k[0])
        self.per_head = granularity == "head"
        expected = (*w_q.shape[: 2 if self.per_head else 1], w_q.shape[-1])
        if state.shape != expected:
            raise ValueError(f"Power-iteration state must have shape {list(expected)}, got {list(state.shape)}.")
        self.w_q, self.w_k, self.group = w_q.detach(), w_k.detach(), group
        self.state = state.to(device=w_q.device, dtype=torch.float64)
        self.sigma = self.state.new_zeros(expected[:-1])

    def step(self, active: Tensor | None = None) -> None:
        """v <- M^T M v / ||.||, of the `active` heads or layers only if given."""
        left, _ = _normalise(self._apply(self.state, transposed=False))
        right, sigma = _normalise(self._apply(left, transposed=True))
        moved = (sigma > 0) & torch.isfinite(sigma)
        if active is not None:
            moved, sigma = moved & active, sigma.where(active, self.sigma)
        self.state, self.sigma = right.where(moved[..., None], self.state), sigma

    def converge(self, tolerance: float, max_steps: int) -> int:
        """Step until every sigma has settled, as the function `converge` says: the steps taken."""
        self.step()
        change = torch.full_like(self.sigma, torch.inf)
        active = self.sigma > 0  # false for zero and for NaN
        steps = 1
        while steps < max_steps and bool(active.any()):
            sigma, previous_change = self.sigma, change
            self.step(active)
            steps += 1
            change = (self.sigma - sigma) / self.sigma
            left = change * change / (previous_change - change)  # of a geometric series with the ratio of the last two
            settled = (change <= tolerance) & (previous_change > change) & (left <= tolerance)
            settled |= change <= 4 * torch.finfo(torch.float64).eps
            active = active & ~settled & torch.isfinite(self.sigma)
        return steps

    def result(self) -> tuple[Tensor, Tensor]:
        return (self.sigma, self.state) if self.stacked else (self.sigma[0], self.state[0])

    def _apply(self, vectors: Tensor, *, transposed: bool) -> Tensor:
        """M v, or M^T v, for every layer: one all-reduce for all of them in layer granularity, else none."""
        product = _head_product if self.per_head else _layer_product
        layers = zip(self.w_q, self.w_k, vectors, strict=True)  # one layer at a time: one float64 copy at a time
        result = torch.stack([product(w_q.double(), w_k.double(), v, transposed) for w_q, w_k, v in layers])
        if not self.per_head and self.group is not None:
            dist.all_reduce(result, group=self.group)
        return result


def _head_product(w_q: Tensor, w_k: Tensor, vectors: Tensor, transposed: bool) -> Tensor:
    """A_h^T (B_g v_h), or B_g^T (A_h v_h): vectors [n_q, d] -> [n_q, d]. Keys are shared by reshaping, not expanded."""
    n_q, d = vectors.shape
    n_kv, d_h, _ = w_k.shape
    if transposed:
        inner = w_q @ vectors[:, :, None]
        return (inner.view(n_kv, n_q // n_kv, d_h) @ w_k).view(n_q, d)
    inner = vectors.view(n_kv, n_q // n_kv, d) @ w_k.mT
    return (inner.view(n_q, 1, d_h) @ w_q).view(n_q, d)


def _layer_product(w_q: Tensor, w_k: Tensor, vector: Tensor, transposed: bool) -> Tensor:
    """sum_h A_h^T (B_g(h) v), or sum_h B_g(h)^T (A_h v): vector [d] -> [d], this rank's heads only."""
    n_kv, d_h, d = w_k.shape
    if transposed:
        inner = (w_q.reshape(-1, d) @ vector).view(n_kv, -1, d_h).sum(1)
        return inner.reshape(-1) @ w_k.reshape(-1, d)
    inner = (w_k.reshape(-1, d) @ vector).view(n_kv, 1, d_h).expand(-1, w_q.shape[0] // n_kv, -1)
    return inner.reshape(-1) @ w_q.reshape(-1, d)


def _normalise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(vectors, dim=-1)
    return vectors / norm.where(norm > 0, torch.ones_like(norm))[..., None], norm
