"""Parameters read by the model's names, against those of the model that transformers loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_configs import class_of_family, small_config

from peft_svdinit.models import Checkpoint, StoredParameters, module_names
from peft_svdinit.models import stored_parameters as readers

# Experts one by one, q, k and v as one tensor, names of older versions.
FAMILIES = ["mixtral", "qwen3_moe", "phimoe", "nomic_bert", "llava", "gemma3", "ViTModel"]


def saved(folder, family: str) -> Any:
    architecture: Any = class_of_family(family)
    torch.manual_seed(0)
    model = architecture(small_config(architecture))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_loaded_model(family, tmp_path, monkeypatch):
    expected = saved(tmp_path, family).state_dict()
    checkpoint = Checkpoint(tmp_path, argument="base")
    assert checkpoint.shapes.keys() != expected.keys()
    monkeypatch.setattr(readers, "BLOCK_ENTRIES", 500)
    parameters = StoredParameters(checkpoint)
    assert not parameters.unknown
    for name, key in parameters.stored_once().items():
        tensor = expected[name]
        assert parameters.shapes[key] == tensor.shape
        assert torch.equal(parameters.tensor(key), tensor)
        blocks = list(parameters.blocks(key))
        assert torch.equal(torch.cat([block for _, block in blocks]), tensor)
        assert [start for start, _ in blocks] == [
            sum(len(block) for _, block in blocks[:index]) for index in range(len(blocks))
        ]
        if tensor.dim() == 2:
            last = tensor.shape[0] - 1, tensor.shape[1] - 1
            found = parameters.entries(key, [(0, 0), (0, 1), last])
            assert torch.equal(found, torch.stack([tensor[0, 0], tensor[0, 1], tensor[last]]))
    read = sum(parameters.stored_bytes(key) for key in parameters.stored_once().values())
    assert read >= sum(checkpoint.stored_bytes(key) for key in checkpoint.shapes)


def test_experts_of_which_a_part_is_missing_are_refused_by_name(tmp_path):
    saved(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in tensors if "layers.1." in key and key.endswith("2.w1.weight"))
    save_file({k: t for k, t in tensors.items() if k != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"base: .*cannot make model\.layers\.1\.\S*experts"):
        StoredParameters(Checkpoint(tmp_path, argument="base"))


def test_names_of_older_versions_are_those_of_modules(tmp_path):
    model = saved(tmp_path, "llava")
    older = "language_model.model.layers.1.self_attn.q_proj"
    newer = "model.language_model.layers.1.self_attn.q_proj"
    assert module_names(model, [older]) == {older: newer}
    assert module_names(model, [newer, "of.nothing"]) == {newer: newer, "of.nothing": "of.nothing"}
    with pytest.raises(ValueError, match=f"{older} and {newer} are both module {newer}"):
        module_names(model, [older, newer])
