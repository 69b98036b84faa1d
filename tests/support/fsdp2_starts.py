"""Starts under DDP, `fully_shard` and tensor parallelism, in one of two processes; run by a test.

Argument: a folder with the file `llama.safetensors` of factors. Each process leaves
`report-<rank>.json`, the first one an adapter in `final`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from stages.processes import leave_process_group
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import FalconConfig, FalconForCausalLM

from peft_svdinit import (
    FactorsFile,
    LoriConfig,
    SvdLoraConfig,
    descent_directions,
    gradient_factors,
    initialize_lora_from_factors,
    line_search,
    weight_norms,
)
from peft_svdinit.models import linear_modules, whole_copy
from support.gradient_batches import batches
from support.peft_fixtures import logits, tiny_base, train
from support.sharded_starts import (
    digest,
    largest_difference,
    refusal,
    refusals_of_other_batches,
    taken,
)
from support.tiny_models import TARGETS

SHARED: dict[str, Any] = {"r": 5, "target_modules": TARGETS["llama"], "task_type": "CAUSAL_LM"}
STARTS = ("delta", "reference")


def sharded(model: Any, mesh: DeviceMesh, blocks: Any) -> Any:
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """All that belongs to the adapter, frozen copies included, put together."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: whole_copy(each) for name, each in tensors if "lora_" in name or "svd_" in name}


def started(folder: Path, start: Any = "delta") -> Any:
    file = str(folder / "llama.safetensors")
    return get_peft_model(tiny_base(), SvdLoraConfig(**SHARED, svd_factors=file, svd_start=start))


def stock(**options: Any) -> Any:
    """An adapter whose A the processes draw differently."""
    torch.manual_seed(dist.get_rank())
    return get_peft_model(tiny_base(), LoraConfig(**SHARED, **options))


def under_ddp(folder: Path) -> str:
    """Digest of an adapter that was trained on other examples in each process."""
    model = DistributedDataParallel(started(folder))
    for seed in range(2):
        (batch,) = batches(1, first_seed=2 * seed + dist.get_rank())
        model(**batch).loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= 0.05 * weight.grad
                    weight.grad = None
    return digest(adapter(model))


def of_data(mesh: DeviceMesh) -> float:
    base = tiny_base()
    expected = taken(base, TARGETS["llama"])
    split = sharded(base, mesh, base.model.layers)
    found = taken(split, TARGETS["llama"])
    assert all(isinstance(each, DTensor) for each in split.parameters())
    assert all(each.requires_grad for each in split.parameters())
    return largest_difference(found, expected)


def afterwards(folder: Path, mesh: DeviceMesh) -> float:
    """Stock adapters that are split when they are started, after a forward pass."""
    worst = 0.0
    everything = FactorsFile(folder / "llama.safetensors")
    first_block = {name: everything[name] for name in everything if "layers.0." in name}
    cases: Any = (
        ({}, "delta", everything),
        ({}, "reference", everything),
        ({"use_dora": True}, "delta", everything),
        ({}, "reference", first_block),
    )
    for options, start, factors in cases:
        expected, model = stock(**options), stock(**options)
        # All in the outermost group, whose parameters a forward pass leaves whole.
        sharded(model, mesh, ())
        logits(model)
        for each in (expected, model):
            initialize_lora_from_factors(each, factors, start=start, coverage="partial")
        # What was written into the whole parameters of the forward pass is lost here.
        model.reshard()
        worst = max(worst, largest_difference(adapter(model), adapter(expected)))
        assert (logits(model) - logits(expected)).abs().max() < 1e-5
    return worst


def trained(folder: Path, mesh: DeviceMesh, start: str) -> dict[str, Any]:
    """Losses of the adapter split after its start, saved whole."""
    plain, model = started(folder, start), started(folder, start)
    sharded(model, mesh, model.base_model.model.model.layers)
    losses, expected = train(model, learning_rate=0.05), train(plain, learning_rate=0.05)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    is_main = dist.get_rank() == 0
    model.save_pretrained(str(folder / start), state_dict=whole, is_main_process=is_main)
    if is_main:
        plain.save_pretrained(str(folder / f"{start}-expected"))
    return {"losses": losses, "expected": expected}


def split_first(mesh: DeviceMesh) -> Any:
    model = tiny_base()
    return sharded(model, mesh, model.model.layers)


def searched(mesh: DeviceMesh) -> tuple[Any, ...]:
    """What a search tried on a model whose loss is a little higher in the second process."""
    model = split_first(mesh)

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        output.loss = output.loss + 0.5 * dist.get_rank()
        return output

    gradient = gradient_factors(model, batches(1), rank=2)
    directions = descent_directions(gradient, weight_norms(model, gradient), rank=2)
    model.register_forward_hook(hook)
    return line_search(model, directions, batches(1), max_trials=3, first_step=0.1).tried


def falcon_layers_lost(mesh: DeviceMesh) -> list[str]:
    """Layers of a linear class of its own that are not found once each is in its own shards."""
    shape: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    model = FalconForCausalLM(FalconConfig(hidden_size=16, **shape))
    expected = list(linear_modules(model))
    for layer in [model.get_submodule(name) for name in expected]:
        fully_shard(layer, mesh=mesh)
    return [name for name in expected if name not in linear_modules(model)]


def refusals(folder: Path, mesh: DeviceMesh) -> dict[str, str]:
    file = folder / "llama.safetensors"
    edited = stock()
    base = edited.base_model.model
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.base_layer.weight.mul_(1.1)
    sharded(edited, mesh, base.model.layers)

    def parallel(mesh: DeviceMesh, model: Any = None) -> Any:
        model = tiny_base() if model is None else model
        plan = {"model.layers.*.mlp.down_proj": ColwiseParallel()}
        return parallelize_module(model, mesh, plan)  # pyright: ignore[reportArgumentType]

    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    twice = parallel(both["tp"])
    sharded(twice, both["dp"], twice.model.layers)
    configs = (SvdLoraConfig(**SHARED, svd_factors=str(file)), LoriConfig(**SHARED))
    late: Any = stock()
    parallelize_module(
        late.base_model.model,
        mesh,
        {"model.layers.*.mlp.down_proj.base_layer": ColwiseParallel()},
    )
    return {
        "another base": refusal(lambda: initialize_lora_from_factors(edited, file)),
        **{
            f"shards first {n}": refusal(
                lambda config=config: get_peft_model(split_first(mesh), config)
            )
            for n, config in enumerate(configs)
        },
        "tp svd": refusal(lambda: get_peft_model(parallel(mesh), configs[0])),
        "tp lori": refusal(lambda: get_peft_model(parallel(mesh), configs[1])),
        "tp afterwards": refusal(lambda: initialize_lora_from_factors(late, file)),
        "tp gradient": refusal(lambda: gradient_factors(parallel(mesh), batches(1), rank=2)),
        "tp and fsdp": refusal(lambda: gradient_factors(twice, batches(1), rank=2)),
    }


def main(folder: Path) -> None:
    """Compare split models with whole ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report = {
        "world_size": dist.get_world_size(),
        "ddp": under_ddp(folder),
        "of_data": of_data(mesh),
        "afterwards": afterwards(folder, mesh),
        "trained": {start: trained(folder, mesh, start) for start in STARTS},
        "refusals": refusals(folder, mesh),
        "other_batches": refusals_of_other_batches(split_first(mesh), TARGETS["llama"]),
        "searched": searched(mesh),
        "lost": falcon_layers_lost(mesh),
    }
    (folder / f"report-{dist.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
