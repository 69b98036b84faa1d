"""The delta of a saved LoRA adapter against PEFT's own, and each refusal."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from support import reference
from support.allocations import LargestResult
from support.tiny_models import (
    ARCHITECTURES,
    lora_layer,
    rewrite_tensors,
    tiny_model,
    trained_adapter,
    truncate,
    weight_of,
)
from torch import Tensor
from torch.testing import assert_close

from peft_svdinit.factors import LoraAdapter, factors_of_adapter
from peft_svdinit.models import lora_key

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha not a multiple": {"r": 3, "lora_alpha": 7},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 5, "h.1.attn.c_attn": 6},
        "alpha_pattern": {"down_proj": 3, "h.0.attn.c_attn": 40, "v_proj": 1},
    },
    "patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.1.*down_proj": 7, "^transformer.h.1.mlp.c_fc": 7},
        "alpha_pattern": {"q_proj": 32, "c_proj": 32},
    },
}
LAYER = "model.layers.0.self_attn.q_proj"
# What helps against an update that is no product.
MERGED, AS_IT_IS = "svdinit extract --base BASE --tuned MERGED", "use it with PEFT as it is"
KEY_A, KEY_B = (f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    rewrite_tensors(folder / "adapter_model.safetensors", edit)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_delta_is_the_one_that_peft_adds(tmp_path, architecture, options):
    model = trained_adapter(tmp_path, architecture, **options)
    layers = {
        name: lora_layer(model, name)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    adapter = LoraAdapter(tmp_path)
    assert set(adapter) == set(layers) and len(adapter) == len(layers)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default").detach()
        if architecture == "gpt2":
            expected = expected.mT
        product = adapter[name]
        assert product.scaling == layer.scaling["default"]
        assert_close(product.factors().dense(), expected, rtol=0.0, atol=1e-6)


@given(rank=st.integers(1, 64), alpha=st.integers(1, 128), rslora=st.booleans())
def test_the_scaling_is_alpha_over_the_rank_or_its_root(rank, alpha, rslora):
    adapter = LoraAdapter.__new__(LoraAdapter)
    adapter.config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    adapter._stored = {lora_key("layer", "A"): lora_key("layer", "A")}
    adapter._values = adapter._pattern_values()
    assert adapter.scaling_of("layer") == pytest.approx(
        reference.lora_scaling(rank, alpha, rslora=rslora)
    )


def test_factors_of_a_layer_never_form_its_delta(tmp_path):
    trained_adapter(tmp_path, r=1)
    adapter = LoraAdapter(tmp_path)
    with LargestResult() as largest:
        found = adapter[LAYER].factors()
    assert 0 < largest.entries < math.prod(found.shape)


def test_layers_are_in_the_order_of_the_model(tmp_path, folder):
    def renumber(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1.", "layers.10.")] = tensors[key].clone()
            tensors[key.replace("layers.1.", "layers.2.")] = tensors[key].clone()

    edit_weights(folder, renumber)
    numbers = [int(name.split(".")[2]) for name in LoraAdapter(folder)]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2, 10}


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(folder, start):
    edit_config(folder, init_lora_weights=start)
    assert LAYER in LoraAdapter(folder)


def test_an_orthogonal_start_is_read_because_its_base_is_unchanged(tmp_path):
    base = tiny_model()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    model = get_peft_model(base, config)
    model.save_pretrained(str(tmp_path))
    layer = lora_layer(model, LAYER)
    assert torch.equal(layer.base_layer.weight, before[f"{LAYER}.weight"])
    assert_close(LoraAdapter(tmp_path)[LAYER].factors().dense(), layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"]
)
def test_starts_that_move_the_base_are_refused_with_the_conversion(folder, start):
    edit_config(folder, init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"'{start}'.*path_initial_model_for_weight_conversion"):
        LoraAdapter(folder)


def test_a_pissa_adapter_is_read_once_peft_has_converted_it(tmp_path):
    base = tiny_model()
    weight = weight_of(base, LAYER).clone()
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    # As PEFT's guide to the conversion has it.
    config.init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    config.init_lora_weights = "pissa"
    layer = lora_layer(model, LAYER)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1.5)
    model.save_pretrained(str(tmp_path / "raw"))
    model.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    with pytest.raises(ValueError, match="moves the base"):
        LoraAdapter(tmp_path / "raw")
    tuned = layer.base_layer.weight + layer.get_delta_weight("default")
    found = LoraAdapter(tmp_path / "converted")[LAYER].factors().dense()
    assert_close(found, tuned.detach() - weight, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("use_dora", True, MERGED),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, MERGED),
        ("use_qalora", True, AS_IT_IS),
        ("alora_invocation_tokens", [1, 2], AS_IT_IS),
        ("arrow_config", {"top_k": 3}, AS_IT_IS),
        ("kasa_config", {"beta": 1.0}, MERGED),
        ("monteclora_config", {"samples": 2}, MERGED),
        ("velora_config", {"groups": 2}, MERGED),
        ("target_parameters", ["mlp.experts.gate_up_proj"], AS_IT_IS),
        ("layer_replication", [[0, 2], [1, 2]], AS_IT_IS),
    ],
)
def test_an_effect_beyond_the_product_is_refused_by_its_option(folder, option, value, remedy):
    edit_config(folder, **{option: value})
    with pytest.raises(ValueError, match=rf"adapter: .*uses {option}, .*{remedy}"):
        LoraAdapter(folder)


def test_every_option_that_peft_calls_a_variant_is_refused(folder):
    variants = [
        name
        for name, field in LoraConfig.__dataclass_fields__.items()
        if field.metadata.get("is_lora_variant")
    ]
    assert variants
    for option in variants:
        trained_adapter(folder)
        edit_config(folder, **{option: {"some": "value"}})
        with pytest.raises(ValueError, match=option):
            LoraAdapter(folder)


def test_another_type_of_adapter_is_refused_with_the_conversion(tmp_path):
    config = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"is of type IA3, only LORA.*convert_to_lora"):
        LoraAdapter(tmp_path)


def test_embeddings_are_refused_by_the_name_of_the_tensor(tmp_path):
    trained_adapter(tmp_path, target_modules=["q_proj", "embed_tokens"])
    message = (
        r"holds .*embed_tokens.*; only linear layers are supported: merge it .*--modules_to_save"
    )
    with pytest.raises(ValueError, match=message):
        LoraAdapter(tmp_path)


def test_convolutions_are_refused_with_what_helps(folder):
    edit_weights(
        folder,
        lambda tensors: tensors.update(
            {key: tensors[key][..., None, None].contiguous() for key in (KEY_A, KEY_B)}
        ),
    )
    message = f"layer {LAYER} is a convolution; only linear layers .*{MERGED}.*--modules_to_save"
    with pytest.raises(ValueError, match=message):
        LoraAdapter(folder)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"modules_to_save": ["lm_head"]}, ["lm_head.weight"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["lm_head.base_layer.weight"]),
        (
            {"trainable_token_indices": [1, 5]},
            ["model.embed_tokens.token_adapter.trainable_tokens_delta"],
        ),
        ({"target_modules": [LAYER], "lora_bias": True}, [f"{LAYER}.lora_B.bias"]),
    ],
)
def test_what_lies_beside_the_factors_is_left_out_and_named(tmp_path, caplog, options, left_out):
    trained_adapter(tmp_path / "with", **options)
    adapter = LoraAdapter(tmp_path / "with")
    assert list(adapter.beside) == left_out
    assert f"1 tensors beside its layers, which are left out: {left_out[0]}" in caplog.text
    assert factors_of_adapter(adapter).metadata.source["left_out"] == left_out
    # Without these tensors it is the same.
    expected = {name: product.factors().dense() for name, product in adapter.items()}
    shutil.copytree(tmp_path / "with", tmp_path / "without")
    edit_weights(
        tmp_path / "without",
        lambda tensors: [tensors.pop(f"base_model.model.{name}") for name in left_out],
    )
    caplog.clear()
    found = LoraAdapter(tmp_path / "without")
    assert not caplog.text and not found.beside and set(found) == set(expected)
    for name, delta in expected.items():
        assert torch.equal(found[name].factors().dense(), delta)


@pytest.mark.parametrize(("missing", "left"), [(KEY_A, "lora_B"), (KEY_B, "lora_A")])
def test_half_of_a_pair_is_refused(folder, missing, left):
    edit_weights(folder, lambda tensors: tensors.pop(missing))
    with pytest.raises(ValueError, match=rf"adapter: .*{left}.*") as error:
        LoraAdapter(folder)
    assert LAYER in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (KEY_A, torch.ones(5, 16)),
        (KEY_B, torch.ones(16, 5)),
        (KEY_B, torch.ones(16)),
        (KEY_A, torch.ones(4, 4, 2, 2)),
    ],
)
def test_shapes_that_form_no_product_are_refused_by_the_layer(folder, key, value):
    edit_weights(folder, lambda tensors: tensors.update({key: value}))
    with pytest.raises(ValueError, match=f"of layer {LAYER} do not form a product"):
        LoraAdapter(folder)


def test_weights_of_another_rank_than_configured_are_refused(folder):
    # The scaling is made of the configured rank, so it would be wrong in silence.
    edit_config(folder, r=8)
    with pytest.raises(ValueError, match=r"layer .* has rank 4, but adapter_config.json says 8"):
        LoraAdapter(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("key", "part"), [(KEY_A, "lora_A"), (KEY_B, "lora_B")])
def test_values_that_are_not_finite_are_refused_by_part_and_layer(folder, key, part, value):
    edit_weights(folder, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    adapter = LoraAdapter(folder)
    with pytest.raises(ValueError, match=f"{part} of layer {LAYER} has NaN or infinite"):
        adapter[LAYER]


def test_factors_of_two_dtypes_are_multiplied_in_the_wider_one(folder):
    before = LoraAdapter(folder)
    expected = {name: layer.factors().dense() for name, layer in before.items()}
    edit_weights(folder, lambda tensors: tensors.update({KEY_B: tensors[KEY_B].double()}))
    for name, layer in LoraAdapter(folder).items():
        assert_close(layer.factors().dense().float(), expected[name])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_weights_that_are_no_floating_numbers_are_refused(folder, dtype):
    edit_weights(folder, lambda tensors: tensors.update({KEY_B: tensors[KEY_B].to(dtype)}))
    with pytest.raises(TypeError, match=f"adapter: .*: {KEY_B} is stored as [IUB]"):
        LoraAdapter(folder)


def test_an_unknown_layer_is_a_key_error(folder):
    adapter = LoraAdapter(folder)
    assert "lm_head" not in adapter
    with pytest.raises(KeyError, match="lm_head"):
        adapter["lm_head"]


def test_an_adapter_without_layers_is_refused(folder):
    edit_weights(folder, lambda tensors: tensors.clear())
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        LoraAdapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / "training_args.bin").write_bytes(b"what the Trainer leaves beside an adapter")
    with pytest.raises(FileNotFoundError, match=f"adapter: the folder .* has no {name}"):
        LoraAdapter(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter: .*missing is not a folder"):
        LoraAdapter(tmp_path / "missing")


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(folder):
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="adapter must be safetensors") as error:
        LoraAdapter(folder)
    command = str(error.value).partition('python -c "')[2].rstrip('"')
    exec(command)
    assert LAYER in LoraAdapter(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_truncated_weights_are_refused(folder, share):
    truncate(folder / "adapter_model.safetensors", share)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        LoraAdapter(folder)


@pytest.mark.parametrize("text", ["", '{"peft_type": "LO', "[]"])
def test_a_damaged_configuration_is_refused_by_its_path(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter: .*adapter_config.json (is not|must hold)"):
        LoraAdapter(folder)
