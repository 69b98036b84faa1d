"""`svdinit env`: what to paste into a bug report."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .. import training


@dataclass(frozen=True)
class EnvironmentOptions:
    """Print versions and hardware, for bug reports."""


def run(options: EnvironmentOptions) -> None:
    import torch  # Only here: help and wrong options are answered without it.

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(training.describe_environment(device), indent=2))
