"""Whether a written adapter does what was promised: every layer, loaded through stock PEFT."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...files import TensorFile
from ...linalg import frobenius_norm
from ...models import BLOCK_ENTRIES, PREFIX, WEIGHTS_NAME, whole_modules
from .stock_loading import load_stock_adapter, weightless_model

_SHOWN = 5


@dataclass(frozen=True)
class Verification:
    """What was measured, by module name.

    Attributes:
        errors: ‖delta − adapter‖_F.
        norms: ‖delta‖_F.
    """

    errors: dict[str, float]
    norms: dict[str, float]

    @property
    def relative_error(self) -> float:
        """√(Σ error²) / √(Σ‖delta‖_F²), all layers together."""
        return _root_sum(self.errors) / (_root_sum(self.norms) or 1.0)


def verify_adapter(
    folder: str | os.PathLike,
    base: str | os.PathLike | nn.Module,
    deltas: Mapping[str, Tensor],
    expected_errors: Mapping[str, float],
    *,
    modules_to_save: Mapping[str, Tensor] | None = None,
) -> Verification:
    """Load an adapter through stock PEFT and compare its update of every layer with the delta.

    The base's weights are not read. PEFT resolves names, ranks and scalings of all layers at once,
    but the adapter's weights stay mapped in their file: at a time, one layer's are in memory in
    float32, with three matrices of its size, which are the delta and the update before and after
    scaling; and one of the modules to save. A square of an error may differ from that of the
    promise by 1e-5 of ‖delta‖_F², and by more for half precision, whose rounding is only to first
    order orthogonal to what was cut off.

    Args:
        folder: the adapter.
        base: folder of the base model, for its architecture, or the model on the meta device.
        deltas: dense deltas (out, in) in float32 by module name, of all layers that fine-tuning
            may have changed; may read from a disk, each once.
        expected_errors: ‖delta − adapter‖_F as promised, by module name, with the rounding
            counted. A layer without one must be met exactly.
        modules_to_save: as given to `export_adapter`; compared bit by bit.

    Raises:
        FileNotFoundError: if a file of the adapter is missing.
        ValueError: if the adapter cannot be loaded, or has other layers or tensors or errors than
            promised; the first offenders are named with their figures.
    """
    unknown = expected_errors.keys() - set(deltas)
    if unknown:
        raise ValueError(f"expected_errors: {min(unknown)} is none of the layers to compare")
    skeleton = weightless_model(base)
    # Before PEFT wraps the modules, after which parameters have other names.
    source_of = whole_modules(skeleton, list(modules_to_save or {})).source_of
    loaded = load_stock_adapter(skeleton, folder, mapped=True)
    adapted: dict[str, Any] = {
        name: module
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    offenders = [
        f"{name}: adapted, and none of the layers that were changed"
        for name in adapted
        if name not in deltas
    ]
    slack = 1e-5 + 2 * _coarsest_spacing(Path(folder)) ** 2
    errors, norms = {}, {}
    # disable=None: no bar where standard error is not a terminal.
    for name in tqdm(deltas, desc="Verifying the adapter", unit="layer", disable=None):
        delta = deltas[name]
        norms[name] = frobenius_norm(delta)
        errors[name] = _error(name, delta, adapted[name]) if name in adapted else norms[name]
        promised = expected_errors.get(name, 0.0)
        if not abs(errors[name] ** 2 - promised**2) <= slack * norms[name] ** 2:
            absent = "" if name in adapted else "not adapted, "
            offenders.append(
                f"{name}: {absent}error {errors[name]:.4g}, promised {promised:.4g}, of a delta "
                f"of norm {norms[name]:.4g}"
            )
    offenders += _differing_tensors(loaded, source_of, modules_to_save or {})
    if offenders:
        more = len(offenders) - _SHOWN
        raise ValueError(
            f"adapter: {folder} is not what was promised, in {len(offenders)} places: "
            f"{'; '.join(offenders[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}. Do not "
            "use it; write it again"
        )
    return Verification(errors, norms)


@torch.no_grad()
def _error(name: str, delta: Tensor, layer: Any) -> float:
    with _in_float32(layer):
        update = layer.get_delta_weight("default")
    update = update.mT if layer.fan_in_fan_out else update
    if update.shape != delta.shape:
        raise ValueError(
            f"adapter: its update of layer {name} has shape {tuple(update.shape)}, the delta has "
            f"{tuple(delta.shape)}"
        )
    return frobenius_norm(update.sub_(delta))


@contextmanager
def _in_float32(layer: Any) -> Iterator[None]:
    """What PEFT does to all layers as it loads an adapter in half precision, to one for a while."""
    parts = [module["default"].weight for module in (layer.lora_A, layer.lora_B)]
    stored = [part.data for part in parts]
    for part in parts:
        part.data = part.data.float()
    try:
        yield
    finally:
        for part, data in zip(parts, stored, strict=True):
            part.data = data


def _differing_tensors(
    loaded: PeftModel, source_of: Mapping[str, str], expected: Mapping[str, Tensor]
) -> list[str]:
    stored = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in get_peft_model_state_dict(loaded, save_embedding_layers=False).items()
        if ".lora_" not in key
    }
    found = [f"{name}: replaced, and was not to be" for name in stored.keys() - source_of.keys()]
    for name, source in source_of.items():
        if name not in stored:
            found.append(f"{name}: not replaced")
        elif not _equal(stored[name], expected[source]):
            found.append(f"{name}: not the tensor that was to be saved")
    return sorted(found)


def _equal(stored: Tensor, expected: Tensor) -> bool:
    if stored.shape != expected.shape:
        return False
    parts = (tensor.flatten().split(BLOCK_ENTRIES) for tensor in (stored, expected))
    return all(torch.equal(*map(Tensor.float, pair)) for pair in zip(*parts, strict=True))


def _coarsest_spacing(folder: Path) -> float:
    file = TensorFile(folder / WEIGHTS_NAME)
    return max(torch.finfo(file.dtype(key)).eps for key in file.shapes if ".lora_" in key)


def _root_sum(values: Mapping[str, float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values.values()))
