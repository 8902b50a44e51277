"""What keeps TE from fused FP8 attention: each fact alone, several together, and the facts of this machine."""

import dataclasses
import sys
import types

import pytest
import torch

from megatron_geoscale.attention.obstacles import (
    AttentionFacts,
    facts_here,
    fp8_attention_obstacles,
    installed_te,
    parse_version,
)

BLACKWELL = {"capability": (10, 0)}
CONTEXT_PARALLEL = {"context_parallel_size": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"te_version": None}, "not installed"),
        ({"te_version": None, "te_problem": "it lacks einops"}, "einops"),
        ({"te_version": (2, 8)}, "2.8 is too old"),
        ({"te_version": (2, 21, 0)}, "2.21.0 is too new"),
        ({"te_version": (3, 0)}, "too new"),
        ({"capability": None}, "GPU"),
        ({"capability": (8, 9)}, "sm89"),
        ({"capability": (12, 0)}, "sm120"),
        ({"cudnn_version": (9, 6, 0)}, "cuDNN 9.6.0"),
        ({"cudnn_version": (9, 10, 0)}, "cuDNN 9.10.0"),
        ({"environment": {"NVTE_FUSED_ATTN": "0"}}, "NVTE_FUSED_ATTN"),
        ({"environment": {"NVTE_DPA_FP8_RECIPE": "F16"}}, "NVTE_DPA_FP8_RECIPE"),
        ({"environment": {"NVTE_FP8_DPA_BWD": "0"}}, "--geoscale-backward"),
        ({"dtype": torch.float32}, "--bf16"),
        ({"head_dim_qk": 192}, "--multi-latent-attention"),
        ({"head_dim_qk": 64, "head_dim_v": 64}, "--kv-channels 64"),
        ({"head_dim_qk": 256, "head_dim_v": 256}, "--kv-channels 256"),
        ({"head_dim_qk": 256, "head_dim_v": 256} | BLACKWELL, "--kv-channels 256"),
        ({"head_dim_qk": 72, "head_dim_v": 72} | BLACKWELL, "multiple of 16"),
        ({"layout": "thd"}, "packed"),
        ({"attention_type": "cross"}, "cross attention"),
        ({"mask": "arbitrary"}, "mask"),
        ({"bias": True}, "bias"),
        ({"window": (127, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type learnable"),
        ({"dropout": 0.1}, "--attention-dropout 0.1"),
        ({"max_logit": True}, "--qk-clip"),
        ({"deterministic": True, "te_version": (2, 11, 0)}, "--deterministic-mode"),
        ({"deterministic": True, "cudnn_version": (9, 18, 1)}, "--deterministic-mode"),
        ({"mask": "padding_causal"} | CONTEXT_PARALLEL, "--context-parallel-size"),
        ({"cp_comm_type": "all_gather"} | CONTEXT_PARALLEL, "--cp-comm-type all_gather"),
        ({"cp_comm_type": "a2a", "num_groups": 1} | CONTEXT_PARALLEL, "--cp-comm-type a2a"),
    ],
)
def test_each_obstacle_is_one_sentence_that_names_it(changes, named):
    (sentence,) = fp8_attention_obstacles(AttentionFacts(**changes))
    assert named in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"te_version": (2, 9, 0)},
        {"te_version": (2, 20, 2)},
        {"cudnn_version": (9, 7, 0)},
        {"window": (-1, 0)},
        {"mask": "padding_causal"},
        {"environment": {"NVTE_DPA_FP8_RECIPE": "DelayedScaling", "NVTE_FUSED_ATTN": "1"}},
        {"environment": {"NVTE_FP8_DPA_BWD": "0"}, "fp8_backward": False},
        {"deterministic": True},
        {"head_dim_qk": 64, "head_dim_v": 64} | BLACKWELL,
        {"cp_comm_type": "a2a", "num_groups": 8} | CONTEXT_PARALLEL,
    ],
)
def test_what_is_none(changes):
    assert fp8_attention_obstacles(AttentionFacts(**changes)) == []


