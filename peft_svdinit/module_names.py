"""The order of module names, and the randomness that belongs to one."""

from __future__ import annotations

import hashlib


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer, which depends on nothing but `seed` and the layer's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
