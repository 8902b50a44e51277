"""Tiny random models of every family that convert_hf.py knows, and the Megatron checkpoints made from them."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

import convert_hf

VOCABULARY, LENGTH = 150, 48
COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=LENGTH, intermediate_size=48)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH)),
    "llama-2": ("Llama", COMMON | dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3.1": ("Llama", COMMON | dict(rope_parameters=LLAMA3_ROPE)),
    "mistral": ("Mistral", COMMON | dict(head_dim=20, sliding_window=8)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True, num_key_value_heads=2)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=20)),
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
