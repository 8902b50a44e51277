"""FSDP2 and ZeRO hold a model's weights in parts: the same bounds, losses and lost values as of whole weights."""

import functools

import pytest
import torch

from megatron_geoscale.config import GeoScaleConfig
from megatron_geoscale.scaling.guard import NonFiniteWeightsError
from megatron_geoscale.scaling.slots import BACKWARD_SLOTS, SLOTS
from tests.functional.common import succeed
from tests.functional.hf_models import importer, random_tokens, resume
from tests.harness import run_ranks
from tests.sharded_models import Traffic, attach, local, model_of, preload, train_step


@pytest.fixture(scope="module", autouse=True)
def imported(megatron):
    preload()


SPIKE = 64.0
FORWARD = len(SLOTS) - len(BACKWARD_SLOTS)


def journey(rank, world, road, name):
    """A spike that the table does not know, the refresh that does, back again, and three steps of training."""
    model = model_of(name)
    parameters = dict(model.named_parameters())
    call, scales, optimizer = attach(road, model, GeoScaleConfig())
    parameters = parameters if road == 3 else dict(model.named_parameters())  # FSDP2 has put new ones in their place
    tokens = random_tokens()[rank : rank + 1] if world > 1 else random_tokens()
    found = {"bounds": scales.table.bounds.clone(), "digest": scales.digest()}
    found["saturated at rest"] = lost(scales, call, tokens)
    spike(parameters, SPIKE)
    found["saturated by a spike"] = lost(scales, call, tokens)
    with Traffic() as traffic:
        scales.refresh()
    found["traffic"], found["bounds of a spike"] = traffic.seen, scales.table.bounds.clone()
    found["saturated after a refresh"] = lost(scales, call, tokens)
    spike(parameters, 1 / SPIKE)
    scales.refresh()
    found["digest again"] = scales.digest()
    found["losses"] = [train_step(call, optimizer, tokens) for _ in range(3)]
    found["bounds of training"], found["saturated in training"] = scales.table.bounds.clone(), scales.saturated()
    digest = scales.digest()
    scales.refresh()
    found["fresh"] = digest == scales.digest() != found["digest"]
    return found


def spike(parameters, factor):
    """Multiply the first layer's W_Q, W_K and W_V."""
    for name, parameter in parameters.items():
        if ".0." in name and any(f"{what}.weight" in name for what in ("q_proj", "k_proj", "v_proj", "c_attn")):
            local(parameter).mul_(factor)


def lost(scales, call, tokens):
    """What a forward pass saturates on this rank: [layers, forward slots]."""
    scales.gauge.reset()
    call(input_ids=tokens, use_cache=False)
    saturated = scales.gauge.saturated[:, :FORWARD].clone()
    scales.gauge.reset()
    return saturated


@functools.cache
def travel(road, name):
    """`journey` of every rank."""
    return run_ranks(journey, 1 if road == "plain" else 2, road, name)


def assert_close(found, expected, relative=1e-6):
    torch.testing.assert_close(found, expected, rtol=relative, atol=0)


@pytest.mark.parametrize("name", ["gpt2, odd", "llama, odd", "qwen2, odd"])
@pytest.mark.parametrize("road", ["fsdp2", 3])
def test_shards_give_the_bounds_the_losses_and_the_counts_of_the_whole_model(road, name):
    (whole,) = travel("plain", name)
    ranks = travel(road, name)
    for found in ranks:
        assert found["digest"] == whole["digest"] == found["digest again"]
        for bounds in ("bounds", "bounds of a spike"):
            assert_close(found[bounds], whole[bounds], 1e-12)
        # The weights themselves differ in their last bits by now.
        assert_close(found["bounds of training"], whole["bounds of training"])
        assert found["fresh"] and whole["fresh"]
    for count in ("saturated at rest", "saturated by a spike", "saturated after a refresh"):
        assert torch.equal(sum(found[count] for found in ranks), whole[count])
    losses = torch.tensor([found["losses"] for found in ranks]).mean(dim=0)
    assert_close(losses, torch.tensor(whole["losses"]))
    assert whole["losses"][2] < whole["losses"][0] - 0.05


@pytest.mark.parametrize("name", ["gpt2, odd", "qwen2, odd"])
def test_a_spike_saturates_under_the_old_table_only(name):
    (whole,) = travel("plain", name)
    assert whole["saturated by a spike"][0].sum() > 0
    assert not whole["saturated at rest"].any() and not whole["saturated after a refresh"].any()
    assert whole["saturated in training"] == 0
    assert (whole["bounds of a spike"][0] > whole["bounds"][0]).any()


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_of_zero_that_keep_the_weights_whole(stage):
    (whole,) = travel("plain", "qwen2, odd")
    ranks = travel(stage, "qwen2, odd")
    for found in ranks:
        assert found["digest"] == whole["digest"] == found["digest again"] and found["fresh"]
        assert_close(found["bounds of training"], whole["bounds of training"])
        assert [name for name, _ in found["traffic"]] == ["allreduce"]  # the table's rows, nothing else
    assert_close(torch.tensor([found["losses"] for found in ranks]).mean(dim=0), torch.tensor(whole["losses"]))


