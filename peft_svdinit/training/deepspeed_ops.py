"""DeepSpeed's C++ ops, built once in a folder of our own, and what builds that were killed left.

DeepSpeed compiles an op where it first needs it. A build that was killed leaves torch's file
`lock`, for whose removal every later run waits, forever and in silence.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .cache import cache_root

logger = logging.getLogger(__name__)

_FOLDER = "TORCH_EXTENSIONS_DIR"
_LOCK = "lock"
COMMUNICATION, CPU_ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"


def prepare_op(builder: str) -> None:
    """Build an op of DeepSpeed unless it is built already; other processes wait for the one build.

    The folder is `$TORCH_EXTENSIONS_DIR`, by default one in this package's cache for this Python,
    torch, DeepSpeed and accelerator. There, where this function alone builds the op, the lock of a
    killed build is removed, and the log says so.

    Args:
        builder: as DeepSpeed names it: COMMUNICATION between processes on CPUs, or CPU_ADAM for
            an optimizer in the host's memory. One that the accelerator does not have is left out.

    Raises:
        ModuleNotFoundError: if DeepSpeed is not installed.
        ValueError: if a lock stands in a folder that the user gave.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "deepspeed is asked for and not installed; run: "
            'DS_ACCELERATOR=cpu pip install "peft-svdinit[deepspeed]" on a CPU, and the same '
            "without DS_ACCELERATOR on GPUs"
        )
    own = _own_folder()
    folder = Path(os.environ.setdefault(_FOLDER, str(own)))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "building"):
        from deepspeed.accelerator import (  # pyright: ignore[reportMissingImports]
            get_accelerator,
        )

        accelerator: Any = get_accelerator()
        found = accelerator.create_op_builder(builder)
        if found is not None and found.is_compatible(verbose=False):
            _release(folder / found.name / _LOCK, is_own=folder == own)
            found.load(verbose=False)


def _release(lock: Path, *, is_own: bool) -> None:
    if not lock.exists():
        return
    if not is_own:
        raise ValueError(
            f"{_FOLDER}: {lock} says that an op of DeepSpeed is being built; every run waits "
            "for its removal. If no other program builds there, a killed one left it: delete "
            f"the file, or leave {_FOLDER} unset"
        )
    logger.warning("removed %s, which a killed build of a DeepSpeed op had left", lock)
    lock.unlink(missing_ok=True)


def _own_folder() -> Path:
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    versions = [python, f"torch{torch.__version__}"]
    versions += [f"deepspeed{importlib.metadata.version('deepspeed')}"]
    versions += [os.environ.get("DS_ACCELERATOR", "default")]
    return cache_root() / "torch_extensions" / "-".join(versions)
