"""The ways to merge, and which options belong to which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Method = Literal[
    "cat",
    "shared",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]
METHODS: tuple[Method, ...] = get_args(Method)
MAJORITY_SIGNS: tuple[MajoritySign, ...] = get_args(MajoritySign)
_OURS = ("cat", "shared", "svd")


@dataclass(frozen=True)
class MergeMethod:
    """How deltas wᵢ sᵢ Bᵢ Aᵢ become one, w the weights and s the scalings.

    - "cat": A = [wᵢ sᵢ Aᵢ] stacked, B = [Bᵢ] side by side. Exact; the ranks add up.
    - "shared": A as it is and B = Σ wᵢ sᵢ Bᵢ, where all adapters have one A, as LoRI's may. Exact,
      at the rank of one adapter.
    - "svd": the best approximation of the exact sum at `rank`, by the QR core of its factors.
    - "linear", "magnitude_prune", "ties" (arXiv:2306.01708), "dare_linear" and "dare_ties"
      (arXiv:2311.03099): PEFT's `add_weighted_adapter`, which treats A and B apart, each with
      √(wᵢ sᵢ). Their product has the cross terms Bᵢ Aⱼ too: of n orthogonal deltas of one size
      "linear" is off by about √(n − 1) of the exact sum, and with one A and equal weights it is n
      times the exact sum.
    - the same with "_svd": PEFT prunes and adds up dense deltas, then truncates them to `rank`.
      A dense SVD per layer.

    Attributes:
        rank: of the result; for "svd" and the methods that end in "_svd".
        density: share of entries that pruning keeps, in (0, 1].
        majority_sign_method: how "ties" elects a sign: by the sum of the entries ("total", the
            default) or by the number of adapters ("frequency").
        seed: of what "dare" drops, 0 by default; each layer draws from a seed of its own.
    """

    name: Method = "cat"
    rank: int | None = None
    density: float | None = None
    majority_sign_method: MajoritySign | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.name!r}")
        for option, belongs, to in (
            ("rank", self.truncates, "svd and the methods that end in _svd"),
            ("density", self.prunes, "ties, dare and magnitude_prune"),
            ("majority_sign_method", self.elects_signs, "ties and dare_ties"),
            ("seed", self.draws, "dare"),
        ):
            if getattr(self, option) is not None and not belongs:
                raise ValueError(f"{option} is for {to}; leave it out with method {self.name}")
        if self.truncates and self.rank is None:
            raise ValueError(f"method {self.name} needs rank, that of the merged adapter")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.prunes and self.density is None:
            raise ValueError(f"method {self.name} needs density, the share of entries to keep")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.majority_sign_method not in (None, *MAJORITY_SIGNS):
            raise ValueError(
                f"majority_sign_method must be one of {', '.join(MAJORITY_SIGNS)}, got "
                f"{self.majority_sign_method!r}"
            )

    @property
    def through_peft(self) -> bool:
        """Whether PEFT's `add_weighted_adapter` does it."""
        return self.name not in _OURS

    @property
    def truncates(self) -> bool:
        return self.name.endswith("svd")

    @property
    def prunes(self) -> bool:
        return any(part in self.name for part in ("ties", "dare", "magnitude_prune"))

    @property
    def elects_signs(self) -> bool:
        return "ties" in self.name

    @property
    def draws(self) -> bool:
        return "dare" in self.name