def test_every_obstacle_is_told_at_once():
    facts = AttentionFacts(te_version=(2, 8), capability=(8, 0), dropout=0.1, window=(63, 0), head_dim_qk=64)
    assert len(fp8_attention_obstacles(facts)) == 5


@pytest.mark.parametrize(
    ("text", "version"), [("2.16.1+4d3a", (2, 16, 1)), ("2.9", (2, 9)), ("2.20.0.dev0", (2, 20, 0)), ("main", ())]
)
def test_versions(text, version):
    assert parse_version(text) == version


def test_facts_of_a_model_on_this_machine(megatron, monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig

    for name in ("NVTE_FUSED_ATTN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "0")
    config = TransformerConfig(
        num_layers=2,
        hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        tensor_model_parallel_size=2,
        bf16=True,
        params_dtype=torch.bfloat16,
        attention_dropout=0.1,
        window_size=(16, 0),
        window_attn_skip_freq=2,
    )
    facts = facts_here(config, layer_number=1, fp8_backward=False)
    expected = {
        "dtype": torch.bfloat16,
        "head_dim_qk": 64,
        "head_dim_v": 64,
        "num_heads": 2,
        "num_groups": 1,
        "window": (16, 0),
        "dropout": 0.1,
        "deterministic": True,
        "max_logit": False,
        "context_parallel_size": 1,
        "cp_comm_type": "p2p",
        "fp8_backward": False,
    }
    assert {name: getattr(facts, name) for name in expected} == expected
    assert facts.environment["NVTE_FUSED_ATTN"] == "0"
    assert facts_here(config, layer_number=2).window is None
    assert facts_here(config, mask="padding").mask == "padding"
    named = fp8_attention_obstacles(dataclasses.replace(facts, capability=(9, 0), te_version=(2, 16, 1),
                                                        cudnn_version=(9, 19, 0)))
    assert len(named) == 4, "64 channels, dropout, window, fused attention off"


def test_facts_of_latent_attention(megatron):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, qk_head_dim=32,
                                  qk_pos_emb_head_dim=16, v_head_dim=24)
    facts = facts_here(config)
    assert (facts.head_dim_qk, facts.head_dim_v) == (48, 24)


@pytest.fixture
def no_te_yet(monkeypatch):
    """Transformer Engine is imported anew, and what a test imported under its name is forgotten."""

    def imported():
        return [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]

    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in imported():
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import pydantic_that_is_not_there", "it lacks pydantic_that_is_not_there"),
        ("raise OSError('libcudart.so.13: cannot open\\nmore')", "its import fails with OSError: libcudart.so.13"),
        ("raise AssertionError", "its import fails with AssertionError"),
    ],
)
def test_a_broken_te_says_why(monkeypatch, tmp_path, no_te_yet, source, problem):
    package = tmp_path / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.16.1'")
    (package / "pytorch/__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    version, said = installed_te()
    assert version is None and said.startswith(problem) and "\n" not in said


def test_a_te_that_loads_is_asked_for_the_gpu(monkeypatch):
    from megatron_geoscale.attention import obstacles

    modules = {name: types.ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch",
                                                         "transformer_engine.pytorch.utils")}
    modules["transformer_engine"].__version__ = "2.9.0+abc"
    modules["transformer_engine"].pytorch = modules["transformer_engine.pytorch"]
    utils = modules["transformer_engine.pytorch.utils"]
    utils.get_device_compute_capability, utils.get_cudnn_version = lambda: (10, 0), lambda: (9, 13, 1)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert installed_te() == ((2, 9, 0), "")
    assert obstacles.gpu_capability() == (10, 0) and obstacles.cudnn_version() == (9, 13, 1)

    def no_gpu():
        raise RuntimeError("No CUDA GPUs are available")

    utils.get_device_compute_capability = no_gpu
    assert obstacles.gpu_capability() is None
