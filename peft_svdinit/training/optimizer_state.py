"""Bytes of the state that optimizers keep."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from torch import Tensor, nn

_FLOAT32 = 4
# bitsandbytes: tensors below this size, and embeddings under the Trainer, keep a float32 state.
_SMALLEST_8BIT, _BLOCK = 4096, 256


def _adam(parameter: Tensor, embedding: bool) -> int:
    """Two moments in the parameter's own type, and the number of steps."""
    return 2 * parameter.numel() * parameter.itemsize + _FLOAT32


def _adam_float32(parameter: Tensor, embedding: bool) -> int:
    return 2 * _FLOAT32 * parameter.numel()


def _adam_8bit(parameter: Tensor, embedding: bool) -> int:
    """Two moments of a byte an entry, and the largest of each block."""
    if embedding or parameter.numel() < _SMALLEST_8BIT:
        return _adam_float32(parameter, embedding)
    return 2 * (parameter.numel() + _FLOAT32 * ceil(parameter.numel() / _BLOCK))


def _adafactor(parameter: Tensor, embedding: bool) -> int:
    """Second moments by rows and by columns, and the size of the weight."""
    if parameter.ndim < 2:
        return _FLOAT32 * (parameter.numel() + 1)
    rows, columns = (parameter.numel() // parameter.shape[side] for side in (-1, -2))
    return _FLOAT32 * (rows + columns + 1)


_STATES: dict[str, Callable[[Tensor, bool], int]] = {
    "adamw_torch": _adam,
    "adamw_torch_fused": _adam,
    "adamw_bnb_8bit": _adam_8bit,
    "adamw_8bit": _adam_8bit,
    "paged_adamw_8bit": _adam_8bit,
    "paged_adamw_32bit": _adam_float32,
    "adafactor": _adafactor,
    "sgd": lambda parameter, embedding: 0,
}


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Bytes of the state of the Trainer's optimizer for the parameters that are trained.

    The table of 8-bit values that all tensors share (2 KiB) is not counted. What is paged may lie
    in the memory of the host.

    Args:
        model: on any device, meta among them.
        optim: by its name in `TrainingArguments`, with its default arguments.

    Raises:
        ValueError: for an optimizer whose state is not known here.
    """
    if optim not in _STATES:
        raise ValueError(f"optim={optim} has a state of unknown size; known: {', '.join(_STATES)}")
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    return sum(
        _STATES[optim](parameter, id(parameter) in embeddings)
        for parameter in model.parameters()
        if parameter.requires_grad
    )
