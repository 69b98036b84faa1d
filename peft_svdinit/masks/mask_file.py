"""The file of a mask, and of an adapter that stores nothing else than its mask and values.

One safetensors file: `<module>.mask`, the entries of an (out, rank) mask row by row as packed bits,
the first entry the highest bit; in a compact adapter also `<module>.values`, the entries of B that
the mask keeps, in the same order. The header's one metadata entry is JSON: format version, density,
scope, seed of A, source, per layer the shape, the inputs and the hash of its A, a checksum of all
bits, and of a compact adapter the `adapter_config.json` of the stock LoRA it stands for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ..files import HeadedFile, Positive, refuse_non_floats
from ..models import check_adapter_config, natural_order
from .mask import LoriMask, MaskedLayer
from .selection import Selection

MASK_FILE_NAME = "lori_mask.safetensors"
COMPACT_FILE_NAME = "lori_adapter.safetensors"
_KEY, _WHAT = "peft_svdinit.lori", "LoRI mask; make one with `svdinit mask`"
_MASK = HeadedFile(_KEY, MASK_FILE_NAME, _WHAT)
_COMPACT = HeadedFile(_KEY, COMPACT_FILE_NAME, _WHAT)
_RECORDED = ("density", "seed", "scope", "floor", "source", "base_model_name_or_path")


class _Header(msgspec.Struct):
    layers: dict[str, tuple[Positive, Positive, Positive, str]]
    checksum: str
    density: float
    seed: int
    scope: str
    floor: float
    source: dict[str, Any]
    base_model_name_or_path: str | None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class CompactAdapter:
    """A LoRI adapter as its mask, its trained entries and its seed.

    Attributes:
        mask: the masks, and the seed that draws every A.
        values: the entries of B that the masks keep, by module name, in the order of rows.
        config: `adapter_config.json` of the stock LoRA it stands for.
    """

    mask: LoriMask
    values: Mapping[str, Float[Tensor, " kept"]]
    config: Mapping[str, Any]


def save_mask(path: str | os.PathLike, mask: LoriMask) -> Path:
    """Write a mask to `path` (a folder gets `lori_mask.safetensors` inside), atomically.

    The same mask gives the same bytes.

    Raises:
        ValueError: if the mask has no layer, keeps nothing in one, or another file is at the path.
    """
    target = _MASK.target(path)
    if target.is_file():
        with _MASK.opened(target, "path", _Header) as (_, header):
            if header.config is not None:
                raise ValueError("it is a compact adapter and would be lost; choose another path")
    return _write(target, mask, {}, None)


def save_compact(path: str | os.PathLike, adapter: CompactAdapter) -> Path:
    """Write a compact adapter to `path` (a folder gets `lori_adapter.safetensors` inside).

    Raises:
        ValueError: as `save_mask`, and if values do not fit their mask or are not finite.
    """
    target = _COMPACT.target(path)
    other = adapter.values.keys() ^ adapter.mask.layers.keys()
    if other:
        raise ValueError(f"layer {min(other)} has a mask without values, or values without a mask")
    for name, layer in adapter.mask.layers.items():
        values = adapter.values[name]
        if values.shape != (layer.kept,):
            raise ValueError(
                f"layer {name}: the mask keeps {layer.kept} entries, values are of shape "
                f"{tuple(values.shape)}"
            )
        if not torch.isfinite(values).all():
            raise ValueError(f"layer {name}: values have NaN or infinite entries")
    return _write(target, adapter.mask, adapter.values, adapter.config)


def load_mask(
    path_or_id: str | os.PathLike, *, revision: str | None = None, argument: str = "mask"
) -> LoriMask:
    """The mask of a file, or of a folder or Hub repository with `lori_mask.safetensors`.

    Args:
        path_or_id: the file, folder or repository.
        revision: branch, tag or commit of the Hub repository.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated, no mask, of another format version, keeps nothing
            in a layer, or contradicts itself.
    """
    with _MASK.opened(path_or_id, argument, _Header, revision) as (file, header):
        return _read(file, header)


def load_compact(
    path_or_id: str | os.PathLike, *, revision: str | None = None, argument: str = "adapter"
) -> CompactAdapter:
    """The adapter of a file, or of a folder or Hub repository with `lori_adapter.safetensors`.

    Args:
        path_or_id, revision, argument: as of `load_mask`.

    Raises:
        FileNotFoundError, ValueError: as `load_mask`, and if the file is a mask without values.
    """
    with _COMPACT.opened(path_or_id, argument, _Header, revision) as (file, header):
        if header.config is None:
            raise ValueError("it is a mask without trained values")
        # Of the type, whoever writes the LoRA judges.
        config = {**header.config, "peft_type": "LORA"}
        check_adapter_config(config, "the adapter_config.json in its header: ")
        mask = _read(file, header)
        refuse_non_floats(file, [f"{name}.values" for name in mask.layers])
        values = {name: file.get_tensor(f"{name}.values") for name in mask.layers}
        for name, layer in mask.layers.items():
            if values[name].shape != (layer.kept,) or not torch.isfinite(values[name]).all():
                raise ValueError(
                    f"layer {name} needs {layer.kept} finite values for its mask; write the file "
                    "again"
                )
        return CompactAdapter(mask, values, header.config)


def pack(mask: Bool[Tensor, "out rank"]) -> UInt8[Tensor, " bytes"]:
    """The entries row by row as bits, eight to a byte, the last byte filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: UInt8[Tensor, " bytes"], shape: tuple[int, int]) -> Bool[Tensor, "out rank"]:
    """The mask of `shape` that `pack` made `bits` of."""
    count = shape[0] * shape[1]
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().reshape(shape)


