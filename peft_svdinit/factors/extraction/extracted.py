"""The factors of a model's deltas, with what their file says beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..file import FactorsMetadata
from ..low_rank import LowRankFactors


@dataclass(frozen=True)
class Extraction:
    """Factors of every layer with what the factors file stores beside them."""

    factors: Mapping[str, LowRankFactors]
    metadata: FactorsMetadata
    base_samples: dict[str, Tensor]
