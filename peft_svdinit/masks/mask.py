"""The mask of every B of an adapter, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from ..models import natural_order
from .projection import random_projection, tensor_hash


@dataclass(frozen=True)
class MaskedLayer:
    """The mask of one B.

    Attributes:
        mask: which entries are trained.
        in_features: columns of the layer's A.
        hash_A: `tensor_hash` of that A.
    """

    mask: Bool[Tensor, "out rank"]
    in_features: int
    hash_A: str

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.mask.shape[1]

    @property
    def kept(self) -> int:
        """Number of trained entries."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class LoriMask:
    """Masks of all layers, and how they came about.

    Attributes:
        layers: by module name, in natural order.
        density: share of all entries that was asked for.
        seed: of the A that the mask belongs to.
        scope: as `select` takes it.
        floor: as `select` takes it.
        source: what chose the entries: a "kind" such as "magnitude", and its details.
        base_model_name_or_path: the model.
    """

    layers: Mapping[str, MaskedLayer]
    density: float
    seed: int
    scope: str = "global"
    floor: float = 0.0
    source: Mapping[str, Any] = field(default_factory=dict)
    base_model_name_or_path: str | None = None

    @classmethod
    def over(
        cls,
        masks: Mapping[str, Bool[Tensor, "out rank"]],
        in_features: Mapping[str, int],
        *,
        seed: int,
        **details: Any,
    ) -> LoriMask:
        """`masks` over the A that `seed` draws; `details` are the other attributes."""
        layers = {}
        for name in sorted(masks, key=natural_order):
            mask, width = masks[name].cpu(), in_features[name]
            lora_A = random_projection(name, mask.shape[1], width, seed)
            layers[name] = MaskedLayer(mask, width, tensor_hash(lora_A))
        return cls(layers, seed=seed, **details)

    @property
    def masks(self) -> dict[str, Bool[Tensor, "out rank"]]:
        """The masks alone."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def size(self) -> int:
        """Entries of all B."""
        return sum(layer.mask.numel() for layer in self.layers.values())

    @property
    def kept(self) -> int:
        """Entries that are trained."""
        return sum(layer.kept for layer in self.layers.values())
