"""Tokenizer, datasets and loaders: megatron-core's, behind checks that name the file when something is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronGPTDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_geoscale.training.exit_request import ignore_sigterm
from megatron_geoscale.training.model_arguments import padded_vocab_size as padded_vocab_size

_LIBRARIES = {
    "SentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "huggingface",
    "ByteLevelTokenizer": "byte-level",
    "NullTokenizer": "null",
}
_NUM_BYTES = 256
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


def build_tokenizer(tokenizer_type: str, model: str | None, vocab_size: int | None) -> Any:
    """megatron-core's tokenizer, from local files alone. `model`: a sentencepiece model, or a Hugging Face directory or
    the tokenizer.json in it; nothing for the other two. Of these NullTokenizer has `vocab_size` ids and one more, and
    ByteLevelTokenizer `vocab_size`, 512 by default: the bytes, of which 0 ends a document and 1 is padding.

    Raises ValueError where the file is missing, unreadable or of another size than `vocab_size`, when that is given.
    """
    library = {"library": _LIBRARIES[tokenizer_type]}
    if tokenizer_type == "NullTokenizer":
        return MegatronTokenizer.from_pretrained(metadata_path=library, vocab_size=vocab_size)
    if tokenizer_type == "ByteLevelTokenizer":
        if vocab_size is not None and vocab_size < _NUM_BYTES:
            raise ValueError(f"--vocab-size {vocab_size} is too small for ByteLevelTokenizer: there are {_NUM_BYTES}")
        size = {} if vocab_size is None else {"vocab_size": vocab_size}
        return MegatronTokenizer.from_pretrained(metadata_path=library, **size)
    path = Path(str(model))
    if not path.exists():
        raise ValueError(f"--tokenizer-model {model} does not exist")
    if tokenizer_type == "HuggingFaceTokenizer":
        if importlib.util.find_spec("transformers") is None:
            raise ValueError("HuggingFaceTokenizer needs transformers: pip install 'megatron-geoscale[hf]'")
        # What is no directory here would be looked up on the Hub.
        folder = path.parent if path.name == "tokenizer.json" else path
        if not folder.is_dir():
            raise ValueError(f"--tokenizer-model {model} is neither a directory nor a tokenizer.json")
        path = folder.resolve()
    try:
        tokenizer = MegatronTokenizer.from_pretrained(str(path), metadata_path=library)
    except Exception as error:  # each library has its own kinds of failure, none a common class
        cause = error.__context__ or error  # megatron-core wraps that of transformers
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ValueError(f"--tokenizer-model {model} cannot be read as a {tokenizer_type}: {reason}") from error
    if vocab_size is not None and tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size} is not the vocabulary of --tokenizer-model {model}, which has "
            f"{tokenizer.vocab_size} tokens"
        )
    return tokenizer


def check_indexed_dataset(prefix: str) -> None:
    """Raise ValueError, naming the file, unless PREFIX.idx and PREFIX.bin are whole and hold a document."""
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index, data):
        if not path.is_file():
            raise ValueError(f"data file {path} does not exist (--data-path takes the prefix, without .bin or .idx)")
    header_size = len(_INDEX_MAGIC) + 8 + 1 + 8 + 8
    with index.open("rb") as file:
        header = file.read(header_size)
        if len(header) < header_size or not header.startswith(_INDEX_MAGIC):
            raise ValueError(f"{index} is not a Megatron index file, or its header is truncated")
        version, code, num_sequences, num_documents = struct.unpack("<QBQQ", header[len(_INDEX_MAGIC) :])
        if version != 1 or code not in {dtype.value for dtype in DType}:
            raise ValueError(f"{index} is damaged: version {version} and token type {code} are not Megatron's")
        size = header_size + 4 * num_sequences + 8 * num_sequences + 8 * num_documents
        if index.stat().st_size < size:
            raise ValueError(f"{index} is truncated: {index.stat().st_size} bytes where its header promises {size}")
        if num_sequences == 0:
            raise ValueError(f"{index} holds no document: the corpus is empty")
        file.seek(header_size + 4 * (num_sequences - 1))
        (last_length,) = struct.unpack("<i", file.read(4))
        file.seek(header_size + 4 * num_sequences + 8 * (num_sequences - 1))
        (last_pointer,) = struct.unpack("<q", file.read(8))
    expected = last_pointer + last_length * DType.size(DType.dtype_from_code(code))
    if expected == 0:
        raise ValueError(f"{index} holds no token: the corpus is empty")
    if data.stat().st_size < expected:
        raise ValueError(f"{data} is truncated: {data.stat().st_size} bytes where {index.name} promises {expected}")


class GPTDataset(MegatronGPTDataset):
    """megatron-core's, but a split without tokens is refused: megatron-core would look for a sample of it for ever."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        if num_tokens_per_epoch == 0:
            raise ValueError(f"--split leaves no document of {self.dataset_path} for the {self.index_split.name} split")
        return int(super()._get_num_epochs(num_tokens_per_epoch))


