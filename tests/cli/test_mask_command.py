"""`svdinit mask`: every source, what it draws and compares, and one line for a wrong input."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.peft_fixtures import adapted_layers, make_scene
from support.tiny_models import TARGETS, rewrite_tensors, tiny_model, trained_adapter

from peft_svdinit import FactorsFile, LoriConfig
from peft_svdinit.cli import main
from peft_svdinit.masks import (
    Selection,
    load_mask,
    random_projection,
    save_mask,
    select,
    teacher_scores,
    tensor_hash,
)

RANK, SEED = 4, 9
WEIGHTS = "adapter_model.safetensors"
LAYERS = [
    f"model.layers.{block}.{module}"
    for block in (0, 1)
    for module in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
]


def lori_adapter(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """A saved LoRI-D adapter whose B is random, with the outputs of two rows large; its B."""
    defaults = {
        "r": RANK,
        "lori_density": 1.0,
        "lori_seed": SEED,
        "target_modules": TARGETS["llama"],
        "task_type": "CAUSAL_LM",
    }
    base = tiny_model()
    base.name_or_path = "tiny-llama"
    model = get_peft_model(base, LoriConfig(**{**defaults, **options}))
    generator = torch.Generator().manual_seed(1)
    found = {}
    with torch.no_grad():
        for name, layer in sorted(adapted_layers(model).items()):
            part_B = layer.lora_B["default"]
            for parameter in part_B.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            found[name] = part_B.weight.detach().clone()
    model.save_pretrained(str(folder))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> dict[str, torch.Tensor]:
    return lori_adapter(folder / "dense")


@pytest.fixture(scope="module")
def stock(folder: Path) -> Path:
    trained_adapter(folder / "stock")
    return folder / "stock"


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["mask", *map(str, arguments)])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and said.err.startswith("svdinit mask")
    return said.err


def test_the_largest_entries_of_a_calibrated_adapter_are_masked_drawn_and_described(
    folder, calibrated, tmp_path, capsys
):
    source = ["--source", "magnitude", "--adapter", str(folder / "dense")]
    main(["mask", *source, "--density", "0.2", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    mask = load_mask(tmp_path)
    expected = select({name: B.abs() for name, B in calibrated.items()}, Selection(0.2))
    assert list(mask.layers) == LAYERS
    assert all(torch.equal(mask.masks[name], expected[name]) for name in LAYERS)
    assert (mask.seed, mask.density, mask.scope) == (SEED, 0.2, "global")
    assert mask.source == {"kind": "magnitude", "adapter": "dense", "same_A": True}
    assert mask.base_model_name_or_path == "tiny-llama"
    for name, layer in mask.layers.items():
        drawn = random_projection(name, RANK, layer.in_features, SEED)
        assert layer.hash_A == tensor_hash(drawn)
    energy = json.loads((tmp_path / "mask_report.json").read_text())["energy"]
    kept = sum(float(calibrated[name][expected[name]].square().sum()) for name in LAYERS)
    total = sum(float(lora_B.square().sum()) for lora_B in calibrated.values())
    assert energy["kept"] == pytest.approx(kept / total)
    assert f"hold {energy['kept']:.1%} of the energy" in printed
    assert printed.rstrip().endswith(f"Report: {tmp_path / 'mask_report.md'}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "lori_mask.safetensors",
        "mask_report.json",
        "mask_report.md",
        "mask.png",
        "mask_entries.png",
    }


def test_a_mask_that_is_in_use_is_not_replaced(folder, calibrated, tmp_path, capsys):
    source = ["--source", "magnitude", "--adapter", folder / "dense", "--plots", "false"]
    lori_adapter(tmp_path / "sparse", lori_density=0.5)
    save_mask(tmp_path / "mask", load_mask(tmp_path / "sparse"))
    masks = [tmp_path / name / "lori_mask.safetensors" for name in ("sparse", "mask")]
    before = [mask.read_bytes() for mask in masks]
    said = refused([*source, "--output", tmp_path / "sparse"], capsys)
    assert "output:" in said and "holds an adapter with its lori_mask.safetensors" in said
    for excluded in (tmp_path / "mask", masks[1]):
        said = refused([*source, "--exclude", excluded, "--output", tmp_path / "mask"], capsys)
        assert "output must not be the folder of a mask in exclude" in said
    assert [mask.read_bytes() for mask in masks] == before


def test_a_mask_that_was_made_is_trained_with(folder, calibrated, tmp_path):
    source = ["--source", "magnitude", "--adapter", str(folder / "dense"), "--plots", "false"]
    main(["mask", *source, "--scope", "1:4", "--density", "0.25", "--output", str(tmp_path)])
    config = LoriConfig(
        r=RANK,
        lori_density=0.25,
        lori_seed=SEED,
        lori_mask=str(tmp_path),
        target_modules=TARGETS["llama"],
    )
    model = get_peft_model(tiny_model(), config)
    for name, layer in adapted_layers(model).items():
        trained = layer.lora_B["default"].mask
        assert trained.sum(1).tolist() == [1] * len(trained)
        largest = calibrated[name].abs().argmax(1)
        assert torch.equal(trained.float().argmax(1), largest)


def test_masks_are_made_disjoint_and_compared(folder, calibrated, tmp_path, capsys):
    source = ["mask", "--source", "magnitude", "--adapter", str(folder / "dense")]
    source += ["--plots", "false", "--density", "0.3", "--floor", "0.1"]
    main([*source, "--output", str(tmp_path / "a")])
    main([*source, "--exclude", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    first, second = load_mask(tmp_path / "a"), load_mask(tmp_path / "b")
    assert not any((first.masks[name] & second.masks[name]).any() for name in LAYERS)
    assert second.kept == first.kept and second.floor == 0.1
    capsys.readouterr()
    random = ["--source", "random", "--adapter", str(folder / "dense"), "--plots", "false"]
    main(["mask", *random, "--output", str(tmp_path / "c")])
    capsys.readouterr()
    paths = [
        str(tmp_path / "a"),
        str(tmp_path / "b" / "lori_mask.safetensors"),
        str(tmp_path / "c"),
    ]
    main(["mask", "--show", *paths, "--output", str(tmp_path / "shown")])
    printed = capsys.readouterr().out
    assert "a and b: 0 of" in printed and "disjoint" in printed
    report = json.loads((tmp_path / "shown" / "mask_report.json").read_text())
    assert report["labels"] == ["a", "b", "c"] and report["pairs"][0]["both"] == 0
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {
        "mask_report.json",
        "mask_report.md",
        "mask_overlap.png",
    }


def test_adapters_are_shown_with_their_deltas(folder, calibrated, tmp_path, capsys):
    for name, density in (("one", 0.2), ("two", 0.3)):
        lori_adapter(tmp_path / name, lori_density=density)
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    main(["mask", "--show", *paths, "--output", str(tmp_path / "shown")])
    assert "cosine of their deltas" in capsys.readouterr().out
    (pair,) = json.loads((tmp_path / "shown" / "mask_report.json").read_text())["pairs"]
    assert pair["deltas"]["layers_sharing_A"] == 6 and pair["shares_A"]
    main(["mask", "--show", paths[0], "--output", str(tmp_path / "single")])
    printed = capsys.readouterr().out
    # Its B is zero off the mask, so that 100 % of its energy would say nothing.
    assert "drawn at random" in printed and "energy" not in printed
    assert (tmp_path / "single" / "mask_entries.png").is_file()
    assert not (tmp_path / "single" / "lori_mask.safetensors").exists()


def test_from_another_lora_only_budgets_carry_over_and_that_is_said(
    stock, tmp_path, capsys, caplog
):
    source = ["--source", "magnitude", "--adapter", str(stock), "--output", str(tmp_path)]
    said = refused(source, capsys)
    assert "is no LoRI adapter and names no seed" in said and "each layer and each row" in said
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING):
        main(["mask", *source, "--seed", "5", "--plots", "false"])
    assert "has another A" in caplog.text and "beside the A of seed 5" in caplog.text
    assert "found over another A" in capsys.readouterr().out
    mask = load_mask(tmp_path)
    assert (mask.seed, mask.source["same_A"]) == (5, False)
    lora_B = {
        key.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): tensor.abs()
        for key, tensor in load_file(stock / WEIGHTS).items()
        if "lora_B" in key
    }
    expected = select(lora_B, Selection(0.1))
    assert all(torch.equal(mask.masks[name], expected[name]) for name in LAYERS)


def test_another_seed_than_the_adapters_own_is_warned_of(folder, calibrated, tmp_path, caplog):
    source = ["--source", "magnitude", "--adapter", str(folder / "dense"), "--plots", "false"]
    with caplog.at_level(logging.WARNING):
        main(["mask", *source, "--seed", str(SEED), "--output", str(tmp_path / "same")])
        assert not caplog.records
        main(["mask", *source, "--seed", "10", "--output", str(tmp_path / "other")])
    assert "has another A" in caplog.text
    assert load_mask(tmp_path / "other").seed == 10


def test_a_lori_adapter_whose_a_was_changed_is_refused(tmp_path, capsys):
    lori_adapter(tmp_path / "a")
    key = f"base_model.model.{LAYERS[3]}.lora_A.weight"
    changed = 1.001 * load_file(tmp_path / "a" / WEIGHTS)[key]
    rewrite_tensors(tmp_path / "a" / WEIGHTS, lambda tensors: tensors.update({key: changed}))
    source = ["--source", "magnitude", "--adapter", tmp_path / "a", "--output", tmp_path / "m"]
    assert f"says that its A is drawn by seed {SEED}, but it is another one" in refused(
        source, capsys
    )
    sidecar = tmp_path / "a" / "svdinit_config.json"
    options = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**options, "lori_seed": "9"}))
    assert "lori_seed must be an integer or null" in refused(source, capsys)
    sidecar.write_text("{")
    assert "is not readable JSON" in refused(source, capsys)


def test_a_teacher_gives_a_mask_without_training(tmp_path, capsys):
    file = make_scene(tmp_path).file
    source = f"--source teacher --factors {file} --rank {RANK} --seed 3 --density 0.3"
    main(["mask", *source.split(), "--output", str(tmp_path / "m"), "--scope", "matrix"])
    mask, factors = load_mask(tmp_path / "m"), FactorsFile(file)
    projections = {
        name: random_projection(name, RANK, factors[name].shape[1], 3) for name in factors
    }
    expected = select(teacher_scores(factors, projections), Selection(0.3, "matrix"))
    assert mask.masks.keys() == expected.keys()
    assert all(torch.equal(mask.masks[name], expected[name]) for name in expected)
    assert mask.source["kind"] == "teacher" and mask.seed == 3
    printed = capsys.readouterr().out
    assert "the best B for a teacher's deltas" in printed and "energy" in printed
    # What it keeps of the best B is more than chance gives.
    energy = json.loads((tmp_path / "m" / "mask_report.json").read_text())["energy"]
    assert energy["kept"] > 1.5 * energy["random"]


def test_a_random_mask_reads_no_factors_and_a_teachers_reads_each_once(tmp_path, monkeypatch):
    file, read = make_scene(tmp_path).file, []
    layer_of = FactorsFile.__getitem__
    monkeypatch.setattr(
        FactorsFile, "__getitem__", lambda self, name: read.append(name) or layer_of(self, name)
    )
    for source, times in (("random", 0), ("teacher", 1)):
        command = f"mask --source {source} --factors {file} --rank {RANK} --scope matrix"
        main([*command.split(), "--plots", "false", "--output", str(tmp_path / source)])
        mask = load_mask(tmp_path / source)
        assert sorted(read) == sorted(mask.layers) * times
        for name, layer in mask.layers.items():
            assert layer.in_features == FactorsFile(file).shape_of(name)[1]


def test_a_random_mask_is_the_one_that_the_configuration_makes(folder, calibrated, tmp_path):
    source = f"mask --source random --adapter {folder / 'dense'} --density 0.3 --plots false"
    main([*source.split(), "--output", str(tmp_path / "m")])
    config = LoriConfig(r=RANK, lori_density=0.3, lori_seed=SEED, target_modules=TARGETS["llama"])
    get_peft_model(tiny_model(), config)
    made, mask = config.mask, load_mask(tmp_path / "m")
    assert made is not None and mask.seed == made.seed and mask.source == made.source
    assert all(torch.equal(mask.masks[name], made.masks[name]) for name in LAYERS)
    file = make_scene(tmp_path).file
    source = f"mask --source random --factors {file} --rank {RANK} --seed {SEED} --density 0.3"
    main([*source.split(), "--plots", "false", "--output", str(tmp_path / "f")])
    other = load_mask(tmp_path / "f")
    assert all(torch.equal(other.masks[name], made.masks[name]) for name in LAYERS)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    lori_adapter(tmp_path / "one", lori_density=0.2)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/one", "~/one/lori_mask.safetensors"):
        main(["mask", "--show", path, "--plots", "false", "--output", "~/shown"])
    assert (tmp_path / "shown" / "mask_report.md").is_file()


def test_entries_of_score_zero_are_warned_of(tmp_path, caplog):
    lori_adapter(tmp_path / "sparse", lori_density=0.2)
    source = f"mask --source magnitude --adapter {tmp_path / 'sparse'} --plots false"
    with caplog.at_level(logging.WARNING):
        main([*source.split(), "--density", "0.1", "--output", str(tmp_path / "narrow")])
        assert not caplog.records
        main([*source.split(), "--density", "0.4", "--output", str(tmp_path / "wide")])
    mask = load_mask(tmp_path / "wide")
    zeros = mask.kept - round(0.2 * mask.size)
    assert f"{zeros} of the {mask.kept} entries kept have score 0" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0"], "density must be in (0, 1], got 0.0"),
        (["--density", "1.2"], "density must be in (0, 1], got 1.2"),
        (["--density", "nan"], "--density must be a finite number, got nan"),
        (["--density", "0.0001"], "density=0.0001 keeps none of the"),
        (["--scope", "all"], "scope must be one of"),
        (["--scope", "1:8"], "set --density=0.125"),
        (["--floor", "0.5"], "floor must be in [0, --density=0.1], got 0.5"),
        (["--exclude", "nowhere/at/all"], "there is no file or folder"),
        (["--factors", "f"], "source magnitude does not use factors"),
        (["--rank", "4"], "give factors and rank together"),
        (["--source", "gradient"], "run recipes/train_lori.py --mask_source gradient"),
        (["--source", "teacher"], "source teacher needs factors"),
        (["--source", "fisher"], "invalid choice"),
        (["--show", "a"], "give either source, to make a mask, or show"),
        (["--densty", "0.5"], "densty"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(
    folder, calibrated, tmp_path, capsys, options, message
):
    source = ["--source", "magnitude", "--adapter", folder / "dense", "--output", tmp_path / "m"]
    assert message in refused([*source, *options], capsys)
    assert not (tmp_path / "m").exists()


def test_a_b_that_is_zero_or_not_a_number_is_one_line(tmp_path, capsys):
    lori_adapter(tmp_path / "a")
    source = ["--source", "magnitude", "--adapter", tmp_path / "a", "--output", tmp_path / "m"]
    weights = tmp_path / "a" / WEIGHTS

    def fill(value: float, layer: str) -> None:
        key = f"base_model.model.{layer}.lora_B.weight"
        filled = torch.full_like(load_file(weights)[key], value)
        rewrite_tensors(weights, lambda tensors: tensors.update({key: filled}))

    fill(0.0, LAYERS[2])
    assert f"layer {LAYERS[2]} keeps no entry" in refused(source, capsys)
    for layer in LAYERS:
        fill(0.0, layer)
    assert "zero everywhere, which ranks nothing: was B trained" in refused(source, capsys)
    fill(float("nan"), LAYERS[1])
    assert f"lora_B of layer {LAYERS[1]} has NaN" in refused(source, capsys)
    assert not (tmp_path / "m").exists()


def test_a_mask_to_exclude_of_another_rank_or_seed_is_one_line(
    folder, calibrated, tmp_path, capsys
):
    for name, options in (("rank", {"r": 8}), ("seed", {"lori_seed": 1})):
        lori_adapter(tmp_path / name, lori_density=0.2, **options)
    source = ["--source", "magnitude", "--adapter", folder / "dense", "--output", tmp_path / "m"]
    for name, said in (
        ("rank", "masks of one rank can be disjoint"),
        ("seed", f"belongs to the A of seed 1, this one to seed {SEED}"),
    ):
        assert said in refused([*source, "--exclude", tmp_path / name], capsys)


def test_what_cannot_be_shown_is_one_line(folder, calibrated, stock, tmp_path, capsys):
    lori_adapter(tmp_path / "one", lori_density=0.2)
    output = ["--output", tmp_path / "m"]
    assert "does not use density" in refused(["--show", "a", "--density", "0.2", *output], capsys)
    assert "has no lori_mask.safetensors" in refused(["--show", stock, *output], capsys)
    twice = ["--show", tmp_path / "one", tmp_path / "one", *output]
    assert "show names a path twice" in refused(twice, capsys)
    assert "give either source" in refused(output, capsys)
    # A mask that was copied beside another adapter, of another rank or without the layer.
    for name, options in (("rank", {"r": 2}), ("layers", {"target_modules": ["q_proj"]})):
        lori_adapter(tmp_path / name, **options)
        shutil.copy(tmp_path / "one" / "lori_mask.safetensors", tmp_path / name)
        alone = refused(["--show", tmp_path / name, *output], capsys)
        assert f"layer {LAYERS[0]}: there is no lora_B of the mask's shape" in alone
        compared = refused(["--show", tmp_path / "one", tmp_path / name, *output], capsys)
        assert f"layer {LAYERS[0]} of {name} has a mask of shape" in compared
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").touch()
    assert "output must be a folder" in refused(["--show", tmp_path / "one", *output], capsys)
