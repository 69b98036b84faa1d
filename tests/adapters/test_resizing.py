"""Adapters of other ranks: optimal, with their exact errors, in every style, loadable by PEFT."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapter_files import (
    LAYERS,
    METADATA,
    kohya_deltas,
    kohya_lora,
    lycoris_peft,
    peft_deltas,
    random_tensors,
)
from support.reference import discarded
from support.stock_process import run_without_us
from support.tiny_models import rewrite_tensors, tiny_model, trained_adapter
from torch import Tensor

from peft_svdinit.adapters import resize
from peft_svdinit.adapters.resizing.record import Resized
from peft_svdinit.cli.resize import ResizeOptions, run
from peft_svdinit.factors import LoraAdapter, RankRule

# So that a child process finds the package as this one does.
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
NAME = "lora_unet_down_blocks_0_attn1_to_q"


def dense(folder: Path) -> dict[str, Tensor]:
    """Deltas of a PEFT LoRA in float64."""
    return {
        name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        for name, layer in LoraAdapter(folder).items()
    }


def assert_optimal(before: dict[str, Tensor], after: dict[str, Tensor], resized: Resized) -> None:
    """Every layer has the optimal error of its rank, and the report says it."""
    assert before.keys() == after.keys() == {layer.name for layer in resized.layers}
    lost = 0.0
    for layer in resized.layers:
        matrix, result = before[layer.name].flatten(1), after[layer.name].flatten(1)
        norm, optimum = float(matrix.norm()), discarded(matrix, layer.rank)
        error = float((matrix - result).norm())
        assert error <= (1 + 1e-5) * optimum + 1e-6 * norm
        assert math.isclose(layer.norm, norm, rel_tol=1e-5)
        assert abs(layer.relative_error * norm - error) <= 1e-6 * norm
        assert abs(layer.energy - (1 - (error / norm) ** 2 if norm else 1)) < 1e-5
        lost += error**2
    total = sum(float(matrix.norm()) ** 2 for matrix in before.values())
    expected = math.sqrt(lost / total)
    assert math.isclose(resized.relative_error, expected, rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(resized.energy, 1 - lost / total, rel_tol=1e-4)


def ranks(resized: Resized) -> list[int]:
    return [layer.rank for layer in resized.layers]


# PEFT folders


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"0.*proj": 2}}])
def test_a_peft_lora_becomes_the_optimum_of_its_rank(tmp_path, architecture, options):
    trained_adapter(tmp_path / "a", architecture, **options)
    resized = resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=2))
    assert set(ranks(resized)) == {2}
    assert_optimal(dense(tmp_path / "a"), dense(tmp_path / "b"), resized)
    report = json.loads((tmp_path / "b" / "resize.json").read_text())
    assert report == json.loads(json.dumps(resized.as_dict()))
    assert report["totals"]["relative_error"] == resized.relative_error > 0.1


def test_the_peft_configuration_keeps_what_it_selects(tmp_path):
    trained_adapter(tmp_path / "a", "gpt2", lora_dropout=0.3, fan_in_fan_out=True)
    resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=3))
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in "ab"
    )
    assert (after["r"], after["lora_alpha"], after["rank_pattern"]) == (3, 3, {})
    for key in ("task_type", "base_model_name_or_path", "lora_dropout", "fan_in_fan_out"):
        assert after[key] == before[key]
    assert sorted(after["target_modules"]) == sorted(before["target_modules"])
    assert after["peft_type"] == "LORA" and after["use_rslora"] is False


LYCORIS: list[Any] = [
    LoHaConfig(r=3, alpha=7, target_modules=["q_proj", "down_proj"]),
    LoHaConfig(r=5, alpha=7, target_modules=["q_proj", "down_proj"]),
    LoKrConfig(r=1, alpha=5, target_modules=["q_proj", "down_proj"], decompose_both=True),
    LoKrConfig(r=8, alpha=5, target_modules=["q_proj", "down_proj"]),
]


@pytest.mark.parametrize("config", LYCORIS)
@pytest.mark.parametrize("rank", [1, 6])
def test_loha_and_lokr_become_optimal_loras(tmp_path, config, rank):
    before = peft_deltas(lycoris_peft(tmp_path / "a", config).eval())
    resized = resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=rank))
    assert_optimal(before, dense(tmp_path / "b"), resized)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "b"))
    assert peft_deltas(loaded).keys() == before.keys()


DELTAS_OF_ADAPTER = """
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

