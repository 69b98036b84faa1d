"""Checkpoints whose names or layout are not the model's, of every family that transformers has."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from support.small_configs import class_of_family, parameters, small_config
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

from peft_svdinit import SvdLoraConfig
from peft_svdinit.adapters import AdapterForm, extract_adapter
from peft_svdinit.cli import main
from peft_svdinit.factors import CheckpointPair, FactorsFile, LoraAdapter, RankRule
from peft_svdinit.models import is_chosen, linear_modules, lora_key

# PEFT loads no adapter of some of their layers.
PARTLY_ADAPTED = set(
    "afmoe beam deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe exaone_moe glm4_moe "
    "glm4_moe_lite glm4v_moe glm_moe_dsa laguna longcat_flash mistral_large4 mistral_large4_text "
    "nemotron_h pi0 qwen3_next solar_open unlimited_ocr".split()
)
FAMILIES = [family for family in _build_checkpoint_conversion_mapping() if family != "legacy"]
MOST_PARAMETERS = 7_000_000
NO_CLASS = "a part of other models, and no model of transformers by itself"
TIMM = "needs timm"
LARGE = "more than 7 million parameters at its smallest"
TIED = "sizes that depend on each other, which do not shrink alone"
NOT_BUILT = {
    "BeitForSemanticSegmentation": TIED,
    "ConditionalDetrForSegmentation": TIMM,
    "ConditionalDetrModel": TIMM,
    "DetrForSegmentation": TIMM,
    "DetrModel": TIMM,
    "Dots3NoteForConditionalGeneration": TIED,
    "Dots3NoteModel": TIED,
    "Emu3Model": TIED,
    "MaskFormerDetrDecoder": NO_CLASS,
    "MimiDecoderModel": TIED,
    "MimiEncoderModel": LARGE,
    "MimiModel": TIED,
    "MtpModel": NO_CLASS,
    "PPChart2TableModel": NO_CLASS,
    "Sapiens2ForImageMatting": TIED,
    "Sapiens2ForNormalEstimation": TIED,
    "Sapiens2ForPointmapEstimation": TIED,
    "Sapiens2ForPoseEstimation": TIED,
    "Sapiens2ForSemanticSegmentation": TIED,
    "UnlimitedOcrSamVisionEncoder": NO_CLASS,
    "UnlimitedOcrVisionEncoder": NO_CLASS,
    "VibeVoiceAsrModel": LARGE,
    "colqwen2": NO_CLASS,
    "d_fine": TIED,
    "deepseek_ocr2": TIED,
    "deformable_detr": TIMM,
    "dinov3_convnext": LARGE,
    "dots1": "its code fails on the meta device",
    "dots3_note_audio_encoder": NO_CLASS,
    "dots3_note_vision_encoder": NO_CLASS,
    "emu3": TIED,
    "ernie4_5_vl_moe": TIED,
    "esm": TIED,
    "gemma3n_text": TIED,
    "gradium_phonon_tts": TIED,
    "hunyuan_v1_moe": TIED,
    "hunyuan_vl": TIED,
    "jev": NO_CLASS,
    "lfm2_moe": TIED,
    "lw_detr": TIED,
    "maskformer": LARGE,
    "mlcd_vision": NO_CLASS,
    "pp_doclayout_v2": NO_CLASS,
    "pp_doclayout_v3": LARGE,
    "pp_doclayout_v4": LARGE,
    "qwen3_omni_moe": NO_CLASS,
    "qwen3_omni_moe_text": NO_CLASS,
    "rt_detr": LARGE,
    "rt_detr_v2": LARGE,
    "step3p5_vision": NO_CLASS,
    "t5gemma2_encoder": TIED,
    "timm_wrapper": TIMM,
    "tipsv2_dpt": NO_CLASS,
    "vibevoice_asr": LARGE,
    "xCLIPTextModel": NO_CLASS,
    "xCLIPVisionModel": NO_CLASS,
}


def tuned_pair(folder: Path, model: Any) -> set[str]:
    """Save a model before and after rank-one changes of its linear layers, whose names it gives."""
    model.save_pretrained(folder / "base")
    layers = set(linear_modules(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") in layers:
                rows, columns = parameter.shape
                change = torch.randn(rows, 1, generator=generator)
                parameter += 0.05 * change @ torch.randn(1, columns, generator=generator)
    model.save_pretrained(folder / "tuned")
    return layers


def largest_difference(
    architecture: Any, folder: Path, adapter: Path, left_out: Sequence[str] = ()
) -> float:
    """Of base + adapter, loaded by stock PEFT and merged, to tuned, over all tensors.

    The layers left out must be those of the base.
    """
    base = architecture.from_pretrained(folder / "base")
    weights = {f"{name}.weight" for name in left_out}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if name in weights}
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    tuned = architecture.from_pretrained(folder / "tuned").state_dict()
    found = merged.state_dict()
    assert found.keys() == tuned.keys()
    tuned |= before
    return max(
        (found[key].float() - tensor.float()).abs().max().item()
        for key, tensor in tuned.items()
        if tensor.numel()
    )


def extract(folder: Path, **options: Any) -> None:
    extract_adapter(
        CheckpointPair(folder / "base", folder / "tuned", **options),
        folder / "adapter",
        RankRule(rank=2),
        AdapterForm(verify="none"),
        base_model_name_or_path=str(folder / "base"),
    )


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_BUILT])
def test_the_adapter_reproduces_the_tuned_model(family, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    architecture: Any = class_of_family(family)
    config = small_config(architecture)
    assert parameters(architecture, config) <= MOST_PARAMETERS
    torch.manual_seed(0)
    layers = tuned_pair(tmp_path, architecture(config))
    left_out: list[str] = []
    try:
        extract(tmp_path)
    except ValueError as error:
        said = re.search(
            r"no adapter has these layers; leave them out: --exclude_modules (.*)", str(error)
        )
        assert said is not None, error
        assert not (tmp_path / "adapter.partial").exists()
        extract(tmp_path, exclude_modules=said[1].split())
        left_out = [name for name in layers if is_chosen(name, said[1].split())]
    assert bool(left_out) == (family in PARTLY_ADAPTED)
    assert largest_difference(architecture, tmp_path, tmp_path / "adapter", left_out) < 1e-4


def test_families_that_are_not_built_cannot_be():
    for family in NOT_BUILT.keys() & set(FAMILIES):
        architecture = class_of_family(family)
        if architecture is None:
            continue
        try:
            size = parameters(architecture, small_config(architecture))
        except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError):
            continue
        except (TypeError, ValueError, StrictDataclassError):
            continue
        assert size > MOST_PARAMETERS, family


def saved_pair(folder: Path, family: str) -> set[str]:
    architecture: Any = class_of_family(family)
    torch.manual_seed(0)
    return tuned_pair(folder, architecture(small_config(architecture)))


def test_an_adapter_of_older_names_gives_factors_by_the_names_of_its_base(tmp_path):
    layers = saved_pair(tmp_path, "llava")
    older = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.")
        .replace("model.multi_modal_projector.", "multi_modal_projector."): name
        for name in layers
    }
    assert older.keys() != layers
    tensors = {}
    model: Any = class_of_family("llava")
    skeleton = model(small_config(model))
    for name, module in older.items():
        rows, columns = skeleton.get_submodule(module).weight.shape
        tensors[lora_key(name, "A")] = torch.randn(2, columns)
        tensors[lora_key(name, "B")] = torch.randn(rows, 2)
    (tmp_path / "older").mkdir()
    save_file(tensors, tmp_path / "older/adapter_model.safetensors")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(older))
    config.save_pretrained(str(tmp_path / "older"))
    options = ["--adapter", str(tmp_path / "older"), "--base", str(tmp_path / "base")]
    options += ["--lora_r", "2", "--plots", "false", "--output_dir", str(tmp_path / "factors")]
    main(["extract", *options])
    assert set(FactorsFile(tmp_path / "factors")) == layers
    adapted: Any = get_peft_model(
        model.from_pretrained(tmp_path / "base"),
        SvdLoraConfig(
            r=2,
            lora_alpha=2,
            target_modules=list(layers),
            svd_factors=str(tmp_path / "factors"),
        ),
    )
    assert {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{name}" for name in layers
    }


def test_the_analysis_of_a_pair_has_the_layers_of_the_model(tmp_path):
    layers = saved_pair(tmp_path, "gemma3")
    options = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--rank", "4"]
    options += ["--lora_r", "2", "--plots", "false", "--output_dir", str(tmp_path / "analysis")]
    main(["analyze", *options])
    (report,) = (tmp_path / "analysis").glob("*.json")
    text = report.read_text()
    assert all(layer in text for layer in layers)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_vl_moe", "granitemoe"])
def test_changed_experts_are_refused_before_any_work_unless_left_out(family, tmp_path, capsys):
    architecture: Any = class_of_family(family)
    torch.manual_seed(0)
    model = architecture(small_config(architecture))
    layers = tuned_pair(tmp_path, model)
    name = next(
        key for key, one in model.named_parameters() if one.dim() == 3 and "layers.0" in key
    )
    with torch.no_grad():
        model.get_parameter(name).add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    options = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--rank", "2"]
    options += ["--output_dir", str(tmp_path / "adapter"), "--verify", "none"]
    with pytest.raises(SystemExit):
        main(["extract", *options])
    error = capsys.readouterr().err
    assert f"{name} the first, are stacks of matrices" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
    said = re.search(r"exclude_modules (\S+) if", error)
    assert said is not None
    main(["extract", *options, "--exclude_modules", said[1]])
    assert set(LoraAdapter(tmp_path / "adapter")) == layers


def test_layers_whose_weights_the_model_reads_past_them_are_named(tmp_path):
    saved_pair(tmp_path, "jamba")
    options = ["--base", str(tmp_path / "base"), "--tuned", str(tmp_path / "tuned"), "--rank", "2"]
    main(["extract", *options, "--output_dir", str(tmp_path / "adapter")])
    report = (tmp_path / "adapter/extraction.md").read_text()
    assert "adapted layers were never called on the text" in report
    check = json.loads((tmp_path / "adapter/extraction.json").read_text())["text_check"]
    called = {name.rpartition(".")[2] for name in check["never_called"]}
    assert "dt_proj" in called and "q_proj" not in called
