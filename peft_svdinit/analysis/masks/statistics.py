"""Where a mask spends its entries, how far that is from chance, and what of B it keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from ...models import layer_depth, module_types
from .chance import Spread, random_deviation
from .energy import Energy

OUTSIDE = "none"


@dataclass(frozen=True)
class LayerMaskStatistics:
    """The mask of one layer; `energy` is None without a B, or where B is zero."""

    name: str
    shape: tuple[int, int]
    kept: int
    rows: Spread
    columns: Spread
    energy: Energy | None

    @property
    def size(self) -> int:
        """Entries of B."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """Share of the entries that is kept."""
        return self.kept / self.size


@dataclass(frozen=True)
class Group:
    """The layers of one module type, or of one block.

    Attributes:
        share: density over that of the whole mask: 2 is twice its share.
        deviation: standard deviation of the group's density in a random mask.
    """

    name: str
    size: int
    kept: int
    share: float
    deviation: float

    @property
    def density(self) -> float:
        """Share of the entries that is kept."""
        return self.kept / self.size


@dataclass(frozen=True)
class MaskStatistics:
    """All layers of one mask."""

    layers: tuple[LayerMaskStatistics, ...]

    @cached_property
    def size(self) -> int:
        """Entries of all B."""
        return sum(layer.size for layer in self.layers)

    @cached_property
    def kept(self) -> int:
        """Entries that are trained."""
        return sum(layer.kept for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of all entries that is kept."""
        return self.kept / self.size

    @property
    def types(self) -> list[Group]:
        """By kind of module, such as q_proj, in order of appearance."""
        kinds = module_types(layer.name for layer in self.layers)
        return self._groups(lambda layer: kinds[layer.name])

    @property
    def blocks(self) -> list[Group]:
        """By the first number in the layers' names; those without one are "none"."""

        def block(layer: LayerMaskStatistics) -> str:
            depth = layer_depth(layer.name)
            return OUTSIDE if depth is None else str(depth)

        return self._groups(block)

    @property
    def rows(self) -> Spread:
        """Of all layers together: sums, and means weighted by the number of rows."""
        return Spread.pooled([layer.rows for layer in self.layers])

    @property
    def columns(self) -> Spread:
        """The same of the columns."""
        return Spread.pooled([layer.columns for layer in self.layers])

    @property
    def energy(self) -> Energy | None:
        """Of all layers together; None without a B, or if all of it is zero."""
        found = [layer.energy for layer in self.layers if layer.energy is not None]
        return Energy.pooled(found, self.density)

    def _groups(self, key: Callable[[LayerMaskStatistics], str]) -> list[Group]:
        members: dict[str, list[LayerMaskStatistics]] = defaultdict(list)
        for layer in self.layers:
            members[key(layer)].append(layer)
        groups = []
        for name, layers in members.items():
            size, kept = sum(layer.size for layer in layers), sum(layer.kept for layer in layers)
            groups.append(
                Group(
                    name,
                    size,
                    kept,
                    share=kept / size / self.density if self.kept else 0.0,
                    deviation=random_deviation(size, self.size, self.kept) / size,
                )
            )
        return groups

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: totals first, then the layers."""
        energy = self.energy
        return {
            "size": self.size,
            "kept": self.kept,
            "density": self.density,
            "energy": None if energy is None else asdict(energy),
            "rows": asdict(self.rows),
            "columns": asdict(self.columns),
            "types": [_as_dict(group) for group in self.types],
            "blocks": [_as_dict(group) for group in self.blocks],
            "layers": [_as_dict(layer) for layer in self.layers],
        }


def mask_statistics(
    masks: Mapping[str, Bool[Tensor, "out rank"]],
    lora_B: Mapping[str, Float[Tensor, "out rank"]] | None = None,
) -> MaskStatistics:
    """Statistics of every layer, in the mapping's order.

    Args:
        masks: by module name.
        lora_B: of a calibration run, to measure what of it the mask keeps.

    Raises:
        ValueError: if there is no layer, or a B is missing or of another shape.
    """
    if not masks:
        raise ValueError("masks are empty: there is nothing to describe")
    if lora_B is not None:
        check_fits(masks, lora_B)
    return MaskStatistics(
        tuple(
            LayerMaskStatistics(
                name=name,
                shape=(mask.shape[0], mask.shape[1]),
                kept=int(mask.sum()),
                rows=Spread.of(mask.sum(1), mask.shape[1]),
                columns=Spread.of(mask.sum(0), mask.shape[0]),
                energy=None if lora_B is None else Energy.of(mask, lora_B[name]),
            )
            for name, mask in masks.items()
        )
    )


def check_fits(
    masks: Mapping[str, Bool[Tensor, "out rank"]], lora_B: Mapping[str, Float[Tensor, "out rank"]]
) -> None:
    """Raise ValueError unless every mask has a B of its shape."""
    for name, mask in masks.items():
        if name not in lora_B or lora_B[name].shape != mask.shape:
            raise ValueError(
                f"layer {name}: there is no lora_B of the mask's shape {tuple(mask.shape)}; is it "
                "of the same adapter?"
            )


def _as_dict(part: LayerMaskStatistics | Group) -> dict[str, Any]:
    """JSON-ready."""
    return {**asdict(part), "density": part.density}
