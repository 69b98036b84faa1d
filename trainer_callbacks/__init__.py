"""Callbacks for the Trainer of transformers."""

from __future__ import annotations

from trainer_callbacks.comparison import ComparisonCallback

__all__ = ["ComparisonCallback"]
