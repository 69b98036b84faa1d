"""Learning rates that a switch lowers, under the schedulers that go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR


def scale_rates_(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the rates of now and of all steps to come by `factor`; floors stay.

    The scheduler's base rates are part of its saved state, and the groups' of the optimizer's, so
    that a resumed run has the lower rates too.
    """
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = group[name] * factor
    for each in _all(scheduler):
        if hasattr(each, "base_lrs"):
            each.base_lrs = [rate * factor for rate in each.base_lrs]
        _note_rates(optimizer, each)


def dampen_rates_(optimizer: torch.optim.Optimizer, scheduler: Any, share: float) -> None:
    """Multiply the rates of the next step alone, which the scheduler has just set."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * share
    for each in _all(scheduler):
        _note_rates(optimizer, each)


def can_scale(scheduler: Any) -> bool:
    """Whether its rates follow from the base rates and the last ones."""
    return not any(isinstance(each, (OneCycleLR, CyclicLR)) for each in _all(scheduler))


def sets_rates_anew(scheduler: Any) -> bool:
    """Whether every step computes its rates from the base rates, not from the last ones."""
    return isinstance(next(_all(scheduler)), LambdaLR)


def _note_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """What the scheduler says when it is asked for the last rates, as the Trainer's logs do."""
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _all(scheduler: Any) -> Iterator[Any]:
    """The scheduler inside Accelerate's wrapper, and those that it is made of."""
    inner = getattr(scheduler, "scheduler", scheduler)
    yield inner
    for each in getattr(inner, "_schedulers", ()):
        yield from _all(each)
