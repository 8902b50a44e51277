"""The command line: Megatron-LM's names and defaults, what follows from them, and what is refused in one sentence."""

import pytest
import torch

from megatron_geoscale.config import GeoScaleConfig

REQUIRED = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --micro-batch-size 2 --train-iters 10 "
    "--lr 1e-3 --mock-data --vocab-size 100"
)


@pytest.fixture
def parse(megatron, monkeypatch):
    """parse_args with the required flags, then `flags`, in a job of `world_size` ranks."""
    from megatron_geoscale.training.arguments import parse_args

    def parse(flags="", world_size=1, required=REQUIRED):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return parse_args((required + " " + flags).split())

    return parse


def test_defaults_are_megatrons(parse):
    args = parse()
    expected = dict(
        lr_decay_style="linear", min_lr=0.0, weight_decay=0.01, clip_grad=1.0, adam_beta1=0.9, adam_beta2=0.999,
        adam_eps=1e-8, seed=1234, attention_dropout=0.1, hidden_dropout=0.1, normalization="LayerNorm",
        norm_epsilon=1e-5, init_method_std=0.02, position_embedding_type="learned_absolute", rotary_base=10000,
        rotary_percent=1.0, make_vocab_size_divisible_by=128, eval_iters=100, eval_interval=1000, log_interval=100,
        num_workers=2, ckpt_format="torch_dist", tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
        sequence_parallel=False, use_distributed_optimizer=False, optimizer="adam", lr_warmup_iters=0,
        window_size=None, window_attn_skip_freq=None, softmax_type="vanilla", apply_query_key_layer_scaling=False,
        multi_latent_attention=False, q_lora_rank=None, kv_lora_rank=32, qk_head_dim=128, qk_pos_emb_head_dim=64,
        v_head_dim=128, rope_type=None, rotary_scaling_factor=1.0, mscale=1.0, mscale_all_dim=0.0,
    )
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.geoscale == GeoScaleConfig()
    assert args.params_dtype == torch.float32


def test_derived_values(parse):
    args = parse()
    assert (args.kv_channels, args.num_query_groups, args.ffn_hidden_size) == (8, 8, 256)
    assert (args.max_position_embeddings, args.global_batch_size, args.lr_decay_iters) == (32, 2, 10)
    assert args.fault is None and args.virtual_pipeline_model_parallel_size is None
    assert parse("--swiglu --hidden-size 96").ffn_hidden_size == 256
    assert parse("--swiglu --hidden-size 4096").ffn_hidden_size == 10880  # Megatron's int(4 h * 2/3 / 64) * 64
    assert parse("--num-query-groups 2").num_query_groups == 8  # Megatron's: no groups without the flag
    assert parse("--group-query-attention --num-query-groups 2").num_query_groups == 2
    assert parse("--lr-warmup-fraction 0.25").lr_warmup_iters == 2
    assert parse("--recompute-activations").recompute_granularity == "selective"
    assert parse("--bf16").params_dtype == torch.bfloat16 and parse("--fp16").params_dtype == torch.float16


def test_windows_in_every_spelling(parse):
    for text in ("127 0", "127,0", "(127,0)"):
        assert parse(f"--window-size {text}").window_size == (127, 0)
    assert parse("--window-size 4 0 --window-attn-skip-freq 2").window_attn_skip_freq == 2


def test_latent_and_yarn_flags_reach_megatrons_config(parse):
    from megatron_geoscale.training.model import transformer_config

    args = parse("--multi-latent-attention --qk-layernorm --hidden-size 60 --mscale 0.7 --rotary-scaling-factor 40")
    config = transformer_config(args)
    assert (args.rope_type, args.num_query_groups, config.kv_channels) == ("yarn", 8, 128)
    assert (config.multi_latent_attention, config.q_lora_rank, config.kv_lora_rank) == (True, None, 32)
    assert (config.mscale, config.rotary_scaling_factor, config.rope_type) == (0.7, 40.0, "yarn")
    yarn = transformer_config(parse("--position-embedding-type yarn --yarn-rotary-scaling-factor 8"))
    found = {name[5:]: value for name, value in vars(yarn).items() if name.startswith("yarn_")}
    assert found == dict(
        rotary_scaling_factor=8.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
        mscale_all_dim=0.0, correction_range_round_to_int=True,
    )
    variants = "--window-size 4 0 --softmax-type learnable --apply-query-key-layer-scaling"
    config = transformer_config(parse(variants))
    assert (config.window_size, config.softmax_type) == ((4, 0), "learnable") and config.apply_query_key_layer_scaling
    assert not hasattr(config, "yarn_rotary_scaling_factor")  # megatron-core would apply it to any RoPE


def test_layout_is_derived_from_the_number_of_ranks(parse):
    args = parse("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", world_size=8)
    assert (args.data_parallel_size, args.global_batch_size) == (2, 4)
    interleaved = parse(
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 4", world_size=2
    )
    assert interleaved.virtual_pipeline_model_parallel_size == 2
    plain = parse("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", world_size=2)
    assert plain.virtual_pipeline_model_parallel_size is None
    shared = parse("--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4", world_size=4)
    assert shared.num_query_groups == 2  # two ranks share a group
    assert parse("--sequence-parallel").sequence_parallel is False  # as Megatron: there is nothing to split


