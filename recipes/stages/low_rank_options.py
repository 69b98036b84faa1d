"""The options of a training that goes on with layers of low rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft_svdinit.low_rank import LowRankRule
from peft_svdinit.training import RecipeArguments
from trainer_callbacks import (
    AtEpoch,
    AtStep,
    LossPlateau,
    RankSwitchCallback,
    StableRankPlateau,
)


@dataclass(frozen=True)
class LowRankOptions:
    """Which layers switch to low rank, when, and how training goes on."""

    _argument_group_name = "low rank"
    _known_as: ClassVar = {
        "low_rank_target_modules": ["target_modules"],
        "rank_energy": ["energy"],
        "rank_parameters": ["max_parameters"],
    }

    switch: Literal["share", "step", "epoch", "loss_plateau", "stable_rank_plateau"] = field(
        default="share", metadata={"help": "When: after a share of the steps (switch_share), ..."}
    )
    switch_share: float = field(
        default=0.2, metadata={"help": "Share of the steps at full rank, of switch=share."}
    )
    switch_step: int | None = field(
        default=None, metadata={"help": "Steps at full rank, of switch=step; 0 starts low."}
    )
    lowrank_switch_epoch: float | None = field(
        default=None, metadata={"help": "Epochs at full rank, of switch=epoch."}
    )
    attention_ratio: float | None = field(
        default=0.10, metadata={"help": "Rank over min(in, out) of attention layers."}
    )
    feed_forward_ratio: float | None = field(
        default=0.15, metadata={"help": "The same of all other layers."}
    )
    rank_energy: float | None = field(
        default=None, metadata={"help": "In place of ratios: share of each weight's energy kept."}
    )
    rank_parameters: int | None = field(
        default=None, metadata={"help": "In place of ratios: parameters of all switched layers."}
    )
    min_size: int = field(
        default=0, metadata={"help": "Switch layers of in*out above this only, such as 262144."}
    )
    low_rank_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names or name endings of the layers to switch, or all-linear."},
    )
    shrink_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "Shares of the steps after which ranks are lowered again, ascending."},
    )
    shrink_ratios: list[float] = field(
        default_factory=list, metadata={"help": "Rank over min(in, out) from each of these on."}
    )
    factor_batches: int = field(
        default=32,
        metadata={
            "help": "Batches of training data by whose outputs layers are approximated; 0: by the "
            "weights alone."
        },
    )
    learning_rate_factor: float = field(
        default=0.5, metadata={"help": "Of the learning rate after the switch."}
    )
    rewarmup_steps: int = field(
        default=0, metadata={"help": "Steps over which the rate rises after the switch."}
    )
    rebalance_steps: int | None = field(
        default=None, metadata={"help": "Balance the factors again every so many steps."}
    )
    optimizer_state: Literal["project", "drop"] = field(
        default="project", metadata={"help": "What becomes of the optimizer's moments, in place."}
    )
    in_place: bool | None = field(
        default=None,
        metadata={
            "help": "Switch within one Trainer; false: stop, convert, go on in a new Trainer with "
            "a new optimizer. By default in place but under FSDP and DeepSpeed."
        },
    )

    def __post_init__(self) -> None:
        given = {"step": self.switch_step, "epoch": self.lowrank_switch_epoch}
        for kind, value in given.items():
            if (value is not None) != (self.switch == kind):
                option = {"step": "switch_step", "epoch": "lowrank_switch_epoch"}[kind]
                raise ValueError(
                    f"switch={kind} and {option} belong together, got switch={self.switch} and "
                    f"{option}={value}"
                )
        at = [self.switch_share] if self.switch == "share" else []
        shares = [*at, *self.shrink_shares]
        if not all(0 <= share < 1 for share in shares) or shares != sorted(set(shares)):
            raise ValueError(
                "switch_share and shrink_shares must ascend within [0, 1), got "
                f"{self.switch_share} and {self.shrink_shares}"
            )
        if len(self.shrink_shares) != len(self.shrink_ratios):
            raise ValueError(
                f"shrink_shares and shrink_ratios must be as many, got {len(self.shrink_shares)} "
                f"and {len(self.shrink_ratios)}"
            )
        if self.factor_batches < 0:
            raise ValueError(f"factor_batches must not be negative, got {self.factor_batches}")
        for ratio in self.shrink_ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"shrink_ratios must be in (0, 1), got {self.shrink_ratios}")
        if self.rewarmup_steps < 0:
            raise ValueError(f"rewarmup_steps must not be negative, got {self.rewarmup_steps}")
        if self.rebalance_steps is not None and self.rebalance_steps < 1:
            raise ValueError(f"rebalance_steps must be at least 1, got {self.rebalance_steps}")
        if not 0 < self.learning_rate_factor <= 1:
            raise ValueError(
                f"learning_rate_factor must be in (0, 1], got {self.learning_rate_factor}"
            )
        self.rule  # noqa: B018  Refuses what contradicts itself.

    def is_in_place(self, arguments: RecipeArguments) -> bool:
        """Whether one Trainer does it all.

        Raises:
            ValueError: for options that two Trainers cannot follow.
        """
        if not arguments.splits_state if self.in_place is None else self.in_place:
            return True
        if self.shrink_shares or self.rebalance_steps or "plateau" in self.switch:
            why = "FSDP and DeepSpeed need" if self.in_place is None else "in_place=false means"
            raise ValueError(
                f"{why} a switch between two Trainers, once and after a known number of steps; "
                "leave out shrink_shares and rebalance_steps, and use switch=share, step or epoch"
            )
        return False

    @property
    def rule(self) -> LowRankRule:
        """Layers and ranks of the switch."""
        target: Any = self.low_rank_target_modules
        common: dict[str, Any] = {
            "target_modules": target[0] if target == ["all-linear"] else target,
            "min_size": self.min_size,
        }
        if self.rank_energy is not None or self.rank_parameters is not None:
            return LowRankRule(
                energy=self.rank_energy, max_parameters=self.rank_parameters, **common
            )
        ratios = {"attention": self.attention_ratio, "feed_forward": self.feed_forward_ratio}
        given = {kind: ratio for kind, ratio in ratios.items() if ratio is not None}
        return LowRankRule(ratio=given, **common)

    def step_of_switch(self, arguments: RecipeArguments, steps_per_epoch: int) -> int:
        """Optimizer steps at full rank, where that is known beforehand."""
        if self.switch_step is not None:
            return self.switch_step
        if self.lowrank_switch_epoch is not None:
            return math.ceil(self.lowrank_switch_epoch * steps_per_epoch)
        return math.ceil(self.switch_share * arguments.max_steps)

    def callback(
        self, arguments: RecipeArguments, batches: Iterable[Mapping[str, Any]] | None
    ) -> RankSwitchCallback:
        """The callback of the switch in place."""
        when: Any = {
            "loss_plateau": LossPlateau(),
            "stable_rank_plateau": StableRankPlateau(),
            "epoch": AtEpoch(self.lowrank_switch_epoch or 0),
        }.get(self.switch) or AtStep(self.step_of_switch(arguments, 0))
        shrink = [
            (AtStep(math.ceil(share * arguments.max_steps)), LowRankRule(ratio=ratio))
            for share, ratio in zip(self.shrink_shares, self.shrink_ratios, strict=True)
        ]
        return RankSwitchCallback(
            self.rule,
            when,
            shrink=shrink,
            learning_rate_factor=self.learning_rate_factor,
            rewarmup_steps=self.rewarmup_steps,
            optimizer_state=self.optimizer_state,
            rebalance_steps=self.rebalance_steps,
            rebalance_state=self.optimizer_state,
            batches=batches,
        )
