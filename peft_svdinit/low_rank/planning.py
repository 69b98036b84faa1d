"""From a rule to the plan for one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..factors import Spectrum, recommend_ranks
from ..linalg import (
    frobenius_norm,
    gram_matrix,
    rank_for_energy,
    stable_rank,
    svd_of_product,
    truncated_svd,
)
from ..models import is_chosen
from .candidates import Candidate, candidates, low_rank_layers
from .layer import LowRankLinear
from .plan import LowRankPlan, PlannedLayer
from .rule import KINDS, LowRankRule, ratio_for


def make_plan(model: nn.Module, rule: LowRankRule) -> LowRankPlan:
    """The layers of a dense model that `rule` switches, with their ranks; the others' reasons.

    Raises:
        ValueError: as `candidates` does, if no layer is cheaper at low rank, or if a budget does
            not pay for the least rank everywhere.
    """
    chosen, reasons = candidates(model, rule.target_modules, rule.exclude_modules)
    plan = _planned(chosen, reasons, rule)
    if not plan.layers:
        raise _nothing_cheaper(plan.dense)
    return plan


def plan_to_shrink(model: nn.Module, rule: LowRankRule) -> LowRankPlan:
    """Lower ranks for layers of low rank; those that the rule gives no lower one are left out.

    Raises:
        ValueError: if no layer that the rule is for is of low rank, or none would get a lower rank.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer of low rank that could be shrunk")
    chosen = {
        name: candidate
        for name, candidate in _low_candidates(model, rule).items()
        if layers[name].rank > rule.multiple_of
    }
    left = {name: "not chosen, or of the least rank" for name in layers.keys() - chosen.keys()}
    planned = _planned(chosen, left, rule)
    lower = {n: layer for n, layer in planned.layers.items() if layer.rank < layers[n].rank}
    if not lower:
        raise ValueError("no layer of low rank gets a lower rank by this rule")
    return LowRankPlan(lower, planned.dense)


def check_rule(model: nn.Module, rule: LowRankRule) -> list[str]:
    """The dense layers that a rule may switch, whatever the weights will be.

    Raises:
        ValueError: as `make_plan` does, if there are none or a budget is below the least.
    """
    if rule.ratio is not None:
        return list(make_plan(model, rule).layers)
    chosen, reasons = candidates(model, rule.target_modules, rule.exclude_modules)
    considered, dense = _considered(chosen, reasons, rule)
    if not considered:
        raise _nothing_cheaper(dense)
    _check_budget(considered, rule)
    return list(considered)


def check_names(model: nn.Module, rule: LowRankRule) -> None:
    """Refuse a rule that names layers which a dense model lacks.

    Raises:
        ValueError: naming them.
    """
    chosen, reasons = candidates(model, rule.target_modules, rule.exclude_modules)
    _check_ratios((*chosen, *reasons), rule)


def check_plan(model: nn.Module, plan: LowRankPlan) -> dict[str, Candidate]:
    """The dense layers of a plan, all of which the model has and can switch.

    Raises:
        ValueError: as `LowRankPlan.check` and `candidates` do.
    """
    plan.check(model)
    chosen, _ = candidates(model, list(plan.layers))
    return {name: chosen[name] for name in plan.layers}


def _check_ratios(names: Sequence[str], rule: LowRankRule) -> None:
    for key in rule.ratios:
        if key not in ("", *KINDS) and not any(is_chosen(name, [key]) for name in names):
            raise ValueError(
                f"ratio: no layer has the name {key!r} or one that ends so; name layers of the "
                f"model, or the kinds {' and '.join(KINDS)}"
            )


def _low_candidates(model: nn.Module, rule: LowRankRule) -> dict[str, Candidate]:
    """The low-rank layers that a rule is for."""
    return {
        name: Candidate(name, layer, (layer.out_features, layer.in_features))
        for name, layer in low_rank_layers(model).items()
        if rule.is_for(name)
    }


def _planned(
    chosen: Mapping[str, Candidate], reasons: Mapping[str, str], rule: LowRankRule
) -> LowRankPlan:
    _check_ratios((*chosen, *reasons), rule)
    considered, dense = _considered(chosen, reasons, rule)
    ranks = _budgeted(considered, rule) if rule.max_parameters is not None else {}
    for name, candidate in considered.items() if rule.max_parameters is None else ():
        rank = _rank(candidate, rule)
        if rank is None:
            dense[name] = "no key of ratio fits it"
        elif rank > _most(candidate, rule):
            dense[name] = (
                f"rank {rank} is above {_most(candidate, rule)}, from where low rank is not cheaper"
            )
        else:
            ranks[name] = rank
    return LowRankPlan(
        {name: PlannedLayer(ranks[name], chosen[name].shape) for name in ranks}, dense
    )


