"""Merging adapters layer by layer, measuring the result and writing it."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from ...factors import ComparableDelta, LoraInit, layer_interference, pair_interference
from ...files import write_json, write_text
from ..dtypes import Dtype, torch_dtype
from ..formats.peft_folder import carried_over
from ..output_folder import MERGE_JSON, MERGE_REPORT, OutputFolder
from ..rounding import Factors, dtypes_of, stored
from ..stock_lora import lora_config, write_stock_lora
from ..weighted_sum import WeightedSum
from .exact import concatenated, on_shared_A, recompressed
from .inputs import without_zeros
from .methods import MergeMethod
from .pairs import Pair
from .record import Merged, MergedLayer
from .report import merge_report
from .terms import LoraTerm, distance_from_sum, norm_of_sum
from .through_peft import merged_by_peft

# Below this share of its summands a sum is float64 rounding.
_CANCELLED = 1e-12


def merge(
    adapters: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: MergeMethod | None = None,
    *,
    weights: Sequence[float] | None = None,
    dtype: Dtype | None = None,
    progress: bool = False,
) -> Merged:
    """Write several LoRA adapters as one, with its error against their exact weighted sum.

    The result is a stock PEFT LoRA of scaling 1, with `merge_report.json` and `merge_report.md`
    beside it. The error of every layer is measured on what is stored, in factored form, and so is
    the interference of each pair of adapters. One layer of each adapter is in memory at a time,
    beside the merged adapter. What lies beside the factors is carried over, see `carried`; biases
    of lora_B are summed exactly by every method.

    Args:
        adapters: PEFT LoRA folders or Hub ids, two at least.
        output: folder of the merged adapter, see `OutputFolder`: an earlier result is replaced.
        method: by default "cat".
        weights: of the adapters, 1 each by default. An adapter of weight 0 is left out. Negative
            ones subtract; methods that elect signs refuse them, since PEFT elects before it
            applies the weights.
        dtype: of the stored factors; by default the widest of the inputs, at most float32.
        progress: show a bar.

    Raises:
        FileNotFoundError: if an adapter does not exist.
        ValueError: if an adapter is no LoRA of linear layers, the shapes of a layer differ, there
            is no sum of what lies beside the factors, the weights or the output do not fit, an
            entry is NaN or infinite, the method does not suit a layer, or `dtype` is too narrow
            for a value.
    """
    method = method or MergeMethod()
    narrow = None if dtype is None else torch_dtype(dtype)
    given = WeightedSum(adapters, weights)
    chosen, left_out = without_zeros(given, method)
    folder, carried = OutputFolder.checked(output, "output", given.files), chosen.carried

    tensors: dict[str, Factors] = {}
    layers: list[MergedLayer] = []
    norms: list[list[float]] = [[] for _ in chosen.paths]
    for name in tqdm(chosen.names, desc="Merging", disable=not progress):
        terms = chosen.terms(name)
        try:
            pair = _merged(name, terms, chosen.weights, method)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        init = LoraInit(*pair, subtract_initial=False)
        tensors[name], rounding = stored(name, init, narrow or chosen.dtype(name))
        compared = {term.adapter: _comparable(term) for term in terms}
        for index, delta in compared.items():
            norms[index].append(delta.norm)
        layers.append(_measured(name, terms, tensors[name], rounding, compared))

    total = tuple(math.hypot(*found) for found in norms)
    merged = Merged(
        output=folder.path,
        layers=tuple(layers),
        parameters_before=chosen.parameters,
        parameters=sum(A.numel() + B.numel() for A, B in tensors.values()),
        adapters=tuple(chosen.paths),
        weights=chosen.weights,
        dtypes=dtypes_of(tensors),
        only_in_some=chosen.only_in_some(),
        respelled=chosen.respelled,
        carried=carried,
        norms=total,
        left_out=left_out,
        method=method,
        pairs=_pairs(layers, total),
    )
    ranks = {layer.name: layer.rank for layer in layers}
    config = lora_config(ranks, **carried_over(chosen.adapters, ranks))
    with folder.replacing() as temporary:
        write_stock_lora(temporary, config, tensors, carried)
        write_json(temporary / MERGE_JSON, merged.as_dict())
        write_text(temporary / MERGE_REPORT, merge_report(merged))
    return merged


def _merged(
    name: str, terms: Sequence[LoraTerm], weights: Sequence[float], method: MergeMethod
) -> Factors:
    if method.name == "cat":
        return concatenated(terms)
    if method.name == "shared":
        return on_shared_A(terms)
    if method.name == "svd" and method.rank is not None:
        return recompressed(terms, method.rank)
    lora_A, lora_B = merged_by_peft(name, terms, weights, method)
    given = any(term.delta.lora_A.any() and term.delta.lora_B.any() for term in terms)
    if method.prunes and given and not (lora_A.any() and lora_B.any()):
        raise ValueError(
            f"density {method.density} keeps nothing with method {method.name}; use a larger one"
        )
    return lora_A, lora_B


def _comparable(term: LoraTerm) -> ComparableDelta:
    return ComparableDelta.of(term.delta.lora_B, term.delta.lora_A, term.delta.scaling)


def _measured(
    name: str,
    terms: Sequence[LoraTerm],
    pair: Factors,
    rounding: float,
    compared: Mapping[int, ComparableDelta],
) -> MergedLayer:
    lora_A, lora_B = pair
    size = math.hypot(*(term.weight * compared[term.adapter].norm for term in terms))
    norm, difference = norm_of_sum(terms), distance_from_sum(lora_B, lora_A, terms)
    shape, ranks = terms[0].delta.shape, {t.adapter: len(t.delta.lora_A) for t in terms}
    return MergedLayer(
        name=name,
        shape=shape,
        rank_before=min(sum(ranks.values()), *shape),
        rank=len(lora_A),
        norm=norm if norm > _CANCELLED * size else 0.0,
        truncation_error=difference if difference > _CANCELLED * size else 0.0,
        rounding_error=rounding,
        ranks=ranks,
        pairs={
            (i, j): layer_interference(compared[i], compared[j])
            for i, j in itertools.combinations(compared, 2)
        },
    )


def _pairs(layers: Sequence[MergedLayer], norms: Sequence[float]) -> tuple[Pair, ...]:
    pairs = []
    for i, j in itertools.combinations(range(len(norms)), 2):
        common = [layer.pairs[i, j] for layer in layers if (i, j) in layer.pairs]
        pairs.append(Pair(i, j, pair_interference(common, (norms[i], norms[j]))))
    return tuple(pairs)
