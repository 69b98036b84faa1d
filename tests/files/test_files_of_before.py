"""Files of an earlier version (see `data/before/README.md`) are read as what they were."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_models import weight_of
from torch import Tensor
from transformers import LlamaForCausalLM

from peft_svdinit import FactorsFile, LoriConfig, SvdLoraConfig
from peft_svdinit.adapters import write_stock_adapter
from peft_svdinit.factors import LayerStore
from peft_svdinit.masks import load_compact, load_mask, load_scores
from peft_svdinit.training import read_run

BEFORE = Path(__file__).parents[1] / "data" / "before"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in (DOWN, Q)]
OPTIONS = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
FACTORS_LOGGER = "peft_svdinit.factors.file"


def base_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BEFORE / "base").eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def assert_logits(model: torch.nn.Module, name: str) -> None:
    expected = load_file(BEFORE / "expected_logits.safetensors")[name]
    assert (logits(model) - logits(base_model())).abs().max() > 0.03
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_factors_are_read():
    file = FactorsFile(BEFORE / "factors")
    stored = load_file(file.path)
    assert list(file) == NAMES
    for name in NAMES:
        assert all(torch.equal(getattr(file[name], p), stored[f"{name}.{p}"]) for p in "US")
        assert torch.equal(file[name].Vh, stored[f"{name}.Vh"])
        assert file.rank_of(name) == 3 and file[name].norm > file[name].S.norm()
    assert file.metadata.base_model_name_or_path == "base"
    assert (file.metadata.source, file.metadata.seed) == ({"kind": "checkpoints"}, 0)


def test_factors_that_remember_one_row_start_their_base_with_one_warning(caplog):
    config = SvdLoraConfig(**OPTIONS, svd_factors=str(BEFORE / "factors"))
    with caplog.at_level(logging.WARNING, logger=FACTORS_LOGGER):
        get_peft_model(base_model().bfloat16(), config)
    (record,) = caplog.records
    assert "an edited base cannot be told" in record.getMessage()


def test_factors_that_remember_one_row_refuse_a_base_that_differs_in_it():
    other = base_model()
    with torch.no_grad():
        weight_of(other, NAMES[1])[0, 3] += 1
    config = SvdLoraConfig(**OPTIONS, svd_factors=str(BEFORE / "factors"))
    with pytest.raises(ValueError, match=f"weights of layer {NAMES[1]} differ"):
        get_peft_model(other, config)


def test_the_command_of_the_warning_writes_a_file_that_tells_an_edited_base(
    tmp_path, caplog, monkeypatch
):
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    before = FactorsFile("factors")
    U = {name: before[name].U for name in NAMES}
    with caplog.at_level(logging.WARNING, logger=FACTORS_LOGGER):
        before.base_sample(NAMES[0])
    command = re.search(r'python -c "(.*)"', caplog.text)
    assert command is not None
    edited = base_model()
    with torch.no_grad():
        for name in NAMES:
            weight_of(edited, name).mul_(1.005)
    config = SvdLoraConfig(**OPTIONS, svd_factors="factors")
    get_peft_model(edited, config).unload()
    exec(command[1], {})
    written = FactorsFile("factors")
    assert written.metadata == before.metadata and list(written) == list(before)
    assert all(torch.equal(written[name].U, U[name]) for name in NAMES)
    get_peft_model(base_model().half(), config)
    with pytest.raises(ValueError, match="another base model"):
        get_peft_model(edited, config)


def test_an_adapter_started_from_factors_is_read_by_us_and_by_stock_peft():
    folder = str(BEFORE / "svd_adapter")
    assert_logits(PeftModel.from_pretrained(base_model(), folder), "svd_adapter")
    config = SvdLoraConfig.from_pretrained(folder)
    assert (config.svd_start, config.svd_factors, config.r) == ("delta", "factors", 2)
    assert config.svd_check_base


def test_a_lori_adapter_is_read_by_us_and_by_stock_peft():
    folder = str(BEFORE / "lori_adapter")
    assert_logits(PeftModel.from_pretrained(base_model(), folder), "lori_adapter")
    config = LoriConfig.from_pretrained(folder)
    assert (config.lori_density, config.lori_seed) == (0.25, 5)
    model = PeftModel.from_pretrained(base_model(), folder, config=config)
    assert_logits(model, "lori_adapter")


def test_a_mask_is_read():
    mask = load_mask(BEFORE / "mask")
    assert list(mask.layers) == NAMES
    assert (mask.density, mask.seed, mask.scope) == (0.25, 5, "global")
    trained = load_file(BEFORE / "lori_adapter" / "adapter_model.safetensors")
    for name, layer in mask.layers.items():
        lora_B = trained[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(layer.mask, lora_B != 0)
    assert sum(layer.kept for layer in mask.layers.values()) == 16


def test_a_compact_adapter_is_read(tmp_path):
    write_stock_adapter(load_compact(BEFORE / "compact"), tmp_path / "stock")
    trained = load_file(BEFORE / "lori_adapter" / "adapter_model.safetensors")
    stock = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    assert stock.keys() == trained.keys()
    for key, tensor in trained.items():
        exact = "lora_A" in key
        assert torch.equal(stock[key], tensor if exact else tensor.bfloat16().float())


def test_scores_are_read():
    scores = load_scores(BEFORE / "scores")
    assert sorted(scores.scores) == NAMES
    expected = torch.arange(16.0).reshape(8, 2)
    assert all(torch.equal(layer, expected) for layer in scores.scores.values())
    assert scores.in_features == {name: 12 if DOWN in name else 8 for name in NAMES}
    assert (scores.seed, scores.source) == (5, {"kind": "magnitude"})


def test_an_extraction_goes_on_with_the_layers_that_it_had_done(tmp_path):
    shutil.copytree(BEFORE / "layer_store", tmp_path / "job")
    factors = FactorsFile(BEFORE / "factors")
    with LayerStore(tmp_path / "job", NAMES, {"rank": 3}) as store:
        assert list(store) == NAMES[:-1]
        for name, layer in store.items():
            assert torch.equal(layer.U, factors[name].U) and torch.equal(layer.S, factors[name].S)
            assert torch.equal(layer.Vh, factors[name].Vh) and layer.norm == factors[name].norm


def test_a_run_is_read():
    run = read_run(BEFORE / "run")
    assert (run.name, run.seed, run.completed) == ("student", 3, True)
    assert run.comparison is not None and run.comparison["method"] == "svd"
    assert run.final_eval_loss == 2.5 and len(run.log) == 4
    assert run.log[1]["loss"] == 3.5 and run.log[1]["eval_loss"] is None
    assert run.info["metrics"] == {"eval_loss": 2.5} and run.info["world_size"] == 1
