"""The flags of the model: Megatron-LM's names and defaults, and what they demand of each other."""

from __future__ import annotations

import argparse
import re

import torch

POSITION_EMBEDDINGS = ("learned_absolute", "rope", "yarn", "none")


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def flag(name: str) -> str:
    """The flag that sets `args.name`."""
    return "--" + name.replace("_", "-")


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel_size: int) -> int:
    """Vocabulary padded, as Megatron does, so that every tensor-parallel rank holds an equal, aligned share."""
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """The model's flags."""
    group = parser.add_argument_group("network size")
    add = group.add_argument
    add("--num-layers", type=int)
    add("--hidden-size", type=int)
    add("--ffn-hidden-size", type=int, help="default: 4 * hidden size, with --swiglu 8/3 of it in multiples of 64")
    add("--num-attention-heads", type=int)
    add("--kv-channels", type=int, help="head dim; default: hidden size / attention heads")
    add("--group-query-attention", action="store_true")
    add("--num-query-groups", type=int, default=1)
    add("--max-position-embeddings", type=int)
    add("--position-embedding-type", default="learned_absolute", choices=POSITION_EMBEDDINGS)
    add("--no-position-embedding", action="store_true", help="none is learned; --position-embedding-type says what is")
    add("--rotary-base", type=int, default=10000)
    add("--rotary-percent", type=float, default=1.0)
    add("--rotary-interleaved", action="store_true")
    add("--rotary-seq-len-interpolation-factor", type=int)
    add("--use-rope-scaling", action="store_true")
    add("--rope-scaling-factor", type=float, default=8.0)
    add("--make-vocab-size-divisible-by", type=int, default=128)
    add("--normalization", default="LayerNorm", choices=("LayerNorm", "RMSNorm"))
    add("--norm-epsilon", type=float, default=1e-5)
    add("--apply-layernorm-1p", action="store_true", help="norm gain is 1 + weight")
    add("--swiglu", action="store_true")
    add("--openai-gelu", action="store_true", help="GELU by tanh, as GPT-2 has it")
    add("--untie-embeddings-and-output-weights", action="store_true")
    add("--disable-bias-linear", action="store_true")
    add("--add-qkv-bias", action="store_true")
    add("--qk-layernorm", action="store_true")
    add("--qk-l2-norm", action="store_true", help="L2-normalise queries and keys, without a gain")
    add("--attention-output-gate", action="store_true")
    add("--window-size", nargs="+", metavar="N", help="keys that a query sees before and behind it: 127 0, or 127,0")
    add("--window-attn-skip-freq", type=int, metavar="N", help="every Nth layer attends to everything")
    add("--softmax-type", default="vanilla", choices=("vanilla", "off-by-one", "learnable"))
    add("--apply-query-key-layer-scaling", action="store_true")
    add("--init-method-std", type=float, default=0.02)
    _add_yarn_args(parser)
    _add_latent_args(parser)


def _add_yarn_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("YaRN, of --position-embedding-type yarn").add_argument
    add("--yarn-rotary-scaling-factor", type=float, help="trained length / original length")
    add("--yarn-original-max-position-embeddings", type=int, default=4096)
    add("--yarn-beta-fast", type=float, default=32.0)
    add("--yarn-beta-slow", type=float, default=1.0)
    add("--yarn-mscale", type=float, default=1.0)
    add("--yarn-mscale-all-dim", type=float, default=0.0)


