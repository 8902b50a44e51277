"""Refresh time of the scales beside the training step that it belongs to: `python benchmarks/refresh.py [--json PATH]`.

Two cases: the demo's model against its whole training step, and one layer of Llama-2-7B's shape against that layer's
forward and backward. Within a case everything runs in turn, round by round, and a share is the median of the rounds'
ratios. docs/BENCHMARKS.md says how to read the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _measure import (
    machine_line,
    megatron_on_one_rank,
    paired,
    parser,
    progress,
    set_up,
    shares,
    svd_of_triangles,
    write_json,
)

LLAMA = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --untie-embeddings-and-output-weights
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data --train-iters 100 --lr 1e-4
"""
DEMO = """
    --num-layers 4 --hidden-size 256 --num-attention-heads 8 --group-query-attention --num-query-groups 4
    --seq-length 256 --micro-batch-size 4 --vocab-size 4096
"""
LLAMA_2_7B_LAYER = """
    --num-layers 1 --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads {heads} --kv-channels 128
    --seq-length {length} --micro-batch-size 1 --vocab-size 128
"""
RECIPES = {
    "refresh, certified": ("--geoscale-recipe", "certified"),
    "refresh, paper": ("--geoscale-recipe", "paper"),
    "refresh, paper, layer granularity": ("--geoscale-recipe", "paper", "--geoscale-granularity", "layer"),
}
FORWARD_BACKWARD = "layer, forward + backward"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="of the 7B-shaped layer (default: 3)")
    options.add_argument("--demo-rounds", type=int, default=10, help="of the demo's model (default: 10)")
    options.add_argument("--bf16", action="store_true", help="weights and arithmetic of the models in bfloat16")
    options.add_argument("--shrink", type=int, default=1, metavar="N",
                         help="divide the sizes of the 7B-shaped layer, its heads too, by N, to try the script")
    return options.parse_args(argv)


