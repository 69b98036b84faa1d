"""Several adapters as one: the union of their layers, each the weighted sum of its deltas."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..factors import LoraProduct
from ..models import natural_order
from .carried import Carried, carried
from .formats.forms import LayerDelta
from .formats.opening import open_adapter
from .formats.peft_folder import refuse_unselected
from .formats.stored import StoredLayer
from .one_model import of_one_model

Delta = TypeVar("Delta", bound=LayerDelta)


@dataclass(frozen=True)
class Term(Generic[Delta]):
    """`weight * delta`, one summand of a layer.

    Attributes:
        adapter: index of the adapter that it comes from.
    """

    adapter: int
    weight: float
    delta: Delta


class WeightedSum:
    """Several adapters as one: the union of their layers, each the weighted sum of its deltas."""

    def __init__(self, paths: Sequence[str | os.PathLike], weights: Sequence[float] | None) -> None:
        if isinstance(paths, (str, os.PathLike)) or not paths:
            raise ValueError(f"adapters must be a list of at least one path, got {paths!r}")
        self.weights = tuple(1.0 for _ in paths) if weights is None else tuple(weights)
        if len(self.weights) != len(paths):
            raise ValueError(
                f"weights must be one per adapter, got {len(self.weights)} for {len(paths)}"
            )
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be finite, got {list(self.weights)}")
        opened = [open_adapter(path) for path in paths]
        self.paths = [os.fspath(path) for path in paths]
        styles = dict.fromkeys(adapter.style for adapter in opened)
        if len(styles) > 1:
            kinds = [style.name + style.down if style else "PEFT" for style in styles]
            raise ValueError(
                f"adapters must be of one key style to become one, got {' and '.join(kinds)}"
            )
        for path, adapter in zip(self.paths, opened, strict=True):
            if adapter.style is None:
                refuse_unselected(path, adapter)
        self.adapters, self.respelled = of_one_model(self.paths, opened)
        union = {name for adapter in self.adapters for name in adapter.layers}
        self.names = sorted(union, key=natural_order)
        for name in self.names:
            shapes = {(layer.header.shape, layer.header.kernel) for layer in self._layers(name)}
            if len(shapes) > 1:
                raise ValueError(
                    f"layer {name} has another shape in each adapter: "
                    f"{sorted(shape for shape, _ in shapes)}; are they for the same model?"
                )

    def _layers(self, name: str) -> list[StoredLayer]:
        return [adapter.layers[name] for adapter in self.adapters if name in adapter.layers]

    @cached_property
    def carried(self) -> Carried:
        """What lies beside the factors of the sum; see `carried` for what is refused."""
        outputs = {name: self.shape(name)[0] for name in self.names}
        return carried(self.paths, self.adapters, self.weights, outputs)

    @property
    def parameters(self) -> int:
        return sum(layer.header.parameters for name in self.names for layer in self._layers(name))

    def shape(self, name: str) -> tuple[int, int]:
        return self._layers(name)[0].header.shape

    def kernel(self, name: str) -> tuple[int, ...]:
        return self._layers(name)[0].header.kernel

    def rank(self, name: str) -> int:
        return min(sum(layer.header.rank for layer in self._layers(name)), *self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        """The widest that an adapter stores, at most float32."""
        dtypes = {adapter.dtype(name) for adapter in self.adapters if name in adapter.layers}
        return dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32

    def only_in_some(self) -> dict[str, list[str]]:
        if len(self.adapters) == 1:
            return {}
        owners = {
            name: [
                path for path, a in zip(self.paths, self.adapters, strict=True) if name in a.layers
            ]
            for name in self.names
        }
        return {name: paths for name, paths in owners.items() if len(paths) < len(self.adapters)}

    @property
    def files(self) -> list[Path]:
        """All that is read, folders included."""
        given = [Path(path).expanduser() for path in self.paths]
        return [*given, *(adapter.file.path for adapter in self.adapters)]

    def terms(self, name: str) -> list[Term[Any]]:
        """The summands of a layer, read when they are asked for."""
        return [
            Term(index, self.weights[index], adapter.delta(name))
            for index, adapter in enumerate(self.adapters)
            if name in adapter.layers
        ]


def combined(terms: Sequence[Term[Any]]) -> LayerDelta:
    """Σ weight * delta of one layer: exact, by concatenating the factors."""
    if len(terms) == 1 and terms[0].weight == 1.0:
        return terms[0].delta
    sides = [(term.weight, *term.delta.product()) for term in terms]
    return LoraProduct(
        lora_A=torch.cat([right for _, _, right in sides]),
        lora_B=torch.cat([weight * left for weight, left, _ in sides], dim=1),
        scaling=1.0,
    )
