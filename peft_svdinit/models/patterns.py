"""Per-layer values as keys of PEFT's `rank_pattern` and `alpha_pattern` that match nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping


def exact_pattern(values: Mapping[str, int]) -> dict[str, int]:
    """Keys for PEFT that give exactly the layers named the values named.

    PEFT tries `(.*\\.)?(KEY)$` on each module name, so a bare name would also match modules that
    end in it, and its dots any character. Keys are escaped and begin with `^`, which makes them
    exact. All layers of one value share a key: PEFT compares every key with every module, and with
    one key per layer that takes minutes beyond 512 layers, where Python's cache of compiled
    expressions ends.
    """
    names = defaultdict(list)
    for name, value in values.items():
        names[value].append(re.escape(name))
    return {f"^(?:{'|'.join(names[value])})": value for value in sorted(names)}


def names_of_exact(key: str) -> list[str] | None:
    """The names in a key of `exact_pattern`; None of any other key."""
    if not (key.startswith("^(?:") and key.endswith(")")):
        return None
    parts = key[len("^(?:") : -1].split("|")
    names = [re.sub(r"\\(.)", r"\1", part) for part in parts]
    return names if [re.escape(name) for name in names] == parts else None