def _write(
    target: Path, mask: LoriMask, values: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Path:
    _refuse_empty(mask.layers)
    layers = {
        name: [*layer.mask.shape, layer.in_features, layer.hash_A]
        for name, layer in mask.layers.items()
    }
    header: dict[str, Any] = {"layers": layers, **{k: getattr(mask, k) for k in _RECORDED}}
    header["source"] = dict(mask.source)
    if config is not None:
        header["config"] = dict(config)
    packed = {name: pack(layer.mask) for name, layer in mask.layers.items()}
    header["checksum"] = _checksum(packed)
    tensors = {f"{name}.mask": bits for name, bits in packed.items()}
    tensors |= {f"{name}.values": entries for name, entries in values.items()}
    _MASK.write(target, header, tensors)
    return target


def _read(file: Any, header: _Header) -> LoriMask:
    layers: dict[str, MaskedLayer] = {}
    packed: dict[str, Tensor] = {}
    for name in sorted(header.layers, key=natural_order):
        rows, rank, in_features, hash_A = header.layers[name]
        bits = file.get_tensor(f"{name}.mask")
        if bits.dtype != torch.uint8 or bits.shape != (-(-rows * rank // 8),):
            raise ValueError(
                f"the mask of layer {name} is {bits.dtype} of shape {tuple(bits.shape)}, which is "
                f"not that of {rows} x {rank} bits; write the file again"
            )
        packed[name] = bits
        layers[name] = MaskedLayer(unpack(bits, (rows, rank)), in_features, hash_A)
    if header.checksum != _checksum(packed):
        raise ValueError(
            "the masks are not those of the header's checksum: damaged while copying? Fetch or "
            "write it again"
        )
    _refuse_empty(layers)
    Selection(header.density, header.scope, header.floor)
    return LoriMask(layers, **{key: getattr(header, key) for key in _RECORDED})


def _checksum(packed: Mapping[str, UInt8[Tensor, " bytes"]]) -> str:
    """SHA-256 of all bits, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(packed[name].numpy().tobytes())
    return digest.hexdigest()


def _refuse_empty(layers: Mapping[str, MaskedLayer]) -> None:
    if not layers:
        raise ValueError("the mask has no layer")
    for name, layer in layers.items():
        if not layer.kept:
            raise ValueError(
                f"the mask keeps nothing in layer {name}, which would never be trained: choose "
                'again with a floor, such as floor=0.01, or scope="matrix"'
            )
