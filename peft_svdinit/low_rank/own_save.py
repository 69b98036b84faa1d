"""A model whose `save_pretrained` is another function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel


def save_by_(model: PreTrainedModel, save: Callable[..., None]) -> None:
    """Make `model.save_pretrained` call `save` with the model first; copies and pickles do too."""
    # No bound method, which a pickle would look for by its name.
    own: Any = partial(save, model)
    model.save_pretrained = own
