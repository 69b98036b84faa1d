"""Adapters saved from compiled, sharded or checkpointed models are those of the model within."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapter_files import kohya_deltas, kohya_lora, lycoris_peft, peft_deltas
from support.tiny_models import respell, rewrite_tensors, tiny_model, trained_adapter
from torch import Tensor, nn

from peft_svdinit import LoriConfig
from peft_svdinit.adapters import merge, resize
from peft_svdinit.factors import LoraAdapter, RankRule
from peft_svdinit.masks import scores_of_adapter
from peft_svdinit.models import unwrapped, unwrapped_keys

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def within(part: str) -> Callable[[str], str]:
    """A wrapper around every block of the model."""
    return lambda key: key.replace(".layers.0.", f".layers.0.{part}.").replace(
        ".layers.1.", f".layers.1.{part}."
    )


def before(part: str) -> Callable[[str], str]:
    """A wrapper around the PeftModel."""
    return lambda key: f"{part}.{key}" if key.startswith(PREFIX) else key


def around_the_base(part: str) -> Callable[[str], str]:
    """A wrapper around the base model, within PEFT's: what PEFT calls modules has it too."""

    def spelled(key: str) -> str:
        name = key.removeprefix(PREFIX)
        return f"{PREFIX if key.startswith(PREFIX) else ''}{part}.{name}"

    return spelled


# As keys and module names are spelled.
WRAPPERS: dict[str, Callable[[str], str]] = {
    "compiled PeftModel": before("_orig_mod"),
    "compiled base": around_the_base("_orig_mod"),
    "compiled blocks": within("_orig_mod"),
    "FSDP": lambda key: before("_fsdp_wrapped_module")(within("_fsdp_wrapped_module")(key)),
    "checkpointed blocks": within("_checkpoint_wrapped_module"),
    "DDP of PeftModel": before("module"),
    "DDP of compiled blocks": lambda key: before("module")(within("_orig_mod")(key)),
}
by_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=list(WRAPPERS))
LAYER = "model.layers.0.self_attn.q_proj"


def wrapped(plain: Path, folder: Path, spell: Callable[[str], str], **config: Any) -> Path:
    """The adapter of `plain` as it is saved from a wrapped model; `config` goes to its options."""
    shutil.copytree(plain, folder)
    respell(folder / WEIGHTS, spell)
    options = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(options | config))
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    """What stock PEFT adds to every layer of the plain model, all that is stored accounted for."""
    model = PeftModel.from_pretrained(tiny_model(), str(folder))
    stored = {key.rpartition(".lora_")[0] for key in load_file(folder / WEIGHTS)}
    found = peft_deltas(model)
    assert {f"{PREFIX}{name}" for name in found} == stored
    return found


