"""Writes a Megatron checkpoint in torch_dist format chunk by chunk: no model, no process group, little memory.

torch's own file writer lays the files out; a chunk's tensor is asked for when its turn has come. What is written is
what megatron-core's `dist_checkpointing.save` writes: `.metadata`, `*.distcp`, `common.pt`, `metadata.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_geoscale.checkpoints.torch_dist import COMMON

_BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
             "common_backend_version": 1}
_FILE_BYTES = 2**26
"""Chunks share a file up to this size: the writer keeps tensors until it has finished their file."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and where its values come from."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    """[sizes], contiguous, of `dtype`; called once."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize


def write_torch_dist(
    directory: Path, chunks: Sequence[Chunk], objects: Mapping[str, Any], common: Mapping[str, Any]
) -> None:
    """Write an iteration's directory, which must exist. `objects`: what megatron-core saves beside tensors, by its key;
    `common`: the common state. Files are on disk when this returns, those without which it is no checkpoint last.

    Raises what `Chunk.load` raises; RuntimeError where a loaded tensor is not what its chunk says.
    """
    planner = _Loading(chunks, objects)
    writer = _Writer(directory)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([SavePlan(items) for items in planner.files()])
    try:
        results: list[list[WriteResult]] = [writer.write_data(plan, planner).wait() for plan in plans]
    except RuntimeError as error:
        if error.__context__ is None:
            raise
        raise error.__context__ from None  # torch.save complains of a file cut short, and hides a full disk
    writer.finish(planner.metadata(), results)
    content = BytesIO()
    torch.save(dict(common), content)
    _write(directory / COMMON, content.getvalue())
    _write(directory / "metadata.json", json.dumps(_BACKENDS).encode())


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: torch would pickle the path of this machine."""


class _Loading(SavePlanner):
    """Plans one item a chunk and one an object, and gives each item's values when it is written."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, Any]) -> None:
        self._chunks = {self._index(chunk): chunk for chunk in chunks}
        self._objects = dict(objects)

    @staticmethod
    def _index(chunk: Chunk) -> MetadataIndex:
        return MetadataIndex(chunk.key, torch.Size(chunk.offsets))

    def files(self) -> Iterator[list[WriteItem]]:
        """Items by the file that they go to."""
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        size = 0
        for index, chunk in self._chunks.items():
            if items and size + chunk.num_bytes > _FILE_BYTES:
                yield items
                items, size = [], 0
            where = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            data = TensorWriteData(where, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            size += chunk.num_bytes
        if items:
            yield items

    def metadata(self) -> Metadata:
        found: dict[str, Any] = {key: BytesStorageMetadata() for key in self._objects}
        for chunk in self._chunks.values():
            stored = found.setdefault(
                chunk.key,
                TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape), chunks=[]),
            )
            stored.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        return Metadata(found)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = BytesIO()
            torch.save(self._objects[write_item.index.fqn], content)
            return content
        chunk = self._chunks[write_item.index]
        tensor = chunk.load()
        if tensor.shape != torch.Size(chunk.sizes) or tensor.dtype != chunk.dtype or not tensor.is_contiguous():
            raise RuntimeError(f"{chunk.key} {list(chunk.offsets)} is {tensor.dtype} {list(tensor.shape)}, not "
                               f"{chunk.dtype} {list(chunk.sizes)}")
        return tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # of the planner's interface, only what a writer calls is used

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