def _considered(
    chosen: Mapping[str, Candidate], reasons: Mapping[str, str], rule: LowRankRule
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The layers that are large enough, and the reasons of all others."""
    dense = dict(reasons)
    considered = {}
    for name, candidate in chosen.items():
        if candidate.size <= rule.min_size:
            dense[name] = f"in·out is {candidate.size:,}, not above min_size={rule.min_size:,}"
        elif _most(candidate, rule) < rule.multiple_of:
            dense[name] = f"too small for a rank of {rule.multiple_of} to be cheaper"
        else:
            considered[name] = candidate
    return considered, dense


def _nothing_cheaper(dense: Mapping[str, str]) -> ValueError:
    examples = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:4])
    return ValueError(f"no layer is cheaper at low rank by this rule: {examples}")


def _most(candidate: Candidate, rule: LowRankRule) -> int:
    """The highest rank that is cheap enough, in whole multiples."""
    # Rounding must not take a whole multiple from 0.7 * 240 / 7.
    highest = int(rule.max_share * candidate.break_even + 1e-9)
    return highest // rule.multiple_of * rule.multiple_of


def _rank(candidate: Candidate, rule: LowRankRule) -> int | None:
    """The rank by ratio, energy or stable rank, not yet bounded; None if no ratio is for it."""
    step = rule.multiple_of
    if rule.ratio is not None:
        ratio = ratio_for(candidate.name, rule.ratios)
        if ratio is None:
            return None
        # Rounding must not take from 0.3 * 80 a whole multiple.
        return max(step, int(ratio * min(candidate.shape) + 1e-9) // step * step)
    if rule.energy is not None:
        S, norm = singular_values_of(candidate)
        needed = rank_for_energy(S, norm, rule.energy)
        needed = min(candidate.shape) if needed is None else needed
    else:
        assert rule.stable_rank is not None
        needed = math.ceil(rule.stable_rank * stable_rank_of(candidate))
    return max(step, math.ceil(needed / step) * step)


def _check_budget(chosen: Mapping[str, Candidate], rule: LowRankRule) -> None:
    step = rule.multiple_of
    least = step * sum(sum(candidate.shape) for candidate in chosen.values())
    if rule.max_parameters is not None and rule.max_parameters < least:
        raise ValueError(
            f"max_parameters must be at least {least:,} to give all {len(chosen)} layers rank "
            f"{step}, got {rule.max_parameters:,}; raise it, or switch fewer layers"
        )


def _budgeted(chosen: Mapping[str, Candidate], rule: LowRankRule) -> dict[str, int]:
    """The ranks that keep the most energy for the budget.

    Triplets are dealt in blocks of `multiple_of`: the energies of consecutive blocks descend as
    those of triplets do, so that the exact rule for triplets is exact for blocks.
    """
    assert rule.max_parameters is not None
    if not chosen:
        return {}
    step = rule.multiple_of
    _check_budget(chosen, rule)
    blocks = {}
    for name, candidate in tqdm(chosen.items(), desc="Spectra", unit="layer", disable=None):
        S, norm = singular_values_of(candidate)
        held = S[: _most(candidate, rule)].double()
        per_block = torch.stack([part.norm() for part in held.split(step) if len(part) == step])
        blocks[name] = Spectrum(per_block, norm, candidate.shape)
    found = recommend_ranks(blocks, max_parameters=rule.max_parameters // step)
    return {name: step * rank for name, rank in found.ranks.items()}


@torch.no_grad()
def singular_values_of(candidate: Candidate) -> tuple[Tensor, float]:
    """All singular values of a layer's weight in float64, descending, and its Frobenius norm."""
    module = candidate.module
    if isinstance(module, LowRankLinear):
        svd = svd_of_product(module.left, module.Vh)
        return svd.S.double(), svd.norm
    weight = candidate.weight()
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    squares = torch.linalg.eigvalsh(gram_matrix(tall))
    return squares.clamp_min(0).sqrt().flip(0), frobenius_norm(weight)


@torch.no_grad()
def stable_rank_of(candidate: Candidate) -> float:
    """‖W‖_F²/‖W‖_2² of a layer's weight, at the cost of a few products."""
    if isinstance(candidate.module, LowRankLinear):
        S, norm = singular_values_of(candidate)
        return stable_rank(S, norm)
    svd = truncated_svd(candidate.weight(), 1)
    return stable_rank(svd.S, svd.norm)


def stable_ranks(model: nn.Module, rule: LowRankRule) -> dict[str, float]:
    """The stable rank of every layer that `rule` looks at; of low-rank ones once there are any."""
    if low_rank_layers(model):
        chosen = _low_candidates(model, rule)
    else:
        chosen, _ = candidates(model, rule.target_modules, rule.exclude_modules)
    return {
        name: stable_rank_of(candidate)
        for name, candidate in chosen.items()
        if candidate.size > rule.min_size
    }
