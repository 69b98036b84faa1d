"""LoRA: delta = scaling * up @ down, of linear layers and convolutions."""

from __future__ import annotations

import math

from ...factors import LoraProduct
from .forms import Algorithm, LayerHeader, Parts, Shapes, count

DOWN, UP = PARTS = "lora_down", "lora_up"


def header(shapes: Shapes) -> LayerHeader:
    """Of `lora_down` (rank, in, *kernel) and `lora_up` (out, rank, 1, …); see `Algorithm`."""
    if set(shapes) != {DOWN, UP}:
        raise ValueError(f"it has {', '.join(sorted(shapes))}, but not both factors of a product")
    down, up = list(shapes[DOWN]), list(shapes[UP])
    fits = len(down) >= 2 and len(up) >= 2 and up[1] == down[0]
    if not fits or any(size != 1 for size in up[2:]) or 0 in (*down, *up):
        raise ValueError(
            f"its factors of shapes {down} and {up} do not form a product of two matrices"
        )
    shape = up[0], math.prod(down[1:])
    return LayerHeader(
        shape=shape,
        kernel=tuple(down[2:]),
        rank=min(down[0], *shape),
        dim=down[0],
        parameters=count(shapes),
    )


def delta(parts: Parts, scaling: float) -> LoraProduct:
    """`scaling * up @ down`; a negative scaling goes into `lora_B`."""
    up, down = parts[UP].flatten(1), parts[DOWN].flatten(1)
    return LoraProduct(down, up if scaling >= 0 else -up, abs(scaling))


LORA = Algorithm("LoRA", PARTS, header, delta)
