"""A LoRA layer that subtracts its initial product, so that any start preserves the function.

The forward pass is `base(x) + scaling (B A − B₀ A₀) x` with B₀, A₀ frozen copies of the initial
factors. The base weight stays untouched: disabling the adapter gives the base, and the whole is a
stock LoRA of twice the rank, [B | −B₀] [A ; A₀].
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.other import transpose
from torch import Tensor
from torch.nn.functional import linear

from ...models import whole_copy, whole_shape
from .parts import lora_linears

_BUFFERS = ("svd_reference_A", "svd_reference_B")


class ReferenceVariant(LoraVariant):
    """PEFT's hook for layers whose update is not plain B A."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        attach_reference(module, adapter_name)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        reference_A, reference_B = (
            part.to(x.dtype) for part in reference_of(module, active_adapter)
        )
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        # The same kernel as for `now`, so that the difference is exactly zero at the start.
        initial = linear(linear(x, reference_A), reference_B)
        return result + (now - initial) * module.scaling[active_adapter]


def attach_reference(module: LoraLayer, adapter_name: str) -> None:
    """Freeze copies of the adapter's present factors on the layer, and subtract their product."""
    factors = lora_linears(module, adapter_name)
    _attach(module, adapter_name, [whole_copy(factor.weight) for factor in factors])


def attach_zero_reference(module: LoraLayer, adapter_name: str) -> None:
    """Subtract nothing: for a layer whose update begins at zero, among others that do subtract."""
    weights = [factor.weight for factor in lora_linears(module, adapter_name)]
    # Not new_zeros, which makes split ones of split weights.
    _attach(
        module,
        adapter_name,
        [torch.zeros(whole_shape(each), dtype=each.dtype, device=each.device) for each in weights],
    )


def _attach(module: LoraLayer, adapter_name: str, reference: list[Tensor]) -> None:
    for name, factor in zip(_BUFFERS, reference, strict=True):
        if not hasattr(module, name):
            setattr(module, name, BufferDict(persistent=False))
            # PEFT moves and deletes what these names list along with the adapter.
            module.other_param_names = (*module.other_param_names, name)
        getattr(module, name)[adapter_name] = factor.detach()
    module.lora_variant[adapter_name] = ReferenceVariant()


def detach_reference(module: LoraLayer, adapter_name: str) -> None:
    """Drop the frozen copies of an adapter: its update is plain B A again."""
    for name in _BUFFERS:
        del getattr(module, name)[adapter_name]
    del module.lora_variant[adapter_name]


def reference_of(
    module: LoraLayer, adapter_name: str
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The frozen (A₀, B₀) of an adapter."""
    reference_A, reference_B = (getattr(module, name)[adapter_name] for name in _BUFFERS)
    return reference_A, reference_B


def _change(module: LoraLayer, adapter_name: str) -> Tensor:
    """scaling (B A − B₀ A₀) in the orientation of the base weight."""
    reference_A, reference_B = reference_of(module, adapter_name)
    initial = reference_B.float() @ reference_A.float()
    lora_A, lora_B = lora_linears(module, adapter_name)
    now = lora_B.weight.float() @ lora_A.weight.float()
    change = (now - initial) * module.scaling[adapter_name]
    return transpose(change, getattr(module, "fan_in_fan_out", False))


def stacked_factors(
    module: LoraLayer,
    adapter_name: str,
    lora_A: Float[Tensor, "rank in"],
    lora_B: Float[Tensor, "out rank"],
) -> tuple[Float[Tensor, "double in"], Float[Tensor, "out double"]]:
    """([A ; A₀], [B | −B₀]), whose product is B A − B₀ A₀."""
    reference_A, reference_B = reference_of(module, adapter_name)
    return (
        torch.cat([lora_A, reference_A.to(lora_A)]),
        torch.cat([lora_B, -reference_B.to(lora_B)], dim=1),
    )
