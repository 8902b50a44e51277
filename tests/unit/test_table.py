"""The scale table: swapped whole and in place, and a digest that knows every bit."""

import hashlib
import struct

import pytest
import torch

from megatron_geoscale.scaling.slots import SLOTS
from megatron_geoscale.scaling.table import BOUNDS, ScaleTable, digest


def filled(layers=3):
    table = ScaleTable(layers, torch.device("cpu"))
    scales = torch.arange(1, 1 + layers * len(SLOTS)).float().view(layers, -1)
    bounds = 1000 + torch.arange(layers * len(BOUNDS)).double().view(layers, -1)
    return table, scales, bounds


def test_new_table_is_empty_and_typed():
    table, scales, bounds = filled()
    assert table.scales.dtype == torch.float32 and table.scales.shape == scales.shape and not table.scales.any()
    assert table.bounds.dtype == torch.float64 and table.bounds.shape == bounds.shape and not table.bounds.any()


def test_swap_replaces_everything_where_it_is():
    table, scales, bounds = filled()
    row, addresses = table.scales[1], (table.scales.data_ptr(), table.bounds.data_ptr())
    table.swap(scales, bounds)
    assert torch.equal(table.scales, scales) and torch.equal(table.bounds, bounds)
    assert torch.equal(row, scales[1])  # a view that attention holds
    assert (table.scales.data_ptr(), table.bounds.data_ptr()) == addresses
    scales.zero_()
    assert table.scales.all()  # a copy, not the caller's tensor


def test_layers_count_from_one_and_columns_have_names():
    table, scales, bounds = filled()
    table.swap(scales, bounds)
    for layer in (1, 3):
        for column, slot in enumerate(SLOTS):
            assert table.scale(layer, slot) == scales[layer - 1, column]
        for column, name in enumerate(BOUNDS):
            assert table.bound(layer, name) == bounds[layer - 1, column]
    with pytest.raises(ValueError):
        table.scale(1, "nothing")


def test_digest_is_that_of_the_bytes():
    _, scales, _ = filled()
    data = struct.pack(f"<{scales.numel()}f", *scales.flatten().tolist())
    assert digest(scales) == hashlib.sha256(data).hexdigest()[:16]
    assert digest(scales.t().contiguous().t()) == digest(scales)  # of the values, not of how they lie in memory


def test_digest_sees_one_bit_anywhere_and_the_order_of_rows():
    _, scales, _ = filled()
    seen = {digest(scales), digest(scales.flip(0))}
    for index in range(scales.numel()):
        changed = scales.flatten().clone()
        changed[index] = torch.nextafter(changed[index], torch.tensor(torch.inf))
        seen.add(digest(changed.view_as(scales)))
    assert len(seen) == 2 + scales.numel()
