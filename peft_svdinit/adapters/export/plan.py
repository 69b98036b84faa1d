"""Which layers an exported adapter has, of which rank, and by which names PEFT finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ...factors import LowRankFactors
from ...models import exact_targets, is_chosen, linear_modules, refuse_unloadable_layers

# What keeps layers out of factors: `svdinit extract` has it as an option.
LEFT_OUT_OF_FACTORS = "give them rank 0, or make factors with --exclude_modules"
# Float32 rounding of a squared norm: triplets that miss less than this of it miss nothing.
_WHOLE = 1 - 1e-6


@dataclass(frozen=True)
class ExportPlan:
    """The shapes and ranks of an adapter, settled before anything is written.

    Attributes:
        shapes: (out, in) by module name, of all factors given.
        kept: triplets of each that the adapter keeps.
        stored: rank of each layer in the adapter, zeros included; a layer left out is missing.
    """

    shapes: dict[str, tuple[int, int]]
    kept: dict[str, int]
    stored: dict[str, int]

    @property
    def omitted(self) -> tuple[str, ...]:
        return tuple(name for name in self.kept if name not in self.stored)


def export_plan(
    factors: Mapping[str, LowRankFactors], ranks: int | Mapping[str, int], *, uniform: bool
) -> ExportPlan:
    """Read every layer once and settle its rank; see `export_adapter`.

    Raises:
        ValueError: if `ranks` does not fit the factors, a layer holds fewer triplets than asked
            for although its delta has more, or nothing is left to store.
    """
    asked = {name: ranks for name in factors} if isinstance(ranks, int) else dict(ranks)
    differing = asked.keys() ^ set(factors)
    if differing:
        raise ValueError(
            f"ranks must name the layers of the factors and no others; {min(differing)} is in one "
            "of the two only"
        )
    least = 1 if isinstance(ranks, int) else 0
    shapes, kept = {}, {}
    for name, layer in factors.items():
        if asked[name] < least:
            raise ValueError(f"ranks must be at least {least}, got {asked[name]} for layer {name}")
        shapes[name], kept[name] = layer.shape, _triplets_kept(name, layer, asked[name])
    stored = {name: rank for name, rank in kept.items() if rank}
    if not stored:
        raise ValueError(
            "factors: every delta is zero or gets rank 0; there is no adapter to write"
        )
    if uniform:
        largest, endings = max(stored.values()), {_ending(name) for name in stored}
        stored = {name: largest for name in kept if _ending(name) in endings}
    return ExportPlan(shapes, kept, stored)


def _triplets_kept(name: str, layer: LowRankFactors, asked: int) -> int:
    if not layer.norm or not asked:
        return 0
    possible = min(asked, *layer.shape)
    if possible > layer.rank and layer.energy() < _WHOLE:
        raise ValueError(
            f"rank {asked} is above the {layer.rank} triplets held for layer {name}, which miss "
            f"{layer.relative_error():.2%} of its delta; export a lower rank, or make factors of a "
            "higher one"
        )
    return min(possible, layer.rank)


def target_modules(plan: ExportPlan, skeleton: nn.Module | None) -> list[str]:
    """Names by which PEFT finds exactly the layers stored: short ones if they do, else full ones.

    Without the base model's skeleton there is nothing to try them on, and full ones are given.

    Raises:
        ValueError: if the base lacks a layer, has it of another shape, full names select more,
            or PEFT would not load an adapter of one, see `refuse_unloadable_layers`.
    """
    names = list(plan.stored)
    if skeleton is None:
        return names
    modules = linear_modules(skeleton, names)
    for name in names:
        module = modules.get(name)
        if module is None or (module.out_features, module.in_features) != plan.shapes[name]:
            raise ValueError(
                f"base: it has no linear layer {name} of shape {plan.shapes[name]} (out, in): not "
                "the base model of these factors?"
            )
    refuse_unloadable_layers(skeleton, names, LEFT_OUT_OF_FACTORS)
    targets = exact_targets(skeleton, names)
    if targets is None:
        chosen = set(names)
        others = {n for n, _ in skeleton.named_modules() if is_chosen(n, chosen)} - chosen
        raise ValueError(
            f"base: PEFT would adapt {min(others)} too, whose name ends in that of an adapted "
            "layer; leave that one out"
        )
    return targets


def _ending(name: str) -> str:
    return name.rpartition(".")[2]
