"""sigma, the norm of a layer's query-key interaction, by the estimator and granularity of the config (THEORY 2).

`gram` needs no state. `power` keeps one vector a head (or one a layer) and takes one warm step a refresh. It converges
to a tolerance where a warm step cannot be trusted: at first, after a load that brought no vectors, when an estimate
moved by more than `JUMP` since the last refresh, and when the certificate of THEORY 2.3 proves it too small, which is
how a jump orthogonal to the vector shows. The layer form is a sum over tensor-parallel ranks with no Gram matrix of
bounded size: it has no certificate, and under `gram` it is iterated to convergence at every refresh instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.layers import AttentionLayer
from megatron_geoscale.spectral.gram import norm_of_grams, trace_power_interval
from megatron_geoscale.spectral.moments import Moments
from megatron_geoscale.spectral.power_iteration import converge, power_iteration, start_vectors
from megatron_geoscale.spectral.projections import Projections

JUMP = 0.1
"""Relative change of an estimate between two refreshes above which a warm step is not trusted. A warm step tracks
an optimizer's small updates; a learning-rate spike or a load moves the estimate by more."""
CERTIFICATE_POWER = 32
"""m of THEORY 2.3: the certificate's lower end is at most 8 % below the norm of a head of rank 128."""
LAG = 1e-3
"""How far, relative, an estimate may stay below the certificate's lower end: more than a converged one's error."""