def assert_sum(folder: Path, *terms: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    found = loaded(folder)
    assert found.keys() == {name for term in terms for name in term}
    for name, delta in found.items():
        expected = sum(term.get(name, torch.zeros(())) for term in terms)
        torch.testing.assert_close(delta, expected, rtol=0, atol=tolerance)


SELECTIONS: dict[str, Callable[[Callable[[str], str]], dict[str, Any]]] = {
    "endings": lambda spell: {},
    "names": lambda spell: {
        "target_modules": [
            spell(f"model.layers.{index}.{end}")
            for index in (0, 1)
            for end in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        ]
    },
    "pattern": lambda spell: {"target_modules": ".*layers.*(q_proj|v_proj|down_proj)"},
    "layers": lambda spell: {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
}


@by_wrapper
@pytest.mark.parametrize("selection", SELECTIONS)
def test_wrapped_and_plain_adapters_merge_into_what_stock_peft_loads(tmp_path, wrapper, selection):
    one = peft_deltas(trained_adapter(tmp_path / "a"))
    # Patterns as PEFT matched them: with the wrapper in the module's name.
    patterns: dict[str, Any] = {
        "rank_pattern": {f"^{LAYER}": 2},
        "alpha_pattern": {f"^{LAYER}": 30, "down_proj": 5},
    }
    other = peft_deltas(trained_adapter(tmp_path / "b", seed=3, **patterns))
    spelled = {
        option: {f"^{wrapper(key[1:])}" if key[0] == "^" else key: v for key, v in values.items()}
        for option, values in patterns.items()
    }
    config = spelled | SELECTIONS[selection](wrapper)
    wrapped(tmp_path / "b", tmp_path / "w", wrapper, **config)
    merged = merge([tmp_path / "a", tmp_path / "w"], tmp_path / "m")
    assert merged.only_in_some == {} and len(merged.layers) == len(one)
    assert_sum(tmp_path / "m", one, other)
    merge([tmp_path / "w", tmp_path / "w"], tmp_path / "twice")
    assert_sum(tmp_path / "twice", other, other)
    resize([tmp_path / "w"], tmp_path / "r", RankRule(rank=8))
    assert_sum(tmp_path / "r", other)


@by_wrapper
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_wrapped_lycoris_adapters_become_loras_of_the_plain_model(tmp_path, wrapper, kind):
    kinds: dict[str, Any] = {
        "loha": LoHaConfig(r=2, alpha=7, target_modules=["q_proj"], alpha_pattern={f"^{LAYER}": 3}),
        "lokr": LoKrConfig(r=1, alpha=5, target_modules=["q_proj"], decompose_both=True),
    }
    expected = peft_deltas(lycoris_peft(tmp_path / "a", kinds[kind]))
    config = {"alpha_pattern": {f"^{wrapper(LAYER)}": 3}} if kind == "loha" else {}
    names = [wrapper(name) for name in expected]
    wrapped(tmp_path / "a", tmp_path / "w", wrapper, target_modules=names, **config)
    resize([tmp_path / "w"], tmp_path / "r", RankRule(rank=16))
    assert_sum(tmp_path / "r", expected, tolerance=1e-4)


@by_wrapper
def test_a_wrapped_adapter_reads_as_the_plain_one(tmp_path, wrapper):
    trained_adapter(tmp_path / "a", alpha_pattern={f"^{LAYER}": 30})
    # A wrapper that came after PEFT is in the keys alone.
    plain = LoraAdapter(tmp_path / "a")
    other = LoraAdapter(wrapped(tmp_path / "a", tmp_path / "w", wrapper))
    assert list(other) == list(plain)
    for name, product in plain.items():
        assert torch.equal(other[name].lora_A, product.lora_A)
        assert torch.equal(other[name].lora_B, product.lora_B)
        assert other[name].scaling == product.scaling


KOHYA: list[Callable[[str], str]] = [
    lambda key: key.replace("lora_unet_", "lora_unet__orig_mod_"),
    lambda key: key.replace("blocks_0_", "blocks_0__checkpoint_wrapped_module_"),
]


@pytest.mark.parametrize("spell", KOHYA)
def test_files_of_kohya_are_read_and_added_up_without_wrappers(tmp_path, spell):
    one, other = (tmp_path / f"{name}.safetensors" for name in "ab")
    expected = kohya_lora(one)
    for name, delta in kohya_lora(other, seed=2).items():
        expected[name] = expected[name] + delta
    tensors = load_file(other)
    respell(other, spell)
    assert load_file(other).keys() != tensors.keys()
    output = tmp_path / "c.safetensors"
    assert resize([one, other], output, RankRule(rank=8)).only_in_some == {}
    found = kohya_deltas(output)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, expected[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "unet._orig_mod.mid.q"])
def test_files_of_diffusers_are_read_and_written_without_wrappers(tmp_path, wrap):
    layer = wrap.format("unet.mid.q")
    tensors = {f"{layer}.lora_A.weight": torch.eye(3), f"{layer}.lora_B.weight": torch.eye(3)}
    configs = {"unet.r": 3, "unet.lora_alpha": 3, "unet.alpha_pattern": {"^mid.q": 6}}
    path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(configs)})
    resize([path], output, RankRule(rank=3))
    written = load_file(output)
    assert sorted(written) == ["unet.mid.q.lora_A.weight", "unet.mid.q.lora_B.weight"]
    product = written["unet.mid.q.lora_B.weight"] @ written["unet.mid.q.lora_A.weight"]
    torch.testing.assert_close(product, 2 * torch.eye(3))


