"""The weight under an adapter as one plain matrix, whatever holds it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files import WrongKind
from .sharding import gathered, whole

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BITSANDBYTES = ("Params4bit", "Int8Params")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is numbers of 16 bits or more as they are, not quantised."""
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    # torchao's and quanto's tensors say that they are of the dtype that they stand for.
    return (
        weight.dtype in _PLAIN
        and type(weight).__name__ not in _BITSANDBYTES
        and not hasattr(weight, "__tensor_flatten__")
    )


def dequantised_weight(module: nn.Module) -> Tensor:
    """The weight as the layer stores it, dequantised; no copy where it is not quantised nor split.

    Shards of FSDP2 are put together; those of ZeRO-3 must be `gathered`.

    bitsandbytes' own are dequantised without PEFT's `dequantize_module_weight`, which on the CPU
    replaces an 8-bit layer's weight by one that has lost its scales.

    Raises:
        RuntimeError: if bitsandbytes has repacked the weight. On CPUs with AVX512-BF16 the first
            forward pass in evaluation mode does so, after which it reads as other numbers.
    """
    # PEFT takes seconds to import, and imports what imports this module.
    from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight

    weight = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise RuntimeError(
            f"the weight of a {type(module).__name__} was repacked by bitsandbytes for inference "
            "and cannot be read any more; do this before the model is evaluated, or load it again"
        )
    if isinstance(weight, Tensor) and type(weight).__name__ in _BITSANDBYTES:
        return dequantize_bnb_weight(
            weight,  # pyright: ignore[reportArgumentType]
            state=getattr(module, "state", None),
        )
    return whole(dequantize_module_weight(module))


@torch.no_grad()
def base_weight(module: nn.Module, name: str, *, transposed: bool) -> Float[Tensor, "out in"]:
    """A float32 copy of a linear layer's weight: dequantised, gathered from shards, (out, in).

    Of a split weight all processes get it, and all must ask.

    Args:
        module: the linear layer itself, not PEFT's layer around it.
        name: how errors call it.
        transposed: whether the weight is stored as (in, out), as in GPT-2's Conv1D.

    Raises:
        RuntimeError: if the weight is on the meta device.
        TypeError: if it is stored in a form that cannot be read as numbers.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise WrongKind(
            f"layer {name}: a {type(module).__name__} has no weight that can be read; take factors "
            "from the model in 16 or 32 bits, save them and use them as svd_factors"
        )
    if weight.is_meta:
        raise RuntimeError(
            f"layer {name}: its weight is on the meta device, so there is nothing to factorise; "
            "load the model's weights first"
        )
    with gathered(module.parameters()):
        found = dequantised_weight(module)
        packed = isinstance(module, nn.Linear) and found.shape != (
            module.out_features,
            module.in_features,
        )
        if found.dim() != 2 or found.dtype not in _PLAIN or packed:
            raise WrongKind(
                f"layer {name}: a {type(module).__name__} with a weight of {found.dtype} cannot be "
                "dequantised here; take factors from the model in 16 or 32 bits, save them and use "
                "them as svd_factors"
            )
        matrix = found.detach().to(torch.float32, copy=True)
    return matrix.mT if transposed else matrix
