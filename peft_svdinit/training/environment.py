"""What a run ran on: versions, git revision, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its inputs: `versions`, `git_revision` and `hardware`.

    A package that is not installed has version None. Nothing here identifies the machine or the
    user: `hardware` is the number of usable cores, the accelerator's model or the device type, and
    the physical memory in GiB.
    """
    packages = ("torch", "transformers", "peft", "accelerate", "peft_svdinit")
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "git_revision": git_revision(Path(__file__).parent),
        "hardware": {
            "cpu_cores": _usable_cores(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "memory_gb": _physical_memory_gb(),
        },
    }


def git_revision(directory: str | os.PathLike) -> str | None:
    """The commit checked out in `directory`; None without git or where git does not track it."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "-C", os.fspath(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return result.stdout.strip()

    try:
        # An installed package may lie in a virtual environment inside somebody else's repository.
        return git("rev-parse", "HEAD") if git("ls-files", ".") else None
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int | None:
    # The affinity, where there is one, respects the limits of a container or a job.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _physical_memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None
