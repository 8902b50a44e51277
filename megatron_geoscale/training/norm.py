"""LayerNorm and RMSNorm for the local layer spec; Transformer Engine's layer spec has its own, fused.

megatron-core takes NVIDIA Apex's fused LayerNorm where it finds it. Its fallback, and its only local RMSNorm,
`WrappedTorchNorm`, refuses sequence parallelism and zero-centred gamma. `TorchNorm` has both, so the local layer spec
trains wherever torch does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class TorchNorm(torch.nn.Module):
    """What `config.normalization` says, LayerNorm or RMSNorm, over the last dimension.

    Parameters `weight` and, for LayerNorm, `bias`, both [hidden_size] in `config.params_dtype`. With
    `config.layernorm_zero_centered_gamma` the gain is `1 + weight`. Both carry `sequence_parallel`: each rank then sees
    some of the tokens, and megatron-core's `finalize_model_grads` sums the gradients of parameters so marked over
    tensor parallelism. Constructor arguments are those with which megatron-core builds a norm from a layer spec.

    Raises ValueError for a normalization that is neither.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"--normalization {config.normalization}: choose LayerNorm or RMSNorm.")
        self.shape, self.eps = (hidden_size,), eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        gain = torch.full(self.shape, 0.0 if self.zero_centered else 1.0, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(gain)
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size], any float dtype -> the same shape and dtype; computed in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 sums of squares are good to 1 in 256 only
        weight = self.weight.to(dtype) + 1 if self.zero_centered else self.weight.to(dtype)
        if self.bias is None:
            return F.rms_norm(x.to(dtype), self.shape, weight, self.eps).to(x.dtype)
        return F.layer_norm(x.to(dtype), self.shape, weight, self.bias.to(dtype), self.eps).to(x.dtype)


def has_apex_norm() -> bool:
    """Whether NVIDIA Apex's fused LayerNorm is there, with its kernel."""
    from megatron.core.fusions.fused_layer_norm import HAVE_FUSED_LAYER_NORM

    return HAVE_FUSED_LAYER_NORM and importlib.util.find_spec("fused_layer_norm_cuda") is not None


def local_norm(normalization: str) -> type[torch.nn.Module]:
    """The fastest norm of the local layer spec here: Apex's LayerNorm on a GPU that has it, else TorchNorm."""
    if normalization == "LayerNorm" and torch.cuda.is_available() and has_apex_norm():
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return TorchNorm


def use_local_norm(block: TransformerBlockSubmodules, normalization: str) -> TransformerBlockSubmodules:
    """Put `local_norm` for every norm of `block`, as `use_torch_norm` does."""
    return _use(local_norm(normalization), block)


def use_torch_norm(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Put TorchNorm for every norm of `block`, in place: input, pre-MLP, query, key and final norm.

    `block` is what megatron-core's `get_gpt_decoder_block_spec(config, use_transformer_engine=False)` returns. A norm
    that the spec leaves out (IdentityOp) stays out, and L2Norm, which has no parameters, stays what it is.
    """
    return _use(TorchNorm, block)


def _use(norm: type[torch.nn.Module], block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    block.layer_norm = norm
    for layer in block.layer_specs:
        _replace_norms(norm, layer.submodules)
    return block


def _replace_norms(norm: type[torch.nn.Module], submodules: Any) -> None:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.torch_norm import L2Norm

    for field in dataclasses.fields(submodules):
        value = getattr(submodules, field.name)
        if field.name.endswith("layernorm"):
            if value not in (None, IdentityOp, L2Norm):
                setattr(submodules, field.name, norm)
        elif dataclasses.is_dataclass(getattr(value, "submodules", None)):
            _replace_norms(norm, value.submodules)