def build_datasets(args: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any]:
    """Training and validation datasets, None on ranks that feed no model stage.

    Collective: rank 0 builds the index caches first. Raises ValueError naming the file or the flag.
    """
    num_train = args.train_iters * args.global_batch_size
    num_evaluations = args.train_iters // args.eval_interval + 1
    num_valid = num_evaluations * args.eval_iters * args.global_batch_size
    blends: dict[str, Any]
    if args.mock_data:
        blends = {}
    elif args.data_path:
        blends = {"blend": _blend(args.data_path), "split": args.split}
    else:
        per_split = [_blend(args.train_data_path), _blend(args.valid_data_path), None]
        blends = {"blend_per_split": per_split}
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        path_to_cache=args.data_cache_path,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.reset_attention_mask,
        **blends,
    )
    for split, size in ((1, num_valid), (2, 0)):
        if config.split_matrix and size == 0:
            config.split_matrix[split] = None  # not built, whether or not it has documents
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    train, valid, _ = BlendedMegatronDatasetBuilder(dataset, [num_train, num_valid, 0], _feeds_model, config).build()
    if _feeds_model() and num_train and train is None:
        raise ValueError(f"--split {args.split} leaves no document for training")
    # A split without documents gives no dataset: all ranks must know, those that read nothing too.
    found = torch.tensor(int(valid is not None), device=torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    args.has_validation = bool(found)
    return train, valid


def _blend(data_path: Sequence[str] | None) -> Any:
    if not data_path:
        return None
    blend = get_blend_from_list(list(data_path))
    for prefix in blend[0]:
        check_indexed_dataset(prefix)
    return blend


def _feeds_model() -> bool:
    """Whether this rank reads data: the first tensor-parallel rank of the first and the last pipeline stage."""
    stage = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return stage and parallel_state.get_tensor_model_parallel_rank() == 0


class BatchSampler(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of this data-parallel rank's micro batches, in order, from `consumed` samples on.

    The order depends on the samples consumed alone, so a run resumes where it stopped under any data-parallel size.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, rank: int, size: int) -> None:
        self.total, self.consumed, self.micro, self.rank, self.size = total, consumed, micro_batch_size, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro * self.size
        for start in range(self.consumed, self.total - step + 1, step):
            first = start + self.rank * self.micro
            yield list(range(first, first + self.micro))


def build_iterator(dataset: Any, consumed: int, args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]] | None:
    """Micro batches of `dataset` from sample `consumed` on; None where the rank has no dataset."""
    if dataset is None:
        return None
    sampler = BatchSampler(
        len(dataset),
        consumed,
        args.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    # Its own generator: the loader would draw its workers' seed from the one that dropout draws from.
    generator = torch.Generator().manual_seed(args.seed)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        generator=generator,
        worker_init_fn=ignore_sigterm,
    )
    return iter(loader)


def get_batch(iterator: Iterator[dict[str, torch.Tensor]] | None, args: argparse.Namespace) -> dict[str, Any]:
    """Next micro batch on every rank of the first and last pipeline stage; empty on a stage between them.

    tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s], attention_mask bool [b, 1, s, s] or None.
    The first tensor-parallel rank reads, the others receive; under context parallelism s is this rank's share of the
    sequence. Raises ValueError where a token is not in the vocabulary.
    """
    if not (parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()):
        return {}
    shape = (args.micro_batch_size, args.seq_length)
    fields = {"tokens": torch.int64, "labels": torch.int64, "position_ids": torch.int64, "loss_mask": torch.float32}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(fields, shape)
    if args.reset_attention_mask:
        fields["attention_mask"], shapes["attention_mask"] = torch.bool, (shape[0], 1, shape[1], shape[1])
    device = torch.cuda.current_device()
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        assert iterator is not None, "the first tensor-parallel rank reads the data"
        loaded = next(iterator)
        largest = int(torch.maximum(loaded["tokens"].max(), loaded["labels"].max()))
        if largest >= args.tokenizer_vocab_size:
            raise ValueError(
                f"token {largest} in the data is not in the vocabulary of {args.tokenizer_vocab_size} tokens: "
                "--data-path was written with another tokenizer than --tokenizer-model"
            )
        batch = {name: loaded[name].to(device=device, dtype=dtype) for name, dtype in fields.items()}
    else:
        batch = {name: torch.empty(shapes[name], dtype=dtype, device=device) for name, dtype in fields.items()}
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        source = parallel_state.get_tensor_model_parallel_src_rank()
        for tensor in batch.values():
            dist.broadcast(tensor, source, group=group)
    return get_batch_on_this_cp_rank({"attention_mask": None, **batch})