@pytest.mark.parametrize("road", ["fsdp2", 3])
def test_three_ranks_cut_inside_rows_and_leave_one_empty_handed(road):
    """Of the two rows of "llama, one key"'s W_K FSDP2 gives the third rank none; ZeRO-3 cuts them in three."""
    def table(rank, world, road):
        _, scales, _ = attach(road, model_of("llama, one key"), GeoScaleConfig(recipe="rank_aware"))
        return scales.digest(), scales.table.bounds

    ((digest, whole),) = run_ranks(table, 1, "plain")
    for found, bounds in run_ranks(table, 3, road):
        assert found == digest
        assert_close(bounds, whole, 1e-12)


@pytest.mark.parametrize(("road", "name"), [(3, "gpt2, odd"), ("fsdp2", "qwen2, odd")])
def test_a_rank_aware_table_needs_each_query_head_with_its_key(road, name):
    def table(rank, world, road):
        _, scales, _ = attach(road, model_of(name), GeoScaleConfig(recipe="rank_aware"))
        return scales.table.bounds

    (whole,) = run_ranks(table, 1, "plain")
    for bounds in run_ranks(table, 2, road):
        assert_close(bounds, whole, 1e-12)


@pytest.mark.parametrize("road", ["fsdp2", 3])
def test_a_refresh_sends_gram_matrices_and_cut_heads_never_the_weights(road):
    layers, heads, head_dim, hidden, float64, rows = 2, 9, 16, 48, 8, 13  # of "llama, odd": 3 each of Q, K and V
    ranks = travel(road, "llama, odd")
    for rank, found in enumerate(ranks):
        half_a_head = 3 * head_dim * hidden * 4 // 2  # of W_Q, W_K and W_V; the first rank completes the head
        assert found["traffic"] == [
            ("allreduce", layers * hidden * float64),
            ("alltoall_base", rank * layers * half_a_head),
            *layers * [("reduce", heads * head_dim**2 * float64)],
            ("allreduce", layers * rows * float64),
        ]


def test_deepspeed_refreshes_after_applied_steps_and_after_a_load(tmp_path):
    def run(rank, world):
        call, scales, engine = attach(3, model_of("qwen2, odd"), GeoScaleConfig(), gradient_accumulation_steps=2)
        tokens, digests = random_tokens()[rank : rank + 1], [scales.digest()]
        for _ in range(4):
            train_step(call, engine, tokens)
            digests.append(scales.digest())
        engine.save_checkpoint(str(tmp_path), client_state={"step": 4})
        refreshed = []
        scales.refresh, refresh = lambda: refreshed.append(1), scales.refresh
        engine.was_step_applied = lambda: False  # an overflow under fp16, which DeepSpeed has on GPUs only
        for _ in range(2):
            train_step(call, engine, tokens)
        del engine.was_step_applied
        skipped = not refreshed
        for _ in range(2):
            train_step(call, engine, tokens)
        scales.refresh = refresh
        _, state = engine.load_checkpoint(str(tmp_path))
        return digests, skipped, len(refreshed), scales.digest(), state["step"]

    for digests, skipped, refreshed, loaded, step in run_ranks(run, 2):
        assert digests[0] == digests[1] != digests[2] == digests[3] != digests[4] == loaded
        assert skipped and refreshed == 1 and step == 4


@pytest.mark.parametrize("road", ["fsdp2", 3])
def test_a_weight_that_is_not_finite_stops_every_rank_with_one_sentence(road):
    def run(rank, world):
        model = model_of("llama, odd")
        parameters = dict(model.named_parameters())
        _, scales, _ = attach(road, model, GeoScaleConfig())
        weight = "model.layers.1.self_attn.v_proj.weight"
        if rank == 1:  # in its half of the head that the boundary cuts, which the other rank bounds
            local((parameters if road == 3 else dict(model.named_parameters()))[weight]).view(-1)[5] = float("inf")
        digest = scales.digest()
        with pytest.raises(NonFiniteWeightsError) as raised:
            scales.refresh()
        return str(raised.value), digest == scales.digest()

    first, second = run_ranks(run, 2)
    assert first == second and "layer 2, head 1, W_V" in first[0] and first[1]


def test_four_roads_one_table(tmp_path):
    """Megatron's tensor parallelism, ZeRO-3, FSDP2, and the whole model: equal bounds, and equal counts of a spike."""
    make = importer(tmp_path)
    for name in ("gpt2", "mistral"):
        flags = resume(make(name)[2], "--train-iters 1 --geoscale-recipe certified --tensor-model-parallel-size 2")
        megatron = [run.value for run in succeed(flags, 2, watch=megatron_journey)]
        (whole,) = travel("plain", name)
        for road in (megatron, travel("fsdp2", name), travel(3, name), [whole]):
            for found in road:
                for bounds in ("bounds", "bounds of a spike"):
                    assert_close(found[bounds], whole[bounds])
            for count in ("saturated by a spike", "saturated after a refresh"):
                assert torch.equal(sum(found[count] for found in road), whole[count])
        assert whole["saturated by a spike"].sum() > 0 and not whole["saturated after a refresh"].any()


def megatron_journey(trainer, go):
    """What `journey` finds of bounds and counts."""
    (chunk,), engine = trainer.run.chunks, trainer.run.scaling
    engine.refresh()
    tokens = random_tokens()

    def count():
        engine.gauge.reset()
        chunk.train()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        return engine.gauge.saturated[:, :FORWARD].clone()

    found = {"bounds": engine.table.bounds.clone()}
    engine.layers[0].attention.linear_qkv.weight.detach().mul_(SPIKE)
    found["saturated by a spike"] = count()
    engine.refresh()
    found["bounds of a spike"], found["saturated after a refresh"] = engine.table.bounds.clone(), count()
    return found
