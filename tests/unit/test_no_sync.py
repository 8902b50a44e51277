"""A refresh, attention under its table, and a calibrating step never make the host wait for the device.

There is no device here: what would wait is recognised by name, as operators (read a number, find a shape in data) and
as methods that bring a tensor to the host.
"""

import importlib
from collections import Counter
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.test_engine import randomise
from tests.functional.common import base, succeed

OPERATORS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "masked_select", "equal", "unique_dim",
    "_unique2", "unique_consecutive", "bincount", "repeat_interleave.Tensor", "_assert_async",
}
METHODS = {"tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "is_nonzero"}


def is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


class Operators(TorchDispatchMode):
    """Collects the operators that wait, and eigenvalue solvers, which on a GPU do."""

    def __init__(self, seen, eigen):
        super().__init__()
        self.seen, self.eigen = seen, eigen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, overload = func.overloadpacket.__name__, f"{func.overloadpacket.__name__}.{func._overloadname}"
        if name in OPERATORS or overload in OPERATORS or (self.eigen and ("eig" in name or "svd" in name)):
            self.seen[name] += 1
        elif name.startswith("index") and isinstance(args[1], (list, tuple)) and any(map(is_mask, args[1])):
            self.seen[f"{name} by a mask"] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Collects the methods that bring a tensor to the host; operators do not show those that read memory."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # A device that was asked of another tensor is that tensor's own; the host is asked for by its name.
        to_host = name == "to" and "cpu" in [a for a in (*args[1:], *(kwargs or {}).values()) if isinstance(a, str)]
        if name in METHODS or to_host:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def waits(work, *, eigen=False):
    """What `work()` does that a device would make the host wait for, each with its count."""
    operators, methods = Counter(), Counter()
    with Operators(operators, eigen), Methods(methods):
        work()
    # `bool(x)` shows as the method and as the operator that it calls; a list of Python numbers as the method alone.
    return dict(operators) | {name: n for name, n in methods.items() if name in ("tolist", "numpy", "cpu", "to")}


def test_the_watch_sees_what_it_is_for():
    x = torch.arange(4.0)
    assert waits(lambda: x.sum().item()) == {"_local_scalar_dense": 1}
    assert waits(lambda: bool(x.any())) and waits(lambda: float(x[0])) and waits(lambda: x[x > 1])
    assert waits(lambda: x.nonzero()) == {"nonzero": 1}
    assert waits(lambda: x.tolist()) == {"tolist": 1}
    assert waits(lambda: x.to("cpu")) and waits(lambda: x.cpu()) and waits(lambda: x.numpy())
    assert waits(lambda: torch.linalg.eigvalsh(torch.eye(3)), eigen=True)
    assert not waits(lambda: (x.where(x > 1, 0 * x) @ x).sqrt().clamp_min(1.0).amax())


def engines(trainer, go):
    """Waits of the parts of a step, by what each engine is: several are made for the one model."""
    from megatron.core.utils import unwrap_model

    from megatron_geoscale.config import GeoScaleConfig
    from megatron_geoscale.scaling import layer_bounds
    from megatron_geoscale.scaling.engine import GeoScaleEngine

    randomise(trainer)
    chunks, found = trainer.run.chunks, {}
    core = unwrap_model(chunks[0]).train().decoder.layers[0].self_attention.core_attention
    core.fp8_logits = True

    def step():
        query, key, value = (torch.randn(16, 2, n, 8, requires_grad=True) for n in (4, 2, 2))
        core(query, key, value, None).sum().backward()

    for name, batch_bytes, options in (
        ("certified", None, {}),
        ("rank_aware", None, {"recipe": "rank_aware"}),
        ("calibrated", None, {"recipe": "calibrated", "burn_in_steps": 2, "logits_dtype": "fp8"}),
        ("paper", None, {"recipe": "paper"}),
        ("paper, two batches", 1, {"recipe": "paper"}),
        ("certified power", None, {"estimator": "power"}),
        ("paper layer", None, {"recipe": "paper", "granularity": "layer"}),
    ):
        kept = layer_bounds.BATCH_BYTES
        layer_bounds.BATCH_BYTES = batch_bytes or kept
        engine = GeoScaleEngine.attach(chunks, GeoScaleConfig(**options))
        layer_bounds.BATCH_BYTES = kept
        engine.refresh()  # the first one converges
        refresh, attention, end = [], [], []
        for _ in range(3):  # calibration: in the burn-in, at its end, after it
            engine.begin_step()
            refresh.append(waits(partial(engine.refresh, check=False)))
            attention.append(waits(step))
            end.append(waits(engine.end_step))
        found[name] = refresh, attention, end
    return found


@pytest.fixture(scope="module")
def found(megatron):
    (run,) = succeed(base("--train-iters 1"), watch=engines)
    return run.value


@pytest.mark.parametrize("recipe", ["certified", "rank_aware", "calibrated"])
def test_a_step_from_exact_norms_waits_for_nothing(found, recipe):
    assert found[recipe] == ([{}] * 3, [{}] * 3, [{}] * 3)


@pytest.mark.parametrize(
    ("name", "waiting"),
    [
        ("paper", {"tolist": 1}),
        ("certified power", {"tolist": 1}),
        ("paper, two batches", {"tolist": 2}),
        ("paper layer", {"_local_scalar_dense": 1}),
    ],
)
def test_power_iteration_asks_once_a_batch_whether_to_converge(found, name, waiting):
    refresh, attention, end = found[name]
    assert refresh == [waiting] * 3
    assert attention == end == [{}] * 3


def squared_instead(trainer, go):
    """A refresh whose eigenvalues come from squaring, as on a GPU: its waits and solvers, and both tables."""
    from megatron_geoscale.bounds import rotary
    from megatron_geoscale.config import GeoScaleConfig
    from megatron_geoscale.scaling import estimator
    from megatron_geoscale.scaling.engine import GeoScaleEngine

    gram = importlib.import_module("megatron_geoscale.spectral.gram")  # the package has a function of that name
    randomise(trainer)
    results = []
    for recipe in ("certified", "rank_aware", "paper"):
        engine = GeoScaleEngine.attach(trainer.run.chunks, GeoScaleConfig(recipe=recipe))
        engine.refresh()
        results.append((recipe, engine, engine.table.bounds.clone()))

    def largest_eigenvalue(grams):
        unit, traces = gram.unit_trace(grams)
        return gram._trace_powers(unit, gram.GRAM_ROUNDING, gram.SQUARINGS)[1].exp() * traces

    def norm_of_grams(g_q, g_k):
        return gram.trace_power_interval(g_q, g_k, power=1 << gram.SQUARINGS)[1]

    gram.largest_eigenvalue = rotary.largest_eigenvalue = largest_eigenvalue
    gram.norm_of_grams = estimator.norm_of_grams = norm_of_grams
    return [
        (recipe, waits(partial(engine.refresh, check=False), eigen=True), exact, engine.table.bounds)
        for recipe, engine, exact in results
    ]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_other_devices_path_calls_no_solver_and_gives_the_same_table(megatron, model):
    (run,) = succeed(base("--train-iters 1", model=model), watch=squared_instead)
    for recipe, waiting, exact, squared in run.value:
        assert waiting == ({"tolist": 1} if recipe == "paper" else {})
        torch.testing.assert_close(squared, exact, rtol=2e-5, atol=0.0)
        assert (squared >= exact * (1 - 1e-6)).all()
