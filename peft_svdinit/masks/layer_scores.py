"""Scores of all layers with the A that they belong to, and the masks that follow from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .choosing import select
from .mask import LoriMask
from .scores import random_scores
from .selection import Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerScores:
    """Scores of the entries of every B, and the A that they belong to.

    Attributes:
        scores: by module name. Sums on the way to scores, in a checkpoint, may be negative.
        in_features: columns of every A.
        seed: of A.
        source: what they measure: a "kind" such as "magnitude", and its details.
        base_model_name_or_path: the model.
    """

    scores: Mapping[str, Float[Tensor, "out rank"]]
    in_features: Mapping[str, int]
    seed: int
    source: Mapping[str, Any]
    base_model_name_or_path: str | None = None

    @classmethod
    def random(
        cls,
        shapes: Mapping[str, tuple[int, int]],
        in_features: Mapping[str, int],
        seed: int,
        base_model_name_or_path: str | None = None,
    ) -> LayerScores:
        """Those of `LoriConfig(lori_mask="random")`, for B of `shapes`."""
        source = {"kind": "random", "seed": seed}
        scores = random_scores(shapes, seed)
        return cls(scores, in_features, seed, source, base_model_name_or_path)

    def mask(self, selection: Selection) -> LoriMask:
        """The mask of the entries of highest score, as `select` chooses them.

        A warning says how many of the entries kept have score 0: their choice means nothing.

        Raises:
            ValueError: as `select`, and if a mask to exclude is for the A of another seed.
        """
        for other in selection.exclude:
            if other.seed != self.seed:
                raise ValueError(
                    f"exclude: a mask belongs to the A of seed {other.seed}, this one to seed "
                    f"{self.seed}; only masks over the same A can be disjoint"
                )
        masks = select(self.scores, selection)
        self._warn_of_zeros(masks)
        return LoriMask.over(
            masks,
            self.in_features,
            seed=self.seed,
            density=selection.density,
            scope=selection.scope,
            floor=selection.floor,
            source=self.source,
            base_model_name_or_path=self.base_model_name_or_path,
        )

    def _warn_of_zeros(self, masks: Mapping[str, Tensor]) -> None:
        unranked = sum(
            int((mask & (self.scores[name] == 0).to(mask.device)).sum())
            for name, mask in masks.items()
        )
        if unranked:
            logger.warning(
                "%d of the %d entries kept have score 0, which ranks nothing: they are the first "
                "ones of their rows and layers. Is the density above the share of B that was "
                "trained?",
                unranked,
                sum(int(mask.sum()) for mask in masks.values()),
            )
