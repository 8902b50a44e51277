#!/usr/bin/env python3
"""Memory of a GPU and cost of a refresh under a launch script's flags, by formulas: the tables of the READMEs here.

    python examples/sizing.py examples/llama2_70b/train_llama2_70b.sh [--nodes N] [FLAG...]

Nothing is measured. Letters: d hidden size, f FFN size, n and g query and key/value heads, h head dimension, L layers
of the GPU's pipeline stage, V padded vocabulary, b tokens of a micro batch, T tensor-, P pipeline-, D data-parallel
size.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_geoscale.training.arguments import build_parser
from megatron_geoscale.training.model_arguments import check_model, padded_vocab_size

BANDWIDTH, FP64, FP8 = 3.35e12, 67e12, 1979e12
"""Of an H100 SXM: bytes/s of its memory, FLOP/s of FP64 and of dense FP8 products.
https://www.nvidia.com/en-us/data-center/h100/"""
GB = 1e9


@dataclass(frozen=True)
class Layout:
    """What a launch script asks for: `args` of pretrain.py on `world` GPUs."""

    args: argparse.Namespace
    world: int

    @property
    def tensor(self) -> int:
        return int(self.args.tensor_model_parallel_size)

    @property
    def stages(self) -> int:
        return int(self.args.pipeline_model_parallel_size)

    @property
    def replicas(self) -> int:
        return self.world // (self.tensor * self.stages)

    @property
    def layers(self) -> int:
        """Of a stage."""
        return int(self.args.num_layers) // self.stages

    @property
    def vocabulary(self) -> int:
        """Padded."""
        return padded_vocab_size(self.args.vocab_size + 1, self.args.make_vocab_size_divisible_by, self.tensor)

    @property
    def micro_batch(self) -> int:
        """Tokens."""
        return int(self.args.micro_batch_size * self.args.seq_length)


def layout_of(command: Sequence[str]) -> Layout:
    """Of a launch script's command. Raises ValueError naming a flag as pretrain.py does."""
    start = next(i for i, word in enumerate(command) if word.endswith("pretrain.py"))
    launcher, flags = command[:start], command[start + 1 :]
    args = build_parser().parse_args(flags)
    check_model(args)
    nodes, per_node = (int(launcher[launcher.index(name) + 1]) for name in ("--nnodes", "--nproc-per-node"))
    return Layout(args, nodes * per_node)


