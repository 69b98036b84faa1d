"""How a single adapter file spells its keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .loha import LOHA
from .lokr import LOKR
from .lora import DOWN, UP

ALPHA = "alpha"
# Ends of keys that mark a part of LyCORIS, the same in its own files and in PEFT's folders.
LYCORIS_PARTS = (*LOHA.parts, *LOKR.parts)

_NOT_SUPPORTED = {
    "DoRA": (".dora_scale", ".lora_magnitude_vector"),
    "a CP or Tucker decomposition": (
        ".lora_mid.weight",
        ".hada_t1",
        ".hada_t2",
        ".lokr_t1",
        ".lokr_t2",
    ),
    "full differences or biases": (".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias"),
    "OFT or BOFT": (".oft_blocks", ".oft_diag"),
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "IA3": (".on_input",),
}


@dataclass(frozen=True)
class KeyStyle:
    """The ends of the keys of a LoRA's factors, and what readers of the style understand.

    Attributes:
        name: of the family, for people.
        down, up: ends of the keys of the two factors.
        alpha_per_layer: whether a layer's own alpha is stored and honoured, so that layers may
            have different ranks.
    """

    name: str
    down: str
    up: str
    alpha_per_layer: bool

    def split(self, key: str) -> tuple[str, str] | None:
        """(layer, part) of a key, None if it is of another style."""
        for end, part in ((self.down, DOWN), (self.up, UP), (f".{ALPHA}", ALPHA)):
            if key.endswith(end):
                return key.removesuffix(end), part
        layer, _, part = key.rpartition(".")
        return (layer, part) if self.alpha_per_layer and part in LYCORIS_PARTS else None


def refuse_unsupported(keys: Iterable[str], path: object) -> None:
    """Raise ValueError naming the method, if a key belongs to one that is no product of factors."""
    for key in keys:
        for method, ends in _NOT_SUPPORTED.items():
            if key.endswith(ends):
                raise ValueError(
                    f"adapter: {path} uses {method} ({key}), which scaling * B @ A does not "
                    "express; merge it and extract the delta of the merged checkpoint instead"
                )
