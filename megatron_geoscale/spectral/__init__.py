"""Norms of the attention weights: pure functions of tensors, no Megatron, no global state (THEORY 1 and 2)."""

from megatron_geoscale.spectral.gram import certified_norm, gram, gram_norm, spectral_norm, trace_power_bound
from megatron_geoscale.spectral.moments import Moments
from megatron_geoscale.spectral.power_iteration import converge, power_iteration, start_vectors
from megatron_geoscale.spectral.projections import Projections, fold_norm, input_norm_bound, split_linear_qkv
from megatron_geoscale.spectral.sharded import FlatShard, sharded_converge, sharded_power_iteration
from megatron_geoscale.spectral.sharded_gram import all_reduced_gram, row_sharded_grams, row_sharded_norm_bound

__all__ = [
    "FlatShard",
    "Moments",
    "Projections",
    "all_reduced_gram",
    "certified_norm",
    "converge",
    "fold_norm",
    "gram",
    "gram_norm",
    "input_norm_bound",
    "power_iteration",
    "row_sharded_grams",
    "row_sharded_norm_bound",
    "sharded_converge",
    "sharded_power_iteration",
    "spectral_norm",
    "split_linear_qkv",
    "start_vectors",
    "trace_power_bound",
]
