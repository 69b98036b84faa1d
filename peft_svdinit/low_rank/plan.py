"""Which layers are of low rank, of what rank: what a switch follows, and what a file remembers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layer import LowRankLinear


@dataclass(frozen=True)
class PlannedLayer:
    """A layer's rank and (out, in)."""

    rank: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 1 <= self.rank <= min(self.shape):
            raise ValueError(
                f"rank must be in [1, {min(self.shape)}] for a weight of {self.shape}, got "
                f"{self.rank}"
            )

    @property
    def dense_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class LowRankPlan:
    """Layers to switch, by full module name.

    Attributes:
        layers: ranks and shapes.
        dense: why other linear layers stay as they are, by name.
    """

    layers: Mapping[str, PlannedLayer]
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {name: layer.rank for name, layer in self.layers.items()}

    @property
    def dense_parameters(self) -> int:
        """Entries of the planned layers' weights, dense."""
        return sum(layer.dense_parameters for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        """Entries of their factors; as many multiplications a token takes."""
        return sum(layer.parameters for layer in self.layers.values())

    def check(self, model: nn.Module) -> None:
        """Refuse a model that lacks a layer of the plan, or has it of another shape.

        Raises:
            ValueError: naming the layer.
        """
        if not self.layers:
            raise ValueError("the plan names no layer")
        modules = dict(model.named_modules())
        for name, layer in self.layers.items():
            if name not in modules:
                raise ValueError(
                    f"the plan is for a layer {name}, which {type(model).__name__} lacks: a plan "
                    "of another model?"
                )
            shape = shape_of(modules[name])
            if shape != layer.shape:
                found = "is no linear layer" if shape is None else f"has a weight of {shape}"
                raise ValueError(
                    f"layer {name} {found}, the plan is for {layer.shape}: a plan of another model?"
                )

    def summary(self) -> str:
        """What it saves, in one line."""
        ranks = [layer.rank for layer in self.layers.values()]
        before, after = self.dense_parameters, self.parameters
        return (
            f"{len(ranks)} layers at ranks {min(ranks)} to {max(ranks)}: {before:,} weights become "
            f"{after:,}, {after / before:.0%} of the multiplications in these layers"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without the reasons."""
        return {
            name: {"rank": layer.rank, "shape": list(layer.shape)}
            for name, layer in self.layers.items()
        }

    @classmethod
    def from_dict(cls, layers: Mapping[str, Any]) -> LowRankPlan:
        """What `as_dict` gave.

        Raises:
            ValueError: if it is damaged, naming the layer.
        """
        if not isinstance(layers, Mapping):
            raise ValueError(
                f"damaged plan of low-rank layers: a {type(layers).__name__} in place of names"
            )
        found = {}
        for name, each in layers.items():
            try:
                rank, (rows, cols) = each["rank"], each["shape"]
                if any(type(number) is not int for number in (rank, rows, cols)):
                    raise TypeError(f"rank {rank!r} and shape {each['shape']!r} are no integers")
                found[name] = PlannedLayer(rank, (rows, cols))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"damaged plan of low-rank layers: layer {name} ({error!r})"
                ) from error
        return cls(found)

    @classmethod
    def of(cls, model: nn.Module) -> LowRankPlan:
        """The ranks that a model has."""
        return cls(
            {
                name: PlannedLayer(module.rank, (module.out_features, module.in_features))
                for name, module in model.named_modules()
                if isinstance(module, LowRankLinear)
            }
        )

    @classmethod
    def of_factors(cls, factors: Mapping[str, Mapping[str, Tensor]]) -> LowRankPlan:
        """The ranks of layers whose U (out, rank) and Vh (rank, in) are at hand."""
        return cls(
            {
                name: PlannedLayer(len(parts["Vh"]), (len(parts["U"]), parts["Vh"].shape[1]))
                for name, parts in factors.items()
            }
        )


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, dense or not; None of another module."""
    if isinstance(module, (nn.Linear, LowRankLinear)):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None
