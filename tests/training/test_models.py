"""Loading a base model and its tokenizer, and the checkpoints that are refused."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import torch
from support.byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svdinit.training import ModelOptions, load_model, load_tokenizer


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
    with pytest.raises(ValueError, match="model_name_or_path: cannot load"):
        load(options(tmp_path))


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
