"""Where the package keeps what is made once for a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$PEFT_SVDINIT_CACHE`, else `$XDG_CACHE_HOME/peft_svdinit`, else `~/.cache/peft_svdinit`."""
    if own := os.environ.get("PEFT_SVDINIT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "peft_svdinit"
