"""Loading a base model and its tokenizer, and the checkpoints that are refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from support.byte_tokenizer import byte_tokenizer
from support.tiny_models import rewrite_tensors, truncate
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svdinit.training import ModelOptions, load_model, load_skeleton, load_tokenizer


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a tiny Llama in bfloat16 and its tokenizer, which has no padding token."""
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=258,
        eos_token_id=1,
    )
    folder = tmp_path / "tiny"
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pickled(checkpoint):
    """The same with pickled weights only."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    return checkpoint


def options(folder, **kwargs) -> ModelOptions:
    return ModelOptions(model_name_or_path=str(folder), **kwargs)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)],
)
def test_the_weights_have_the_type_that_was_asked_for(checkpoint, dtype, expected):
    assert load_model(options(checkpoint, dtype=dtype)).dtype == expected


def test_a_tokenizer_without_padding_pads_with_its_end_token(checkpoint):
    tokenizer = load_tokenizer(options(checkpoint))
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_tokenizer_without_an_end_token_is_refused(checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_tokenizer(options(checkpoint))


def test_pickled_weights_are_refused_with_a_command_that_converts_them(pickled, tmp_path):
    with pytest.raises(ValueError, match="has only pickled weights") as refusal:
        load_model(options(pickled))
    command = shlex.split(str(refusal.value).split("convert them once: ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=tmp_path)
    converted = load_model(options(tmp_path / "tiny-safetensors"))
    expected = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    for name, weight in converted.named_parameters():
        if name in expected:
            assert torch.equal(weight, expected[name].float())
    assert load_tokenizer(options(tmp_path / "tiny-safetensors")).eos_token == "</s>"


def test_an_adapter_is_no_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        load_model(options(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_not_there_is_refused(load, tmp_path):
    with pytest.raises(ValueError, match="must be a folder or a Hub id"):
        load(options(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"holds no model, it has no config\.json"):
        load(options(tmp_path))
    with pytest.raises(ValueError, match="cannot load"):
        load(options("someone/nothing"))


def test_four_and_eight_bits_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        ModelOptions(load_in_4bit=True, load_in_8bit=True)


def test_missing_bitsandbytes_names_the_extra(checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"peft-svdinit\[quantization\]"):
        load_model(options(checkpoint, load_in_4bit=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_loaded_quantised(checkpoint, bits):
    pytest.importorskip("bitsandbytes")
    model = load_model(options(checkpoint, **{f"load_in_{bits}bit": True}))
    assert (
        type(model.model.layers[0].mlp.up_proj).__name__
        == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    )


def edited(folder, file: str, **changes) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))


def damage(folder, what: str) -> None:
    weights = folder / "model.safetensors"
    match what:
        case "weights cut off":
            truncate(weights)
        case "a weight lacking":
            rewrite_tensors(weights, lambda tensors: tensors.__delitem__("model.norm.weight"))
        case "a weight of another shape":
            rewrite_tensors(weights, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
        case "no weights":
            weights.unlink()
        case "an index that is none":
            weights.rename(folder / "model-00001-of-00001.safetensors")
            (folder / "model.safetensors.index.json").write_text("{}")
        case "a configuration that is none":
            (folder / "config.json").write_text("[1]")
        case "a width that is none":
            edited(folder, "config.json", hidden_size="wide")
        case "no heads":
            edited(folder, "config.json", num_attention_heads=0)
        case "a model type that is none":
            edited(folder, "config.json", model_type="lama")
        case "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        case "a tokenizer cut off":
            truncate(folder / "tokenizer.json")
        case "a length that is none":
            edited(folder, "tokenizer_config.json", model_max_length="long")
        case "a tokenizer that is none":
            (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("load", "what", "said"),
    [
        (load_model, "weights cut off", "model.safetensors is not a readable safetensors file"),
        (load_model, "a weight lacking", "lack model.norm.weight (1 in all), which would be drawn"),
        (load_model, "a weight of another shape", "cannot load"),
        (load_model, "no weights", "cannot load"),
        (load_model, "an index that is none", "cannot load"),
        (load_model, "a configuration that is none", "cannot load"),
        (load_model, "a width that is none", "cannot load"),
        (load_model, "no heads", "cannot load"),
        (load_skeleton, "no heads", "has no configuration that can be read: ZeroDivisionError"),
        (load_model, "a model type that is none", "cannot load"),
        (load_tokenizer, "no tokenizer", "cannot load the tokenizer"),
        (load_tokenizer, "a tokenizer cut off", "cannot load the tokenizer"),
        (load_tokenizer, "a length that is none", "cannot load the tokenizer"),
        (load_tokenizer, "a tokenizer that is none", "cannot load the tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_its_option(load, what, said, checkpoint):
    damage(checkpoint, what)
    with pytest.raises(ValueError, match=f"^model_name_or_path: .*{re.escape(said)}"):
        load(options(checkpoint))


def test_a_folder_has_no_revision(checkpoint):
    with pytest.raises(ValueError, match="model_revision=v1 is of a repository of the Hub"):
        load_tokenizer(options(checkpoint, model_revision="v1"))
