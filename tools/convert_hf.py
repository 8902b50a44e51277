#!/usr/bin/env python3
"""Converts a Hugging Face model into a checkpoint of pretrain.py, and back.

GPT-2, Llama (2, 3, 3.1), Mistral, Mixtral, Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE, in safetensors. Weights come back bit
by bit. After `import HF_DIR MEGATRON_DIR`, `pretrain.py --load MEGATRON_DIR --use-checkpoint-args` needs no flag of the
model or the tokenizer, under any tensor-, pipeline- and expert-parallel layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from _cli import ArgumentParser, run
from _conversion import LONGEST_SEQUENCE, export_model, import_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="convert_hf.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add_import = commands.add_parser("import", help="Hugging Face to Megatron", allow_abbrev=False).add_argument
    add_import("source", type=Path, metavar="HF_DIR", help="config.json, safetensors and the tokenizer's files")
    add_import("target", type=Path, metavar="MEGATRON_DIR", help="new or empty")
    add_import("--tensor-model-parallel-size", type=int, default=1, metavar="N",
               help="the vocabulary is padded to a multiple of 128 N, and the saved flags name N; the weights load "
               "under any layout that can split them")
    add_import("--pipeline-model-parallel-size", type=int, default=1, metavar="N",
               help="the saved flags name N; it must divide the number of layers")
    add_import("--seq-length", type=int, metavar="L",
               help=f"in the saved flags; default: the longest that the model takes, at most {LONGEST_SEQUENCE}")
    add_export = commands.add_parser("export", help="Megatron to Hugging Face", allow_abbrev=False).add_argument
    add_export("source", type=Path, metavar="MEGATRON_DIR", help="directory of --save, or one iteration's, any layout")
    add_export("target", type=Path, metavar="HF_DIR", help="new or empty")
    for add in (add_import, add_export):
        add("--dtype", choices=DTYPES, help="of the written weights; default: as stored")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    if args.command == "export":
        print(export_model(args.source, args.target, dtype=dtype))
        return
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "seq_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value}")
    print(import_model(
        args.source, args.target, tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size, dtype=dtype, seq_length=args.seq_length,
    ))


if __name__ == "__main__":
    sys.exit(run(main))
