"""Any adapter or fine-tune as factors of any rank: exactness, coverage, and of which base it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import reference
from support.peft_fixtures import SPLITS, logits, tokens
from support.stock_process import LOGITS_OF_ADAPTERS, run_without_us
from support.strategies import adapter_factors
from support.tiny_models import (
    lora_layer,
    rewrite_tensors,
    save_pair,
    tiny_model,
    trained_adapter,
    weight_of,
)
from torch.testing import assert_close

from peft_svdinit import (
    FactorsMetadata,
    LowRankFactors,
    SvdLoraConfig,
    initialize_lora_from_factors,
    save_factors,
    warm_start,
)
from peft_svdinit.factors import Held
from peft_svdinit.factors.warm_starts.base_check import check_base_of_adapter
from peft_svdinit.factors.warm_starts.widening import at_rank

RANK = 4
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    """A base, a fine-tune of its projections, and an adapter that says that it is of this base."""
    folder = tmp_path_factory.mktemp("scene")
    save_pair(folder, change=lambda name: "q_proj" in name or "down_proj" in name)
    trained_adapter(folder / "adapter")
    set_base(folder / "adapter", str(folder / "base"))
    return folder


def set_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": name}
    path.write_text(json.dumps(config))


def start_of(scene: Path, source: str = "adapter", rank: int = RANK, **options: Any) -> Any:
    return warm_start(scene / source, base=scene / "base", rank=rank, **options)


@given(factors=adapter_factors(), more=st.integers(0, 12), seed=st.integers(0, 3))
def test_at_any_rank_the_leading_triplets_stay_and_the_others_add_nothing(factors, more, seed):
    rank = min(factors.rank + more, *factors.shape)
    wide = at_rank("layer", factors, rank, seed)
    held = factors.rank
    assert wide.rank == rank and wide.norm == factors.norm
    assert torch.equal(wide.U[:, :held], factors.U) and torch.equal(wide.Vh[:held], factors.Vh)
    assert torch.equal(wide.S, torch.cat([factors.S, torch.zeros(rank - held)]))
    identity = torch.eye(rank)
    assert_close(wide.U.mT @ wide.U, identity, rtol=0, atol=1e-5)
    assert_close(wide.Vh @ wide.Vh.mT, identity, rtol=0, atol=1e-5)
    again, other = at_rank("layer", factors, rank, seed), at_rank("another", factors, rank, seed)
    assert torch.equal(again.U, wide.U) and torch.equal(again.Vh, wide.Vh)
    if held < rank < min(factors.shape):
        assert not torch.equal(other.Vh, wide.Vh) and not torch.equal(other.U, wide.U)
    less = at_rank("layer", factors, 1, seed)
    assert less.rank == 1 and less.norm == factors.norm


@pytest.mark.parametrize("rank", [1, 3, RANK, 8])
def test_the_start_computes_the_base_and_the_delta_at_its_rank(scene, rank, tmp_path):
    start = start_of(scene, rank=rank)
    teacher = PeftModel.from_pretrained(tiny_model(), str(scene / "adapter"))
    expected = tiny_model()
    kept = total = 0.0
    for name in start.factors:
        delta = lora_layer(teacher, name).get_delta_weight("default").detach()
        cut = reference.truncated(delta, min(rank, RANK))
        weight_of(expected, name).add_(torch.from_numpy(cut).float())
        kept += reference.frobenius(cut) ** 2
        total += reference.frobenius(delta) ** 2
    assert start.held.energy == pytest.approx(kept / total, rel=1e-5)
    config = SvdLoraConfig(
        r=rank,
        lora_alpha=3 * rank,
        target_modules=start.target_modules,
        svd_factors=start.save(tmp_path),  # pyright: ignore[reportArgumentType]
    )
    student = get_peft_model(tiny_model(), config)
    assert_close(logits(student), logits(expected), rtol=0, atol=1e-4)
    assert rank < RANK or start.held.worst_energy == pytest.approx(1, abs=1e-6)
    if rank >= RANK:
        assert_close(logits(student), logits(teacher), rtol=0, atol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_further_directions_receive_gradients(scene, split):
    student = get_peft_model(tiny_model(), LoraConfig(r=8, target_modules=["q_proj"]))
    start = start_of(scene, rank=8)
    initialize_lora_from_factors(student, start.factors, split=split, coverage="partial")
    student(input_ids=tokens(), labels=tokens()).loss.backward()
    layer = lora_layer(student, LAYER)
    weight_A, weight_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not weight_B[:, RANK:].any()
    assert weight_A[RANK:].norm(dim=1).min() > 0.9
    assert weight_B.grad[:, RANK:].abs().amax(dim=0).min() > 0


def test_of_a_fine_tuned_model_the_layers_that_changed_are_adapted(scene):
    start = start_of(scene, "tuned", rank=3)
    assert start.kind == "model" and start.target_modules == ["down_proj", "q_proj"]
    tuned, base = (load_file(scene / name / "model.safetensors") for name in ("tuned", "base"))
    delta = tuned[f"{LAYER}.weight"] - base[f"{LAYER}.weight"]
    assert_close(
        start.factors[LAYER].dense(),
        torch.from_numpy(reference.truncated(delta, 3)).float(),
        rtol=0,
        atol=1e-4,
    )
    assert start.factors[LAYER].norm == pytest.approx(reference.frobenius(delta), rel=1e-5)
    whole = start_of(scene, "tuned", rank=3, target_modules="all-linear")
    assert len(whole.factors) == 14 and whole.held.energy == pytest.approx(start.held.energy)


def test_what_changed_outside_the_layers_is_said(tmp_path, caplog):
    save_pair(tmp_path, change=lambda name: "q_proj" in name or "norm" in name)
    start = start_of(tmp_path, "tuned")
    assert "5 tensors outside the adapted layers changed too" in caplog.text
    assert len(start.extraction.metadata.source["uncovered"]) == 5


def test_saved_factors_start_another_rank(scene, tmp_path):
    start_of(scene, rank=2).save(tmp_path / "factors")
    again = warm_start(tmp_path / "factors", base=scene / "base", rank=7)
    assert again.kind == "factors" and again.held.energy < 1
    assert again.held.energy == pytest.approx(start_of(scene, rank=2).held.energy)


def test_a_start_of_any_rank_is_saved_as_stock_lora(scene, tmp_path):
    cases: dict[str, Any] = {"ids": "ids"}
    save_file({"ids": tokens()}, tmp_path / "ids")
    expected = {}
    for rank in (2, 7):
        start = start_of(scene, rank=rank)
        config = SvdLoraConfig(
            r=rank,
            target_modules=start.target_modules,
            svd_factors=str(start.save(tmp_path / f"f{rank}")),
            task_type="CAUSAL_LM",
        )
        student = get_peft_model(tiny_model(), config)
        student.save_pretrained(str(tmp_path / f"a{rank}"))
        cases[str(rank)] = {"base": str(scene / "base"), "adapter": str(tmp_path / f"a{rank}")}
        expected[str(rank)] = logits(student)
    cases["ids"] = str(tmp_path / "ids")
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_without_us(tmp_path, LOGITS_OF_ADAPTERS, "cases.json", "logits")
    found = load_file(tmp_path / "logits")
    for name, values in expected.items():
        assert_close(found[name], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (".", {}, r"source: .* holds adapter, base, tuned, which is no adapter, fine-tuned model"),
        ("nowhere", {}, "source: .* is not a folder"),
        ("adapter", {"rank": 17}, r"rank=17 is above the 8 triplets .*v_proj.*\(8, 16\)"),
        ("adapter", {"rank": 0}, "rank must be at least 1"),
        ("tuned", {"rank": 17}, "rank=17 is above the 8 triplets .*[kv]_proj"),
        (
            "adapter",
            {"target_modules": ["q_proj", "o_proj"]},
            r"2 target layers without a delta .*o_proj.*4 layers of its delta without target .*v_p",
        ),
        (
            "tuned",
            {"target_modules": ["down_proj", "v_proj"]},
            r"0 target layers without .*2 layers of its delta without target .*\.q_proj",
        ),
        ("base", {}, "linear layers all equal the base's"),
        ("adapter", {"revision": "main"}, "source: a revision belongs to a repository of the Hub"),
    ],
)
def test_what_cannot_be_a_start_is_refused_by_name(scene, source, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        start_of(scene, source, **options)


def test_a_folder_that_holds_two_things_is_refused(scene, tmp_path):
    shutil.copytree(scene / "adapter", tmp_path / "both")
    shutil.copytree(scene / "tuned", tmp_path / "both", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"holds adapter_config.json and config.json, so that"):
        warm_start(tmp_path / "both", base=scene / "base", rank=2)
    (tmp_path / "both" / "model.safetensors").unlink()
    assert warm_start(tmp_path / "both", base=scene / "base", rank=2).kind == "adapter"


def test_an_untrained_adapter_is_refused(scene, tmp_path):
    shutil.copytree(scene / "adapter", tmp_path / "new")

    def untrain(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: torch.zeros_like(t) for key, t in tensors.items() if "lora_B" in key})

    rewrite_tensors(tmp_path / "new" / "adapter_model.safetensors", untrain)
    with pytest.raises(ValueError, match="has a delta of zero in every layer"):
        warm_start(tmp_path / "new", base=scene / "base", rank=2)


def test_directions_without_a_delta_are_refused(scene, tmp_path):
    _, S, Vh = torch.linalg.svd(torch.randn(3, 16), full_matrices=False)
    factors = {LAYER: LowRankFactors(torch.zeros(16, 3), S, Vh, norm=float(S.norm()))}
    save_factors(tmp_path, factors, FactorsMetadata())
    with pytest.raises(ValueError, match="are directions of inputs without a delta"):
        warm_start(tmp_path, base=scene / "base", rank=5)


@pytest.mark.parametrize("edited", [False, True])
def test_a_recorded_base_on_this_disk_is_compared_by_its_weights(scene, tmp_path, edited):
    """Under another name, and in another dtype; one edited weight makes it another base."""
    other = tiny_model()
    torch.nn.Module.to(other, dtype=torch.bfloat16)
    if edited:
        weight_of(other, LAYER).add_(0.5)
    other.save_pretrained(str(tmp_path / "other"))
    shutil.copytree(scene / "adapter", tmp_path / "adapter")
    set_base(tmp_path / "adapter", str(tmp_path / "other"))
    if not edited:
        warm_start(tmp_path / "adapter", base=scene / "base", rank=2)
        return
    with pytest.raises(ValueError, match=f"'{tmp_path}/other', and this one is .*differ in .*q_p"):
        warm_start(tmp_path / "adapter", base=scene / "base", rank=2)
    warm_start(tmp_path / "adapter", base=scene / "base", rank=2, check_base=False)


def test_a_base_that_is_stored_quantised_is_known_by_its_name(scene, tmp_path):
    shutil.copytree(scene / "base", tmp_path / "tiny")
    shutil.copytree(scene / "adapter", tmp_path / "adapter")
    set_base(tmp_path / "adapter", "lab/tiny")

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.uint8)

    rewrite_tensors(tmp_path / "tiny" / "model.safetensors", quantise)
    start_of(scene).save(tmp_path / "factors")
    for source in (tmp_path / "adapter", tmp_path / "factors"):
        start = warm_start(source, base=tmp_path / "tiny", rank=2)
        assert len(start.factors) == 6 and not start.extraction.base_samples


def test_a_fine_tune_of_another_base_is_refused(scene, tmp_path):
    tiny_model(seed=5).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"by 1\.4\d times the norm of its weights.*check_base"):
        warm_start(scene / "tuned", base=tmp_path / "other", rank=2)
    warm_start(scene / "tuned", base=tmp_path / "other", rank=2, check_base=False)


def test_factors_of_another_base_are_refused(scene, tmp_path):
    start_of(scene).save(tmp_path / "factors")
    tiny_model(seed=5).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"of another base model than .*the weights of .* differ"):
        warm_start(tmp_path / "factors", base=tmp_path / "other", rank=2)
    warm_start(tmp_path / "factors", base=tmp_path / "other", rank=2, check_base=False)


@pytest.mark.parametrize(
    ("recorded", "names", "same"),
    [
        ("meta/Llama-3-8B", ["/cache/snapshots/ab12", "meta/Llama-3-8B"], True),
        ("unsloth/llama-3-8b", ["/models/Llama-3-8B"], True),
        ("builtin:smollm2-135m", ["/root/c/smollm2-135m-0a", "builtin:smollm2-135m"], True),
        ("/home/x/c/smollm2-135m-0a", ["/root/c/smollm2-135m-0a", "builtin:smollm2-135m"], True),
        ("C:\\models\\tiny\\", ["/srv/tiny"], True),
        ("/home/x/runs/a/checkpoint-20", ["/root/b/checkpoint-20"], False),
        ("/home/x/base_model", ["/models/base_model"], False),
        ("meta/Llama-3-8B", ["/models/Llama-3.1-8B"], False),
        (None, ["/models/tiny"], False),
        ("", ["/models/tiny", "tiny"], False),
    ],
)
def test_without_its_weights_a_base_is_known_by_the_last_part_of_its_name(recorded, names, same):
    def check() -> None:
        check_base_of_adapter(recorded, names, {}, {}, place="source: x")

    if same:
        check()
        return
    with pytest.raises(ValueError, match=r"says that its base model is .*set check_base=False"):
        check()


def test_what_is_not_whole_never_reads_as_all_of_it():
    layer = LowRankFactors.from_delta(torch.diag(torch.tensor([1.0, 0.02])), 2)
    held = Held.of({"a": layer, "b": layer}, 1)
    assert held.energy == pytest.approx(1 / 1.0004) and math.isclose(held.energy, held.worst_energy)
    assert str(held) == "at rank 1 holds 99.9 % of its energy; worst layer a 99.9 %"
    assert str(Held.of({"a": layer}, 5)) == "at rank 5 holds all of its energy"
