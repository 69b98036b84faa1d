"""Tiny models, teachers and factors files for the tests of the PEFT integration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_svdinit import FactorsMetadata, LowRankFactors, SvdLoraConfig, save_factors
from peft_svdinit.models import linear_modules, recognition_sample
from peft_svdinit.tuner.adapter_layers import lora_layers
from support.tiny_models import TARGETS, VOCABULARY, tiny_model, weight_of

STARTS = ("delta", "subspace", "reference")
SPLITS = ("output", "balanced")
# The teacher's deltas have rank 3; the file holds two more triplets, whose singular values are 0.
TEACHER_RANK, HELD_RANK = 3, 5


def tiny_base(architecture: str = "llama", **options: Any) -> PreTrainedModel:
    """A tiny model without dropout of its own."""
    if architecture == "gpt2":
        options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options}
    return tiny_model(architecture, **options)  # pyright: ignore[reportArgumentType]


def tokens(batch: int = 2, length: int = 8, *, seed: int = 7) -> Tensor:
    """Random token ids of shape (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Float32 logits in eval mode; the model's mode is put back."""
    training = model.training
    found = model.eval()(input_ids=tokens() if ids is None else ids, **options).logits.float()
    model.train(training)
    return found


def teacher_factors(
    model: nn.Module,
    targets: str | list[str],
    *,
    rank: int = TEACHER_RANK,
    held: int = HELD_RANK,
    seed: int = 1,
    size: float = 1.0,
) -> dict[str, LowRankFactors]:
    """Factors of a random delta of rank `rank` and spectral norm `size` for every target layer."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in linear_modules(model, targets).items():
        left = torch.randn(module.out_features, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, module.in_features, generator=generator, dtype=torch.float64)
        delta = left @ right
        delta *= size / torch.linalg.matrix_norm(delta, ord=2)
        layer = LowRankFactors.from_delta(delta.float(), held)
        layer.S[rank:] = 0
        factors[name] = layer
    return factors


def orientation(model: nn.Module, name: str, matrix: Tensor) -> Tensor:
    """`matrix` (out, in) as the layer stores its weight."""
    return matrix.mT if linear_modules(model, [name])[name].transposed else matrix


def tuned(base: PreTrainedModel, factors: Mapping[str, LowRankFactors]) -> PreTrainedModel:
    """A copy of `base` with the dense deltas added: what a delta start has to reproduce."""
    model = copy.deepcopy(base)
    for name, layer in factors.items():
        weight = weight_of(model, name)
        weight += orientation(model, name, layer.dense()).to(weight.dtype)
    return model


def write_factors(
    path: Path,
    base: nn.Module,
    factors: Mapping[str, LowRankFactors],
    *,
    name: str = "tiny-base",
) -> Path:
    """A factors file that recognises `base`."""
    samples = {
        layer: recognition_sample(orientation(base, layer, weight_of(base, layer)))
        for layer in factors
    }
    metadata = FactorsMetadata(base_model_name_or_path=name)
    return save_factors(path, factors, metadata, base_samples=samples)


@dataclass(frozen=True)
class Scene:
    """A base, a teacher's factors for it, and the file that holds them."""

    architecture: str
    base: PreTrainedModel
    factors: dict[str, LowRankFactors]
    file: Path

    @property
    def targets(self) -> list[str]:
        return list(TARGETS[self.architecture])

    def model(self) -> PreTrainedModel:
        """A fresh copy of the base: PEFT injects its layers in place."""
        return copy.deepcopy(self.base)

    def config(self, **options: Any) -> SvdLoraConfig:
        """A config of rank HELD_RANK and scaling 2 unless `options` say otherwise."""
        defaults: dict[str, Any] = {
            "r": HELD_RANK,
            "lora_alpha": 2 * HELD_RANK,
            "target_modules": self.targets,
            "svd_factors": str(self.file),
            "task_type": "CAUSAL_LM",
        }
        return SvdLoraConfig(**{**defaults, **options})

    def peft_model(self, **options: Any) -> Any:
        """A PeftModel of a fresh copy of the base, started from the factors."""
        return get_peft_model(self.model(), self.config(**options))


def make_scene(folder: Path, architecture: str = "llama") -> Scene:
    """Write the factors file of a fresh tiny base into `folder`."""
    base = tiny_base(architecture)
    factors = teacher_factors(base, TARGETS[architecture])
    file = write_factors(folder / f"{architecture}.safetensors", base, factors)
    return Scene(architecture, base, factors, file)


def aliased(path_or_id: str, **options: Any) -> LoraConfig:
    """A stock config that means an SVD start by its string alone."""
    return LoraConfig(**{**options, "init_lora_weights": f"svd_guided:{path_or_id}"})


def train(
    model: Any,
    steps: int = 3,
    *,
    learning_rate: float = 1e-2,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Losses of a few AdamW steps on random tokens; the model is left in eval mode."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=learning_rate)
    losses = []
    model.train()
    for step in range(steps):
        ids = tokens(seed=100 + step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def adapted_layers(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """PEFT's layers that carry the adapter, by the module's name in the base."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in lora_layers(model, adapter_name)
    }


def adapter_weights(model: Any, adapter_name: str = "default") -> dict[str, Tensor]:
    """Copies of all LoRA parameters of an adapter, by their name in the model."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name and f".{adapter_name}" in name
    }


def equal_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two sets of named tensors agree in names, dtypes and every bit."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in found
    )


def has_lora_layers(model: nn.Module) -> bool:
    """Whether any submodule or parameter of `model` is LoRA's."""
    return any("lora_" in name or "base_layer" in name for name, _ in model.named_modules())


def names_containing(names: Iterable[str], part: str) -> list[str]:
    """Those of `names` that contain `part`."""
    return [name for name in names if part in name]


def reloaded_to_train(
    scene: Scene, folder: Path, trained: Any, *, low_cpu_mem_usage: bool = False
) -> Any:
    """The adapter saved in `folder` by its own config, shown to go on training as `trained`."""
    loaded = PeftModel.from_pretrained(
        scene.model(),
        str(folder),
        config=SvdLoraConfig.from_pretrained(str(folder)),
        is_trainable=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert equal_bits(adapter_weights(loaded), adapter_weights(trained))
    assert torch.equal(logits(loaded), logits(trained))
    assert train(loaded) == train(trained)
    return loaded
