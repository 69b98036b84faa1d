"""Reading adapters layer by layer, truncating each delta, writing the result."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from ...factors import LowRankFactors, RankTarget, Spectrum, SvdGuided, recommend_ranks
from ...files import write_json
from ..dtypes import DTYPES, Dtype
from ..formats.forms import LayerDelta
from ..formats.opening import open_adapter
from ..formats.peft_folder import write_peft_folder
from ..formats.single_file import write_single_file
from ..output_folder import RESIZE_REPORT, OutputFolder
from ..rounding import rounded, rounding_error
from ..weighted_sum import WeightedSum
from .record import Resized, ResizedLayer


def resize(
    adapters: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    target: RankTarget,
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

    Args:
        adapters: PEFT folders (LoRA, LoHa, LoKr), or files in one of the styles of kohya, LyCORIS
            and diffusers, all of one style.
        output: folder of a PEFT adapter, see `OutputFolder`, or a `.safetensors` file; the style is
            that of the input. An adapter that is there is replaced.
            diffusers' style has one rank for all layers, as if `target.uniform`.
        target: the ranks.
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
    merge = WeightedSum(adapters, weights)
    output = Path(output).expanduser()
    folder = _checked_folder(output, merge)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    style = merge.adapters[0].style
    uniform = target.uniform or (style is not None and not style.alpha_per_layer)

    with merge.opened() as read:
        rank_of, padded = _plan(target, uniform, merge, read)
        tensors, layers = {}, []
        for name in tqdm(merge.names, desc="Resizing", disable=not progress):
            factors = read(name).factors(padded or target.most)
            rank = min(rank_of(name, factors), factors.rank)
            stored = merge.dtype(name) if dtype is None else getattr(torch, dtype)
            tensors[name], rounding = _stored(name, factors.truncated(rank), stored, padded)
            layers.append(_measured(name, merge.rank(name), factors, rank, rounding))

    resized = Resized(
        output=output,
        adapters=tuple(os.fspath(adapter) for adapter in adapters),
        weights=merge.weights,
        target=target,
        dtypes=dict(Counter(str(A.dtype).removeprefix("torch.") for A, _ in tensors.values())),
        layers=tuple(layers),
        parameters_before=merge.parameters,
        parameters=sum(A.numel() + B.numel() for A, B in tensors.values()),
        only_in_some=merge.only_in_some(),
    )
    if folder is not None:
        with folder.replacing() as temporary:
            write_peft_folder(merge.adapters, temporary, tensors)
            write_json(temporary / RESIZE_REPORT, resized.as_dict())
    else:
        kernels = {name: merge.kernel(name) for name in merge.names}
        write_single_file(merge.adapters[0], output, tensors, kernels, resized.as_dict())
    return resized


def _checked_folder(output: Path, merge: WeightedSum) -> OutputFolder | None:
    """The folder to write, or None if `output` is to be a file, and may be."""
    single = merge.adapters[0].style is not None
    if single != (output.suffix == ".safetensors"):
        wanted = "a file that ends in .safetensors" if single else "a folder"
        raise ValueError(f"output must be {wanted}, as the input is, got {output}")
    inputs = [Path(path).expanduser() for path in merge.paths]
    inputs += [adapter.file.path for adapter in merge.adapters]
    if not single:
        return OutputFolder.checked(output, "output", inputs)
    if output.resolve() in {path.resolve() for path in inputs}:
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


def _plan(
    target: RankTarget, uniform: bool, merge: WeightedSum, read: Callable[[str], LayerDelta]
) -> tuple[Callable[[str, LowRankFactors], int], int | None]:
    """The rank of a layer from its factors, and the rank to pad to.

    Where the ranks of layers depend on each other, all spectra are taken in a pass of their own.
    """
    if target.rank is not None:
        return target.rank_of, target.rank if uniform else None
    if target.max_parameters is not None and uniform:
        price = sum(sum(merge.shape(name)) for name in merge.names)
        rank = target.max_parameters // price
        if rank < 1:
            raise ValueError(
                f"max_parameters must be at least {price:,} to give all {len(merge.names)} layers "
                f"rank 1, got {target.max_parameters:,}"
            )
        largest = max(merge.rank(name) for name in merge.names)
        rank = min(rank, largest, target.max_rank or rank)
        return lambda name, factors: rank, rank
    if target.max_parameters is None and not uniform:
        return target.rank_of, None

    spectra = {}
    for name in merge.names:
        factors = read(name).factors(target.most)
        spectra[name] = Spectrum(factors.S, factors.norm, factors.shape)
    if target.max_parameters is not None:
        ranks: Mapping[str, int] = recommend_ranks(
            spectra, max_parameters=target.max_parameters, max_rank=target.max_rank
        ).ranks
        return lambda name, factors: ranks[name], None
    rank = max(target.rank_of(name, spectrum) for name, spectrum in spectra.items())
    return lambda name, factors: rank, rank


def _stored(
    name: str, factors: LowRankFactors, dtype: torch.dtype, padded: int | None
) -> tuple[tuple[Tensor, Tensor], float]:
    """(lora_A, lora_B) as they are written, and the norm of what rounding changed."""
    init = SvdGuided()(factors, rank=factors.rank, scaling=1.0)
    try:
        stored = rounded(init, dtype)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    missing = (padded or factors.rank) - factors.rank
    lora_A = functional.pad(stored.lora_A, (0, 0, 0, missing))
    lora_B = functional.pad(stored.lora_B, (0, missing))
    return (lora_A.contiguous(), lora_B.contiguous()), rounding_error(init, stored)


def _measured(
    name: str, rank_before: int, factors: LowRankFactors, rank: int, rounding: float
) -> ResizedLayer:
    squares = factors.S.double().square()
    norm = factors.norm
    not_held = max(0.0, norm**2 - squares.sum().item())
    lost = not_held + squares[rank:].sum().item()
    truncation = math.sqrt(lost) / norm if norm else 0.0
    rounded = rounding / norm if norm else 0.0
    return ResizedLayer(
        name=name,
        shape=factors.shape,
        rank_before=rank_before,
        rank=rank,
        norm=norm,
        energy=max(0.0, 1 - truncation**2),
        truncation_error=truncation,
        rounding_error=rounded,
        relative_error=math.hypot(truncation, rounded),
    )
