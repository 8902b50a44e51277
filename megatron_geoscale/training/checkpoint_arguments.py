"""The flags about checkpoints: Megatron-LM's names where Megatron-LM has them."""

from __future__ import annotations

import argparse

from megatron_geoscale.training.model_arguments import require


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """When to save and what to load."""
    group = parser.add_argument_group("checkpointing")
    add = group.add_argument
    add("--save", metavar="DIR")
    add("--save-interval", type=int)
    add("--async-save", action="store_true", help="write checkpoints in a process beside training")
    add("--keep-last", type=int, metavar="N", help="keep this many complete checkpoints and delete older ones after a "
        "save; default: all")
    add("--load", metavar="DIR")
    add("--ckpt-step", type=int, help="load this iteration instead of the latest")
    add("--ckpt-format", default="torch_dist", choices=("torch_dist",))
    add("--finetune", action="store_true", help="load the weights only and start at iteration 0")
    add("--no-load-optim", action="store_true")
    add("--no-load-rng", action="store_true")
    add("--no-save-optim", action="store_true")
    add("--no-save-rng", action="store_true")
    add("--exit-on-missing-checkpoint", action="store_true")
    add("--use-checkpoint-args", action="store_true", help="take the model's flags and the tokenizer from the "
        "checkpoint in --load, whatever is typed, and the sequence length and dropout unless they are typed")
    add("--no-use-tokenizer-model-from-checkpoint-args", action="store_false",
        dest="use_tokenizer_model_from_checkpoint_args", help="with it, take --tokenizer-model from here")
    add("--trust-checkpoint-pickles", action="store_true", help="let a checkpoint's pickles name any function, which "
        "is called as they are read: only for a directory that nobody else can write to")


def check_checkpoint_args(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    for name, needs in (("--save-interval", args.save_interval), ("--keep-last", args.keep_last),
                        ("--async-save", args.async_save or None)):
        require(needs is None or args.save is not None, f"{name} needs --save, the directory to save to")
    require(args.keep_last is None or args.keep_last > 0, f"--keep-last must be positive, not {args.keep_last}")
