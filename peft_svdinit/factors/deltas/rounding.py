"""What of a pair's deltas is the rounding from one dtype to another, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ...models import rounding_size
from .checkpoint_pair import CheckpointPair


def rounding_remark(pair: CheckpointPair, layers: Iterable[str]) -> str | None:
    """What to say of these layers, and of other tensors, that casts alone explain; None if none."""
    count, others = sum(map(pair.is_rounding, layers)), len(pair.rounded_tensors)
    if not count and not others:
        return None
    return (
        f"{count} layers and {others} other tensors of tuned are those of base but for the "
        "rounding from one dtype to another; they count as unchanged"
    )


def rounding_share(pair: CheckpointPair, norms: Mapping[str, float]) -> float:
    """Estimated share of deltas' norm that is the rounding of one side to a coarser dtype.

    By the entries by which a weight is recognised, so to about a tenth of itself.

    Args:
        pair: the checkpoints.
        norms: ‖delta‖_F by module name; layers of norm 0 are unchanged, and have none.
    """
    rounding = (
        math.prod(pair.base.stored_shape(name)) ** 0.5
        * rounding_size(pair.base.sample(name), pair.tuned.sample(name))
        for name, norm in norms.items()
        if norm
    )
    return math.hypot(*rounding) / (math.hypot(*norms.values()) or 1.0)
