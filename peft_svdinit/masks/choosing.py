"""Choosing the entries of every B that are trained: exact counts, ties broken by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..models import module_types, natural_order
from .mask import LoriMask
from .ranked import Ranked
from .selection import Selection


def select(
    scores: Mapping[str, Float[Tensor, "out rank"]], selection: Selection
) -> dict[str, Bool[Tensor, "out rank"]]:
    """The entries of highest score, `density` of all entries, as one mask per matrix.

    Every group of the scope keeps exactly round(density · entries), halves up. Among equal scores
    the first in the order of layers, rows and columns is kept.

    Args:
        scores: one score ≥ 0 per entry of B, by module name.
        selection: how many of them, and which not.

    Raises:
        ValueError: for a budget of no entry, scores that are NaN, infinite, negative or zero
            everywhere, a layer of which no entry or less than the floor is kept, fewer entries left
            than the budget needs, or masks to exclude of other layers or shapes.
    """
    if not scores:
        raise ValueError("scores are empty: a mask needs at least one layer")
    density, scope, floor = selection.density, selection.scope, selection.floor
    names = sorted(scores, key=natural_order)
    for name in names:
        _check_scores(name, scores[name])
    if not any(scores[name].any() for name in names):
        raise ValueError(
            "scores are zero everywhere, which ranks nothing: was B trained at all? Calibrate with "
            "more steps or a higher learning rate, or take a random mask"
        )
    for mask in selection.exclude:
        _check_fits(mask, scores)
    # Of a model on several devices the scores are ranked on that of the first layer.
    device = scores[names[0]].device
    masks: dict[str, Tensor] = {}
    if scope == "row" or selection.period is not None:
        for name in names:
            usable = _usable(name, scores[name], selection.exclude).to(device)
            masks[name] = _kept_in_lines(name, usable, selection)
    else:
        for group in _groups(names, scope):
            ranked = Ranked({name: scores[name] for name in group}, selection.exclude, device)
            masks |= _kept_in_group(ranked, selection)
    for name in names:
        kept, least = int(masks[name].sum()), _at_least(masks[name].numel(), floor)
        if not kept:
            raise ValueError(
                f"layer {name} keeps no entry with scope={scope!r} and density={density}; set a "
                'floor, such as floor=0.01, or scope="matrix"'
            )
        if kept < least:
            raise ValueError(
                f"layer {name} keeps {kept} entries with scope={scope!r} and density={density}, "
                f"floor={floor} asks for {least}; lower it"
            )
    return masks


def _check_scores(name: str, scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError(f"layer {name}: scores have NaN or infinite entries")
    if (scores < 0).any():
        raise ValueError(f"layer {name}: scores must not be negative; give magnitudes")


def _check_fits(mask: LoriMask, scores: Mapping[str, Tensor]) -> None:
    other = scores.keys() ^ mask.layers.keys()
    if other:
        raise ValueError(
            f"exclude: layer {min(other)} is in one of the masks only; make both for the same "
            "model and target_modules"
        )
    for name, layer in mask.layers.items():
        if layer.mask.shape != scores[name].shape:
            raise ValueError(
                f"exclude: the mask of layer {name} is of shape {tuple(layer.mask.shape)}, its B "
                f"of shape {tuple(scores[name].shape)}; masks of one rank can be disjoint"
            )


def _usable(name: str, scores: Tensor, exclude: Sequence[LoriMask]) -> Float[Tensor, "out rank"]:
    """Float scores in which −1 stands for an entry that must not be kept."""
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    for mask in exclude:
        scores = scores.masked_fill(mask.layers[name].mask.to(scores.device), -1)
    return scores


def _groups(names: list[str], scope: str) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, group in groups_of(names, scope).items():
        groups.setdefault(group, []).append(name)
    return list(groups.values())


def groups_of(names: Iterable[str], scope: str) -> dict[str, str]:
    """Name to what a matrix shares its budget with: the model, its type, its block, or nothing."""
    if scope == "global":
        return dict.fromkeys(names, "")
    if scope == "type":
        return module_types(names)
    if scope == "layer":
        return {name: _block(name) for name in names}
    return {name: name for name in names}


def _block(name: str) -> str:
    """The name up to its first number; all of a name without one."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name


def _budget(size: int, density: float, what: str) -> int:
    """round(density · size), halves up.

    Raises:
        ValueError: if that is no entry.
    """
    count = int(density * size + 0.5)
    if count == 0:
        raise ValueError(
            f"density={density} keeps none of the {size} entries of {what}; raise the density or "
            "take a wider scope"
        )
    return count


def _at_least(size: int, floor: float) -> int:
    """floor · size, rounded up; 0.07 · 100, which float64 puts above 7, is 7."""
    return ceil(round(floor * size, 6))


def _kept_in_group(ranked: Ranked, selection: Selection) -> dict[str, Tensor]:
    density, scope, floor = selection.density, selection.scope, selection.floor
    masks, names = ranked.masks, list(ranked.masks)
    what = f"layer {names[0]}" if len(names) == 1 else f"a group of scope={scope!r}"
    count = _budget(sum(mask.numel() for mask in masks.values()), density, what)
    for name in names if floor else ():
        least = _at_least(masks[name].numel(), floor)
        ranked.keep_largest([name], least, f"layer {name}")
        count -= least
    if count < 0:
        raise ValueError(
            f"floor={floor} keeps {-count} entries more in {what} than density={density} does: it "
            "is rounded up in every matrix; lower it"
        )
    if count:
        ranked.keep_largest(names, count, what)
    return masks


def _kept_in_lines(name: str, scores: Tensor, selection: Selection) -> Tensor:
    """Each row, or each run of M entries of one, has a budget of its own."""
    if selection.period is None:
        count = _budget(scores.shape[1], selection.density, f"a row of layer {name}")
        return _largest_of_rows(scores, count, f"layer {name}")
    kept, period = selection.period
    if scores.shape[1] % period:
        raise ValueError(
            f"layer {name}: scope {kept}:{period} needs a rank that {period} divides, got "
            f"{scores.shape[1]}"
        )
    rows = scores.reshape(-1, period)
    return _largest_of_rows(rows, kept, f"layer {name}").reshape(scores.shape)


def _largest_of_rows(scores: Tensor, count: int, what: str) -> Bool[Tensor, "rows cols"]:
    free = int((scores >= 0).sum(1).min())
    if free < count:
        raise ValueError(
            f"{what} has rows with {free} entries left beside what is excluded, and each needs "
            f"{count}; lower the density, or exclude less"
        )
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
