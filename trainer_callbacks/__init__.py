"""Callbacks for the Trainer of transformers."""

from __future__ import annotations

from trainer_callbacks.adam_moments import CarryMomentsCallback, SaveMomentsCallback
from trainer_callbacks.comparison import ComparisonCallback
from trainer_callbacks.lori_calibration import LoriCalibrationCallback
from trainer_callbacks.low_rank_checkpoints import LowRankCheckpointsCallback
from trainer_callbacks.rank_schedule import AtEpoch, AtStep, LossPlateau, StableRankPlateau
from trainer_callbacks.rank_switching import RankSwitchCallback
from trainer_callbacks.running import RunsAsCallback

__all__ = [
    "AtEpoch",
    "AtStep",
    "CarryMomentsCallback",
    "ComparisonCallback",
    "LoriCalibrationCallback",
    "LossPlateau",
    "LowRankCheckpointsCallback",
    "RankSwitchCallback",
    "RunsAsCallback",
    "SaveMomentsCallback",
    "StableRankPlateau",
]
