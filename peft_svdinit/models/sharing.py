"""What the processes that a model is split between tell each other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from .sharding import is_dtensor, is_of_zero


def from_all_processes(model: nn.Module, value: Any) -> set[Any]:
    """The values of all processes that hold parts of the model; of this one if it is whole."""
    found = {value}
    for group in _groups(model):
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, found, group=group)
        found = set().union(*everywhere)
    return found


def from_first_process(model: nn.Module, value: Any) -> Any:
    """The value of the first process that holds a part of the model; this one's if it is whole."""
    held = [value]
    for group in _groups(model):
        dist.broadcast_object_list(held, group=group, group_src=0)
    return held[0]


def _groups(model: nn.Module) -> list[dist.ProcessGroup]:
    """Of the first parameter that is split: of each dimension of its mesh, or ZeRO-3's only one."""
    for parameter in model.parameters():
        if is_dtensor(parameter):
            return parameter.device_mesh.get_all_groups()
        if is_of_zero(parameter):
            return [parameter.ds_process_group]  # pyright: ignore[reportAttributeAccessIssue]
    return []
