"""The verbs of `svdinit`, on a tiny adapter and model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import save_pair, tiny_model, trained_adapter

from peft_svdinit import FactorsFile
from peft_svdinit.cli import VERBS, main
from peft_svdinit.deltas import LoraAdapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    trained_adapter(folder)
    return folder


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    said = capsys.readouterr()
    assert exit_.value.code == 2 and not said.out
    assert said.err.startswith("svdinit") and said.err.count("\n") == 1
    return said.err


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0 and "--config" in capsys.readouterr().out


def test_synthesize_analyze_and_export_give_the_adapter_back(adapter, tmp_path, capsys):
    factors, exported = tmp_path / "factors", tmp_path / "exported"
    main(f"synthesize --adapter {adapter} --rank 8 --lora_r 4 --output_dir {factors}".split())
    assert FactorsFile(factors).metadata.source["kind"] == "synthesised"
    assert (factors / "synthesis.png").read_bytes().startswith(b"\x89PNG")
    analysis = f"--plots false --output_dir {tmp_path}/analysis"
    main(f"analyze --factors {factors} --lora_r 2 {analysis}".split())
    report = json.loads((tmp_path / "analysis" / "svd_analysis_rank2.json").read_text())
    assert len(report["layers"]) == len(FactorsFile(factors))
    main(["export", "--factors", str(factors), "--lora_r", "4", "--output_dir", str(exported)])
    ids = torch.arange(12)[None]
    original = PeftModel.from_pretrained(tiny_model(), str(adapter))
    again = PeftModel.from_pretrained(tiny_model(), str(exported))
    assert torch.allclose(original(ids).logits, again(ids).logits, atol=1e-4)
    assert "rank 2 keeps" in capsys.readouterr().out


def test_extract_and_export_a_pair_give_the_tuned_model_back(tmp_path):
    pair = save_pair(tmp_path)
    factors, exported = tmp_path / "factors", tmp_path / "exported"
    source = f"--base {pair.base_folder} --tuned {pair.tuned_folder}"
    exactly = "--save_as factors --rank 16 --lora_r 16 --plots false"
    main(f"extract {source} {exactly} --output_dir {factors}".split())
    base = f"--base {pair.base_folder}"
    main(f"export --factors {factors} --lora_r 16 {base} --output_dir {exported}".split())
    config = json.loads((exported / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    ids = torch.arange(12)[None]
    loaded = PeftModel.from_pretrained(pair.base, str(exported))
    assert torch.allclose(loaded(ids).logits, pair.tuned(ids).logits, atol=1e-4)


def test_env_prints_versions_as_json(capsys):
    main(["env"])
    assert "peft" in json.loads(capsys.readouterr().out)["versions"]


def test_wrong_inputs_get_one_line_and_leave_nothing(adapter, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    assert "unknown verb 'train'" in refused(["train"], capsys)
    assert "either factors or adapter" in refused(["analyze", *out], capsys)
    assert "noise_share must be in [0, 1)" in refused(
        ["synthesize", "--adapter", str(adapter), "--noise_share", "2", *out], capsys
    )
    assert "at least the adapter's, 4" in refused(
        ["synthesize", "--adapter", str(adapter), "--rank", "2", *out], capsys
    )
    assert "neither" in refused(["synthesize", "--adapter", "nobody/nothing", *out], capsys)
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_non_finite_adapter_is_refused(adapter, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    weights = adapter / "adapter_model.safetensors"
    (broken / weights.name).write_bytes(weights.read_bytes()[:-20])
    out = ["--output_dir", str(tmp_path / "out"), "--plots", "false"]
    assert "truncated" in refused(["extract", "--adapter", str(broken), *out], capsys)
    tensors = load_file(weights)
    name = next(iter(LoraAdapter(adapter)))
    tensors[f"base_model.model.{name}.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, broken / weights.name)
    assert f"layer {name} has NaN" in refused(["extract", "--adapter", str(broken), *out], capsys)
    assert not (tmp_path / "out").exists()
