"""The factors of every layer of a delta in memory; the deltas themselves are streamed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from ...linalg import Method
from ...models import model_skeleton, module_names
from ..base_weights import base_weights
from ..deltas.checkpoint_pair import CheckpointPair
from ..deltas.lora_adapter import LoraAdapter
from ..deltas.rounding import rounding_remark
from ..deltas.synthesis import Synthesis
from ..file import FactorsMetadata
from .extracted import Extraction
from .factorisation import Factorisation

logger = logging.getLogger(__name__)

Delta = TypeVar("Delta")


def factors_of_adapter(
    adapter: LoraAdapter,
    *,
    synthesis: Synthesis | None = None,
    base: str | os.PathLike | None = None,
    base_argument: str = "base",
) -> Extraction:
    """Factors of a LoRA's delta, extended by `synthesis` if given; B @ A is never formed.

    Args:
        adapter: the saved adapter.
        synthesis: how to extend it to a higher rank.
        base: folder of its base model, read only to note by which entries to recognise it, and
            what it calls the layers, where the adapter has names of older versions. One that is
            stored quantised has no entries to note.
        base_argument: by which the user gave the base; the messages of errors begin with it.

    Raises:
        ValueError: if the base lacks a layer of the adapter or differs from it in shape.
    """
    factors = {}
    for name, product in _progress(adapter, "SVD of the adapter"):
        layer = product.factors()
        factors[name] = synthesis(name, layer) if synthesis else layer
    samples = {}
    if base is not None:
        skeleton = model_skeleton(base, base_argument)
        renamed = module_names(skeleton, list(factors))
        factors = {renamed[name]: layer for name, layer in factors.items()}
        shapes = {name: layer.shape for name, layer in factors.items()}
        weights = base_weights(base, shapes, base_argument, skeleton)
        samples = {name: weights.sample(name) for name in factors} if weights else {}
    source: dict = {"kind": "adapter"}
    if synthesis:
        source = {"kind": "synthesised", "adapter_rank": adapter.config["r"], **asdict(synthesis)}
    if adapter.beside:
        source["left_out"] = list(adapter.beside)
    metadata = FactorsMetadata(
        base_model_name_or_path=adapter.config.get("base_model_name_or_path"),
        base_model_revision=adapter.config.get("revision"),
        source=source,
        seed=synthesis.seed if synthesis else None,
    )
    return Extraction(factors, metadata, samples)


def factors_of_checkpoints(
    pair: CheckpointPair,
    rank: int,
    *,
    base_model_name_or_path: str,
    method: Method = "auto",
    seed: int = 0,
) -> Extraction:
    """Leading `rank` triplets of tuned − base for every linear layer, the pair streamed.

    Raises:
        ValueError: if the two checkpoints are equal in every linear layer, but for rounding.
    """
    factorise = Factorisation(rank=rank, method=method, seed=seed)
    factors = {
        name: factorise(name, delta)
        for name, delta in _progress(pair, "SVD of the checkpoints' delta")
    }
    if not any(layer.norm for layer in factors.values()):
        raise ValueError(
            f"{pair.tuned.checkpoint.argument}: its linear layers all equal the base's, but "
            "for rounding where dtypes differ; there is no delta"
        )
    remark = rounding_remark(pair, (name for name, layer in factors.items() if not layer.norm))
    if remark:
        logger.warning("%s", remark)
    metadata = FactorsMetadata(
        base_model_name_or_path=base_model_name_or_path,
        source=pair.source,
        method=method,
        seed=seed,
    )
    return Extraction(factors, metadata, checkpoint_samples(pair))


def checkpoint_samples(pair: CheckpointPair) -> dict[str, Tensor]:
    """A few entries of every base weight, by which the model is recognised."""
    return {name: pair.base.sample(name) for name in pair}


def _progress(layers: Mapping[str, Delta], description: str) -> Iterator[tuple[str, Delta]]:
    # disable=None: no bar where standard error is not a terminal.
    return iter(tqdm(layers.items(), desc=description, unit="layer", disable=None))
