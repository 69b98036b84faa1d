"""Which entries of every B are trained: exact counts, ties broken by position."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import ceil

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..models import module_types, natural_order

SCOPES = ("global", "type", "layer", "matrix", "row")
"""The scopes by name; "N:M" with numbers in place of the letters is the one beside them."""

_N_OF_M = re.compile(r"(\d+):(\d+)")


def select(
    scores: Mapping[str, Float[Tensor, "out rank"]],
    density: float,
    *,
    scope: str = "global",
    floor: float = 0.0,
    exclude: Mapping[str, Bool[Tensor, "out rank"]] | None = None,
) -> dict[str, Bool[Tensor, "out rank"]]:
    """The entries of highest score, `density` of all entries, as one mask per matrix.

    Every group of the scope keeps exactly round(density · entries), halves up. Among equal scores
    the first in the order of layers, rows and columns is kept.

    Args:
        scores: one score ≥ 0 per entry of B, by module name.
        density: share of the entries to keep, in (0, 1].
        scope: what shares one budget: "global" (all of the model, as the paper does), "type"
            (all q_proj, all v_proj, …, as `module_types` tells them apart), "layer" (all of a
            transformer block), "matrix", "row" (of one output), or "N:M": N of every M consecutive
            entries of a row.
        floor: share of every matrix that is kept whatever the other matrices score; counted within
            the budget.
        exclude: entries that must not be kept, such as another adapter's mask. Shares stay those of
            all entries.

    Raises:
        ValueError: for a density outside (0, 1], an unknown scope, a floor outside [0, density], a
            budget of no entry, scores that are NaN, infinite, negative or zero everywhere, a layer
            of which no entry or less than the floor is kept, fewer entries left than the budget
            needs, or entries to exclude of other layers or shapes.
    """
    check_density(density)
    check_floor(floor, density)
    if not scores:
        raise ValueError("scores are empty: a mask needs at least one layer")
    period = check_scope(scope, density)
    names = sorted(scores, key=natural_order)
    for name in names:
        _check_scores(name, scores[name])
    if not any(scores[name].any() for name in names):
        raise ValueError(
            "scores are zero everywhere, which ranks nothing: was B trained at all? Calibrate with "
            "more steps or a higher learning rate, or take a random mask"
        )
    unknown = sorted(set(exclude or ()) - scores.keys(), key=natural_order)
    if unknown:
        raise ValueError(f"exclude: there is no layer {unknown[0]} to choose entries of")
    # Of a model on several devices the scores are ranked on that of the first layer.
    device = scores[names[0]].device
    usable = {name: _usable(name, scores[name], exclude).to(device) for name in names}
    if period is not None:
        masks = {name: _kept_in_periods(name, usable[name], *period) for name in names}
    elif scope == "row":
        masks = {name: _kept_in_rows(name, usable[name], density) for name in names}
    else:
        masks = {}
        for group in _groups(names, scope):
            masks |= _kept_in_group({name: usable[name] for name in group}, density, floor, scope)
    for name in names:
        if not masks[name].any():
            raise ValueError(
                f"layer {name} keeps no entry with scope={scope!r} and density={density}; set a "
                'floor, such as floor=0.01, or scope="matrix"'
            )
        kept, least = int(masks[name].sum()), _at_least(masks[name].numel(), floor)
        if kept < least:
            raise ValueError(
                f"layer {name} keeps {kept} entries with scope={scope!r} and density={density}, "
                f"floor={floor} asks for {least}; lower it"
            )
    return masks


def check_density(density: float) -> None:
    """Raise ValueError unless `density` is a share of which something is kept."""
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], got {density}; it is the share of B that is trained"
        )


def check_floor(floor: float, density: float) -> None:
    """Raise ValueError unless every matrix can keep the share `floor` within `density`."""
    if not 0 <= floor <= density:
        raise ValueError(f"floor must be in [0, density={density}], got {floor}")


def check_scope(scope: str, density: float) -> tuple[int, int] | None:
    """(N, M) of a scope "N:M", None of the others.

    Raises:
        ValueError: for an unknown scope, or one that means another density.
    """
    if scope in SCOPES:
        return None
    if not isinstance(scope, str):
        raise ValueError(f'scope must be text, got {scope!r}; in YAML write "2:4" with the quotes')
    parts = _N_OF_M.fullmatch(scope)
    if parts is None:
        raise ValueError(
            f'scope must be one of {", ".join(SCOPES)}, or "N:M" such as "1:8"; got {scope!r}'
        )
    kept, period = int(parts[1]), int(parts[2])
    if not 1 <= kept <= period:
        raise ValueError(f'scope "N:M" needs 1 <= N <= M, got {scope!r}')
    if abs(density - kept / period) > 1e-9:
        raise ValueError(
            f"scope={scope!r} keeps {kept / period:g} of the entries, but density is {density}; "
            f"set density={kept / period:g}"
        )
    return kept, period


def _check_scores(name: str, scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError(f"layer {name}: scores have NaN or infinite entries")
    if (scores < 0).any():
        raise ValueError(f"layer {name}: scores must not be negative; give magnitudes")


def _usable(
    name: str, scores: Tensor, exclude: Mapping[str, Tensor] | None
) -> Float[Tensor, "out rank"]:
    """Float scores in which −1 stands for an entry that must not be kept."""
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    if exclude is None or name not in exclude:
        return scores
    if exclude[name].shape != scores.shape:
        raise ValueError(
            f"exclude: the mask of layer {name} is of shape {tuple(exclude[name].shape)}, its "
            f"scores of shape {tuple(scores.shape)}; exclude masks of the same rank and model"
        )
    return scores.masked_fill(exclude[name].to(scores.device), -1)


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


def budget(size: int, density: float, what: str) -> int:
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


def _kept_in_group(
    scores: dict[str, Tensor], density: float, floor: float, scope: str
) -> dict[str, Tensor]:
    flat = torch.cat([matrix.reshape(-1) for matrix in scores.values()])
    what = f"layer {next(iter(scores))}" if len(scores) == 1 else f"a group of scope={scope!r}"
    count = budget(len(flat), density, what)
    kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    sizes = [matrix.numel() for matrix in scores.values()]
    if floor:
        start = 0
        for name, size in zip(scores, sizes, strict=True):
            part = slice(start, start + size)
            kept[part] = _largest(flat[part], _at_least(size, floor), f"layer {name}")
            start += size
    count -= int(kept.sum())
    if count < 0:
        raise ValueError(
            f"floor={floor} keeps {-count} entries more in {what} than density={density} does: it "
            "is rounded up in every matrix; lower it"
        )
    if count:
        kept |= _largest(flat.masked_fill(kept, -1), count, what)
    return {
        name: part.reshape(scores[name].shape)
        for name, part in zip(scores, kept.split(sizes), strict=True)
    }


def _largest(scores: Float[Tensor, " n"], count: int, what: str) -> Bool[Tensor, " n"]:
    """The `count` highest scores that are no −1; of those equal to the last, the first ones."""
    free = int((scores >= 0).sum())
    if free < count:
        raise ValueError(
            f"{what} has {free} entries left beside what is excluded, and needs {count}; lower the "
            "density, or exclude less"
        )
    threshold = scores.topk(count, sorted=False).values.min()
    above = scores > threshold
    ties = scores == threshold
    missing = count - int(above.sum())
    return above | (ties & (ties.cumsum(0) <= missing))


def _kept_in_rows(name: str, scores: Float[Tensor, "out rank"], density: float) -> Tensor:
    count = budget(scores.shape[1], density, f"a row of layer {name}")
    return _largest_of_rows(scores, count, f"layer {name}")


def _kept_in_periods(name: str, scores: Tensor, kept: int, period: int) -> Tensor:
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
