"""LoRA weights from the SVD of a delta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .low_rank import LowRankFactors

Start = Literal["delta", "subspace", "reference"]
Split = Literal["output", "balanced"]
STARTS: tuple[Start, ...] = get_args(Start)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class LoraInit:
    """Initial weights of one LoRA layer, whose update is `scaling * lora_B @ lora_A`."""

    lora_A: Float[Tensor, "rank in"]
    lora_B: Float[Tensor, "out rank"]
    subtract_initial: bool
    """Whether the forward pass subtracts the initial product, so that the start changes nothing."""


@dataclass(frozen=True)
class SvdGuided:
    """Start an adapter from the leading `rank` triplets of a delta U S Vᵀ.

    Attributes:
        start: "delta" begins at the truncated delta; "subspace" takes the right singular vectors
            for A and zero for B, so that directions are inherited and progress is not;
            "reference" begins at the factors with their initial product subtracted in the forward
            pass, so that the function is preserved and both factors receive gradients at once.
        split: "output" puts the singular values into B (B = U S / scaling, A = Vᵀ); "balanced"
            shares their square root (B = U √(S / scaling), A = √(S / scaling) Vᵀ). Of "subspace"
            both give A = Vᵀ.
    """

    start: Start = "delta"
    split: Split = "output"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"svd_start must be one of {', '.join(STARTS)}, got {self.start!r}")
        if self.split not in SPLITS:
            raise ValueError(f"svd_split must be one of {', '.join(SPLITS)}, got {self.split!r}")

    def __call__(self, factors: LowRankFactors, *, rank: int, scaling: float) -> LoraInit:
        """LoRA weights of rank `rank` in float32.

        Raises:
            ValueError: if fewer than `rank` triplets are held, or `scaling` is not positive and
                finite, or the factors are directions alone (U = 0) and `start` is no "subspace".
        """
        if not 0 < scaling < math.inf:
            raise ValueError(f"scaling must be positive and finite, got {scaling}")
        held = factors.truncated(rank)
        U, S, Vh = held.U.float(), held.S.float(), held.Vh.float()
        if self.start != "subspace" and not U.any() and S.any():
            raise ValueError(
                f"svd_start={self.start!r}: these factors are directions of inputs without a delta "
                '(U is zero); use svd_start="subspace"'
            )
        if self.start == "subspace":
            return LoraInit(Vh.clone(), torch.zeros_like(U), subtract_initial=False)
        weight_B, weight_A = S / scaling, torch.ones_like(S)
        if self.split == "balanced":
            # A direction with S = 0 would have a zero row and a zero column and never train.
            alive = S > torch.finfo(S.dtype).eps * S[0]
            root = weight_B.sqrt()
            weight_B, weight_A = root * alive, torch.where(alive, root, weight_A)
        return LoraInit(weight_A[:, None] * Vh, U * weight_B, self.start == "reference")