def demo_model(precision: list[str], rounds: int) -> list[dict[str, Any]]:
    """The demo's model, unsharded: a refresh of its four layers against one whole training step."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_geoscale.attention.spec import attach_scaling
    from megatron_geoscale.training import model
    from megatron_geoscale.training.arguments import parse_args

    args = parse_args([*(LLAMA + DEMO).split(), *precision])
    args.padded_vocab_size = args.model_vocab_size = args.vocab_size
    chunks = model.build_model(args)
    optimizer = model.build_optimizer(args, chunks)
    engines = {what: attach_scaling(chunks, _config(flags)) for what, flags in RECIPES.items()}
    tokens = torch.randint(args.vocab_size, (args.micro_batch_size, args.seq_length + 1))
    positions = torch.arange(args.seq_length).expand(args.micro_batch_size, -1)

    def forward(_: Any, gpt: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        losses = gpt(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
        return losses, lambda output: (output.float().sum(), torch.tensor(output.numel(), dtype=torch.int), {})

    schedule = partial(
        get_forward_backward_func(), forward_step_func=forward, data_iterator=None, model=chunks, num_microbatches=1,
        seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=False,
    )

    def step() -> None:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule()
        optimizer.step()

    for engine in engines.values():
        engine.refresh()
    refreshes = {what: engine.refresh for what, engine in engines.items()}
    case = "demo model"
    return list(paired(case, ("training step: forward, backward, optimizer", step), refreshes, rounds=rounds, inner=1))


def _config(flags: tuple[str, ...]) -> Any:
    from megatron_geoscale.config import add_geoscale_args, geoscale_config_from_args

    return geoscale_config_from_args(add_geoscale_args(argparse.ArgumentParser()).parse_args(flags))


class Layer:
    """One Megatron layer of Llama-2-7B's shape with FP8 attention, in a GPT whose vocabulary is next to nothing."""

    def __init__(self, precision: list[str], shrink: int) -> None:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        from megatron_geoscale.attention.spec import attach_scaling, use_emulated_attention
        from megatron_geoscale.training.arguments import parse_args
        from megatron_geoscale.training.model import transformer_config
        from megatron_geoscale.training.norm import use_torch_norm

        sizes = {"hidden": 4096, "ffn": 11008, "heads": 32, "length": 2048}
        shape = LLAMA_2_7B_LAYER.format(**{name: size // shrink for name, size in sizes.items()})
        args = parse_args([*(LLAMA + shape).split(), *precision])
        config = transformer_config(args)
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=use_emulated_attention(use_torch_norm(spec)),
            vocab_size=args.vocab_size,
            max_sequence_length=args.seq_length,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        if args.bf16:
            gpt.bfloat16()
        gpt.train()
        self.module = gpt.decoder.layers[0]
        self.engines = {what: attach_scaling([gpt], _config(flags)) for what, flags in RECIPES.items()}
        self.attention = next(iter(self.engines.values())).layers[0]
        self.rotary = gpt.rotary_pos_emb(args.seq_length)
        shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
        self.hidden = torch.randn(shape, dtype=args.params_dtype, requires_grad=True)
        self.gradient = torch.randn(shape, dtype=args.params_dtype)
        self._warm_up()

    def _warm_up(self) -> None:
        """Give the power estimators the vectors of a training under way: random weights would take hundreds of steps
        to converge from random vectors, which a run does once, when it starts."""
        from megatron_geoscale.spectral import power_iteration

        p = self.attention.projections()
        for engine in self.engines.values():
            if engine.estimator.power:
                granularity = engine.config.granularity
                start = self.start(granularity)
                estimates, vectors = power_iteration(p.q, p.k, start, 20, granularity=granularity)
                prefix = f"geoscale.power_iteration.layer_{self.attention.number}"
                engine.load_state_dict({f"{prefix}.vectors": vectors, f"{prefix}.estimates": estimates})
            engine.refresh()

    def start(self, granularity: str) -> torch.Tensor:
        """Start vectors of the power iteration."""
        from megatron_geoscale.spectral import start_vectors

        heads = range(self.attention.num_heads) if granularity == "head" else None
        return start_vectors(self.attention.hidden_size, layer=self.attention.number, heads=heads)

    def forward_backward(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        self.hidden.grad = None
        output, _ = self.module(self.hidden, attention_mask=None, rotary_pos_emb=self.rotary)
        output.backward(self.gradient)


def layer_of_7b(precision: list[str], rounds: int, shrink: int) -> list[dict[str, Any]]:
    """One Llama-2-7B-shaped layer: norms, parts of a refresh and whole refreshes against forward and backward."""
    from megatron_geoscale.bounds.rotary import rotary_norm_bound
    from megatron_geoscale.spectral import gram, gram_norm, power_iteration

    case = "7B-shaped layer"
    progress(f"{case}: building it")
    layer = Layer(precision, shrink)
    heads = f"norms of {layer.attention.num_heads} heads"
    p = layer.attention.projections()
    grams = gram(p.q), gram(p.k)
    starts = {granularity: layer.start(granularity) for granularity in ("head", "layer")}
    others: dict[str, Callable[[], Any]] = {
        f"{heads}, Gram": lambda: gram_norm(p.q, p.k),
        f"{heads}, one power step": lambda: power_iteration(p.q, p.k, starts["head"], 1, granularity="head"),
        "norm of the layer, one power step": lambda: power_iteration(p.q, p.k, starts["layer"], 1, granularity="layer"),
        f"{heads}, QR and SVD of R_A R_B^T": lambda: svd_of_triangles(p.q, p.k),
        "part: folded projections in float64": layer.attention.projections,
        "part: Gram matrices of Q, K and V": lambda: (gram(p.q), gram(p.k), gram(p.v)),
        "part: norms from Gram matrices": lambda: gram_norm(p.q, p.k, grams=grams),
        "part: rotation-safe bound from Gram matrices": lambda: rotary_norm_bound(
            p.q, p.k, rotary_dim=layer.attention.geometry.rotary_dim, grams=grams
        ),
        **{what: engine.refresh for what, engine in layer.engines.items()},
    }
    return list(paired(case, (FORWARD_BACKWARD, layer.forward_backward), others, rounds=rounds, inner=5))


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    about = set_up(options.threads)
    about["weights"] = "bfloat16" if options.bf16 else "float32"
    precision = ["--bf16"] if options.bf16 else []
    with megatron_on_one_rank():
        rows = demo_model(precision, options.demo_rounds)
        rows += layer_of_7b(precision, options.rounds, options.shrink)
    print(f"{machine_line(about)} {about['weights']} weights. Shares are of the first row of each case.\n")
    print(shares(rows))
    write_json(options.json, about, {"rows": rows})


if __name__ == "__main__":
    main()
