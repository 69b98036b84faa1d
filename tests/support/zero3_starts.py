"""Starts on bases that ZeRO-3 has split, in one of two processes; run by a test.

Argument: a folder with `<architecture>` (a base), `<architecture>.safetensors` (factors), and
`zero3.json`. Each process leaves `report-<rank>.json`, the first one an adapter in `final`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from stages.processes import leave_process_group
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)
from transformers.integrations import HfDeepSpeedConfig
from zero3_start import Watch

from peft_svdinit import (
    FactorsFile,
    LoriConfig,
    SvdLoraConfig,
    gradient_factors,
    initialize_lora_from_factors,
)
from peft_svdinit.models import layers_gathered, whole_copy
from support.gradient_batches import batches
from support.sharded_starts import (
    digest,
    largest_difference,
    refusal,
    refusals_of_other_batches,
    taken,
)
from support.tiny_models import ARCHITECTURES, TARGETS

R = 5
STARTS: dict[str, dict[str, Any]] = {
    "delta": {},
    "reference": {"svd_start": "reference"},
    "dora": {"use_dora": True},
    "weight": {"svd_source": "weight", "svd_start": "reference", "svd_split": "balanced"},
    "lori": {"use_dora": True},
}


def base(folder: Path, architecture: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / architecture)


def config(folder: Path, architecture: str, start: str) -> LoraConfig:
    shared: Any = {"r": R, "target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"}
    shared["fan_in_fan_out"] = architecture == "gpt2"
    if start == "lori":
        return LoriConfig(**shared, **STARTS[start], lori_density=0.3)
    options = dict(STARTS[start])
    if start != "weight":
        options["svd_factors"] = str(folder / f"{architecture}.safetensors")
    return SvdLoraConfig(**shared, **options)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """All that belongs to the adapter, frozen copies included, put together."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: whole_copy(each) for name, each in tensors if "lora_" in name or "svd_" in name}


def posthoc(folder: Path, *, split: bool) -> dict[str, torch.Tensor]:
    """An adapter that is split itself, started afterwards."""
    options = {"r": R, "target_modules": TARGETS["llama"], "use_dora": True}
    torch.manual_seed(dist.get_rank())  # The first process's A would win where this one's did not.
    model = get_peft_model(base(folder, "llama"), LoraConfig(**options))
    if split:
        deepspeed.zero.Init(module=model, config_dict_or_path=str(folder / "zero3.json"))
    initialize_lora_from_factors(model, folder / "llama.safetensors")
    found = adapter(model)
    if split:
        assert all(hasattr(each, "ds_id") and not each.numel() for each in model.parameters())
    return found


def everything(folder: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for architecture in ARCHITECTURES:
        found[architecture] = taken(base(folder, architecture), TARGETS[architecture])
        for start in STARTS:
            model = get_peft_model(base(folder, architecture), config(folder, architecture, start))
            found[f"{architecture} {start}"] = adapter(model)
            if (architecture, start) == ("llama", "reference"):
                model.save_pretrained(str(folder / name), is_main_process=dist.get_rank() == 0)
    return found


def late(folder: Path, stage: int) -> str:
    """Refusal of an adapter whose first block alone is to start in an engine."""
    options = json.loads((folder / "zero3.json").read_text())
    options["zero_optimization"] = {"stage": stage}
    options["bf16"] = {"enabled": stage == 0}
    model: Any = get_peft_model(base(folder, "llama"), config(folder, "llama", "delta"))
    trained: Any = [each for each in model.parameters() if each.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=options
    )
    everything = FactorsFile(folder / "llama.safetensors")
    part = {name: everything[name] for name in everything if "layers.0." in name}
    said = refusal(lambda: initialize_lora_from_factors(model, part, coverage="partial"))
    del engine  # Which has to live until here.
    return said


def peak_over_one_layer(watch: Watch, model: nn.Module) -> float:
    """Most bytes whole at once as gradients are taken, over those of the largest weight."""
    watch.begin(model)
    gradient_factors(model, batches(1), rank=2)
    watch.model = None
    parameters: Any = model.parameters()
    return watch.peak / max(each.ds_numel * each.element_size() for each in parameters)


def after_error(model: nn.Module) -> str:
    """What is left whole, or in the place of a parameter, by an error amid a forward pass."""

    def fail(module: nn.Module, args: tuple) -> None:
        raise KeyError

    last = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = last.register_forward_pre_hook(fail)
    model.requires_grad_(False)
    try:
        with layers_gathered(model):
            model(**batches(1)[0])
    except KeyError:
        found = list(model.parameters())
        whole, lent = (
            sum(bool(each.numel()) for each in found),
            sum(not hasattr(each, "ds_id") for each in found),
        )
        return f"KeyError: {whole} whole, {lent} lent"
    finally:
        handle.remove()
    return "done"


def with_gradients(model: nn.Module) -> None:
    model.requires_grad_(True)
    with layers_gathered(model):
        pass


def reads_others(folder: Path) -> None:
    """DeBERTa's encoder reads the weight of an embedding that it never calls."""
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 64}
    model = DebertaV2ForSequenceClassification(
        DebertaV2Config(
            num_hidden_layers=1,
            num_attention_heads=2,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            **shape,
        )
    )
    deepspeed.zero.Init(module=model, config_dict_or_path=str(folder / "zero3.json"))
    ids = batches(1)[0]["input_ids"]
    gradient_factors(model, [{"input_ids": ids, "labels": ids[:, 0] % 2}], rank=2)


def main(folder: Path) -> None:
    """Compare split models with whole ones."""
    torch.set_num_threads(1)
    watch = Watch()  # Before DeepSpeed takes hold of the functions.
    deepspeed.init_distributed(dist_backend="gloo")
    expected = everything(folder, "expected") | {"posthoc": posthoc(folder, split=False)}
    refused = {stage: late(folder, stage) for stage in (0, 2)}
    alive = HfDeepSpeedConfig(str(folder / "zero3.json"))
    parameters = list(base(folder, "llama").parameters())
    report: dict[str, Any] = {
        "world_size": dist.get_world_size(),
        "empty": sum(not each.numel() for each in parameters) / len(parameters),
    }
    found = everything(folder, "final") | {"posthoc": posthoc(folder, split=True)}
    assert alive.is_zero3()
    report["differences"] = {
        name: largest_difference(tensors, expected[name]) for name, tensors in found.items()
    }
    report["digests"] = {name: digest(tensors) for name, tensors in found.items()}
    other = base(folder, "llama")
    weight = other.model.layers[1].self_attn.v_proj.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data.mul_(1.1)
    try:
        get_peft_model(other, config(folder, "llama", "delta"))
    except ValueError as error:
        report["other_base"] = str(error)
    report["late"] = {**refused, 3: late(folder, 3)}
    split = base(folder, "llama")
    report["other_batches"] = refusals_of_other_batches(split, TARGETS["llama"])
    report["peak_over_one_layer"] = peak_over_one_layer(watch, split)
    report["after_error"] = after_error(split)
    report["trainable"] = refusal(lambda: with_gradients(split))
    report["reads_others"] = refusal(lambda: reads_others(folder))
    (folder / f"report-{dist.get_rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_process_group()
