"""TorchNorm against its formula in float64, and where the layer spec puts it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_geoscale.training.norm import TorchNorm, local_norm, use_local_norm, use_torch_norm

HIDDEN, EPS = 48, 1e-5


def make(normalization, *, zero_centered=False, dtype=torch.float32, sequence_parallel=False):
    """A norm with weights off their initial values."""
    config = SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
    )
    norm = TorchNorm(config, HIDDEN, EPS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += (0.3 * torch.randn(HIDDEN, generator=generator)).to(dtype)
    return norm


def formula(normalization, x, gain, bias):
    """Along the last dimension: (x - mean) / sqrt(var + eps) * gain + bias, without mean and bias for RMSNorm."""
    if normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain + bias


def reference(norm, normalization, zero_centered, x):
    """The formula in float64 on copies that need gradients: output, and the leaves x, weight and (LayerNorm) bias."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *norm.parameters())]
    gain = leaves[1] + 1 if zero_centered else leaves[1]
    return formula(normalization, leaves[0], gain, leaves[2] if len(leaves) == 3 else 0.0), leaves


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_output_and_gradients_follow_the_formula(normalization, zero_centered):
    norm = make(normalization, zero_centered=zero_centered)
    generator = torch.Generator().manual_seed(1)
    x = (2 + 3 * torch.randn(5, 2, HIDDEN, generator=generator)).requires_grad_()
    upstream = torch.randn(5, 2, HIDDEN, generator=generator)
    expected, leaves = reference(norm, normalization, zero_centered, x)
    expected.backward(upstream.double())
    y = norm(x)
    y.backward(upstream)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
    for ours, theirs in zip([x, *norm.parameters()], leaves):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_initial_gain_is_one_and_bias_zero():
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    for normalization in ("LayerNorm", "RMSNorm"):
        for zero_centered in (False, True):
            fresh = TorchNorm(
                SimpleNamespace(
                    normalization=normalization,
                    layernorm_zero_centered_gamma=zero_centered,
                    sequence_parallel=False,
                    params_dtype=torch.float32,
                ),
                HIDDEN,
                EPS,
            )
            expected = formula(normalization, x.double(), 1.0, 0.0)
            torch.testing.assert_close(fresh(x).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_bf16_is_rounded_once(normalization, zero_centered):
    norm = make(normalization, zero_centered=zero_centered, dtype=torch.bfloat16)
    x = (2 + 3 * torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(3))).bfloat16()
    y = norm(x)
    assert y.dtype is torch.bfloat16
    expected, _ = reference(norm, normalization, zero_centered, x)
    # Half a unit in the last place of bf16, and what float32 adds to it where the bias cancels.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_say_whether_tokens_are_spread_over_tensor_parallel_ranks(sequence_parallel):
    flags = [p.sequence_parallel for p in make("LayerNorm", sequence_parallel=sequence_parallel).parameters()]
    assert flags == [sequence_parallel] * 2


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="--normalization L2Norm"):
        make("L2Norm")


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_use_torch_norm_replaces_every_norm_of_the_local_spec(megatron, qk_layernorm):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=object())
    assert use_torch_norm(block) is block
    assert block.layer_norm is TorchNorm
    assert layer.submodules.input_layernorm is layer.submodules.pre_mlp_layernorm is TorchNorm
    assert layer.submodules.pre_cross_attn_layernorm is IdentityOp
    attention = layer.submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is (TorchNorm if qk_layernorm else IdentityOp)


@pytest.mark.parametrize(
    ("normalization", "cuda", "apex", "kernel", "fused"),
    [
        ("LayerNorm", True, True, True, True),
        ("RMSNorm", True, True, True, False),
        ("LayerNorm", False, True, True, False),
        ("LayerNorm", True, False, True, False),
        ("LayerNorm", True, True, False, False),
    ],
)
def test_apex_norm_is_taken_where_it_works(megatron, monkeypatch, tmp_path, normalization, cuda, apex, kernel, fused):
    from megatron.core.fusions import fused_layer_norm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", apex)
    if kernel:
        (tmp_path / "fused_layer_norm_cuda.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    expected = fused_layer_norm.FusedLayerNorm if fused else TorchNorm
    assert local_norm(normalization) is expected
    layer = get_gpt_layer_local_spec(normalization=normalization, qk_layernorm=True)
    block = use_local_norm(TransformerBlockSubmodules(layer_specs=[layer], layer_norm=object()), normalization)
    assert block.layer_norm is layer.submodules.input_layernorm is expected
    assert layer.submodules.self_attention.submodules.q_layernorm is expected