class SigmaEstimator:
    """sigma of each of `layers`; the power estimator's vectors are its state.

    For a batch of layers of equal shape call `look` with each one's projections, then `sigma` once.
    """

    def __init__(self, layers: Sequence[AttentionLayer], config: GeoScaleConfig, *, share: int = 0) -> None:
        """`share`: the data-parallel rank whose state of these layers is the checkpoint's."""
        self.layers, self._share = list(layers), share
        self.power = config.estimator == "power"
        self.per_head = config.granularity == "head"
        self.vectors: dict[int, torch.Tensor] = {}
        """By global layer number: float64 [local heads, d], or [d] under layer granularity."""
        self.previous: dict[int, torch.Tensor] = {}
        """By global layer number: the last estimates, [local heads] or 0-dim."""
        self._untrusted: dict[int, torch.Tensor] = {}
        """Heads whose last warm step moved too far, bool [local heads]; of the layers of the running batch."""

    def begin(self) -> None:
        """Layer granularity: estimate every layer of the rank; the collectives are shared by all layers. One host
        synchronisation under `power`."""
        if self.per_head or not self.layers:
            return
        projections = [layer.projections() for layer in self.layers]
        w_q, w_k = torch.stack([p.q for p in projections]), torch.stack([p.k for p in projections])
        numbers = [layer.number for layer in self.layers]
        options: dict[str, Any] = {"granularity": "layer", "group": self.layers[0].tp_group}
        warm = self.power and all(number in self.vectors for number in numbers)
        if warm:
            state = torch.stack([self.vectors[number] for number in numbers])
            sigma, state = power_iteration(w_q, w_k, state, 1, **options)
            warm = not bool(_jumped(sigma, torch.stack([self.previous[number] for number in numbers])).any())
        else:
            state = torch.stack([self._start(layer) for layer in self.layers])
        if not warm:
            sigma, state, _ = converge(w_q, w_k, state, **options)
        for number, vector, estimate in zip(numbers, state, sigma, strict=True):
            self.vectors[number], self.previous[number] = vector, estimate

    def look(self, layer: AttentionLayer, p: Projections) -> None:
        """Take the warm step of one layer, or its first estimate. No collective."""
        if not (self.power and self.per_head):
            return
        number = layer.number
        if number not in self.vectors:
            self.previous[number], self.vectors[number], _ = converge(
                p.q, p.k, self._start(layer), granularity="head"
            )
            return
        sigma, self.vectors[number] = power_iteration(p.q, p.k, self.vectors[number], 1, granularity="head")
        self._untrusted[number] = _jumped(sigma, self.previous[number])
        self.previous[number] = sigma

    def sigma(self, layers: Sequence[AttentionLayer], moments: Moments) -> torch.Tensor:
        """sigma of the heads of `layers`, whose `moments` are joined: [n_q] float64, a layer's value for each of its
        heads under layer granularity. Under `power` one host synchronisation: whether to converge again."""
        if self.per_head and not self.power:
            return norm_of_grams(moments.q, moments.k)
        if not self.per_head:
            return torch.cat([self.previous[layer.number].expand(layer.num_local_heads) for layer in layers])
        self._converge_again(layers, moments)
        return torch.cat([self.previous[layer.number] for layer in layers])

    def _converge_again(self, layers: Sequence[AttentionLayer], moments: Moments) -> None:
        """Restart the heads whose estimate the certificate disproves, and iterate those and the jumped ones."""
        lower, _ = trace_power_interval(moments.q, moments.k, power=CERTIFICATE_POWER)
        proven = lower.view(len(layers), -1)
        lagging = torch.stack([self.previous[layer.number] for layer in layers]) < (1.0 - LAG) * proven
        moved = [self._untrusted.pop(layer.number, torch.zeros_like(lag)) for layer, lag in zip(layers, lagging)]
        untrusted = lagging | torch.stack(moved)
        concerned = untrusted.any(dim=1)
        if layers[0].ranks_per_group > 1:  # `projections` is a collective then: all ranks of the group, or none
            either = concerned.int()
            dist.all_reduce(either, op=dist.ReduceOp.MAX, group=layers[0].tp_group)
            concerned = either > 0
        for index, again in enumerate(concerned.tolist()):
            if not again:
                continue
            layer, number = layers[index], layers[index].number
            p = layer.projections()
            vectors = self._start(layer).where(lagging[index][:, None], self.vectors[number])
            sigma, vectors, _ = converge(p.q, p.k, vectors, granularity="head")
            heads = untrusted[index]
            self.vectors[number] = vectors.where(heads[:, None], self.vectors[number])
            self.previous[number] = sigma.where(heads, self.previous[number])

    def _start(self, layer: AttentionLayer) -> torch.Tensor:
        heads = range(layer.first_head, layer.first_head + layer.num_local_heads) if self.per_head else None
        return start_vectors(layer.hidden_size, layer=layer.number, heads=heads).to(layer.device)

    def sharded_state_dict(self) -> dict[str, Any]:
        """The power iteration's vectors and estimates for dist_checkpointing, empty under `gram`.

        Per-head state is sharded over tensor-parallel ranks and reshards with them; per-layer state is replicated.
        """
        if not self.power:
            return {}
        state: dict[str, Any] = {}
        # Replica 0 is saved: the rank that keeps these layers' state.
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        replica = (parallel_state.get_data_parallel_rank(with_context_parallel=True) - self._share) % ranks
        for layer in self.layers:
            tp_rank, tp_size = layer.tp_group.rank(), layer.tp_group.size()
            vector = self.vectors.get(layer.number)
            if vector is None:  # loading: the tensor to load into
                vector = torch.zeros_like(self._start(layer))
            estimate = self.previous.get(layer.number, vector.new_zeros(vector.shape[:-1]))
            offsets = ((0, tp_rank, tp_size),) if self.per_head else ()
            replica_id = (0 if self.per_head else tp_rank, replica)
            for name, tensor in (("vectors", vector), ("estimates", estimate)):
                key = f"geoscale.power_iteration.layer_{layer.number}.{name}"
                state[key] = ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica_id)
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `sharded_state_dict` saved: the next refresh is one warm step, as if nothing had stopped."""
        if not self.power:
            return
        for layer in self.layers:
            prefix = f"geoscale.power_iteration.layer_{layer.number}."
            if not state[prefix + "vectors"].any():  # saved before the first refresh: there was nothing to save
                continue
            self.vectors[layer.number] = state[prefix + "vectors"]
            self.previous[layer.number] = state[prefix + "estimates"]


def _jumped(sigma: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return ~((sigma - before).abs() <= JUMP * before)
