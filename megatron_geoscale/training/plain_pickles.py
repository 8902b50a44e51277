"""Keeps code out of what a checkpoint is read from.

Three things in a torch_dist checkpoint are pickles, and a pickle can name any function to be called as it is read:
`.metadata`, which torch opens with `pickle.load`; `common.pt`, the flags and counters; and the objects among the
tensors of a `.distcp` file, the RNG states, which torch opens with `weights_only=False`. Inside `plain_pickles` the
first is read with the allow-list of `checkpoints.torch_dist`, the other two with torch's own list of plain types
(`weights_only=True`, to which megatron-core adds a few records, and no function that does anything).

A fourth, Transformer Engine's FP8 state of a linear layer, is a pickle inside a tensor, which Transformer Engine opens
as it is put into a module: `check_extra_states` looks at it before.
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_geoscale.checkpoints.torch_dist import read_metadata

FORCE, FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's environment variables, which overrule the argument of its own calls of `torch.load`."""
_RECIPE = "transformer_engine.common.recipe"
_TENSOR_PARTS = (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"))


@contextlib.contextmanager
def plain_pickles(*, trusted: bool = False) -> Iterator[None]:
    """Inside, torch and megatron-core read a checkpoint's pickles only if they hold plain records; what names anything
    else raises pickle.UnpicklingError before it is called. `trusted` (--trust-checkpoint-pickles) reads them all."""
    plain = FileSystemReader.read_metadata
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORBID)}
    if trusted:
        os.environ[FORBID] = "1"
    else:
        os.environ[FORCE] = "1"
        FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = plain  # type: ignore[method-assign]
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _read_metadata(reader: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """What `FileSystemReader.read_metadata` does, with the allow-list."""
    metadata = read_metadata(Path(reader.path))
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def check_extra_states(state: dict[str, Any]) -> None:
    """Raise pickle.UnpicklingError if the FP8 state of a module (`..._extra_state`) in a model's `state` names anything
    but tensors and Transformer Engine's recipes. Put it into the module inside `plain_pickles`: the tensors in it are
    read by `torch.load`."""
    for name, value in state.items():
        if name.endswith("_extra_state") and isinstance(value, torch.Tensor) and value.numel() > 0:
            _ExtraState(io.BytesIO(value.detach().cpu().numpy().tobytes())).load()


class _Inert:
    """Stands for what a pickle would make, so that looking at it makes nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _ExtraState(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (module, name) in _TENSOR_PARTS or (module == _RECIPE and re.fullmatch(r"_?[A-Z]\w*", name)):
            return _Inert
        raise pickle.UnpicklingError(f"the FP8 state of a layer names {module}.{name}, which is no part of one")
