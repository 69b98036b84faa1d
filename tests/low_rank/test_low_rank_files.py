"""Files of low-rank layers that are missing, damaged, stale or another model's are refused."""

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
from support.low_rank_cases import changed, same_layers, switch
from support.peft_fixtures import tiny_base

from peft_svdinit.files import HeadedFile
from peft_svdinit.low_rank import PLAN_NAME, is_low_rank, load_low_rank, low_rank_layers

FACTORS_NAME = "low_rank.safetensors"
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """A low-rank model of each architecture and its folder."""
    found = {}
    for architecture in ("llama", "gpt2"):
        model: Any = tiny_base(architecture)
        switch(model)
        folder = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(folder)
        found[architecture] = model, folder
    return found


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


@pytest.mark.parametrize("layers", [{}, {LAYER: {"rank": 2, "shape": [24, 16]}}])
def test_a_plan_that_is_not_that_of_the_factors_is_refused(folder, layers):
    rewrite_plan(folder, layers)
    refused(folder, ValueError, f"{PLAN_NAME} beside it is of other layers: write the folder again")


def test_a_plan_that_is_no_mapping_is_refused(folder):
    (folder / PLAN_NAME).write_text("[1, 2]")
    refused(folder, ValueError, PLAN_NAME)
    (folder / PLAN_NAME).write_text('{"layers": [1, 2]}')
    refused(folder, ValueError, rf"{PLAN_NAME}: layers must be an object, got \[1, 2\]")


@pytest.mark.parametrize("part", ["U", "Vh", "sample"])
def test_a_layer_that_lacks_a_part_is_refused_before_any_is_restored(folder, part):
    rewrite_factors(folder, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    refused(folder, ValueError, LAYER)


def test_a_part_of_another_shape_is_refused(folder):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.U"] = tensors[f"{LAYER}.U"][:, :1].clone()

    rewrite_factors(folder, shorten)
    refused(folder, ValueError, f"the factors of layer {LAYER} are not those of its plan")
    rewrite_factors(folder, lambda t: t.update({f"{LAYER}.U": t[f"{LAYER}.U"].char()}))
    refused(folder, TypeError, f"{LAYER}.U is stored as I8")


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


def test_where_writing_fails_there_is_no_plan_of_the_factors_of_before(folder, saved, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(HeadedFile, "write", full)
    with pytest.raises(OSError, match="no space left"):
        saved["llama"][0].save_pretrained(folder)
    assert not is_low_rank(folder)