base, adapter, result = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).double()
save_file({
    name.removeprefix("base_model.model."): module.get_delta_weight("default").contiguous()
    for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
}, result)
"""


def test_stock_peft_loads_what_varies_in_rank(tmp_path):
    trained_adapter(tmp_path / "a", alpha_pattern={"q_proj": 40})
    resized = resize([tmp_path / "a"], tmp_path / "b", RankRule(energy=0.8))
    assert len(set(ranks(resized))) > 1
    tiny_model().save_pretrained(str(tmp_path / "base"))
    run_without_us(tmp_path, DELTAS_OF_ADAPTER, "base", "b", "deltas.safetensors")
    assert_optimal(dense(tmp_path / "a"), load_file(tmp_path / "deltas.safetensors"), resized)


# Single files


@pytest.mark.parametrize("alpha", [2.0, None])
def test_a_kohya_file_stays_one_with_its_kernels_and_metadata(tmp_path, alpha):
    before = kohya_lora(tmp_path / "a.safetensors", alpha=alpha)
    output = tmp_path / "b.safetensors"
    resized = resize([tmp_path / "a.safetensors"], output, RankRule(rank=3))
    assert_optimal(before, kohya_deltas(output), resized)
    tensors = load_file(output)
    assert {f"{name}.{part}" for name in LAYERS for part in PARTS} == tensors.keys()
    for name, (out, inputs, *kernel) in LAYERS.items():
        assert tensors[f"{name}.lora_down.weight"].shape == (3, inputs, *kernel)
        assert tensors[f"{name}.lora_up.weight"].shape == (out, 3, *(1 for _ in kernel))
        assert tensors[f"{name}.alpha"] == 3
    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "3"
    assert metadata["ss_base_model_version"] == METADATA["ss_base_model_version"]
    assert metadata["ss_network_module"] == "networks.lora"
    assert "sshs_model_hash" not in metadata and "ss_network_args" not in metadata
    report = json.loads((tmp_path / "b.resize.json").read_text())
    assert report["totals"]["layers"] == len(LAYERS)


PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def uneven_kohya_lora(path: Path) -> dict[str, Tensor]:
    """A LoRA file in which the deltas of three layers are nearly of rank one."""
    kohya_lora(path)

    def shrink(tensors: dict[str, Tensor]) -> None:
        for name in list(LAYERS)[::2]:
            tensors[f"{name}.lora_down.weight"][1:] *= 0.01

    rewrite_tensors(path, shrink)
    return kohya_deltas(path)


def test_kohya_layers_of_different_ranks_have_alphas_of_their_own(tmp_path):
    before = uneven_kohya_lora(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    resized = resize([tmp_path / "a.safetensors"], output, RankRule(energy=0.75))
    assert len(set(ranks(resized))) > 1
    assert_optimal(before, kohya_deltas(output), resized)
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"


def test_a_lycoris_file_becomes_a_kohya_lora(tmp_path):
    shapes = {"lokr_w1": (3, 4), "lokr_w2": (5, 6, 3, 3)}
    tensors = random_tensors(shapes)
    save_file(
        {f"{NAME}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors"
    )
    output = tmp_path / "b.safetensors"
    resized = resize([tmp_path / "a.safetensors"], output, RankRule(rank=4))
    w1, w2 = (tensor.double() for tensor in tensors.values())
    before = {NAME: torch.kron(w1[:, :, None, None], w2)}
    after = kohya_deltas(output)
    assert after[NAME].shape == (15, 24, 3, 3)
    assert_optimal(before, after, resized)


def diffusers_file(path: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    deltas = {}
    tensors = {}
    for index, decay in enumerate((0.1, 0.9)):
        name = f"transformer.blocks.{index}.attn.to_k"
        down = torch.randn(5, 9, generator=generator) * decay ** torch.arange(5)[:, None]
        up = torch.linalg.qr(torch.randn(12, 5, generator=generator)).Q.contiguous()
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        deltas[name] = up.double() @ down.double()
    save_file(tensors, path, {"lora_adapter_metadata": "{}", "format": "pt"})
    return deltas


def test_a_diffusers_file_gets_one_rank_since_its_readers_know_one_alpha(tmp_path):
    before = diffusers_file(tmp_path / "a.safetensors")
    output = tmp_path / "b.safetensors"
    resized = resize([tmp_path / "a.safetensors"], output, RankRule(error=0.3))
    (rank,) = set(ranks(resized))
    assert 1 < rank < 5
    tensors = load_file(output)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    after = {
        name: tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        for name in before
    }
    assert_optimal(before, after, resized)
    with safe_open(output, framework="pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()


# Ranks


def test_energy_and_error_are_reached_by_the_smallest_ranks(tmp_path):
    before = kohya_lora(tmp_path / "a.safetensors")
    for target, allowed in ((RankRule(energy=0.8), 0.2**0.5), (RankRule(error=0.2), 0.2)):
        resized = resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", target)
        for layer in resized.layers:
            matrix = before[layer.name].flatten(1)
            norm = float(matrix.norm())
            assert discarded(matrix, layer.rank) <= (allowed + 1e-6) * norm
            assert layer.rank == 1 or discarded(matrix, layer.rank - 1) > allowed * norm


def test_all_of_the_energy_is_kept_by_energy_one(tmp_path):
    kohya_lora(tmp_path / "a.safetensors")
    resized = resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", RankRule(energy=1))
    assert set(ranks(resized)) == {4} and resized.relative_error < 1e-6


def test_ranks_only_shrink_and_uniform_ones_are_padded(tmp_path):
    trained_adapter(tmp_path / "a", rank_pattern={"q_proj": 2})
    target = RankRule(rank=9)
    resized = resize([tmp_path / "a"], tmp_path / "b", target)
    assert set(ranks(resized)) == {2, 4} and resized.relative_error < 1e-6
    padded = resize([tmp_path / "a"], tmp_path / "c", RankRule(rank=9, uniform=True))
    assert ranks(padded) == ranks(resized)
    assert {layer.lora_A.shape[0] for layer in LoraAdapter(tmp_path / "c").values()} == {9}
    for name, delta in dense(tmp_path / "a").items():
        torch.testing.assert_close(dense(tmp_path / "c")[name], delta, rtol=0, atol=1e-6)


def test_a_uniform_energy_takes_the_largest_rank_for_all(tmp_path):
    trained_adapter(tmp_path / "a")
    alone = resize([tmp_path / "a"], tmp_path / "b", RankRule(energy=0.8))
    together = resize([tmp_path / "a"], tmp_path / "c", RankRule(energy=0.8, uniform=True))
    assert set(ranks(together)) == {max(ranks(alone))}
    assert min(ranks(alone)) < max(ranks(alone))


def test_max_rank_bounds_every_layer(tmp_path):
    trained_adapter(tmp_path / "a")
    for target in (
        RankRule(energy=0.99, max_rank=2),
        RankRule(max_parameters=9999, max_rank=2),
    ):
        resized = resize([tmp_path / "a"], tmp_path / "b", target)
        assert set(ranks(resized)) == {2}
        assert_optimal(dense(tmp_path / "a"), dense(tmp_path / "b"), resized)


def test_a_budget_is_kept_and_buys_more_than_a_uniform_rank(tmp_path):
    before = uneven_kohya_lora(tmp_path / "a.safetensors")
    price = sum(
        matrix.flatten(1).shape[0] + matrix.flatten(1).shape[1] for matrix in before.values()
    )
    sources, output = [tmp_path / "a.safetensors"], tmp_path / "b.safetensors"
    free = resize(sources, output, RankRule(max_parameters=2 * price))
    assert free.parameters <= 2 * price
    assert_optimal(before, kohya_deltas(output), free)
    uniform = resize(sources, output, RankRule(max_parameters=2 * price, uniform=True))
    assert set(ranks(uniform)) == {2} and uniform.parameters == 2 * price
    assert free.energy > uniform.energy
    for target in (RankRule(max_parameters=9), RankRule(max_parameters=9, uniform=True)):
        with pytest.raises(ValueError, match="max_parameters must be at least"):
            resize(sources, output, target)


# Special values


def test_a_zero_layer_stays_with_zeros_and_is_reported(tmp_path):
    trained_adapter(tmp_path / "a")

    def no_progress(tensors):
        for key, tensor in tensors.items():
            if "layers.0.self_attn.q_proj.lora_B" in key:
                tensor.zero_()

    rewrite_tensors(tmp_path / "a" / "adapter_model.safetensors", no_progress)
    for target, rank in ((RankRule(rank=3), 3), (RankRule(energy=0.9), 1)):
        resized = resize([tmp_path / "a"], tmp_path / "b", target)
        assert resized.zero_layers == ["model.layers.0.self_attn.q_proj"]
        layer = LoraAdapter(tmp_path / "b")["model.layers.0.self_attn.q_proj"]
        assert layer.lora_A.shape[0] == rank and not layer.lora_B.any()
        assert_optimal(dense(tmp_path / "a"), dense(tmp_path / "b"), resized)


def test_rank_deficient_and_badly_scaled_factors_are_still_optimal(tmp_path):
    before = {}
    tensors = random_tensors({"a.lora_down.weight": (4, 9), "a.lora_up.weight": (12, 4)})
    tensors |= random_tensors({"b.lora_down.weight": (4, 9), "b.lora_up.weight": (12, 4)}, seed=1)
    tensors["a.lora_up.weight"][:, 1] = tensors["a.lora_up.weight"][:, 0]
    tensors["a.lora_down.weight"][3] = tensors["a.lora_down.weight"][2]
    scales = torch.tensor([1e-4, 1.0, 1e2, 1e4])
    tensors["b.lora_down.weight"] *= scales[:, None]
    tensors["b.lora_up.weight"] /= scales
    save_file(tensors, tmp_path / "a.safetensors")
    before = kohya_deltas(tmp_path / "a.safetensors")
    for rank in (1, 2, 3):
        target = RankRule(rank=rank)
        resized = resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", target)
        assert_optimal(before, kohya_deltas(tmp_path / "b.safetensors"), resized)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rounding_of_half_precision_is_in_the_error(tmp_path, dtype):
    trained_adapter(tmp_path / "a")
    resized = resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=4), dtype=dtype)
    assert resized.dtypes == {dtype: len(resized.layers)}
    after = dense(tmp_path / "b")
    for layer in resized.layers:
        before = dense(tmp_path / "a")[layer.name]
        error = float((before - after[layer.name]).norm() / before.norm())
        assert layer.truncation_error < 1e-6 * layer.norm < error * layer.norm
        assert math.isclose(layer.relative(layer.rounding_error), error, rel_tol=1e-2)
        assert math.isclose(layer.relative_error, error, rel_tol=1e-2)


def test_the_dtype_of_the_input_is_kept_by_default(tmp_path):
    kohya_lora(tmp_path / "a.safetensors")
    rewrite_tensors(
        tmp_path / "a.safetensors",
        lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}),
    )
    resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", RankRule(rank=2))
    tensors = load_file(tmp_path / "b.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_overflow_of_float16_is_refused_by_layer(tmp_path):
    trained_adapter(tmp_path / "a", lora_alpha=10**9)
    with pytest.raises(ValueError, match=r"layer model\.layers.*lora_B has an entry .*float16"):
        resize([tmp_path / "a"], tmp_path / "b", RankRule(rank=2), dtype="float16")
    assert not (tmp_path / "b").exists()


# Several adapters


def test_a_weighted_sum_is_exact_and_resized_once(tmp_path):
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first, second = kohya_lora(sources[0]), kohya_lora(sources[1], rank=3, seed=5)
    output = tmp_path / "c.safetensors"
    resized = resize(sources, output, RankRule(rank=5), weights=[0.5, -2.0])
    total = {name: 0.5 * first[name] - 2 * second[name] for name in first}
    assert_optimal(total, kohya_deltas(output), resized)
    assert {layer.rank_before for layer in resized.layers} == {6, 7}


def test_adapters_that_cancel_leave_zeros(tmp_path):
    trained_adapter(tmp_path / "a")
    resized = resize(
        [tmp_path / "a", tmp_path / "a"], tmp_path / "b", RankRule(rank=4), weights=[1, -1]
    )
    size = max(float(delta.abs().max()) for delta in dense(tmp_path / "a").values())
    assert all(float(delta.abs().max()) < 1e-6 * size for delta in dense(tmp_path / "b").values())
    assert max(layer.norm for layer in resized.layers) < 1e-5


def test_layers_of_some_adapters_only_are_kept_and_reported(tmp_path):
    trained_adapter(tmp_path / "a", target_modules=["q_proj"])
    lycoris_peft(tmp_path / "b", LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]))
    resized = resize([tmp_path / "a", tmp_path / "b"], tmp_path / "c", RankRule(rank=16))
    names = [layer.name for layer in resized.layers if "down_proj" in layer.name]
    assert resized.only_in_some == {name: [str(tmp_path / "b")] for name in names}
    first, both = dense(tmp_path / "a"), dense(tmp_path / "c")
    second = peft_deltas(PeftModel.from_pretrained(tiny_model(), str(tmp_path / "b")))
    for name, delta in both.items():
        expected = second[name] + first.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "c"))
    assert peft_deltas(loaded).keys() == second.keys()


# Wrong inputs


def assert_refused(sources: list[Path], output: Path, message: str, **options: Any) -> None:
    there = output.exists()
    with pytest.raises(ValueError, match=message):
        resize(sources, output, RankRule(rank=2), **options)
    assert output.exists() == there


def test_adapters_that_do_not_fit_together_are_refused(tmp_path):
    peft, file = tmp_path / "a", tmp_path / "a.safetensors"
    trained_adapter(peft)
    kohya_lora(file)
    assert_refused([peft, file], tmp_path / "b", "of one key style .* PEFT and kohya")
    lycoris_peft(tmp_path / "other", LoHaConfig(r=2, target_modules=["q_proj"]))
    rewrite_tensors(
        tmp_path / "other" / "adapter_model.safetensors",
        lambda tensors: tensors.update(
            {
                key: torch.cat([value, value], dim=0 if key.endswith("_a") else 1)
                for key, value in tensors.items()
            }
        ),
    )
    assert_refused(
        [peft, tmp_path / "other"],
        tmp_path / "b",
        r"layer model\.layers\.0\.self_attn\.q_proj has another shape",
    )
    assert_refused([peft], tmp_path / "b", "one per adapter, got 2 for 1", weights=[1, 2])
    assert_refused([peft], tmp_path / "b", "weights must be finite", weights=[math.nan])
    assert_refused([peft], tmp_path / "b", "dtype must be one of", dtype="int8")
    assert_refused([], tmp_path / "b", "list of at least one path")


def test_outputs_that_do_not_fit_are_refused_and_nothing_is_lost(tmp_path):
    peft, file = tmp_path / "a", tmp_path / "a.safetensors"
    trained_adapter(peft)
    kohya_lora(file)
    assert_refused([peft], tmp_path / "b.safetensors", "must be a folder, as the input is")
    assert_refused([file], tmp_path / "b", "must be a file that ends in .safetensors")
    assert_refused([peft], peft, "must not be an input")
    assert_refused([file], file, "must not be an input")


@pytest.mark.parametrize("kind", ["weights", "text"])
def test_a_file_that_is_no_adapter_is_not_overwritten(tmp_path, kind):
    file, out = tmp_path / "a.safetensors", tmp_path / "model.safetensors"
    kohya_lora(file)
    if kind == "weights":
        save_file({"model.diffusion_model.weight": torch.ones(2, 2)}, out)
    else:
        out.write_text("dear")
    before = out.read_bytes()
    assert_refused([file], out, "model.safetensors is no adapter file .* would be overwritten")
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_an_adapter_is_replaced(tmp_path):
    kohya_lora(tmp_path / "a.safetensors")
    kohya_lora(tmp_path / "b.safetensors", rank=3)
    for rank in (2, 1):
        resize([tmp_path / "a.safetensors"], tmp_path / "b.safetensors", RankRule(rank=rank))
        kept = load_file(tmp_path / "b.safetensors")[f"{NAME}.lora_down.weight"]
        assert kept.shape[0] == rank


def test_not_a_number_is_refused_by_layer_and_nothing_is_written(tmp_path):
    trained_adapter(tmp_path / "a")

    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = math.nan

    rewrite_tensors(tmp_path / "a" / "adapter_model.safetensors", spoil)
    assert_refused([tmp_path / "a"], tmp_path / "b", r"layers\.0\.mlp\.down_proj.*NaN")


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "exactly one of rank, energy"), ({"rank": 2, "max_rank": 4}, "leave it out with rank")],
)
def test_rules_are_checked_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        ResizeOptions(adapter=["nowhere"], output="nowhere", **options)


def test_the_verb_resizes_files_without_peft_and_transformers(tmp_path):
    kohya_lora(tmp_path / "kohya.safetensors")
    diffusers_file(tmp_path / "diffusers.safetensors")
    script = (
        "import sys; from peft_svdinit.cli import main; main(sys.argv[1:]); "
        "sys.exit(' '.join({'peft', 'transformers'} & sys.modules.keys()) or None)"
    )
    for style in ("kohya", "diffusers"):
        paths = ["--adapter", f"{style}.safetensors", "--output", f"{style}-2.safetensors"]
        command = [sys.executable, "-c", script, "resize", *paths, "--rank", "2"]
        child = subprocess.run(command, cwd=tmp_path, env=HERE, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        assert (tmp_path / f"{style}-2.safetensors").is_file()


def test_the_verb_prints_totals_and_the_worst_layers(tmp_path, capsys):
    trained_adapter(tmp_path / "a")
    run(ResizeOptions(adapter=[str(tmp_path / "a")], output=str(tmp_path / "b"), rank=2))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "b" / "resize.json").read_text())
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    assert f"relative error {report['totals']['relative_error']:.2e}" in printed
    assert worst["name"] in printed and "4 > 2" in printed and str(tmp_path / "b") in printed
    with pytest.raises(ValueError, match="one per adapter, got 1 for 2"):
        run(ResizeOptions(adapter=["a", "b"], output="c", rank=2, weights=[1.0]))


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path):
    trained_adapter(tmp_path / "first")
    trained_adapter(tmp_path / "first" / "second")
    with pytest.raises(ValueError, match="must not hold an input"):
        resize([tmp_path / "first" / "second"], tmp_path / "first", RankRule(rank=2))
    assert (tmp_path / "first" / "second" / "adapter_config.json").is_file()
