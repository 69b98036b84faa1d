"""One LoRI training with fully sharded parameters in one of two processes; run by a test.

Argument: the folder for the adapter and for `report-<rank>.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stages.processes import leave_process_group
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.lori_fixtures import lori_model
from support.peft_fixtures import train


def full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(folder: Path) -> None:
    """Train two copies of a model, one of them sharded, and compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, model = lori_model(), lori_model()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    sharded = [name for name in trained if isinstance(model.get_parameter(name), DTensor)]
    report: dict[str, Any] = {"trained": len(trained), "sharded": len(sharded)}
    report["expected_losses"] = train(plain, learning_rate=0.05)
    report["losses"] = train(model, learning_rate=0.05)
    expected = plain.state_dict()
    options = StateDictOptions(full_state_dict=True)
    whole = get_model_state_dict(model, options=options)
    report["difference"] = max(
        (full(whole[name]) - expected[name]).abs().max().item() for name in trained
    )
    model.save_pretrained(
        str(folder / "final"), state_dict=whole, is_main_process=dist.get_rank() == 0
    )
    try:
        model.save_pretrained(str(folder / "shards"), is_main_process=False)
    except ValueError as error:
        report["refused"] = str(error)
    (folder / f"report-{dist.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
