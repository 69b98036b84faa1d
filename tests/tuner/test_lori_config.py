"""LoriConfig: what it refuses, what it saves, and what reads it back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.lori_fixtures import RANK, factors, lori_config, lori_model, reloaded
from support.peft_fixtures import has_lora_layers, logits, tiny_base, train
from support.tiny_models import TARGETS, truncate

from peft_svdinit import LoriConfig, SvdLoraConfig
from peft_svdinit.factors import SIDECAR_NAME
from peft_svdinit.masks import (
    MASK_FILE_NAME,
    LayerScores,
    LoriMask,
    Selection,
    load_mask,
    magnitude_scores,
    save_mask,
)
from peft_svdinit.tuner.config.alias import config_of_alias

SEED = 3


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        *(
            ({"lori_density": density}, ValueError, r"density must be in \(0, 1\], got")
            for density in (0, -0.1, 1.5, float("nan"), float("inf"))
        ),
        ({"lori_mask": ""}, ValueError, "lori_mask must name a mask file.*empty"),
        ({"lori_scope": "block"}, ValueError, "scope must be one of.*'block'"),
        ({"lori_scope": "3:2"}, ValueError, "1 <= N <= M"),
        ({"lori_scope": "1:8"}, ValueError, "keeps 0.125.*set lori_density=0.125"),
        ({"lori_floor": -0.1}, ValueError, r"lori_floor must be in \[0, lori_density=0.25\]"),
        ({"lori_floor": 0.3}, ValueError, "lori_floor.*got 0.3"),
        ({"lori_floor": float("nan")}, ValueError, "lori_floor"),
        ({"lori_density": "0.1"}, TypeError, "lori_density must be a number, got '0.1'"),
        ({"lori_density": True}, TypeError, "lori_density must be a number, got True"),
        ({"lori_mask": "x", "lori_scope": "row"}, ValueError, "say how a random mask is drawn"),
        ({"lori_density": 1.0, "lori_floor": 0.1}, ValueError, "and none is with .*density=1.0"),
        *(({"lori_seed": seed}, TypeError, "lori_seed") for seed in (0.0, "0", None, True)),
        ({"lora_bias": True}, ValueError, "lora_bias"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must stay True"),
        ({"init_lora_weights": False}, ValueError, "init_lora_weights must stay True"),
        ({"init_lora_weights": "svd_guided"}, ValueError, "init_lora_weights must stay True"),
        ({"lori_start": "x", "use_dora": True}, ValueError, "lori_start.*use_dora"),
        ({"lori_start": "x", "modules_to_save": ["lm_head"]}, ValueError, "modules_to_save"),
        ({"lori_start": "x", "bias": "all"}, ValueError, "lori_start.*bias"),
        ({"lori_start": "x", "layer_replication": [(0, 2)]}, ValueError, "layer_replication"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options, error, names):
    with pytest.raises(error, match=names):
        lori_config(**options)


@pytest.mark.parametrize("given", [{"a": 1}, b"mask", None, 3, LoraConfig()])
def test_what_is_no_path_is_refused_by_name(given):
    with pytest.raises(TypeError, match=r"lori_mask must be a path or Hub id.*save_mask"):
        lori_config(lori_mask=given)
    if given is not None:
        with pytest.raises(TypeError, match=r"lori_start must be a path or Hub id.*its folder"):
            lori_config(lori_start=given)


@pytest.mark.parametrize("option", ["kasa_config", "arrow_config", "velora_config", "use_bdlora"])
def test_a_variant_whose_update_is_not_the_product_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} cannot be combined with a LoriConfig"):
        given: dict[str, Any] = {option: {"scaling": 1}}
        lori_config(**given)


def test_paths_are_kept_as_strings_that_json_can_hold(tmp_path):
    config = lori_config(lori_mask=tmp_path, lori_start=Path("~/adapter"))
    assert config.lori_mask == str(tmp_path)
    assert config.lori_start == str(Path.home() / "adapter")
    json.dumps({key: list(v) if isinstance(v, set) else v for key, v in config.to_dict().items()})


def test_copies_pickles_and_replacements_keep_every_option():
    config = lori_config(lori_density=0.5, lori_scope="1:2", lori_seed=9)
    for twin in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config, r=RANK),
    ):
        assert type(twin) is LoriConfig and dataclasses.asdict(twin) == dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("density", "mask", "sparse"), [(1.0, "random", False), (0.5, "random", True), (1.0, "m", True)]
)
def test_only_the_calibration_run_trains_a_dense_b(density, mask, sparse):
    assert lori_config(lori_density=density, lori_mask=mask).is_sparse is sparse


# Masks that must not be used


def a_mask(
    *, seed: int = SEED, density: float = 0.25, rank: int = RANK, targets: str | None = None
) -> LoriMask:
    """A mask for the tiny Llama, or for what differs from it."""
    options: dict[str, Any] = {"lori_seed": seed, "lori_density": density, "r": rank}
    if targets is not None:
        options["target_modules"] = targets.split()
    model = lori_model(**options)
    mask = model.peft_config["default"].mask
    assert mask is not None
    return mask


@contextmanager
def leaving_the_base_alone(error: type[Exception], names: str) -> Iterator[Any]:
    """Yield a fresh base that must be as it was after `error` was raised inside."""
    base = tiny_base()
    base.get_submodule("model.embed_tokens").weight.requires_grad_(False)
    with pytest.raises(error, match=names):
        yield base
    assert not has_lora_layers(base)
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), logits(tiny_base()))
    idle = [name for name, weight in base.named_parameters() if not weight.requires_grad]
    assert idle == ["model.embed_tokens.weight"]
    # And the same model can be given an adapter after the mistake is repaired.
    get_peft_model(base, lori_config())


@pytest.mark.parametrize(
    ("made_with", "used_with", "names"),
    [
        ({}, {"lori_seed": 4}, "A of seed 3, lori_seed is 4; set lori_seed=3"),
        ({}, {"lori_density": 0.1}, "density 0.25, lori_density is 0.1; set lori_density=0.25"),
        ({}, {"r": 4}, "lori_mask is for rank 8, r is 4; set r=8"),
        ({}, {"rank_pattern": {"v_proj": 4}}, "layers.0.self_attn.v_proj: lori_mask is for rank 8"),
        ({"targets": "q_proj v_proj"}, {}, r"2 target layers without mask \(model.layers.0.mlp"),
        (
            {"targets": "q_proj v_proj down_proj k_proj"},
            {},
            r"2 masks without target layer \(model.layers.0.self_attn.k_proj",
        ),
    ],
)
def test_a_mask_that_does_not_fit_the_configuration_is_refused(
    tmp_path, made_with, used_with, names
):
    save_mask(tmp_path, a_mask(**made_with))
    with leaving_the_base_alone(ValueError, names) as base:
        get_peft_model(base, lori_config(lori_mask=tmp_path, **{"lori_seed": SEED, **used_with}))


def test_a_mask_of_a_model_of_other_shapes_is_refused_by_layer(tmp_path):
    wide = lori_model(tiny_base(hidden_size=32), lori_seed=SEED)
    save_mask(tmp_path, wide.peft_config["default"].mask)
    names = r"layers\.0\.self_attn\.q_proj.*shape \(32, 32\), this one is \(16, 16\) \(out, in\)"
    with leaving_the_base_alone(ValueError, names) as base:
        get_peft_model(base, lori_config(lori_mask=tmp_path, lori_seed=SEED))


def tampered(path: Path, edit: Callable[[dict[str, Any]], None]) -> str:
    """A mask file whose JSON header was edited."""
    save_mask(path, a_mask())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    ((key, text),) = ((key, text) for key, text in metadata.items() if key != "format")
    header = json.loads(text)
    edit(header)
    save_file(load_file(path), path, {key: json.dumps(header)})
    return str(path)


def test_a_mask_over_another_a_is_refused_by_layer(tmp_path):
    def edit(header):
        header["layers"]["model.layers.1.mlp.down_proj"][-1] = "0" * 16

    path = tampered(tmp_path / "mask.safetensors", edit)
    names = r"layers\.1\.mlp\.down_proj has another A than the mask was made with"
    with leaving_the_base_alone(ValueError, names) as base:
        get_peft_model(base, lori_config(lori_mask=path, lori_seed=SEED))


@pytest.mark.parametrize(
    ("content", "error", "names"),
    [
        (None, FileNotFoundError, "lori_mask.*mask.safetensors"),
        (b"\x80\x04.", ValueError, "not a readable safetensors file"),
    ],
)
def test_a_file_that_is_missing_or_no_mask_is_refused_before_peft_begins(
    tmp_path, content, error, names
):
    path = tmp_path / "mask.safetensors"
    if content is not None:
        path.write_bytes(content)
    with leaving_the_base_alone(error, names) as base:
        get_peft_model(base, lori_config(lori_mask=path))


def test_a_truncated_mask_and_a_folder_without_one_are_refused(tmp_path):
    save_mask(tmp_path, a_mask())
    truncate(tmp_path / MASK_FILE_NAME)
    with leaving_the_base_alone(ValueError, "truncated") as base:
        get_peft_model(base, lori_config(lori_mask=tmp_path, lori_seed=SEED))
    (tmp_path / MASK_FILE_NAME).unlink()
    with leaving_the_base_alone(FileNotFoundError, MASK_FILE_NAME) as base:
        get_peft_model(base, lori_config(lori_mask=tmp_path, lori_seed=SEED))


def test_a_pickled_mask_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "0.9_mask.pt"
    path.write_bytes(b"\x80\x04.")
    with leaving_the_base_alone(ValueError, r"lori_mask.*0\.9_mask\.pt") as base:
        get_peft_model(base, lori_config(lori_mask=path))


def test_a_density_of_which_no_entry_is_left_is_refused():
    with leaving_the_base_alone(ValueError, "density=1e-06 keeps none of the") as base:
        get_peft_model(base, lori_config(lori_density=1e-6))


def test_a_random_mask_that_keeps_nothing_in_a_layer_is_refused_by_layer():
    names = r"layer model\.layers.* keeps no entry.*floor"
    with leaving_the_base_alone(ValueError, names) as base:
        get_peft_model(base, lori_config(lori_density=0.002))


def test_a_calibration_that_trained_nothing_gives_no_mask():
    """The reference implementation then trains everything, without a word."""
    model = lori_model(lori_density=1.0)
    scores = magnitude_scores({name: lora_B for name, (_, lora_B) in factors(model).items()})
    with pytest.raises(ValueError, match="zero everywhere"):
        LayerScores(scores, {}, 0, {"kind": "magnitude"}).mask(Selection())


def test_one_configuration_does_not_serve_two_masks():
    """It is what the mask is saved from."""
    config = lori_config(target_modules="all-linear")
    get_peft_model(tiny_base(), config)
    get_peft_model(tiny_base(), config)
    config.lori_seed = 5
    with leaving_the_base_alone(ValueError, "LoriConfig of its own for each model") as base:
        get_peft_model(base, config)


# Starting points that must not be used


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory) -> Path:
    model = lori_model(lori_seed=SEED)
    train(model)
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lori_seed": 4}, "lori_start: layer model.layers.0.self_attn.q_proj.* another A"),
        ({"r": 4, "lora_alpha": 8}, "same lori_seed and r"),
        ({"lora_alpha": 4}, "has the scaling 2, here it is 0.5.*lora_alpha"),
        ({"use_rslora": True}, "lora_alpha, alpha_pattern and use_rslora"),
        ({"alpha_pattern": {"v_proj": 1}}, r"layer model\.layers\.0\.self_attn\.v_proj .*scaling"),
        ({"target_modules": ["k_proj"]}, r"has no layer model\.layers\.0\.self_attn\.k_proj"),
    ],
)
def test_an_adapter_to_start_from_that_does_not_fit_is_refused(trained_folder, options, names):
    with leaving_the_base_alone(ValueError, names) as base:
        given = {"lori_start": trained_folder, "lori_seed": SEED, **options}
        get_peft_model(base, lori_config(**given))


def test_an_adapter_to_start_from_that_is_missing_is_refused(tmp_path):
    with leaving_the_base_alone(FileNotFoundError, "nonesuch") as base:
        get_peft_model(base, lori_config(lori_start=tmp_path / "nonesuch"))


# Saving and reading back


def test_what_is_saved_is_the_config_of_a_stock_lora(tmp_path):
    model = lori_model()
    model.save_pretrained(str(tmp_path / "ours"))
    stock = get_peft_model(
        tiny_base(),
        LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"
        ),
    )
    stock.save_pretrained(str(tmp_path / "stock"))
    ours, expected = (
        json.loads((tmp_path / kind / "adapter_config.json").read_text())
        for kind in ("ours", "stock")
    )
    for saved in (ours, expected):
        saved["target_modules"] = sorted(saved["target_modules"])
    assert ours == expected
    assert type(PeftConfig.from_pretrained(str(tmp_path / "ours"))) is LoraConfig


def test_its_own_from_pretrained_restores_every_option(tmp_path):
    model = lori_model(
        lori_seed=SEED,
        lori_scope="matrix",
        lori_floor=0.1,
        rank_pattern={"v_proj": 4},
        alpha_pattern={"v_proj": 4},
        lora_dropout=0.25,
        use_rslora=True,
    )
    saved = model.peft_config["default"]
    model.save_pretrained(str(tmp_path))
    found = LoriConfig.from_pretrained(str(tmp_path))
    expected = {
        **dataclasses.asdict(saved),
        "lori_mask": str(tmp_path / MASK_FILE_NAME),
        "lori_scope": "global",  # Those of the mask are in its file.
        "lori_floor": 0.0,
        "inference_mode": True,
    }
    expected["target_modules"] = sorted(expected["target_modules"])
    assert {**dataclasses.asdict(found), "target_modules": expected["target_modules"]} == expected
    found.save_pretrained(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / SIDECAR_NAME).read_text())["lori_scope"] == "global"
    written = load_mask(tmp_path)
    assert written.scope == "matrix" and written.floor == 0.1 and written.seed == SEED
    for name, layer in saved.mask.layers.items():
        assert torch.equal(written.layers[name].mask, layer.mask)


def test_a_subfolder_is_restored_too(tmp_path):
    model = lori_model()
    model.add_adapter("second", lori_config(lori_seed=SEED))
    model.save_pretrained(str(tmp_path))
    config = LoriConfig.from_pretrained(str(tmp_path), subfolder="second")
    assert config.lori_seed == SEED
    assert config.lori_mask == str(tmp_path / "second" / MASK_FILE_NAME)


def test_no_path_of_a_file_from_elsewhere_is_followed(tmp_path, trained_folder):
    """Not that of a mask, nor that of an adapter to start from."""
    model = lori_model(lori_start=trained_folder, lori_seed=SEED, lori_density=0.5)
    model.save_pretrained(str(tmp_path))
    sidecar = tmp_path / SIDECAR_NAME
    options = json.loads(sidecar.read_text())
    assert options["lori_start"] == str(trained_folder)
    options.update(lori_mask="/elsewhere/mask.safetensors", lori_start="/elsewhere")
    sidecar.write_text(json.dumps(options))
    config = LoriConfig.from_pretrained(str(tmp_path))
    assert config.lori_mask == str(tmp_path / MASK_FILE_NAME)
    assert config.lori_start == str(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path)), logits(model))


def test_a_sidecar_without_its_mask_is_refused(tmp_path):
    lori_model().save_pretrained(str(tmp_path))
    (tmp_path / MASK_FILE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=MASK_FILE_NAME):
        reloaded(tmp_path)


def test_the_calibration_run_is_saved_without_a_mask(tmp_path):
    lori_model(lori_density=1.0).save_pretrained(str(tmp_path))
    assert not (tmp_path / MASK_FILE_NAME).exists()
    assert not LoriConfig.from_pretrained(str(tmp_path)).is_sparse


def test_another_kind_of_folder_is_no_lori_adapter(tmp_path):
    LoraConfig(r=2).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=rf"no {SIDECAR_NAME}.*LoraConfig.from_pretrained"):
        LoriConfig.from_pretrained(str(tmp_path))
    SvdLoraConfig(r=2, svd_factors="x").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="saved by a SvdLoraConfig, not by a LoriConfig"):
        LoriConfig.from_pretrained(str(tmp_path))


def test_saving_leaves_the_live_config_alone(tmp_path):
    model = lori_model()
    before = dataclasses.asdict(model.peft_config["default"])
    model.save_pretrained(str(tmp_path))
    assert dataclasses.asdict(model.peft_config["default"]) == before


# Aliases


def test_the_alias_lori_means_the_default_config():
    stock = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="lori")  # pyright: ignore
    found = config_of_alias(stock)
    assert dataclasses.asdict(found) == dataclasses.asdict(
        LoriConfig(r=4, target_modules=["q_proj"])
    )


def test_the_alias_of_a_mask_takes_its_density_and_seed(tmp_path):
    save_mask(tmp_path, a_mask())
    alias: Any = f"lori:{tmp_path}"
    options: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": TARGETS["llama"],
        "task_type": "CAUSAL_LM",
    }
    by_string = get_peft_model(tiny_base(), LoraConfig(**options, init_lora_weights=alias))
    config = by_string.peft_config["default"]
    assert isinstance(config, LoriConfig)
    assert (config.lori_density, config.lori_seed) == (0.25, SEED)
    expected = lori_model(lori_mask=tmp_path, lori_seed=SEED)
    train(by_string)
    train(expected)
    assert torch.equal(logits(by_string), logits(expected))
    by_string.save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True


def test_a_bad_alias_raises_before_the_model_is_touched(tmp_path):
    alias: Any = f"lori:{tmp_path / 'nonesuch'}"
    with leaving_the_base_alone(FileNotFoundError, "init_lora_weights: .*nonesuch") as base:
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=alias))
