"""Trainings that end half-way, and what they logged."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

STEPS, INTERRUPTED_AT = 6, 3


class StopAt(TrainerCallback):
    """End training after a step, as a killed job whose last checkpoint is that step's."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
