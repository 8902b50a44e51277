"""Moments of a Hugging Face model's attention from parameters that ranks hold in parts, under FSDP2 and ZeRO.

Three layouts: DTensors cut along their first dimension (FSDP2), flat shards that end anywhere (DeepSpeed ZeRO-3), and
whole parameters on every rank (one process, DDP, ZeRO-1 and 2). No weight is gathered. Traffic of one refresh, over the
group that the weights are cut over, in numbers of the layer's size: d inputs, n heads in all (queries, keys, values) of
dimension d_h:
- norms and biases, one all-reduce for all layers: about 2 d + n d_h a layer;
- what a boundary cuts in two, one all-to-all for all layers (`spectral.whole_units`): at most one head of d_h d of each
  weight, or one row of GPT-2's transposed weight;
- Gram matrices, one reduce a layer to the rank that bounds it: n d_h^2.
Whole parameters need none of them: each rank reads the layers that it bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_geoscale.checkpoints.families import Family, Stored
from megatron_geoscale.spectral.gram import gram
from megatron_geoscale.spectral.moments import Moments, cross_gram
from megatron_geoscale.spectral.projections import fold_norm
from megatron_geoscale.spectral.whole_units import Cut, UnitExchange, Units


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter, which may be a shard of it."""

    name: str
    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    edges: tuple[int, ...] | None
    """As in `whole_units.Cut`; None where every rank holds all of it."""
    group: dist.ProcessGroup | None
    """That `edges` are over."""
    device: torch.device
    """That the model computes on."""

    def flat(self) -> Tensor:
        """Its elements as they are now, [..]; without padding."""
        parameter = self.parameter.detach()
        if self.edges is None:
            return parameter.reshape(-1)
        rank = dist.get_rank(self.group)
        local = parameter.to_local() if isinstance(parameter, DTensor) else self.parameter.ds_tensor.detach()
        size = self.edges[rank + 1] - self.edges[rank]
        local = local.reshape(-1)[:size]
        if local.numel() != size:
            raise ValueError(f"{self.name} has {local.numel()} elements on rank {rank} where {size} are expected: its "
                             "parameter is not the one that scales were attached to")
        return local.to(self.device)


def find_part(name: str, parameter: torch.nn.Parameter) -> Part:
    """How `parameter` lies over the ranks. ValueError naming it for a layout other than this module's three."""
    if isinstance(parameter, DTensor):
        return _dtensor_part(name, parameter)
    if not hasattr(parameter, "ds_tensor"):
        return Part(name, parameter, tuple(parameter.shape), None, None, parameter.device)
    if getattr(parameter.ds_tensor, "final_location", None) == "nvme":
        raise ValueError(f"{name} is kept on NVMe, where its shard cannot be read: offload parameters to the CPU")
    if parameter.ds_tensor.dtype != parameter.dtype:
        raise ValueError(f"{name} is quantized where it is sharded (ZeRO++): its scales cannot be read")
    shape, ranks = tuple(parameter.ds_shape), dist.get_world_size(parameter.ds_process_group)
    size, total = parameter.ds_tensor.ds_numel, prod(shape)
    edges = tuple(min(rank * size, total) for rank in range(ranks + 1))
    return Part(name, parameter, shape, edges, parameter.ds_process_group, _device_of(parameter.ds_process_group))


