"""How many entries of every B a mask keeps, and where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .mask import LoriMask

SCOPES = ("global", "type", "layer", "matrix", "row")
"""The scopes by name; "N:M" with numbers in place of the letters is the one beside them."""

_N_OF_M = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Selection:
    """The entries of highest score that `select` keeps.

    Attributes:
        density: share of the entries to keep, in (0, 1].
        scope: what shares one budget: "global" (all of the model, as the paper does), "type"
            (all q_proj, all v_proj, …, as `module_types` tells them apart), "layer" (all of a
            transformer block), "matrix", "row" (of one output), or "N:M": N of every M consecutive
            entries of a row.
        floor: share of every matrix that is kept whatever the other matrices score; counted within
            the budget.
        exclude: masks of other adapters with the same A, none of whose entries is taken. Shares
            stay those of all entries.

    Raises:
        ValueError: for a density outside (0, 1], an unknown scope or one that means another
            density, or a floor outside [0, density]. The message begins with the attribute.
        TypeError: for a density or floor that is no number.
    """

    density: float = 0.1
    scope: str = "global"
    floor: float = 0.0
    exclude: Sequence[LoriMask] = ()

    def __post_init__(self) -> None:
        for name in ("density", "floor"):
            value: Any = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 < self.density <= 1:
            raise ValueError(
                f"density must be in (0, 1], got {self.density}; it is the share of B that is "
                "trained"
            )
        if not 0 <= self.floor <= self.density:
            raise ValueError(f"floor must be in [0, density={self.density}], got {self.floor}")
        self._check_scope()

    def _check_scope(self) -> None:
        scope: Any = self.scope
        if scope in SCOPES:
            return
        if not isinstance(scope, str):
            raise ValueError(
                f'scope must be text, got {scope!r}; in YAML write "2:4" with the quotes'
            )
        period = self.period
        if period is None:
            raise ValueError(
                f'scope must be one of {", ".join(SCOPES)}, or "N:M" such as "1:8"; got {scope!r}'
            )
        kept, size = period
        if not 1 <= kept <= size:
            raise ValueError(f'scope "N:M" needs 1 <= N <= M, got {scope!r}')
        if abs(self.density - kept / size) > 1e-9:
            raise ValueError(
                f"scope={scope!r} keeps {kept / size:g} of the entries, but density is "
                f"{self.density}; set density={kept / size:g}"
            )

    @property
    def period(self) -> tuple[int, int] | None:
        """(N, M) of a scope "N:M", None of the others."""
        parts = _N_OF_M.fullmatch(self.scope)
        return None if parts is None else (int(parts[1]), int(parts[2]))
