"""The generators of a rank, as a checkpoint keeps them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject


def rng_state() -> ShardedObject:
    """Generators of this rank; data-parallel replicas draw alike, so one of them is saved."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "random": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    return ShardedObject(
        "rng_state",
        [state],
        (pipeline.size(), tensor.size()),
        (pipeline.rank(), tensor.rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` saved."""
    random.setstate(state["random"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
