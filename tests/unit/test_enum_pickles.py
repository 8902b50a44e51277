"""Metadata that Python 3.11.2, Debian 12's, wrote: it pickles an Enum's members as calls of getattr."""

import pickle
from enum import Enum

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as ENCODING
from torch.distributed.checkpoint.metadata import Metadata

from megatron_geoscale.checkpoints.torch_dist import METADATA, read_metadata


class ByGetattr:
    """Pickles as `getattr(owner, name)`."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def write(folder, owner, name):
    metadata = Metadata(state_dict_metadata={}, planner_data=ByGetattr(owner, name))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_members_of_an_enum_are_read(tmp_path):
    write(tmp_path, ENCODING, "TORCH_CHANNELS_LAST")
    assert read_metadata(tmp_path).planner_data is ENCODING.TORCH_CHANNELS_LAST


@pytest.mark.parametrize("owner, name", [(ENCODING, "__init__"), (ENCODING, "mro"), (Metadata, "__init__"),
                                         ("text", "format"), (Enum, "__class__")])
def test_nothing_else_is_reached_through_it(tmp_path, owner, name):
    write(tmp_path, owner, name)
    with pytest.raises((pickle.UnpicklingError, KeyError)):
        read_metadata(tmp_path)
