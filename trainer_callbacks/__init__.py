"""Callbacks for the Trainer of transformers."""

from __future__ import annotations

from trainer_callbacks.adam_moments import CarryMomentsCallback, SaveMomentsCallback
from trainer_callbacks.comparison import ComparisonCallback
from trainer_callbacks.lori_calibration import LoriCalibrationCallback

__all__ = [
    "CarryMomentsCallback",
    "ComparisonCallback",
    "LoriCalibrationCallback",
    "SaveMomentsCallback",
]
