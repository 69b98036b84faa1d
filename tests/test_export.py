"""Factors exported as a LoRA adapter of stock PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import ARCHITECTURES, save_pair

from peft_svdinit.deltas import CheckpointPair
from peft_svdinit.export import export_adapter
from peft_svdinit.extraction import factors_of_checkpoints


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split", ["output", "balanced"])
def test_small_layers_get_all_their_rank_and_the_rest_the_rank_asked_for(
    architecture, split, tmp_path
):
    pair = save_pair(tmp_path, architecture)
    extraction = factors_of_checkpoints(
        CheckpointPair(pair.base_folder, pair.tuned_folder),
        64,
        base_model_name_or_path="tiny",
        method="exact",
    )
    folder = export_adapter(extraction.factors, 12, tmp_path / "adapter", split=split)
    config: Any = LoraConfig.from_pretrained(str(folder))
    small = {name for name, layer in extraction.factors.items() if min(layer.shape) < 12}
    assert bool(config.rank_pattern) == bool(small)
    loaded = PeftModel.from_pretrained(pair.base, str(folder))
    modules: dict[str, Any] = dict(loaded.get_base_model().named_modules())
    for name, module in modules.items():
        if name in extraction.factors:
            layer = extraction.factors[name]
            rank = min(12, *layer.shape)
            kept = (layer.U[:, :rank] * layer.S[:rank]) @ layer.Vh[:rank]
            delta = module.get_delta_weight("default")
            delta = delta.T if architecture == "gpt2" else delta
            assert torch.allclose(delta, kept, atol=1e-5)


def test_a_rank_above_what_is_held_is_refused_and_nothing_is_written(tmp_path):
    pair = save_pair(tmp_path)
    extraction = factors_of_checkpoints(
        CheckpointPair(pair.base_folder, pair.tuned_folder), 4, base_model_name_or_path="tiny"
    )
    with pytest.raises(ValueError, match=r"rank=8 is above the 4 triplets held for layer model\."):
        export_adapter(extraction.factors, 8, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
