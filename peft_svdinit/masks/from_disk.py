"""Masks of B from what is on the disk: adapters, and factors of a teacher."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..factors import LORI_CONFIG, SIDECAR_NAME, FactorsFile, LoraAdapter
from ..files import read_json
from .making import mask_from_scores
from .mask import LoriMask
from .projection import is_same_projection, random_projection
from .scores import magnitude_scores, random_scores, teacher_scores

logger = logging.getLogger(__name__)

_ONLY_BUDGETS = (
    "so the position of an entry within its row means nothing beside the A of seed %d: only how "
    "many entries each layer and each row keeps carries over"
)


@dataclass(frozen=True)
class Choice:
    """How many entries a mask keeps, and which it must not.

    Attributes:
        density, scope, floor: as `masks.select` takes them.
        exclude: masks whose entries are not taken.
    """

    density: float = 0.1
    scope: str = "global"
    floor: float = 0.0
    exclude: tuple[LoriMask, ...] = ()


class AdapterShapes:
    """An adapter's layers: what masks need of it.

    Args:
        path_or_id: PEFT folder or Hub id of a LoRA.

    Raises:
        FileNotFoundError, ValueError: as `LoraAdapter` does.
    """

    def __init__(self, path_or_id: str | os.PathLike) -> None:
        self.path = os.fspath(path_or_id)
        self.adapter = LoraAdapter(path_or_id)
        self.base: str | None = self.adapter.config.get("base_model_name_or_path")
        self.lora_B: dict[str, Tensor] = {}
        self.in_features: dict[str, int] = {}
        for name in self.adapter:
            layer = self.adapter[name]
            self.lora_B[name], self.in_features[name] = layer.lora_B, layer.lora_A.shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, rank) of every B."""
        return {name: (lora_B.shape[0], lora_B.shape[1]) for name, lora_B in self.lora_B.items()}

    def recorded_seed(self) -> int | None:
        """The seed of A that a LoRI adapter's sidecar names; None of any other adapter.

        Raises:
            ValueError: if the sidecar is damaged.
        """
        sidecar = Path(self.adapter.folder, SIDECAR_NAME)
        if not sidecar.is_file():
            return None
        options = read_json(sidecar, "adapter")
        if options.get("config_class") != LORI_CONFIG:
            return None
        seed = options.get("lori_seed")
        if type(seed) is not int:
            raise ValueError(f"adapter: {sidecar} has no lori_seed that is a number, got {seed!r}")
        return seed

    def has_projections_of(self, seed: int) -> bool:
        """Whether every A is the one that `seed` draws."""
        return all(
            is_same_projection(layer.lora_A, self._drawn(name, layer.lora_A, seed))
            for name, layer in self.adapter.items()
        )

    @staticmethod
    def _drawn(name: str, lora_A: Tensor, seed: int) -> Tensor:
        return random_projection(name, lora_A.shape[0], lora_A.shape[1], seed)


def magnitude_mask(adapter: AdapterShapes, choice: Choice, seed: int | None = None) -> LoriMask:
    """The entries of the largest |B| of a trained adapter.

    For a LoRI-D adapter (`lori_density=1`), whose A its seed draws. From any other LoRA, and over
    another seed, only how many entries each layer and row keeps carries over; a warning says so.

    Args:
        seed: of the A that the mask is for; by default the adapter's own.

    Raises:
        ValueError: as `mask_from_scores`, if the adapter names no seed and none is given, or its A
            is not the one that its seed draws.
    """
    recorded = adapter.recorded_seed()
    wanted = recorded if seed is None else seed
    if wanted is None:
        raise ValueError(
            f"seed: {adapter.path} is no LoRI adapter and names no seed, so its A is not that of "
            "any mask; give the seed of the adapter to be trained, and note that only how many "
            "entries each layer and each row keeps carries over to it"
        )
    carried = adapter.has_projections_of(wanted)
    if not carried and wanted == recorded:
        raise ValueError(
            f"adapter: {adapter.path} says that its A is drawn by seed {recorded}, but it is "
            "another one: trained, or made by another version? With another seed the mask takes "
            "over how many entries each layer and each row keeps"
        )
    if not carried:
        logger.warning("%s has another A, " + _ONLY_BUDGETS + ".", adapter.path, wanted)
    return _chosen(
        magnitude_scores(adapter.lora_B),
        adapter.in_features,
        choice,
        wanted,
        {"kind": "magnitude", "adapter": Path(adapter.path).name, "same_A": carried},
        adapter.base,
    )


def teacher_mask(
    factors: str | os.PathLike, rank: int, choice: Choice, seed: int = 0
) -> tuple[LoriMask, dict[str, Tensor]]:
    """The entries of the largest |B| of the best B for a teacher's deltas, and that |B|.

    Args:
        factors: factors file, folder or Hub id.
        rank: of the adapter to be trained.
        seed: of its A.

    Raises:
        ValueError: as `mask_from_scores`, or if the rank is below 1.
    """
    file = FactorsFile(factors)
    in_features = {name: file.shape_of(name)[1] for name in file}
    projections = {
        name: random_projection(name, _checked(rank), size, seed)
        for name, size in in_features.items()
    }
    scores = teacher_scores(file, projections)
    source = {"kind": "teacher", "factors": Path(os.fspath(factors)).name}
    base = file.metadata.base_model_name_or_path
    return _chosen(scores, in_features, choice, seed, source, base), scores


def random_mask(
    shapes: Mapping[str, tuple[int, int]],
    in_features: Mapping[str, int],
    choice: Choice,
    seed: int = 0,
    base: str | None = None,
) -> LoriMask:
    """The mask that `LoriConfig(lori_mask="random")` makes for the same shapes and seed."""
    source = {"kind": "random", "seed": seed}
    return _chosen(random_scores(shapes, seed), in_features, choice, seed, source, base)


def shapes_of_factors(
    factors: str | os.PathLike, rank: int
) -> tuple[dict[str, tuple[int, int]], dict[str, int], str | None]:
    """(out, rank) and inputs of every layer of a factors file, and the base it names."""
    file = FactorsFile(factors)
    sizes = {name: file.shape_of(name) for name in file}
    return (
        {name: (out, _checked(rank)) for name, (out, _) in sizes.items()},
        {name: inputs for name, (_, inputs) in sizes.items()},
        file.metadata.base_model_name_or_path,
    )


def _chosen(
    scores: Mapping[str, Tensor],
    in_features: Mapping[str, int],
    choice: Choice,
    seed: int,
    source: dict[str, Any],
    base: str | None,
) -> LoriMask:
    return mask_from_scores(
        scores,
        in_features,
        density=choice.density,
        seed=seed,
        scope=choice.scope,
        floor=choice.floor,
        exclude=choice.exclude,
        source=source,
        base_model_name_or_path=base,
    )


def _checked(rank: int) -> int:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank
