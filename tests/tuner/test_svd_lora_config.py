"""SvdLoraConfig: what it refuses, what it saves, and what reads it back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from support.peft_fixtures import (
    HELD_RANK,
    Scene,
    adapter_weights,
    aliased,
    equal_bits,
    has_lora_layers,
    logits,
    make_scene,
)

from peft_svdinit import LoriConfig, SvdLoraConfig
from peft_svdinit.factors import SIDECAR_NAME
from peft_svdinit.files import locate
from peft_svdinit.masks import MASK_FILE_NAME
from peft_svdinit.tuner.config.alias import config_of_alias

OPTIONS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["v_proj", "q_proj"],
    "svd_factors": "some/where/factors.safetensors",
    "svd_factors_revision": "main",
    "svd_start": "reference",
    "svd_split": "balanced",
    "svd_coverage": "partial",
    "svd_check_base": False,
    "lora_dropout": 0.25,
    "rank_pattern": {"layers.0.q_proj": 2},
    "alpha_pattern": {"layers.0.q_proj": 6},
    "task_type": "CAUSAL_LM",
    "modules_to_save": ["norm"],
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"svd_factors": ""}, ValueError, "svd_factors"),
        ({"svd_factors": torch.zeros(2, 2)}, TypeError, "initialize_lora_from_factors"),
        ({"svd_factors": {"a": torch.zeros(2)}}, TypeError, "initialize_lora_from_factors"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights"),
        ({"init_lora_weights": False}, ValueError, "init_lora_weights"),
        ({"svd_start": "middle"}, ValueError, "svd_start.*'middle'"),
        ({"svd_split": "input"}, ValueError, "svd_split.*'input'"),
        ({"svd_coverage": "loose"}, ValueError, "svd_coverage.*'loose'"),
        ({"svd_start": "reference", "use_dora": True}, ValueError, "use_dora"),
    ],
)
def test_an_impossible_option_is_refused_by_name(options, error, names):
    with pytest.raises(error, match=names):
        SvdLoraConfig(**{"svd_factors": "factors.safetensors", **options})


def test_a_path_object_is_kept_as_the_string_that_json_can_hold():
    options: dict[str, Any] = {"svd_factors": Path("a") / "factors.safetensors"}
    config = SvdLoraConfig(**options)
    assert config.svd_factors == str(Path("a") / "factors.safetensors")


@pytest.mark.parametrize("option", ["kasa_config", "arrow_config", "velora_config", "use_bdlora"])
def test_a_variant_whose_update_is_not_the_product_is_refused(option):
    options: dict[str, Any] = {option: {"scaling": 1}}
    with pytest.raises(ValueError, match=option):
        SvdLoraConfig(**{"svd_factors": "factors.safetensors", **options})


def test_to_dict_is_json():
    written = json.dumps(SvdLoraConfig(**OPTIONS).to_dict(), default=sorted)
    assert json.loads(written)["svd_start"] == "reference"


def test_copies_pickles_and_replacements_keep_every_option():
    config = SvdLoraConfig(**OPTIONS)
    for other in (
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
    ):
        assert isinstance(other, SvdLoraConfig)
        assert other == config
    assert dataclasses.replace(config, r=8).svd_factors == config.svd_factors


def unsaid(config: SvdLoraConfig) -> SvdLoraConfig:
    """The config with what loaders say left to them."""
    return dataclasses.replace(config, inference_mode=None)  # pyright: ignore[reportArgumentType]


def test_its_own_from_pretrained_restores_every_option(tmp_path):
    config = SvdLoraConfig(**OPTIONS)
    config.save_pretrained(str(tmp_path))
    restored = SvdLoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(restored, SvdLoraConfig)
    assert restored == unsaid(config)


def test_a_subfolder_is_restored_too(tmp_path):
    config = SvdLoraConfig(**OPTIONS)
    config.save_pretrained(str(tmp_path / "second"))
    assert SvdLoraConfig.from_pretrained(str(tmp_path), subfolder="second") == unsaid(config)


def test_a_stock_adapter_folder_is_no_svd_adapter(tmp_path):
    LoraConfig(r=4).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=SIDECAR_NAME):
        SvdLoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("config_class", [SvdLoraConfig, LoriConfig])
def test_options_of_a_newer_version_are_ignored_with_a_warning(tmp_path, config_class):
    """As PEFT does with those of an adapter_config.json."""
    options: dict[str, Any] = {"svd_factors": "f"} if config_class is SvdLoraConfig else {}
    config_class(r=4, **options).save_pretrained(str(tmp_path))
    expected = config_class.from_pretrained(str(tmp_path))
    sidecar = tmp_path / SIDECAR_NAME
    newer = {"use_better_lora": True, "nested": {"a": 1}, "peft_version": "9.9"}
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **newer}))
    names = r"ignored: nested, use_better_lora\..*newer PEFT \(9\.9\)"
    with pytest.warns(UserWarning, match=names):
        found = config_class.from_pretrained(str(tmp_path))
    assert found == dataclasses.replace(expected, peft_version="9.9", init_lora_weights=True)


@pytest.mark.parametrize(
    ("config_class", "given", "meant"),
    [(SvdLoraConfig, "svd_strat", "svd_start"), (LoriConfig, "lori_densty", "lori_density")],
)
def test_a_misspelt_option_is_refused_with_what_was_meant(tmp_path, config_class, given, meant):
    names = rf"{given}', did you mean '{meant}'\?; .*replace\(config, {meant}=\.\.\.\)"
    with pytest.raises(TypeError, match=names):
        config_class.from_pretrained(str(tmp_path), **{given: "x"})


@pytest.mark.parametrize("config_class", [SvdLoraConfig, LoriConfig])
@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("r", r"'r'; the options of the adapter are those.*replace\(config, r=\.\.\.\)"),
        ("revison", r"'revison', did you mean 'revision'\?$"),
        ("qqqq", r"'qqqq'$"),
        ("filename", "'filename'"),
    ],
)
def test_an_argument_that_from_pretrained_would_not_use_is_refused(
    tmp_path, config_class, given, names
):
    with pytest.raises(TypeError, match=rf"{config_class.__name__}\.from_pretrained\(\).*{names}"):
        config_class.from_pretrained(str(tmp_path), **{given: "x"})


def test_what_peft_downloads_with_is_taken_of_a_folder_too(tmp_path):
    config = SvdLoraConfig(**OPTIONS)
    config.save_pretrained(str(tmp_path / "second"))
    given: dict[str, Any] = {
        "revision": "main",
        "token": None,
        "cache_dir": "x",
        "local_files_only": True,
    }
    found = SvdLoraConfig.from_pretrained(str(tmp_path), subfolder="second", **given)
    assert found == unsaid(config)


@pytest.mark.parametrize("config_class", [SvdLoraConfig, LoriConfig])
def test_an_adapter_of_the_hub_is_fetched_with_what_was_given(tmp_path, monkeypatch, config_class):
    asked = []

    def fetch(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options))
        return str(tmp_path / options["subfolder"] / filename)

    monkeypatch.setattr(locate, "hf_hub_download", fetch)
    is_svd = config_class is SvdLoraConfig
    options: dict[str, Any] = {"svd_factors": "f"} if is_svd else {"lori_start": "elsewhere"}
    config_class(r=4, **options).save_pretrained(str(tmp_path / "second"))
    given: dict[str, Any] = {"revision": "v1", "token": "t", "cache_dir": str(tmp_path / "cache")}
    found = config_class.from_pretrained("user/adapter", subfolder="second", **given)
    assert type(found) is config_class
    names = [SIDECAR_NAME]
    if isinstance(found, LoriConfig):
        names += [MASK_FILE_NAME, "adapter_config.json", "adapter_model.safetensors"]
        assert found.lori_mask == str(tmp_path / "second" / MASK_FILE_NAME)
        assert found.lori_start == str(tmp_path / "second")
    expected = {"subfolder": "second", **given}
    assert asked == [("user/adapter", name, expected) for name in names]


@pytest.mark.parametrize("reader", [LoraConfig, PeftConfig])
@pytest.mark.parametrize("start", ["delta", "subspace", "reference"])
def test_what_is_saved_is_the_config_of_a_stock_lora(tmp_path, reader, start):
    SvdLoraConfig(**{**OPTIONS, "svd_start": start}).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    stock = {entry.name for entry in dataclasses.fields(LoraConfig)}
    assert saved.keys() <= stock | {"peft_version"}
    assert not [key for key in saved if key.startswith("svd_")]
    found = reader.from_pretrained(str(tmp_path))
    assert type(found) is LoraConfig
    assert found.init_lora_weights is True
    growth = 2 if start == "reference" else 1
    assert (found.r, found.lora_alpha) == (growth * 4, growth * 12)
    assert found.rank_pattern == {"layers.0.q_proj": growth * 2}
    assert found.alpha_pattern == {"layers.0.q_proj": growth * 6}
    assert found.target_modules == {"q_proj", "v_proj"}


def test_the_options_that_servers_read_are_plain_numbers_and_names(tmp_path):
    """vLLM reads r, lora_alpha, use_rslora, use_dora and target_modules, and no patterns."""
    SvdLoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], svd_factors="f", svd_start="reference"
    ).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 8 and saved["lora_alpha"] == 16
    assert type(saved["r"]) is int and type(saved["lora_alpha"]) is int
    assert saved["target_modules"] == ["q_proj"]
    assert saved["use_rslora"] is False and saved["use_dora"] is False
    assert saved["rank_pattern"] == {} and saved["alpha_pattern"] == {}
    assert saved["modules_to_save"] is None


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_doubled_rank_of_a_saved_reference_keeps_the_scaling(use_rslora):
    config = SvdLoraConfig(**{**OPTIONS, "use_rslora": use_rslora})
    stock = config.stock()

    def scaling(alpha: float, rank: int) -> float:
        return alpha / rank**0.5 if use_rslora else alpha / rank

    assert scaling(stock.lora_alpha, stock.r) == pytest.approx(scaling(12, 4))
    key = "layers.0.q_proj"
    assert stock.alpha_pattern and stock.rank_pattern
    assert scaling(stock.alpha_pattern[key], stock.rank_pattern[key]) == pytest.approx(
        scaling(6, 2)
    )


def test_saving_leaves_the_live_config_alone(scene, tmp_path):
    model = scene.peft_model(svd_start="reference")
    before = copy.deepcopy(model.peft_config["default"])
    model.save_pretrained(str(tmp_path))
    assert model.peft_config["default"] == before


def test_a_second_save_replaces_the_first_and_leaves_no_temporary_file(scene, tmp_path):
    model = scene.peft_model()
    model.save_pretrained(str(tmp_path))
    first = sorted(path.name for path in tmp_path.iterdir())
    model.save_pretrained(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == first
    assert SIDECAR_NAME in first
    assert not [name for name in first if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_alias_means_the_default_svd_config():
    config = config_of_alias(aliased("some/repository", r=4, target_modules=["q_proj"]))
    assert config == SvdLoraConfig(
        r=4, target_modules=["q_proj"], svd_factors="some/repository", init_lora_weights=True
    )


@pytest.mark.parametrize(
    ("alias", "options"),
    [
        ("svd_subspace:some/file", {"svd_factors": "some/file", "svd_start": "subspace"}),
        ("svd_reference:some/file", {"svd_factors": "some/file", "svd_start": "reference"}),
        (
            "svd_weight",
            {"svd_source": "weight", "svd_start": "reference", "svd_split": "balanced"},
        ),
    ],
)
def test_other_starts_have_an_alias_too(alias, options):
    config = config_of_alias(LoraConfig(r=4, init_lora_weights=alias))
    assert config == SvdLoraConfig(r=4, init_lora_weights=True, **options)


def test_another_config_is_no_alias():
    config = LoraConfig(r=4, init_lora_weights="pissa")
    assert config_of_alias(config) is config


def test_the_alias_starts_as_the_config_does_and_saves_as_stock(scene, tmp_path):
    config = aliased(
        str(scene.file),
        r=HELD_RANK,
        lora_alpha=2 * HELD_RANK,
        target_modules=scene.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(scene.model(), config)
    expected = scene.peft_model()
    assert equal_bits(adapter_weights(model), adapter_weights(expected))
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert SvdLoraConfig.from_pretrained(str(tmp_path)).svd_factors == str(scene.file)


@pytest.mark.parametrize("path", ["", "no/such/folder/factors.safetensors"])
def test_a_bad_alias_raises_before_the_model_is_touched(scene, path):
    model = scene.model()
    config = aliased(path, target_modules=scene.targets)
    with pytest.raises((ValueError, FileNotFoundError), match="svd_factors"):
        get_peft_model(model, config)
    assert not has_lora_layers(model)
