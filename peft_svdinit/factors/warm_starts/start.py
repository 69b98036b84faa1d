"""`warm_start`: the delta of any adapter or fine-tuned model, at any rank, for a new adapter."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ...files import resolve_folder
from ...models import BaseSample, exact_targets, linear_modules, model_skeleton
from ..base_weights import base_weights
from ..deltas.checkpoint_pair import CheckpointPair
from ..deltas.lora_adapter import LoraAdapter
from ..extraction.extracted import Extraction
from ..extraction.in_memory import factors_of_adapter, factors_of_checkpoints
from ..file import FactorsFile, save_factors
from ..low_rank import LowRankFactors
from .base_check import check_base_of_adapter, check_base_of_factors, check_base_of_model
from .held import Held
from .source import Kind, kind_of
from .widening import at_rank, check_rank

logger = logging.getLogger(__name__)

_SHOWN = 4


@dataclass(frozen=True)
class WarmStart:
    """Factors of a delta at the rank of a new adapter, and the layers that it adapts.

    Attributes:
        kind: what the source is.
        extraction: the factors, by module name, with what their file says beside them.
        target_modules: as LoraConfig takes it, for the layers that have factors.
        held: what share of the delta the rank holds.
    """

    kind: Kind
    extraction: Extraction
    target_modules: list[str]
    held: Held

    @property
    def factors(self) -> Mapping[str, LowRankFactors]:
        """By module name, as `initialize_lora_from_factors` takes them."""
        return self.extraction.factors

    def save(self, path: str | os.PathLike, notes: Mapping[str, Any] | None = None) -> Path:
        """Write them to a file or into a folder, for `SvdLoraConfig(svd_factors=...)` to read.

        `notes` become a part of what the file says of its source.
        """
        about = self.extraction
        metadata = replace(about.metadata, source={**about.metadata.source, **(notes or {})})
        return save_factors(path, about.factors, metadata, base_samples=about.base_samples)


@dataclass(frozen=True)
class _Given:
    """What the user gave, by which errors name it."""

    source: str
    argument: str
    revision: str | None
    base: Path
    base_argument: str
    names: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.argument}: {self.source}"


def warm_start(
    source: str | os.PathLike,
    *,
    base: str | os.PathLike,
    rank: int,
    target_modules: str | Sequence[str] | None = None,
    check_base: bool = True,
    seed: int = 0,
    revision: str | None = None,
    base_revision: str | None = None,
    base_name: str | None = None,
    arguments: tuple[str, str] = ("source", "base"),
) -> WarmStart:
    """The delta of an adapter, a fine-tuned model or a factors file, as factors of rank `rank`.

    Below the rank of the source it is truncated; above it, it stays what it is and further
    directions of value zero are free to learn (see `at_rank`). One use of it:

        start = warm_start("my-adapter", base="my-base", rank=8)
        config = SvdLoraConfig(
            r=8, target_modules=start.target_modules, svd_factors=start.save("runs/start")
        )

    Args:
        source: folder or Hub id of a LoRA adapter (also one of `SvdLoraConfig` or `LoriConfig`),
            of a model fine-tuned from `base`, streamed from safetensors, or of factors. Its files
            tell which.
        base: folder or Hub id of the base model; only a fine-tuned model has it read as a whole.
        rank: of every layer.
        target_modules: the layers to adapt, as in LoraConfig; None for those of the source: those
            that it adapts or, of a fine-tuned model, those that changed.
        check_base: refuse a source that is of another base model.
        seed: of the further directions, and of the SVD of a fine-tuned model.
        revision, base_revision: branch, tag or commit on the Hub.
        base_name: what else the base is called, where `base` is a folder that something made.
        arguments: by which the user gave source and base; the messages of errors begin with one.

    Raises:
        FileNotFoundError: if source or base is missing.
        ValueError: if the source is of no such kind, is of another base or architecture, has no
            delta, covers other layers than `target_modules`, or is of directions alone; if a layer
            has no `rank` triplets; as `LoraAdapter`, `CheckpointPair` and `FactorsFile` raise.
        TypeError: if a fine-tuned model, or the base that it is compared with, is quantised.
    """
    kind = kind_of(source, argument=arguments[0], revision=revision)
    folder = resolve_folder(base, argument=arguments[1], revision=base_revision)
    names = tuple(dict.fromkeys([str(folder), os.fspath(base), base_name or os.fspath(base)]))
    given = _Given(os.fspath(source), arguments[0], revision, folder, arguments[1], names)
    skeleton = model_skeleton(folder, arguments[1])
    if kind == "adapter":
        found = _of_adapter(given, check_base)
    elif kind == "factors":
        found = _of_factors(given, check_base)
    else:
        found = _of_model(given, skeleton, rank, target_modules, seed, check_base)
    if target_modules is not None:
        _check_coverage(given, list(found.factors), list(linear_modules(skeleton, target_modules)))
    check_rank(rank, {name: layer.shape for name, layer in found.factors.items()})
    if not any(layer.norm for layer in found.factors.values()):
        raise ValueError(f"{given.place} has a delta of zero in every layer: was it trained?")
    held = Held.of(found.factors, rank)
    factors = {name: at_rank(name, layer, rank, seed) for name, layer in found.factors.items()}
    about = {**found.metadata.source, "warm_start": {"source": given.source, **asdict(held)}}
    extraction = Extraction(factors, replace(found.metadata, source=about), found.base_samples)
    targets = exact_targets(skeleton, list(factors)) or list(factors)
    return WarmStart(kind, extraction, targets, held)


def _of_adapter(given: _Given, check_base: bool) -> Extraction:
    adapter = LoraAdapter(given.source, argument=given.argument, revision=given.revision)
    found = factors_of_adapter(adapter, base=given.base, base_argument=given.base_argument)
    if check_base:
        check_base_of_adapter(
            adapter.config.get("base_model_name_or_path"),
            given.names,
            found.base_samples,
            {name: layer.shape for name, layer in found.factors.items()},
            place=given.place,
        )
    return found


def _of_factors(given: _Given, check_base: bool) -> Extraction:
    file = FactorsFile(given.source, argument=given.argument, revision=given.revision)
    shapes = {name: file.shape_of(name) for name in file}
    weights = base_weights(given.base, shapes, given.base_argument)
    if check_base and weights:
        samples: dict[str, BaseSample] = {}
        for name in file:
            sample = file.base_sample(name)
            if sample is not None:
                samples[name] = sample
        check_base_of_factors(samples, weights, place=given.place, base=given.names[-1])
    factors = dict(file.items())
    for name, layer in factors.items():
        if layer.S.any() and not layer.U.any():
            raise ValueError(
                f"{given.place} are directions of inputs without a delta (U of layer {name} is "
                'zero): they can start an adapter as svd_start="subspace" only'
            )
    found = {name: weights.sample(name) for name in file} if weights else {}
    return Extraction(factors, file.metadata, found)


def _of_model(
    given: _Given,
    skeleton: nn.Module,
    rank: int,
    target_modules: str | Sequence[str] | None,
    seed: int,
    check_base: bool,
) -> Extraction:
    pair = CheckpointPair(
        given.base,
        given.source,
        target_modules="all-linear" if target_modules is None else target_modules,
        tuned_revision=given.revision,
        arguments=(given.base_argument, given.argument),
    )
    modules = pair.base.modules
    check_rank(rank, {n: (one.out_features, one.in_features) for n, one in modules.items()})
    changed = {tensor.key.removesuffix(".weight") for tensor in pair.uncovered()}
    beyond = [name for name in linear_modules(skeleton) if name in changed and name not in modules]
    _check_coverage(given, [*modules, *beyond], list(modules))
    found = factors_of_checkpoints(pair, rank, base_model_name_or_path=given.names[-1], seed=seed)
    if check_base:
        check_base_of_model(
            math.hypot(*(layer.norm for layer in found.factors.values())),
            pair.base,
            place=given.place,
            base=given.names[-1],
            argument=given.base_argument,
        )
    uncovered = {tensor.key: tensor.relative_change for tensor in pair.uncovered()}
    if uncovered:
        logger.warning(
            "%s: %d tensors outside the adapted layers changed too, and are no part of the start: "
            "%s",
            given.place,
            len(uncovered),
            _shown([f"{key} (by {change:.1%})" for key, change in uncovered.items()]),
        )
    if pair.changed_settings:
        logger.warning(
            "%s: settings of its configuration differ from the base's, and no adapter carries "
            "them: %s",
            given.place,
            _shown(list(pair.changed_settings)),
        )
    factors = found.factors
    if target_modules is None:
        factors = {name: layer for name, layer in factors.items() if layer.norm}
    source = {**found.metadata.source, "uncovered": list(uncovered)}
    return Extraction(factors, replace(found.metadata, source=source), found.base_samples)


def _check_coverage(given: _Given, layers: Sequence[str], targets: Sequence[str]) -> None:
    """Layers of the delta and layers to adapt must be the same."""
    there, wanted = set(layers), set(targets)
    missing = [name for name in targets if name not in there]
    unused = [name for name in layers if name not in wanted]
    if missing or unused:
        raise ValueError(
            f"{given.argument} and target_modules differ: {len(missing)} target layers without a "
            f"delta in {given.source} ({_shown(missing)}), {len(unused)} layers of its delta "
            f"without target layer ({_shown(unused)}); change target_modules, or leave it out to "
            "adapt the layers of the delta"
        )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
