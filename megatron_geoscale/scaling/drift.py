"""Finds data-parallel replicas whose attention weights are not the same bits.

Replicas start equal and take the same steps, so a difference is a fault: a bit that has flipped, a collective that
has gone wrong. The refresh does not show it, for its all-reduce takes the largest bound of all replicas, and the lowest
bit of a weight need not move a bound. So the weights themselves are compared, by one checksum of their bits a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_geoscale.scaling.latent_layers import LatentLayer
from megatron_geoscale.scaling.layers import AttentionLayer
from megatron_geoscale.scaling.weights import as_used

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x1E3779B97F4A7C15  # odd: to multiply by it loses nothing modulo 2**64


class ReplicaDriftError(RuntimeError):
    """Attention weights differ between data-parallel replicas; raised on every rank alike."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim int64 of the tensor's bits, on its device, without a copy of it.

    The bit patterns of each row, taken as integers, are summed, and the sums with odd weights, modulo 2**64. A change
    of one element, one flipped bit, changes it for certain, and so do two flipped bits unless they lie in one row, in
    equal places of two elements, one set and one cleared. A vector's elements are rows.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(-1, bits.shape[-1] if bits.dim() > 1 else 1).sum(dim=1, dtype=torch.int64)
    weights = torch.arange(1, 2 * rows.numel(), 2, dtype=torch.int64, device=rows.device) * _MULTIPLIER
    return (rows * weights).sum()


def layer_checksums(layers: Sequence[AttentionLayer | LatentLayer], num_layers: int) -> torch.Tensor:
    """Of all parameters of each layer's attention and of the norm before it, int64 [num_layers]; 0 for layers of other
    ranks. Stays on the device."""
    sums = torch.zeros(num_layers, dtype=torch.int64, device=layers[0].device)
    for layer in layers:
        parameters = dict.fromkeys((*layer.attention.parameters(), *layer.norm.parameters()))
        for parameter in parameters:
            sums[layer.number - 1] = sums[layer.number - 1] * _MULTIPLIER + checksum(as_used(parameter))
    return sums


@torch.no_grad()
def check_replicas(layers: Sequence[AttentionLayer | LatentLayer]) -> None:
    """Raise ReplicaDriftError on every rank if any two replicas of a layer differ. Collective over the whole job, one
    all-gather of a number a layer; waits for the device. The weights must be final: gathered, where that overlaps."""
    num_layers = layers[0].config.num_layers
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    position = tensor + parallel_state.get_tensor_model_parallel_world_size() * pipeline
    sums = layer_checksums(layers, num_layers)
    mine = torch.cat([sums.new_tensor([position]), sums])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    raise_if_drifted(torch.stack(everyone).cpu())


def raise_if_drifted(table: torch.Tensor) -> None:
    """Raise ReplicaDriftError if two ranks of equal position have unequal checksums.

    table: int64 [ranks, 1 + layers], of each rank its position in the model (which part it holds) and its checksums.
    The ranks that are named first are those that differ from most; of two replicas nothing tells which one is right.
    """
    found = []
    for position in table[:, 0].unique():
        ranks = (table[:, 0] == position).nonzero().flatten()
        sums = table[ranks, 1:]
        for row in (sums != sums[0]).any(dim=0).nonzero().flatten().tolist():
            groups: dict[int, list[int]] = {}
            for rank, value in zip(ranks.tolist(), sums[:, row].tolist(), strict=True):
                groups.setdefault(value, []).append(rank)
            most, *others = sorted(groups.values(), key=lambda group: (-len(group), group))
            doubt = "" if len(most) > len(others[0]) else ", and nothing tells which is right"
            found.append((row + 1, sorted(rank for group in others for rank in group), most, doubt))
    if not found:
        return
    layer, odd, most, doubt = min(found)
    also = sorted({number for number, *_ in found} - {layer})
    raise ReplicaDriftError(
        f"attention weights of layer {layer} on {_ranks(odd)} differ from those of the data-parallel replica on "
        f"{_ranks(most)}{doubt}"
        + (f" (layers {', '.join(map(str, also))} differ too)" if also else "")
        + ": a bit has flipped or a collective has gone wrong, training stops"
    )


def _ranks(numbers: Sequence[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
