"""Language models that evaluate.py can score: a Megatron checkpoint of pretrain.py, a Hugging Face directory."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from _multiple_choice import Continuation
from megatron_geoscale import cpu


class LanguageModel(Protocol):
    """A causal model and its tokenizer."""

    name: str
    sequence_length: int

    def encode(self, text: str) -> list[int]: ...

    def logits(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """[b, longest of the batch, vocabulary]; what follows the end of a sequence means nothing."""


@torch.inference_mode()
def log_likelihoods(model: LanguageModel, requests: Sequence[Continuation], batch_size: int) -> list[float]:
    """As `_multiple_choice.LogLikelihoods`, softmax over the whole vocabulary in float64.

    Requests that differ in their last token only share a forward, so four letters cost one. Sequences of like length
    are batched together, the longest first: where memory does not suffice, it shows at once. Raises ValueError where
    the logits are not finite.
    """
    asking: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        asking.setdefault(request.tokens[:-1], []).append(index)
    sequences = sorted(asking, key=len, reverse=True)
    values = [0.0] * len(requests)
    with tqdm(total=len(sequences), desc="scoring", unit="prompt", disable=None, leave=False) as bar:
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            for sequence, logits in zip(batch, model.logits(batch), strict=True):
                for index in asking[sequence]:
                    values[index] = _log_likelihood(requests[index], logits)
            bar.update(len(batch))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{model.name}: the logits are not finite")
    return values


def _log_likelihood(request: Continuation, logits: torch.Tensor) -> float:
    """logits [s, vocabulary]; those at a position predict the token after it."""
    answer = torch.tensor(request.tokens[request.start :], device=logits.device)
    predicting = logits[request.start - 1 : len(request.tokens) - 1].double()
    return float(predicting.log_softmax(dim=-1).gather(1, answer[:, None]).sum())


def _pad(batch: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64 [b, longest], padded on the right: a causal model sees the padding only behind what counts."""
    longest = max(map(len, batch))
    return torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in batch], device=device)


