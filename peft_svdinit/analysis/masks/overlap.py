"""How much the masks, and the deltas, of several tasks have in common, beside what chance gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...factors import (
    ComparableDelta,
    PairInterference,
    SupportOverlap,
    layer_interference,
    pair_interference,
)
from ...masks import LoriMask
from .chance import random_deviation


@dataclass(frozen=True)
class MaskOverlap:
    """Two masks.

    Attributes:
        both, either: entries in both masks, and in at least one.
        jaccard: both / either; 0 of two empty masks.
        random_jaccard, random_deviation: mean and standard deviation of independent random masks
            with as many entries, to the first order: p q / (p + q - p q) for densities p and q.
        random_in_layers: the same if each layer keeps as many entries as it does: what is above is
            agreement on the entries, what is between this and `random_jaccard` agreement on layers.
        row_correlation: Pearson correlation of the densities of all rows; 0 of random masks.
        shares_A: whether the masks belong to one A. Entries over different A have nothing to do
            with each other: only layers and rows can agree.
    """

    both: int
    either: int
    jaccard: float
    random_jaccard: float
    random_deviation: float
    random_in_layers: float
    row_correlation: float
    shares_A: bool


@dataclass(frozen=True)
class Comparison:
    """Several masks, and the deltas of those that have one.

    Attributes:
        labels: of the masks.
        overlaps: by pair of indices i < j.
        interference: the same, of the pairs that both have a delta.
    """

    labels: tuple[str, ...]
    overlaps: Mapping[tuple[int, int], MaskOverlap]
    interference: Mapping[tuple[int, int], PairInterference]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "labels": list(self.labels),
            "pairs": [
                {
                    "masks": [self.labels[i], self.labels[j]],
                    **asdict(overlap),
                    "deltas": found.as_dict()
                    if (found := self.interference.get((i, j))) is not None
                    else None,
                }
                for (i, j), overlap in self.overlaps.items()
            ],
        }


Delta = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], float]
"""lora_B, lora_A and the scaling of a layer."""


def compare_masks(
    masks: Mapping[str, LoriMask],
    deltas: Mapping[str, Callable[[str], Delta]] | None = None,
) -> Comparison:
    """Every pair of masks, and of deltas.

    Args:
        masks: by label, two at least.
        deltas: of the labels that have trained adapters, what gives the delta of a layer by name;
            one layer is read at a time.

    Raises:
        ValueError: for fewer than two masks, or masks of different layers or shapes.
    """
    if len(masks) < 2:
        raise ValueError(f"masks must be two at least to be compared, got {len(masks)}")
    labels, given = tuple(masks), list(masks.values())
    for label, mask in masks.items():
        _check_same_layers(labels[0], given[0], label, mask)
    pairs = list(itertools.combinations(range(len(given)), 2))
    return Comparison(
        labels,
        {(i, j): _overlap(given[i], given[j]) for i, j in pairs},
        _interference(labels, list(given[0].layers), deltas or {}),
    )


def _check_same_layers(first: str, one: LoriMask, second: str, other: LoriMask) -> None:
    differing = one.layers.keys() ^ other.layers.keys()
    if differing:
        raise ValueError(
            f"layer {min(differing)} is in one of the masks {first} and {second} only; compare "
            "masks of one model and the same target_modules"
        )
    for name, layer in one.layers.items():
        shape, found = tuple(layer.mask.shape), tuple(other.layers[name].mask.shape)
        if shape != found:
            raise ValueError(
                f"layer {name} has masks of shape {shape} in {first} and {found} in {second}; "
                "compare masks of one model and rank"
            )


def _overlap(first: LoriMask, second: LoriMask) -> MaskOverlap:
    names = list(first.layers)
    layers = [
        SupportOverlap.of(first.layers[name].mask, second.layers[name].mask) for name in names
    ]
    found = SupportOverlap.together(layers)
    size, kept, others = first.size, first.kept, second.kept
    chance = kept * others / size
    either = kept + others - chance
    # J = I / (kept + others - I) varies with the intersection I by (kept + others) / either².
    slope = (kept + others) / either**2 if either else 0.0
    return MaskOverlap(
        both=found.both,
        either=found.either,
        jaccard=found.jaccard,
        random_jaccard=chance / either if either else 0.0,
        random_deviation=slope * random_deviation(kept, size, others),
        random_in_layers=found.random_jaccard,
        row_correlation=_correlation(_row_densities(first, names), _row_densities(second, names)),
        shares_A=all(
            first.layers[name].hash_A == second.layers[name].hash_A for name in first.layers
        ),
    )


def _row_densities(mask: LoriMask, names: Sequence[str]) -> Float[Tensor, " rows"]:
    return torch.cat([mask.layers[name].mask.double().mean(1) for name in names])


def _correlation(first: Float[Tensor, " rows"], second: Float[Tensor, " rows"]) -> float:
    """0 where one of them does not vary."""
    one, other = first - first.mean(), second - second.mean()
    size = float(one.norm() * other.norm())
    # Of equal densities the mean leaves rounding behind.
    return float(one @ other) / size if size > 1e-12 * len(one) else 0.0


def _interference(
    labels: Sequence[str], names: Sequence[str], deltas: Mapping[str, Callable[[str], Delta]]
) -> dict[tuple[int, int], PairInterference]:
    indices = [index for index, label in enumerate(labels) if label in deltas]
    pairs = list(itertools.combinations(indices, 2))
    if not pairs:
        return {}
    layers: dict[tuple[int, int], list[Any]] = {pair: [] for pair in pairs}
    squares = dict.fromkeys(indices, 0.0)
    for name in names:
        opened = {index: ComparableDelta.of(*deltas[labels[index]](name)) for index in indices}
        for index, delta in opened.items():
            squares[index] += delta.norm**2
        for i, j in pairs:
            layers[i, j].append(layer_interference(opened[i], opened[j]))
    return {
        (i, j): pair_interference(found, (math.sqrt(squares[i]), math.sqrt(squares[j])))
        for (i, j), found in layers.items()
    }
