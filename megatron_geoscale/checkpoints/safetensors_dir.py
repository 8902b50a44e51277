"""The tensors of a directory of safetensors files, one or many, by name; each is read when it is asked for.

Pickled weights are refused by name: reading one can run any code. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floats that hold weights as they are, by safetensors' names."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsDirectory:
    """Names, shapes and tensors of a directory that holds `model.safetensors`, or shards and their index.

    Raises ValueError, in one sentence naming the file, where weights are pickled, missing, truncated or outside of the
    directory; OSError as the system gives it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = self._find()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        for file in sorted(set(self._file_of.values())):
            self._read_shapes(file)
        for name, file in self._file_of.items():
            if name not in self._shapes:
                raise ValueError(f"{directory / INDEX} says that {file} holds {name}, and it does not")

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Of all tensors, in the order of the index, or of the only file."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, from its file's header. ValueError where there is no such tensor."""
        if name not in self._shapes:
            raise ValueError(f"{self.directory} holds no tensor {name}")
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, from its file's header. ValueError where it is no plain float, or where there is no tensor."""
        self.shape(name)
        if self._dtypes[name] not in DTYPES:
            raise ValueError(f"{name} is stored as {self._dtypes[name]}: quantized weights are not supported")
        return DTYPES[self._dtypes[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, in memory of its own."""
        shape, path = self.shape(name), self.directory / self._file_of[name]
        if self._dtypes[name] not in DTYPES:
            with _opened(path) as file:
                tensor: torch.Tensor = file.get_tensor(name)
            return tensor
        # safetensors would read the whole header again for every tensor.
        tensor = torch.empty(shape, dtype=DTYPES[self._dtypes[name]])
        with path.open("rb") as content:
            content.seek(self._starts[name])
            if content.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise ValueError(f"{path} is not a whole safetensors file: {name} is cut short")
        return tensor

    def _find(self) -> dict[str, str]:
        """File of every tensor."""
        if (self.directory / SINGLE).exists():
            with _opened(self.directory / SINGLE) as file:
                return dict.fromkeys(file.keys(), SINGLE)
        index = self.directory / INDEX
        if not index.exists():
            pickled = sorted(path.name for path in self.directory.iterdir() if path.suffix in _PICKLES)
            if pickled:
                raise ValueError(f"{self.directory / pickled[0]} is a pickle, which can run any code when it is read: "
                                 f"convert the weights to {SINGLE}")
            raise ValueError(f"{self.directory} holds neither {SINGLE} nor {INDEX}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        for file in set(map(str, weight_map.values())):
            self._check_shard(index, file)
        return dict(weight_map)

    def _check_shard(self, index: Path, file: str) -> None:
        if Path(file).name != file or file in ("", ".."):  # a link is allowed: a download's cache is made of them
            raise ValueError(f"{index} names {file!r}, which is not a file of its own directory")
        if Path(file).suffix != ".safetensors":
            raise ValueError(f"{index} names {file}, and only .safetensors files are read")
        if not (self.directory / file).exists():
            raise ValueError(f"{self.directory / file} is missing: {index.name} says that it holds weights")

    def _read_shapes(self, name: str) -> None:
        with _opened(self.directory / name) as file:
            starts = _read_starts(self.directory / name)  # of a file that has just been found whole
            for key in file.keys():  # noqa: SIM118
                if self._file_of.get(key) == name:
                    header = file.get_slice(key)
                    self._shapes[key], self._dtypes[key] = tuple(header.get_shape()), header.get_dtype()
                    self._starts[key] = starts[key]


def _read_starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a whole safetensors file: its length, then JSON, then the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file; one sentence naming it if it is no whole safetensors file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ValueError(f"{path} needs safetensors: pip install 'megatron-geoscale[hf]'") from None
    if path.is_dir():
        raise ValueError(f"{path} is a directory and must be a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:  # truncated, empty, overlapping tensors, or no safetensors at all
        raise ValueError(f"{path} is not a whole safetensors file: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming the file if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
