"""The file of scores, from which masks of any density and scope are chosen later.

One safetensors file: `<module>.scores`, an (out, rank) float32 tensor for every B. The header's one
metadata entry is JSON: format version, seed of A, columns of every A, source, model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..files import checked_fields, opened_headed, resolve_file, target_file, write_headed
from .making import mask_from_scores
from .mask import LoriMask

SCORES_FILE_NAME = "lori_scores.safetensors"
_HEADER_KEY = "peft_svdinit.lori_scores"
_SUFFIX = ".scores"
_KINDS: dict[str, tuple[type, ...]] = {
    "in_features": (dict,),
    "seed": (int,),
    "source": (dict,),
    "base_model_name_or_path": (str, type(None)),
}


@dataclass(frozen=True)
class LayerScores:
    """Scores of the entries of every B, and the A that they belong to.

    Attributes:
        scores: by module name. Sums on the way to scores, in a checkpoint, may be negative.
        in_features: columns of every A.
        seed: of A.
        source: what they measure: a "kind" such as "magnitude", and its details.
        base_model_name_or_path: the model.
    """

    scores: Mapping[str, Float[Tensor, "out rank"]]
    in_features: Mapping[str, int]
    seed: int
    source: Mapping[str, Any]
    base_model_name_or_path: str | None = None

    def mask(
        self,
        density: float,
        *,
        scope: str = "global",
        floor: float = 0.0,
        exclude: Iterable[LoriMask] = (),
    ) -> LoriMask:
        """The mask of the entries of highest score, as `mask_from_scores` chooses it."""
        return mask_from_scores(
            self.scores,
            self.in_features,
            density=density,
            seed=self.seed,
            scope=scope,
            floor=floor,
            exclude=exclude,
            source=self.source,
            base_model_name_or_path=self.base_model_name_or_path,
        )


def save_scores(path: str | os.PathLike, layers: LayerScores) -> Path:
    """Write scores to `path` (a folder gets `lori_scores.safetensors` inside), atomically.

    Raises:
        ValueError: if one is NaN or infinite, or another file is at the path.
    """
    target = target_file(path, SCORES_FILE_NAME, _HEADER_KEY)
    for name, scores in layers.scores.items():
        if not torch.isfinite(scores).all():
            raise ValueError(
                f"layer {name}: scores have NaN or infinite entries: the calibration diverged; "
                "lower its learning rate"
            )
    header = {
        "in_features": {name: layers.in_features[name] for name in layers.scores},
        "seed": layers.seed,
        "source": dict(layers.source),
        "base_model_name_or_path": layers.base_model_name_or_path,
    }
    tensors = {
        f"{name}{_SUFFIX}": scores.detach().float().cpu().contiguous()
        for name, scores in layers.scores.items()
    }
    write_headed(target, _HEADER_KEY, header, tensors)
    return target


def load_scores(path_or_id: str | os.PathLike) -> LayerScores:
    """The scores of a file, or of a folder or Hub repository with `lori_scores.safetensors`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, holds no scores, or is of another format version.
    """
    path = resolve_file(path_or_id, SCORES_FILE_NAME, revision=None, argument="scores")
    lacking = "no scores of a LoRI B"
    with opened_headed(path, _HEADER_KEY, lacking) as (file, header):
        fields = checked_fields(path, header, _KINDS)
        scores = {}
        for name, columns in fields["in_features"].items():
            scores[name] = file.get_tensor(f"{name}{_SUFFIX}")
            if type(columns) is not int or columns < 1 or scores[name].dim() != 2:
                raise ValueError(
                    f"{path}: layer {name} has scores of shape {tuple(scores[name].shape)} for "
                    f"{columns!r} inputs, which are none of a B; write the file again"
                )
        return LayerScores(scores, **fields)
