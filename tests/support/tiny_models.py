"""Tiny models of real architectures on CPU, saved adapters and checkpoint pairs, all seeded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

Architecture = Literal["llama", "gpt2"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2")
VOCABULARY = 64
# GPT-2's names match two layers of a block each: both projections out are c_proj.
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def tiny_model(
    architecture: Architecture = "llama", *, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """A causal language model of two layers; `options` go to its configuration."""
    torch.manual_seed(seed)
    if architecture == "llama":
        llama = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        return LlamaForCausalLM(LlamaConfig(**{**llama, **options})).eval()
    gpt2 = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**{**gpt2, **options})).eval()


def trained_adapter(
    folder: Path, architecture: Architecture = "llama", *, seed: int = 1, **options: Any
) -> PeftModel:
    """A stock LoRA whose B is not zero, saved to `folder`; `options` go to its LoraConfig."""
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": TARGETS[architecture],
        "task_type": "CAUSAL_LM",
    }
    base = tiny_model(architecture)
    base.name_or_path = f"tiny-{architecture}"
    model = get_peft_model(base, LoraConfig(**{**defaults, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model


@dataclass(frozen=True)
class SavedPair:
    """A model before and after fine-tuning, in memory and on the disk."""

    base: PreTrainedModel
    tuned: PreTrainedModel
    base_folder: Path
    tuned_folder: Path


def save_pair(
    folder: Path,
    architecture: Architecture = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    change: Callable[[str], bool] = lambda name: "proj" in name or "c_" in name,
    **options: Any,
) -> SavedPair:
    """Save a tiny model and a copy whose parameters chosen by `change` moved a little."""
    base = tiny_model(architecture, **options)
    nn.Module.to(base, dtype=dtype)
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if change(name):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    pair = SavedPair(base, tuned, folder / "base", folder / "tuned")
    for model, target in ((base, pair.base_folder), (tuned, pair.tuned_folder)):
        model.save_pretrained(str(target), max_shard_size="8KB" if sharded else "1GB")
    return pair


def rewrite_tensors(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Edit the tensors of a safetensors file in place; its header's metadata is lost."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def respell(path: Path, spell: Callable[[str], str | None]) -> None:
    """Give the tensors of a safetensors file other names; those without one go."""

    def edit(tensors: dict[str, Tensor]) -> None:
        renamed = {spell(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update({key: tensor for key, tensor in renamed.items() if key is not None})

    rewrite_tensors(path, edit)


def truncate(path: Path, share: float = 0.6) -> None:
    """Cut a file off, as a copy that was interrupted."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def lora_layer(model: PeftModel, name: str) -> Any:
    """The LoRA layer of a module, by its name in the base model."""
    return model.get_base_model().get_submodule(name)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The stored weight of a module."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
