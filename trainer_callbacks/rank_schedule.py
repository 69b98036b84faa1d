"""When layers switch to low rank: questions to what a training has shown so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from math import isfinite, nan
from numbers import Real
from statistics import fmean
from typing import Any, Protocol

from peft_svdinit.files import WrongKind

StableRanks = Mapping[str, float]


@dataclass(frozen=True)
class Seen:
    """What a training has shown.

    Attributes:
        step: optimizer steps taken.
        epoch: passes over the data, a fraction within one.
        logs: the Trainer's log history since the last switch: metrics by name, oldest first.
        stable_ranks: of each layer, by name, at each epoch that has ended since then, oldest first;
            taken only where a `StableRankPlateau` is waited for.
    """

    step: int
    epoch: float
    logs: Sequence[Mapping[str, Any]] = ()
    stable_ranks: Sequence[StableRanks] = ()


class Trigger(Protocol):
    """Says whether something is due; asked after every step."""

    def due(self, seen: Seen) -> bool: ...


@dataclass(frozen=True)
class AtStep:
    """From this optimizer step on; 0 is before the first."""

    step: int

    def __post_init__(self) -> None:
        if not self.step >= 0:
            raise ValueError(f"step must not be negative, got {self.step}")

    def due(self, seen: Seen) -> bool:
        return seen.step >= self.step


@dataclass(frozen=True)
class AtEpoch:
    """From the end of this many epochs on; 0 is before the first step."""

    epoch: float

    def __post_init__(self) -> None:
        if not self.epoch >= 0:
            raise ValueError(f"lowrank_switch_epoch must not be negative, got {self.epoch}")

    def due(self, seen: Seen) -> bool:
        # Epochs are sums of fractions: ten of them may come to 9.999….
        return seen.epoch >= self.epoch - 1e-9


@dataclass(frozen=True)
class LossPlateau:
    """Once the best of the last `patience` values is no better than the best before them.

    Attributes:
        patience: values without improvement.
        min_delta: share of the best value by which a better one must be lower.
        metric: `loss`, as logged every `logging_steps`, or a metric of evaluations, `eval_loss`.
    """

    patience: int = 5
    min_delta: float = 0.01
    metric: str = "loss"

    def __post_init__(self) -> None:
        if self.patience < 1 or not self.min_delta >= 0:
            raise ValueError(
                "patience must be at least 1 and min_delta not negative, got "
                f"{self.patience} and {self.min_delta}"
            )

    def due(self, seen: Seen) -> bool:
        values = [log[self.metric] for log in seen.logs if isfinite(log.get(self.metric, nan))]
        before, recent = values[: -self.patience], values[-self.patience :]
        if not before:
            return False
        best = min(before)
        return min(recent) > best - self.min_delta * abs(best)


@dataclass(frozen=True)
class StableRankPlateau:
    """Once the stable ranks of layers have settled (Cuttlefish, arXiv:2305.02538).

    A layer has settled when the mean change of its stable rank over the last `window` epochs is at
    most `tolerance`; Cuttlefish waits for all layers, with a tolerance of 0.1.

    Attributes:
        window: changes from epoch to epoch that are looked at.
        tolerance: change per epoch, as a share of the stable rank if `relative`.
        share: of the layers that must have settled, in (0, 1].
    """

    window: int = 3
    tolerance: float = 0.1
    relative: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 1 or not self.tolerance > 0 or not 0 < self.share <= 1:
            raise ValueError(
                "window must be at least 1, tolerance positive and share in (0, 1], got "
                f"{self.window}, {self.tolerance} and {self.share}"
            )

    def due(self, seen: Seen) -> bool:
        if len(seen.stable_ranks) <= self.window:
            return False
        recent = seen.stable_ranks[-self.window - 1 :]
        settled = [self._settled([ranks[name] for ranks in recent]) for name in recent[0]]
        return bool(settled) and sum(settled) >= self.share * len(settled)

    def _settled(self, values: Sequence[float]) -> bool:
        change = fmean(abs(b - a) for a, b in pairwise(values))
        return change <= self.tolerance * (values[-1] if self.relative else 1.0)


@dataclass(frozen=True)
class When:
    """When a function of the user's says so."""

    function: Callable[[Seen], bool] = field(repr=False)

    def due(self, seen: Seen) -> bool:
        return bool(self.function(seen))


def described(trigger: Trigger) -> dict[str, Any]:
    """A trigger as JSON, for a checkpoint to tell whether a resumed run has the same; no code."""
    kind = type(trigger).__name__
    if isinstance(trigger, When) or not is_dataclass(trigger):
        return {"kind": kind}
    return {"kind": kind, **{name: _as_json(value) for name, value in vars(trigger).items()}}


def _as_json(value: Any) -> Any:
    """A number or text as it is, of anything else its type."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return float(value) if isinstance(value, Real) else type(value).__name__


def as_trigger(given: Any, argument: str = "switch") -> Trigger:
    """A trigger as it is, a function as one.

    Raises:
        TypeError: if it is neither.
    """
    if callable(getattr(given, "due", None)) and not isinstance(given, type):
        return given
    if callable(given) and not isinstance(given, type):
        return When(given)  # pyright: ignore[reportArgumentType]
    raise WrongKind(
        f"{argument} must be a trigger such as AtStep(500), or a function of what was Seen, got "
        f"{given!r}"
    )


def rewarmup(steps_since: int, steps: int) -> float:
    """Share of the learning rate `steps_since` steps after a switch, rising to 1 over `steps`."""
    return 1.0 if steps_since >= steps else (steps_since + 1) / (steps + 1)
