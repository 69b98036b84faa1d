"""Peak memory of a stretch of work."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` count from now on, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        pass  # not Linux, or not allowed: the peak is the process's since it began


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MiB since `reset_peak_memory`; None where the system does not say.

    On CUDA what this process allocated on the device, elsewhere its resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        kilobytes = status.split("VmHWM:")[1].split()[0]
        return int(kilobytes) / 2**10
    except (OSError, IndexError):
        pass
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