def command_of(script: Path, nodes: int | None, flags: Sequence[str]) -> list[str]:
    """What `script` would run on mock data."""
    environment = {**os.environ, "DRY_RUN": "1", "SMOKE": "0", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    for name in ("NUM_NODES", "GPUS_PER_NODE"):
        environment.pop(name, None)
    if nodes is not None:
        environment["NUM_NODES"] = str(nodes)
    done = subprocess.run([script.resolve(), "CHECKPOINTS", "TENSORBOARD", "MOCK", "MOCK", *flags], env=environment,
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"{script} failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


def qkv_weights(layout: Layout) -> int:
    """Elements of a layer's W_Q, W_K and W_V on one GPU: (n + 2 g) h d / T."""
    args = layout.args
    heads = args.num_attention_heads + 2 * args.num_query_groups
    return int(heads * args.kv_channels * args.hidden_size) // layout.tensor


def linear_weights(layout: Layout) -> int:
    """Elements of the weights of a layer's four linear layers on one GPU."""
    args = layout.args
    rows = args.num_attention_heads * args.kv_channels + (3 if args.swiglu else 2) * args.ffn_hidden_size
    return int(qkv_weights(layout) + args.hidden_size * rows // layout.tensor)


def layer_parameters(layout: Layout) -> int:
    """Parameters of a layer on one GPU. Biases of column-parallel layers are split, the others and norms are not."""
    args, d = layout.args, layout.args.hidden_size
    norm = d if args.normalization == "RMSNorm" else 2 * d
    count = linear_weights(layout) + 2 * norm
    if not args.disable_bias_linear:
        columns = args.ffn_hidden_size * (2 if args.swiglu else 1)
        count += (qkv_weights(layout) // d) + columns // layout.tensor + 2 * d
    return int(count)


def parameters(layout: Layout, stage: int) -> int:
    """Parameters of a GPU of pipeline stage `stage`."""
    args, d = layout.args, layout.args.hidden_size
    words = layout.vocabulary * d // layout.tensor
    first, last = stage == 0, stage == layout.stages - 1
    count = layout.layers * layer_parameters(layout)
    if first:
        count += words + (args.max_position_embeddings * d if args.position_embedding_type == "learned_absolute" else 0)
    if last:
        count += d if args.normalization == "RMSNorm" else 2 * d
        count += words if args.untie_embeddings_and_output_weights or not first else 0
    return int(count)


def model_parameters(layout: Layout) -> int:
    """Parameters of the whole model, padding of the vocabulary included."""
    whole = Layout(argparse.Namespace(**{**vars(layout.args), "tensor_model_parallel_size": 1,
                                         "pipeline_model_parallel_size": 1}), 1)
    return parameters(whole, 0)


def activation_bytes(layout: Layout) -> float:
    """What a layer keeps of one micro batch for its backward pass, on one GPU: BF16, no recompute, fused attention.

    Inputs and outputs of both norms, 8 d bytes a token; Q, K, V and O, (4 n + 4 g) h; the FFN's first product and the
    second's input, 6 f under SwiGLU and 4 f else. Without sequence parallelism the first part is not split.
    """
    args = layout.args
    norms = 8 * args.hidden_size / (layout.tensor if args.sequence_parallel else 1)
    heads = 4 * (args.num_attention_heads + args.num_query_groups) * args.kv_channels
    ffn = (6 if args.swiglu else 4) * args.ffn_hidden_size
    return layout.micro_batch * (norms + (heads + ffn) / layout.tensor)


def table(layout: Layout) -> str:
    """The README's table: the stage that needs the most, and the refresh of its layers."""
    args = layout.args
    in_flight = args.global_batch_size // (args.micro_batch_size * layout.replicas)
    copies = 2 * layout.layers * linear_weights(layout)
    rows = []
    for stage in range(layout.stages):
        count = parameters(layout, stage)
        kept = min(layout.stages - stage, in_flight) * layout.layers * activation_bytes(layout)
        logits = 10 * layout.micro_batch * layout.vocabulary / layout.tensor if stage == layout.stages - 1 else 0
        rows.append((6 * count + 12 * count / layout.replicas + copies + kept + logits, stage, count, kept, logits))
    total, stage, count, kept, logits = max(rows)
    elements = layout.layers * qkv_weights(layout)
    operations = 2 * args.kv_channels * elements
    refresh = 34 * elements / BANDWIDTH + operations / FP64
    tokens = args.global_batch_size * args.seq_length
    step = 6 * model_parameters(layout) * tokens / layout.world / FP8
    held = min(layout.stages - stage, in_flight)
    lines = [
        ("parameters of the model, M", "vocabulary padded", f"{model_parameters(layout) / 1e9:.2f} billion"),
        (f"parameters of a GPU, p (stage {stage + 1} of {layout.stages})", "M / (T P), plus this stage's embedding",
         f"{count / 1e9:.3f} billion"),
        ("weights, BF16", "2 p", f"{2 * count / GB:.1f} GB"),
        ("gradients, FP32", "4 p", f"{4 * count / GB:.1f} GB"),
        ("optimizer: FP32 weights and Adam's two moments, shared", f"12 p / D, D = {layout.replicas}",
         f"{12 * count / layout.replicas / GB:.1f} GB"),
        ("FP8 copies of the linear layers' weights, and transposed", "2 L (W_QKV + W_O + W_FFN) / T",
         f"{copies / GB:.1f} GB"),
        (f"activations of {held} micro batch{'es' * (held > 1)}", f"{held} L b (8 d + (4 n + 4 g) h + "
         f"{6 if args.swiglu else 4} f) / T", f"{kept / GB:.1f} GB"),
        ("logits, their FP32 copy and gradient", "10 b V / T on the last stage", f"{logits / GB:.1f} GB"),
        ("**sum**, without CUDA's and NCCL's buffers", "", f"**{total / GB:.1f} GB**"),
        ("refresh: W_Q, W_K, W_V of the GPU, w", "L (n + 2 g) h d / T", f"{elements / 1e6:.0f} million"),
        ("refresh: FP64 copy of one layer, before activations are there", "8 w / L",
         f"{8 * qkv_weights(layout) / GB:.2f} GB"),
        ("refresh: least that any method reads", "2 w bytes / 3.35 TB/s", _time(2 * elements / BANDWIDTH)),
        ("refresh: bytes moved, with the FP64 copy", "34 w bytes / 3.35 TB/s", _time(34 * elements / BANDWIDTH)),
        ("refresh: Gram matrices", f"2 h w = {operations / 1e9:.1f} GFLOP / 67 TFLOP/s", _time(operations / FP64)),
        ("shortest step, all products at the FP8 peak", f"6 M {tokens / 1e6:.2f}e6 tokens / {layout.world} GPUs / "
         "1979 TFLOP/s", _time(step)),
        ("**refresh / step**, both at their least", "(moved + Gram) / step", f"**{100 * refresh / step:.3f} %**"),
    ]
    return "\n".join(["| what | formula | per GPU |", "|---|---|---:|", *(f"| {' | '.join(line)} |" for line in lines)])


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, metavar="TRAIN_SCRIPT")
    parser.add_argument("--nodes", type=int, metavar="N", help="of 8 GPUs; default: the script's")
    args, flags = parser.parse_known_args(argv)
    try:
        print(table(layout_of(command_of(args.script, args.nodes, flags))))
    except (ValueError, OSError) as error:
        print(f"sizing.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
