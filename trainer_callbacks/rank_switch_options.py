"""The options of a switch to low rank within a Trainer, checked where they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft_svdinit.files import WrongKind
from peft_svdinit.low_rank import LowRankPlan, LowRankRule, RowNormalise
from peft_svdinit.optim import STATE_HANDLINGS, StateHandling
from trainer_callbacks.rank_schedule import StableRankPlateau, Trigger, described

Stage = tuple[Trigger, LowRankRule | LowRankPlan]


@dataclass(frozen=True)
class SwitchOptions:
    """What `RankSwitchCallback` is given; its docstring says what each is.

    Attributes:
        stages: when and what: the switch, then the lower ranks.

    Raises:
        TypeError: if a rule is none.
        ValueError: if an option is out of range, or two contradict each other.
    """

    stages: Sequence[Stage]
    learning_rate_factor: float
    rewarmup_steps: int
    optimizer_state: StateHandling
    rebalance_steps: int | None
    rebalance_state: StateHandling
    batches: Sequence[Mapping[str, Any]] | None
    row_normalise: RowNormalise
    train_norms: bool
    averaged_models: Sequence[nn.Module]

    def __post_init__(self) -> None:
        for number, (when, rule) in enumerate(self.stages):
            known = LowRankRule if number else (LowRankRule, LowRankPlan)
            if not isinstance(rule, known):
                raise WrongKind(f"rule must be a LowRankRule, or a plan of a switch, got {rule!r}")
            if isinstance(rule, LowRankPlan) and isinstance(when, StableRankPlateau):
                raise ValueError("StableRankPlateau needs a rule, for the layers it looks at")
            if isinstance(rule, LowRankPlan) and not rule.layers:
                raise ValueError("the plan names no layer")
        if not 0 < self.learning_rate_factor <= 1:
            raise ValueError(
                f"learning_rate_factor must be in (0, 1], got {self.learning_rate_factor}"
            )
        if self.rewarmup_steps < 0:
            raise ValueError(f"rewarmup_steps must not be negative, got {self.rewarmup_steps}")
        if self.rebalance_steps is not None and self.rebalance_steps < 1:
            raise ValueError(f"rebalance_steps must be at least 1, got {self.rebalance_steps}")
        for name in ("optimizer_state", "rebalance_state"):
            if getattr(self, name) not in STATE_HANDLINGS:
                raise ValueError(
                    f"{name} must be one of {', '.join(STATE_HANDLINGS)}, got "
                    f"{getattr(self, name)!r}"
                )
        for name, used in (
            ("optimizer_state", len(self.stages) > 1),
            ("rebalance_state", self.rebalance_steps is not None),
        ):
            if self.train_norms and used and getattr(self, name) != "drop":
                raise ValueError(
                    "the moments of factors with train_norms cannot be carried to other factors; "
                    f"use {name}=drop"
                )

    @property
    def carried(self) -> list[str]:
        """The arguments by which the optimizer's state is to be carried over."""
        asked = [("optimizer_state", self.optimizer_state)]
        if self.rebalance_steps is not None:
            asked.append(("rebalance_state", self.rebalance_state))
        return [name for name, handling in asked if handling == "project"]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what a resumed run must have as it was."""
        every = self.rebalance_steps
        return {
            "stages": [
                # The order of ratios counts, and is lost where JSON is sorted.
                [described(when), rule.as_dict(), list(getattr(rule, "ratios", ()))]
                for when, rule in self.stages
            ],
            "learning_rate_factor": self.learning_rate_factor,
            "rewarmup_steps": int(self.rewarmup_steps),
            "optimizer_state": self.optimizer_state,
            "rebalance_steps": every and int(every),
            "rebalance_state": every and self.rebalance_state,
            "batches": None if self.batches is None else len(self.batches),
            "row_normalise": self.row_normalise,
            "train_norms": self.train_norms,
        }
