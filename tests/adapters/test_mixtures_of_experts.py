"""Adapters of mixtures of experts, some of whose names PEFT takes for the fused experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from support.mixture_of_experts import FAMILIES, Family
from support.peft_fixtures import logits, teacher_factors, tuned

from peft_svdinit.adapters import AdapterForm, estimate, export_adapter, extract_adapter
from peft_svdinit.factors import CheckpointPair, RankRule
from peft_svdinit.models import linear_modules
from peft_svdinit.models.peft_targets import misread_targets

UNVERIFIED = AdapterForm(verify="none")
REFUSING = [family.name for family in FAMILIES.values() if family.misread]


def pair_of(family: Family, folder: Path, **options: Any) -> CheckpointPair:
    """The family's model before and after rank-one changes of the layers that PEFT can adapt."""
    base = family.model()
    targets = [
        name for name in linear_modules(base) if not name.endswith(tuple(family.excluded or ["-"]))
    ]
    after = tuned(base, teacher_factors(base, targets, rank=1, held=1))
    for model, name in ((base, "base"), (after, "tuned")):
        model.save_pretrained(folder / name)
    return CheckpointPair(folder / "base", folder / "tuned", **options)


def extract(pair: CheckpointPair, folder: Path, form: AdapterForm = UNVERIFIED) -> None:
    extract_adapter(pair, folder, RankRule(rank=2), form, base_model_name_or_path="tiny")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_adapter_gives_the_tuned_models_logits_in_stock_peft(family, tmp_path):
    pair = pair_of(family, tmp_path, exclude_modules=family.excluded)
    extract(pair, tmp_path / "adapter")
    kind: Any = type(family.model())
    base, after = (kind.from_pretrained(tmp_path / name).eval() for name in ("base", "tuned"))
    expected = logits(after)
    assert (expected - logits(base)).abs().max() > 0.05
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (logits(loaded) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("verify", ["full", "none"])
@pytest.mark.parametrize("family", REFUSING)
def test_layers_that_peft_takes_for_experts_are_refused_before_any_work(family, verify, tmp_path):
    expected = FAMILIES[family]
    pair = pair_of(expected, tmp_path)
    before, form = sorted(tmp_path.rglob("*")), AdapterForm(verify=verify)
    # The very choice with which the test above writes an adapter.
    remedy = f"--exclude_modules {' '.join(expected.excluded)}$"
    with pytest.raises(ValueError, match=remedy):
        extract(pair, tmp_path / "adapter", form)
    with pytest.raises(ValueError, match=remedy):
        estimate(pair, RankRule(rank=2), form, tmp_path / "adapter")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_choice_of_such_layers_alone_is_told_to_be_another(tmp_path):
    pair = pair_of(FAMILIES["Glm4Moe"], tmp_path, target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ValueError, match="choose other layers"):
        extract(pair, tmp_path / "adapter")


def test_factors_of_such_layers_are_exported_without_them(tmp_path):
    family = FAMILIES["DeepseekV3"]
    base = family.model()
    base.save_pretrained(tmp_path / "base")
    factors = teacher_factors(base, "all-linear")
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"give them rank 0, .* shared_experts\.down_proj$"):
        export_adapter(factors, 3, folder, base=tmp_path / "base")
    assert not folder.exists()
    ranks = {name: 0 if name.endswith(tuple(family.excluded)) else 3 for name in factors}
    export_adapter(factors, ranks, folder, base=tmp_path / "base")
    kept = {name: factors[name] for name, rank in ranks.items() if rank}
    expected = logits(tuned(base, kept))
    loaded = PeftModel.from_pretrained(base, str(folder))
    assert (logits(loaded) - expected).abs().max() < 1e-4


def adapted_by_stock_peft(model: torch.nn.Module, targets: str | list[str]) -> set[str]:
    """The layers that get factors of their own, of a copy of the model."""
    peft_model: Any = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=targets, r=2, bias="none")
    )
    return {
        name
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    }


@pytest.mark.parametrize("family", ["DeepseekV3", "Qwen3Next", "Qwen2Moe"])
def test_stock_peft_adapts_a_layer_by_name_or_regex_unless_it_is_misread(family):
    model = FAMILIES[family].model()
    misread = misread_targets(model, linear_modules(model))
    assert bool(misread) == (family in REFUSING)
    for name in linear_modules(model):
        for spelling in ([name], ".*" + name.replace(".", r"\.")):
            try:
                adapted = adapted_by_stock_peft(model, spelling)
            except ValueError:  # gate_proj without up_proj is refused.
                adapted = set()
            assert (name in adapted) == (name not in misread), spelling
