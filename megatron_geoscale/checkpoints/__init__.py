"""Checkpoints on disk, read tensor by tensor without building a model: Hugging Face directories and Megatron's.

`safetensors_dir` and `torch_dist` know files, `families` and `attention_weights` what the tensors in them mean, and
`inspection` computes from them what an engine would compute in a model.
"""
