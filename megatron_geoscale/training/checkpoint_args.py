"""--use-checkpoint-args: the model's flags, tokenizer, sequence length and dropout from the checkpoint in --load.

As in Megatron-LM, whose launch scripts then need no flag of the model. What the model is, the checkpoint decides,
whatever is typed; of what a run may choose, `RUN_FLAGS`, it gives the default. The saved values are parsed as if they
had been typed, so a value that pretrain.py does not take is refused as it would be on the command line. No process
group is needed. load_args_from_checkpoint in
https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/checkpointing.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_geoscale.training.expert_arguments import add_expert_model_args
from megatron_geoscale.training.model_arguments import add_model_args, flag, require

RUN_FLAGS = ("seq_length", "attention_dropout", "hidden_dropout")
"""Taken from the checkpoint where they are not typed. So is --max-position-embeddings, unless positions are learned."""
UNTRAINED = ("--mock-data", "--micro-batch-size", "1", "--train-iters", "0", "--lr", "1")
"""What pretrain.py requires of a command line, for a model that is built and not trained."""
TOKENIZER = "tokenizer"
"""Directory of a converted model's tokenizer, in that of the checkpoint."""


def saveable(args: argparse.Namespace) -> argparse.Namespace:
    """What of `args` a checkpoint keeps under "args": all that is plain."""
    kept = str | int | float | bool | tuple | None
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if isinstance(value, kept)})


def checkpoint_flags() -> tuple[str, ...]:
    """Names of what a checkpoint decides: all that `add_model_args` and `add_expert_model_args` add, sequence length,
    tokenizer, vocabulary."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_args(parser)
    add_expert_model_args(parser)
    return (*vars(parser.parse_args([])), "seq_length", "tokenizer_type", "tokenizer_model", "vocab_size")


def saved_args(args: argparse.Namespace) -> tuple[Path, argparse.Namespace]:
    """Directory and flags of the checkpoint that --load and --ckpt-step name. A tokenizer that is not where it was is
    looked for beside the checkpoint, where convert_hf.py puts it: both may have been moved together.

    Raises ValueError where there is none, or where it is damaged.
    """
    from megatron_geoscale.checkpoints.iterations import TRACKER
    from megatron_geoscale.checkpoints.torch_dist import TorchDistDirectory
    from megatron_geoscale.training.checkpointing import checkpoint_to_load

    require(args.load is not None, "--use-checkpoint-args needs --load, the checkpoint to take the flags from")
    directory = checkpoint_to_load(args)
    if directory is None:
        raise ValueError(f"--load {args.load} holds no checkpoint to take the flags from: {TRACKER} is not there")
    saved = TorchDistDirectory(directory).args()
    if getattr(saved, "tokenizer_model", None) is not None and not os.path.exists(saved.tokenizer_model):
        beside = directory.parent / TOKENIZER
        found = [path for path in (beside / Path(saved.tokenizer_model).name, beside) if path.exists()]
        saved.tokenizer_model = str(found[0]) if found else saved.tokenizer_model
    return directory, saved


def parse_with_checkpoint_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags in `argv`, those of `checkpoint_flags` replaced by what the checkpoint in --load was saved with.

    A typed flag that contradicts the checkpoint is overridden, with one printed line, unless it is one of `RUN_FLAGS`;
    one that the checkpoint says nothing of keeps its value. Raises ValueError as `saved_args`, and for saved values
    that `parser` refuses.
    """
    names = tuple(dict.fromkeys((*checkpoint_flags(), *RUN_FLAGS)))
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))  # None: not typed
    directory, saved = saved_args(typed)
    decided = _decided(saved, names)
    if not typed.use_tokenizer_model_from_checkpoint_args and typed.tokenizer_model is not None:
        decided.pop("tokenizer_model", None)
    chosen = RUN_FLAGS
    if getattr(saved, "position_embedding_type", None) != "learned_absolute":
        chosen += ("max_position_embeddings",)
    for name in chosen:
        if getattr(typed, name) is not None:
            decided.pop(name, None)

    start = {name: parser.get_default(name) for name in names}
    start |= {name: value for name in names if name not in decided and (value := getattr(typed, name)) is not None}
    flags = [word for name, value in decided.items() for word in _words(name, value)]
    try:
        args = parser.parse_args(flags, argparse.Namespace(**{**vars(typed), **start}))
    except ValueError as error:
        raise ValueError(f"{directory} was saved with a flag that pretrain.py cannot take: {error}") from error
    if os.environ.get("RANK", "0") == "0":
        for name in decided:
            before, after = getattr(typed, name), getattr(args, name)
            if before is not None and _text(before) != _text(after):
                print(f"--use-checkpoint-args: {flag(name)} is {_text(after)} as in {directory}, not {_text(before)}",
                      flush=True)
    return args


def saved_flags(load: str) -> list[str]:
    """The latest checkpoint's model, sequence length, tokenizer and vocabulary as a command line; `load` is --load's
    directory. Raises ValueError as `saved_args`."""
    wanted = argparse.Namespace(load=load, ckpt_step=None, exit_on_missing_checkpoint=True, finetune=False)
    _, saved = saved_args(wanted)
    return [word for name, value in _decided(saved, checkpoint_flags()).items() for word in _words(name, value)]


def _decided(saved: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    decided = {name: getattr(saved, name) for name in names if hasattr(saved, name)}
    if decided.get("multi_latent_attention"):
        del decided["kv_channels"]  # follows from --v-head-dim, and must not be given beside it
    return decided


def _words(name: str, value: Any) -> list[str]:
    """The command line that sets `name` to `value`; nothing for what is not set."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag(name)]
    if isinstance(value, tuple | list):
        return [flag(name), *map(str, value)]
    return [f"{flag(name)}={value}"]


def _text(value: Any) -> str:
    """`value` as it is typed, lists in one spelling."""
    return " ".join(map(str, value)).replace(",", " ") if isinstance(value, list) else str(value)
