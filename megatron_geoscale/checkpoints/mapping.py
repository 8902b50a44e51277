"""Which tensors of a Hugging Face checkpoint make up which part of Megatron's, in both directions.

Nothing is computed here: rows are reordered, transposed or padded, so a tensor comes back bit by bit. Megatron stacks
the layers, tensor [num_layers, ...]; a `Part` is one layer's share, and of a gated MLP's first matrix one half. The
names are those of megatron-core's torch_dist checkpoints, the same for every tensor- and pipeline-parallel layout.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_geoscale.checkpoints.families import Experts, Family, Stored
from megatron_geoscale.spectral.projections import split_linear_qkv

Merge = Callable[[Sequence[torch.Tensor]], torch.Tensor]
Split = Callable[[torch.Tensor], Sequence[torch.Tensor]]

def extra_states(family: Family) -> list[str]:
    """Keys of what megatron-core saves for every linear layer beside the tensors, and asks for when it loads: None."""
    linear, layers = ["self_attention.linear_qkv", "self_attention.linear_proj"], family.num_layers
    linear += [] if family.experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = [f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in linear for i in range(layers)]
    for name in ("linear_fc1", "linear_fc2") if family.experts else ():
        count = family.experts.count
        keys += [f"{_EXPERTS}.{name}._extra_state/shard_{i}.{expert}_{layers}.{count}"
                 for i in range(layers) for expert in range(count)]
    return keys


_EXPERTS = "decoder.layers.mlp.experts.experts"
"""Of a SequentialMLP and of a TEGroupedMLP alike."""


@dataclass(frozen=True)
class Part:
    """A rectangle of one of Megatron's tensors, and what it is made of."""

    key: str
    shape: tuple[int, ...]
    """Of Megatron's whole tensor, all layers."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the rectangle, which begins at `offsets`; 1 along the layers."""
    sources: tuple[Stored, ...]
    """Hugging Face's tensors."""
    merge: Merge
    """Tensors as in `sources` -> one with as many elements as `sizes`, in its order."""
    split: Split
    """The inverse, from [sizes] without what is stacked."""
    stacked: int
    """Leading dimensions of size 1 that the merged tensor lacks: layers, and single experts."""

    def to_megatron(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """[sizes], contiguous, from tensors as in `sources`, all of one dtype, which is kept."""
        return self.merge(tensors).contiguous().view(self.sizes)

    def to_huggingface(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Contiguous tensors as in `sources` from [sizes]; those that are cut off the front share its memory."""
        return [piece.contiguous() for piece in self.split(tensor.view(self.sizes[self.stacked :]))]


def model_parts(
    family: Family, *, padded_vocab_size: int, prefix: str, fused_experts: bool = False
) -> Iterator[Part]:
    """All parts of a model, in the order of its layers.

    `padded_vocab_size`: rows of Megatron's embedding, those beyond `family.vocab_size` zero. `prefix` as
    `Family.prefix`. `fused_experts`: as in `has_fused_experts`.
    """
    names = _GPT2_NAMES if family.is_fused else _LLAMA_NAMES
    vocab = _padding(family.vocab_size, padded_vocab_size)
    d, rows = family.hidden_size, (family.vocab_size, padded_vocab_size)
    embedding = Stored(f"{prefix}{names['embedding']}.weight", (rows[0], d))
    yield _whole("embedding.word_embeddings.weight", (rows[1], d), embedding, *vocab)
    if family.rope is None:
        shape = (family.max_positions, d)
        yield _whole("embedding.position_embeddings.weight", shape, Stored(f"{prefix}wpe.weight", shape))
    for number in range(1, family.num_layers + 1):
        yield from _Layer(family, number, prefix, fused_experts).parts()
    for kind in ("weight", "bias")[: 2 if family.norm == "LayerNorm" else 1]:
        yield _whole(f"decoder.final_layernorm.{kind}", (d,), Stored(f"{prefix}{names['norm']}.{kind}", (d,)))
    if not family.tied_embeddings:
        yield _whole("output_layer.weight", (rows[1], d), Stored("lm_head.weight", (rows[0], d)), *vocab)


_GPT2_NAMES = {"embedding": "wte", "norm": "ln_f", "out": "attn.c_proj", "norm2": "ln_2", "fc2": "mlp.c_proj"}
_LLAMA_NAMES = {"embedding": "embed_tokens", "norm": "norm", "out": "self_attn.o_proj",
                "norm2": "post_attention_layernorm", "fc2": "mlp.down_proj"}
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "fused": ("mlp", "gate_up_proj", "", "down_proj"),
}
"""The block, and each expert's gate, up and down projection."""


def has_fused_experts(family: Family, names: Container[str], prefix: str) -> bool:
    """Whether a checkpoint that holds `names` has one tensor for all experts of a layer, as transformers 5 computes
    them and, if it is told to, saves them."""
    return family.experts is not None and f"{family.layer_stem(1, prefix)}mlp.experts.gate_up_proj" in names


class _Layer:
    """The parts of one layer."""

    def __init__(self, family: Family, number: int, prefix: str, fused_experts: bool) -> None:
        self.family, self.number, self.fused_experts = family, number, fused_experts
        self.stem, self.attention = family.layer_stem(number, prefix), family.attention(number, prefix)
        self.names = _GPT2_NAMES if family.is_fused else _LLAMA_NAMES

    def parts(self) -> Iterator[Part]:
        family, named = self.family, self.attention
        d, f, width = family.hidden_size, family.ffn_hidden_size, family.num_heads * family.head_dim
        norm2 = self.stem + self.names["norm2"]
        yield self._part("self_attention.linear_qkv.layer_norm_weight", (d,), [named["gain"]])
        if "shift" in named:
            yield self._part("self_attention.linear_qkv.layer_norm_bias", (d,), [named["shift"]])
        yield from self._qkv()
        for letter in ("q", "k"):
            if family.qk_norm:
                shape = (family.head_dim,)
                yield self._part(f"self_attention.{letter}_layernorm.weight", shape, [named[f"{letter}_norm"]])
        yield from self._linear("self_attention.linear_proj", (d, width), self.names["out"], family.output_bias)
        if family.experts is not None:
            yield self._part("pre_mlp_layernorm.weight", (d,), [Stored(norm2 + ".weight", (d,))])
            yield from self._experts(family.experts)
            return
        yield self._part("mlp.linear_fc1.layer_norm_weight", (d,), [Stored(norm2 + ".weight", (d,))])
        if family.norm == "LayerNorm":
            yield self._part("mlp.linear_fc1.layer_norm_bias", (d,), [Stored(norm2 + ".bias", (d,))])
        if family.is_fused:
            yield from self._linear("mlp.linear_fc1", (f, d), "mlp.c_fc", family.mlp_bias)
        else:  # megatron-core stacks the gate on the other half, and saves them apart
            for row, name in ((0, "gate"), (f, "up")):
                source = Stored(f"{self.stem}mlp.{name}_proj.weight", (f, d))
                yield self._part("mlp.linear_fc1.weight", (2 * f, d), [source], rows=(row, f))
        yield from self._linear("mlp.linear_fc2", (d, f), self.names["fc2"], family.mlp_bias)

    def _experts(self, experts: Experts) -> Iterator[Part]:
        """The router, and every expert's gated MLP; or the MLPs of all experts in two tensors."""
        d, f, count = self.family.hidden_size, self.family.ffn_hidden_size, experts.count
        block, gate, up, down = _EXPERT_NAMES["fused" if self.fused_experts else self.family.model_type]
        stem = f"{self.stem}{block}."
        yield self._part("mlp.router.weight", (count, d), [Stored(stem + "gate.weight", (count, d))])
        shapes = {"linear_fc1": (count, 2 * f, d), "linear_fc2": (count, d, f)}
        if self.fused_experts:  # in Megatron's order: gates on the other halves
            for name, source in zip(shapes, (gate, down), strict=True):
                key = f"{_EXPERTS.removeprefix('decoder.layers.')}.{name}.weight"
                yield self._part(key, shapes[name], [Stored(f"{stem}experts.{source}", shapes[name])])
            return
        for expert in range(count):
            for name, source, row, size in (
                ("linear_fc1", gate, 0, (f, d)), ("linear_fc1", up, f, (f, d)), ("linear_fc2", down, 0, (d, f)),
            ):
                yield Part(
                    key=f"{_EXPERTS}.{name}.weight",
                    shape=(self.family.num_layers, *shapes[name]),
                    offsets=(self.number - 1, expert, row, 0),
                    sizes=(1, 1, *size),
                    sources=(Stored(f"{stem}experts.{expert}.{source}.weight", size),),
                    merge=_only,
                    split=_alone,
                    stacked=2,
                )

    def _linear(self, key: str, shape: tuple[int, int], name: str, bias: bool) -> Iterator[Part]:
        """A linear layer of Megatron's `shape`; GPT-2's Conv1D holds the transpose."""
        fused = self.family.is_fused
        weight = Stored(f"{self.stem}{name}.weight", shape[::-1] if fused else shape)
        yield self._part(f"{key}.weight", shape, [weight], *((_transpose, _untranspose) if fused else ()))
        if bias:
            yield self._part(f"{key}.bias", shape[:1], [Stored(f"{self.stem}{name}.bias", shape[:1])])

    def _qkv(self) -> Iterator[Part]:
        family, named = self.family, self.attention
        shape = ((family.num_heads + 2 * family.num_groups) * family.head_dim, family.hidden_size)
        merge, split = partial(_interleave, family=family), partial(_deinterleave, family=family)
        for kind, suffix in ((shape, ""), (shape[:1], "_bias")):
            key = "self_attention.linear_qkv." + ("bias" if suffix else "weight")
            if "qkv" + suffix in named:
                yield self._part(
                    key, kind, [named["qkv" + suffix]],
                    lambda tensors: merge(tensors[0].t().chunk(3)), lambda tensor: [torch.cat(split(tensor)).t()],
                )
            elif "q" + suffix in named:
                yield self._part(key, kind, [named[letter + suffix] for letter in "qkv"], merge, split)

    def _part(
        self, key: str, shape: tuple[int, ...], sources: Sequence[Stored], merge: Merge | None = None,
        split: Split | None = None, *, rows: tuple[int, int] | None = None,
    ) -> Part:
        """`shape`: of one layer; `rows`: first and number of those that the part holds, None: all."""
        first, count = rows or (0, shape[0])
        return Part(
            key="decoder.layers." + key,
            shape=(self.family.num_layers, *shape),
            offsets=(self.number - 1, first, *(0 for _ in shape[1:])),
            sizes=(1, count, *shape[1:]),
            sources=tuple(sources),
            merge=merge or _only,
            split=split or _alone,
            stacked=1,
        )


def _whole(key: str, shape: tuple[int, ...], source: Stored, merge: Merge | None = None, split: Split | None = None
           ) -> Part:
    return Part(key, shape, (0,) * len(shape), shape, (source,), merge or _only, split or _alone, 0)


def _only(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _alone(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return [tensor]


def _transpose(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].t()


def _untranspose(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return [tensor.t()]


def _padding(size: int, padded: int) -> tuple[Merge, Split]:
    """Zero rows behind `size` of them, and their removal."""
    def pad(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if padded == size:
            return tensors[0]
        target = tensors[0].new_zeros(padded, *tensors[0].shape[1:])
        target[:size] = tensors[0]
        return target

    return pad, lambda tensor: [tensor[:size]]


def _interleave(tensors: Sequence[torch.Tensor], family: Family) -> torch.Tensor:
    """Q, K, V [heads * head_dim, ...] -> Megatron's rows: of every group its queries, its key, its value."""
    groups = [tensor.unflatten(0, (family.num_groups, -1, family.head_dim)) for tensor in tensors]
    return torch.cat(groups, dim=1).flatten(0, 2)


def _deinterleave(tensor: torch.Tensor, family: Family) -> Sequence[torch.Tensor]:
    heads = {"num_groups": family.num_groups, "heads_per_group": family.num_heads // family.num_groups}
    rows = tensor.reshape(len(tensor), -1)  # a bias as a matrix of one column
    query, _, key, _, value, _ = split_linear_qkv(rows, None, **heads, head_dim=family.head_dim)
    return [piece.reshape(-1, *tensor.shape[1:]) for piece in (query, key, value)]
