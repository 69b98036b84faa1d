"""Adapters that are one safetensors file, in the key styles of kohya, LyCORIS and diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import TensorFile, replacing, write_json, write_tensors
from ...models import PREFIX, unwrapped_keys
from ..rounding import Factors
from . import diffusers, kohya
from .key_styles import ALPHA, LYCORIS_PARTS, KeyStyle, refuse_unsupported
from .stored import StoredAdapter, StoredLayer, algorithm_of

_STYLES = (kohya.STYLE, *diffusers.STYLES)


def read_single_file(path: Path) -> StoredAdapter:
    """Open an adapter file; the style is recognised from its keys, without torch's wrappers.

    The scaling of a layer is its alpha over its rank. Without an alpha, kohya's means alpha = rank,
    and diffusers' the configuration in the header, or else alpha = rank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated, empty, of an unknown or of several styles, if it
            uses DoRA or a Tucker decomposition, if two layers are one but for wrappers, or if the
            tensors of a layer do not fit together.
    """
    file = TensorFile(path)
    stored = unwrapped_keys(file.shapes, f"adapter: {path}")
    refuse_unsupported(stored, path)
    style = _recognised(path, list(stored))
    groups: dict[str, dict[str, str]] = {}
    unread = []
    for key, at in stored.items():
        split = style.split(key)
        if split is None:
            unread.append(key)
        else:
            groups.setdefault(split[0], {})[split[1]] = at
    if unread:
        raise ValueError(
            f"adapter: {path} has keys in the style of {style.name}, and others that cannot be "
            f"read: {_some(unread)}"
        )
    with file.opened() as read:
        layers = {name: _layer(name, keys, file, style, read) for name, keys in groups.items()}
    return StoredAdapter(file, style, layers)


def _recognised(path: Path, keys: list[str]) -> KeyStyle:
    if not keys:
        raise ValueError(f"adapter: {path} holds no tensor")
    if any(key.startswith(PREFIX) for key in keys):
        raise ValueError(
            f"adapter: {path} holds the weights of a PEFT adapter, whose configuration says "
            "how they are scaled; give the folder that holds both"
        )
    found = [style for style in _STYLES if any(key.endswith(style.down) for key in keys)]
    if kohya.STYLE not in found and any(key.endswith(LYCORIS_PARTS) for key in keys):
        found.append(kohya.STYLE)
    if not found:
        raise ValueError(
            f"adapter: {path} has no layer in the key styles of PEFT, kohya, LyCORIS or "
            f"diffusers; its keys: {_some(keys)}"
        )
    if len(found) > 1:
        raise ValueError(
            f"adapter: {path} mixes key styles, with layers that end in "
            f"{' and in '.join(style.down for style in found)}: {_some(keys)}; split it first"
        )
    return found[0]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _layer(
    name: str,
    keys: dict[str, str],
    file: TensorFile,
    style: KeyStyle,
    read: Callable[[str], Tensor],
) -> StoredLayer:
    factors = {part: key for part, key in keys.items() if part != ALPHA}
    algorithm, header = algorithm_of(name, factors, file)
    alpha_key = keys.get(ALPHA)
    if header.dim is None:
        scaling = 1.0
    elif alpha_key is not None:
        scaling = _alpha(alpha_key, file, read) / header.dim
    elif style is kohya.STYLE:
        scaling = 1.0
    else:
        at, _ = style.split(next(iter(factors.values()))) or (name, "")
        scaling = diffusers.scaling_of(name, at, header.dim, file.metadata, file.path)
    return StoredLayer(algorithm, header, factors, scaling)


def _alpha(key: str, file: TensorFile, read: Callable[[str], Tensor]) -> float:
    if math.prod(file.shapes[key]) != 1:
        raise ValueError(
            f"adapter: {key} in {file.path} must be one number, but has shape {file.shapes[key]}"
        )
    alpha = read(key).item()
    if alpha <= 0:
        raise ValueError(
            f"adapter: {key} in {file.path} must be positive, got {alpha}: programs disagree on "
            "what that means; set it to the rank for a scaling of 1"
        )
    return alpha


def write_single_file(
    adapter: StoredAdapter,
    output: Path,
    weights: Mapping[str, Factors],
    kernels: Mapping[str, tuple[int, ...]],
    report: Mapping[str, Any],
) -> None:
    """Write (lora_A, lora_B) by layer, of scaling 1, in the style of `adapter`, and the report.

    The factors of convolutions get their kernel back. A LoHa, or a LoKr with a factored w2, of a
    convolution stores no kernel: its LoRA is written as matrices, which ComfyUI reshapes and
    sd-scripts refuses.
    """
    style = adapter.style
    if style is None:
        raise TypeError("adapter must be a single file, got a PEFT folder")
    tensors: dict[str, Tensor] = {}
    for name, (lora_A, lora_B) in weights.items():
        kernel, rank = kernels[name], lora_A.shape[0]
        ones = [1] * len(kernel)
        tensors[f"{name}{style.down}"] = lora_A.reshape(rank, -1, *kernel)
        tensors[f"{name}{style.up}"] = lora_B.reshape(-1, rank, *ones)
        if style.alpha_per_layer:
            tensors[f"{name}.{ALPHA}"] = lora_A.new_tensor(float(rank))
    metadata = (
        kohya.metadata_after(adapter.file.metadata, (A.shape[0] for A, _ in weights.values()))
        if style is kohya.STYLE
        else diffusers.metadata_after(adapter.file.metadata)
    )
    # Both are there before the first of them is replaced.
    with replacing(output) as temporary, replacing(report_path(output)) as described:
        write_tensors(temporary, tensors, {"format": "pt", **metadata})
        write_json(described, report)


def report_path(output: Path) -> Path:
    """Where the report of a single file lies."""
    return output.with_name(f"{output.stem}.resize.json")
