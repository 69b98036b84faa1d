"""DDP after the parameters of its module were replaced."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def check_reducer(wrapper: nn.Module) -> None:
    """Refuse a wrapper that `rebuild_reducer_` cannot serve.

    Raises:
        ValueError: naming its class or option, and the remedy.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        raise ValueError(
            f"several processes hold the model in a {type(wrapper).__name__}, whose parameters "
            "cannot be replaced in place; use DDP without torch_compile, or "
            "recipes/progressive_lowrank.py, which goes on in a new Trainer"
        )
    # PowerSGD's hook, say, keeps errors and matrices of each bucket.
    plain = (dist.ProcessGroup, type(None))
    keeps = any(not isinstance(state, plain) for _, state in wrapper._comm_hooks)
    if wrapper.mixed_precision is not None or wrapper._delay_all_reduce_params or keeps:
        raise ValueError(
            "DDP with mixed_precision, delay_all_reduce_named_params or a communication hook that "
            "keeps a state cannot follow a switch in place; leave that out, or use "
            "recipes/progressive_lowrank.py"
        )


def rebuild_reducer_(wrapper: DistributedDataParallel) -> None:
    """Let DDP reduce the gradients of the parameters that its module has now.

    The object stays, for a training loop holds it, and so do its options and the communication
    hooks that keep no state.
    Parameters and buffers are those of the first process afterwards. Without it the processes
    would go on apart, in silence where unused parameters are looked for. All processes take part.
    """
    hooks = list(wrapper._comm_hooks)
    options = _options(wrapper)
    wrapper._remove_autograd_hooks()
    training = wrapper.training
    DistributedDataParallel.__init__(wrapper, wrapper.module, **options)
    wrapper.training = training
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def _options(wrapper: DistributedDataParallel) -> dict[str, Any]:
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    names = (
        "device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
        "gradient_as_bucket_view", "static_graph", "skip_all_reduce_unused_params",
        "batched_grad_copy", "forward_sync_buffers",
    )  # fmt: skip
    found = {n: getattr(wrapper, n) for n in names if n in known and hasattr(wrapper, n)}
    if "forward_sync_buffers" not in found:
        found["broadcast_buffers"] = wrapper.broadcast_buffers
    if not getattr(wrapper, "bucket_bytes_cap_default", True):
        found["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return found


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Give all processes what the first one has."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
