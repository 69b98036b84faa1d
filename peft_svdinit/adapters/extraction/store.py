"""The factors of every layer of a pair of checkpoints, in a working folder that can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ...factors import (
    CheckpointPair,
    Factorisation,
    LayerStore,
    LowRankFactors,
    RankRule,
    Spectrum,
    fill_store,
    rounding_remark,
)
from ...files import file_stamps

logger = logging.getLogger(__name__)


@contextmanager
def factorised(
    pair: CheckpointPair,
    target: Path,
    factorise: Callable[[str, Tensor], LowRankFactors],
    *,
    read_ahead: int = 1,
) -> Iterator[tuple[LayerStore, Callable[[], None]]]:
    """The factors of every layer in the working folder of `target`, which goes when all is done.

    Yields the store, and a check to call before anything is published: it raises ValueError if the
    checkpoints' files are not those that were read. After an error the store stays for a resume.

    Raises:
        ValueError: if tensors changed that no layer covers, or as `LayerStore` and `fill_store` do.
    """
    _refuse_unknown_parts(pair)
    stamps = _pair_stamps(pair)

    def unchanged() -> None:
        if _pair_stamps(pair) != stamps:
            raise ValueError("base or tuned changed while they were read; run the extraction again")

    # Factors made when rounding was part of a delta are none of this job.
    inputs = {"factorisation": repr(factorise), "pair": stamps, "rounding": "unchanged"}
    working = target.with_name(f"{target.name}.partial")
    with LayerStore(working, list(pair), inputs) as store:
        fill_store(store, pair, factorise, read_ahead=read_ahead)
        yield store, unchanged
        store.remove()


def _refuse_unknown_parts(pair: CheckpointPair) -> None:
    """Raise ValueError if what changed is beside the linear layers and may be most of the model."""
    changed = [tensor.key for tensor in pair.uncovered()]
    kind = type(pair.base.parameters.model).__name__
    unknown = [key for key in changed if not pair.is_parameter(key)]
    if unknown:
        raise ValueError(
            f"tuned: {len(unknown)} changed tensors, {unknown[0]} the first, are no parameters of "
            f"{kind} by these names, and no adapter of its linear layers covers them; "
            "exclude_modules can leave them out"
        )
    stacks = [key for key in changed if pair.is_stack(key)]
    if stacks:
        module = stacks[0].rpartition(".")[0]
        raise ValueError(
            f"tuned: {len(stacks)} changed parameters of {kind}, {stacks[0]} the first, are stacks "
            "of matrices, one for each expert, and no adapter of its linear layers covers them; "
            f"leave them out with exclude_modules {module.rpartition('.')[2]} if they should not "
            "count"
        )


def factorisation(rule: RankRule, *, seed: int = 0, device: str = "cpu") -> Factorisation:
    """How to factorise every layer so that the rule can choose among its triplets.

    Raises:
        ValueError: if the rule has no bound of the rank.
    """
    if rule.most is None:
        raise ValueError("max_rank is needed with energy, error or max_parameters, got None")
    return Factorisation(rule.most, energy=rule.energy, error=rule.error, seed=seed, device=device)


def stored_spectra(store: LayerStore, pair: CheckpointPair) -> dict[str, Spectrum]:
    """Singular values, norm and shape of every layer; the vectors stay on the disk.

    A warning says which part of the model is unchanged but for rounding.

    Raises:
        ValueError: if every delta is zero.
    """
    spectra = {}
    for name in store:
        S, norm = store.singular_values(name)
        module = pair.base.modules[name]
        spectra[name] = Spectrum(S, norm, (module.out_features, module.in_features))
    if not any(layer.norm for layer in spectra.values()):
        store.remove()  # Reading it all again would find nothing else.
        raise ValueError(
            "tuned: its linear layers all equal the base's, but for rounding where dtypes differ; "
            "there is no delta"
        )
    remark = rounding_remark(pair, (name for name, layer in spectra.items() if not layer.norm))
    if remark:
        logger.warning("%s", remark)
    return spectra


def _pair_stamps(pair: CheckpointPair) -> list[Any]:
    """By what a change of the two checkpoints is noticed."""
    files = [file for side in (pair.base, pair.tuned) for file in side.checkpoint.files]
    return [[str(file.resolve()), file_stamps(file)] for file in files]
