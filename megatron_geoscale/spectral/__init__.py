"""Norms of the attention weights: pure functions of tensors, no Megatron, no global state (THEORY 1 and 2)."""

from megatron_geoscale.spectral.gram import certified_norm, gram, gram_norm, spectral_norm, trace_power_bound
from megatron_geoscale.spectral.power_iteration import converge, power_iteration, start_vectors
from megatron_geoscale.spectral.projections import Projections, fold_norm, input_norm_bound, split_linear_qkv

__all__ = [
    "Projections",
    "certified_norm",
    "converge",
    "fold_norm",
    "gram",
    "gram_norm",
    "input_norm_bound",
    "power_iteration",
    "spectral_norm",
    "split_linear_qkv",
    "start_vectors",
    "trace_power_bound",
]
