"""Reading adapters layer by layer, truncating each delta, writing the result."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ...factors import LowRankFactors, RankRule, Spectrum, SvdGuided
from ...files import write_json
from ..dtypes import Dtype, torch_dtype
from ..formats.opening import open_adapter
from ..formats.peft_folder import carried_over
from ..formats.single_file_output import write_single_file
from ..output_folder import RESIZE_REPORT, OutputFolder
from ..record import KeptLayer
from ..rounding import dtypes_of, stored
from ..stock_lora import lora_config, write_stock_lora
from ..weighted_sum import WeightedSum, combined
from .record import Resized


def resize(
    adapters: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    rule: RankRule,
    *,
    weights: Sequence[float] | None = None,
    dtype: Dtype | None = None,
    progress: bool = False,
) -> Resized:
    """Write the weighted sum of `adapters` as one LoRA adapter of other ranks.

    Each layer becomes the best approximation of its rank (Eckart-Young), B = U S and A = Vᵀ with
    alpha = rank. Sums are exact: the factors are concatenated. The product B A is never formed for
    a LoRA or LoKr; for a LoHa only where r² is no less than min(out, in). One layer is in memory at
    a time, beside the resized adapter.

    What lies beside the factors, such as embeddings and biases, is carried over; see `carried`.

    Args:
        adapters: PEFT folders (LoRA, LoHa, LoKr), or files in one of the styles of kohya, LyCORIS
            and diffusers, all of one style.
        output: folder of a PEFT adapter, see `OutputFolder`, or a `.safetensors` file; the style is
            that of the input. An earlier result is replaced, and so is an adapter file.
            diffusers' style has one rank for all layers, as if `rule.uniform`.
        rule: the ranks. Layers only shrink: one with fewer triplets keeps those.
        weights: of the adapters in the sum, any sign; 1 each by default.
        dtype: of the stored factors; by default that of the inputs. The error of rounding is
            measured.
        progress: show a bar.

    Raises:
        FileNotFoundError: if an adapter does not exist.
        ValueError: if an input is no adapter of a supported kind, the styles or the shapes of a
            layer differ, the output does not fit the style, is an input or holds anything but an
            adapter, an entry is NaN or infinite, or `dtype` is too narrow for a value.
        TypeError: if an adapter is quantised.
    """
    narrow = None if dtype is None else torch_dtype(dtype)
    merge = WeightedSum(adapters, weights)
    output = Path(output).expanduser()
    folder = _checked_folder(output, merge)
    style, carried = merge.adapters[0].style, merge.carried
    uniform = rule.uniform or (style is not None and not style.alpha_per_layer)

    settled, ranks = _settled(replace(rule, uniform=uniform), merge)
    tensors, layers = {}, []
    for name in tqdm(merge.names, desc="Resizing", disable=not progress):
        factors = combined(merge.terms(name)).factors(settled.most)
        chosen = ranks or settled.choose({name: factors}, least=1)[0]
        rank = min(settled.rank or chosen[name], factors.rank)
        init = SvdGuided()(factors, rank=rank, scaling=1.0)
        padded = settled.rank if uniform else None
        tensors[name], rounding = stored(name, init, narrow or merge.dtype(name), padded)
        layers.append(_kept(name, merge.rank(name), factors, rank, rounding))

    resized = Resized(
        output=output,
        layers=tuple(layers),
        parameters_before=merge.parameters,
        parameters=sum(A.numel() + B.numel() for A, B in tensors.values()),
        adapters=tuple(merge.paths),
        weights=merge.weights,
        dtypes=dtypes_of(tensors),
        only_in_some=merge.only_in_some(),
        respelled=merge.respelled,
        carried=carried,
        rule=rule,
    )
    if folder is not None:
        stored_ranks = {name: len(lora_A) for name, (lora_A, _) in tensors.items()}
        config = lora_config(stored_ranks, **carried_over(merge.adapters, tensors))
        with folder.replacing() as temporary:
            write_stock_lora(temporary, config, tensors, carried)
            write_json(temporary / RESIZE_REPORT, resized.as_dict())
    else:
        kernels = {name: merge.kernel(name) for name in merge.names}
        write_single_file(merge.adapters[0], output, tensors, kernels, carried, resized.as_dict())
    return resized


def _checked_folder(output: Path, merge: WeightedSum) -> OutputFolder | None:
    """The folder to write, or None if `output` is to be a file, and may be."""
    single = merge.adapters[0].style is not None
    if single != (output.suffix == ".safetensors"):
        wanted = "a file that ends in .safetensors" if single else "a folder"
        raise ValueError(f"output must be {wanted}, as the input is, got {output}")
    if not single:
        return OutputFolder.checked(output, "output", merge.files)
    if output.resolve() in {path.resolve() for path in merge.files}:
        raise ValueError(f"output must not be an input, got {output}; choose another name")
    if output.is_dir():
        raise ValueError(f"output must be a file, but {output} is a folder")
    if output.exists():
        _refuse_other_file(output)
    return None


def _refuse_other_file(output: Path) -> None:
    try:
        open_adapter(output)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"output: {output} is no adapter file ({error}) and would be overwritten; choose "
            "another name, or delete it"
        ) from error


def _settled(rule: RankRule, merge: WeightedSum) -> tuple[RankRule, dict[str, int] | None]:
    """The rule by which each layer alone has its rank, or the ranks.

    Where the ranks of layers depend on each other, all spectra are taken in a pass of their own.
    """
    paid = rule.priced([merge.shape(name) for name in merge.names])
    if paid is not rule and paid.rank is not None:
        largest = max(merge.rank(name) for name in merge.names)
        return replace(paid, rank=min(paid.rank, largest)), None
    if rule.rank is not None or (rule.max_parameters is None and not rule.uniform):
        return rule, None
    spectra = {}
    for name in merge.names:
        factors = combined(merge.terms(name)).factors(rule.most)
        spectra[name] = Spectrum(factors.S, factors.norm, factors.shape)
    ranks, _ = rule.choose(spectra, least=1)
    if rule.uniform:
        return RankRule(rank=max(ranks.values()), uniform=True), None
    return rule, ranks


def _kept(
    name: str, rank_before: int, factors: LowRankFactors, rank: int, rounding: float
) -> KeptLayer:
    squares = factors.S.double().square()
    not_held = max(0.0, factors.norm**2 - squares.sum().item())
    lost = math.sqrt(not_held + squares[rank:].sum().item())
    return KeptLayer(name, factors.shape, rank_before, rank, factors.norm, lost, rounding)
