"""What a training needs of a device's memory, from the model on the meta device alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from .optimizer_state import optimizer_bytes
from .skeleton import QuantisedLinear
from .step_memory import step_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, and on the disk. All but `step` and `evaluation` are exact.

    Attributes:
        frozen: weights that are not trained, and buffers.
        trained: weights that are: the adapter's, or all.
        trained_parameters: their number, on all devices together.
        gradients: of the trained weights, in their type.
        optimizer: state of the optimizer, and under ZeRO the float32 copies of half-precision
            weights that it updates.
        buckets: gradients as DDP exchanges them.
        step: the peak of a forward and backward pass on top of these, see `step_bytes`; None where
            it is not known.
        evaluation: that of an evaluation, likewise.
        saved: the trained weights of all devices on the disk.
        checkpoint: these and the optimizer's state.
        host: what is offloaded to the memory of the host, for each device.
    """

    frozen: int
    trained: int
    trained_parameters: int
    gradients: int
    optimizer: int
    buckets: int
    step: int | None
    evaluation: int | None
    saved: int
    checkpoint: int
    host: int = 0

    @property
    def fixed(self) -> int:
        """What is there in every step, from its begin to its end."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.buckets

    @property
    def total(self) -> int:
        """The peak, as far as it is known."""
        return self.fixed + max(self.step or 0, self.evaluation or 0)


def estimate_memory(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    optim: str,
    eval_batch_size: int | None = None,
    autocast: torch.dtype | None = None,
    devices: int = 1,
    zero_stage: int = 0,
) -> MemoryEstimate:
    """What training `model` needs on each device.

    ZeRO divides by the number of devices what its stage says (arXiv:1910.02054, figure 1):
    1 the optimizer's state, 2 gradients too, 3 weights too. Its buffers, and the layer that stage 3
    has gathered, come on top, and so do the device's context and fragmentation.

    Args:
        model: as `step_bytes` takes it; linear layers held in 4 or 8 bits as `QuantisedLinear`.
        batch_size: examples per device and forward pass.
        length: tokens of each example.
        optim: name of the optimizer in `TrainingArguments`.
        eval_batch_size: examples per device in an evaluation; None without one.
        autocast: type of mixed precision.
        devices: number of processes, one per device.
        zero_stage: 0 for one device or DDP.

    Raises:
        ValueError: for an optimizer or a stage that is not known, or fewer than one device.
    """
    if zero_stage not in range(4) or devices < 1:
        raise ValueError(
            "zero_stage must be in 0..3 and devices at least 1, got "
            f"zero_stage={zero_stage} and devices={devices}"
        )
    weights = list(model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    trained_bytes = sum(weight.nbytes for weight in trained)
    frozen_bytes = sum(tensor.nbytes for tensor in chain(weights, model.buffers()))
    frozen_bytes -= trained_bytes
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            frozen_bytes += module.stored_bytes - module.weight.nbytes
    optimizer = optimizer_bytes(model, optim)
    if zero_stage:
        # DeepSpeed trains half-precision weights by float32 copies, which the moments follow.
        half = sum(weight.numel() for weight in trained if weight.itemsize == 2)
        optimizer += 4 * half + (4 * half if optim.startswith("adamw_torch") else 0)
    share = [devices if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    sizes = {"length": length, "autocast": autocast}
    return MemoryEstimate(
        frozen=frozen_bytes // share[2],
        trained=trained_bytes // share[2],
        trained_parameters=sum(weight.numel() for weight in trained),
        gradients=trained_bytes // share[1],
        optimizer=optimizer // share[0],
        buckets=trained_bytes if devices > 1 and not zero_stage else 0,
        step=step_bytes(model, batch_size=batch_size, **sizes),
        evaluation=step_bytes(model, batch_size=eval_batch_size, backward=False, **sizes)
        if eval_batch_size
        else 0,
        saved=trained_bytes,
        checkpoint=trained_bytes + optimizer,
    )
