"""Factors exported as a LoRA adapter of stock PEFT."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TaskType
from safetensors.torch import load_file
from support.peft_fixtures import logits, orientation, teacher_factors, tuned
from support.reference import array, frobenius
from support.strategies import layer_factors
from support.tiny_models import ARCHITECTURES, TARGETS, save_pair, tiny_model
from transformers import LlamaForSequenceClassification

from peft_svdinit import LowRankFactors
from peft_svdinit.adapters import export_adapter
from peft_svdinit.adapters.dtypes import torch_dtype
from peft_svdinit.adapters.export.record import ExportedAdapter
from peft_svdinit.adapters.record import KeptLayer
from peft_svdinit.adapters.rounding import rounded, rounding_error
from peft_svdinit.cli import main
from peft_svdinit.factors import (
    CheckpointPair,
    FactorsMetadata,
    SvdGuided,
    factors_of_checkpoints,
    save_factors,
)
from peft_svdinit.models import task_type_of

HALF = ["bfloat16", "float16"]


def config_of(exported: ExportedAdapter) -> dict[str, Any]:
    return json.loads((exported.output / "adapter_config.json").read_text())


def layers_of(exported: ExportedAdapter) -> dict[str, KeptLayer]:
    return {layer.name: layer for layer in exported.layers}


def deltas_of(architecture: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each layer that the adapter has, (out, in)."""
    base = tiny_model(architecture, **options)  # pyright: ignore[reportArgumentType]
    found = {}
    loaded = PeftModel.from_pretrained(base, str(folder))
    modules: dict[str, Any] = dict(loaded.get_base_model().named_modules())
    for name, module in modules.items():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            found[name] = delta.mT if module.fan_in_fan_out else delta
    return found


def kept(layer: LowRankFactors, rank: int) -> torch.Tensor:
    return layer.truncated(rank).dense() if rank else torch.zeros(layer.shape)


def all_linear(architecture: str = "llama", **options: Any) -> dict[str, LowRankFactors]:
    base = tiny_model(architecture)  # pyright: ignore[reportArgumentType]
    return teacher_factors(base, "all-linear", **{"rank": 6, "held": 6, **options})


def zero(layer: LowRankFactors) -> LowRankFactors:
    return LowRankFactors(layer.U, torch.zeros_like(layer.S), layer.Vh, 0.0)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("split", ["output", "balanced"])
def test_small_layers_get_all_their_rank_and_the_rest_the_rank_asked_for(
    architecture, split, tmp_path
):
    pair = save_pair(tmp_path, architecture)
    extraction = factors_of_checkpoints(
        CheckpointPair(pair.base_folder, pair.tuned_folder),
        64,
        base_model_name_or_path="tiny",
        method="exact",
    )
    exported = export_adapter(extraction.factors, 12, tmp_path / "adapter", split=split)
    assert exported.rank == 12 and not exported.omitted
    small = {name for name, layer in extraction.factors.items() if min(layer.shape) < 12}
    assert bool(config_of(exported)["rank_pattern"]) == bool(small)
    found = deltas_of(architecture, exported.output)
    assert found.keys() == extraction.factors.keys()
    for name, layer in extraction.factors.items():
        rank = min(12, *layer.shape)
        assert layers_of(exported)[name].rank == rank
        assert torch.allclose(found[name], kept(layer, rank), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_may_have_a_rank_of_its_own(architecture, tmp_path):
    factors = all_linear(architecture)
    ranks = {name: 1 + index % 4 for index, name in enumerate(factors)}
    exported = export_adapter(factors, ranks, tmp_path / "adapter")
    config = config_of(exported)
    counts = {rank: list(ranks.values()).count(rank) for rank in ranks.values()}
    assert counts[config["r"]] == max(counts.values())
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {1, 2, 3, 4} - {config["r"]}
    for name, delta in deltas_of(architecture, exported.output).items():
        assert torch.linalg.matrix_rank(delta) == ranks[name]
        assert torch.allclose(delta, kept(factors[name], ranks[name]), atol=1e-5)


def test_the_most_frequent_rank_is_that_of_the_configuration(tmp_path):
    factors = all_linear()
    names = list(factors)
    ranks = {name: 5 if name in names[:3] else 2 for name in names}
    assert config_of(export_adapter(factors, ranks, tmp_path / "adapter"))["r"] == 2


def test_layers_without_a_delta_or_a_rank_are_left_out_and_reported(tmp_path, base_folder):
    factors = all_linear()
    none, untouched, *rest = factors
    factors[untouched] = zero(factors[untouched])
    ranks = {name: 0 if name == none else 3 for name in factors}
    exported = export_adapter(factors, ranks, tmp_path / "adapter", base=base_folder)
    assert exported.omitted == (none, untouched)
    assert layers_of(exported)[none].error == pytest.approx(factors[none].norm)
    assert layers_of(exported)[untouched].error == 0
    assert set(deltas_of("llama", exported.output)) == set(rest)
    # Short names would select the two that are left out.
    assert set(config_of(exported)["target_modules"]) == set(rest)


def test_a_uniform_adapter_has_one_rank_short_names_and_no_patterns(tmp_path, base_folder):
    factors = all_linear()
    untouched = next(iter(factors))
    factors[untouched] = zero(factors[untouched])
    ranks = {name: index % 5 for index, name in enumerate(factors)}
    exported = export_adapter(factors, ranks, tmp_path / "adapter", base=base_folder, uniform=True)
    config = config_of(exported)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in factors}
    assert not exported.omitted and layers_of(exported)[untouched].rank == 0
    for key, tensor in load_file(exported.output / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "lora_A" in key else 1] == 4
    for name, delta in deltas_of("llama", exported.output).items():
        assert torch.allclose(delta, kept(factors[name], ranks[name]), atol=1e-5), name


