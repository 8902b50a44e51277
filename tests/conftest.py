"""Environment of every test, and the one slow import that tests share.

Importing megatron-core costs about 9 seconds, so nothing here imports it: a test that needs it asks for the session
fixture `megatron`, and the ranks that such a test starts are forked from this process, where it is imported already.
"""

import os

# Before torch is imported: a fork of a process whose OpenMP pool has run threads would wait for them for ever.
os.environ["OMP_NUM_THREADS"] = "1"
# Gloo otherwise asks for the address of the host's name, which need not resolve in a container.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# megatron-core warns without it whenever it overlaps tensor-parallel communication.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def megatron():
    """megatron-core, imported once for the session and able to run without CUDA; returns `megatron.core`."""
    from megatron_geoscale import cpu

    cpu.install()
    import megatron.core
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel

    return megatron.core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: `make test` gives its workers whole files, and the last one should be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
