"""Saved adapters are stock LoRA: PEFT loads them in a process that cannot import this package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.peft_fixtures import (
    HELD_RANK,
    SPLITS,
    STARTS,
    Scene,
    logits,
    make_scene,
    tokens,
    train,
)
from support.stock_process import LOGITS_OF_ADAPTERS, run_without_us
from support.tiny_models import ARCHITECTURES
from torch import Tensor

from peft_svdinit import initialize_lora_from_factors


@dataclass(frozen=True)
class Case:
    """One adapter, trained here and loaded elsewhere."""

    architecture: str = "llama"
    options: tuple[tuple[str, Any], ...] = ()
    route: str = "config"

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in self.options]
        return "-".join([self.architecture, *parts, self.route])

    def saved(self, scene: Scene, folder: Path) -> Tensor:
        """Logits of the adapter after training, as saved to `folder`."""
        options = dict(self.options)
        if self.route == "config":
            model = scene.peft_model(**options)
        elif self.route == "transformers":
            model = scene.model()
            model.add_adapter(scene.config(**options))
        else:
            stock = LoraConfig(r=HELD_RANK, target_modules=scene.targets, task_type="CAUSAL_LM")
            model = get_peft_model(scene.model(), stock)
            initialize_lora_from_factors(model, scene.factors, start=options["svd_start"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        train(model, learning_rate=0.02)
        model.save_pretrained(str(folder))
        return logits(model)


def case(architecture: str = "llama", route: str = "config", **options: Any) -> Case:
    return Case(architecture, tuple(options.items()), route)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"layers.1.mlp.down_proj": 7},
}
CASES = [
    *(
        case(architecture, svd_start=start, svd_split=split)
        for architecture in ARCHITECTURES
        for start in STARTS
        for split in SPLITS
    ),
    *(case(svd_start=start, use_rslora=True) for start in STARTS),
    *(case(svd_start=start, **PATTERNS) for start in ("delta", "reference")),
    case(svd_start="reference", use_rslora=True, **PATTERNS),
    case("gpt2", svd_start="reference", use_rslora=True),
    case(svd_start="delta", use_dora=True),
    case("gpt2", svd_start="delta", use_dora=True),
    case(svd_start="reference", lora_dropout=0.3),
    case(svd_start="reference", modules_to_save=["lm_head"]),
    case(svd_start="delta", target_modules=["q_proj"], svd_coverage="partial"),
    case(svd_start="reference", target_modules=["q_proj", "o_proj"], svd_coverage="partial"),
    *(case(svd_start=start, route="transformers") for start in ("delta", "reference")),
    *(case(svd_start=start, route="post_hoc") for start in ("delta", "reference")),
    case("gpt2", svd_start="reference", route="post_hoc"),
]


@pytest.fixture(scope="module")
def here_and_elsewhere(tmp_path_factory) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per case: logits in this process, logits in the other, and merged there."""
    folder = tmp_path_factory.mktemp("stock")
    scenes = {name: make_scene(folder, name) for name in ARCHITECTURES}
    for name, scene in scenes.items():
        scene.base.save_pretrained(str(folder / f"base-{name}"))
    save_file({"ids": tokens()}, folder / "ids.safetensors")
    listed: dict[str, Any] = {"ids": str(folder / "ids.safetensors")}
    here = {}
    for index, entry in enumerate(CASES):
        adapter = folder / f"adapter-{index}"
        here[entry.name] = entry.saved(scenes[entry.architecture], adapter)
        listed[entry.name] = {
            "adapter": str(adapter),
            "base": str(folder / f"base-{entry.architecture}"),
        }
    (folder / "cases.json").write_text(json.dumps(listed))
    run_without_us(folder, LOGITS_OF_ADAPTERS, "cases.json", "logits.safetensors")
    elsewhere = load_file(folder / "logits.safetensors")
    return {name: (here[name], elsewhere[name], elsewhere[f"{name}.merged"]) for name in here}


@pytest.mark.parametrize("name", [entry.name for entry in CASES])
def test_stock_peft_gives_the_same_logits(here_and_elsewhere, name):
    here, elsewhere, merged = here_and_elsewhere[name]
    assert torch.isfinite(here).all()
    assert (elsewhere - here).abs().max() < 1e-5
    assert (merged - here).abs().max() < 1e-4


def test_the_cases_are_different_models(here_and_elsewhere):
    """Or equal logits would show nothing: each case trained to a function of its own."""
    first, second = (
        here_and_elsewhere[case("llama", svd_start=start, svd_split="output").name][0]
        for start in ("delta", "reference")
    )
    assert (first - second).abs().max() > 0.1
