"""A saved adapter of any format as factored deltas by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...files import TensorFile
from .beside import Beside
from .forms import Algorithm, LayerDelta, LayerHeader
from .key_styles import KeyStyle
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA


@dataclass(frozen=True)
class StoredLayer:
    """One layer: how it is stored, under which keys by part, and its scaling."""

    algorithm: Algorithm
    header: LayerHeader
    keys: Mapping[str, str]
    scaling: float


@dataclass(frozen=True)
class StoredAdapter:
    """An opened adapter; its tensors stay on the disk.

    Attributes:
        file: the tensors.
        style: the spelling of its keys; None for a PEFT folder.
        layers: by name, as the file spells it without PEFT's prefix.
        config: `adapter_config.json` of a PEFT folder.
        beside: tensors beside the factors, by name, which is without PEFT's prefix too.
    """

    file: TensorFile
    style: KeyStyle | None
    layers: Mapping[str, StoredLayer]
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict)

    def delta(self, name: str) -> LayerDelta:
        """What is stored of a layer, read when it is asked for."""
        layer = self.layers[name]
        parts = {part: self.file.finite(key) for part, key in layer.keys.items()}
        return layer.algorithm.delta(parts, layer.scaling)

    def dtype(self, name: str) -> torch.dtype:
        """The widest dtype in which a part of the layer is stored."""
        dtypes = [self.file.dtype(key) for key in self.layers[name].keys.values()]
        widest = dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest


def algorithm_of(
    name: str, keys: Mapping[str, str], file: TensorFile
) -> tuple[Algorithm, LayerHeader]:
    """How a layer stored under `keys` (by part) is stored, and what its shapes say.

    Raises:
        ValueError: naming the layer, if its parts do not fit together.
        TypeError: if a part is quantised.
    """
    file.require_floats(keys.values())
    found = [one for one in (LOHA, LOKR) if any(part in one.parts for part in keys)]
    algorithm = found[0] if found else LORA
    try:
        header = algorithm.header({part: file.shapes[key] for part, key in keys.items()})
    except ValueError as error:
        raise ValueError(
            f"adapter: layer {name} in {file.path} is no complete {algorithm.name}: {error}"
        ) from error
    return algorithm, header
