"""The cells of the grid of sources and starts, by the names that `--starts` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One start: what `--starts` calls it, what results call it, and the options that make it."""

    name: str
    method: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return "svd_source" not in self.options


def _weight(part: str, start: str) -> dict[str, str]:
    split = "balanced" if start == "reference" else "output"
    return {"svd_source": "weight", "svd_part": part, "svd_start": start, "svd_split": split}


def _gradient(start: str, **others: str) -> dict[str, str]:
    return {"svd_source": "gradient", "svd_start": start, **others}


def _activation(start: str, **others: str) -> dict[str, str]:
    return {"svd_source": "activation", "svd_start": start, **others}


_BALANCED = {"svd_split": "balanced"}
_WEIGHTED = {"activation_weighting": "weight", **_BALANCED}
CELLS = {
    cell.name: cell
    for cell in (
        Cell("delta", "svd_delta", "SVD start (delta)", {"svd_start": "delta"}),
        Cell(
            "subspace",
            "svd_subspace",
            "SVD directions only (subspace)",
            {"svd_start": "subspace"},
        ),
        Cell(
            "reference",
            "svd_reference",
            "SVD start, function preserved (reference)",
            {"svd_start": "reference"},
        ),
        Cell(
            "weight-principal:reference",
            "weight_principal_reference",
            "principal part of the weight, base untouched (PiSSA)",
            _weight("principal", "reference"),
        ),
        Cell(
            "weight-principal:subspace",
            "weight_principal_subspace",
            "principal directions of the weight",
            _weight("principal", "subspace"),
        ),
        Cell(
            "weight-minor:reference",
            "weight_minor_reference",
            "minor part of the weight, base untouched (MiLoRA)",
            _weight("minor", "reference"),
        ),
        Cell(
            "weight-minor:subspace",
            "weight_minor_subspace",
            "minor directions of the weight",
            _weight("minor", "subspace"),
        ),
        Cell(
            "gradient:delta",
            "gradient_delta",
            "one orthogonalised gradient step",
            _gradient("delta"),
        ),
        Cell(
            "gradient-plain:delta",
            "gradient_plain_delta",
            "one gradient step",
            _gradient("delta", gradient_form="plain"),
        ),
        Cell(
            "gradient:subspace",
            "gradient_subspace",
            "directions of the gradient",
            _gradient("subspace"),
        ),
        Cell(
            "gradient:reference",
            "gradient_reference",
            "gradient directions in A and B, base untouched (LoRA-GA)",
            _gradient("reference", **_BALANCED),
        ),
        Cell(
            "activation:subspace",
            "activation_subspace",
            "directions of the activations (EVA)",
            _activation("subspace"),
        ),
        Cell(
            "activation-weighted:reference",
            "activation_weighted_reference",
            "principal part of the weight as activations see it (CorDA)",
            _activation("reference", **_WEIGHTED),
        ),
        Cell(
            "activation-weighted-minor:reference",
            "activation_weighted_minor_reference",
            "minor part of the weight as activations see it (CorDA)",
            _activation("reference", svd_part="minor", **_WEIGHTED),
        ),
    )
}
METHODS = {cell.method: cell for cell in CELLS.values()}
