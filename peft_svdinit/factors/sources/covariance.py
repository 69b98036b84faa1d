"""The covariance of the inputs of a layer, summed up as they come."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class InputCovariance:
    """Σ x xᵀ over rows, as they are or about their mean, in float32; no row is kept.

    A sum about the mean is taken about the first rows' mean and corrected at the end, so that a
    mean much larger than the deviations from it costs no digits.
    """

    def __init__(self, *, centred: bool) -> None:
        self.centred = centred
        self.count = 0
        self._shift: Tensor | None = None
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, rows: Float[Tensor, "tokens in"]) -> None:
        """Count further rows."""
        if not len(rows):
            return
        wide = rows.float()
        if self._products is None or self._sum is None or self._shift is None:
            size = wide.shape[1]
            self._shift = wide.mean(dim=0) if self.centred else wide.new_zeros(size)
            self._sum = torch.zeros(size, dtype=torch.float64, device=wide.device)
            self._products = wide.new_zeros(size, size)
        if self.centred:
            wide = wide - self._shift
        self._sum += wide.sum(dim=0, dtype=torch.float64)
        self._products.addmm_(wide.mT, wide)
        self.count += len(rows)

    def take(self) -> Float[Tensor, "in in"]:
        """The sum, divided by the number of rows; the memory goes with it.

        Raises:
            RuntimeError: if no row was counted.
        """
        if self._products is None or self._sum is None:
            raise RuntimeError("no rows were added to the covariance")
        products, self._products = self._products, None
        if self.centred:
            mean = (self._sum / self.count**0.5).float()
            products.addr_(mean, mean, alpha=-1)
        return products.div_(self.count)
