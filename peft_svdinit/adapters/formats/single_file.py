"""Adapters that are one safetensors file, in the key styles of kohya, LyCORIS and diffusers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from ...files import TensorFile
from ...models import PREFIX, unwrapped_keys
from . import diffusers, kohya
from .beside import Beside, Kind, kind_of, layer_of, some
from .key_styles import ALPHA, BIAS, LYCORIS_PARTS, KeyStyle
from .stored import StoredAdapter, StoredLayer, algorithm_of


def read_single_file(path: Path) -> StoredAdapter:
    """Open an adapter file; the style is recognised from its keys, without torch's wrappers.

    The scaling of a layer is its alpha over its rank. Without an alpha, kohya's means alpha = rank,
    and diffusers' the configuration in the header, or else alpha = rank.

    A layer of another algorithm, such as a Tucker decomposition or OFT, and one with a part whose
    meaning is not known, is kept as it is: its tensors are `beside` with all that is no factor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated, empty, of an unknown or of several styles, if two
            layers are one but for wrappers, if the tensors of a layer do not fit together, or if
            no layer is a product of factors.
        TypeError: if the factors are quantised.
    """
    file = TensorFile(path)
    stored = unwrapped_keys(file.shapes, f"adapter: {path}")
    style = _recognised(path, list(stored))
    groups: dict[str, dict[str, str]] = {}
    beside: dict[str, Beside] = {}
    for key, at in stored.items():
        split = style.split(key)
        if split is None:
            beside[key] = Beside(at, kind_of(key))
        else:
            groups.setdefault(split[0], {})[split[1]] = key
    factored = {name for name, keys in groups.items() if keys.keys() - {ALPHA, BIAS}}
    other = _of_other_algorithms(beside, factored)
    for key, one in beside.items():
        layer = next((name for name in _ancestors(key) if name in other), None)
        if layer is not None and one.kind in ("unknown", "algorithm"):
            beside[key] = replace(one, kind="algorithm", layer=layer)
    # Readers give differences no alpha, but some programs write one.
    differing = {
        name for key, b in beside.items() if b.kind == "difference" for name in _ancestors(key)
    }
    products = factored - other
    layers = {}
    names = [split[0] for pair in stored.items() for key in pair if (split := style.split(key))]
    dora = any(one.kind == "magnitude" for one in beside.values())
    of_header = {} if style is kohya.STYLE else file.metadata
    configs = diffusers.HeaderConfigs(of_header, names, path, dora=dora)
    for name, keys in groups.items():
        if name in products:
            at = {part: stored[key] for part, key in keys.items()}
            layers[name] = _layer(name, at, file, style, configs)
        # Of what is named as a part of a layer without factors, or of another algorithm.
        outside: Kind = "whole" if name in differing else "unknown"
        for part, key in keys.items():
            if name in layers and part == BIAS:
                scaling = layers[name].scaling
                beside[key] = Beside(stored[key], "difference", name, scaling)
                differing.update(_ancestors(key))
            elif name in other:
                beside[key] = Beside(stored[key], "algorithm", name)
            elif name not in layers:
                beside[key] = Beside(stored[key], outside)
    if not layers:
        raise ValueError(
            f"adapter: {path} has no layer whose update is a product of two factors, so that there "
            f"is no rank to change: {some(list(stored))}; use it as it is"
        )
    return StoredAdapter(file, style, layers, beside=beside)


def _of_other_algorithms(beside: Mapping[str, Beside], factored: Collection[str]) -> set[str]:
    """Layers that are no product of factors, or have factors and a part that is not known."""
    found = {layer_of(key) for key, one in beside.items() if one.kind == "algorithm"}
    for key, one in beside.items():
        for name in _ancestors(key) if one.kind == "unknown" else ():
            part = key.removeprefix(f"{name}.")
            own = "." not in part or part.startswith(_OF_A_LAYER)
            if name in factored and own and part not in _OF_THE_BASE:
                found.add(name)
    return found


_OF_A_LAYER = ("lora_", "hada_", "lokr_", "oft_")
_OF_THE_BASE = ("weight", "bias")


def _ancestors(key: str) -> list[str]:
    """The names that contain a key, the longest first."""
    words = key.split(".")
    return [".".join(words[:count]) for count in range(len(words) - 1, 0, -1)]


def _recognised(path: Path, keys: list[str]) -> KeyStyle:
    if not keys:
        raise ValueError(f"adapter: {path} holds no tensor")
    if any(key.startswith(PREFIX) for key in keys):
        raise ValueError(
            f"adapter: {path} holds the weights of a PEFT adapter, whose configuration says "
            "how they are scaled; give the folder that holds both"
        )
    found = [kohya.STYLE] if any(key.endswith(kohya.STYLE.down) for key in keys) else []
    found += diffusers.styles_of(keys)
    if kohya.STYLE not in found and any(key.endswith(LYCORIS_PARTS) for key in keys):
        found.append(kohya.STYLE)
    if not found:
        raise ValueError(
            f"adapter: {path} has no layer in the key styles of PEFT, kohya, LyCORIS or "
            f"diffusers; its keys: {some(keys)}"
        )
    if len(found) > 1:
        raise ValueError(
            f"adapter: {path} mixes key styles, with layers that end in "
            f"{' and in '.join(style.down for style in found)}: {some(keys)}; split it first"
        )
    return found[0]


def _layer(
    name: str,
    keys: dict[str, str],
    file: TensorFile,
    style: KeyStyle,
    configs: diffusers.HeaderConfigs,
) -> StoredLayer:
    factors = {part: key for part, key in keys.items() if part not in (ALPHA, BIAS)}
    algorithm, header = algorithm_of(name, factors, file)
    alpha_key = keys.get(ALPHA)
    if header.dim is None:
        scaling = 1.0
    elif alpha_key is not None:
        scaling = _alpha(alpha_key, file) / header.dim
    elif style is kohya.STYLE:
        scaling = 1.0
    else:
        at, _ = style.split(next(iter(factors.values()))) or (name, "")
        scaling = configs.scaling_of(name, at, header.dim)
    return StoredLayer(algorithm, header, factors, scaling)


def _alpha(key: str, file: TensorFile) -> float:
    if math.prod(file.shapes[key]) != 1:
        raise ValueError(
            f"adapter: {key} in {file.path} must be one number, but has shape {file.shapes[key]}"
        )
    alpha = file.finite(key).item()
    if alpha <= 0:
        raise ValueError(
            f"adapter: {key} in {file.path} must be positive, got {alpha}: programs disagree on "
            "what that means; set it to the rank for a scaling of 1"
        )
    return alpha
