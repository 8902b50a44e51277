"""What a release of Transformer Engine could change under our attention, and how attaching scales answers.

`mutations` are made one at a time to a real Transformer Engine, and undone. `refusals` gives what `take_over` said.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from contract.attention_checks import inputs, ours, run
from megatron_geoscale.attention import te_contract

QUANTIZATION = "transformer_engine.pytorch.quantization"
UTILS = "transformer_engine.pytorch.attention.dot_product_attention.utils"


@contextmanager
def renamed(path: str, name: str) -> Iterator[None]:
    """`name` of the module or class at `path`, and of its bases, under another name."""
    module, _, cls = path.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, cls) if cls else owner
    owners = [base for base in owner.__mro__ if name in vars(base)] if isinstance(owner, type) else [owner]
    values = [vars(owner)[name] for owner in owners]
    for owner, value in zip(owners, values, strict=True):
        delattr(owner, name)
        setattr(owner, f"{name}_renamed", value)
    try:
        yield
    finally:
        for owner, value in zip(owners, values, strict=True):
            delattr(owner, f"{name}_renamed")
            setattr(owner, name, value)


@contextmanager
def other_indices() -> Iterator[None]:
    """TE's attention takes S where O was, and the other way round."""
    utils = importlib.import_module(UTILS)
    with mock.patch.object(utils, "META_S", utils.META_O), mock.patch.object(utils, "META_O", utils.META_S):
        yield


@contextmanager
def patched(path: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`name` of the class at `path` replaced by what `make` makes of it."""
    module, _, cls = path.partition(":")
    owner = getattr(importlib.import_module(module), cls)
    with mock.patch.object(owner, name, make(getattr(owner, name))):
        yield


def _always_registers(original: Any) -> Any:
    def register(fp8_meta: dict[str, Any]) -> None:
        fp8_meta.pop(te_contract.buffer_key(), None)
        original(fp8_meta)

    return register


def _under_another_key(original: Any) -> Any:
    def register(fp8_meta: dict[str, Any]) -> None:
        fp8_meta["place_in_buffers"] = [0, "forward"]

    return register


def _scales_called_otherwise(original: Any) -> Any:
    def make_quantizers(self: Any) -> list[Any]:
        made = original(self)
        for quantizer in made:
            quantizer.quantization_scale = quantizer.__dict__.pop("scale")
        return made

    return make_quantizers


def _one_scale_for_all(original: Any) -> Any:
    def make_quantizers(self: Any) -> list[Any]:
        made = original(self)
        for quantizer in made:
            quantizer.scale = self.scale
        return made

    return make_quantizers


def _other_quantizers(original: Any) -> Any:
    def make_quantizers(self: Any) -> list[Any]:
        return [object() for _ in original(self)]

    return make_quantizers


def _quantizers_elsewhere(original: Any) -> Any:
    def init(self: Any, num_gemms: int = 1) -> None:
        original(self, num_gemms=num_gemms)
        self.quantizers = {"forward": self.quantizers.get("scaling_fwd")}

    return init


def _state_called_otherwise(original: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.quantization_meta = self.__dict__.pop("fp8_meta")

    return init


MANAGER, STATE = f"{QUANTIZATION}:FP8GlobalStateManager", f"{QUANTIZATION}:DelayedScalingRecipeState"
ATTENTION = "transformer_engine.pytorch:DotProductAttention"
CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    f"{path} renames {name}": (lambda path=path, name=name: renamed(path, name), f"has no {name}")
    for path, names in te_contract.NAMES.items() for name in names
} | {
    "attention takes its quantizers in another order": (other_indices, "takes other quantizers"),
    "a module that says it is registered is registered":
        (lambda: patched(MANAGER, "add_fp8_tensors_to_global_buffer", _always_registers), "registers a module"),
    "places in the buffers are kept under another key":
        (lambda: patched(MANAGER, "add_fp8_tensors_to_global_buffer", _under_another_key), "registers a module"),
    "a quantizer calls its scale otherwise":
        (lambda: patched(STATE, "make_quantizers", _scales_called_otherwise), "the scale of its qkv quantizer is not"),
    "a quantizer has more than one scale":
        (lambda: patched(STATE, "make_quantizers", _one_scale_for_all), "the scale of its qkv quantizer is not"),
    "delayed scaling makes other quantizers":
        (lambda: patched(STATE, "make_quantizers", _other_quantizers), "its qkv slot holds a object"),
    "a module keeps its quantizers elsewhere":
        (lambda: patched(ATTENTION, "init_fp8_metadata", _quantizers_elsewhere), "are kept elsewhere"),
    "a module calls its FP8 state otherwise":
        (lambda: patched(ATTENTION, "__init__", _state_called_otherwise), "an attention module has no fp8_meta"),
    "a checkpoint stashes nothing":
        (lambda: patched(MANAGER, "copy_forward_fp8_meta_tensors_for_recompute", lambda original: lambda meta: None),
         "stash the state of FP8 elsewhere"),
}
"""By what changes: how, and what the refusal must say."""


def refusal(change: str) -> str:
    """What attaching scales says under `change`, empty where it says nothing, and then that all is well again."""
    make, _ = CHANGES[change]
    said = ""
    with ExitStack() as stack:
        stack.enter_context(make())
        try:
            ours()
        except RuntimeError as error:
            said = str(error)
    run(ours()[0], inputs())
    return said
