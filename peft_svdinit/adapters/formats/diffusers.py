"""Keys of diffusers: `unet.….lora_A.weight` and its older spellings.

Without a layer's own alpha its readers give all layers one alpha, so a file whose layers differ in
rank would be scaled wrongly. Resized files therefore have one rank throughout and need no alpha.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...models import pattern_value
from .key_styles import KeyStyle

STYLES = tuple(
    KeyStyle("diffusers", down, up, alpha_per_layer=False)
    for down, up in (
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
    )
)
# diffusers keeps the PEFT configuration of each component here, as "unet.r", "unet.lora_alpha", …
_CONFIGS = "lora_adapter_metadata"


def scaling_of(
    layer: str, spelled: str, dim: int, metadata: Mapping[str, str], path: Path
) -> float:
    """Scaling of a layer without an alpha of its own: its component's configuration says, or 1.

    `spelled` is the layer with what wrappers add.

    Raises:
        ValueError: if the configuration cannot be read, is of another rank, or uses DoRA.
    """
    if _CONFIGS not in metadata:
        return 1.0
    try:
        configs: dict[str, Any] = dict(json.loads(metadata[_CONFIGS]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"adapter: the {_CONFIGS} in the header of {path} is no JSON object ({error})"
        ) from error
    component, _, name = layer.partition(".")
    config = {
        key.removeprefix(f"{component}."): value
        for key, value in configs.items()
        if key.startswith(f"{component}.")
    }
    if not config:
        return 1.0
    if config.get("use_dora"):
        raise ValueError(f"adapter: {path} uses DoRA in {component}, which B @ A does not express")
    module = spelled.partition(f"{component}.")[2]
    rank, alpha = (
        pattern_value(config.get(pattern), name, config.get(key), spelled=module)
        for key, pattern in _RANK_AND_ALPHA
    )
    if rank != dim:
        raise ValueError(
            f"adapter: layer {layer} in {path} has rank {dim}, but its header says {rank}"
        )
    return alpha / math.sqrt(dim) if config.get("use_rslora") else alpha / dim


_RANK_AND_ALPHA = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def metadata_after(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header's metadata for the resized file, whose scaling is 1: without configurations."""
    return {key: value for key, value in metadata.items() if key != _CONFIGS}
