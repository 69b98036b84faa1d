"""Whatever the architecture: what a verb writes is what stock PEFT reads, or the verb refuses."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.small_configs import class_of_family, small_config

from peft_svdinit.cli import main
from peft_svdinit.models import linear_modules

KINDS = {
    "dense": ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "phi3", "opt"],
    "images": ["llava", "gemma3", "internvl", "paligemma", "idefics3"],
    "experts": ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe"],
    "encoder and decoder": ["T5ForConditionalGeneration", "BartForConditionalGeneration"],
    "classifier": [
        "BertForSequenceClassification",
        "LlamaForSequenceClassification",
        "RobertaForTokenClassification",
    ],
}
families = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.sampled_from(KINDS[kind]))


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 19).reshape(2, 8)
    more = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, **more).logits


def change(model: Any, data: Any) -> None:
    """Some kinds of linear layers, the head of a classifier, and perhaps norms, in place."""
    endings = {name.rpartition(".")[2] for name in linear_modules(model)}
    endings = sorted(endings - {"score", "classifier"})
    chosen = set(data.draw(st.lists(st.sampled_from(endings), min_size=1, unique=True)))
    chosen |= {"score", "classifier"}
    norms = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            if (name == f"{module}.weight" and module.rpartition(".")[2] in chosen) or (
                norms and parameter.dim() == 1 and "norm" in module
            ):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def run(*options: Any) -> bool:
    """Whether the verb did what it was asked for."""
    try:
        main([str(option) for option in options])
    except SystemExit as left:
        assert left.code
        return False
    return True


@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(family=families, data=st.data())
def test_logits_are_those_of_the_tuned_model(family, data):
    architecture: Any = class_of_family(family)
    config = small_config(architecture)
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = architecture(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder / "base")
        change(model, data)
        model.save_pretrained(folder / "tuned")
        expected = logits(architecture.from_pretrained(folder / "tuned"))
        options = ["--rank", "48", "--verify", data.draw(st.sampled_from(["none", "layers"]))]
        options += ["--modules_to_save", "changed"]
        options += ["--uniform_rank"] if data.draw(st.booleans()) else []
        pair = ["--base", folder / "base", "--tuned", folder / "tuned"]
        written = folder / "adapter"
        if not run("extract", *pair, *options, "--output_dir", written):
            event(f"{family}: refused")
            assert sorted(path.name for path in folder.iterdir()) == ["base", "tuned"]
            return
        again = data.draw(st.sampled_from(["nothing", "resize", "merge"]))
        if again == "resize" and run(
            "resize", "--adapter", written, "--rank", "48", "--output", folder / "resized"
        ):
            written = folder / "resized"
        elif again == "merge" and run(
            *("merge", "--adapter", written, written, "--weights", "0.25", "0.75"),
            *("--method", "cat", "--output", folder / "merged"),
        ):
            written = folder / "merged"
        event(f"{family}: {written.name}")
        base = architecture.from_pretrained(folder / "base")
        found = logits(PeftModel.from_pretrained(base, str(written)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
