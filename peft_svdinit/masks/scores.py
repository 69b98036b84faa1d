"""How much each entry of B matters: the scores that a mask is chosen by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..factors import LowRankFactors
from ..models import layer_seed

Scores = dict[str, Float[Tensor, "out rank"]]


def random_scores(shapes: Mapping[str, tuple[int, int]], seed: int) -> Scores:
    """Scores that choose at random, the same for a seed and a layer's name.

    Args:
        shapes: (out, rank) of every B by module name.
        seed: of the whole mask.
    """
    scores = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(layer_seed(seed, f"mask:{name}"))
        scores[name] = torch.rand(shape, generator=generator)
    return scores


def magnitude_scores(trained: Mapping[str, Float[Tensor, "out rank"]]) -> Scores:
    """|B| after a calibration run (arXiv 2504.07448, section 3.2)."""
    return {name: lora_B.detach().abs() for name, lora_B in trained.items()}


class GradientScores:
    """|B ⊙ gradient| or |gradient| of batches, added up while they come.

    The first is how much the loss changes, to first order, if an entry is set to zero, batch by
    batch; it needs a trained B. The second is of the sum over batches: where one step of gradient
    descent would move B most, with no training before.

    Args:
        weighted: multiply by B.
    """

    def __init__(self, *, weighted: bool) -> None:
        self.weighted = weighted
        self.sums: Scores = {}

    @torch.no_grad()
    def add(
        self,
        lora_B: Mapping[str, Float[Tensor, "out rank"]],
        gradients: Mapping[str, Float[Tensor, "out rank"]],
    ) -> None:
        """Take one batch in, both by module name."""
        for name, gradient in gradients.items():
            # In float16 the product of two small numbers is zero.
            part = gradient.to(torch.float32, copy=True)
            if self.weighted:
                part.mul_(lora_B[name]).abs_()
            if name in self.sums:
                self.sums[name] += part
            else:
                self.sums[name] = part

    def scores(self) -> Scores:
        """The scores of all batches so far.

        Raises:
            RuntimeError: if there was none.
        """
        if not self.sums:
            raise RuntimeError("no batch was added: the gradients of lora_B were never seen")
        return {name: total.abs() for name, total in self.sums.items()}


def teacher_scores(
    factors: Mapping[str, LowRankFactors], projections: Mapping[str, Float[Tensor, "rank in"]]
) -> Scores:
    """|B| of the best B for a teacher's delta over the given A, without any training.

    B minimises ‖delta − B A‖_F: B = delta A⁺ with the pseudoinverse A⁺, which is Aᵀ (A Aᵀ)⁻¹ unless
    the rank is above the inputs; delta = U diag(S) Vᵀ is never formed. The scaling of the adapter
    changes no order within a model that has one.

    Args:
        factors: of the teacher's deltas, by module name.
        projections: A of every layer to mask.

    Raises:
        ValueError: if a layer has no factors, or its A is for another input size.
    """
    scores = {}
    for name, lora_A in projections.items():
        if name not in factors:
            raise ValueError(
                f"factors have no layer {name}; make them for the same target_modules as the mask"
            )
        layer, wide = factors[name], lora_A.double()
        if layer.shape[1] != wide.shape[1]:
            raise ValueError(
                f"layer {name}: the factors are of a delta with {layer.shape[1]} inputs, its A has "
                f"{wide.shape[1]}: factors of another model?"
            )
        right = layer.S.double().unsqueeze(1) * (layer.Vh.double() @ torch.linalg.pinv(wide))
        scores[name] = (layer.U.double() @ right).abs().float()
    return scores
