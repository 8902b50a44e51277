"""`--spec megatron_geoscale.integrations.megatron_lm gpt_layer_spec` under megatron-core's schedules and optimizers.

Megatron-LM itself is not installed: what it does with a spec is done here by the same megatron-core functions, inside a
run of pretrain.py that has no scales of its own (`--geoscale-recipe none`).
"""

import os
import sys
import types

import pytest
import torch

from tests.functional.common import base, close, column, launch, succeed, train

pytestmark = pytest.mark.usefixtures("megatron")

SPEC = ["megatron_geoscale.integrations.megatron_lm", "gpt_layer_spec"]
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
OVERLAP = "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


def use_spec(ours=True, args_of_geoscale="", **fields):
    """A `prepare`: from here on the run builds its model as Megatron-LM's gpt_builder does with --spec, or without."""

    def prepare():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.spec_utils import import_module

        from megatron_geoscale.training import model

        os.environ["GEOSCALE_ARGS"] = args_of_geoscale
        build, config_of = model.build_model, model.transformer_config

        def build_model(args):
            sys.modules["megatron.training"] = types.ModuleType("megatron.training")
            sys.modules["megatron.training"].get_args = lambda: args
            spec = import_module(SPEC) if ours else get_gpt_layer_local_spec(normalization=args.normalization)
            model.get_gpt_decoder_block_spec = lambda *_, **__: spec
            return build(args)

        def transformer_config(args):
            config = config_of(args)
            for name, value in {"transformer_impl": "local", **fields}.items():
                setattr(config, name, value)
            return config

        model.build_model, model.transformer_config = build_model, transformer_config
        model.use_local_norm = lambda spec, _: spec

    return prepare


def flags(*more):
    return base("--geoscale-recipe none --train-iters 3 --num-layers 4", *more)


def run(flags, ranks, watch=None, args="", **options):
    return succeed(flags, ranks, prepare=use_spec(args_of_geoscale=args), watch=watch, **options)


def layers_of(trainer):
    from megatron_geoscale.integrations.megatron_lm import GeoScaleLayer

    modules = (module for chunk in trainer.run.chunks for module in chunk.modules())
    return [module for module in modules if isinstance(module, GeoScaleLayer)]


def compare(trainer, go):
    """Each step's tables of the layers against those of one engine over the whole job, just before the update."""
    from megatron_geoscale.integrations import megatron_lm
    from megatron_geoscale.scaling.engine import GeoScaleEngine
    from megatron_geoscale.scaling.layers import find_attention_layers
    from megatron_geoscale.scaling.slots import FORWARD_SLOTS

    layers, optimizer = layers_of(trainer), trainer.run.optimizer
    described = find_attention_layers(trainer.run.chunks)
    reference = GeoScaleEngine(described, megatron_lm.config_from_environment(), device=described[0].device)
    step, refresh = optimizer.step, megatron_lm.LayerScales._refresh
    digests, refreshes = [], []

    def counted(scales):
        refreshes.append(scales.layer.number)
        refresh(scales)

    def compared():
        reference.refresh()
        for layer in layers:
            mine, row = layer.geoscale.engine.table, layer.layer_number - 1
            assert mine.scales[row][: len(FORWARD_SLOTS)].all()
            assert torch.equal(mine.scales[row], reference.table.scales[row])
            assert torch.equal(mine.bounds[row], reference.table.bounds[row])
        digests.append(reference.digest())
        return step()

    optimizer.step, megatron_lm.LayerScales._refresh = compared, counted
    go()
    return digests, refreshes, sorted(layer.layer_number for layer in layers)


