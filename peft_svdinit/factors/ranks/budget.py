"""Which rank each layer deserves, under one budget for the whole model.

Triplet i of a layer costs out + in parameters and captures σ_i² of the energy. The most energy for
a budget is a knapsack problem. Its relaxation, in which one triplet may be taken in part, is solved
exactly by a threshold: take every triplet whose σ_i² / (out + in) is above some λ. Gains descend
within a layer while their cost is constant, so the threshold never skips a triplet of a layer, and
"the first r" is the same as "those above λ". Hence taking triplets in the order of σ² / (out + in)
is optimal at every point where it stops: no other ranks with as few parameters capture more. For
the budget itself, what is left over is less than the price of the next triplet, and the energy
missed is less than that triplet's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from ...models import exact_pattern
from ..spectrum import HasSpectrum, energy_not_held, share_to_lose, singular_values

Limit = Literal["energy", "budget", "max_rank", "held"]


@dataclass(frozen=True)
class RankRecommendation:
    """A rank for each layer, and what it buys.

    Attributes:
        ranks: by full module name.
        energy: share of Σ‖delta‖_F² captured, in [0, 1].
        parameters: Σ rank * (out + in), never above the budget.
        target: the share asked for, or None.
        max_parameters: the budget, or None.
        limit: what ended the growth: the energy target, the budget, `max_rank`, or that no held
            triplet was left.
        uniform_rank: the one rank that spends as many parameters on all layers; fractional, since
            a whole rank would spend fewer.
        uniform_energy: share captured by it, interpolated between its two whole neighbours.
        errors: predicted ‖delta - truncation‖_F / ‖delta‖_F of each layer at its rank, in [0, 1].
        error: the same of all layers together.
    """

    ranks: dict[str, int]
    energy: float
    parameters: int
    target: float | None
    max_parameters: int | None
    limit: Limit
    uniform_rank: float
    uniform_energy: float
    errors: dict[str, float]
    error: float

    @property
    def reached(self) -> bool | None:
        """Whether the energy target was met; None if there was none."""
        return None if self.target is None else self.limit == "energy"

    @property
    def rank(self) -> int:
        """The most frequent rank, for `r`; `rank_pattern` lists the layers that deviate."""
        counts = Counter(self.ranks.values())
        return min(counts, key=lambda rank: (-counts[rank], rank))

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's `rank_pattern` for the layers whose rank is not `rank`."""
        usual = self.rank
        return exact_pattern({name: rank for name, rank in self.ranks.items() if rank != usual})

    @property
    def alpha_pattern(self) -> dict[str, int]:
        """PEFT's `alpha_pattern`: alpha = rank, so that the scaling alpha / rank is 1 everywhere.

        A layer's learning dynamics then do not depend on the rank it was given. Not for rsLoRA,
        whose scaling is alpha / sqrt(rank).
        """
        return dict(self.rank_pattern)

    def config_options(self, *, scaling: float = 1.0, use_rslora: bool = False) -> dict[str, Any]:
        """Keyword arguments for `LoraConfig`: ranks, and alphas that give all layers one scaling.

        Args:
            scaling: the factor before B A in every layer, whatever its rank: alpha / rank, or
                alpha / √rank under rsLoRA.
            use_rslora: whether the adapter is one of rsLoRA (arXiv:2312.03732); the option is then
                among those returned.

        Returns:
            `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`; alphas are whole where they can be.
        """

        def alpha(rank: int) -> float:
            exact = scaling * (math.sqrt(rank) if use_rslora else rank)
            return int(exact) if exact == int(exact) else exact

        pattern = self.rank_pattern
        return {
            "r": self.rank,
            "lora_alpha": alpha(self.rank),
            "rank_pattern": pattern,
            "alpha_pattern": {key: alpha(rank) for key, rank in pattern.items()},
            **({"use_rslora": True} if use_rslora else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "target": self.target,
            "max_parameters": self.max_parameters,
            "reached": self.reached,
            "limit": self.limit,
            "energy": self.energy,
            "error": self.error,
            "parameters": self.parameters,
            "uniform_rank": self.uniform_rank,
            "uniform_energy": self.uniform_energy,
            "ranks": dict(self.ranks),
            "errors": dict(self.errors),
            "config": self.config_options(),
        }


def recommend_ranks(
    factors: Mapping[str, HasSpectrum],
    *,
    energy: float | None = None,
    max_parameters: int | None = None,
    max_rank: int | None = None,
    min_rank: int = 1,
) -> RankRecommendation:
    """The ranks that capture the most energy per parameter, up to a target, a budget or both.

    Growth starts at `min_rank` everywhere and ends at the energy target or at the first triplet
    that no longer fits the budget, whichever comes first. A triplet that does not fit is not
    passed over for a cheaper one: more budget then never lowers any layer's rank.

    Args:
        factors: of the deltas, or `Spectrum`s without singular vectors, by full module name. Before
            any training they may be those of gradients, or `relative_spectra` of inputs.
        energy: share of Σ‖delta‖_F² wanted, in (0, 1].
        max_parameters: the most that Σ rank * (out + in) may be.
        max_rank: upper bound for every layer; without it, the triplets held.
        min_rank: lower bound, at least 1 since PEFT has no rank 0; a layer that holds fewer
            triplets gets those it holds.

    Raises:
        ValueError: if neither a target nor a budget is given, if there is no layer, if a bound is
            out of range, or if the budget does not pay for `min_rank` everywhere.
    """
    if not factors:
        raise ValueError("factors must name at least one layer, got none")
    if energy is None and max_parameters is None:
        raise ValueError("energy or max_parameters must be given: without either nothing limits")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}; write 95 % as 0.95")
    if min_rank < 1:
        raise ValueError(
            f"min_rank must be at least 1, got {min_rank}; leave a layer out of target_modules "
            "to give it no adapter"
        )
    if max_rank is not None and max_rank < min_rank:
        raise ValueError(f"max_rank must be at least min_rank = {min_rank}, got {max_rank}")

    cost = {name: sum(layer.shape) for name, layer in factors.items()}
    squares = {
        name: [value * value for value in singular_values(name, layer)]
        for name, layer in factors.items()
    }
    total = math.fsum(layer.norm**2 for layer in factors.values())
    not_held = {name: energy_not_held(squares[name], layer.norm) for name, layer in factors.items()}

    ranks = {name: min(min_rank, len(held)) for name, held in squares.items()}
    parameters = sum(rank * cost[name] for name, rank in ranks.items())
    if max_parameters is not None and parameters > max_parameters:
        raise ValueError(
            f"max_parameters must be at least {parameters:,} to give all {len(factors)} layers "
            f"rank {min_rank}, got {max_parameters:,}; raise it or target fewer modules"
        )

    candidates = sorted(
        (
            (square / cost[name], name, square)
            for name, held in squares.items()
            for square in held[ranks[name] : max_rank]
            if square > 0
        ),
        key=lambda candidate: -candidate[0],
    )
    # Counted down from what is lost, so that holding everything reaches a target of 1.
    lost = math.fsum(not_held.values()) + math.fsum(
        square for name, held in squares.items() for square in held[ranks[name] :]
    )
    allowed = -math.inf if energy is None else share_to_lose(energy) * total
    limit: Limit = "held"
    if max_rank is not None and any(any(held[max_rank:]) for held in squares.values()):
        limit = "max_rank"
    if lost <= allowed:
        limit, candidates = "energy", []
    for _, name, square in candidates:
        if max_parameters is not None and parameters + cost[name] > max_parameters:
            limit = "budget"
            break
        ranks[name] += 1
        parameters += cost[name]
        lost -= square
        if lost <= allowed:
            limit = "energy"
            break

    uniform_rank, lost_uniformly = _uniform(squares, not_held, cost, parameters)
    lost_of = {
        name: not_held[name] + math.fsum(held[ranks[name] :]) for name, held in squares.items()
    }
    lost = math.fsum(lost_of.values())
    return RankRecommendation(
        ranks=ranks,
        energy=_share_kept(lost, total),
        parameters=parameters,
        target=energy,
        max_parameters=max_parameters,
        limit=limit,
        uniform_rank=uniform_rank,
        uniform_energy=_share_kept(lost_uniformly, total),
        errors={
            name: _relative_error(lost_of[name], layer.norm**2) for name, layer in factors.items()
        },
        error=_relative_error(lost, total),
    )


