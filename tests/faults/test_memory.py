"""A thousand short cycles of refresh and step, and the memory that they leave."""

import gc

import psutil
import pytest

from tests.functional.common import base, succeed

pytestmark = pytest.mark.usefixtures("megatron")

WARM, CYCLES = 200, 1000
ALLOWED = 2 << 20
"""Bytes that the resident memory may grow by from cycle 200 to 1,000. malloc's free lists grow by 1.2 MB, nearly all of
it before cycle 400; 4 KiB kept in each cycle would come to 3.3 MB more."""


def test_a_thousand_cycles_do_not_grow():
    def watch(trainer, go):
        me, step, sizes, objects = psutil.Process(), trainer._step, [], []

        def counted():
            step()
            if trainer.state.iteration in (WARM, CYCLES):
                gc.collect()
                sizes.append(me.memory_info().rss)
                objects.append(len(gc.get_objects()))

        trainer._step = counted
        go()
        return sizes, objects

    flags = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1"
    (run,) = succeed(base(f"--train-iters {CYCLES} --lr-decay-style constant", flags, "--global-batch-size 1",
                          "--ffn-hidden-size 16 --log-interval 100"), watch=watch)
    (before, after), (few, many) = run.value
    assert after - before < ALLOWED, f"{before} bytes after {WARM} cycles, {after} after {CYCLES}"
    assert many - few < (CYCLES - WARM) // 10, f"{few} objects after {WARM} cycles, {many} after {CYCLES}"
