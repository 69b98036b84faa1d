"""The optimizer itself, which Accelerate hands to hooks in a wrapper."""

from __future__ import annotations

from typing import Any

import torch


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