def _relative_error(lost: float, total: float) -> float:
    return min(1.0, math.sqrt(lost / total)) if total else 0.0


def _share_kept(lost: float, total: float) -> float:
    return min(1.0, max(0.0, 1.0 - lost / total)) if total else 1.0


def _uniform(
    squares: Mapping[str, list[float]],
    not_held: Mapping[str, float],
    cost: Mapping[str, int],
    parameters: int,
) -> tuple[float, float]:
    """(rank, energy lost) when every layer gets one rank and `parameters` are spent.

    A layer that holds fewer triplets than the rank is charged for those it holds.
    """
    deepest = max(map(len, squares.values()))
    price = [0] * deepest  # of raising the common rank from i to i + 1
    gain = [0.0] * deepest
    for name, held in squares.items():
        for index, square in enumerate(held):
            price[index] += cost[name]
            gain[index] += square
    everything = math.fsum(not_held.values()) + math.fsum(gain)
    spent = list(accumulate(price, initial=0))
    kept = list(accumulate(gain, initial=0.0))
    whole = max(rank for rank in range(deepest + 1) if spent[rank] <= parameters)
    if whole == deepest:
        return float(deepest), everything - kept[deepest]
    part = (parameters - spent[whole]) / price[whole]
    return whole + part, everything - kept[whole] - part * gain[whole]
