"""What an adapter that is made of others stores beside its factors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..factors import MERGED_CHECKPOINT
from ..files import TensorFile
from .formats.beside import Beside, Kind, some
from .formats.stored import StoredAdapter

logger = logging.getLogger(__name__)

_WORDS: dict[Kind, str] = {
    "whole": "takes the place of a tensor of the base",
    "unknown": "is of a meaning that is not known here",
    "magnitude": "is a magnitude of DoRA, whose update is no sum",
    "algorithm": "is of a layer whose update is no product of two factors",
}


class _Summand(NamedTuple):
    file: TensorFile
    key: str
    factor: float


@dataclass(frozen=True)
class Carried:
    """Tensors by name, each the sum of what the adapters have under it.

    Attributes:
        kinds: what each does.
        layout: dtype and shape of each.
        layers_kept: layers of other algorithms, which stay as they are.
    """

    kinds: Mapping[str, Kind]
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    layers_kept: tuple[str, ...]
    _summands: Mapping[str, Sequence[_Summand]]

    def names(self, kind: Kind) -> list[str]:
        """The tensors of a kind."""
        return [name for name, own in self.kinds.items() if own == kind]

    def by_kind(self) -> dict[str, list[str]]:
        """The tensors of every kind that is there."""
        return {kind: self.names(kind) for kind in dict.fromkeys(self.kinds.values())}

    def tensor(self, name: str) -> Tensor:
        """What is stored under a name: bit for bit if it is one tensor of factor 1.

        Raises:
            ValueError: if an entry of a sum is NaN or infinite, or becomes so in the dtype.
        """
        dtype, shape = self.layout[name]
        summands = self._summands[name]
        if len(summands) == 1 and summands[0].factor == 1.0:
            return summands[0].file.as_stored(summands[0].key)
        total = torch.zeros(shape, dtype=torch.float64)
        for file, key, factor in summands:
            total += factor * file.as_stored(key).double()
        found = total.to(dtype)
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{name} has an entry that is NaN, infinite, or beyond what {dtype} can hold"
            )
        return found


def carried(
    paths: Sequence[str],
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    outputs: Mapping[str, int],
) -> Carried:
    """What lies beside the factors of the weighted sum of adapters.

    Differences are summed. A tensor that takes the place of another is carried if it is the same in
    every adapter. All else is carried for one adapter of weight 1. A warning names the tensors of
    unknown meaning.

    Args:
        paths: of the adapters, for messages.
        adapters: with one spelling of names.
        weights: of the adapters.
        outputs: number of output features by layer of the sum.

    Raises:
        ValueError: naming tensor and adapters, where there is no such sum.
        TypeError: if a tensor is of a dtype that cannot be written.
    """
    kinds: dict[str, Kind] = {}
    summands: dict[str, list[_Summand]] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.beside):
        having = {i: a.beside[name] for i, a in enumerate(adapters) if name in a.beside}
        own: set[Kind] = {one.kind for one in having.values()}
        kinds[name] = own.pop() if len(own) == 1 else "algorithm"
        _refuse_unless_carried(name, kinds[name], having, paths, adapters, weights)
        summands[name] = [
            _Summand(adapters[i].file, one.key, weights[i] * one.factor)
            for i, one in having.items()
        ]
        if kinds[name] != "difference":
            summands[name] = [summands[name][0]._replace(factor=1.0)]
    layout = {name: _layout(name, terms) for name, terms in summands.items()}
    if len(adapters) > 1:
        for name, entry in _biases_missing(adapters, outputs, layout).items():
            kinds[name], layout[name], summands[name] = "difference", entry, []
    kept = {b.layer: None for a in adapters for b in a.beside.values() if b.kind == "algorithm"}
    result = Carried(kinds, layout, tuple(filter(None, kept)), summands)
    unknown = result.names("unknown")
    if unknown:
        logger.warning(
            "%s: %d tensors are carried over as they are, for their meaning is not known: %s.",
            ", ".join(paths),
            len(unknown),
            some(unknown),
        )
    return result


def _refuse_unless_carried(
    name: str,
    kind: Kind,
    having: Mapping[int, Beside],
    paths: Sequence[str],
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
) -> None:
    owners = " and ".join(paths[index] for index in having)
    first = next(iter(having))
    if len(adapters) == 1:
        if kind != "difference" and weights[0] != 1:
            raise ValueError(
                f"weights: {owners} has weight {weights[0]:g}, but {name} in it {_WORDS[kind]}, "
                "and has no weight; use weight 1"
            )
        return
    single = adapters[first].style is not None
    alone = "resize each alone: programs load several files side by side"
    if kind == "difference":
        # ComfyUI keeps one patch of a weight from a file: the factors, or the difference.
        layer = name.removesuffix(".diff")
        if name.endswith(".diff") and any(layer in adapter.layers for adapter in adapters):
            raise ValueError(
                f"adapters: {owners} has layer {layer} as a difference, another one has its "
                f"factors, and one file cannot hold both; {alone}"
            )
    elif kind in ("magnitude", "algorithm"):
        raise ValueError(
            f"adapters: {name} in {owners} {_WORDS[kind]}; "
            f"{alone if single else f'make it a LoRA first: {MERGED_CHECKPOINT}'}"
        )
    elif len(having) < len(adapters) or not _equal(name, having, adapters):
        where = f"is in {owners} only"
        if len(having) == len(adapters):
            where = f"is another one in each of {owners}"
        raise ValueError(
            f"adapters: {name} {where}, and {_WORDS[kind]}: there is no sum of it; put the one "
            "that the result is to have into every adapter, or delete it from all"
        )


def _equal(name: str, having: Mapping[int, Beside], adapters: Sequence[StoredAdapter]) -> bool:
    """Whether all have the same bits."""
    files = [(adapters[index].file, one.key) for index, one in having.items()]
    if len({(file.dtype(key), file.shapes[key]) for file, key in files}) > 1:
        return False
    first, *others = (file.as_stored(key).reshape(-1).view(torch.uint8) for file, key in files)
    return all(torch.equal(first, other) for other in others)


def _layout(name: str, terms: Sequence[_Summand]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Of one tensor its own; of a sum the widest float, at most float32."""
    dtypes = [file.dtype(key) for file, key, _ in terms]
    shapes = {file.shapes[key] for file, key, _ in terms}
    if len(shapes) > 1:
        raise ValueError(
            f"adapters: {name} is of another shape in each: {sorted(shapes)}; are they for the "
            "same model?"
        )
    if len(set(dtypes)) == 1 and (dtypes[0].is_floating_point or terms[0].factor == 1.0):
        return dtypes[0], shapes.pop()
    widest = reduce(torch.promote_types, dtypes, torch.float16)
    return min(widest, torch.float32, key=lambda dtype: dtype.itemsize), shapes.pop()


def _biases_missing(
    adapters: Sequence[StoredAdapter],
    outputs: Mapping[str, int],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Biases of lora_B, zero, of the layers without one: readers give all layers one, or none."""
    ends = {
        name.removeprefix(str(one.layer)): layout[name][0]
        for adapter in adapters
        for name, one in adapter.beside.items()
        if one.kind == "difference" and one.layer is not None
    }
    return {
        layer + end: (dtype, (out,))
        for end, dtype in ends.items()
        for layer, out in outputs.items()
        if layer + end not in layout
    }
