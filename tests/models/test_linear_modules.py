"""Linear layers by name, and the model of a folder whose configuration is not to be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.small_configs import class_of_family, small_config
from support.tiny_models import tiny_model
from torch import nn

from peft_svdinit.models import is_chosen, linear_modules, model_skeleton


def folder_with(config: dict, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["set_seed", "Trainer", "LlamaConfig", "torch", "NoSuchModel"])
def test_an_architecture_is_a_model_of_transformers_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers, "set_seed", lambda seed: pytest.fail("called"))
    folder = folder_with({"model_type": "llama", "architectures": [name]}, tmp_path)
    with pytest.raises(ValueError, match="names no architecture that transformers"):
        model_skeleton(folder)


def test_no_architecture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no architecture that transformers"):
        model_skeleton(folder_with({"model_type": "llama"}, tmp_path))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers must be at most 4096, got 1000000000"),
        ("num_hidden_layers", 0, "num_hidden_layers must be an integer of at least 1"),
        ("hidden_size", "text", "hidden_size must be an integer, a list or null"),
        ("hidden_size", -16, "hidden_size must be .* got -16"),
        ("max_position_embeddings", 10**12, "max_position_embeddings must be at most"),
        ("architectures", "LlamaForCausalLM", "architectures must be a list or null"),
        ("architectures", [7], r"architectures\[0\] must be text, got 7"),
        ("intermediate_size", 2**31 - 1, None),
        ("head_dim", 0, "transformers .*Error: "),
        ("hidden_act", "no such", "transformers .*Error: "),
        ("rope_parameters", 3, "transformers .*Error: "),
    ],
)
def test_a_configuration_of_no_model_is_refused_before_one_is_made(entry, value, message, tmp_path):
    config = {**tiny_model().config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    folder = folder_with({**config, entry: value}, tmp_path)
    if message is None:  # A size that no memory is taken for.
        assert len(linear_modules(model_skeleton(folder))) == 14
        return
    with pytest.raises(ValueError, match=rf"(?s)^base: {folder}\S*: (.*config.json .*)?{message}"):
        model_skeleton(folder)


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
    (tmp_path / "strange.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="code of a checkpoint is never run"):
        model_skeleton(folder_with(config, tmp_path))


def test_a_skeleton_has_the_layers_of_the_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    skeleton = model_skeleton(tmp_path)
    assert linear_modules(skeleton) == linear_modules(model)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("broken", ["(q_proj", "*q_proj", "[a-"])
def test_a_broken_expression_is_named_with_what_is_wrong(broken):
    with pytest.raises(ValueError) as raised:
        is_chosen("layers.0.q_proj", broken)
    message = str(raised.value)
    assert repr(broken) in message and "position" in message and "list of names" in message


@pytest.mark.parametrize(
    ("family", "layer", "counts"),
    [("phimoe", "router", False), ("falcon", "query_key_value", True)],
)
def test_a_class_derived_from_linear_counts_if_it_does_what_linear_does(family, layer, counts):
    architecture: Any = class_of_family(family)
    with torch.device("meta"):
        model = architecture(small_config(architecture))
    named = [name for name, one in model.named_modules() if name.endswith(f".{layer}")]
    assert named and all(isinstance(model.get_submodule(name), nn.Linear) for name in named)
    assert all((name in linear_modules(model)) == counts for name in named)
