"""Parameters split between processes: read whole, and overwritten by whole values.

DeepSpeed's ZeRO-3 leaves a parameter empty and gathers it on demand; FSDP2's `fully_shard` makes it
a DTensor. To read or write either is a collective: all processes do it, in the same order. Tensor
parallelism also makes DTensors, but splits the computation with them, and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..files import WrongKind

# To import DTensor and FSDP2 takes half a second, and what nobody has imported has made no tensor
# and no module yet.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_split(parameter: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return is_of_zero(parameter) or is_dtensor(parameter)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is one of torch's distributed tensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_of_zero(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has it, and it may be empty here."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Its shape when put together."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[Tensor], *, written: bool = False) -> Iterator[None]:
    """ZeRO-3's among the parameters are whole within; all others are left as they are.

    With `written`, all processes keep what the first one leaves in them; otherwise a change is
    lost.
    """
    away = [
        parameter
        for parameter in parameters
        if is_of_zero(parameter) and (written or _is_away(parameter))
    ]
    if not away:
        yield
        return
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters(away, modifier_rank=0 if written else None):
        yield


def _is_away(parameter: Tensor) -> bool:
    return parameter.ds_status.name != "AVAILABLE"  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor) -> Tensor:
    """A DTensor put together; any other as it is, ZeRO-3's within `gathered`."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def whole_copy(parameter: Tensor) -> Tensor:
    """A copy of a parameter, put together."""
    with gathered([parameter]):
        return whole(parameter.detach()).clone()


@torch.no_grad()
def overwrite_(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a whole value; that of the first process where they differ."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        given = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(given, parameter.device_mesh, parameter.placements))
        return
    with gathered([parameter], written=True):
        parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Put all parameters of FSDP2 back into their shards.

    After a forward pass the outermost module's are whole, in tensors of their own; what is written
    into these is lost.
    """
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def refuse_tensor_parallel(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise if a layer is split by tensor parallelism; splitting by FSDP2 alone is fine.

    PEFT, as earlier versions of transformers did, marks the modules that a plan splits. Otherwise
    a DTensor is FSDP2's if its module lies in an `FSDPModule`, and if it is split along the last
    dimension of its mesh and repeated along the others, as under HSDP; `fully_shard` on top of
    tensor parallelism splits along an earlier one. Parameters must be in their shards, see
    `reshard`.

    Args:
        model: the model that holds the layers.
        layers: linear layers by name, not PEFT's layers around them.

    Raises:
        TypeError: naming the layer.
    """
    under_fsdp = {
        id(parameter) for module in _fsdp_modules(model) for parameter in module.parameters()
    }
    for name, layer in layers.items():
        foreign = (
            is_dtensor(parameter)
            and not (id(parameter) in under_fsdp and _is_split_by_fsdp_alone(parameter))
            for parameter in layer.parameters(recurse=False)
        )
        if getattr(layer, "_hf_device_mesh", None) is not None or any(foreign):
            raise WrongKind(
                f"layer {name} is split by tensor parallelism, under which factors, SVD starts and "
                "LoRI do not work: load the base without a tensor-parallel plan (tp_plan, tp_size),"
                " or split it by ZeRO-3 or fully_shard instead"
            )


def _is_split_by_fsdp_alone(parameter: DTensor) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    *others, last = parameter.placements
    return type(last) is Shard and all(isinstance(each, Replicate) for each in others)
