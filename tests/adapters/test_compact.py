"""LoRI adapters as bits and values, and back as the stock LoRA they stand for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.lori_fixtures import lori_config, lori_model, saved_compact
from support.peft_fixtures import logits, tiny_base, train
from support.tiny_models import trained_adapter

from peft_svdinit.adapters import compact_adapter_folder, write_stock_adapter
from peft_svdinit.cli import main
from peft_svdinit.masks import COMPACT_FILE_NAME, CompactAdapter, load_compact, save_compact


@pytest.fixture
def trained() -> Any:
    model = lori_model()
    train(model)
    return model


def stock_logits(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(tiny_base(), str(folder)))


def test_the_stock_adapter_of_a_compact_one_is_the_one_that_was_saved(trained, tmp_path):
    saved_compact(trained, tmp_path, dtype="float32")
    write_stock_adapter(load_compact(tmp_path), tmp_path / "stock")
    saved, stock = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "stock")
    )
    assert saved.keys() == stock.keys()
    assert all(torch.equal(saved[key], stock[key]) for key in saved)
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("saved", "stock")
    ]
    for config in configs:  # PEFT writes the set in any order
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    assert torch.equal(stock_logits(tmp_path / "stock"), logits(trained))


def test_modules_saved_whole_are_left_out_by_name_and_stock_peft_misses_none(tmp_path, caplog):
    model = get_peft_model(tiny_base(), lori_config(modules_to_save=["lm_head"]))
    compact = saved_compact(model, tmp_path, dtype="float32")
    assert "left out: lm_head.weight" in caplog.text
    write_stock_adapter(load_compact(compact), tmp_path / "stock")
    config = json.loads((tmp_path / "stock" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    # The head is still the base's.
    assert torch.equal(stock_logits(tmp_path / "stock"), logits(model))


def test_bfloat16_rounds_values_and_never_a(trained, tmp_path):
    compact = load_compact(saved_compact(trained, tmp_path))
    assert all(values.dtype == torch.bfloat16 for values in compact.values.values())
    write_stock_adapter(compact, tmp_path / "stock")
    stock = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    parameters = {
        name.replace(".default", ""): weight.detach() for name, weight in trained.named_parameters()
    }
    for name, tensor in stock.items():
        if "lora_A" in name:
            assert torch.equal(tensor, parameters[name])
        else:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            mask = compact.mask.layers[layer].mask
            values = parameters[name.replace(".weight", ".values")]
            assert torch.equal(tensor[mask], values.bfloat16().float())
            assert not tensor[~mask].any()


def test_the_same_adapter_gives_the_same_bytes(trained, tmp_path):
    first, second = (saved_compact(trained, tmp_path / name) for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_what_an_adapter_started_from_is_kept_off_the_mask(trained, tmp_path):
    trained.save_pretrained(str(tmp_path / "first"))
    config = lori_config(lori_start=str(tmp_path / "first"), lori_density=0.5)
    second = get_peft_model(tiny_base(), config)
    train(second)
    saved_compact(second, tmp_path, dtype="float32")
    write_stock_adapter(load_compact(tmp_path), tmp_path / "stock")
    assert torch.equal(stock_logits(tmp_path / "stock"), logits(second))


def test_the_command_writes_both_forms(trained, tmp_path, capsys):
    trained.save_pretrained(str(tmp_path / "saved"))
    compact, stock = tmp_path / "compact", tmp_path / "stock"
    options = ["export", "--dtype", "float32", "--adapter"]
    main([*options, str(tmp_path / "saved"), "--compact", "true", "--output_dir", str(compact)])
    main([*options, str(compact), "--output_dir", str(stock)])
    assert "Stock LoRA of 6 layers" in capsys.readouterr().out
    assert torch.equal(stock_logits(stock), logits(trained))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either factors or adapter"),
        (["--factors", "f", "--adapter", "a"], "give either factors or adapter"),
        (["--factors", "f", "--compact", "true"], "compact needs adapter"),
        (["--adapter", "a", "--lora_r", "4"], "lora_r belongs to factors"),
        (["--adapter", "a", "--split", "balanced"], "split belongs to factors"),
    ],
)
def test_contradictory_options_of_the_command_are_refused(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--output_dir", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_adapters_without_a_compact_form_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not saved from a sparse LoriConfig"):
        saved_compact(lori_model(lori_density=1.0), tmp_path / "dense")
    dora = get_peft_model(tiny_base(), lori_config(use_dora=True))
    with pytest.raises(ValueError, match="uses use_dora"):
        saved_compact(dora, tmp_path / "dora")
    trained_adapter(tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="not saved from a sparse LoriConfig"):
        compact_adapter_folder(tmp_path / "lora", tmp_path)
    assert not (tmp_path / COMPACT_FILE_NAME).exists()


def test_a_folder_whose_a_was_changed_is_refused_by_layer(trained, tmp_path):
    trained.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    tensors[key] += 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj .* another A"):
        compact_adapter_folder(tmp_path, tmp_path / "compact")


def test_a_file_of_another_seed_is_refused_by_its_hash(trained, tmp_path):
    compact = load_compact(saved_compact(trained, tmp_path))
    forged = CompactAdapter(replace(compact.mask, seed=1), compact.values, compact.config)
    save_compact(tmp_path, forged)
    with pytest.raises(ValueError, match="seed 1 draws another A"):
        write_stock_adapter(load_compact(tmp_path), tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_values_that_a_dtype_cannot_hold_are_refused(trained, tmp_path):
    parameter = next(weight for weight in trained.parameters() if weight.requires_grad)
    with torch.no_grad():
        parameter[0] = 1e6
    with pytest.raises(ValueError, match="cannot hold"):
        saved_compact(trained, tmp_path, dtype="float16")


def test_a_configuration_that_is_not_that_of_the_entries_is_refused(trained, tmp_path):
    compact = load_compact(saved_compact(trained, tmp_path))
    for change, said in (
        ({"use_dora": True}, "uses use_dora"),
        ({"r": 16, "lora_alpha": 16}, "has rank 8, but adapter_config.json says 16"),
        ({"peft_type": "IA3"}, "only LORA is supported"),
        ({"r": None}, "r must be an integer, got null"),
    ):
        save_compact(tmp_path, replace(compact, config={**compact.config, **change}))
        with pytest.raises(
            ValueError, match=f"adapter_config.json in (the compact file|its header).*{said}"
        ):
            write_stock_adapter(load_compact(tmp_path), tmp_path / "stock")
        assert not (tmp_path / "stock").exists()


def test_the_weights_that_a_compact_file_is_made_of_are_not_overwritten(trained, tmp_path, capsys):
    trained.save_pretrained(str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    before = weights.read_bytes()
    options = ["--adapter", str(tmp_path), "--compact", "true", "--output_dir", str(weights)]
    with pytest.raises(SystemExit) as stopped:
        main(["export", *options])
    assert stopped.value.code == 2
    assert "is a file of another kind" in capsys.readouterr().err
    assert weights.read_bytes() == before