@pytest.mark.parametrize("kind", ["lora", "loha", "kohya"])
def test_two_keys_that_are_one_without_wrappers_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "lora":
        trained_adapter(path)
    elif kind == "loha":
        lycoris_peft(path, LoHaConfig(r=2, target_modules=["q_proj"]))
    else:
        path = tmp_path / "a.safetensors"
        kohya_lora(path)
    file = path / WEIGHTS if path.is_dir() else path
    key = min(load_file(file))
    other = f"_orig_mod.{key}"
    rewrite_tensors(file, lambda tensors: tensors.update({other: tensors[key].clone()}))
    with pytest.raises(ValueError, match="which are one tensor") as error:
        resize([path], tmp_path / "r", RankRule(rank=2))
    assert key in str(error.value) and other in str(error.value)


PARTS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
NAMES = st.lists(st.sampled_from(["model", "module", "layers", "0", "q_proj"]), min_size=1)


@given(names=NAMES, data=st.data())
def test_names_lose_wrappers_wherever_they_are_and_nothing_else(names, data):
    words = list(names)
    for part in data.draw(st.lists(st.sampled_from(PARTS))):
        words.insert(data.draw(st.integers(0, len(words) - 1)), part)
    assert unwrapped(".".join(words)) == ".".join(names)


def test_module_is_a_wrapper_only_before_pefts_prefix():
    wrapped = f"module.{PREFIX}module.a"
    assert unwrapped_keys([wrapped]) == {f"{PREFIX}module.a": wrapped}
    for keys in ([wrapped, "b"], [f"{PREFIX}module.a", f"{PREFIX}module.b"], ["module.a"]):
        assert list(unwrapped_keys(keys)) == keys


def test_a_model_that_has_a_part_called_module_keeps_its_name(tmp_path):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    options: dict[str, Any] = {"r": 4, "target_modules": ["0", "1"], "init_lora_weights": False}
    adapted = get_peft_model(Outer(), LoraConfig(**options))  # pyright: ignore[reportArgumentType]
    adapted.save_pretrained(str(tmp_path / "a"))
    resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=4))
    loaded = PeftModel.from_pretrained(Outer(), str(tmp_path / "b"))  # pyright: ignore[reportArgumentType]
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded(x), adapted(x), atol=1e-5, rtol=0)


def test_lori_on_a_compiled_base_has_the_names_and_the_a_of_the_plain_one(tmp_path):
    base: Any = torch.compile(tiny_model())
    options: dict[str, Any] = {"r": 4, "lori_seed": 3, "target_modules": ["q_proj"]}
    compiled = get_peft_model(base, LoriConfig(**options, lori_density=1.0))
    keys = {name for name, _ in compiled.named_modules()}
    assert f"{PREFIX}_orig_mod.{LAYER}" in keys
    with torch.no_grad():
        for name, parameter in compiled.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    compiled.save_pretrained(str(tmp_path / "a"))
    assert any("_orig_mod" in key for key in load_file(tmp_path / "a" / WEIGHTS))
    scores = scores_of_adapter(tmp_path / "a")
    assert scores.source["same_A"] and f"{LAYER}" in scores.scores
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "m")
    plain = get_peft_model(tiny_model(), LoriConfig(**options, lori_start=str(tmp_path / "a")))
    found = loaded(tmp_path / "m")
    for name, delta in peft_deltas(plain).items():
        torch.testing.assert_close(found[name], 2 * delta, rtol=0, atol=1e-5)
