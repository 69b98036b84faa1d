"""What a written adapter keeps of its deltas: layer by layer, in all, and in words."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..files import one_line
from .carried import Carried
from .formats.beside import some
from .one_model import Respelled

_WORST = 5


@dataclass(frozen=True)
class KeptLayer:
    """What the adapter keeps of one delta; errors are absolute.

    Attributes:
        shape: (out, in) as a matrix.
        rank_before: the largest rank that the delta can have in the form in which it was given.
        rank: triplets kept, zeros that pad them not counted; 0 of a layer left out.
        norm: exact ‖delta‖_F.
        truncation_error: ‖delta − B A‖_F before rounding to the adapter's dtype.
        rounding_error: ‖B A − B̂ Â‖_F, of the exact factors to the stored ones.
    """

    name: str
    shape: tuple[int, int]
    rank_before: int
    rank: int
    norm: float
    truncation_error: float
    rounding_error: float

    @property
    def error(self) -> float:
        """‖delta − B̂ Â‖_F: what rounding changes lies, to first order, across what was cut off."""
        return math.hypot(self.truncation_error, self.rounding_error)

    @property
    def relative_error(self) -> float:
        """‖delta − B̂ Â‖_F / ‖delta‖_F; infinite if the delta is zero and what is stored is not."""
        return self.relative(self.error)

    @property
    def energy(self) -> float:
        """Share of ‖delta‖_F² kept."""
        return max(0.0, 1 - self.relative(self.truncation_error) ** 2)

    def relative(self, error: float) -> float:
        """An error as a share of ‖delta‖_F."""
        return _share(error, self.norm)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; errors are relative."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank_before": self.rank_before,
            "rank": self.rank,
            "norm": self.norm,
            "energy": self.energy,
            "truncation_error": finite(self.relative(self.truncation_error)),
            "rounding_error": finite(self.relative(self.rounding_error)),
            "relative_error": finite(self.relative_error),
        }


Layer = TypeVar("Layer", bound=KeptLayer)


@dataclass(frozen=True)
class WrittenAdapter(Generic[Layer]):
    """An adapter, and what it keeps; `as_dict` is the report.

    Attributes:
        output: the folder or file written.
        layers: of all deltas given.
        parameters: stored values of the factors.
    """

    output: Path
    layers: tuple[Layer, ...]
    parameters: int

    @property
    def errors(self) -> dict[str, float]:
        """‖delta − adapter‖_F by module name, as `verify_adapter` wants it."""
        return {layer.name: layer.error for layer in self.layers}

    @property
    def energy(self) -> float:
        """Share of Σ‖delta‖_F² that the ranks keep, all layers together."""
        lost = math.hypot(*(layer.truncation_error for layer in self.layers))
        return max(0.0, 1 - self._relative(lost) ** 2)

    @property
    def relative_error(self) -> float:
        """√(Σ‖delta − adapter‖_F² / Σ‖delta‖_F²); infinite as of a layer."""
        return self._relative(math.hypot(*(layer.error for layer in self.layers)))

    @property
    def relative_rounding_error(self) -> float:
        """√(Σ rounding error² / Σ‖delta‖_F²)."""
        return self._relative(math.hypot(*(layer.rounding_error for layer in self.layers)))

    def _relative(self, error: float) -> float:
        return _share(error, math.hypot(*(layer.norm for layer in self.layers)))

    @property
    def zero_layers(self) -> list[str]:
        """Layers whose delta is zero."""
        return [layer.name for layer in self.layers if not layer.norm]

    def worst(self, most: int) -> list[Layer]:
        """The layers of the largest relative error, first."""
        return sorted(self.layers, key=lambda layer: -layer.relative_error)[:most]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the report."""
        ranks = [layer.rank for layer in self.layers]
        return {
            "totals": {
                "layers": len(self.layers),
                "rank_min": min(ranks),
                "rank_mean": sum(ranks) / len(ranks),
                "rank_max": max(ranks),
                "parameters": self.parameters,
                "relative_error": finite(self.relative_error),
            },
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def sizes(self) -> str:
        """Layers, ranks and parameters in words."""
        ranks = [layer.rank for layer in self.layers if layer.rank]
        spread = f"{ranks[0]}"
        if len(set(ranks)) > 1:
            spread = f"{min(ranks)} to {max(ranks)} (median {statistics.median_low(ranks)})"
        return f"{len(ranks)} layers, rank {spread}; {self.parameters:,} parameters"

    def in_words(self) -> str:
        """Ranks, size and error in one sentence."""
        rounding = self.relative_rounding_error
        return (
            f"{self.sizes()}; {self.energy:.2%} of the energy, relative error "
            f"{self.relative_error:.2e}"
            f"{f', {rounding:.2e} of it by rounding' if rounding else ''}."
        )

    def remarks(self) -> list[str]:
        """What else is to be known, a sentence each."""
        used = sum(layer.rank * sum(layer.shape) for layer in self.layers)
        padding = f"{self.parameters - used:,} of the parameters are zeros that pad the ranks."
        return [padding] if used < self.parameters else []

    def tables(self) -> list[str]:
        """The layers that lose the most, by line."""
        lines = [f"{'worst layers':<60} {'rank':>10} {'error':>9} {'rounding':>9}"]
        for layer in self.worst(_WORST):
            ranks = f"{layer.rank_before} > {layer.rank}"
            lines.append(
                f"{one_line(layer.name)[-60:]:<60} {ranks:>10} {layer.relative_error:9.2e} "
                f"{layer.relative(layer.rounding_error):9.2e}"
            )
        return lines

    def summary(self) -> str:
        """What a verb prints."""
        lines = [self.in_words(), *self.tables(), *self.remarks(), f"Adapter: {self.output}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class CombinedAdapter(WrittenAdapter[Layer]):
    """An adapter made of others.

    Attributes:
        adapters, weights: of the sum.
        parameters_before: stored values of these.
        dtypes: number of layers by dtype.
        only_in_some: layer names to the adapters that have them, where not all do.
        respelled: adapters that spell the model's names in another way, with a layer of theirs.
        carried: what lies beside the factors.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    parameters_before: int
    dtypes: dict[str, int]
    only_in_some: dict[str, list[str]]
    respelled: dict[str, Respelled]
    carried: Carried

    def sizes(self) -> str:
        return f"{super().sizes()} of {self.parameters_before:,}"

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.only_in_some:
            found.append(f"{len(self.only_in_some)} layers are in some of the adapters only.")
        alone = [name for name, owners in self.only_in_some.items() if len(owners) == 1]
        if len(alone) == len(self.layers):
            found.append("No layer is in two of the adapters: are they for the same model?")
        found += [
            f"{path} spells the model's layers in an older way, {names.own} for {names.given}; the "
            "newer names are written."
            for path, names in self.respelled.items()
        ]
        return found + _beside_in_words(self.carried)

    def as_dict(self) -> dict[str, Any]:
        report = super().as_dict()
        report["totals"]["parameters_before"] = self.parameters_before
        return {
            "adapters": list(self.adapters),
            "weights": list(self.weights),
            "dtypes": dict(self.dtypes),
            "only_in_some": dict(self.only_in_some),
            "respelled": {path: asdict(names) for path, names in self.respelled.items()},
            "carried": self.carried.by_kind(),
            "layers_kept": list(self.carried.layers_kept),
            **report,
        }


def finite(number: float) -> float | None:
    """The number, None if it is infinite, which JSON does not know."""
    return number if math.isfinite(number) else None


def _share(error: float, norm: float) -> float:
    if norm:
        return error / norm
    return math.inf if error else 0.0


def _beside_in_words(carried: Carried) -> list[str]:
    found = []
    if carried.kinds:
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in carried.by_kind().items())
        found.append(f"Tensors carried over beside the factors: {counts}.")
    if carried.layers_kept:
        found.append(
            "Left as they are, at their rank, for they are no product of two factors: "
            f"{some(carried.layers_kept)}."
        )
    if carried.names("magnitude"):
        found.append("The magnitudes of DoRA are kept; the errors are those of B A before them.")
    return found