LAYOUTS = {
    "alone": (1, ""),
    "tp2": (2, TP2),
    "tp2 groups1 sp-off": (2, f"{TP2} --num-query-groups 1"),
    "pp2 1f1b": (2, f"{PP2} --global-batch-size 8"),
    "interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 8"),
    "overlapped gather": (2, OVERLAP),
    "overlapped gather tp2 pp2": (4, f"{OVERLAP} {TP2} {PP2} --global-batch-size 8"),
    "full recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective recompute": (2, f"{PP2} --recompute-activations --global-batch-size 8"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_those_of_the_engine_at_every_step_and_made_once_a_step(layout):
    ranks, extra = LAYOUTS[layout]
    runs = run(flags(extra), ranks, compare)
    digests, _, _ = runs[0].value
    assert len(digests) == len(set(digests)) == 3
    for digests, refreshes, numbers in (one.value for one in runs):
        assert digests == runs[0].value[0]
        assert sorted(refreshes) == sorted(3 * numbers)
    assert {number for one in runs for number in one.value[2]} == {1, 2, 3, 4}


@pytest.mark.parametrize("args", ["--geoscale-recipe rank_aware --geoscale-margin 0.5", "--geoscale-recipe certified"])
def test_it_trains_like_pretrain_with_the_same_recipe(args):
    """The same weights, so the same losses: to the rounding of the norm, which is Megatron's here."""
    alone = train(base("--train-iters 3", args))
    lm = train(base("--train-iters 3 --geoscale-recipe none"), prepare=use_spec(args_of_geoscale=args))
    assert close(column(lm, "lm_loss"), column(alone, "lm_loss"), 1e-6)
    assert close(column(lm, "grad_norm"), column(alone, "grad_norm"), 1e-5)


def refused_step(trainer, go):
    """Digest and refreshes of each step; the second and third updates are refused, as by a loss scaler."""
    digests, optimizer = [], trainer.run.optimizer
    step = optimizer.step

    def update():
        digests.append([layer.geoscale.engine.digest() for layer in layers_of(trainer)])
        return (False, None, None) if len(digests) in (2, 3) else step()

    optimizer.step = update
    go()
    return digests


def test_a_skipped_update_changes_no_scale():
    (one,) = run(flags("--train-iters 5 --num-layers 2"), 1, refused_step)
    first, second, third, fourth, fifth = one.value
    assert second == third == fourth
    assert first != second and fourth != fifth


def evaluated(trainer, go):
    """Digests after each evaluation and after a forward pass outside the schedules, beside the true ones."""
    from megatron_geoscale.integrations import megatron_lm
    from megatron_geoscale.scaling.engine import GeoScaleEngine
    from megatron_geoscale.scaling.layers import find_attention_layers

    described = find_attention_layers(trainer.run.chunks)
    reference = GeoScaleEngine(described, megatron_lm.config_from_environment(), device=described[0].device)
    layers, evaluate, step, found = layers_of(trainer), trainer.evaluate, trainer.run.optimizer.step, []

    def check(where):
        reference.refresh()
        rows = [layer.geoscale.engine.table.scales[layer.layer_number - 1] for layer in layers]
        found.append((where, torch.equal(torch.stack(rows), reference.table.scales)))

    def watched_evaluate():
        check("stale")
        evaluate()
        check("evaluated")

    def watched_step():
        answer = step()
        model = trainer.run.chunks[0]
        model.eval()
        tokens = torch.zeros(1, 16, dtype=torch.long)
        with torch.no_grad():
            for _ in range(2):
                model(tokens, torch.arange(16)[None], None)
        model.train()
        check("generated")
        return answer

    trainer.evaluate = watched_evaluate
    if trainer.args.eval_interval == 2:
        trainer.run.optimizer.step = watched_step
    go()
    return found


def test_evaluation_uses_the_scales_of_the_new_weights():
    (one,) = run(flags("--train-iters 2 --num-layers 2 --eval-iters 1 --eval-interval 1"), 1, evaluated)
    assert one.value == [("stale", False), ("evaluated", True)] * 2


def test_text_generated_between_two_steps_does_too():
    (one,) = run(flags("--train-iters 1 --num-layers 2 --eval-interval 2"), 1, evaluated)
    assert one.value == [("generated", True)]


def poisoned(later):
    """A `watch`: at the second step one tensor-parallel rank of the last stage has a NaN among its keys."""

    def watch(trainer, go):
        from megatron.core import parallel_state

        from megatron_geoscale.integrations import megatron_lm

        megatron_lm._host_runs_ahead = lambda: later
        step, layer = trainer.run.optimizer.step, layers_of(trainer)[-1]

        def spoil():
            answer = step()
            if layer.layer_number == 4 and parallel_state.get_tensor_model_parallel_rank() == 1:
                with torch.no_grad():
                    layer.self_attention.linear_qkv.weight[-12] = float("nan")
            return answer

        trainer.run.optimizer.step = spoil
        go()

    return watch


@pytest.mark.parametrize("later", [False, True], ids=["at once", "from the backward pass"])
def test_weights_that_are_not_finite_stop_every_tensor_parallel_rank(later):
    extra = f"{TP2} {PP2} --no-check-for-nan-in-loss-and-grad"
    ranks = launch(flags(extra), 4, prepare=use_spec(), watch=poisoned(later), patience=10)
    said = [one.err for one in ranks if "non-finite attention weights in layer 4, head 2, W_K" in one.err]
    assert len(said) == 2
    assert all(one.code != 0 for one in ranks)


def sharded(trainer, go):
    """Names and global shapes of what a checkpoint holds of the model, and all weights' sum after loading."""
    (chunk,) = trainer.run.chunks
    state = chunk.module.sharded_state_dict()
    shapes = {key: getattr(value, "global_shape", None) for key, value in state.items()}
    total = sum(float(parameter.double().abs().sum()) for parameter in chunk.parameters())
    go()
    return shapes, total, sum(float(parameter.double().abs().sum()) for parameter in chunk.parameters())


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "stock first"])
def test_checkpoints_load_with_and_without_the_spec(first, tmp_path):
    saving = flags(TP2, "--train-iters 1 --num-layers 2 --save", tmp_path)
    saved = succeed(saving, 2, prepare=use_spec(first), watch=sharded)
    loading = flags(TP2, "--train-iters 2 --num-layers 2 --override-opt_param-scheduler --load", tmp_path)
    loaded = succeed(loading, 2, prepare=use_spec(not first), watch=sharded)
    for rank in range(2):
        (shapes, _, total), (others, start, _) = saved[rank].value, loaded[rank].value
        assert shapes == others and any("linear_qkv.weight" in key for key in shapes)
        assert start == total


