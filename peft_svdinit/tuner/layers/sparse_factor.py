"""A LoRA B of which only some entries are trained, and only those are a parameter.

Gradients, optimizer state, clipping, weight decay and the traffic between processes are those of
the trained entries, with any optimizer and under any wrapper: to them it is one vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class SparseFactor(nn.Module):
    """In the place of a linear layer without bias: y = x Bᵀ with B zero but for `values`.

    Args:
        mask: the trained entries.
        start: what B begins as; its entries off the mask never change. Zero by default.
        dtype, device: of the values.

    Raises:
        ValueError: if the mask keeps nothing.
    """

    values: nn.Parameter
    awaited_by: str | None = None
    """Name of the layer whose saved values have yet to be loaded; until then it does not compute.
    They come under the name `values`: a loader that looks for `weight` finds nothing to fill."""

    def __init__(
        self,
        mask: Bool[Tensor, "out rank"],
        start: Float[Tensor, "out rank"] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = mask.shape
        # No buffers: these would be broadcast at every step under DDP, and lost on the meta device.
        self.indices = mask.reshape(-1).nonzero().squeeze(1).to(device, torch.int32)
        self.frozen: Tensor | None = None
        if not len(self.indices):
            raise ValueError("mask keeps no entry")
        if start is None:
            values = torch.zeros(len(self.indices), dtype=dtype, device=device)
        else:
            entries = start.detach().to(device, dtype, copy=True).reshape(-1)
            values = entries[self.indices.long()]
            entries[self.indices.long()] = 0
            self.frozen = entries if entries.any() else None
        # Past register_parameter, which accelerate's init_empty_weights sends to the meta device.
        self._parameters["values"] = nn.Parameter(values)
        self._fingerprint = _fingerprint(self.indices, self.frozen)

    @property
    def weight(self) -> Float[Tensor, "out rank"]:
        """B as a dense matrix, through which gradients reach the values."""
        self._check_loaded()
        return _Scattered.apply(self.values, self.indices, self.frozen, self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, rank)."""
        return self.out_features, self.in_features

    @property
    def mask(self) -> Bool[Tensor, "out rank"]:
        """The trained entries."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.indices.device)
        mask.view(-1)[self.indices.long()] = True
        return mask

    def dense(self, values: Float[Tensor, " kept"]) -> Float[Tensor, "out rank"]:
        """B with `values` in the place of the module's own."""
        return _scattered(values, self.indices, self.frozen, self.shape)

    def sparse(self, weight: Float[Tensor, "out rank"]) -> Float[Tensor, " kept"]:
        """The trained entries of a dense B.

        Raises:
            ValueError: if the shape is another, or an entry off the mask is not what it is here.
        """
        if weight.shape != self.shape:
            raise ValueError(f"lora_B is of shape {tuple(weight.shape)}, expected {self.shape}")
        flat = weight.reshape(-1)
        values = flat.index_select(0, self.indices.to(flat.device))
        rest = flat.index_fill(0, self.indices.to(flat.device).long(), 0)
        expected = torch.zeros_like(rest) if self.frozen is None else self.frozen.to(rest.device)
        narrow = min(rest.dtype, expected.dtype, key=lambda dtype: dtype.itemsize)
        changed = int((rest.to(narrow) != expected.to(narrow)).sum())
        if changed:
            raise ValueError(f"lora_B has {changed} other entries off the mask than this adapter")
        return values

    def forward(self, x: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch out"]:
        self._check_loaded()
        return _SparseLinear.apply(x, self.values, self.indices, self.frozen, self.shape)

    def get_extra_state(self) -> Tensor:
        """What tells apart factors whose values mean other entries; part of every state dict."""
        return self._fingerprint

    def set_extra_state(self, state: Any) -> None:
        """Compare, since values of the same number fit any mask.

        Raises:
            ValueError: if the state dict is of a factor with another mask or another start.
        """
        if not torch.equal(state.cpu(), self._fingerprint):
            raise ValueError(
                "the state dict has the values of another mask, or of other entries off the mask; "
                "load it into a model of the lori_mask, lori_seed and lori_start it is from"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{prefix.removesuffix('.')}: {error}") from error
        if f"{prefix}values" in state_dict:
            self.awaited_by = None

    def _check_loaded(self) -> None:
        if self.awaited_by is not None:
            raise RuntimeError(
                f"layer {self.awaited_by}: the saved weights of this LoRI adapter were never "
                "loaded; load them with PeftModel.from_pretrained(base, folder, config=LoriConfig."
                "from_pretrained(folder)), load the folder as the stock LoRA it is, or set "
                "inference_mode=False in the configuration to train from the beginning"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseFactor:
        super()._apply(fn, recurse)
        if not self.values.is_meta:
            self.indices = self.indices.to(self.values.device)
            if self.frozen is not None:
                self.frozen = self.frozen.to(self.values.device)
        return self

    def extra_repr(self) -> str:
        size = self.out_features * self.in_features
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"trained={len(self.indices)} of {size}"
        )


def _fingerprint(indices: Tensor, frozen: Tensor | None) -> Tensor:
    """Eight bytes of a SHA-256, as a tensor: what every kind of checkpoint can hold."""
    digest = hashlib.sha256(indices.cpu().numpy().tobytes())
    if frozen is not None:
        digest.update(frozen.float().cpu().numpy().tobytes())
    return torch.tensor(list(digest.digest()[:8]), dtype=torch.uint8, device="cpu")


def _scattered(
    values: Tensor, indices: Tensor, frozen: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    if frozen is None:
        flat = values.new_zeros(shape[0] * shape[1])
    else:
        flat = frozen.to(values.device, values.dtype, copy=True)
    # The only in-place write that takes indices of 32 bits; the entries are zero before. Hooks that
    # offload layers move parameters alone.
    return flat.index_add_(0, indices.to(values.device), values).view(shape)


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        frozen: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(indices)
        return _scattered(values, indices, frozen, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        gradient = gradients[0].reshape(-1)
        return gradient.index_select(0, indices.to(gradient.device)), None, None, None


class _SparseLinear(torch.autograd.Function):
    """x Bᵀ that keeps the values for the backward pass and no dense B, nor its dense gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        frozen: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, values, indices, frozen)
        ctx.shape = shape
        return linear(x, _scattered(values.to(x.dtype), indices, frozen, shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices, frozen = ctx.saved_tensors
        gradient = gradients[0]
        for_x = for_values = None
        if ctx.needs_input_grad[0]:
            weight = _scattered(values.to(gradient.dtype), indices, frozen, ctx.shape)
            for_x = (gradient @ weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, ctx.shape[0])
            dense = rows.mT @ x.reshape(-1, ctx.shape[1]).to(gradient.dtype)
            kept = dense.reshape(-1).index_select(0, indices.to(dense.device))
            for_values = kept.to(values.dtype)
        return for_x, for_values, None, None, None
