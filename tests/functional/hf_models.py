"""Tiny random models of every family that convert_hf.py knows, and the Megatron checkpoints made from them."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

import convert_hf
from tests.functional.common import BATCH, NO_DROPOUT, flags_of

VOCABULARY, LENGTH = 150, 48
COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=LENGTH, intermediate_size=48)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0)
YARN_ROPE = dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=LENGTH // 3, rope_theta=1000.0)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH)),
    "llama-2": ("Llama", COMMON | dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3.1": ("Llama", COMMON | dict(rope_parameters=LLAMA3_ROPE)),
    "linear": ("Llama", COMMON | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1000.0))),
    "yarn": ("Qwen2", COMMON | dict(rope_parameters=YARN_ROPE, num_hidden_layers=3)),
    "mistral": ("Mistral", COMMON | dict(head_dim=20, sliding_window=8)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=20)),
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": ("Qwen3Moe", COMMON | dict(head_dim=20, num_experts=3, num_experts_per_tok=2,
                                            moe_intermediate_size=36)),
}


def make_model(family, **changes):
    """A random model of `FAMILIES`."""
    name, fields = FAMILIES[family]
    return random_model(name, fields | changes, seed=family)


def random_model(name, fields, *, seed):
    """A model of transformers, everything off its initial value, weights large enough for attention to matter."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**fields, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(sum(map(ord, seed)))
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.1 if parameter.dim() > 1 else 0.3) * torch.randn_like(parameter)
    return model.float().eval()


def convert(*argv):
    """convert_hf.py with these arguments."""
    convert_hf.main([*map(str, argv)])


def resume(checkpoint, *more):
    """Flags of a run that goes on from the checkpoint: none of the model, the tokenizer or the sequence length."""
    return flags_of(BATCH, NO_DROPOUT, "--mock-data --use-checkpoint-args --geoscale-recipe none",
                    ["--load", checkpoint], *more)


def random_tokens(length=LENGTH):
    """int64 [2, length]."""
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def importer(folder: Path) -> Callable:
    """`importer(folder)(family)`: the model, transformers' directory of it, and the Megatron checkpoint made from that,
    both in `folder`."""

    @functools.cache
    def make(family):
        model = make_model(family)
        model.save_pretrained(folder / family)
        convert("import", folder / family, folder / f"{family}-megatron")
        return model, folder / family, folder / f"{family}-megatron"

    return make
