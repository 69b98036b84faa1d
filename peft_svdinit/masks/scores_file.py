"""The file of scores, from which masks of any density and scope are chosen later.

One safetensors file: `<module>.scores`, an (out, rank) float32 tensor for every B. The header's one
metadata entry is JSON: format version, seed of A, columns of every A, source, model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..files import HeadedFile, Positive, refuse_non_floats
from .layer_scores import LayerScores

SCORES_FILE_NAME = "lori_scores.safetensors"
_FILE = HeadedFile("peft_svdinit.lori_scores", SCORES_FILE_NAME, "scores of a LoRI B")
_SUFFIX = ".scores"


class _Header(msgspec.Struct):
    in_features: dict[str, Positive]
    seed: int
    source: dict[str, Any]
    base_model_name_or_path: str | None


def save_scores(path: str | os.PathLike, layers: LayerScores) -> Path:
    """Write scores to `path` (a folder gets `lori_scores.safetensors` inside), atomically.

    Raises:
        ValueError: if one is NaN or infinite, or another file is at the path.
    """
    target = _FILE.target(path)
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
    _FILE.write(target, header, tensors)
    return target


def load_scores(path_or_id: str | os.PathLike, *, argument: str = "scores") -> LayerScores:
    """The scores of a file, or of a folder or Hub repository with `lori_scores.safetensors`.

    Args:
        path_or_id: the file, folder or repository.
        argument: by which the user gave it; the messages of errors begin with it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, holds no scores, or is of another format version.
    """
    with _FILE.opened(path_or_id, argument, _Header) as (file, header):
        refuse_non_floats(file, [f"{name}{_SUFFIX}" for name in header.in_features])
        scores = {name: file.get_tensor(f"{name}{_SUFFIX}") for name in header.in_features}
        for name, each in scores.items():
            if each.dim() != 2:
                raise ValueError(
                    f"layer {name} has scores of shape {tuple(each.shape)}, which are none of a B; "
                    "write the file again"
                )
        return LayerScores(
            scores,
            header.in_features,
            header.seed,
            header.source,
            header.base_model_name_or_path,
        )
