"""What a training truly runs as, which is not always what its launcher was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import Trainer

_NO_WRAPPER = "none"
_FSDP = ("FSDPModule", "FullyShardedDataParallel")
WRAPPERS = ("DistributedDataParallel", "DeepSpeedEngine", *_FSDP, "DataParallel", _NO_WRAPPER)
# Of FSDP1's strategies those that leave weights whole, or gather them once a step.
_STAGES = {"NO_SHARD": 0, "SHARD_GRAD_OP": 2, "_HYBRID_SHARD_ZERO2": 2}


class NotAsExpected(ValueError):
    """A training that runs as something else than was asked for."""


@dataclass(frozen=True)
class RunsAs:
    """One process's part in a training.

    Attributes:
        processes: that train together.
        wrapper: class of the module around the model, `FSDPModule` for FSDP2, or "none".
        stage: what is split among processes, in ZeRO's terms: 0 nothing, 1 the optimizer's state,
            2 gradients too, 3 weights too.
        offloaded: what the host's memory holds for the device: "optimizer", "parameters".
        dtype: of most weights.
        mixed_precision: of the computations: "no", "bf16", "fp16" or "fp8".
        device: type of the device.
    """

    processes: int
    wrapper: str
    stage: int
    offloaded: tuple[str, ...]
    dtype: str
    mixed_precision: str
    device: str

    @classmethod
    def of(cls, trainer: Trainer) -> RunsAs:
        """Of a Trainer that has prepared its model, as it has when `on_train_begin` is called."""
        # Compiled, a model is in one wrapper more.
        wrapped: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
        wrapper = _wrapper(wrapped)
        stage, offloaded = 0, ()
        if wrapper == "DeepSpeedEngine":
            stage, offloaded = wrapped.zero_optimization_stage(), _offloaded(wrapped)
        elif wrapper in _FSDP:
            plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
            reshards = plugin is None or plugin.reshard_after_forward
            strategy = getattr(wrapped, "sharding_strategy", None)
            stage = _STAGES.get(strategy.name, 3) if strategy else 3 if reshards else 2
            policy = getattr(plugin, "cpu_offload", None)
            if isinstance(policy, CPUOffloadPolicy) or getattr(policy, "offload_params", False):
                offloaded = ("optimizer", "parameters")
        return cls(
            processes=trainer.args.world_size,
            wrapper=wrapper,
            stage=stage,
            offloaded=offloaded,
            dtype=_dtype(wrapped),
            mixed_precision=trainer.accelerator.mixed_precision,
            device=trainer.args.device.type,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "offloaded": list(self.offloaded)}

    def __str__(self) -> str:
        parts = [
            f"{self.processes} process{'es' if self.processes > 1 else ''}",
            f"wrapper {self.wrapper}",
            f"stage {self.stage}",
            *(f"{each} offloaded" for each in self.offloaded),
            f"weights in {self.dtype}",
            f"mixed precision {self.mixed_precision}",
            f"device {self.device}",
        ]
        return ", ".join(parts)

    def check(
        self,
        *,
        expected_processes: int | None = None,
        expected_wrapper: str | None = None,
        expected_stage: int | None = None,
    ) -> None:
        """Raise `NotAsExpected` unless it is what was asked for; None expects nothing."""
        for option, expected, found in (
            ("expected_processes", expected_processes, self.processes),
            ("expected_wrapper", expected_wrapper, self.wrapper),
            ("expected_stage", expected_stage, self.stage),
        ):
            if expected not in (None, found):
                raise NotAsExpected(f"{option} is {expected}, but the training runs as {self}")


def _wrapper(wrapped: nn.Module) -> str:
    if isinstance(wrapped, FSDPModule):
        return FSDPModule.__name__
    if isinstance(wrapped, DistributedDataParallel | FullyShardedDataParallel | DataParallel):
        return type(wrapped).__name__
    # DeepSpeed may not be installed.
    is_engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(wrapped).__mro__)
    return "DeepSpeedEngine" if is_engine else _NO_WRAPPER


def _offloaded(engine: Any) -> tuple[str, ...]:
    found = {
        "optimizer": engine.zero_offload_optimizer(),
        "parameters": engine.zero_offload_param(),
    }
    return tuple(name for name, to in found.items() if to is not None and to.device != "none")


def _dtype(model: nn.Module) -> str:
    numbers: Counter[str] = Counter()
    for parameter in model.parameters():
        # Of a weight that ZeRO-3 has split, this process may hold nothing.
        numbers[str(parameter.dtype)] += getattr(parameter, "ds_numel", parameter.numel())
    return numbers.most_common(1)[0][0].removeprefix("torch.")