def test_faults_and_scaler_flags_are_read(parse):
    args = parse(
        "--geoscale-fault-injection weight_spike:3:0.5 --geoscale-recipe paper --geoscale-margin 0.5 "
        "--geoscale-failure-probability 1e-3 --geoscale-refresh-interval 4 --geoscale-granularity layer "
        "--geoscale-logits-dtype fp8"
    )
    assert (args.fault.kind, args.fault.step, args.fault.factor) == ("weight_spike", 3, 0.5)
    assert args.geoscale == GeoScaleConfig(
        recipe="paper", estimator="power", granularity="layer", margin=0.5, failure_probability=1e-3,
        refresh_interval=4, logits_dtype="fp8",
    )
    assert parse("--geoscale-fault-injection nan_weight:7").fault.step == 7
    assert parse("--geoscale-recipe certified").geoscale.estimator == "gram"


def test_flags_of_megatron_scripts_that_ask_for_what_happens_anyway(parse):
    from megatron_geoscale.training.arguments import WITHOUT_EFFECT

    plain, ignored = vars(parse()), vars(parse(" ".join(WITHOUT_EFFECT)))
    changed = {name for name in plain if plain[name] != ignored[name]}
    assert changed == {flag[2:].replace("-", "_") for flag in WITHOUT_EFFECT}


@pytest.mark.parametrize(
    "flag",
    ["num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size", "train-iters", "lr"],
)
def test_required_flags_are_named(parse, flag):
    words = REQUIRED.split()
    at = words.index(f"--{flag}")
    with pytest.raises(ValueError, match=f"^--{flag} is required$"):
        parse(required=" ".join(words[:at] + words[at + 2 :]))


