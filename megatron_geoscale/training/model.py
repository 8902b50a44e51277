"""Builds the Megatron-Core GPT, its wrappers, optimizer and learning-rate schedule from the parsed flags."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import openai_gelu
from megatron.core.utils import init_method_normal, scaled_init_method_normal

from megatron_geoscale import cpu
from megatron_geoscale.attention.spec import use_fp8_attention
from megatron_geoscale.training.expert_arguments import expert_fields
from megatron_geoscale.training.expert_layers import provide_router_product, use_common_norm_name
from megatron_geoscale.training.fp8_arguments import fp8_fields
from megatron_geoscale.training.latent_attention import use_local_latent_attention
from megatron_geoscale.training.norm import use_local_norm
from megatron_geoscale.training.vocabulary import exclude_padding


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """megatron-core's config. Raises ValueError naming the flag for what this machine cannot run."""
    fields: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.num_query_groups,
        "kv_channels": args.kv_channels,
        "normalization": args.normalization,
        "layernorm_epsilon": args.norm_epsilon,
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "gated_linear_unit": args.swiglu,
        "activation_func": F.silu if args.swiglu else openai_gelu if args.openai_gelu else F.gelu,
        "add_bias_linear": not args.disable_bias_linear,
        "add_qkv_bias": args.add_qkv_bias,
        "qk_layernorm": args.qk_layernorm,
        "attention_output_gate": args.attention_output_gate,
        "rotary_interleaved": args.rotary_interleaved,
        "window_size": args.window_size,
        "window_attn_skip_freq": args.window_attn_skip_freq,
        "softmax_type": args.softmax_type,
        "apply_query_key_layer_scaling": args.apply_query_key_layer_scaling,
        "attention_dropout": args.attention_dropout,
        "hidden_dropout": args.hidden_dropout,
        "attention_softmax_in_fp32": True,
        "init_method": init_method_normal(args.init_method_std),
        "output_layer_init_method": scaled_init_method_normal(args.init_method_std, args.num_layers),
        "params_dtype": args.params_dtype,
        "pipeline_dtype": args.params_dtype,
        "bf16": args.bf16,
        "fp16": args.fp16,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "sequence_parallel": args.sequence_parallel,
        "recompute_granularity": args.recompute_granularity,
        "recompute_method": args.recompute_method,
        "recompute_num_layers": args.recompute_num_layers,
        # Initial weights come from the CPU generator, so they are the same with and without CUDA.
        "use_cpu_initialization": True,
        "deallocate_pipeline_outputs": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
        **expert_fields(args),
        **fp8_fields(args),
    }
    if args.virtual_pipeline_model_parallel_size and not torch.cuda.is_available():
        fields.update(cpu.CPU_PIPELINE_FIELDS)
    if args.multi_latent_attention:
        names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
                 "rotary_base", "rotary_percent", "rotary_scaling_factor", "mscale", "mscale_all_dim")
        return MLATransformerConfig(**fields, **{name: getattr(args, name) for name in names}, apply_rope_fusion=False)
    config = TransformerConfig(**fields)
    if args.position_embedding_type == "yarn":  # the config that megatron-core reads them from has no fields for them
        for name in ("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
                     "mscale_all_dim"):
            setattr(config, f"yarn_{name}", getattr(args, f"yarn_{name}"))
        config.yarn_correction_range_round_to_int = True
    return config


def ddp_config(args: argparse.Namespace) -> DistributedDataParallelConfig:
    """megatron-core's DDP settings; gradients of a bf16 model are summed in float32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32 or args.bf16,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
        # Under fp16 they tell the loss scaler to skip the step.
        check_for_nan_in_grad=not args.fp16 and not args.no_check_for_nan_in_loss_and_grad,
    )


def build_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's model chunks, one unless the pipeline is interleaved, wrapped in DDP.

    Logits beyond the first `args.model_vocab_size` of `args.padded_vocab_size` get no probability (`exclude_padding`).
    """
    config, ddp = transformer_config(args), ddp_config(args)
    if not torch.cuda.is_available():
        cpu.refuse_unsupported(config, ddp)
    num_chunks = args.virtual_pipeline_model_parallel_size or 1
    chunks: list[torch.nn.Module] = []
    for chunk in range(num_chunks):
        stage = chunk if num_chunks > 1 else None
        where: dict[str, Any] = {"ignore_virtual": stage is None, "vp_stage": stage}
        te_layers = args.transformer_impl == "transformer_engine"
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=te_layers,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=stage,
        )
        if not te_layers:
            use_local_norm(spec, args.normalization)
        if args.geoscale.recipe != "none":
            use_fp8_attention(spec, args.geoscale)
        if args.multi_latent_attention and not te_layers:
            use_local_latent_attention(spec)
        if args.num_experts is not None and not te_layers:
            use_common_norm_name(spec)
            provide_router_product()
        model: torch.nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            vp_stage=stage,
        )
        exclude_padding(model, args.model_vocab_size, args.padded_vocab_size)
        model.cuda(torch.cuda.current_device())
        if args.bf16 or args.fp16:
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=chunk > 0))
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if num_chunks > 1 else no_sync[0]
    return chunks


def build_optimizer(args: argparse.Namespace, chunks: list[torch.nn.Module]) -> MegatronOptimizer:
    """megatron-core's optimizer, distributed or not; Adam is Transformer Engine's, else NVIDIA Apex's, else torch's."""
    cpu.mend_distributed_optimizer()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=args.optimizer,
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            clip_grad=args.clip_grad,
            params_dtype=args.params_dtype,
            bf16=args.bf16,
            fp16=args.fp16,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        chunks,
    )
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(args: argparse.Namespace, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning-rate and weight-decay schedule, counted in samples as Megatron counts."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters * args.global_batch_size,
        lr_decay_steps=max(1, args.lr_decay_iters) * args.global_batch_size,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=max(1, args.train_iters) * args.global_batch_size,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
    )
