"""Scores of B from what is on the disk: a trained adapter, or a teacher's factors."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..factors import LORI_CONFIG, SIDECAR_NAME, FactorsFile, LoraAdapter, read_sidecar
from ..files import LazyMapping
from .layer_scores import LayerScores
from .projection import is_same_projection, random_projection
from .scores import magnitude_scores, teacher_scores

logger = logging.getLogger(__name__)


class SavedB(LazyMapping[Tensor]):
    """lora_B of every layer of an adapter by module name, read when it is asked for."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self.names, self._adapter = adapter.names, adapter

    def __getitem__(self, name: str) -> Tensor:
        return self._adapter[name].lora_B


def recorded_seed(adapter: LoraAdapter) -> int | None:
    """The seed of A that a LoRI adapter's sidecar names; None of any other adapter.

    Raises:
        ValueError: if the sidecar is damaged.
    """
    sidecar = adapter.folder / SIDECAR_NAME
    options = read_sidecar(sidecar, adapter.argument) if sidecar.is_file() else {}
    if options.get("config_class") != LORI_CONFIG:
        return None
    seed = options.get("lori_seed")
    if type(seed) is not int:
        raise ValueError(
            f"{adapter.argument}: {sidecar} has no lori_seed that is a number, got {seed!r}"
        )
    return seed


def scores_of_adapter(
    path_or_id: str | os.PathLike, seed: int | None = None, *, argument: str = "adapter"
) -> LayerScores:
    """|B| of a trained adapter.

    For a LoRI-D adapter (`lori_density=1`), whose A its seed draws. From any other LoRA, and over
    another seed, only how many entries each layer and row keeps carries over; a warning says so.

    Args:
        path_or_id: PEFT folder or Hub id of the adapter.
        seed: of the A that a mask is for; by default the adapter's own.
        argument: by which the user gave the adapter.

    Raises:
        FileNotFoundError, ValueError: as `LoraAdapter`; if the adapter names no seed and none is
            given, or its A is not the one that its seed draws.
    """
    adapter, path = LoraAdapter(path_or_id, argument=argument), os.fspath(path_or_id)
    recorded = recorded_seed(adapter)
    wanted = recorded if seed is None else seed
    if wanted is None:
        raise ValueError(
            f"seed: {path} is no LoRI adapter and names no seed, so its A is not that of any "
            "mask; give the seed of the adapter to be trained, and note that only how many entries "
            "each layer and each row keeps carries over to it"
        )
    scores, in_features, carried = {}, {}, True
    for name, layer in adapter.items():
        rank, width = layer.lora_A.shape
        carried &= is_same_projection(layer.lora_A, random_projection(name, rank, width, wanted))
        scores |= magnitude_scores({name: layer.lora_B})
        in_features[name] = width
    if not carried and wanted == recorded:
        raise ValueError(
            f"{argument}: {path} says that its A is drawn by seed {recorded}, but it is another "
            "one: trained, or made by another version? With another seed the mask takes over how "
            "many entries each layer and each row keeps"
        )
    if not carried:
        logger.warning(
            "%s has another A, so the position of an entry within its row means nothing beside the "
            "A of seed %d: only how many entries each layer and each row keeps carries over.",
            path,
            wanted,
        )
    return LayerScores(
        scores,
        in_features,
        wanted,
        {"kind": "magnitude", "adapter": Path(path).name, "same_A": carried},
        adapter.config.get("base_model_name_or_path"),
    )


class _Projections(LazyMapping[Tensor]):
    """A of every layer, drawn when it is asked for."""

    def __init__(self, in_features: Mapping[str, int], rank: int, seed: int) -> None:
        self.names = self._in_features = in_features
        self._rank, self._seed = rank, seed

    def __getitem__(self, name: str) -> Tensor:
        return random_projection(name, self._rank, self._in_features[name], self._seed)


def scores_of_teacher(
    path_or_id: str | os.PathLike, rank: int, seed: int = 0, *, argument: str = "factors"
) -> LayerScores:
    """|B| of the best B for a teacher's deltas.

    Args:
        path_or_id: the teacher's factors: a file, folder or Hub id.
        rank: of the adapter to be trained.
        seed: of its A.
        argument: by which the user gave the factors.

    Raises:
        FileNotFoundError, ValueError: as `FactorsFile`.
    """
    file = FactorsFile(path_or_id, argument=argument)
    in_features = {name: file.shape_of(name)[1] for name in file}
    return LayerScores(
        teacher_scores(file, _Projections(in_features, rank, seed)),
        in_features,
        seed,
        {"kind": "teacher", "factors": Path(path_or_id).name},
        file.metadata.base_model_name_or_path,
    )
