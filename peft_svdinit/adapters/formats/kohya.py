"""Keys of kohya's sd-scripts and of LyCORIS: `lora_unet_….lora_down.weight`, with alphas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .key_styles import KeyStyle

STYLE = KeyStyle("kohya", ".lora_down.weight", ".lora_up.weight", alpha_per_layer=True)

# What describes the network before resizing: hashes of its tensors, arguments of its algorithm.
_OUTDATED = ("sshs_model_hash", "sshs_legacy_hash", "ss_network_args")


def metadata_after(
    metadata: Mapping[str, str], ranks: Iterable[int], *, lora_alone: bool = True
) -> dict[str, str]:
    """The header's metadata for the resized file.

    `ss_network_dim` and `ss_network_alpha` become the rank, or "Dynamic" where layers differ, as
    kohya's own resizing writes it; a LyCORIS module becomes `networks.lora`, unless the file holds
    more than LoRA, which only that module reads. The hashes, and the arguments of the old network,
    are left out.
    """
    kept = {key: value for key, value in metadata.items() if key not in _OUTDATED}
    different = set(ranks)
    rank = str(different.pop()) if len(different) == 1 else "Dynamic"
    dims = {"ss_network_dim": rank, "ss_network_alpha": rank}
    if "ss_network_module" in kept and lora_alone:
        dims["ss_network_module"] = "networks.lora"
    return kept | dims
