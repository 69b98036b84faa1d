"""The Trainer that a callback belongs to, for the few that need more than their hooks are given."""

from __future__ import annotations

import gc
import sys
from typing import Any

from transformers import Trainer, TrainerCallback


def trainer_of(callback: TrainerCallback) -> Trainer:
    """The one Trainer that calls `callback`.

    Hooks are given the model and the optimizer, but neither the wrapper of DDP nor a word of what
    is loaded from a checkpoint before training begins (transformers#38181). So the Trainer is
    looked for among the living objects, which takes a tenth of a second, once.

    Raises:
        RuntimeError: if there is none, or more than one.
    """
    found = [
        each
        for each in gc.get_objects()
        # Not isinstance: some objects answer for a class that they only stand in for.
        if issubclass(type(each), Trainer) and callback in _callbacks(each)
    ]
    if len(found) != 1:
        raise RuntimeError(
            f"{type(callback).__name__} belongs to {len(found)} Trainers; give every Trainer a "
            "callback of its own, in callbacks=[...]"
        )
    return found[0]


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that calls a hook of `callback` right now, found on the stack; None if none does.

    Unlike `trainer_of` it costs nothing and knows which of several Trainers it is.
    """
    frame = sys._getframe()
    while frame is not None:
        found: Any = frame.f_locals.get("self")
        if issubclass(type(found), Trainer) and callback in _callbacks(found):
            return found
        frame = frame.f_back
    return None


def _callbacks(trainer: Trainer) -> list[TrainerCallback]:
    """Its callbacks; none of one whose making failed and that an exception still holds."""
    return getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
