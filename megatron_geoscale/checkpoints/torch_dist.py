"""A Megatron checkpoint in torch_dist format: its flags, and single layers of its stacked tensors.

Megatron stacks the layers of a model into one tensor [num_layers, ...] and saves it in chunks, each a layer's part on
a tensor-parallel rank; only the chunks that a layer needs are read. Nothing here needs a process group. Pickles inside
are read with an allow-list, so a file that names anything else is refused.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_geoscale.checkpoints.iterations import TRACKER, find_iteration, latest_iteration

METADATA = ".metadata"
COMMON = "common.pt"
_PICKLED_MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))


def is_checkpoint(directory: Path) -> bool:
    """Whether `directory` is Megatron's: the directory of --save, or one iteration's below it."""
    return any((directory / name).exists() for name in (TRACKER, METADATA, COMMON))


def latest_directory(directory: Path) -> Path:
    """The directory of one iteration: `directory` itself, or the one that its tracker names. ValueError if damaged."""
    iteration = latest_iteration(directory)
    if iteration is None:
        return directory
    found = find_iteration(directory, iteration)
    if not found.is_dir():
        raise ValueError(f"{directory / TRACKER} names iteration {iteration}, but {found} is not there")
    return found


class TorchDistDirectory:
    """Flags and tensors of one iteration's directory. Raises ValueError in one sentence for one that is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in (METADATA, COMMON):
            if not (directory / name).is_file():
                raise ValueError(f"{directory} is not a complete torch_dist checkpoint: it has no {name}")
        with self._reading(METADATA):
            self._metadata = read_metadata(directory)
        self._by_layer: dict[str, dict[int, list[ChunkStorageMetadata]]] = {}
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def args(self) -> argparse.Namespace:
        """The flags that the checkpoint was trained with."""
        torch.serialization.add_safe_globals([argparse.Namespace])  # as megatron-core does, and for good
        with self._reading(COMMON):
            common = torch.load(self.directory / COMMON, map_location="cpu", weights_only=True)
        args = common.get("args") if isinstance(common, dict) else None
        if not isinstance(args, argparse.Namespace):
            raise ValueError(f"{self.directory / COMMON} holds no flags (args), which say what the model is")
        return args

    def __contains__(self, name: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(name), TensorStorageMetadata)

    def names(self) -> list[str]:
        """Of all tensors, those of an optimizer too."""
        return [name for name in self._metadata.state_dict_metadata if name in self]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a whole tensor, layers included. ValueError where there is no such tensor."""
        return tuple(self._tensor_metadata(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Of a whole tensor, as stored. ValueError where there is no such tensor."""
        dtype: torch.dtype = self._tensor_metadata(name).properties.dtype
        return dtype

    def layer(self, name: str, row: int) -> torch.Tensor:
        """Row `row` (from 0) of a tensor [num_layers, ...], in its stored dtype; the chunks of other rows stay unread.
        """
        shape = self.shape(name)
        return self.block(name, (row,) + (0,) * (len(shape) - 1), (1, *shape[1:]))[0]

    def block(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The part [sizes] of a tensor that begins at `offsets`, in its stored dtype; only the chunks that hold some of
        it are read. ValueError where some of it is in no chunk."""
        metadata = self._tensor_metadata(name)
        size = torch.Size(sizes)
        target = torch.empty(size, dtype=metadata.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=size)
        with self._reading(name):
            items = create_read_items_for_chunk_list(name, self._near(name, chunk), [chunk])
            if sum(item.lengths.numel() for item in items) != size.numel():
                raise ValueError(f"chunks of {list(sizes)} from {list(offsets)} on are missing")
            for item in items:
                path = self._reader.storage_data[item.storage_index].relative_path
                if Path(path).name != path:
                    raise ValueError(f"{path} is not a file of this directory")
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def _near(self, name: str, wanted: ChunkStorageMetadata) -> TensorStorageMetadata:
        """Metadata of a tensor without the chunks of other layers than `wanted`, if it is one layer's: torch compares
        what is wanted with every chunk, and with many experts there are tens of thousands."""
        metadata = self._tensor_metadata(name)
        if not wanted.sizes or wanted.sizes[0] != 1:
            return metadata
        if name not in self._by_layer:
            layers = self._by_layer[name] = {}
            for chunk in metadata.chunks:
                if chunk.sizes[0] != 1:  # not stacked
                    layers.clear()
                    break
                layers.setdefault(chunk.offsets[0], []).append(chunk)
        layers = self._by_layer[name]
        return replace(metadata, chunks=layers.get(wanted.offsets[0], [])) if layers else metadata

    def _tensor_metadata(self, name: str) -> TensorStorageMetadata:
        if name not in self:
            raise ValueError(f"{self.directory} holds no tensor {name}")
        metadata: TensorStorageMetadata = self._metadata.state_dict_metadata[name]
        return metadata

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """One sentence for whatever goes wrong inside: a damaged file raises anything."""
        try:
            yield
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise ValueError(f"{self.directory}: {what} cannot be read: {type(error).__name__} {reason}") from error


def read_metadata(directory: Path) -> Metadata:
    """The `.metadata` of an iteration's directory: what is in which of its files.

    Raises pickle.UnpicklingError for a file that names anything but the plain records that metadata is made of, and
    whatever a damaged pickle raises.
    """
    metadata = _AllowList(BytesIO((directory / METADATA).read_bytes())).load()
    if not isinstance(metadata, Metadata):
        raise TypeError("holds no metadata of a checkpoint")
    return metadata


class _AllowList(pickle.Unpickler):
    """Reads what torch's `.metadata` is made of: its plain records, and torch's dtypes and shapes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch", "Size"), ("torch.serialization", "_get_layout")):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _PICKLED_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint's metadata")


def _enum_member(owner: Any, name: str) -> Enum:
    """For `getattr`, by which some Pythons, such as 3.11.2, pickle the members of an Enum; it gives nothing else."""
    if isinstance(owner, type) and issubclass(owner, Enum):
        return owner[name]
    raise pickle.UnpicklingError(f"it asks {owner!r} for {name}, which is no part of a checkpoint's metadata")


class _Into(LoadPlanner):
    """Reads every item into its place in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        where = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            where = where.narrow(dim, offset, length)
        return where

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor is a view of the target: nothing is left to do."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # of the planner's interface, only what a reader calls is used

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]
