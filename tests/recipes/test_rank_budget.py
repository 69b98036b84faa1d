"""A budget of parameters spread over the layers before training, as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import compare_inits
import pytest
import stages.data_start
import stages.rank_budget
import torch
import train_lora
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from stages.fit import Materials
from stages.lora_options import LoraOptions
from support.recipe_inputs import save_model, shared_options
from transformers import AutoModelForCausalLM

from peft_svdinit import (
    FactorsFile,
    FactorsMetadata,
    activation_factors,
    gradient_factors,
    recommend_ranks,
    relative_spectra,
    save_factors,
)
from peft_svdinit.training import DataOptions, ModelOptions, read_run

BUDGET = 1500
LEAST = 464  # of rank 1 in all 14 layers of the tiny model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    return folder, shared_options(folder)


def run(options: list[str], output: Path, *more: str) -> dict:
    """What the ranks' file says after a run within the budget."""
    budget = [] if "--rank_budget" in more else ["--rank_budget", str(BUDGET)]
    train_lora.main([*options, *budget, *more, "--output_dir", str(output), "--max_steps", "1"])
    return json.loads((output / "start" / "ranks.json").read_text())


def saved_ranks(folder: Path) -> dict[str, int]:
    """Of every layer of the saved adapter, from its tensors."""
    weights = load_file(folder / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    return {
        key.removeprefix("base_model.model.").removesuffix(ending): len(weight)
        for key, weight in weights.items()
        if key.endswith(ending)
    }


def spectra(folder: Path, source: str, rank: int) -> dict:
    """Of the first four batches of two, in a way of their own."""
    data = DataOptions(dataset_name=str(folder / "data.jsonl"), max_eval_samples=4)
    materials = Materials.prepare(ModelOptions(str(folder / "model")), data)
    batches = [batch for _, batch in zip(range(4), materials.batches(2), strict=False)]
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    if source == "gradient":
        return gradient_factors(base, batches, rank=rank)
    return relative_spectra(activation_factors(base, batches, rank=rank))


@pytest.mark.parametrize("source", ["gradient", "activation"])
def test_the_adapter_has_the_ranks_that_the_rule_gives(inputs, tmp_path, source, capsys):
    folder, options = inputs
    content = run(options, tmp_path, "--rank_budget_from", source)
    # Four times the 3.2 that the budget pays for everywhere, rounded up.
    expected = recommend_ranks(spectra(folder, source, 13), max_parameters=BUDGET)
    assert saved_ranks(tmp_path) == content["ranks"] == expected.ranks
    assert len(set(expected.ranks.values())) > 1
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == content["parameters"] <= BUDGET
    assert (tmp_path / "start" / "ranks.png").stat().st_size > 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "rank_budget:" in line)
    assert f"{content['parameters']:,} of 1,500 parameters in 14 layers" in said
    noted = read_run(tmp_path).info["extra"]["rank_budget"]
    assert noted["from"] == source and noted["batches"] == 4 and noted["tokens"] > 0


def test_stock_peft_loads_it_with_the_scaling_that_was_asked_for(inputs, tmp_path):
    folder, options = inputs
    run(options, tmp_path, "--use_rslora", "true")
    assert type(LoraConfig.from_pretrained(str(tmp_path))) is LoraConfig
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, str(tmp_path))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.scaling["default"] == pytest.approx(4 / 2**0.5)


def test_a_resumed_run_has_the_same_ranks_and_other_options_find_others(inputs, tmp_path):
    _, options = inputs
    again = [*options, "--rank_budget", str(BUDGET), "--output_dir", str(tmp_path)]
    again += ["--save_steps", "2", "--resume_from_checkpoint", "last"]
    train_lora.main([*again, "--max_steps", "2"])
    file = tmp_path / "start" / "ranks.json"
    ranks = json.loads(file.read_text())["ranks"]
    made = file.stat().st_mtime_ns
    train_lora.main([*again, "--max_steps", "4"])
    assert file.stat().st_mtime_ns == made
    assert read_run(tmp_path).info["steps"] == 4 and saved_ranks(tmp_path) == ranks
    with pytest.raises(SystemExit, match=r"^error: --rank_budget: the run in .* has changed since"):
        train_lora.main([*again, "--max_steps", "4", "--init_batches", "1"])
    assert run(options, tmp_path, "--init_batches", "1")["cost"]["batches"] == 1


