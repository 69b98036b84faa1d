"""One folder of every kind that can be pushed, over a base that the stand-in Hub has."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from peft_svdinit import FactorsMetadata, SvdLoraConfig, save_factors
from peft_svdinit.factors import LoraAdapter
from peft_svdinit.low_rank import LowRankPlan, PlannedLayer, factorize_, save_small_form
from support.hub import StandInHub
from support.lori_fixtures import lori_model, saved_compact
from support.tiny_models import TARGETS, tiny_model, trained_adapter

BASE = "user/base"
BASE_CARD = b"---\nlicense: apache-2.0\nlicense_name: own\n---\n# Base\n"


def add_base(hub: StandInHub, folder: Path) -> Path:
    """`user/base` on the Hub, and its snapshot in a cache, whose path is to stay here."""
    tiny_model().save_pretrained(str(folder))
    (folder / "README.md").write_bytes(BASE_CARD)
    snapshot = folder.parent / "models--user--base" / "snapshots" / hub.add(BASE, folder)
    snapshot.parent.mkdir(parents=True)
    return folder.rename(snapshot)


def save_adapter(folder: Path, base: Path, **options) -> Path:
    """A stock LoRA that records the base by its path."""
    trained_adapter(folder, **options)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("tiny-llama", str(base)))
    return folder


def save_without_task(folder: Path, base: Path) -> Path:
    return save_adapter(folder, base, task_type=None)


def save_svd_adapter(folder: Path, base: Path) -> Path:
    factors = save_adapter_factors(folder / "factors", base)
    model = tiny_model()
    model.name_or_path = str(base)
    config = SvdLoraConfig(
        r=2, svd_factors=str(factors), target_modules=TARGETS["llama"], task_type="CAUSAL_LM",
        svd_check_base=False,
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


def save_adapter_factors(folder: Path, base: Path) -> Path:
    adapter = LoraAdapter(save_adapter(folder / "adapter", base))
    factors = {name: adapter[name].factors() for name in adapter}
    source = {"kind": "adapter", "path": str(folder / "adapter")}
    metadata = FactorsMetadata(base_model_name_or_path=str(base), source=source)
    save_factors(folder, factors, metadata)
    return folder


def save_lori(folder: Path, base: Path) -> Path:
    model = tiny_model()
    model.name_or_path = str(base)
    model = lori_model(model)
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, model.parameters()):
            parameter.fill_(0.1)
    model.save_pretrained(str(folder))
    return folder


def save_mask(folder: Path, base: Path) -> Path:
    folder.mkdir(parents=True)
    lori = save_lori(folder.parent / "for-mask", base)
    (lori / "lori_mask.safetensors").rename(folder / "lori_mask.safetensors")
    return folder


def save_compact(folder: Path, base: Path) -> Path:
    model = tiny_model()
    model.name_or_path = str(base)
    saved_compact(lori_model(model), folder)
    return folder


def low_rank_model() -> PreTrainedModel:
    model = tiny_model()
    layers = {"model.layers.0.mlp.up_proj": PlannedLayer(4, (24, 16))}
    factorize_(model, LowRankPlan(layers))
    return model


def save_low_rank(folder: Path, base: Path) -> Path:
    low_rank_model().save_pretrained(str(folder))
    return folder


def save_small(folder: Path, base: Path) -> Path:
    save_small_form(low_rank_model(), folder)
    return folder


KINDS = {
    "adapter": save_adapter,
    "adapter without a task": save_without_task,
    "svd adapter": save_svd_adapter,
    "lori": save_lori,
    "factors": save_adapter_factors,
    "mask": save_mask,
    "compact": save_compact,
    "low rank": save_low_rank,
    "low rank, small": save_small,
}