def test_a_uniform_adapter_leaves_out_kinds_of_layers_that_nobody_changed(tmp_path, base_folder):
    factors = {
        name: zero(layer) if name.endswith("v_proj") else layer
        for name, layer in all_linear().items()
    }
    exported = export_adapter(factors, 3, tmp_path / "adapter", base=base_folder, uniform=True)
    assert [name.rpartition(".")[2] for name in exported.omitted] == ["v_proj", "v_proj"]
    assert "v_proj" not in config_of(exported)["target_modules"]


def test_a_delta_of_lower_rank_gets_all_it_has(tmp_path):
    factors = {
        name: LowRankFactors.from_product(layer.U * layer.S, layer.Vh)
        for name, layer in all_linear(rank=3, held=3).items()
    }
    exported = export_adapter(factors, 8, tmp_path / "adapter")
    assert {layer.rank for layer in exported.layers} == {3} and exported.rank == 3
    assert exported.energy == pytest.approx(1.0)


def test_a_rank_above_what_is_held_is_refused_and_nothing_is_written(tmp_path):
    pair = save_pair(tmp_path)
    extraction = factors_of_checkpoints(
        CheckpointPair(pair.base_folder, pair.tuned_folder), 4, base_model_name_or_path="tiny"
    )
    with pytest.raises(ValueError, match=r"rank 8 is above the 4 triplets held for layer model\."):
        export_adapter(extraction.factors, 8, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@given(
    layer=layer_factors(),
    dtype=st.sampled_from(HALF),
    split=st.sampled_from(["output", "balanced"]),
)
def test_the_rounding_error_is_that_of_the_dense_products(layer, dtype, split):
    init = SvdGuided("delta", split)(layer, rank=layer.rank, scaling=1.0)
    stored = rounded(init, torch_dtype(dtype))
    assert stored.lora_A.dtype == stored.lora_B.dtype == torch_dtype(dtype)
    exact = array(init.lora_B) @ array(init.lora_A)
    expected = frobenius(exact - array(stored.lora_B) @ array(stored.lora_A))
    floor = 1e-14 * frobenius(exact)
    assert rounding_error(init, stored) == pytest.approx(expected, rel=1e-6, abs=floor)


def test_float32_factors_are_stored_without_rounding(tmp_path):
    exported = export_adapter(all_linear(), 4, tmp_path / "adapter")
    assert exported.relative_rounding_error == 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("split", ["output", "balanced"])
def test_the_promised_errors_are_those_of_the_stored_adapter(tmp_path, dtype, split):
    factors = all_linear()
    exported = export_adapter(factors, 3, tmp_path / "adapter", dtype=dtype, split=split)
    stored = load_file(exported.output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch_dtype(dtype)}
    assert 1e-5 < exported.relative_rounding_error < 5e-3
    for name, layer in factors.items():
        prefix = f"base_model.model.{name}.lora_"
        product = array(stored[f"{prefix}B.weight"]) @ array(stored[f"{prefix}A.weight"])
        measured = frobenius(array(layer.dense()) - product)
        assert exported.errors[name] == pytest.approx(measured, rel=1e-3)
        assert layers_of(exported)[name].truncation_error < exported.errors[name]


def test_the_energy_is_that_of_all_layers_together(tmp_path):
    factors = all_linear()
    exported = export_adapter(factors, 2, tmp_path / "adapter")
    held = sum(float((layer.S[:2] ** 2).sum()) for layer in factors.values())
    assert exported.energy == pytest.approx(held / sum(f.norm**2 for f in factors.values()))


def test_an_overflow_of_half_precision_names_the_layer_and_balanced_avoids_it(tmp_path):
    factors = all_linear(size=1e6)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\S* lora_B has an entry of size"):
        export_adapter(factors, 2, tmp_path / "adapter", dtype="float16")
    assert not (tmp_path / "adapter").exists()
    export_adapter(factors, 2, tmp_path / "adapter", dtype="float16", split="balanced")


def test_an_underflow_of_half_precision_is_warned_of(tmp_path, caplog):
    factors = all_linear(size=1e-6)
    with caplog.at_level(logging.WARNING):
        exported = export_adapter(factors, 2, tmp_path / "a", dtype="float16")
    assert "Rounding to float16 changes 14 layers by more than 0.01" in caplog.text
    assert exported.relative_rounding_error > 0.01
    caplog.clear()
    export_adapter(factors, 2, tmp_path / "b", dtype="float16", split="balanced")
    export_adapter(factors, 2, tmp_path / "c", dtype="bfloat16")
    assert not caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_no_numbers_name_the_layer(tmp_path, value):
    factors = all_linear()
    name = list(factors)[2]
    factors[name].Vh[0, 0] = value
    with pytest.raises(ValueError, match=rf"layer {name}: lora_A has NaN or infinite entries"):
        export_adapter(factors, 2, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


class Lazy(Mapping[str, Any]):
    """Layers that are made when asked for; `alive` counts those that somebody holds."""

    def __init__(self, layers: Mapping[str, LowRankFactors], *, fail_at: int | None = None) -> None:
        self.layers, self.fail_at, self.reads = layers, fail_at, 0
        self.made: list[weakref.ref] = []
        self.most_alive = 0

    def __getitem__(self, name: str) -> LowRankFactors:
        self.reads += 1
        if self.reads == self.fail_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.most_alive = max(self.most_alive, sum(made() is not None for made in self.made))
        stored = self.layers[name]
        layer = LowRankFactors(stored.U.clone(), stored.S, stored.Vh, stored.norm)
        self.made.append(weakref.ref(layer.U))
        return layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def test_one_layer_is_in_memory_at_a_time_and_the_bytes_are_the_same(tmp_path):
    lazy = Lazy(all_linear())
    streamed = export_adapter(lazy, 3, tmp_path / "streamed")
    at_once = export_adapter(lazy.layers, 3, tmp_path / "at_once")
    assert lazy.reads == 2 * len(lazy) and lazy.most_alive <= 1
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (streamed.output / name).read_bytes() == (at_once.output / name).read_bytes()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_kill_while_writing_leaves_the_old_adapter(tmp_path):
    factors = all_linear()
    folder = export_adapter(factors, 2, tmp_path / "adapter").output
    before = content(folder)
    child = os.fork()
    if not child:
        try:
            export_adapter(Lazy(factors, fail_at=len(factors) + 3), 4, folder)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert content(folder) == before


def test_a_full_disk_is_an_os_error_and_leaves_the_old_adapter(tmp_path):
    factors = all_linear()
    folder = export_adapter(factors, 1, tmp_path / "adapter").output
    before = content(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            export_adapter(factors, 6, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"ranks": {"model.layers.0.self_attn.q_proj": 2}}, "is in one of the two only"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"factors": {}}, "there is no adapter to write"),
        ({"modules_to_save": {"model.norm.weight": torch.ones(16)}}, "modules_to_save needs base"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(tmp_path, change, message):
    arguments: dict[str, Any] = {"factors": all_linear(), "ranks": 2, **change}
    with pytest.raises(ValueError, match=message):
        export_adapter(output_dir=tmp_path / "adapter", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_negative_rank_names_its_layer(tmp_path):
    factors = all_linear()
    name = list(factors)[3]
    with pytest.raises(ValueError, match=f"ranks must be at least 0, got -1 for layer {name}"):
        export_adapter(factors, {**dict.fromkeys(factors, 2), name: -1}, tmp_path / "adapter")


def test_deltas_that_are_all_zero_are_no_adapter(tmp_path):
    factors = {name: zero(layer) for name, layer in all_linear().items()}
    with pytest.raises(ValueError, match="every delta is zero or gets rank 0"):
        export_adapter(factors, 2, tmp_path / "adapter")


def test_factors_of_another_model_are_refused_by_name(tmp_path, base_folder):
    layer = all_linear()["model.layers.0.self_attn.q_proj"]
    foreign = {"model.layers.0.self_attn.q_proj": layer, "model.layers.9.self_attn.q_proj": layer}
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.9\.self_attn\.q_proj of"):
        export_adapter(foreign, 2, tmp_path / "adapter", base=base_folder)
    reshaped = {"model.layers.0.mlp.up_proj": layer}
    with pytest.raises(ValueError, match=r"no linear layer model\.layers\.0\.mlp\.up_proj"):
        export_adapter(reshaped, 2, tmp_path / "adapter", base=base_folder)


def test_the_base_and_its_revision_are_stored(tmp_path):
    exported = export_adapter(
        all_linear(),
        2,
        tmp_path / "adapter",
        base_model_name_or_path="org/base",
        base_model_revision="abc",
        task_type=None,
    )
    config = LoraConfig.from_pretrained(str(exported.output))
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "abc")
    assert config.task_type is None


@pytest.mark.parametrize(
    ("architecture", "is_encoder_decoder", "task_type"),
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("GPT2LMHeadModel", False, "CAUSAL_LM"),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", False, None),
        ("BertForSequenceClassification", False, "SEQ_CLS"),
        ("BertForTokenClassification", False, "TOKEN_CLS"),
        ("BertForQuestionAnswering", False, "QUESTION_ANS"),
        ("BertForMaskedLM", False, None),
        ("LlamaModel", False, None),
    ],
)
def test_the_class_of_a_model_tells_its_task_type(architecture, is_encoder_decoder, task_type):
    assert task_type_of(architecture, is_encoder_decoder) == task_type
    assert hasattr(transformers, architecture)
    assert task_type in (None, *TaskType)


def test_the_task_type_is_that_of_the_base(tmp_path, base_folder):
    classifier = tmp_path / "classifier"
    config: Any = tiny_model().config
    LlamaForSequenceClassification(config).save_pretrained(str(classifier))
    factors = all_linear()
    target = tmp_path / "adapter"

    def task_type(**options: Any) -> str | None:
        return config_of(export_adapter(factors, 2, target, **options))["task_type"]

    assert task_type() == task_type(base=base_folder) == "CAUSAL_LM"
    assert task_type(task_type="FEATURE_EXTRACTION", base=base_folder) == "FEATURE_EXTRACTION"
    assert task_type(base=classifier) is None  # The adapter has no head.
    score = {"score.weight": torch.ones(2, 16)}
    assert task_type(base=classifier, modules_to_save=score) == "SEQ_CLS"
    assert task_type(base=classifier, modules_to_save=score, task_type="SEQ_CLS") == "SEQ_CLS"
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLS': .* replaces score as a whole"):
        task_type(base=classifier, task_type="SEQ_CLS")


WHOLE = {
    "llama": ["model.norm.weight", "model.embed_tokens.weight"],
    "gpt2": ["transformer.h.1.ln_2.weight", "transformer.h.1.ln_2.bias", "transformer.wte.weight"],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_whole_tensors_reproduce_the_tuned_model_tied_or_not(tmp_path, architecture, tie):
    base = tiny_model(architecture, tie_word_embeddings=tie)
    base.save_pretrained(str(tmp_path / "base"))
    factors = teacher_factors(base, TARGETS[architecture])
    target = tuned(base, factors)
    parameters = dict(target.named_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in WHOLE[architecture]:
            parameters[name].add_(torch.randn(parameters[name].shape, generator=generator))
    exported = export_adapter(
        factors,
        3,
        tmp_path / "adapter",
        base=tmp_path / "base",
        modules_to_save={name: parameters[name].detach() for name in WHOLE[architecture]},
    )
    loaded = PeftModel.from_pretrained(base, str(exported.output))
    assert (logits(loaded) - logits(target)).abs().max() < 1e-4
    assert config_of(exported)["ensure_weight_tying"] == tie
    heads = [
        key for key in load_file(exported.output / "adapter_model.safetensors") if "head" in key
    ]
    assert bool(heads) == tie


def test_two_tensors_for_two_tied_parameters_untie_them(tmp_path):
    base = tiny_model(tie_word_embeddings=True)
    base.save_pretrained(str(tmp_path / "base"))
    given = {"model.embed_tokens.weight": torch.ones(64, 16), "lm_head.weight": torch.zeros(64, 16)}
    folder = export_adapter(
        all_linear(), 3, tmp_path / "adapter", base=tmp_path / "base", modules_to_save=given
    ).output
    loaded: Any = PeftModel.from_pretrained(base, str(folder))
    assert (loaded.get_input_embeddings().weight == 1).all()
    assert (loaded.get_output_embeddings().weight == 0).all()


@pytest.mark.parametrize(
    ("architecture", "given", "message"),
    [
        (
            "llama",
            {"model.nrom.weight": (16,)},
            "has no parameter model.nrom.weight",
        ),
        ("llama", {"model.norm.weight": (15,)}, r"model.norm.weight has shape \(15,\), the base's"),
        ("gpt2", {"transformer.ln_f.weight": (16,)}, r"transformer.ln_f.bias of it is not given"),
        ("llama", {"model.layers.0.mlp.up_proj.weight": (24, 16)}, "has low-rank factors too"),
    ],
)
def test_whole_tensors_that_peft_could_not_load_are_refused(tmp_path, architecture, given, message):
    tiny_model(architecture).save_pretrained(str(tmp_path / "base"))
    tensors = {name: torch.ones(shape) for name, shape in given.items()}
    with pytest.raises(ValueError, match=message):
        export_adapter(
            all_linear(architecture),
            2,
            tmp_path / "adapter",
            base=tmp_path / "base",
            modules_to_save=tensors,
        )
    assert not (tmp_path / "adapter").exists()


def test_a_whole_tensor_that_is_no_number_is_refused(tmp_path, base_folder):
    tensors = {"model.norm.weight": torch.full((16,), math.nan)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN or infinite entries"):
        export_adapter(
            all_linear(), 2, tmp_path / "adapter", base=base_folder, modules_to_save=tensors
        )


def run_cli(tmp_path: Path, *options: str) -> Path:
    save_factors(tmp_path / "factors", all_linear(rank=6, held=16), FactorsMetadata())
    output = tmp_path / "adapter"
    main(["export", "--factors", str(tmp_path / "factors"), "--output_dir", str(output), *options])
    return output


def test_the_command_chooses_ranks_by_energy(tmp_path, capsys):
    folder = run_cli(tmp_path, "--energy", "0.9", "--dtype", "bfloat16", "--split", "balanced")
    said = capsys.readouterr().out
    assert "14 layers, rank 3 to 5 (median 4)" in said and "of it by rounding" in said
    assert said.rstrip().endswith(f"Adapter: {folder}")
    factors = all_linear(rank=6, held=16)
    for name, delta in deltas_of("llama", folder).items():
        rank = int(torch.linalg.matrix_rank(delta.double(), rtol=1e-4))
        assert factors[name].energy(rank) >= 0.9 > factors[name].energy(rank - 1), name


def test_the_command_writes_uniform_adapters(tmp_path, base_folder, capsys):
    folder = run_cli(
        tmp_path, "--energy", "0.9", "--uniform_rank", "true", "--base", str(base_folder)
    )
    assert "zeros that pad the ranks" in capsys.readouterr().out
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} and "q_proj" in config["target_modules"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--energy", "0.9", "--lora_r", "4"], "--lora_r and energy exclude each other"),
        (["--energy", "1.5"], r"energy must be in (0, 1], got 1.5"),
    ],
)
def test_the_command_refuses_contradictions(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run_cli(tmp_path, *options)
    assert message in capsys.readouterr().err


def test_an_energy_that_the_factors_do_not_hold_names_the_layer(tmp_path, capsys):
    layer = all_linear()["model.layers.0.self_attn.q_proj"]
    short = LowRankFactors(layer.U, layer.S, layer.Vh, 2 * layer.norm)
    save_factors(tmp_path / "factors", {"layer": short}, FactorsMetadata())
    with pytest.raises(SystemExit):
        main(f"export --factors {tmp_path}/factors --output_dir {tmp_path}/a --energy 0.5".split())
    assert "6 triplets held for layer layer keep 0.2500" in capsys.readouterr().err


def test_orientation_of_conv1d_is_that_of_the_layer(tmp_path):
    base = tiny_model("gpt2")
    factors = teacher_factors(base, TARGETS["gpt2"])
    folder = export_adapter(factors, 3, tmp_path / "adapter").output
    merged: Any = PeftModel.from_pretrained(tiny_model("gpt2"), str(folder)).merge_and_unload()
    for name, layer in factors.items():
        before, after = base.get_submodule(name).weight, merged.get_submodule(name).weight
        expected = orientation(base, name, kept(layer, 3))
        assert torch.allclose(after - before, expected, atol=1e-5)
