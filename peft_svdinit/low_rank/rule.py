"""What a user says about the ranks of switched layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..models import is_chosen

KINDS = ATTENTION, FEED_FORWARD = "attention", "feed_forward"


@dataclass(frozen=True)
class LowRankRule:
    """One of: a ratio, an energy, a multiple of the stable rank, or a budget of parameters.

    Attributes:
        ratio: rank over min(out, in), for all layers or by kind of layer: a mapping from
            "attention" (layers within a module that is called so), "feed_forward" (all others), a
            name or name ending; the first key that fits counts, and a layer that none fits stays
            dense.
        energy: the smallest rank that keeps this share of ‖W‖_F², in (0, 1). Weights of pretrained
            models are of nearly full rank, so that few layers qualify.
        stable_rank: rank over ‖W‖_F²/‖W‖_2² (Cuttlefish, arXiv:2305.02538, scales it by what that
            quotient is of a random start).
        max_parameters: of all switched layers together, spent where they keep the most energy.
        min_size: layers of in · out above this only; 512² is the selective scheme.
        target_modules: "all-linear", a regular expression for whole names, or name endings.
        exclude_modules: layers that stay dense, likewise.
        multiple_of: ranks are multiples of it: a ratio and a budget are rounded down, else up.
        max_share: a layer whose rank would be above this share of in·out/(in + out), where it costs
            as much as the dense one, stays dense; of a budget, no rank is above it.

    Raises:
        ValueError: if not exactly one is given, or one is out of range.
    """

    ratio: float | Mapping[str, float] | None = None
    energy: float | None = None
    stable_rank: float | None = None
    max_parameters: int | None = None
    min_size: int = 0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    multiple_of: int = 8
    max_share: float = 0.8

    def __post_init__(self) -> None:
        choices = ("ratio", "energy", "stable_rank", "max_parameters")
        given = {name: getattr(self, name) for name in choices}
        if sum(value is not None for value in given.values()) != 1:
            named = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"give exactly one of {', '.join(choices)}, got {named}")
        for key, ratio in self.ratios.items():
            if not 0 < ratio < 1:
                raise ValueError(f"ratio must be in (0, 1), got {ratio} for {key or 'all layers'}")
        if self.ratio is not None and not self.ratios:
            raise ValueError("ratio must name at least one kind of layer, got an empty mapping")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"energy must be in (0, 1), got {self.energy}; write 90 % as 0.9")
        if self.stable_rank is not None and not self.stable_rank > 0:
            raise ValueError(f"stable_rank must be positive, got {self.stable_rank}")
        for name, least in (("max_parameters", 1), ("min_size", 0), ("multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share must be in (0, 1], got {self.max_share}")

    @property
    def ratios(self) -> dict[str, float]:
        """`ratio` by kind of layer, "" for all."""
        if self.ratio is None:
            return {}
        return dict(self.ratio) if isinstance(self.ratio, Mapping) else {"": self.ratio}

    def is_for(self, name: str) -> bool:
        """Whether a layer is among the targets and not excluded."""
        targets = self.target_modules
        return (targets == "all-linear" or is_chosen(name, targets)) and not is_chosen(
            name, self.exclude_modules, "exclude_modules"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; two rules that say the same give the same."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.ratio, Mapping):
            found["ratio"] = dict(self.ratio)
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(found[name], str):
                found[name] = list(found[name])
        return found


def ratio_for(name: str, ratios: Mapping[str, float]) -> float | None:
    """The ratio of a layer by its full name, None if no key fits."""
    attention = any("attn" in part or "attention" in part for part in name.lower().split(".")[:-1])
    kind = ATTENTION if attention else FEED_FORWARD
    for key, ratio in ratios.items():
        if key in ("", kind) or (key not in KINDS and is_chosen(name, [key])):
            return ratio
    return None
