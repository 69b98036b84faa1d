"""From two checkpoints to a published adapter: errors, resumes, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import reference
from support.tiny_models import SavedPair, rewrite_tensors, save_pair, truncate, weight_of
from torch.testing import assert_close

from peft_svdinit.adapters import AdapterForm, extract_adapter
from peft_svdinit.adapters.extraction import extract as adapter_extraction
from peft_svdinit.adapters.extraction import store
from peft_svdinit.cli import main
from peft_svdinit.factors import CheckpointPair, RankRule

WEIGHTS = "adapter_model.safetensors"
LAYERS_ONLY = AdapterForm(verify="layers")
UP = "model.layers.0.mlp.up_proj"


def opened(pair: SavedPair, **options) -> CheckpointPair:
    return CheckpointPair(pair.base_folder, pair.tuned_folder, **options)


def extract(pair: SavedPair, folder: Path, rule: RankRule, form: AdapterForm = LAYERS_ONLY):
    return extract_adapter(opened(pair), folder, rule, form, base_model_name_or_path="tiny")


def merged(pair: SavedPair, folder: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(pair.base, str(folder)).merge_and_unload()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_of_full_rank_is_the_fine_tune(tmp_path, architecture):
    pair = save_pair(tmp_path, architecture, sharded=True)
    extracted = extract(pair, tmp_path / "out", RankRule(rank=999))
    assert extracted.exported.relative_error < 1e-3
    adapted = merged(pair, tmp_path / "out")
    for name in opened(pair):
        assert_close(weight_of(adapted, name), weight_of(pair.tuned, name), rtol=0, atol=1e-5)


def test_the_error_of_every_layer_is_the_optimum_and_is_measured(tmp_path):
    pair = save_pair(tmp_path)
    extracted = extract(pair, tmp_path / "out", RankRule(rank=3))
    record = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert extracted.verification is not None
    lost = norms = 0.0
    for name, delta in opened(pair).items():
        expected = reference.discarded(delta, 3)
        assert extracted.exported.errors[name] == pytest.approx(expected, rel=1e-4)
        assert extracted.verification.errors[name] == pytest.approx(expected, rel=1e-4)
        layer = record["layers"][name]
        assert layer["relative_error"] == pytest.approx(
            expected / reference.frobenius(delta), rel=1e-4
        )
        lost, norms = lost + expected**2, norms + reference.frobenius(delta) ** 2
    assert extracted.exported.relative_error == pytest.approx(math.sqrt(lost / norms), rel=1e-4)
    assert record["totals"]["relative_error"] == extracted.exported.relative_error
    assert "Verified" in (tmp_path / "out" / "extraction.md").read_text()


@pytest.mark.parametrize(
    "rule",
    [
        RankRule(energy=0.8, max_rank=16),
        RankRule(error=0.5, max_rank=16),
        RankRule(max_parameters=2000, max_rank=16),
    ],
)
@pytest.mark.parametrize("uniform", [False, True])
def test_every_rule_gives_an_adapter_that_keeps_it(tmp_path, rule, uniform):
    pair = save_pair(tmp_path)
    extracted = extract(pair, tmp_path / "out", replace(rule, uniform=uniform))
    assert extracted.short == []
    for layer in extracted.exported.layers:
        error = layer.truncation_error / layer.norm
        assert rule.energy is None or 1 - error**2 >= rule.energy - 1e-5
        assert rule.error is None or error <= rule.error + 1e-5
        assert layer.rank <= min(opened(pair)[layer.name].shape)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    if rule.max_parameters:
        assert 1000 < stored <= 2000
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) is not uniform


def test_a_bound_beyond_the_largest_rank_is_missed_aloud(tmp_path, caplog):
    pair = save_pair(tmp_path)
    extracted = extract(pair, tmp_path / "out", RankRule(energy=0.99, max_rank=2))
    assert set(extracted.short) == set(opened(pair))
    assert "do not reach the bound with rank 2; raise max_rank" in caplog.text
    assert "do **not** reach the bound" in extracted.as_text()


def test_layers_that_did_not_change_are_said_and_left_out(tmp_path):
    pair = save_pair(tmp_path, change=lambda name: "q_proj" in name)
    extracted = extract(pair, tmp_path / "out", RankRule(rank=4))
    record = extracted.as_dict()
    assert len(record["zero_layers"]) == 12
    keys = load_file(tmp_path / "out" / WEIGHTS)
    assert all("q_proj" in key for key in keys) and len(keys) == 4
    assert "12 layers did not change" in extracted.as_text()


def test_two_equal_checkpoints_are_refused_and_nothing_is_published(tmp_path):
    pair = save_pair(tmp_path, change=lambda name: False)
    with pytest.raises(ValueError, match=r"tuned: its linear layers all equal the base's"):
        extract(pair, tmp_path / "out", RankRule(rank=4))
    assert not (tmp_path / "out").exists()


def test_half_precision_counts_its_rounding(tmp_path):
    pair = save_pair(tmp_path, dtype=torch.bfloat16)
    form = AdapterForm(dtype="bfloat16", verify="layers")
    extracted = extract(pair, tmp_path / "out", RankRule(rank=999), form)
    assert 1e-4 < extracted.exported.relative_rounding_error < 5e-3
    assert extracted.exported.relative_error >= extracted.exported.relative_rounding_error
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_embeddings_and_norms_come_along_on_demand(tmp_path):
    pair = save_pair(tmp_path, change=lambda name: True)
    plain = extract(pair, tmp_path / "plain", RankRule(rank=999))
    names = {tensor.key for tensor in plain.uncovered}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert "**Not covered**" in plain.as_text()
    form = AdapterForm(verify="full", modules_to_save=["changed"])
    whole = extract(pair, tmp_path / "whole", RankRule(rank=999), form)
    assert whole.uncovered == []
    assert whole.text is not None and whole.text.kl_adapted < 1e-6 < whole.text.kl_base


def test_a_vocabulary_that_grew_is_sliced_and_verified_without_text(tmp_path, caplog):
    pair = save_pair(tmp_path, change=lambda name: True)
    pair.tuned.resize_token_embeddings(70, mean_resizing=False)
    pair.tuned.save_pretrained(str(pair.tuned_folder))
    named = ["embed_tokens", "lm_head"]
    extracted = extract_adapter(
        opened(pair, slice_modules=named),
        tmp_path / "out",
        RankRule(rank=999),
        AdapterForm(modules_to_save=named),
        base_model_name_or_path="tiny",
    )
    assert extracted.text is None and "different vocabularies" in caplog.text
    assert extracted.verification is not None
    adapted = PeftModel.from_pretrained(pair.base, str(tmp_path / "out")).get_base_model()
    expected = weight_of(pair.tuned, "model.embed_tokens")[:64]
    embedding: Any = adapted.get_submodule("model.embed_tokens")
    assert torch.equal(embedding.weight, expected)


STAGES = ["fill_store", "export_adapter", "verify_adapter", "compare_on_text", "write_json"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("existing", [False, True])
def test_a_run_stopped_at_any_stage_publishes_nothing_and_is_resumed(
    tmp_path, monkeypatch, stage, existing
):
    pair = save_pair(tmp_path)
    out, form = tmp_path / "out", AdapterForm()
    extract(pair, tmp_path / "whole", RankRule(rank=3), form)
    if existing:
        extract(pair, out, RankRule(rank=2))
    before = {path.name: path.read_bytes() for path in out.glob("*")}
    module = store if stage == "fill_store" else adapter_extraction
    work = getattr(module, stage)

    def stopped(*args, **kwargs):
        work(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, stage, stopped)
        extract(pair, out, RankRule(rank=3), form)
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    extract(pair, out, RankRule(rank=3), form)
    for name in (WEIGHTS, "adapter_config.json", "extraction.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_resumed_run_does_not_factorise_again(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adapter_extraction, "export_adapter", interrupted)
        extract(pair, tmp_path / "out", RankRule(rank=3))
    monkeypatch.setattr("peft_svdinit.factors.extraction.factorisation.truncated_svd", None)
    extract(pair, tmp_path / "out", RankRule(rank=3))


def test_a_wrong_adapter_is_never_published(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    export = adapter_extraction.export_adapter

    def tampered(*args, **kwargs):
        exported = export(*args, **kwargs)

        def swap(tensors):
            keys = [k for k in tensors if f"{UP}.lora_B" in k]
            tensors[keys[0]] = -tensors[keys[0]]

        rewrite_tensors(exported.output / WEIGHTS, swap)
        return exported

    monkeypatch.setattr(adapter_extraction, "export_adapter", tampered)
    with pytest.raises(ValueError, match=f"is not what was promised.*{UP}"):
        extract(pair, tmp_path / "out", RankRule(rank=3))
    assert not (tmp_path / "out").exists()


def test_a_change_of_a_checkpoint_starts_afresh(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adapter_extraction, "export_adapter", interrupted)
        extract(pair, tmp_path / "out", RankRule(rank=3))
    rewrite_tensors(
        pair.tuned_folder / "model.safetensors",
        lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"] * 2}),
    )
    extracted = extract(pair, tmp_path / "out", RankRule(rank=3))
    assert extracted.exported.errors[UP] == pytest.approx(
        reference.discarded(opened(pair)[UP], 3), rel=1e-4
    )


def test_checkpoints_that_change_under_way_publish_nothing(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    fill = store.fill_store

    def replaced(*args, **kwargs):
        fill(*args, **kwargs)
        rewrite_tensors(
            pair.tuned_folder / "model.safetensors",
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16)}),
        )

    monkeypatch.setattr(store, "fill_store", replaced)
    with pytest.raises(ValueError, match=r"changed (or replaced|while they were read)"):
        extract(pair, tmp_path / "out", RankRule(rank=3))
    assert not (tmp_path / "out").exists()


def test_changed_experts_that_no_layer_covers_are_refused(tmp_path):
    pair = save_pair(tmp_path)
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for folder, value in ((pair.base_folder, 1.0), (pair.tuned_folder, 1.5)):
        rewrite_tensors(
            folder / "model.safetensors",
            lambda tensors, value=value: tensors.update({key: torch.full((4, 4), value)}),
        )
    with pytest.raises(ValueError, match=f"1 changed tensors, {key} the first, are no parameters"):
        extract(pair, tmp_path / "out", RankRule(rank=3))
    extract_adapter(
        opened(pair, exclude_modules=r".*experts.*"),
        tmp_path / "out",
        RankRule(rank=3),
        LAYERS_ONLY,
        base_model_name_or_path="tiny",
    )


def test_settings_of_the_configuration_that_changed_are_said(tmp_path, caplog):
    pair = save_pair(tmp_path)
    path = pair.tuned_folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    extracted = extract(pair, tmp_path / "out", RankRule(rank=3))
    assert "no adapter can carry: hidden_act: silu > gelu" in caplog.text
    assert "no adapter can carry: `hidden_act`" in extracted.as_text()


def test_the_output_may_be_a_link_or_relative(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    extract(pair, tmp_path / "link", RankRule(rank=3))
    assert (tmp_path / "real" / WEIGHTS).is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    extract(pair, Path("."), RankRule(rank=3))
    assert (tmp_path / "here" / WEIGHTS).is_file()


def test_a_full_disk_is_an_error_that_a_second_run_goes_on_from(tmp_path, monkeypatch):
    pair = save_pair(tmp_path)
    saved = []

    def full(path, tensors, metadata):
        saved.append(path)
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        write(path, tensors, metadata)

    from peft_svdinit.factors.extraction import layer_store

    write = layer_store.write_tensors
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(layer_store, "write_tensors", full)
        extract(pair, tmp_path / "out", RankRule(rank=3))
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("layer-*"))) == 4
    extract(pair, tmp_path / "out", RankRule(rank=3))


def command(pair: SavedPair, out: Path, *options: str) -> list[str]:
    folders = ["--base", str(pair.base_folder), "--tuned", str(pair.tuned_folder)]
    return ["extract", *folders, "--out", str(out), *options]


def test_the_command_writes_an_adapter_and_says_what_it_keeps(tmp_path, capsys):
    pair = save_pair(tmp_path)
    main(command(pair, tmp_path / "out", "--rank", "3"))
    said = capsys.readouterr().out
    assert "14 layers, rank 3" in said
    assert "KL(tuned ‖ base + adapter)" in said and "random tokens" in said
    assert f"Adapter: {tmp_path / 'out'}" in said
    merged(pair, tmp_path / "out")


def test_bytes_are_parameters_by_their_size(tmp_path):
    pair = save_pair(tmp_path)
    for dtype, size in (("float32", 8000), ("bfloat16", 4000)):
        out = tmp_path / dtype
        options = ["--max_bytes", str(size), "--dtype", dtype, "--verify", "none"]
        main(command(pair, out, *options))
        stored = sum(tensor.nbytes for tensor in load_file(out / WEIGHTS).values())
        assert 0.8 * size < stored <= size
    assert "Not verified." in (tmp_path / "float32" / "extraction.md").read_text()


def test_a_rule_without_a_bound_is_refused(tmp_path):
    pair = save_pair(tmp_path)
    with pytest.raises(ValueError, match="max_rank is needed with energy"):
        extract(pair, tmp_path / "out", RankRule(energy=0.5))


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    pair = save_pair(tmp_path, dtype=torch.bfloat16)
    before = sorted(path for path in tmp_path.rglob("*"))
    main(command(pair, tmp_path / "out", "--rank", "3", "--dry_run", "true"))
    said = capsys.readouterr().out
    assert "14 linear layers" in said and "memory" in said and "s for the SVDs" in said
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_factors_of_a_pair_are_resumable_too(tmp_path, monkeypatch, capsys):
    pair = save_pair(tmp_path)
    options = ["--save_as", "factors", "--rank", "4", "--lora_r", "2", "--plots", "false"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("peft_svdinit.analysis.write_teacher", interrupted)
        main(command(pair, tmp_path / "factors", *options))
    monkeypatch.setattr("peft_svdinit.factors.extraction.factorisation.truncated_svd", None)
    main(command(pair, tmp_path / "factors", *options))
    assert (tmp_path / "factors" / "factors.safetensors").is_file()
    assert not (tmp_path / "factors.partial").exists()
    assert "14 layers" in capsys.readouterr().out


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "4", "--energy", "0.5"], "exactly one of rank, energy"),
        (["--max_bytes", "9", "--max_parameters", "9"], "exclude each other"),
        (["--rank", "4", "--max_rank", "8"], "max_rank bounds the ranks"),
        (
            ["--save_as", "factors", "--energy", "0.5"],
            "--energy does not apply to --save_as=factors",
        ),
        (["--lora_r", "4"], "--lora_r does not apply to --save_as=adapter"),
        (["--read_ahead", "0"], "read_ahead must be at least 1"),
        (["--device", "nonsense"], "cannot be used"),
        (["--target_modules", "(q_proj"], "q_proj"),
        (["--save_as", "factors", "--rank", "4", "--lora_r", "9"], "lora_r=9 must not be above"),
        (["--exclude_modules", ".*"], "leaves no linear layer"),
        (["--modules_to_save", "q_proj"], "q_proj is no module of the tuned model outside"),
        (["--max_bytes", "10"], "max_parameters"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(tmp_path, capsys, options, message):
    pair = save_pair(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(command(pair, tmp_path / "out", *options))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and "error:" in said
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_apply_to_an_adapter_are_refused(tmp_path, capsys):
    for options in (["--rank", "2"], ["--dry_run", "true"], ["--verify", "none"]):
        with pytest.raises(SystemExit):
            main(["extract", "--adapter", "x", "--out", str(tmp_path / "out"), *options])
        assert "does not apply to adapter" in capsys.readouterr().err


def test_a_truncated_shard_is_one_line_and_exit_code_2(tmp_path, capsys):
    pair = save_pair(tmp_path, sharded=True)
    truncate(min(pair.tuned_folder.glob("model-*.safetensors")))
    with pytest.raises(SystemExit) as stopped:
        main(command(pair, tmp_path / "out"))
    assert stopped.value.code == 2
    assert "is not a readable safetensors file" in capsys.readouterr().err