def reported(trainer, go):
    from megatron_geoscale.integrations.megatron_lm import report

    before = report(trainer.run.chunks)
    go()
    return before, report(trainer.run.chunks)


def test_report():
    (one,) = run(flags("--train-iters 1 --num-layers 2"), 1, reported)
    before, after = one.value
    assert "GEOSCALE_ARGS: recipe certified, attention emulated" in one.out
    assert before == [] and [row["layer"] for row in after] == [1, 2]
    assert all(row["sigma"] > 0 and row["scale_qkv"] > 0 and row["saturated"] == 0 for row in after)


def test_ranks_must_have_the_same_arguments():
    plain = use_spec()

    def prepare():
        plain()
        if os.environ["RANK"] == "1":
            os.environ["GEOSCALE_ARGS"] = "--geoscale-margin 0.5"

    for one in launch(flags(), 2, prepare=prepare):
        assert one.code == 2 and "GEOSCALE_ARGS is not the same on all ranks" in one.err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("--geoscale-recipe delayed", "--geoscale-recipe delayed"),
        ("--geoscale-recipe calibrated", "--geoscale-recipe calibrated"),
        ("--geoscale-recipe paper --geoscale-logits-dtype fp8", "--geoscale-recipe paper"),
        ("--geoscale-backward delayed", "--geoscale-backward delayed"),
        ("--geoscale-refresh-interval 2", "--geoscale-refresh-interval"),
        ("--geoscale-split-over-data-parallel", "--geoscale-split-over-data-parallel"),
        ("--geoscale-margin 2", "--geoscale-margin"),
        ("--geoscale-marge 1", "GEOSCALE_ARGS: unrecognized arguments: --geoscale-marge 1"),
        ("--geoscale-margin x", "GEOSCALE_ARGS: argument --geoscale-margin"),
    ],
)
def test_arguments_that_cannot_be_meant(args, named, monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_geoscale.integrations import megatron_lm

    monkeypatch.setenv("GEOSCALE_ARGS", args)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match=named):
        megatron_lm._refuse(config, megatron_lm.config_from_environment())


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("cuda_graph_impl", "local", "--cuda-graph-impl"),
        ("enable_cuda_graph", True, "--cuda-graph-impl"),
        ("mtp_num_layers", 1, "--mtp-num-layers"),
        ("heterogeneous_block_specs", True, "--heterogeneous-layers-config-path"),
        ("experimental_attention_variant", "dsa", "--experimental-attention-variant"),
        ("transformer_impl", "inference_optimized", "--transformer-impl"),
    ],
)
def test_models_whose_layers_would_go_without(field, value, named):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_geoscale.config import GeoScaleConfig
    from megatron_geoscale.integrations import megatron_lm

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    megatron_lm._refuse(config, GeoScaleConfig())
    setattr(config, field, value)
    with pytest.raises(ValueError, match=named):
        megatron_lm._refuse(config, GeoScaleConfig())


def test_it_is_for_megatron_lm(monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_geoscale.integrations.megatron_lm import GeoScaleLayer

    monkeypatch.delenv("GEOSCALE_ARGS", raising=False)
    with pytest.raises(ValueError, match=r"pretrain_gpt\.py: elsewhere use megatron_geoscale\.attention\.spec"):
        GeoScaleLayer(TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2))


def test_another_layer_class_is_not_replaced_in_silence(monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_geoscale.config import GeoScaleConfig
    from megatron_geoscale.integrations import megatron_lm

    class OtherLayer(TransformerLayer):
        pass

    layer = types.SimpleNamespace(module=OtherLayer)
    monkeypatch.setattr(megatron_lm, "get_gpt_decoder_block_spec", lambda *_, **__: None)
    monkeypatch.setattr(megatron_lm, "use_fp8_attention", lambda *_: types.SimpleNamespace(layer_specs=[layer]))
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="this model has OtherLayer"):
        megatron_lm._submodules(config, GeoScaleConfig(), types.SimpleNamespace(qk_l2_norm=False), 1, None)
