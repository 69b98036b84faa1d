"""Tensors that an adapter stores beside the factors of its layers, and what they mean.

What readers do: ComfyUI adds `diff` and `w_norm` to a weight, `diff_b` and `b_norm` to a bias, all
times the strength of the file, and puts a tensor in the place of another by `set_weight`. LyCORIS
adds the same four. PEFT and diffusers add `lora_B.bias` times the layer's scaling; PEFT puts all
else that it stores in the place of the base's. OneTrainer and ComfyUI take embeddings from
`bundle_emb`. All normalise by the magnitudes of DoRA after adding scaling * B @ A to the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...files import one_line

Kind = Literal["difference", "whole", "magnitude", "unknown", "algorithm"]
"""What a tensor does: is added to one of the base, replaces one, scales the updated weight of DoRA,
does what is not known here, or is a part of a layer whose update is no product of two factors."""

_EMBEDDINGS = "bundle_emb."
# Ends of the parts of a layer that are no product, in the words of kohya and LyCORIS.
_ALGORITHMS = (
    ".lora_mid.weight",
    ".hada_t1",
    ".hada_t2",
    ".lokr_t1",
    ".lokr_t2",
    ".oft_blocks",
    ".oft_diag",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".on_input",
)
_ENDS: dict[Kind, tuple[str, ...]] = {
    "difference": (".diff", ".diff_b", ".w_norm", ".b_norm"),
    "magnitude": (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    "whole": (".set_weight", ".reshape_weight"),
    "algorithm": _ALGORITHMS,
}


@dataclass(frozen=True)
class Beside:
    """A tensor beside the factors.

    Attributes:
        key: in the file.
        kind: see `Kind`.
        layer: the layer with factors that it belongs to, or that is of another algorithm.
        factor: what it is multiplied by in a file whose scaling is 1, to mean the same.
    """

    key: str
    kind: Kind
    layer: str | None = None
    factor: float = 1.0


def kind_of(name: str) -> Kind:
    """What the name of a tensor in a single file says of it."""
    for kind, ends in _ENDS.items():
        if name.endswith(ends):
            return kind
    return "whole" if name.startswith(_EMBEDDINGS) else "unknown"


def layer_of(name: str) -> str:
    """What the layer is called whose part of another algorithm this is."""
    end = next(end for end in _ALGORITHMS if name.endswith(end))
    return name.removesuffix(end)


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(one_line, names[:5])) + more
