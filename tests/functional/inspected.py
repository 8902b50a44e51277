"""Tiny Hugging Face models of every family that inspect_scales.py takes, and directories of them."""

import functools
import shutil

from safetensors.torch import load_file, save_file

from tests.functional.hf_models import random_model

COMMON = dict(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
              intermediate_size=32, num_key_value_heads=2)
ROPE = dict(rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "gpt2": ("GPT2", dict(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=64)),
    "gpt2-by-layer": ("GPT2", dict(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=64,
                                   scale_attn_by_inverse_layer_idx=True)),
    "llama": ("Llama", COMMON | dict(attention_bias=True)),
    "llama-3.1": ("Llama", COMMON | dict(rope_parameters=ROPE | dict(
        rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0))),
    "llama-yarn": ("Llama", COMMON | dict(rope_parameters=ROPE | dict(rope_type="yarn"))),
    "llama-yarn-mscale": ("Llama", COMMON | dict(rope_parameters=ROPE | dict(
        rope_type="yarn", mscale=1.5, mscale_all_dim=0.5))),
    "mistral": ("Mistral", COMMON | dict(head_dim=20, sliding_window=8)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=20)),
    "qwen3-yarn": ("Qwen3", COMMON | dict(head_dim=20, rope_parameters=ROPE | dict(rope_type="yarn"))),
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=2, num_experts_per_tok=1)),
}


@functools.cache
def model_of(family):
    name, fields = FAMILIES[family]
    return random_model(name, fields | dict(attn_implementation="eager"), seed=family)


def saver(folder):
    """`saved(family)`: the model and the directory below `folder` that transformers saved it to."""

    @functools.cache
    def save(family):
        model = model_of(family)
        model.save_pretrained(folder / family)
        return model, folder / family

    return save


def edited(saved, tmp_path, change, family="llama"):
    """A copy of a family's directory whose tensors `change` has changed in place."""
    _, path = saved(family)
    copy = shutil.copytree(path, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy
