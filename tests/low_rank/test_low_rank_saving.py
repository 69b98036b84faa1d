"""Saved low-rank models: dense for everybody, exact for us, and stale files are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.low_rank_cases import changed, dense_twin, product_of, same_layers, switch
from support.peft_fixtures import logits, tiny_base, tokens
from support.stock_process import run_without_us
from torch import nn
from torch.testing import assert_close
from transformers import AlbertConfig, AlbertModel, PreTrainedModel, Trainer, TrainingArguments

from peft_svdinit.low_rank import (
    PLAN_NAME,
    LowRankLinear,
    LowRankPlan,
    LowRankRule,
    PlannedLayer,
    densify_,
    factorize_,
    is_low_rank,
    load_low_rank,
    low_rank_layers,
    make_plan,
    shrink_,
)

FACTORS_NAME = "low_rank.safetensors"
LAYER = "model.layers.0.mlp.up_proj"

LOGITS_OF_MODELS = """
import json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

cases = json.load(open(sys.argv[1]))
ids = load_file(cases.pop("ids"))["ids"]
found = {}
for name, folder in cases.items():
    model, said = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), (name, said)
    assert "quantization_config" not in model.config.to_dict(), name
    kinds = {type(module).__module__.partition(".")[0] for module in model.modules()}
    assert kinds <= {"torch", "transformers"}, kinds
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids).logits.float().contiguous()
assert "peft_svdinit" not in sys.modules
save_file(found, sys.argv[2])
"""

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "llama with norms": {"train_norms": True, "row_normalise": "sums"},
    "gpt2 with norms": {"train_norms": True},
    "llama in shards": {},
    "llama in bfloat16": {"dtype": torch.bfloat16},
    "gpt2 with norms in bfloat16": {"train_norms": True, "dtype": torch.bfloat16},
}


def low_rank_model(case: str) -> Any:
    options = dict(CASES[case])
    model: Any = tiny_base(case.partition(" ")[0])
    dtype = options.pop("dtype", torch.float32)
    for parameter in model.parameters():  # Not the buffers, which no checkpoint has.
        parameter.data = parameter.data.to(dtype)
    switch(model, **options)
    changed(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Each case's model and its folder."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for case in CASES:
        model, folder = low_rank_model(case), root / case.replace(" ", "_")
        model.save_pretrained(folder, max_shard_size="8KB" if "shards" in case else "1GB")
        found[case] = model, folder
    return found


def test_transformers_alone_loads_the_dense_form_of_all(saved, tmp_path):
    save_file({"ids": tokens()}, tmp_path / "ids.safetensors")
    cases = {case: str(folder) for case, (_, folder) in saved.items()}
    cases["ids"] = str(tmp_path / "ids.safetensors")
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_without_us(tmp_path, LOGITS_OF_MODELS, "cases.json", "logits.safetensors")
    found = load_file(tmp_path / "logits.safetensors")
    for case, (model, _) in saved.items():
        near = 0.1 if "bfloat16" in case else 1e-4
        expected = logits(model)
        assert_close(found[case], expected, rtol=0, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_the_layers_come_back_to_the_bit(saved, case):
    model, folder = saved[case]
    found = load_low_rank(folder)
    assert type(found) is type(model) and same_layers(found, model)
    assert torch.equal(logits(found), logits(model))
    assert LowRankPlan.of(found) == LowRankPlan.of(model)
    assert not found.training
    other = type(model).from_pretrained(folder)
    assert load_low_rank(folder, other) is other and same_layers(other, model)


@pytest.mark.parametrize("case", CASES)
def test_the_dense_weights_are_the_products_rounded_once(saved, case):
    model, folder = saved[case]
    assert len(list(folder.glob("model-*.safetensors"))) > 1 or "shards" not in case
    dense = type(model).from_pretrained(folder)
    plain = type(model)(model.config)
    assert dense.state_dict().keys() == plain.state_dict().keys()
    for name, layer in low_rank_layers(model).items():
        parts = {part: p.detach().double() for part, p in layer.named_parameters()}
        exact = product_of(layer, parts)
        weight = dense.get_submodule(name).weight
        found = weight.mT if layer.transposed else weight
        assert weight.dtype == layer.U.dtype
        assert_close(found.double(), exact, rtol=torch.finfo(weight.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_says_what_is_there_and_what_it_takes(saved, case):
    model, folder = saved[case]
    assert is_low_rank(folder) and not is_low_rank(folder.parent)
    record = json.loads((folder / PLAN_NAME).read_text())
    plan = LowRankPlan.of(model)
    assert LowRankPlan.from_dict(record["layers"]) == plan
    width = low_rank_layers(model)[next(iter(plan.layers))].U.element_size()
    assert record["dense_parameters"] == plan.dense_parameters
    assert record["parameters"] == plan.parameters
    assert record["dense_bytes"] == plan.dense_parameters * width
    held = sum(tensor.nbytes for tensor in load_file(folder / FACTORS_NAME).values())
    assert record["factor_bytes"] == held


def test_a_loaded_model_saves_itself_again_alike(saved, tmp_path):
    _, folder = saved["llama with norms"]
    model: Any = load_low_rank(folder)
    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_densified_model_removes_the_old_files(tmp_path):
    model = low_rank_model("llama")
    model.save_pretrained(tmp_path)
    expected = logits(model)
    densify_(model)
    model.save_pretrained(tmp_path)
    assert not is_low_rank(tmp_path) and not (tmp_path / FACTORS_NAME).exists()
    assert_close(logits(type(model).from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=f"path: .* has no {PLAN_NAME}"):
        load_low_rank(tmp_path)


def test_saving_again_with_lower_ranks_replaces_the_factors(tmp_path):
    model = low_rank_model("llama")
    model.save_pretrained(tmp_path)
    shrink_(model, LowRankPlan({LAYER: PlannedLayer(1, (24, 16))}))
    model.save_pretrained(tmp_path)
    assert same_layers(load_low_rank(tmp_path), model)


def test_other_processes_write_no_factors(tmp_path):
    model = low_rank_model("llama")
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not is_low_rank(tmp_path) and not (tmp_path / FACTORS_NAME).exists()
    stock = tmp_path / "stock"
    tiny_base().save_pretrained(stock, is_main_process=False)
    names = {path.name for path in tmp_path.iterdir()} - {"stock"}
    assert names == {path.name for path in stock.iterdir()}


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path):
    model = low_rank_model("gpt2 with norms")
    given = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    names = list(given)
    model.save_pretrained(tmp_path, state_dict=given)
    assert list(given) == names
    found = load_low_rank(tmp_path)
    assert all(torch.equal(found.state_dict()[name], given[name]) for name in names)


def test_the_trainer_saves_it_so(tmp_path):
    model = low_rank_model("llama")
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True}
    Trainer(model, TrainingArguments(str(tmp_path), **options)).save_model(str(tmp_path / "saved"))
    assert same_layers(load_low_rank(tmp_path / "saved"), model)


def test_a_module_within_and_shared_layers_are_saved_with_all_of_their_names(tmp_path):
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = AlbertConfig(vocab_size=64, embedding_size=8, num_attention_heads=2, **sizes)
    model = AlbertModel(config).eval()
    switch(model)
    model.save_pretrained(tmp_path / "albert")
    dense = AlbertModel.from_pretrained(tmp_path / "albert").eval()
    for found in (load_low_rank(tmp_path / "albert"), dense):
        assert_close(found(tokens())[0], model(tokens())[0], rtol=1e-4, atol=1e-5)

    class TwoNames(type(tiny_base())):
        """Holds one layer at two places, as detectors hold their heads."""

        _tied_weights_keys = {"again.weight": "model.layers.0.mlp.up_proj.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.again = self.model.layers[0].mlp.up_proj

    twice: Any = TwoNames(tiny_base().config)
    switched = switch(twice)
    assert twice.again is twice.get_submodule(LAYER)
    twice.save_pretrained(tmp_path / "twice")
    stored = load_file(tmp_path / "twice" / "model.safetensors")
    assert not [key for key in stored if key.endswith((".U", ".Vh"))]
    assert f"{LAYER}.weight" in stored or "again.weight" in stored
    assert len(json.loads((tmp_path / "twice" / PLAN_NAME).read_text())["layers"]) == len(switched)


def test_in_half_precision_a_float32_checkpoint_is_restored_in_the_models_dtype(saved):
    model, folder = saved["llama"]
    half: Any = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    load_low_rank(folder, half)
    for name, layer in low_rank_layers(model).items():
        found = half.get_submodule(name)
        assert torch.equal(found.U, layer.U.bfloat16()) and found.Vh.dtype == torch.bfloat16


def test_frozen_weights_become_frozen_factors(saved):
    model, folder = saved["gpt2 with norms"]
    frozen: Any = type(model).from_pretrained(folder).requires_grad_(False).train()
    load_low_rank(folder, frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(layer.training for layer in low_rank_layers(frozen).values())


def test_a_model_of_another_kind_saves_as_it_always_did():
    model = nn.Sequential(nn.Linear(16, 16))
    (switched,) = factorize_(model, make_plan(model, LowRankRule(ratio=0.25, multiple_of=2)))
    assert isinstance(switched.layer, LowRankLinear) and not isinstance(model, PreTrainedModel)
    twin = dense_twin(nn.Sequential(nn.Linear(16, 16)), [switched])
    twin[0].bias = switched.layer.bias
    assert_close(model(torch.ones(2, 16)), twin(torch.ones(2, 16)))
