"""How a single adapter file spells its keys."""

from __future__ import annotations

from dataclasses import dataclass

from .loha import LOHA
from .lokr import LOKR
from .lora import DOWN, UP

ALPHA, BIAS = "alpha", "bias of the up factor"
# Ends of keys that mark a part of LyCORIS, the same in its own files and in PEFT's folders.
LYCORIS_PARTS = (*LOHA.parts, *LOKR.parts)


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

    @property
    def bias(self) -> str:
        """End of the keys of biases of the up factor, which are scaled as the product is."""
        return self.up.removesuffix("weight") + "bias"

    def split(self, key: str) -> tuple[str, str] | None:
        """(layer, part) of a key, None if it is of another style."""
        for end, part in ((self.down, DOWN), (self.up, UP), (f".{ALPHA}", ALPHA)):
            if key.endswith(end):
                return key.removesuffix(end), part
        if key.endswith(self.bias):
            return key.removesuffix(self.bias), BIAS
        layer, _, part = key.rpartition(".")
        return (layer, part) if self.alpha_per_layer and part in LYCORIS_PARTS else None
