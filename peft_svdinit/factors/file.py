"""The factors file: one safetensors file for the deltas of a whole model.

Tensors `<module>.U` (out, rank), `<module>.S` (rank,), `<module>.Vh` (rank, in) in float32, and
where the base weight was at hand `<module>.base_entries`, some of its entries in its own dtype,
by which another or an edited base model is told apart. (Files of before have `<module>.base`, the
first eight of the first row.) The header's one metadata entry is JSON: format version, base model,
source, method, seed and each delta's exact Frobenius norm. The same factors give the same bytes.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..files import Amount, HeadedFile, LazyMapping, TensorReader, refuse_non_floats, resolve_file
from ..linalg import frobenius_norm
from ..models import BaseSample, natural_order, sampled_positions
from .low_rank import LowRankFactors

logger = logging.getLogger(__name__)

FACTORS_FILE_NAME = "factors.safetensors"
_FILE = HeadedFile(
    "peft_svdinit.factors",
    FACTORS_FILE_NAME,
    "factors; make some with `svdinit extract` or `svdinit synthesize`",
)
_PARTS = ("U", "S", "Vh")
_SAMPLE, _FIRST_ROW = "base_entries", "base"


@dataclass(frozen=True)
class FactorsMetadata:
    """Where factors come from, as stored in the file's header."""

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    method: str = "exact"
    seed: int | None = None


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    norms: dict[str, Amount]
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    source: dict[str, Any] = {}
    method: str = "exact"
    seed: int | None = None


