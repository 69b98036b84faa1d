"""LoRA-GA (arXiv:2407.05000): A and B from different triplets of one gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from ...linalg import frobenius_norm
from ..low_rank import LowRankFactors

GaForm = Literal["paper", "peft"]
GA_FORMS: tuple[GaForm, ...] = get_args(GaForm)


def lora_ga_factors(
    gradients: Mapping[str, LowRankFactors],
    *,
    rank: int | Mapping[str, int],
    scaling: float,
    gamma: float = 16.0,
    form: GaForm = "paper",
) -> dict[str, LowRankFactors]:
    """The products that LoRA-GA starts from and subtracts; for start="reference".

    A takes V_1 … V_r and B takes U_{r+1} … U_{2r}. "paper" (its equation for stable scale): both
    times out^¼ / √γ, which split="balanced" gives. "peft" does as PEFT's `lora_ga` with
    scale="stable": the singular values and out^¼ / √γ on B, none on A, which split="output" gives;
    as gradients are small, this is close to B = 0.

    Args:
        gradients: as `gradient_factors` gives them, of 2 `rank` triplets.
        rank: that of the adapter, or of each of its layers.
        scaling: that of the adapter (alpha / r, or alpha / √r under rsLoRA).
        gamma: γ of the stable scale.
        form: see above.

    Raises:
        ValueError: if `form` is unknown, `gamma` or `scaling` not positive, or a layer has fewer
            than 2 `rank` triplets.
    """
    if form not in GA_FORMS:
        raise ValueError(f"form must be one of {', '.join(GA_FORMS)}, got {form!r}")
    ranks = dict.fromkeys(gradients, rank) if isinstance(rank, int) else rank
    least = min(ranks.values(), default=1)
    if not (gamma > 0 and scaling > 0 and least >= 1):
        raise ValueError(
            f"rank, scaling and gamma must be positive, got {least}, {scaling} and {gamma}"
        )
    factors = {}
    for name, gradient in gradients.items():
        rank = ranks[name]
        if gradient.rank < 2 * rank:
            raise ValueError(
                f"layer {name}: LoRA-GA of rank {rank} needs {2 * rank} triplets of the gradient, "
                f"and {gradient.rank} are held; call gradient_factors with rank={2 * rank} or "
                "lower the adapter's"
            )
        stable = gradient.shape[0] ** 0.25 / gamma**0.5
        U, Vh = gradient.U[:, rank : 2 * rank], gradient.Vh[:rank]
        if form == "paper":
            S = torch.full_like(gradient.S[:rank], scaling * stable**2)
        else:
            S = gradient.S[rank : 2 * rank] * (scaling * stable)
        factors[name] = LowRankFactors(U, S, Vh, frobenius_norm(S))
    return factors
