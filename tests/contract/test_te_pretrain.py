"""pretrain.py on Transformer Engine's attention, over the stand-in: its JSONL is that of the emulation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import te_stub
from tests.functional.common import free_port

FLAGS = """
    --num-layers 2 --hidden-size 256 --num-attention-heads 2 --kv-channels 128 --seq-length 16 --normalization RMSNorm
    --swiglu --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --ffn-hidden-size 64 --make-vocab-size-divisible-by 8 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3
    --train-iters 3 --eval-iters 1 --eval-interval 2 --num-workers 0 --log-interval 2 --attention-dropout 0
    --hidden-dropout 0 --bf16 --mock-data --vocab-size 70 --recompute-granularity full --recompute-method uniform
    --recompute-num-layers 1
"""


def _train(rank: int, flags: str, ranks: int, port: int) -> int:
    import torch.distributed as dist
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as precision
    from torch.optim import AdamW

    from megatron_geoscale.training import arguments, main

    # Transformer Engine's optimizer kernels have no stand-in.
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = AdamW, True
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    for module in (clip_grads, precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    parse = arguments.parse_args

    def parse_on_a_gpu(argv: Any) -> Any:
        with mock.patch("torch.cuda.is_available", lambda: True):
            return parse(argv)

    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    with mock.patch.object(arguments, "parse_args", parse_on_a_gpu):
        status = main.main(flags.split())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness will destroy one
    return status


def _log(version: str, path: Path, flags: str, ranks: int = 1) -> list[dict[str, Any]]:
    flags = f"{FLAGS} {flags} --geoscale-log-jsonl {path}"
    assert te_stub.run(version, _train, flags, ranks, free_port(), ranks=ranks) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_that_of_the_emulation(megatron: Any, tmp_path: Path) -> None:
    logs = {attention: _log("2.20.2", tmp_path / attention, f"--geoscale-attention {attention}")
            for attention in ("te", "emulated")}
    assert len(logs["te"]) == 3
    for kernels, emulated in zip(logs["te"], logs["emulated"], strict=True):
        assert kernels["lm_loss"] == pytest.approx(emulated["lm_loss"], rel=2e-3)
        ours, theirs = kernels["geoscale"], emulated["geoscale"]
        assert ours["saturated"] == 0 and ours["overrange_max"] == 1.0 and "attention_sqnr_db" not in ours
        assert ours["utilization_max"] == pytest.approx(theirs["utilization_max"], rel=0.05)
        for layer, reference in zip(ours["layers"], theirs["layers"], strict=True):
            assert layer["scale_qkv"] == pytest.approx(reference["scale_qkv"], rel=1e-2)
            assert layer["utilization"]["o"] == pytest.approx(reference["utilization"]["o"], rel=0.05)
    assert logs["te"][0]["geoscale"]["digest"] == logs["emulated"][0]["geoscale"]["digest"]


@pytest.mark.parametrize("layout", [
    "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "--tensor-model-parallel-size 2 --sequence-parallel --geoscale-backward delayed",
], ids=["interleaved pipeline", "tensor parallel"])
def test_layouts(megatron: Any, tmp_path: Path, layout: str) -> None:
    """Several microbatches and chunks of layers share the memory of the kernels; every layer is in the log."""
    log = _log("2.16.1", tmp_path / "log", f"--geoscale-attention te --train-iters 2 {layout}", ranks=2)
    for step in log:
        geoscale = step["geoscale"]
        assert len(geoscale["layers"]) == (4 if "pipeline" in layout else 2)
        # A history that is empty scales by 1, and one that is short saturates.
        assert "delayed" in layout or geoscale["saturated"] == 0
        assert all(0.0 < layer["utilization"]["qkv"] <= 1.0 and layer["scale_qkv"] > 0 for layer in geoscale["layers"])
    assert log[1]["lm_loss"] < log[0]["lm_loss"]
