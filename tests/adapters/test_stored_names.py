"""Checkpoints whose names or layout are not the model's, of every family that transformers has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.small_configs import class_of_family, parameters, small_config
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from peft_svdinit.adapters import AdapterForm, extract_adapter
from peft_svdinit.factors import CheckpointPair, RankRule
from peft_svdinit.models import linear_modules

FAMILIES = [family for family in _build_checkpoint_conversion_mapping() if family != "legacy"]
MOST_PARAMETERS = 7_000_000


def tuned_pair(folder: Path, model: Any) -> set[str]:
    """Save a model before and after rank-one changes of its linear layers, whose names it gives."""
    model.save_pretrained(folder / "base")
    layers = set(linear_modules(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") in layers:
                rows, columns = parameter.shape
                change = torch.randn(rows, 1, generator=generator)
                parameter += 0.05 * change @ torch.randn(1, columns, generator=generator)
    model.save_pretrained(folder / "tuned")
    return layers


def largest_difference(architecture: Any, folder: Path, adapter: Path) -> float:
    """Of base + adapter, loaded by stock PEFT and merged, to tuned, over all tensors."""
    base = architecture.from_pretrained(folder / "base")
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    tuned = architecture.from_pretrained(folder / "tuned").state_dict()
    found = merged.state_dict()
    assert found.keys() == tuned.keys()
    return max(
        (found[key].float() - tensor.float()).abs().max().item()
        for key, tensor in tuned.items()
        if tensor.numel()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_reproduces_the_tuned_model(family, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    architecture: Any = class_of_family(family)
    assert architecture is not None
    config = small_config(architecture)
    assert parameters(architecture, config) <= MOST_PARAMETERS
    torch.manual_seed(0)
    tuned_pair(tmp_path, architecture(config))
    extract_adapter(
        CheckpointPair(tmp_path / "base", tmp_path / "tuned"),
        tmp_path / "adapter",
        RankRule(rank=2),
        AdapterForm(verify="none"),
        base_model_name_or_path=str(tmp_path / "base"),
    )
    assert largest_difference(architecture, tmp_path, tmp_path / "adapter") < 1e-4
