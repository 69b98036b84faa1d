"""`svdinit env`: what to paste into a bug report."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from ..training import describe_environment


@dataclass(frozen=True)
class EnvironmentOptions:
    """Print versions and hardware, for bug reports."""


def run(options: EnvironmentOptions) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(describe_environment(device), indent=2))
