"""`svdinit analyze` for factors, adapters and pairs, with and without the base model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support import reference
from support.tiny_models import save_pair, tiny_model, trained_adapter, weight_of

from peft_svdinit import save_factors
from peft_svdinit.cli import main
from peft_svdinit.factors import CheckpointPair, LoraAdapter, factors_of_checkpoints


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    trained_adapter(folder)
    return folder


def analysis_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("svd_analysis_rank*.json")
    return json.loads(path.read_text())


def test_a_pair_is_analysed_against_its_base(pair, tmp_path):
    source = f"--base {pair.base_folder} --tuned {pair.tuned_folder} --rank 16 --lora_r 3"
    main(f"analyze {source} --intruders true --output_dir {tmp_path}".split())
    found = analysis_of(tmp_path)
    assert len(found["layers"]) == 14
    for layer in found["layers"]:
        before, after = (weight_of(model, layer["name"]) for model in (pair.base, pair.tuned))
        assert layer["norm"] == pytest.approx(reference.frobenius(after - before), rel=1e-4)
        assert layer["base_norm"] == pytest.approx(reference.frobenius(before), rel=1e-4)
        exact = reference.discarded(after - before, 3) / layer["norm"]
        assert layer["reconstruction_error"] == pytest.approx(exact, abs=1e-3)
    assert set(found["intruders"]["layers"]) == {layer["name"] for layer in found["layers"]}
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_only_the_layers_asked_for_are_analysed(pair, tmp_path):
    source = f"--base {pair.base_folder} --tuned {pair.tuned_folder} --rank 4 --lora_r 2"
    options = f"--target_modules q_proj down_proj --plots false --output_dir {tmp_path}"
    main(f"analyze {source} {options}".split())
    assert {layer["module_type"] for layer in analysis_of(tmp_path)["layers"]} == {
        "q_proj",
        "down_proj",
    }


def test_an_adapter_is_measured_against_the_base_if_that_is_given(adapter, pair, tmp_path):
    plain, with_base = tmp_path / "plain", tmp_path / "with_base"
    main(f"analyze --adapter {adapter} --lora_r 2 --output_dir {plain} --plots false".split())
    assert {layer["relative_norm"] for layer in analysis_of(plain)["layers"]} == {None}
    base = f"--base {pair.base_folder} --intruders true"
    main(f"analyze --adapter {adapter} {base} --output_dir {with_base} --plots false".split())
    found = analysis_of(with_base)
    base_model = tiny_model()
    for layer in found["layers"]:
        norm = reference.frobenius(weight_of(base_model, layer["name"]))
        assert layer["relative_norm"] == pytest.approx(layer["norm"] / norm, rel=1e-4)
    for name, product in LoraAdapter(adapter).items():
        merged = weight_of(base_model, name) + product.factors().dense()
        strongest = found["intruders"]["layers"][name]["singular_values"]
        assert strongest == pytest.approx(reference.singular_values(merged)[:10], rel=1e-3)


def test_targets_of_energy_error_and_parameters_reach_the_recommendation(adapter, tmp_path):
    command = f"analyze --adapter {adapter} --lora_r 2 --plots false"
    main(f"{command} --output_dir {tmp_path}/energy --energy 0.7".split())
    main(f"{command} --output_dir {tmp_path}/error --error {math.sqrt(0.3)}".split())
    energy, error = (analysis_of(tmp_path / kind)["recommendation"] for kind in ("energy", "error"))
    assert energy["reached"] and energy["energy"] >= 0.7
    assert error["ranks"] == energy["ranks"] and error["error"] <= math.sqrt(0.3) + 1e-6

    main(f"{command} --output_dir {tmp_path}/budget --max_parameters 500".split())
    budget = analysis_of(tmp_path / "budget")["recommendation"]
    assert budget["parameters"] <= 500 and budget["target"] is None
    main(f"{command} --output_dir {tmp_path}/default".split())
    default = analysis_of(tmp_path / "default")
    assert default["recommendation"]["target"] == 0.9
    assert default["recommendation"]["max_parameters"] == default["totals"]["parameters"]


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(command.split())
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert said.err.startswith("svdinit") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give either factors or adapter or tuned"),
        ("--base b", "give either factors or adapter or tuned"),
        ("--factors f --adapter a", "give either factors or adapter or tuned"),
        ("--tuned t", "tuned needs base"),
        ("--adapter a --intruders true", "intruders needs base"),
        ("--adapter a --energy 0.9 --error 0.1", "give energy or error, not both"),
        ("--base b --tuned t --rank 8", "--lora_r=16 must not be above --rank=8"),
    ],
)
def test_wrong_combinations_get_one_line_and_leave_nothing(options, message, tmp_path, capsys):
    assert message in refused(f"analyze {options} --output_dir {tmp_path}/out", capsys)
    assert not (tmp_path / "out").exists()


def test_targets_out_of_range_are_refused(adapter, tmp_path, capsys):
    command = f"analyze --adapter {adapter} --plots false --output_dir {tmp_path}/out"
    assert "error must be in (0, 1), got 5.0" in refused(f"{command} --error 5", capsys)
    assert "energy must be in (0, 1], got 90.0" in refused(f"{command} --energy 90", capsys)
    assert "max_parameters must be at least" in refused(f"{command} --max_parameters 1", capsys)
    assert not (tmp_path / "out").exists()


def test_factors_of_another_base_are_refused(pair, tmp_path, capsys):
    extraction = factors_of_checkpoints(
        CheckpointPair(pair.base_folder, pair.tuned_folder), 4, base_model_name_or_path="tiny"
    )
    save_factors(
        tmp_path / "factors",
        extraction.factors,
        extraction.metadata,
        base_samples=extraction.base_samples,
    )
    other = tmp_path / "other"
    tiny_model(seed=9).save_pretrained(str(other))
    wider = tmp_path / "wider"
    tiny_model(intermediate_size=32).save_pretrained(str(wider))
    capsys.readouterr()
    command = f"analyze --factors {tmp_path}/factors --plots false --output_dir {tmp_path}/out"
    assert "not those that the factors were taken from" in refused(
        f"{command} --base {other} --lora_r 2", capsys
    )
    said = refused(f"{command} --base {wider} --lora_r 2", capsys)
    assert "no linear layer model.layers.0.mlp" in said and "not the base model" in said
    assert not (tmp_path / "out").exists()
    main(f"{command} --base {pair.base_folder} --lora_r 2".split())
    assert analysis_of(tmp_path / "out")["layers"][0]["relative_norm"] > 0
