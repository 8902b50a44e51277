"""The contract with Megatron-Bridge: its own callbacks and provider, as far as they import without a GPU.

The package itself needs Transformer Engine and CUDA extensions at install, so its wheel is unpacked and the modules
that the contract is about are imported past its `__init__`: `GEOSCALE_BRIDGE_DIR`, or bridge/ in the environment.
"""

import functools
import importlib
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_geoscale.config import GeoScaleConfig
from tests.harness import run_ranks

BRIDGE = Path(os.environ.get("GEOSCALE_BRIDGE_DIR", Path(sys.prefix) / "bridge")) / "megatron" / "bridge"


@pytest.fixture(scope="module")
def bridge(megatron):
    """(integration, Bridge's callbacks, its GPT provider)."""
    if not BRIDGE.exists():
        pytest.fail(f"Megatron-Bridge is not at {BRIDGE.parents[1]}: make install unpacks it")
    names = {"megatron.bridge": "", "megatron.bridge.training": "training", "megatron.bridge.models": "models",
             "megatron.bridge.utils": "utils"}
    stubs = {}
    for name, folder in names.items():
        stubs[name] = types.ModuleType(name)
        stubs[name].__path__ = [str(BRIDGE / folder)]
    # What loads and instantiates configurations, by OmegaConf and Hydra: not used here.
    for name, missing in {"megatron.bridge.models.config": ("from_hf_pretrained", "save_hf_pretrained"),
                          "megatron.bridge.utils.instantiate_utils": ("InstantiationMode", "instantiate")}.items():
        stubs[name] = types.ModuleType(name)
        vars(stubs[name]).update({what: type(what, (), {}) for what in missing})
    before = set(sys.modules)
    sys.modules.update(stubs)
    try:
        yield tuple(map(importlib.import_module, (
            "megatron_geoscale.integrations.megatron_bridge", "megatron.bridge.training.callbacks",
            "megatron.bridge.models.gpt_provider",
        )))
    finally:
        for name in set(sys.modules) - before:
            if "bridge" in name:
                del sys.modules[name]


def provider_of(gpt_provider, **changes):
    off = dict.fromkeys(("gradient_accumulation_fusion", "masked_softmax_fusion", "bias_dropout_fusion",
                         "apply_rope_fusion", "add_bias_linear"), False)
    sizes = dict(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, seq_length=16, vocab_size=64)
    return gpt_provider.GPTModelProvider(**(sizes | off | dict(
        transformer_layer_spec=gpt_provider.local_layer_spec, normalization="RMSNorm", position_embedding_type="rope",
        attention_dropout=0.0, hidden_dropout=0.0) | changes))


def build(provider):
    """The model of `provider`, as Bridge builds it on each rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    provider.tensor_model_parallel_size = torch.distributed.get_world_size()
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return provider.provide()


def test_the_table_follows_the_steps_of_bridges_loop(bridge):
    """Its events in its order, fired by its own manager: start, steps of which one is skipped, an evaluation."""
    integration, callbacks, gpt_provider = bridge

    def run(rank, world):
        config = GeoScaleConfig()
        provider = integration.use_geoscale(provider_of(gpt_provider), config)
        model = build(provider)
        callback, manager = integration.GeoScaleCallback(config), callbacks.CallbackManager()
        manager.add(callback)

        def fire(event, **more):
            if callbacks.should_fire(manager, event):
                manager.fire(event, callbacks.CallbackContext(
                    state=None, model=[model], user_state=manager.user_state, **more))

        def step(skipped):
            fire("on_train_step_start")
            before = callback.engine.digest()
            tokens = torch.arange(16)[None] % 64
            model(tokens, tokens, None).float().square().mean().backward()
            if not skipped:
                for layer in model.decoder.layers:
                    layer.self_attention.linear_qkv.weight.detach().mul_(2.0)
            fire("on_train_step_end", loss_dict={}, grad_norm=None, skipped_iter=skipped)
            return before

        fire("on_train_start")
        digests = [step(skipped) for skipped in (False, True, False)]
        fire("on_eval_start")
        bounds = callback.engine.table.bound(1, "logit_bound")
        return digests + [callback.engine.digest()], int(callback.engine.gauge.saturated.sum()), bounds

    one = run_ranks(run, 1)
    two = run_ranks(run, 2)
    for digests, saturated, _ in one + two:
        assert digests[0] != digests[1] == digests[2] != digests[3] and saturated == 0
    assert two[0] == two[1]


def test_the_spec_survives_bridges_run_config(bridge):
    """It is a partial of a module's function and plain values, as Bridge's YAML wants it."""
    integration, _, gpt_provider = bridge
    yaml_utils = importlib.import_module("megatron.bridge.utils.yaml_utils")
    provider = integration.use_geoscale(provider_of(gpt_provider), GeoScaleConfig(recipe="rank_aware", margin=0.5))
    spec = provider.transformer_layer_spec
    text = yaml_utils.dump_dataclass_to_yaml({"spec": spec})
    assert "megatron_geoscale.integrations.megatron_bridge.layer_spec" in text and "rank_aware" in text
    assert isinstance(spec, functools.partial) and "vp_stage" in inspect.signature(spec).parameters


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(recipe="calibrated"), "--geoscale-recipe calibrated"),
        (dict(recipe="delayed"), "--geoscale-recipe delayed"),
        (dict(recipe="paper"), "--geoscale-estimator power"),
        (dict(backward="delayed"), "--geoscale-backward delayed"),
    ],
)
def test_what_the_loop_does_not_carry_is_refused(bridge, config, says):
    for attach in (bridge[0].GeoScaleCallback, functools.partial(bridge[0].use_geoscale, object())):
        with pytest.raises(ValueError, match=says):
            attach(GeoScaleConfig(**config))


def test_bridges_local_backend_would_take_the_attention_out_again(bridge):
    from megatron.core.transformer.enums import AttnBackend

    provider = provider_of(bridge[2], attention_backend=AttnBackend.local)
    with pytest.raises(ValueError, match="attention_backend local"):
        bridge[0].use_geoscale(provider, GeoScaleConfig())


def test_without_bridge_the_reason_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron_geoscale.integrations.megatron_bridge", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.bridge.training.callbacks", None)
    with pytest.raises(ImportError, match="needs Megatron-Bridge, which cannot be imported"):
        importlib.import_module("megatron_geoscale.integrations.megatron_bridge")