REFUSED = {  # flags: (ranks, what the sentence must say)
    "--no-such-flag": (1, "--no-such-flag"),
    "--num-layer 3": (1, "--num-layer"),  # no abbreviations
    "--num-layers two": (1, "--num-layers"),
    "--num-layers 0": (1, "--num-layers must be positive, not 0"),
    "--seq-length -1": (1, "--seq-length must be positive"),
    "--num-attention-heads 7": (1, "--num-attention-heads 7"),
    "--group-query-attention --num-query-groups 3": (1, "--num-query-groups 3"),
    "--tensor-model-parallel-size 3": (3, "--num-attention-heads 8 is not divisible by --tensor-model-parallel-size 3"),
    "--num-attention-heads 12 --hidden-size 96 --group-query-attention --num-query-groups 6 "
    "--tensor-model-parallel-size 4": (4, "--num-query-groups 6"),
    "--kv-channels 1 --group-query-attention --tensor-model-parallel-size 4": (4, "--num-query-groups 1"),
    "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4 --attention-output-gate": (
        4, "--attention-output-gate"
    ),
    "--ffn-hidden-size 65 --tensor-model-parallel-size 2": (2, "--ffn-hidden-size 65"),
    "--tensor-model-parallel-size 2": (3, "3 processes"),
    "--pipeline-model-parallel-size 3": (3, "--num-layers 4"),
    "--num-layers-per-virtual-pipeline-stage 2": (1, "--pipeline-model-parallel-size"),
    "--num-layers-per-virtual-pipeline-stage 3 --pipeline-model-parallel-size 2": (2, "virtual-pipeline-stage 3"),
    "--num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 2": (2, "micro batches"),
    "--sequence-parallel --tensor-model-parallel-size 2 --seq-length 31": (2, "--seq-length 31"),
    "--context-parallel-size 2": (2, "--context-parallel-size"),
    "--overlap-param-gather": (1, "--use-distributed-optimizer"),
    "--transformer-impl transformer_engine": (1, "--transformer-impl"),
    "--max-position-embeddings 16": (1, "--max-position-embeddings 16"),
    "--position-embedding-type rope --kv-channels 7": (1, "--kv-channels 7"),
    "--position-embedding-type alibi": (1, "--position-embedding-type"),
    "--bf16 --fp16": (1, "--fp16"),
    "--global-batch-size 3": (1, "--global-batch-size 3"),
    "--train-iters -1": (1, "--train-iters"),
    "--lr 0": (1, "--lr must be positive"),
    "--attention-dropout 1": (1, "--attention-dropout"),
    "--hidden-dropout -0.1": (1, "--hidden-dropout"),
    "--lr-warmup-iters 10": (1, "--lr-warmup-iters 10"),
    "--lr-warmup-iters 1 --lr-warmup-fraction 0.1": (1, "--lr-warmup-fraction"),
    "--save-interval 5": (1, "--save"),
    "--recompute-activations --recompute-granularity full": (1, "--recompute-activations"),
    "--recompute-granularity full": (1, "--recompute-method"),
    "--data-path /somewhere": (1, "one source of data"),
    "--tokenizer-type SentencePieceTokenizer": (1, "--tokenizer-model"),
    "--tokenizer-type GPT2BPETokenizer": (1, "--tokenizer-type"),
    "--vocab-size 0": (1, "--vocab-size"),
    "--swiglu --hidden-size 16": (1, "--ffn-hidden-size"),
    "--geoscale-recipe magic": (1, "--geoscale-recipe"),
    "--geoscale-estimator magic": (1, "--geoscale-estimator"),
    "--geoscale-granularity row": (1, "--geoscale-granularity"),
    "--geoscale-margin 1.5": (1, "--geoscale-margin"),
    "--geoscale-margin nan": (1, "--geoscale-margin"),
    "--geoscale-failure-probability 0": (1, "--geoscale-failure-probability"),
    "--geoscale-refresh-interval 0": (1, "--geoscale-refresh-interval"),
    "--geoscale-logits-dtype bf16": (1, "--geoscale-logits-dtype"),
    "--geoscale-backward fp8": (1, "--geoscale-backward must be one of bound, delayed, bf16"),
    "--geoscale-recipe current --geoscale-backward bound": (1, "--geoscale-backward bound needs a recipe"),
    "--geoscale-attention te": (1, "--geoscale-attention te"),
    "--geoscale-fault-injection weight_spike:3": (1, "--geoscale-fault-injection"),
    "--geoscale-fault-injection nan_weight:x": (1, "--geoscale-fault-injection"),
    "--geoscale-fault-injection nan_weight:0": (1, "--geoscale-fault-injection"),
    "--geoscale-fault-injection fire": (1, "--geoscale-fault-injection"),
    "--eval-iters -1": (1, "--eval-iters"),
    "--num-workers -1": (1, "--num-workers"),
    "--rampup-batch-size 2 x 10": (1, "--rampup-batch-size"),
    "--position-embedding-type rope --rotary-percent 0": (1, "--rotary-percent"),
    "--window-size 4": (1, "--window-size takes two numbers"),
    "--window-size 4 1": (1, "--window-size 4 1"),
    "--window-size -1 0": (1, "--window-size"),
    "--window-attn-skip-freq 2": (1, "--window-attn-skip-freq needs --window-size"),
    "--window-size 4 0 --window-attn-skip-freq 0": (1, "--window-attn-skip-freq must be positive"),
    "--softmax-type sink": (1, "--softmax-type"),
    "--position-embedding-type yarn": (1, "--yarn-rotary-scaling-factor"),
    "--yarn-rotary-scaling-factor 8": (1, "--position-embedding-type yarn"),
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 0.5": (1, "--yarn-rotary-scaling-factor"),
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 8 --rotary-percent 0.5": (1, "--rotary-percent"),
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 8 --rotary-interleaved": (1, "--rotary-interleaved"),
    "--position-embedding-type yarn --yarn-rotary-scaling-factor 8 --kv-channels 7": (1, "--kv-channels 7"),
    "--rope-type yarn": (1, "--rope-type is for --multi-latent-attention"),
    "--multi-latent-attention --group-query-attention": (1, "--group-query-attention"),
    "--multi-latent-attention --kv-channels 8": (1, "--kv-channels"),
    "--multi-latent-attention --rotary-interleaved": (1, "--rotary-interleaved"),
    "--multi-latent-attention --add-qkv-bias": (1, "--add-qkv-bias"),
    "--multi-latent-attention --position-embedding-type yarn": (1, "--rope-type yarn"),
    "--multi-latent-attention --qk-pos-emb-head-dim 7": (1, "--qk-pos-emb-head-dim 7"),
    "--multi-latent-attention --kv-lora-rank 0": (1, "--kv-lora-rank must be positive"),
    "--multi-latent-attention --rotary-scaling-factor 0.5": (1, "--rotary-scaling-factor"),
    "--multi-latent-attention --mscale -1": (1, "--mscale"),
    "--multi-latent-attention --kv-lora-rank 31 --tensor-model-parallel-size 2": (2, "--kv-lora-rank plus"),
    "--multi-latent-attention --q-lora-rank 31 --tensor-model-parallel-size 2": (2, "--q-lora-rank"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_refused_by_its_flag(parse, flags):
    ranks, culprit = REFUSED[flags]
    with pytest.raises(ValueError) as refusal:
        parse(flags, world_size=ranks)
    sentence = str(refusal.value)
    assert culprit in sentence and "\n" not in sentence and len(sentence) < 250


def test_without_data_or_tokenizer_the_flags_to_give_are_named(parse):
    bare = REQUIRED.replace("--mock-data --vocab-size 100", "")
    for flags, culprit in (("", "--mock-data"), ("--data-path x", "--tokenizer-type"), ("--mock-data", "--vocab-size")):
        with pytest.raises(ValueError, match=culprit):
            parse(flags, required=bare)
    assert parse("--data-path x --tokenizer-type NullTokenizer --vocab-size 9", required=bare).split == "969, 30, 1"