@pytest.mark.thorough
def test_another_model_at_the_same_path_or_a_damaged_file_has_its_ranks_found_anew(tmp_path):
    options = shared_options(tmp_path)
    first = run(options, tmp_path / "run")
    save_model(tmp_path / "model", seed=1)
    second = run(options, tmp_path / "run")
    assert second["errors"] != first["errors"]
    (tmp_path / "run" / "start" / "ranks.json").write_text("\x01")
    assert run(options, tmp_path / "run")["errors"] == second["errors"]


def test_a_start_from_another_source_than_the_ranks_computes_its_own(inputs, tmp_path):
    folder, options = inputs
    source = ["--init", "svd", "--svd_source", "gradient", "--svd_start", "subspace"]
    ranks = run(options, tmp_path, *source, "--rank_budget_from", "activation")["ranks"]
    expected = spectra(folder, "gradient", max(ranks.values()))
    for name, layer in FactorsFile(tmp_path / "start").items():
        assert torch.allclose(layer.S, expected[name].S[: layer.rank], rtol=1e-4)


@pytest.mark.parametrize("start", ["delta", "reference"])
def test_a_start_from_gradients_takes_those_that_the_ranks_were_read_from(
    inputs, tmp_path, start, monkeypatch
):
    _, options = inputs

    def again(*args, **kwargs):
        raise AssertionError("the gradients are computed twice")

    with monkeypatch.context() as patch:
        patch.setattr(stages.data_start, "gradient_factors", again)
        source = ["--init", "svd", "--svd_source", "gradient", "--svd_start", start]
        content = run(options, tmp_path, *source)
    twice = 2 if start == "reference" else 1
    assert saved_ranks(tmp_path) == {n: twice * rank for n, rank in content["ranks"].items()}
    factors = load_file(tmp_path / "start" / "factors.safetensors")
    held = {key.removesuffix(".S"): len(S) for key, S in factors.items() if key.endswith(".S")}
    assert held == content["ranks"]


def test_a_start_from_a_teacher_gets_no_rank_above_its_triplets(inputs, tmp_path):
    folder, options = inputs
    teacher = {name: layer.truncated(4) for name, layer in spectra(folder, "gradient", 4).items()}
    save_factors(tmp_path / "teacher", teacher, FactorsMetadata(source={"kind": "test"}))
    svd = ["--init", "svd", "--svd_factors", str(tmp_path / "teacher"), "--svd_start", "subspace"]
    ranks = run(options, tmp_path / "run", *svd)["ranks"]
    assert max(ranks.values()) == 4 and saved_ranks(tmp_path / "run") == ranks


def test_a_budget_below_one_rank_for_each_layer_is_refused_before_any_work(inputs, tmp_path):
    _, options = inputs
    says = (
        f"^error: --rank_budget must be at least {LEAST} to give all 14 layers rank 1, got "
        f"{LEAST - 1}; raise it or target fewer modules$"
    )
    with pytest.raises(SystemExit, match=says):
        run(options, tmp_path / "run", "--rank_budget", str(LEAST - 1))
    assert not (tmp_path / "run").exists()
    assert set(run(options, tmp_path, "--rank_budget", str(LEAST))["ranks"].values()) == {1}


def test_a_layer_without_a_spectrum_is_refused(inputs, tmp_path):
    _, options = inputs
    targets = ["--lora_target_modules", "q_proj", "embed_tokens"]
    with pytest.raises(
        SystemExit, match=r"--rank_budget covers linear layers, and model\.embed_tok"
    ):
        run(options, tmp_path, *targets)


@pytest.mark.parametrize(
    ("recipe", "extra", "message"),
    [
        (train_lora, ["--init", "eva"], "--rank_budget does not go with --init=eva"),
        (train_lora, ["--init", "orthogonal"], "does not go with --init=orthogonal"),
        (
            train_lora,
            "--init svd --svd_source activation --svd_start subspace --activation_weighting "
            "weight".split(),
            "does not go with --activation_weighting=weight",
        ),
        (train_lora, ["--rank_budget_from", "weight"], "must be one of gradient, activation"),
        (compare_inits, [], "--rank_budget is an option of train_lora.py"),
    ],
)
def test_what_has_ranks_of_its_own_is_refused(inputs, tmp_path, recipe, extra, message, capsys):
    _, options = inputs
    where = ["--rank_budget", str(BUDGET), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_:
        recipe.main([*options, *where, *extra])
    assert message in f"{exit_.value.code} {capsys.readouterr().err}"


def test_a_measure_without_a_budget_is_refused():
    with pytest.raises(ValueError, match="rank_budget_from needs rank_budget"):
        LoraOptions(rank_budget_from="activation")
