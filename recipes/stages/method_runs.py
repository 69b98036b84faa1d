"""One experiment with one seed: start, train, measure, and the result in PEFT's schema."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import set_seed

from peft_svdinit.files import read_json, write_json
from peft_svdinit.training import for_json, peak_memory_mb, reset_peak_memory
from stages.method_data import MethodData
from stages.method_protocol import Experiment
from stages.method_training import (
    Measured,
    Trained,
    answered_rightly,
    loaded_base,
    measured,
    train,
)
from stages.metric_modules import metric
from stages.token_losses import Losses, example_losses

RESULT = "result.json"
OURS = "svdinit"  # the one key of a result that PEFT's do not have
_PROBE = 4  # texts by which a base that has changed is found


def measure_base(folder: Path, *, experiment: Experiment, data: MethodData, device: Any) -> None:
    """What the bare model can do."""
    model = loaded_base(experiment.protocol, device)
    write_json(folder / RESULT, asdict(measured(model, data, experiment.protocol)))


def read_measured(content: Mapping[str, Any]) -> Measured:
    """What `asdict` made of it."""
    return Measured(content["right"], Losses(**content["answers"]), Losses(**content["general"]))


@dataclass(frozen=True)
class MethodRun:
    """Trains one experiment with one seed, and leaves adapter and result in a folder.

    Attributes:
        config: the experiment's, with a start that is there.
        base: the folder of `measure_base`.
        cost: what the start took before, by `cost_of`; None of one that takes nothing.
        command: that this is part of.
    """

    experiment: Experiment
    config: LoraConfig
    seed: int
    data: MethodData
    base: Path
    cost: Mapping[str, Any] | None
    command: str | None
    device: torch.device

    def __call__(self, folder: Path) -> None:
        began, worked = time.perf_counter(), time.process_time()
        created = dt.datetime.now(dt.UTC).replace(microsecond=0)
        protocol, data = self.experiment.protocol, self.data
        set_seed(self.seed)
        reset_peak_memory(self.device)
        base = loaded_base(protocol, self.device)
        probe = data.general.select(range(min(_PROBE, len(data.general))))
        of_base = example_losses(base, probe, protocol.batch_size)
        model: Any = get_peft_model(
            base, self.config, autocast_adapter_dtype=protocol.autocast_adapter_dtype
        ).eval()
        before = read_measured(read_json(self.base / RESULT, "the base's result"))
        self._check_base(model, probe, of_base)
        changed = example_losses(model, probe, protocol.batch_size) != of_base
        start = measured(model, data, protocol) if changed else before
        steps, size = self.experiment.steps, protocol.batch_size
        trained = train(
            model,
            protocol,
            data.batches(0, steps * size, size),
            steps,
            validate=lambda: _share(answered_rightly(model, data.valid, data, protocol)),
            title=f"{self.experiment.name} seed {self.seed}",
        )
        after = measured(model, data, protocol)
        self._check_base(model, probe, of_base)
        model.save_pretrained(folder / "adapter")
        trainable, total = model.get_nb_trainable_parameters()
        seconds = time.perf_counter() - began
        forgetting = _forgetting(before, after)
        last = {
            "step": steps,
            "test accuracy": after.accuracy,
            "train loss": trained.latest("losses", protocol.eval_steps),
            "train samples": trained.examples,
            "train total tokens": sum(trained.tokens),
            "forgetting": forgetting["forgetting"],
        }
        result = {
            "run_info": {
                "created_at": created.isoformat(),
                "total_time": seconds,
                "experiment_name": self.experiment.name,
                "peft_branch": "peft_svdinit",
                "train_config": {**asdict(protocol), "seed": self.seed, "max_steps": steps},
                "peft_config": self.experiment.config.to_dict(),
                "error_msg": "",
            },
            "train_info": {
                **self._memory(trained),
                "train_time": trained.seconds,
                "file_size": (folder / "adapter" / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
                "num_trainable_params": trainable,
                "num_total_params": total,
                "status": "success",
                "metrics": [*trained.metrics, last],
            },
            "meta_info": _meta_info(self.device),
            OURS: {
                "start": None if self.cost is None else dict(self.cost),
                "begins_at_base": not changed,
                "step_0": {"test accuracy": start.accuracy, "test loss": start.loss},
                "base": {"test accuracy": before.accuracy, "test loss": before.loss},
                "test loss": after.loss,
                "forgetting": forgetting,
                "right": [int(right) for right in after.right],
                "cpu_seconds": time.process_time() - worked,
                "peak_memory_mb": peak_memory_mb(self.device),
                "command": self.command,
            },
        }
        write_json(folder / RESULT, for_json(_without_sets(result)))

    def _check_base(self, model: Any, probe: Any, of_base: Losses) -> None:
        """PEFT's forgetting takes the disabled adapter for the base: with these starts it is.

        Starts that move the base's weights (PEFT's own PiSSA and OLoRA) fail here.
        """
        with model.eval().disable_adapter():
            found = example_losses(model, probe, self.experiment.protocol.batch_size)
        if found != of_base:
            raise RuntimeError(
                f"{self.experiment.name}: with its adapter disabled the model is not its base, so "
                "that forgetting would be measured against another model; its start moves the base"
            )

    def _memory(self, trained: Trained) -> dict[str, int]:
        """Of the accelerator, 0 on a CPU."""
        peak = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0
        return {
            "accelerator_memory_reserved_avg": int(np.mean(trained.reserved)),
            "accelerator_memory_max": int(peak),
            "accelerator_memory_reserved_99th": int(np.percentile(trained.reserved, 99)),
        }


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def _forgetting(before: Measured, after: Measured) -> dict[str, Any]:
    texts = before.general
    return metric("forgetting").compute(
        before=texts.nll, after=after.general.nll, tokens=texts.tokens
    )


def _meta_info(device: torch.device) -> dict[str, Any]:
    """Versions and machine, under the names that PEFT's tables read."""
    packages: dict[str, str | None] = {}
    for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
        try:
            packages[f"{package}-version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[f"{package}-version"] = None
        packages[f"{package}-commit-hash"] = None
    on_cuda = device.type == "cuda"
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {name: {"sha": None, "created_at": None} for name in ("metamath", "gsm8k")},
        "package_info": packages,
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": torch.cuda.get_device_name(device) if on_cuda else device.type,
        },
        "pytorch_info": torch.__config__.show(),
    }


def _without_sets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_sets(entry) for key, entry in value.items()}
    return sorted(value) if isinstance(value, set) else value