def save_factors(
    path: str | os.PathLike,
    factors: Mapping[str, LowRankFactors],
    metadata: FactorsMetadata,
    *,
    base_samples: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `factors` to `path` (a folder gets `factors.safetensors` inside), atomically.

    Each layer is read twice, to check it and to write it, and one is in memory at a time: `factors`
    may read from a disk.

    Args:
        path: file or folder.
        factors: by module name.
        metadata: where they come from.
        base_samples: `recognition_sample` of the base weights, as `base_samples` takes them.

    Raises:
        ValueError: if there are no factors, the reader would refuse those of a layer, a sample is
            not of as many entries as are taken of its weight, or another file is at the path.
    """
    if not factors:
        raise ValueError("factors is empty: a factors file needs at least one layer")
    target = _FILE.target(path)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    norms: dict[str, float] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in factors.items():
        defect = _defect(layer)
        if defect:
            raise ValueError(f"factors: layer {name} has {defect}")
        for part in _PARTS:
            layout[f"{name}.{part}"] = (torch.float32, tuple(getattr(layer, part).shape))
        norms[name], shapes[name] = layer.norm, layer.shape
    samples = {name: sample for name, sample in (base_samples or {}).items() if name in norms}
    for name, sample in samples.items():
        expected = len(sampled_positions(shapes[name]))
        if sample.shape != (expected,):
            raise ValueError(
                f"base_samples: layer {name} has entries of shape {tuple(sample.shape)}, of a "
                f"weight of shape {shapes[name]} there are {expected}; take them with "
                "base_samples(model, factors)"
            )
        layout[f"{name}.{_SAMPLE}"] = (sample.dtype, tuple(sample.shape))
    with _FILE.writer(target, {**asdict(metadata), "norms": norms}, layout) as writer:
        for name in norms:
            layer = factors[name]
            for part in _PARTS:
                writer.write(f"{name}.{part}", getattr(layer, part).float())
        for name, sample in samples.items():
            writer.write(f"{name}.{_SAMPLE}", sample)
    return target


class FactorsFile(LazyMapping[LowRankFactors]):
    """Read-only, lazy view of a factors file: module name to factors, one layer read at a time.

    Opening checks the header and every shape without reading tensors; reading a layer checks its
    values.

    Args:
        path_or_id: a `.safetensors` file, a folder or a Hub repository with `factors.safetensors`.
        argument: by which the user gave it; the messages of errors begin with it.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated, not a factors file, or of another format version.
        TypeError: if a tensor holds no floating-point numbers.
    """

    def __init__(
        self,
        path_or_id: str | os.PathLike,
        *,
        argument: str = "factors",
        revision: str | None = None,
    ) -> None:
        self.path = resolve_file(
            path_or_id, FACTORS_FILE_NAME, revision=revision, argument=argument
        )
        self._has_warned = False
        with _FILE.opened(self.path, argument, _Header) as (file, header):
            norms = header.norms
            self._norms = {name: norms[name] for name in sorted(norms, key=natural_order)}
            self.names = self._norms
            self.metadata = FactorsMetadata(
                **{entry.name: getattr(header, entry.name) for entry in fields(FactorsMetadata)}
            )
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            unlisted = {key.rpartition(".")[0] for key in stored} - self._norms.keys()
            if unlisted:
                raise ValueError(
                    f"the header has no norm for layer {min(unlisted)}, of which the file holds "
                    "tensors; write the file again"
                )
            refuse_non_floats(file, stored)
            self._ranks: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, int]] = {}
            for name in self._norms:
                self._check(name, stored)
        self._reader = TensorReader(self.path, argument)
        self._sampled = {name for name in self._norms if f"{name}.{_SAMPLE}" in stored}
        self._with_first_row = {name for name in self._norms if f"{name}.{_FIRST_ROW}" in stored}

    def _check(self, name: str, stored: Mapping[str, tuple[int, ...]]) -> None:
        """Note the rank and the shape of a layer, or raise ValueError."""
        try:
            (out, rank), (length,), (rows, inputs) = (stored[f"{name}.{part}"] for part in _PARTS)
        except (KeyError, ValueError):
            raise ValueError(
                f"layer {name} lacks U, S or Vh, or one has the wrong number of dimensions; write "
                "the file again"
            ) from None
        if not 1 <= rank == length == rows:
            raise ValueError(
                f"layer {name} has factors of ranks {rank}, {length} and {rows} in U, S and Vh, "
                "which must agree"
            )
        self._ranks[name], self._shapes[name] = rank, (out, inputs)
        sample = stored.get(f"{name}.{_SAMPLE}")
        if sample not in (None, (len(sampled_positions((out, inputs))),)):
            raise ValueError(
                f"layer {name} has base entries of shape {sample}, which are not those of a weight "
                f"of shape {(out, inputs)}; write the file again"
            )

    def __getitem__(self, name: str) -> LowRankFactors:
        if name not in self._norms:
            raise KeyError(name)
        with self._reader.opened() as file:
            U, S, Vh = (file.tensor(f"{name}.{part}").float() for part in _PARTS)
            layer = LowRankFactors(U, S, Vh, self._norms[name])
            defect = _defect(layer)
            if defect:
                raise ValueError(f"layer {name} has {defect}; write the file again")
        return layer

    def rank_of(self, name: str) -> int:
        """Triplets held for a layer, without reading it."""
        return self._ranks[name]

    def shape_of(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer's delta, without reading it."""
        return self._shapes[name]

    def base_sample(self, name: str) -> BaseSample | None:
        """The stored entries of the layer's base weight, if the file has them.

        The first time that they are of the form of before, a warning says what these cannot show.
        """
        of_first_row = name not in self._sampled
        if of_first_row and name not in self._with_first_row:
            return None
        if of_first_row and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s remembers eight entries of one row of each weight of its base model, by which "
                "an edited base cannot be told; with the base that it was made of, write it anew: "
                "%s",
                self.path,
                self._rewriting_command(),
            )
        with self._reader.opened() as file:
            entries = file.tensor(f"{name}.{_FIRST_ROW if of_first_row else _SAMPLE}")
        return BaseSample(entries, of_first_row)

    def _rewriting_command(self) -> str:
        base = self.metadata.base_model_name_or_path or "BASE_MODEL"
        revision = self.metadata.base_model_revision
        options = f"'{base}'" + (f", revision='{revision}'" if revision else "")
        return (
            'python -c "from transformers import AutoModelForCausalLM; '
            "from peft_svdinit import FactorsFile, base_samples, save_factors; "
            f"file = FactorsFile('{self.path}'); "
            f"base = AutoModelForCausalLM.from_pretrained({options}); "
            'save_factors(file.path, file, file.metadata, base_samples=base_samples(base, file))"'
        )


def _defect(layer: LowRankFactors) -> str | None:
    """What makes these no factors of a delta, or None."""
    if not all(torch.isfinite(part).all() for part in (layer.U, layer.S, layer.Vh)):
        return "NaN or infinite factors"
    if (layer.S < 0).any() or (layer.S.diff() > 0).any():
        return "singular values that are not descending and >= 0"
    if not 0 <= layer.norm < math.inf:
        return f"a delta norm of {layer.norm}"
    # Slack for float32 rounding.
    if frobenius_norm(layer.S) > layer.norm * (1 + 1e-4) + 1e-30:
        return f"singular values that exceed the norm of its delta, {layer.norm:.6g}"
    return None
