"""The output layer of a model whose vocabulary is padded: the padding gets no probability.

Megatron-LM pads the vocabulary so that tensor-parallel ranks hold equal shares, and its padding takes part in the
softmax: the loss is then not that of the model without padding, and another padding is another model. Here a padded
model has the loss of the model that transformers runs, under every layout; the weights are Megatron-LM's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state


def exclude_padding(model: Any, vocab_size: int, padded_vocab_size: int) -> None:
    """Make every logit beyond the first `vocab_size` of a megatron-core GPTModel very negative and finite, on the
    ranks that hold such logits and on no other.

    Its exponential, which is what cross entropy and its gradient see, is exactly 0, and so is the gradient of the rows
    behind it. A pipeline stage without output layer stays as it is.
    """
    if not model.post_process:
        return
    share = padded_vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    first = vocab_size - share * parallel_state.get_tensor_model_parallel_rank()
    if first < share:
        model.output_layer.register_forward_hook(partial(_fill, max(first, 0)))


def _fill(first: int, module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
    logits = output[0]
    # Half of the lowest number: cross entropy subtracts the largest logit, and the difference stays finite.
    logits[..., first:] = torch.finfo(logits.dtype).min / 2
