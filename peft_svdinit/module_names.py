"""The order of module names."""

from __future__ import annotations


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
