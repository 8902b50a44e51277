"""sigma, the norm of a layer's query-key interaction, by the estimator and granularity of the config (THEORY 2).

`gram` needs no state. `power` keeps one vector a head (or one a layer), takes one warm step a refresh, and converges
to a tolerance where a warm step cannot be trusted: at first, after a load that brought no vectors, and when the
estimate moved by more than `JUMP` since the last refresh. The layer form is a sum over tensor-parallel ranks with no
Gram matrix of bounded size, so under `gram` it is iterated to convergence at every refresh instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.layers import AttentionLayer
from megatron_geoscale.spectral.gram import gram_norm
from megatron_geoscale.spectral.power_iteration import converge, power_iteration, start_vectors
from megatron_geoscale.spectral.projections import Projections

JUMP = 0.1
"""Relative change of an estimate between two refreshes above which a warm step is not trusted. A warm step tracks
an optimizer's small updates; a learning-rate spike or a load moves the estimate by more."""


class SigmaEstimator:
    """sigma of each of `layers`; the power estimator's vectors are its state."""

    def __init__(self, layers: Sequence[AttentionLayer], config: GeoScaleConfig) -> None:
        self.layers = list(layers)
        self.power = config.estimator == "power"
        self.per_head = config.granularity == "head"
        self.vectors: dict[int, torch.Tensor] = {}
        """By global layer number: float64 [local heads, d], or [d] under layer granularity."""
        self.previous: dict[int, torch.Tensor] = {}
        """By global layer number: the last estimates, [local heads] or 0-dim."""

    def begin(self) -> dict[int, torch.Tensor]:
        """Layer granularity: sigma of every layer of the rank, 0-dim each, by layer number; the collectives are
        shared by all layers. Head granularity: empty, `head_sigma` does the work without collectives."""
        if self.per_head:
            return {}
        projections = [layer.projections() for layer in self.layers]
        w_q = torch.stack([p.q for p in projections])
        w_k = torch.stack([p.k for p in projections])
        sigma = self._iterate([layer.number for layer in self.layers], w_q, w_k)
        return {layer.number: s for layer, s in zip(self.layers, sigma, strict=True)}

    def head_sigma(
        self, layer: AttentionLayer, projections: Projections, grams: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """sigma of each of the rank's heads, [n_q]; `grams`: those of its queries and keys."""
        if not self.power:
            return gram_norm(projections.q, projections.k, grams=grams)
        return self._iterate([layer.number], projections.q[None], projections.k[None])[0]

    def _iterate(self, numbers: list[int], w_q: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
        """One warm step for layers `numbers`, stacked, or convergence where the step is not to be trusted."""
        granularity = "head" if self.per_head else "layer"
        group = None if self.per_head else self.layers[0].tp_group
        warm = self.power and all(number in self.vectors for number in numbers)
        if warm:
            state = torch.stack([self.vectors[number] for number in numbers])
            sigma, state = power_iteration(w_q, w_k, state, 1, granularity=granularity, group=group)
            before = torch.stack([self.previous[number] for number in numbers])
            warm = bool(((sigma - before).abs() <= JUMP * before).all())
        else:
            state = torch.stack([self._start(layer) for layer in self.layers if layer.number in numbers])
        if not warm:
            sigma, state, _ = converge(w_q, w_k, state, granularity=granularity, group=group)
        for number, vector, estimate in zip(numbers, state, sigma, strict=True):
            self.vectors[number], self.previous[number] = vector, estimate
        return sigma

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
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
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
