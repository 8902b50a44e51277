"""From norms to bounds: logits, entries of Q, K and V, and alpha (THEORY 3, 4 and 5.1). Pure functions of tensors."""

from megatron_geoscale.bounds import alpha
from megatron_geoscale.bounds.logits import certified_logit_bound, isotropic_logit_bound
from megatron_geoscale.bounds.rotary import rotary_norm_bound
from megatron_geoscale.bounds.tensors import entry_bound, isotropic_input_norm, rounding_allowance, vector_norm_bound

__all__ = [
    "alpha",
    "certified_logit_bound",
    "entry_bound",
    "isotropic_input_norm",
    "isotropic_logit_bound",
    "rotary_norm_bound",
    "rounding_allowance",
    "vector_norm_bound",
]
