"""Keys of diffusers: `unet.….lora_A.weight` and its older spellings.

Without a layer's own alpha its readers give all layers one alpha, so a file whose layers differ in
rank would be scaled wrongly. Resized files therefore have one rank throughout and need no alpha.

DiffSynth's files have the name of PEFT's adapter in the key, `.lora_A.default.weight`; they are
read and written in that spelling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...files import parsed_json, validated
from ...models import check_adapter_config, pattern_value, refuse_endless_patterns
from .key_styles import KeyStyle


def _style(down: str, up: str) -> KeyStyle:
    return KeyStyle("diffusers", down, up, alpha_per_layer=False)


_STYLES = tuple(
    _style(*ends)
    for ends in (
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
    )
)
_NAMED = re.compile(r"\.lora_A\.([^.]+)\.weight$")


def styles_of(keys: Iterable[str]) -> list[KeyStyle]:
    """The spellings in which a key ends."""
    keys = list(keys)
    names = dict.fromkeys(found[1] for key in keys if (found := _NAMED.search(key)))
    named = [_style(f".lora_A.{name}.weight", f".lora_B.{name}.weight") for name in names]
    return [s for s in _STYLES if any(key.endswith(s.down) for key in keys)] + named


# diffusers keeps the PEFT configuration of each component here, as "unet.r", "unet.lora_alpha", …
_CONFIGS = "lora_adapter_metadata"


# A component may be without layers, and say nothing of them.
_UNSAID = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
Configurations = Mapping[str, Mapping[str, Any]]


def configurations(
    metadata: Mapping[str, str], names: Iterable[str], path: Path
) -> dict[str, dict[str, Any]]:
    """The PEFT configuration of each component by its name, as far as the header has them.

    Args:
        metadata: of the header.
        names: of the layers, with what wrappers add and without.
        path: of the file.

    Raises:
        ValueError: if one cannot be read, or as `check_adapter_config`.
    """
    found: dict[str, dict[str, Any]] = {}
    place = f"adapter: {path}: the {_CONFIGS} in its header: "
    try:
        entries = validated(parsed_json(metadata.get(_CONFIGS, "{}")), dict[str, Any])
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
    for key, value in entries.items():
        component, _, option = key.partition(".")
        found.setdefault(component, {})[option] = value
    names = list(names)
    for component, config in found.items():
        check_adapter_config({**_UNSAID, **config}, f"{place}{component}: ")
        own = {name.partition(f"{component}.")[2] for name in names if f"{component}." in name}
        refuse_endless_patterns(config, own, f"{place}{component}: ")
    return found


def scaling_of(
    layer: str, spelled: str, dim: int, configs: Configurations, path: Path, *, dora: bool
) -> float:
    """Scaling of a layer without an alpha of its own: its component's configuration says, or 1.

    Args:
        layer: its name.
        spelled: the same with what wrappers add.
        dim: its rank.
        configs: as `configurations` gives them.
        path: of the file.
        dora: whether the file stores magnitudes.

    Raises:
        ValueError: if the configuration is of another rank, or uses DoRA whose magnitudes are
            missing.
    """
    component, _, name = layer.partition(".")
    config = configs.get(component)
    if not config:
        return 1.0
    if config.get("use_dora") and not dora:
        raise ValueError(
            f"adapter: {path} uses DoRA in {component}, but stores no magnitudes: save it again"
        )
    module = spelled.partition(f"{component}.")[2]
    rank, alpha = (
        pattern_value(config.get(pattern), name, config.get(key), spelled=module)
        for key, pattern in _RANK_AND_ALPHA
    )
    if rank != dim or alpha is None:
        raise ValueError(
            f"adapter: layer {layer} in {path} has rank {dim}, but its header says {rank}, and "
            f"alpha {alpha}"
        )
    return alpha / math.sqrt(dim) if config.get("use_rslora") else alpha / dim


_RANK_AND_ALPHA = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def metadata_after(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header's metadata for the resized file, whose scaling is 1: without configurations."""
    return {key: value for key, value in metadata.items() if key != _CONFIGS}
