"""Saved low-rank models: dense for everybody, exact for us, and stale files are noticed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.low_rank_cases import dense_twin, product_of, switch
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


def changed(model: nn.Module) -> None:
    """As training leaves it: factors are of no SVD any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.02 * noise.to(parameter)


def low_rank_model(case: str) -> Any:
    options = dict(CASES[case])
    model: Any = tiny_base(case.partition(" ")[0])
    dtype = options.pop("dtype", torch.float32)
    for parameter in model.parameters():  # Not the buffers, which no checkpoint has.
        parameter.data = parameter.data.to(dtype)
    switch(model, **options)
    changed(model)
    return model


def same_layers(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


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


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that may be damaged, of "llama"."""
    return Path(shutil.copytree(saved["llama"][1], tmp_path / "copy"))


def refused(folder: Path, error: type[Exception], message: str) -> None:
    """A model that is given is not changed by what is refused."""
    model: Any = tiny_base()
    if (folder / "model.safetensors").is_file():
        model = type(model).from_pretrained(folder)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        load_low_rank(folder, model)
    assert same_layers(model, before) and not low_rank_layers(model)


@pytest.mark.parametrize("missing", [PLAN_NAME, FACTORS_NAME])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    refused(folder, FileNotFoundError, missing)


@pytest.mark.parametrize("name", [PLAN_NAME, FACTORS_NAME])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(folder, name, share):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(share * len(data))])
    refused(folder, ValueError, name)


def rewrite_factors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    with safe_open(folder / FACTORS_NAME, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / FACTORS_NAME)
    edit(tensors)
    save_file(tensors, folder / FACTORS_NAME, metadata)


def rewrite_plan(folder: Path, layers: Any) -> None:
    record = json.loads((folder / PLAN_NAME).read_text())
    (folder / PLAN_NAME).write_text(json.dumps({**record, "layers": layers}))


@pytest.mark.parametrize("layers", [None, [], {}, {LAYER: {"rank": 2, "shape": [24, 16]}}])
def test_a_plan_that_is_not_that_of_the_factors_is_refused(folder, layers):
    rewrite_plan(folder, layers)
    refused(folder, ValueError, f"{PLAN_NAME} beside it is of other layers: write the folder again")


def test_a_plan_that_is_no_mapping_is_refused(folder):
    (folder / PLAN_NAME).write_text("[1, 2]")
    refused(folder, ValueError, PLAN_NAME)


@pytest.mark.parametrize("part", ["U", "Vh", "sample"])
def test_a_layer_that_lacks_a_part_is_refused_before_any_is_restored(folder, part):
    rewrite_factors(folder, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    refused(folder, ValueError, LAYER)


def test_a_part_of_another_shape_is_refused(folder):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.U"] = tensors[f"{LAYER}.U"][:, :1].clone()

    rewrite_factors(folder, shorten)
    refused(folder, ValueError, f"the factors of layer {LAYER} are not those of its plan")


def test_factors_beside_other_dense_weights_are_refused(folder, saved):
    # As a training that goes on from the dense form and saves over it leaves them.
    model: Any = type(saved["llama"][0]).from_pretrained(folder)
    changed(model)
    model.save_pretrained(folder)
    assert is_low_rank(folder)
    refused(folder, ValueError, r"the dense weights do not belong to these factors \(layer")
    with pytest.raises(ValueError, match="do not belong to these factors"):
        load_low_rank(folder)


def test_a_model_with_other_weights_is_refused(saved):
    model = tiny_base(seed=3)
    with pytest.raises(ValueError, match="do not belong to these factors"):
        load_low_rank(saved["llama"][1], model)
    assert not low_rank_layers(model)


def test_another_models_files_are_refused_by_layer(folder, saved):
    for name in (PLAN_NAME, FACTORS_NAME):
        shutil.copy(saved["gpt2"][1] / name, folder / name)
    refused(folder, ValueError, r"a layer transformer\.h\.0\..*, which LlamaForCausalLM lacks")


def test_a_model_of_low_rank_already_is_refused(saved):
    model, folder = saved["llama"]
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="of low rank already; densify_"):
        load_low_rank(folder, model)
    assert same_layers(model, before)


@pytest.mark.parametrize("place", ["missing", ""])
def test_no_folder_and_a_folder_without_a_plan_are_told(tmp_path, place):
    with pytest.raises(FileNotFoundError, match="path"):
        load_low_rank(tmp_path / place)


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