def _add_latent_args(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("multi-latent attention").add_argument
    add("--multi-latent-attention", action="store_true")
    add("--q-lora-rank", type=int, help="rank of the queries' latent; default: none, queries from the hidden state")
    add("--kv-lora-rank", type=int, default=32)
    add("--qk-head-dim", type=int, default=128, help="of the part that is not rotated")
    add("--qk-pos-emb-head-dim", type=int, default=64, help="of the part that is rotated")
    add("--v-head-dim", type=int, default=128)
    add("--rope-type", choices=("rope", "yarn"), help="default: yarn")
    add("--rotary-scaling-factor", type=float, default=1.0, help="YaRN's")
    add("--mscale", type=float, default=1.0, help="YaRN's")
    add("--mscale-all-dim", type=float, default=0.0, help="YaRN's")


def check_model(args: argparse.Namespace) -> None:
    """Check the model's flags and fill in what follows from them. Raises ValueError naming the flag."""
    if args.multi_latent_attention:
        _check_latent(args)
    require(args.multi_latent_attention or args.rope_type is None, "--rope-type is for --multi-latent-attention")
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.kv_channels is None:
        require(
            args.hidden_size % heads == 0,
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {heads}; "
            "give --kv-channels to set the head dim apart",
        )
        args.kv_channels = args.hidden_size // heads
    if not args.group_query_attention:
        args.num_query_groups = groups = heads
    require(heads % groups == 0, f"--num-attention-heads {heads} is not divisible by --num-query-groups {groups}")
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = int(4 * args.hidden_size * 2 / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
        require(args.ffn_hidden_size > 0, "--ffn-hidden-size is required at so small a --hidden-size with --swiglu")
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    require(
        args.seq_length <= args.max_position_embeddings,
        f"--seq-length {args.seq_length} exceeds --max-position-embeddings {args.max_position_embeddings}",
    )
    require(0.0 < args.rotary_percent <= 1.0, f"--rotary-percent must lie in (0, 1], not {args.rotary_percent}")
    _check_positions(args)
    _check_window(args)
    require(not (args.bf16 and args.fp16), "--bf16 and --fp16 exclude each other")
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _check_positions(args: argparse.Namespace) -> None:
    require(
        not args.no_position_embedding or args.position_embedding_type != "learned_absolute",
        "--no-position-embedding needs --position-embedding-type rope, yarn or none",
    )
    yarn = args.position_embedding_type == "yarn"
    require(
        args.multi_latent_attention
        or args.position_embedding_type not in ("rope", "yarn")
        or args.kv_channels % 2 == 0,
        f"RoPE rotates pairs: --kv-channels {args.kv_channels} must be even",
    )
    factor = args.yarn_rotary_scaling_factor
    require(
        yarn == (factor is not None), "--position-embedding-type yarn and --yarn-rotary-scaling-factor need each other"
    )
    require(not yarn or factor >= 1, f"--yarn-rotary-scaling-factor must be at least 1, not {factor}")
    for name, neutral in (("rotary_interleaved", False), ("use_rope_scaling", False), ("rotary_percent", 1.0),
                          ("rotary_seq_len_interpolation_factor", None)):
        require(
            not yarn or getattr(args, name) == neutral,
            f"{flag(name)} does nothing, or worse, with --position-embedding-type yarn in megatron-core: remove it",
        )


def _check_window(args: argparse.Namespace) -> None:
    if args.window_size is not None:
        text = " ".join(args.window_size)
        sizes = re.findall(r"-?\d+", text)
        require(
            re.fullmatch(r"\(?\s*-?\d+\s*[, ]\s*-?\d+\s*\)?", text),
            f"--window-size takes two numbers, keys before and behind the query, not {text!r}",
        )
        args.window_size = (int(sizes[0]), int(sizes[1]))
        require(
            args.window_size[0] >= 0 and args.window_size[1] == 0,
            f"--window-size {text}: a GPT sees no key behind the query, so the second number is 0 and the first is not "
            "negative",
        )
    freq = args.window_attn_skip_freq
    require(freq is None or args.window_size is not None, "--window-attn-skip-freq needs --window-size")
    require(freq is None or freq > 0, f"--window-attn-skip-freq must be positive, not {freq}")


def _check_latent(args: argparse.Namespace) -> None:
    """--multi-latent-attention. Its head dim of values stands in for --kv-channels."""
    for name in ("group_query_attention", "kv_channels", "qk_l2_norm", "attention_output_gate", "add_qkv_bias",
                 "rotary_interleaved", "use_rope_scaling", "rotary_seq_len_interpolation_factor"):
        require(not getattr(args, name), f"{flag(name)} is not for --multi-latent-attention: remove it")
    require(
        args.position_embedding_type != "yarn",
        "--position-embedding-type yarn is not for --multi-latent-attention: use rope with --rope-type yarn",
    )
    for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        value = getattr(args, name)
        require(value is None or value > 0, f"{flag(name)} must be positive, not {value}")
    require(
        args.qk_pos_emb_head_dim % 2 == 0,
        f"RoPE rotates pairs: --qk-pos-emb-head-dim {args.qk_pos_emb_head_dim} must be even",
    )
    factor = args.rotary_scaling_factor
    require(factor >= 1, f"--rotary-scaling-factor must be at least 1, not {factor}")
    require(args.mscale >= 0 and args.mscale_all_dim >= 0, "--mscale and --mscale-all-dim must not be negative")
    tp = args.tensor_model_parallel_size
    for value, names in (
        (args.q_lora_rank or 0, "--q-lora-rank"),
        (args.kv_lora_rank + args.qk_pos_emb_head_dim, "--kv-lora-rank plus --qk-pos-emb-head-dim"),
    ):
        require(value % tp == 0, f"{names}, {value}, is not divisible by --tensor-model-parallel-size {tp}")
    args.rope_type = args.rope_type or "yarn"
    args.kv_channels = args.v_head_dim
