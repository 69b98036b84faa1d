"""Loading an adapter reads that adapter: no path, Hub id or alias in its files is followed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support.followed import AskedError, following
from support.peft_fixtures import Scene, aliased, equal_bits, logits, make_scene, train, tuned

from peft_svdinit import LoriConfig, SvdLoraConfig
from peft_svdinit.factors import SIDECAR_NAME
from peft_svdinit.masks import MASK_FILE_NAME

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_ID = "someone/repository"
HUB_ALIAS = f"svd_guided:{HUB_ID}"
KINDS = ("svd_guided:{}", "svd_subspace:{}", "svd_reference:{}", "lori:{}", "svd_weight", "lori")


@dataclass(frozen=True)
class Stranger:
    """A base, an adapter of it from elsewhere, and a folder of ours that it has no business in."""

    scene: Scene
    base: Path
    adapter: Path
    lori: Path
    elsewhere: Path

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter / WEIGHTS)

    @property
    def options(self) -> dict[str, Any]:
        return json.loads((self.adapter / CONFIG).read_text())

    def say(self, **options: Any) -> None:
        """Change the adapter's configuration."""
        (self.adapter / CONFIG).write_text(json.dumps({**self.options, **options}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Stranger:
    folder = tmp_path_factory.mktemp("saved")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    scene = make_scene(folder)
    scene.file.rename(elsewhere / "factors.safetensors")
    scene.model().save_pretrained(str(folder / "base"))
    options = {"r": 5, "target_modules": scene.targets, "task_type": "CAUSAL_LM"}
    lori = get_peft_model(scene.model(), LoriConfig(**options, lori_density=0.5))
    lori.save_pretrained(str(folder / "lori"))
    shutil.copy(folder / "lori" / MASK_FILE_NAME, elsewhere)
    torch.manual_seed(3)
    config = LoraConfig(**options, init_lora_weights=False)
    get_peft_model(scene.model(), config).save_pretrained(str(folder / "adapter"))
    return Stranger(scene, folder / "base", folder / "adapter", folder / "lori", elsewhere)


@pytest.fixture
def stranger(saved: Stranger, tmp_path: Path) -> Stranger:
    adapter = tmp_path / "adapter"
    shutil.copytree(saved.adapter, adapter)
    found = replace(saved, adapter=adapter)
    found.say(base_model_name_or_path=str(saved.base))
    return found


def base_of(found: Stranger) -> Any:
    return found.scene.model()


def whole(found: Stranger, **options: Any) -> Any:
    return PeftModel.from_pretrained(base_of(found), str(found.adapter), **options)


def second(found: Stranger) -> Any:
    model = get_peft_model(base_of(found), LoraConfig(target_modules=found.scene.targets))
    model.load_adapter(str(found.adapter), "second")
    model.delete_adapter("default")
    return model


def swapped(found: Stranger) -> Any:
    config = LoraConfig(r=5, target_modules=found.scene.targets)
    model = get_peft_model(base_of(found), config)
    hotswap_adapter(model, str(found.adapter), "default", torch_device="cpu")
    return model


def of_transformers(found: Stranger, **options: Any) -> Any:
    model = base_of(found)
    model.load_adapter(**{"peft_model_id": str(found.adapter), **options})
    return model


def injected(found: Stranger, config: LoraConfig) -> Any:
    """As diffusers does: its configuration comes from the header of the file of weights."""
    tensors = bare(found.tensors)
    model = inject_adapter_in_model(config, base_of(found), state_dict=tensors)
    set_peft_model_state_dict(model, tensors)
    return model


def remade(found: Stranger, config: Any) -> Any:
    """As tools do that read the configuration first, and the weights themselves."""
    model = get_peft_model(base_of(found), config)
    set_peft_model_state_dict(model, found.tensors)
    return model


def bare(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}


WAYS: dict[str, Callable[[Stranger], Any]] = {
    "inference": whole,
    "training": lambda found: whole(found, is_trainable=True),
    "low_cpu_mem_usage": lambda found: whole(found, low_cpu_mem_usage=True, is_trainable=True),
    "no autocast": lambda found: whole(found, autocast_adapter_dtype=False),
    "second": second,
    "auto": lambda found: AutoPeftModelForCausalLM.from_pretrained(str(found.adapter)),
    "transformers": of_transformers,
    "transformers, to train": lambda found: of_transformers(found, is_trainable=True),
    "transformers, in memory": lambda found: of_transformers(
        found,
        peft_model_id=None,
        peft_config=LoraConfig(**found.options),
        adapter_state_dict=found.tensors,
    ),
    "state_dict": lambda found: injected(found, LoraConfig(**found.options)),
    "PeftConfig": lambda found: remade(found, PeftConfig.from_pretrained(str(found.adapter))),
    "changed": lambda found: remade(
        found, replace(LoraConfig.from_pretrained(str(found.adapter)), lora_dropout=0.1)
    ),
    "hotswap": swapped,
}


@pytest.mark.filterwarnings("ignore:.*is not followed")
@pytest.mark.parametrize(("number", "way"), enumerate(WAYS))
def test_loading_follows_no_alias_and_gives_the_weights_of_the_file(
    stranger, monkeypatch, number, way
):
    # PEFT's own question for a tokenizer beside the adapter, in the repository it is from.
    monkeypatch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda *_, **__: False)
    place = HUB_ID if number % 2 else stranger.elsewhere
    alias = KINDS[number % len(KINDS)].format(place)
    # Of a saved adapter it is True. That alone tells one whose configuration is read and then used.
    stranger.say(init_lora_weights=alias, inference_mode=way in ("PeftConfig", "changed"))
    with following(stranger.elsewhere) as followed:
        model = WAYS[way](stranger)
    assert not followed
    (name,) = model.peft_config
    assert type(model.peft_config[name]) is LoraConfig
    found = get_peft_model_state_dict(model, adapter_name=name)
    assert equal_bits(bare(found), bare(stranger.tensors))


@pytest.mark.parametrize("which", range(len(KINDS)))
def test_an_alias_of_a_file_is_named_and_neither_followed_nor_passed_on(stranger, which, tmp_path):
    """And where an adapter is made it is followed, by which the watch is seen to see."""
    alias = KINDS[which].format(stranger.elsewhere)
    stranger.say(init_lora_weights=alias)
    with (
        pytest.warns(UserWarning, match=rf"{alias!r} is not followed"),
        following(stranger.elsewhere) as followed,
    ):
        model = whole(stranger, is_trainable=True)
    assert not followed
    model.save_pretrained(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["init_lora_weights"] is True
    made = LoraConfig(**{**stranger.options, "inference_mode": False})
    with following(stranger.elsewhere) as followed:
        model = get_peft_model(base_of(stranger), made)
    assert type(model.peft_config["default"]) in (SvdLoraConfig, LoriConfig)
    assert followed.opened == ("{}" in KINDS[which])


def test_the_watch_sees_the_hub_being_asked(stranger):
    config = aliased(HUB_ID, target_modules=stranger.scene.targets)
    with pytest.raises(AskedError), following(stranger.elsewhere) as followed:
        get_peft_model(base_of(stranger), config)
    assert followed.hosts


def test_a_configuration_that_was_read_is_the_one_in_the_file(stranger):
    """Which PEFT's own tuner refuses, also in a mixed model."""
    stranger.say(init_lora_weights=HUB_ALIAS)
    read = LoraConfig.from_pretrained(str(stranger.adapter))
    assert read == LoraConfig(**stranger.options)
    for other in (copy.deepcopy(read), replace(read), pickle.loads(pickle.dumps(read))):
        with pytest.warns(UserWarning, match="is not followed"):
            get_peft_model(base_of(stranger), other)
    with pytest.raises(ValueError, match=HUB_ID):
        PeftMixedModel.from_pretrained(base_of(stranger), str(stranger.adapter))


# The file beside the configuration


def read_beside(found: Stranger, source: str) -> SvdLoraConfig:
    """The configuration of a sidecar that names factors elsewhere."""
    config = found.scene.config(svd_factors=source)
    config.save_pretrained(str(found.adapter))
    return SvdLoraConfig.from_pretrained(str(found.adapter))


SIDECAR_WAYS: dict[str, Callable[[Stranger, Any], Any]] = {
    "inference": lambda found, config: whole(found, config=config),
    "training": lambda found, config: whole(found, config=config, is_trainable=True),
    "changed": lambda found, config: whole(found, config=replace(config, lora_dropout=0.1)),
    "state_dict": injected,
}


@pytest.mark.parametrize("way", SIDECAR_WAYS)
def test_loading_by_a_sidecar_opens_no_factors(stranger, way):
    for source in (str(stranger.elsewhere), HUB_ID):
        config = read_beside(stranger, source)
        with following(stranger.elsewhere) as followed:
            model = SIDECAR_WAYS[way](stranger, config)
        assert not followed
        assert model.peft_config["default"].svd_factors == source
        assert equal_bits(bare(get_peft_model_state_dict(model)), bare(stranger.tensors))


def test_making_a_new_adapter_by_a_sidecar_starts_from_its_factors(stranger):
    config = read_beside(stranger, str(stranger.elsewhere))
    for given in (config, replace(config, lora_dropout=0.1, inference_mode=False)):
        with following(stranger.elsewhere) as followed:
            model = get_peft_model(base_of(stranger), given)
        assert followed
        expected = tuned(stranger.scene.base, stranger.scene.factors)
        assert (logits(model) - logits(expected)).abs().max() < 1e-4
        train(model, steps=1)


def test_a_lori_sidecar_means_the_files_of_its_own_folder(stranger):
    shutil.copytree(stranger.lori, stranger.adapter, dirs_exist_ok=True)
    sidecar = stranger.adapter / SIDECAR_NAME
    foreign = {"lori_mask": str(stranger.elsewhere), "lori_start": HUB_ID}
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **foreign}))
    with following(stranger.elsewhere) as followed:
        config = LoriConfig.from_pretrained(str(stranger.adapter))
        model = whole(stranger, config=config)
    assert not followed
    assert equal_bits(get_peft_model_state_dict(model), stranger.tensors)
