"""Dropout switched off where a module calls the function itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def no_dropout_in_functions() -> Iterator[None]:
    """Within, `nn.functional.dropout` is the identity, whatever it is told of training.

    A layer that is to be checkpointed has to believe that it is training, and OPT's, BART's and
    others then drop out by calling the function. The backward pass recomputes the layer in a thread
    of its own on some devices, so that the function itself is replaced.
    """
    original = nn.functional.dropout

    def identity(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input

    nn.functional.dropout = identity
    try:
        yield
    finally:
        nn.functional.dropout = original
