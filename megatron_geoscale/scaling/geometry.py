"""The constants of one attention layer that its bounds and scales depend on, apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_geoscale.spectral.projections import input_norm_bound


@dataclass(frozen=True)
class AttentionGeometry:
    """Shapes of the whole layer (not of a rank's share) and how it computes. Layers of equal geometry are bounded
    together. Made from a Megatron module (`scaling.layers`) or from a checkpoint's configuration."""

    hidden_size: int
    num_heads: int
    """Query heads."""
    num_groups: int
    """Key and value heads."""
    head_dim: int
    """Of queries and keys; `value_dim` of values, where it is another."""
    softmax_scale: float
    """What q.k is multiplied by before it is stored; see `logit_multiplier`."""
    max_sequence_length: int
    rotary_dim: int = 0
    """How many of the head's dimensions RoPE rotates."""
    rotary_interleaved: bool = False
    rotary_scale: float = 1.0
    """What RoPE's cosines and sines are multiplied by: YaRN's mscale (THEORY 3)."""
    logit_multiplier: float = 1.0
    """What stored logits are multiplied by inside the softmax: the layer number under query-key layer scaling."""
    dropout: float = 0.0
    """Of the attention probabilities."""
    unit_roundoff: float = 2.0**-24
    """Of the arithmetic that makes Q, K and V."""
    fp8_projection: bool = False
    """Whether the matrix product that makes Q, K and V casts its inputs and weights to FP8 itself."""
    latent: bool = False
    """Multi-latent attention (THEORY 3): the first `rotary_dim` rows of a key have another input than the others, and
    `hidden_size` is the longest input of a projection. The radius of each input is part of its projection."""
    value_dim: int | None = None

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key and value."""
        return self.num_heads // self.num_groups

    @property
    def input_norm(self) -> float:
        """Radius of the inputs of the folded projections."""
        return 1.0 if self.latent else input_norm_bound(self.hidden_size)

    @property
    def widest_vector(self) -> int:
        """Entries of the longest of a query, a key and a value."""
        return max(self.head_dim, self.value_dim or 0)
