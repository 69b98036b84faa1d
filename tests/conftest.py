"""Settings of the whole suite: no network, one thread, hypothesis without a deadline."""

from __future__ import annotations

import importlib.util
import os

# No test may wait for a server: whatever is not on the disk is reported missing at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Before the package under test: whatever its modules import first while jaxtyping's import hook is
# active is compiled from source instead of read from the byte code cache, 20 s for PEFT and torch.
import pytest
import torch
from hypothesis import settings

# Models and matrices here are so small that threads only cost, and more so under pytest-xdist.
torch.set_num_threads(1)

# No deadline: torch's first call is slow.
settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="what CI samples, in full",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        "thorough": None if config.getoption("--thorough") else "with --thorough",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "deepspeed": None if importlib.util.find_spec("deepspeed") else "needs DeepSpeed",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