class HuggingFaceModel:
    """AutoModelForCausalLM and AutoTokenizer of a directory with safetensors, in the stored dtype.

    A token that the tokenizer begins every text with, as Llama's does, begins every prompt.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ValueError in one sentence for a directory that cannot be read."""
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ValueError("--hf needs transformers: pip install megatron-geoscale[hf]") from None
        if not directory.is_dir():
            raise ValueError(f"--hf {directory} is not a directory")
        if not any(directory.glob("*.safetensors")):
            raise ValueError(f"--hf {directory} holds no *.safetensors file, and no other weights are read")
        self.name = str(directory)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, dtype="auto"
            )
        except Exception as error:  # transformers and safetensors have no common class of failures
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise ValueError(f"--hf {directory} cannot be read: {type(error).__name__} {reason}") from error
        self._model = model.to(self.device).eval()
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.sequence_length = int(longest or self._tokenizer.model_max_length)
        begin = self._tokenizer.bos_token_id
        self._begin = [begin] if begin is not None and self._tokenizer("")["input_ids"][:1] == [begin] else []

    def encode(self, text: str) -> list[int]:
        return self._begin + self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def logits(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        tokens = _pad(batch, self.device)
        lengths = torch.tensor([len(sequence) for sequence in batch], device=self.device)
        mask = torch.arange(tokens.size(1), device=self.device) < lengths[:, None]
        return self._model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits


class MegatronModel:
    """A checkpoint of pretrain.py, of any layout, on this process alone. Make it with `open_megatron`."""

    def __init__(self, args: Namespace, tokenizer: Any) -> None:
        from megatron_geoscale.attention.spec import attach_scaling
        from megatron_geoscale.training import checkpointing, model

        chunks = model.build_model(args)
        self.scaling = None if args.geoscale.recipe == "none" else attach_scaling(chunks, args.geoscale)
        run = checkpointing.Run(args, chunks, None, None, self.scaling, checkpointing.TrainState())
        self.name = str(checkpointing.load_checkpoint(run))
        self.sequence_length: int = args.seq_length
        self._geometric = args.geoscale.is_geometric
        if self._geometric:
            self.scaling.refresh()
        (self._model,) = chunks
        self._model.eval()
        self._tokenizer = tokenizer

    @property
    def saturated(self) -> int | None:
        """Values that FP8 casts have saturated since the model was made; None where nothing is cast."""
        return None if self.scaling is None else int(self.scaling.gauge.saturated.sum())

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.tokenize(text))

    def logits(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        tokens = _pad(batch, torch.device(torch.cuda.current_device()))
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        logits = self._model(tokens, positions, None)
        if self.scaling is not None and not self._geometric:
            self.scaling.end_step()  # delayed scaling has no scales but those of the batches before
        return logits


@contextmanager
def open_megatron(
    directory: Path,
    *,
    step: int | None = None,
    recipe: str = "none",
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
) -> Iterator[MegatronModel]:
    """The model of the latest checkpoint in `directory`, or of iteration `step`, built from the flags saved in it.

    `recipe` as --geoscale-recipe; a calibration is the checkpoint's. Holds a process group of this process meanwhile.
    Raises ValueError in one sentence for a checkpoint that cannot be read or a tokenizer that is not the model's.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ValueError("evaluate.py is a single process: start it without torchrun")
    cpu.quieten()
    cpu.install()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    args = _args_of(directory, step, recipe)
    tokenizer = _tokenizer_for(args, tokenizer_type, tokenizer_model)
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)  # construction draws, and loading replaces
        yield MegatronModel(args, tokenizer)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _args_of(directory: Path, step: int | None, recipe: str) -> Namespace:
    """pretrain.py's flags for a model like the checkpoint's, in its dtype."""
    from megatron_geoscale.training.arguments import parse_args
    from megatron_geoscale.training.checkpoint_args import UNTRAINED, saved_args

    load = ["--load", str(directory), *([] if step is None else ["--ckpt-step", str(step)])]
    source = Namespace(load=str(directory), ckpt_step=step, exit_on_missing_checkpoint=True, finetune=False)
    _, saved = saved_args(source)
    dtype = [f"--{name}" for name in ("bf16", "fp16") if getattr(saved, name, False)]
    weights_only = ["--use-checkpoint-args", "--no-load-optim", "--no-load-rng"]
    args = parse_args([*load, *weights_only, *dtype, "--geoscale-recipe", recipe, *UNTRAINED])
    args.padded_vocab_size = saved.padded_vocab_size
    args.model_vocab_size = getattr(saved, "model_vocab_size", saved.tokenizer_vocab_size)
    return args


def _tokenizer_for(args: Namespace, tokenizer_type: str | None, tokenizer_model: str | None) -> Any:
    """The checkpoint's tokenizer, or the one that the user names."""
    from megatron_geoscale.training import data
    from megatron_geoscale.training.arguments import TOKENIZER_TYPES, TOKENIZERS_WITHOUT_MODEL

    kind = tokenizer_type or args.tokenizer_type
    if kind not in TOKENIZER_TYPES:
        raise ValueError(f"--tokenizer-type must be one of {', '.join(TOKENIZER_TYPES)}, not {kind}")
    if kind == "NullTokenizer":
        raise ValueError(
            f"{args.load} was trained with NullTokenizer, which reads no text: give --tokenizer-type and "
            "--tokenizer-model"
        )
    model = tokenizer_model or args.tokenizer_model
    if model is None and kind not in TOKENIZERS_WITHOUT_MODEL:
        raise ValueError(f"--tokenizer-model is required with {kind}")
    tokenizer = data.build_tokenizer(kind, model, args.vocab_size if kind == "ByteLevelTokenizer" else None)
    if tokenizer.vocab_size > args.padded_vocab_size:
        raise ValueError(
            f"--tokenizer-model {model} has {tokenizer.vocab_size} tokens, more than the {args.padded_vocab_size} of "
            f"the model in {args.load}"
        )
    return tokenizer
