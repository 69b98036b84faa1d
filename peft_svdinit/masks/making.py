"""A mask from scores, beside the masks that it must not overlap."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from .mask import LoriMask
from .selection import select

logger = logging.getLogger(__name__)


def mask_from_scores(
    scores: Mapping[str, Float[Tensor, "out rank"]],
    in_features: Mapping[str, int],
    *,
    density: float,
    seed: int,
    scope: str = "global",
    floor: float = 0.0,
    exclude: Iterable[LoriMask] = (),
    source: Mapping[str, Any],
    base_model_name_or_path: str | None = None,
) -> LoriMask:
    """The mask that `select` chooses, over the A that `seed` draws.

    A warning says how many of the entries kept have score 0: their choice means nothing.

    Args:
        scores, density, scope, floor: as `select` takes them.
        in_features: columns of every A.
        seed: of A.
        exclude: masks of other adapters with the same A, none of whose entries is taken.
        source, base_model_name_or_path: recorded in the mask.

    Raises:
        ValueError: as `select`, and if a mask to exclude is for another seed or other layers.
    """
    excluded = _union(scores, seed, exclude)
    masks = select(scores, density, scope=scope, floor=floor, exclude=excluded)
    _warn_of_zeros(scores, masks)
    return LoriMask.over(
        masks,
        in_features,
        seed=seed,
        density=density,
        scope=scope,
        floor=floor,
        source=source,
        base_model_name_or_path=base_model_name_or_path,
    )


def _warn_of_zeros(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    unranked = sum(
        int((mask & (scores[name] == 0).to(mask.device)).sum()) for name, mask in masks.items()
    )
    if unranked:
        logger.warning(
            "%d of the %d entries kept have score 0, which ranks nothing: they are the first ones "
            "of their rows and layers. Is the density above the share of B that was trained?",
            unranked,
            sum(int(mask.sum()) for mask in masks.values()),
        )


def _union(
    scores: Mapping[str, Tensor], seed: int, exclude: Iterable[LoriMask]
) -> dict[str, Bool[Tensor, "out rank"]]:
    excluded: dict[str, Tensor] = {}
    for mask in exclude:
        if mask.seed != seed:
            raise ValueError(
                f"exclude: a mask belongs to the A of seed {mask.seed}, this one to seed {seed}; "
                "only masks over the same A can be disjoint"
            )
        other = scores.keys() ^ mask.layers.keys()
        if other:
            raise ValueError(
                f"exclude: layer {min(other)} is in one of the masks only; make both for the same "
                "model and target_modules"
            )
        for name, layer in mask.layers.items():
            if layer.mask.shape != scores[name].shape:
                raise ValueError(
                    f"exclude: the mask of layer {name} is of shape {tuple(layer.mask.shape)}, its "
                    f"B of shape {tuple(scores[name].shape)}; masks of one rank can be disjoint"
                )
            excluded[name] = excluded[name] | layer.mask if name in excluded else layer.mask
    return excluded
