"""Megatron's flags for Transformer Engine: refused without it in one sentence, and what they set where it is."""

import pytest
import torch

from tests.unit.test_arguments import parse  # noqa: F401  (a fixture)

FP8 = "--transformer-impl transformer_engine --fp8-format hybrid"


@pytest.fixture
def with_te(monkeypatch):
    """A machine with a GPU and Transformer Engine 2.16.1, as far as the flags ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in ("attention.backend", "training.fp8_arguments"):
        monkeypatch.setattr(f"megatron_geoscale.{module}.installed_te", lambda: ((2, 16, 1), ""))


def config_of(args):
    from megatron_geoscale.training.fp8_arguments import fp8_fields

    return fp8_fields(args)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--transformer-impl transformer_engine", "--transformer-impl transformer_engine"),
        (FP8, "--transformer-impl transformer_engine"),
        ("--geoscale-attention te", "--geoscale-attention te"),
        ("--fp8-format e4m3", "--fp8-format e4m3"),
    ],
)
def test_without_transformer_engine(parse, flags, names):  # noqa: F811
    with pytest.raises(ValueError) as caught:
        parse(flags)
    assert str(caught.value) == (f"{names} needs Transformer Engine, and it is not installed: install "
                                 "megatron-geoscale[gpu]")


def test_without_a_gpu(parse, monkeypatch, with_te):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--transformer-impl transformer_engine needs a CUDA GPU, and there is none"):
        parse(FP8)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--fp8-format hybrid", "--fp8-format needs --transformer-impl transformer_engine"),
        ("--fp8-dot-product-attention --geoscale-recipe none", "--fp8-dot-product-attention needs --fp8-format"),
        (f"{FP8} --attention-backend flash", "--attention-backend flash has no FP8 attention"),
        (f"{FP8} --geoscale-recipe delayed", "needs --fp8-dot-product-attention"),
        ("--geoscale-recipe delayed", "needs --fp8-format hybrid"),
        (f"{FP8} --geoscale-recipe delayed --fp8-recipe tensorwise --fp8-dot-product-attention",
         "needs --fp8-recipe delayed"),
        ("--geoscale-log-sqnr", "--geoscale-log-sqnr is for --geoscale-attention emulated"),
        (f"{FP8} --fp8-amax-history-len 0", "--fp8-amax-history-len must be positive, not 0"),
        ("--geoscale-attention emulated --context-parallel-size 2",
         "--context-parallel-size above 1 is not for --geoscale-attention emulated"),
        ("--context-parallel-size 3", "--seq-length 32 is not divisible by twice --context-parallel-size 3"),
    ],
)
def test_contradictions(parse, with_te, flags, sentence):  # noqa: F811
    with pytest.raises(ValueError) as caught:
        parse(flags, world_size=6)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_megatron_fp8_launch_is_taken_as_it_is(parse, with_te):  # noqa: F811
    args = parse(f"{FP8} --fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-margin 1 "
                 "--fp8-dot-product-attention --attention-backend fused --no-fp8-wgrad --bf16 "
                 "--context-parallel-size 2 --geoscale-recipe certified", world_size=4)
    assert args.te_attention and args.data_parallel_size == 2
    from megatron.core.transformer.enums import AttnBackend

    assert config_of(args) == {
        "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max",
        "fp8_margin": 1, "fp8_dot_product_attention": True, "fp8_wgrad": False, "tp_only_amax_red": False,
        "first_last_layers_bf16": False, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1,
        "attention_backend": AttnBackend.fused, "transformer_impl": "transformer_engine",
    }


def test_auto_is_transformer_engine_where_it_is(parse, with_te):  # noqa: F811
    assert parse("--bf16").te_attention
    assert not parse("--geoscale-attention emulated").te_attention
    assert not parse("--geoscale-recipe none").te_attention
    assert parse(f"{FP8} --geoscale-recipe none").te_attention
    assert config_of(parse("--bf16"))["fp8"] is None


def test_auto_is_the_emulation_where_it_is_not(parse):  # noqa: F811
    args = parse()
    assert not args.te_attention and "fp8_recipe" not in config_of(args)
