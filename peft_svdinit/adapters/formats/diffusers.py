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
from ...models import PatternValues, check_adapter_config, refuse_endless_patterns
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


class HeaderConfigs:
    """The scalings that the PEFT configurations in a header give, one for each component.

    Args:
        metadata: of the header.
        names: of the layers, with what wrappers add and without.
        path: of the file.
        dora: whether the file stores magnitudes.

    Raises:
        ValueError: if one cannot be read, or as `check_adapter_config`.
    """

    def __init__(
        self, metadata: Mapping[str, str], names: Iterable[str], path: Path, *, dora: bool
    ) -> None:
        self._path, self._dora = path, dora
        self._of_components = _configurations(metadata, names, path)
        self._patterns = {
            component: {key: PatternValues(config.get(option)) for key, option in _RANK_AND_ALPHA}
            for component, config in self._of_components.items()
        }

    def scaling_of(self, layer: str, spelled: str, dim: int) -> float:
        """Scaling of a layer without an alpha of its own: its component's configuration says, or 1.

        Args:
            layer: its name.
            spelled: the same with what wrappers add.
            dim: its rank.

        Raises:
            ValueError: if the configuration is of another rank, or uses DoRA whose magnitudes are
                missing.
        """
        component, _, name = layer.partition(".")
        config = self._of_components.get(component)
        if not config:
            return 1.0
        if config.get("use_dora") and not self._dora:
            raise ValueError(
                f"adapter: {self._path} uses DoRA in {component}, but stores no magnitudes: save "
                "it again"
            )
        module = spelled.partition(f"{component}.")[2]
        rank, alpha = (
            value(name, config.get(key), spelled=module)
            for key, value in self._patterns[component].items()
        )
        if rank != dim or alpha is None:
            raise ValueError(
                f"adapter: layer {layer} in {self._path} has rank {dim}, but its header says "
                f"{rank}, and alpha {alpha}"
            )
        return alpha / math.sqrt(dim) if config.get("use_rslora") else alpha / dim


def _configurations(
    metadata: Mapping[str, str], names: Iterable[str], path: Path
) -> dict[str, dict[str, Any]]:
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


_RANK_AND_ALPHA = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def metadata_after(metadata: Mapping[str, str]) -> dict[str, str]:
    """The header's metadata for the resized file, whose scaling is 1: without configurations."""
    return {key: value for key, value in metadata.items() if key != _CONFIGS}
