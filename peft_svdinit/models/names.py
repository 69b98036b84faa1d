"""The order of module names, their kinds, and the randomness that belongs to one."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def endings(name: str) -> list[str]:
    """The name, and what is behind each of its dots."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_within(name: str, modules: Collection[str]) -> bool:
    """Whether a module or parameter is one of `modules` or in one of them, by full names."""
    parts = name.split(".")
    return any(".".join(parts[: end + 1]) in modules for end in range(len(parts)))


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer, which depends on nothing but `seed` and the layer's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def module_types(names: Iterable[str]) -> dict[str, str]:
    """Name to kind of module: the last component, or the last two where one would be ambiguous.

    `model.layers.3.self_attn.q_proj` is a `q_proj`; GPT-2's two `c_proj` become `attn.c_proj` and
    `mlp.c_proj`. Numbers are not kinds and are passed over.
    """
    words = {name: [word for word in name.split(".") if not word.isdigit()] for name in names}
    parents = defaultdict(set)
    for parts in words.values():
        parents[tuple(parts[-1:])].add(tuple(parts[-2:-1]))
    return {
        name: ".".join(parts[-2:] if len(parents[tuple(parts[-1:])]) > 1 else parts[-1:]) or name
        for name, parts in words.items()
    }


def layer_depth(name: str) -> int | None:
    """The block a module sits in, which is the first number in its name; None if it has none."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)
    return int(found[1]) if found else None