def _dtensor_part(name: str, parameter: DTensor) -> Part:
    mesh, shape = parameter.device_mesh, tuple(parameter.shape)
    cut = [dim for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
    if not cut:
        raise ValueError(f"{name} is a DTensor that is not sharded: apply fully_shard over the data-parallel ranks")
    if len(cut) > 1 or parameter.placements[cut[0]] != Shard(0):
        raise ValueError(f"{name} is placed as {parameter.placements}, and only shards along dimension 0 over one "
                         "dimension of the mesh are supported")
    ranks, row = mesh.size(cut[0]), prod(shape[1:])
    chunk = -(-shape[0] // ranks)
    edges = tuple(min(rank * chunk, shape[0]) * row for rank in range(ranks + 1))
    group = mesh.get_group(cut[0])
    return Part(name, parameter, shape, edges, group, _device_of(group))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """That the model computes on, wherever its parameters are kept."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class ShardedAttention:
    """The attention weights of all layers of one model, as this rank and its group hold them."""

    def __init__(
        self,
        family: Family,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        prefix: str,
        dtype: torch.dtype | None,
        with_cross: bool,
    ) -> None:
        """`parameters` by the names of the family's checkpoints, after `prefix`. dtype: that the forward pass casts
        weights to, None for their own. with_cross: as in `Moments.of`. ValueError naming a parameter that is missing,
        of another shape, quantized, or cut as no supported layout does."""
        self.family, self._with_cross = family, with_cross
        self._layers = [_parts(family.attention(number + 1, prefix), parameters) for number in range(family.num_layers)]
        self._weights = ("qkv",) if family.is_fused else ("q", "k", "v")
        first = self._layers[0][self._weights[0]]
        self.device, self.group = first.device, first.group
        weights = [layer[name] for layer in self._layers for name in self._weights]
        others = [part for layer in self._layers for part in layer.values() if part.edges is not None]
        for part in weights + others:
            if part.group is not self.group:
                raise ValueError(f"{part.name} and {first.name} are not sharded over the same ranks")
        self._cast_to = dtype
        self.dtype = dtype or max((part.parameter.dtype for part in weights), key=lambda kind: torch.finfo(kind).bits)
        """That the projections are computed in."""
        self.is_cut = first.edges is not None
        if self.group is None and dist.is_initialized():
            self.group = dist.group.WORLD
        self.share = (dist.get_rank(self.group), dist.get_world_size(self.group)) if self.group else (0, 1)
        """(this rank, ranks) that layers are bounded by: layer i, from 0, by rank i % ranks."""
        cuts = [self._cut(layer, name) for layer in self._layers for name in self._weights] if self.is_cut else []
        self._exchange = UnitExchange(cuts, group=self.group) if self.is_cut else None

    def _cut(self, layer: Mapping[str, Part], name: str) -> Cut:
        family, part = self.family, layer[name]
        if family.is_fused:
            return Cut(part.edges, part.shape[1])
        cut = Cut(part.edges, family.head_dim * part.shape[1])
        if name == "k" and self._with_cross:  # a query head's rank needs its key head
            queries = Cut(layer["q"].edges, cut.unit)
            per_group = family.num_heads // family.num_groups
            pairs = {(head // per_group, queries.owner(head)) for head in range(family.num_heads)}
            cut = replace(cut, copies=tuple(sorted(pair for pair in pairs if pair[1] != cut.owner(pair[0]))))
        return cut

    @torch.no_grad()
    def vectors(self) -> list[dict[str, Tensor]]:
        """Norm gains and shifts, biases, and gains of QK-norms of every layer, whole, by `Family.attention`'s names:
        float64.

        One all-reduce over the group where they are cut.
        """
        parts = [
            (index, name, part)
            for index, layer in enumerate(self._layers)
            for name, part in layer.items()
            if name not in self._weights
        ]
        sizes = [prod(part.shape) for *_, part in parts]
        joined = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        found: list[dict[str, Tensor]] = [{} for _ in self._layers]
        for (index, name, part), whole in zip(parts, joined.split(sizes), strict=True):
            found[index][name] = whole
            if part.edges is None and self.is_cut and self.share[0] != 0:
                continue  # it is added up once
            mine, begin = part.flat(), 0 if part.edges is None else part.edges[self.share[0]]
            whole[begin : begin + mine.numel()] = mine if self._cast_to is None else mine.to(self._cast_to)
        if self.is_cut:
            dist.all_reduce(joined, group=self.group)
        return found

    @torch.no_grad()
    def read(self, vectors: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[int, Moments]]:
        """(index, moments) of each layer that this rank bounds, in order, of weights that are cut; `vectors` are
        `vectors()`. Collective over the group: every rank must take all of it."""
        rank, ranks = self.share
        step = len(self._weights)
        units = self._exchange([self._flat(layer[name]) for layer in self._layers for name in self._weights])
        for index in range(len(self._layers)):
            sums = self._sums(units[index * step : (index + 1) * step], vectors[index])
            dist.reduce(sums.packed, group_dst=index % ranks, group=self.group)
            if index % ranks == rank:
                yield index, sums.moments(vectors[index])

    @torch.no_grad()
    def whole(self, index: int, vectors: Mapping[str, Tensor]) -> Moments:
        """Of layer `index`, from 0, whose weights every rank holds. No collective."""
        layer, family = self._layers[index], self.family
        width = layer[self._weights[0]].shape[1] * (1 if family.is_fused else family.head_dim)
        units = [Units([(0, self._flat(layer[name]).view(-1, width))]) for name in self._weights]
        return self._sums(units, vectors).moments(vectors)

    def _sums(self, units: Sequence[Units], vectors: Mapping[str, Tensor]) -> _Sums:
        sums = _Sums(self.family, self.device, shift="shift" in vectors, cross=self._with_cross)
        sums.add(units, vectors)
        return sums

    def _flat(self, part: Part) -> Tensor:
        return part.flat().to(self.dtype)


def _parts(named: Mapping[str, Stored], parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Part]:
    found = {}
    for what, stored in named.items():
        if stored.name not in parameters:
            raise ValueError(f"the model has no parameter {stored.name}: scales are attached to a plain model of "
                             "transformers, before adapters or compilation rename its parameters")
        part = find_part(stored.name, parameters[stored.name])
        if part.shape != stored.shape:
            raise ValueError(f"{stored.name} has shape {list(part.shape)}, and the model's config makes it "
                             f"{list(stored.shape)}")
        if not part.parameter.dtype.is_floating_point or part.parameter.dtype.itemsize == 1:
            raise ValueError(f"{stored.name} is quantized: its scales cannot be read")
        found[what] = part
    return found


class _Sums:
    """One rank's share of a layer's moments, in one tensor: the shares of all ranks add up to them."""

    def __init__(self, family: Family, device: torch.device, *, shift: bool, cross: bool) -> None:
        self.family = family
        n, d_h = family.num_heads + 2 * family.num_groups, family.head_dim
        shapes = {"grams": (n, d_h, d_h)}
        if shift:
            shapes |= {"offsets": (n, d_h), "sizes": (n, d_h)}
        if cross:
            shapes["cross"] = (family.num_heads, d_h, d_h)
        self.packed = torch.zeros(sum(map(prod, shapes.values())), dtype=torch.float64, device=device)
        views = self.packed.split([prod(shape) for shape in shapes.values()])
        self._of = {name: view.view(shape) for (name, shape), view in zip(shapes.items(), views, strict=True)}

    def add(self, units: Sequence[Units], vectors: Mapping[str, Tensor]) -> None:
        """What this rank owns of the layer's weights."""
        (self._add_inputs if self.family.is_fused else self._add_heads)(units, vectors)

    def _add_heads(self, units: Sequence[Units], vectors: Mapping[str, Tensor]) -> None:
        """Whole heads: all of their moments."""
        n_q, n_kv, d_h = self.family.num_heads, self.family.num_groups, self.family.head_dim
        gain, keys = vectors["gain"], dict(units[1].copies)
        for first, (weight, begin) in enumerate(zip(units, (0, n_q, n_q + n_kv), strict=True)):
            for start, run in weight.runs:
                if first == 1:
                    keys |= enumerate(run, start)
                for head, rows in enumerate(run, begin + start):
                    self._add(slice(head, head + 1), rows.view(1, d_h, -1), gain, vectors.get("shift"))
        if "cross" not in self._of:
            return
        for start, run in units[0].runs:
            for head, rows in enumerate(run, start):
                pair = [fold_norm(w.view(1, d_h, -1), None, gain=gain, shift=None)[0]
                        for w in (rows, keys[head // (n_q // n_kv)])]
                self._of["cross"][head] += cross_gram(*pair)[0]

    def _add_inputs(self, units: Sequence[Units], vectors: Mapping[str, Tensor]) -> None:
        """Rows of a transposed weight, one an input: a term of the sums of every head."""
        n, d_h = self.family.num_heads, self.family.head_dim
        for start, run in units[0].runs:
            heads = run.view(len(run), 3 * n, d_h).permute(1, 2, 0)
            gain, shift = (vectors[name][start : start + len(run)] for name in ("gain", "shift"))
            self._add(slice(0, 3 * n), heads, gain, shift)
            if "cross" in self._of:
                folded, _ = fold_norm(heads[: 2 * n], None, gain=gain, shift=None)
                self._of["cross"] += cross_gram(folded[:n], folded[n:])

    def _add(self, heads: slice, weight: Tensor, gain: Tensor, shift: Tensor | None) -> None:
        """weight: [heads, head_dim, inputs], of all inputs or of some."""
        folded, offsets = fold_norm(weight, None, gain=gain, shift=shift)
        self._of["grams"][heads] += gram(folded)
        if shift is not None:
            self._of["offsets"][heads] += offsets
            self._of["sizes"][heads] += weight.double().abs() @ shift.double().abs()

    def moments(self, vectors: Mapping[str, Tensor]) -> Moments:
        """Of the whole layer, once the shares are added up."""
        family, n = self.family, [self.family.num_heads, *2 * [self.family.num_groups]]
        if family.is_fused:
            bias = vectors["qkv_bias"].double().view(-1, family.head_dim)
        elif family.qkv_bias:
            bias = torch.cat([vectors[f"{letter}_bias"] for letter in "qkv"]).double().view(-1, family.head_dim)
        else:
            bias = None
        offsets, sizes = self._of.get("offsets"), self._of.get("sizes")
        if bias is not None:
            offsets = bias if offsets is None else bias + offsets
            sizes = bias.abs() if sizes is None else sizes + bias.abs()
        size = self.packed.new_zeros(1) if sizes is None else sizes.amax().reshape(1)
        rows = [None] * 3 if offsets is None else list(offsets.split(n))
        moments = Moments(*self._of["grams"].split(n), *rows, self._of.get("cross"), size)
        scale = 1.0 if family.rope is None else family.rope.scale
        return moments if scale == 1.0 else _scale_rotated(moments, scale)


def _scale_rotated(m: Moments, scale: float) -> Moments:
    """`spectral.projections.scale_rotated`, of moments: the families rotate all rows of a head."""
    return replace(
        m,
        q=m.q * scale**2,
        k=m.k * scale**2,
        q_bias=None if m.q_bias is None else m.q_bias * scale,
        k_bias=None if m.k_bias is None else m.k_bias * scale,
        cross=None if m.cross is None else m.cross * scale**2,
        offset_size=m.offset_size * max(1.0, scale),
    )
