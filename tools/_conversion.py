"""What convert_hf.py does: a Hugging Face directory into a Megatron checkpoint, and back.

Weights go through memory one tensor at a time. A directory is filled under another name and gets its own when it is
whole.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from _cli import naming, partial_path, sync, write_atomically
from megatron_geoscale.checkpoints import torch_dist
from megatron_geoscale.checkpoints.families import Family, read_family
from megatron_geoscale.checkpoints.family_flags import family_of, flags_of, same_activation
from megatron_geoscale.checkpoints.hf_writer import (
    GENERATION,
    Entry,
    copy_tokenizer,
    write_config,
    write_safetensors,
)
from megatron_geoscale.checkpoints.iterations import TRACKER
from megatron_geoscale.checkpoints.mapping import Part, extra_states, has_fused_experts, model_parts
from megatron_geoscale.checkpoints.safetensors_dir import DTYPES, SafetensorsDirectory, read_json
from megatron_geoscale.checkpoints.torch_dist_writer import Chunk, write_torch_dist
from megatron_geoscale.training.arguments import parse_args
from megatron_geoscale.training.checkpoint_args import UNTRAINED, saveable
from megatron_geoscale.training.model_arguments import padded_vocab_size

CONFIG = "config.json"
TOKENIZER = "tokenizer"
LONGEST_SEQUENCE = 4096
"""Of --seq-length's default: longer ones are seldom trained on, and --use-checkpoint-args takes what is saved."""
_HALF_PRECISION = {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""What older versions of transformers saved besides weights."""
_MARK = ".converting"


def import_model(
    source: Path, target: Path, *, tensor_parallel: int, pipeline_parallel: int, dtype: torch.dtype | None,
    seq_length: int | None,
) -> str:
    """Write the Megatron checkpoint `target` from the Hugging Face directory `source`; returns a line about it.

    The weights fit every layout: the parallel sizes decide the padding of the vocabulary and what the saved flags say.
    `dtype` None: as stored. Raises ValueError in one sentence, and then leaves nothing behind.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory: give the one that holds {CONFIG}")
    family = read_family(source / CONFIG)
    tensors = SafetensorsDirectory(source)
    try:
        flags = flags_of(family)
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from None
    if family.num_layers % pipeline_parallel:
        raise ValueError(f"--pipeline-model-parallel-size {pipeline_parallel} does not divide {family.num_layers} "
                         "layers: leave it out, the checkpoint can be loaded under every layout")
    if family.experts is not None and tensor_parallel > 1:
        flags.append("--sequence-parallel")  # which experts then need
    flags += ["--tensor-model-parallel-size", str(tensor_parallel),
              "--pipeline-model-parallel-size", str(pipeline_parallel),
              "--seq-length", str(seq_length or min(family.max_positions, LONGEST_SEQUENCE))]
    # Without tokenizer for now: what is wrong with the model or the layout is known before anything is written.
    args = _parse([*flags, *_null_tokenizer(family)], tensor_parallel * pipeline_parallel)
    padded = padded_vocab_size(family.vocab_size, args.make_vocab_size_divisible_by, tensor_parallel)
    prefix = family.prefix(tensors)
    fused = has_fused_experts(family, tensors, prefix)
    promised = model_parts(family, padded_vocab_size=padded, prefix=prefix, fused_experts=fused)
    parts = _described(promised, tensors, source)
    dtypes = [dtype or _common_dtype(part, tensors) for part in parts]

    with staged(target) as folder:
        (folder / TOKENIZER).mkdir()
        copy_tokenizer(source, folder / TOKENIZER, also=[CONFIG, GENERATION])
        tokenizer, size = _tokenizer(folder / TOKENIZER, target.resolve() / TOKENIZER, family, source)
        args = _parse([*flags, *tokenizer, *_HALF_PRECISION.get(dtypes[0], [])], tensor_parallel * pipeline_parallel)
        args.tokenizer_vocab_size, args.model_vocab_size, args.padded_vocab_size = size, family.vocab_size, padded
        directory = folder / "iter_0000000"
        directory.mkdir()
        with _progress([torch.Size(part.sizes).numel() * each.itemsize for part, each in zip(parts, dtypes)]) as done:
            chunks = [
                Chunk(part.key, part.shape, part.offsets, part.sizes, each, partial(_merge, part, tensors, each, done))
                for part, each in zip(parts, dtypes)
            ]
            objects = {key: [None] for key in extra_states(family)}
            write_torch_dist(directory, chunks, objects, _common_state(args))
    write_atomically(target / TRACKER, b"0")
    return (f"{target}: {family.model_type}, {family.num_layers} layers, {_dtype_name(dtypes[0])}, vocabulary of "
            f"{family.vocab_size} padded to {padded}")


def _parse(flags: Sequence[str], processes: int) -> Namespace:
    """pretrain.py's namespace for a run that trains nothing; it takes the number of processes from the environment."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        return parse_args([*flags, *UNTRAINED, "--no-save-optim", "--no-save-rng"])
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def _null_tokenizer(family: Family) -> list[str]:
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(family.vocab_size - 1)]  # it adds one token


def _tokenizer(copied: Path, final: Path, family: Family, source: Path) -> tuple[list[str], int]:
    """Flags of the tokenizer in `copied`, which will be at `final`, and its number of tokens."""
    if any((copied / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        from transformers import AutoTokenizer

        try:
            size = len(AutoTokenizer.from_pretrained(copied, local_files_only=True, trust_remote_code=False))
        except Exception as error:  # transformers and tokenizers have no common class of failures
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise ValueError(f"{source}: the tokenizer cannot be read: {type(error).__name__} {reason}") from error
        flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(final)]
    elif (copied / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        try:
            size = SentencePieceProcessor(model_file=str(copied / "tokenizer.model")).vocab_size()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{source / 'tokenizer.model'} is not a SentencePiece model") from error
        flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(final / "tokenizer.model")]
    else:
        flags, size = _null_tokenizer(family), family.vocab_size
    if size > family.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {size} tokens, more than the {family.vocab_size} of {CONFIG}")
    return flags, size


def _described(parts: Iterator[Part], tensors: SafetensorsDirectory, source: Path) -> list[Part]:
    """`parts`, if they are what `tensors` holds. The first that is not there ends it, however many are promised."""
    found, names = [], {"lm_head.weight"}  # which a tied model may hold too
    for part in parts:
        for stored in part.sources:
            if tensors.shape(stored.name) != stored.shape:
                raise ValueError(f"{stored.name} has shape {list(tensors.shape(stored.name))}, and {source / CONFIG} "
                                 f"makes it {list(stored.shape)}")
            tensors.dtype(stored.name)
            names.add(stored.name)
        found.append(part)
    for name in tensors.names():
        if name not in names and not name.endswith(_BUFFERS):
            raise ValueError(f"{source} holds {name}, which {CONFIG} says nothing of")
    return found


def _common_dtype(part: Part, tensors: SafetensorsDirectory) -> torch.dtype:
    dtypes = {tensors.dtype(stored.name) for stored in part.sources}
    if len(dtypes) > 1 or torch.float64 in dtypes:
        names = " and ".join(sorted(_dtype_name(dtype) for dtype in dtypes))
        raise ValueError(f"{part.sources[0].name} and what goes with it are stored as {names}: give --dtype")
    return dtypes.pop()


def _merge(part: Part, tensors: SafetensorsDirectory, dtype: torch.dtype, done: Any) -> torch.Tensor:
    found = [_finite(stored.name, tensors.tensor(stored.name).to(dtype)) for stored in part.sources]
    merged = part.to_megatron(found)
    done.update(merged.nbytes)
    return merged


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or ValueError."""
    if not all(bound.isfinite() for bound in tensor.aminmax()):  # which keep a NaN, and need no memory
        raise ValueError(f"{name} holds values that are NaN or infinite in {_dtype_name(tensor.dtype)}")
    return tensor


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common_state(args: Namespace) -> dict[str, Any]:
    """What training.checkpointing saves beside the tensors of a run that has not begun."""
    state = {"iteration": 0, "consumed_samples": 0, "skipped_iterations": 0}
    return {"checkpoint_version": 3.0, "iteration": 0, "args": saveable(args), "train_state": state}


def _progress(sizes: Sequence[int]) -> Any:
    return tqdm(total=sum(sizes), desc="converting", unit="B", unit_scale=True, disable=None, leave=False)


def export_model(source: Path, target: Path, *, dtype: torch.dtype | None) -> str:
    """Write the Hugging Face directory `target` from a Megatron checkpoint of any layout: the directory of --save, or
    one iteration's. Returns a line about it. `dtype` None: as stored.

    Raises ValueError in one sentence, and then leaves nothing behind.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory: give that of a Megatron checkpoint")
    directory = torch_dist.latest_directory(source)
    tensors = torch_dist.TorchDistDirectory(directory)
    args = tensors.args()
    try:
        family = family_of(args)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    tokenizers = [Path(args.tokenizer_model)] if getattr(args, "tokenizer_model", None) else []
    tokenizers.append(directory.parent / TOKENIZER)  # it may have been moved together with the checkpoint
    family, base = _original(family, args, tokenizers)
    prefix = "transformer." if family.is_fused else "model."
    parts = _stacked(model_parts(family, padded_vocab_size=args.padded_vocab_size, prefix=prefix), tensors, directory)
    dtypes = [dtype or tensors.dtype(part.key) for part in parts]
    entries = [Entry(stored.name, stored.shape, each) for part, each in zip(parts, dtypes) for stored in part.sources]

    with staged(target) as folder:
        with _progress([entry.num_bytes for entry in entries]) as done:
            pieces = (
                piece for part, each in zip(parts, dtypes) for piece in _split(part, tensors, each, done)
            )
            write_safetensors(folder, entries, pieces)
        if not any(_copy_any_tokenizer(path, folder) for path in tokenizers) and args.tokenizer_type != "NullTokenizer":
            print(f"convert_hf.py: no tokenizer is left in {tokenizers[0]}: {target} has none", file=sys.stderr)
        write_config(folder / CONFIG, family, dtypes[0], base)
    return f"{target}: {family.model_type}, {family.num_layers} layers, {_dtype_name(dtypes[0])}"


def _original(family: Family, args: Namespace, folders: Sequence[Path]) -> tuple[Family, dict[str, Any]]:
    """`family` with the name and the vocabulary of the model that was imported, and its configuration, where its
    config.json still lies beside the tokenizer."""
    def shape(of: Family) -> tuple[Any, ...]:
        return (of.num_layers, of.hidden_size, of.num_heads, of.num_groups, of.head_dim, of.ffn_hidden_size, of.experts)

    for folder in folders:
        path = (folder.parent if folder.is_file() else folder) / CONFIG
        try:
            stated = read_family(path)
        except (ValueError, OSError):  # of another model, or none
            continue
        names = (stated.model_type, family.model_type)
        is_same = names[0] == names[1] or names == ("mistral", "llama")
        fits = args.tokenizer_vocab_size <= stated.vocab_size <= args.padded_vocab_size
        if is_same and fits and shape(stated) == shape(family):
            activation = stated.activation if same_activation(stated, family) else family.activation
            named = {"model_type": stated.model_type, "vocab_size": stated.vocab_size, "activation": activation}
            return replace(family, **named), read_json(path)
    return family, {}


def _stacked(parts: Iterator[Part], tensors: torch_dist.TorchDistDirectory, directory: Path) -> list[Part]:
    """`parts`, if they are what `tensors` holds."""
    found, names = [], set()
    for part in parts:
        if tensors.shape(part.key) != part.shape:
            raise ValueError(f"{directory}: {part.key} has shape {list(tensors.shape(part.key))}, and the saved flags "
                             f"make it {list(part.shape)}")
        if tensors.dtype(part.key) not in DTYPES.values():
            raise ValueError(f"{directory}: {part.key} is stored as {_dtype_name(tensors.dtype(part.key))}: quantized "
                             "weights are not supported")
        found.append(part)
        names.add(part.key)
    for name in tensors.names():
        if name.startswith(("embedding.", "decoder.", "output_layer.")) and name not in names:
            raise ValueError(f"{directory} holds {name}, which has no counterpart in the supported families")
    return found


def _split(part: Part, tensors: torch_dist.TorchDistDirectory, dtype: torch.dtype, done: Any) -> Iterator[torch.Tensor]:
    block = tensors.block(part.key, part.offsets, part.sizes).to(dtype)
    for stored, piece in zip(part.sources, part.to_huggingface(block), strict=True):
        yield _finite(stored.name, piece)
        done.update(piece.nbytes)


def _copy_any_tokenizer(source: Path, target: Path) -> bool:
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.model")
        return True
    return copy_tokenizer(source, target, also=[GENERATION])


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory to fill; it gets the name `target` at the end, or vanishes after an exception.

    What a kill leaves is TARGET.partial, which the next conversion removes. Raises ValueError where `target` exists and
    is not an empty directory, or where TARGET.partial is somebody else's.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory")
    folder = partial_path(target)
    if folder.exists():
        if not (folder / _MARK).exists():
            raise ValueError(f"{folder} is in the way, and no conversion left it: move it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        with naming(folder):
            (folder / _MARK).touch()
            yield folder
            (folder / _MARK).unlink()
            for path in (*folder.rglob("*"), folder):
                sync(path)
            folder.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
