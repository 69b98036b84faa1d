"""Wrote the files of this folder, once, with peft-svdinit as of revision 542e840:

    cd tests/data/before && PYTHONPATH=../../.. python write.py

They stand for files that users have, so they are not written anew when a format changes: a new form
gets a folder of its own. `tests/test_files_of_before.py` reads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svdinit import (
    FactorsFile,
    FactorsMetadata,
    LoriConfig,
    LowRankFactors,
    SvdLoraConfig,
    base_samples,
    save_factors,
)
from peft_svdinit.compact import save_compact_adapter
from peft_svdinit.extraction import LayerStore
from peft_svdinit.masks import save_mask
from peft_svdinit.masks.scores_file import LayerScores, save_scores
from peft_svdinit.runs import TRAINING_LOG, TrainingLog, write_run_info

TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj",)]
NAMES += [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def base_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained("base")
    model.name_or_path = "base"
    return model.eval()


@torch.no_grad()
def trained_logits(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Logits of the model after a change of all that it trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()(input_ids=TOKENS).logits


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained("base")
    base = base_model()

    factors = {}
    for name in NAMES:
        layer = base.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        shape = (layer.out_features, layer.in_features)
        factors[name] = LowRankFactors.from_delta(torch.randn(shape), 3)
    metadata = FactorsMetadata("base", None, {"kind": "checkpoints"}, "exact", 0)
    save_factors("factors", factors, metadata, base_samples=base_samples(base, NAMES))

    names = sorted(factors)
    with LayerStore("layer_store", names, {"rank": 3}) as store:
        for name in names[:-1]:
            store.save(name, FactorsFile("factors")[name])
    Path("layer_store/job.lock").unlink(missing_ok=True)

    options = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    svd = get_peft_model(base_model(), SvdLoraConfig(**options, svd_factors="factors"))
    logits = {"svd_adapter": trained_logits(svd, 1)}
    svd.save_pretrained("svd_adapter")

    config = LoriConfig(**options, lori_density=0.25, lori_seed=5)
    lori = get_peft_model(base_model(), config)
    logits["lori_adapter"] = trained_logits(lori, 2)
    lori.save_pretrained("lori_adapter")
    save_compact_adapter(lori, "compact")
    mask = config.mask
    assert mask is not None
    save_mask("mask", mask)
    save_file(logits, "expected_logits.safetensors")

    scores = {name: torch.arange(16.0).reshape(8, 2) for name in NAMES}
    columns = {name: layer.shape[1] for name, layer in factors.items()}
    save_scores("scores", LayerScores(scores, columns, 5, {"kind": "magnitude"}, "base"))

    run = Path("run")
    run.mkdir()
    info = {
        "status": "completed",
        "name": "student",
        "seed": 3,
        "data_seed": 3,
        "steps": 2,
        "max_steps": 2,
        "tokens": 48,
        "seconds": 1.5,
        "peak_memory_mb": None,
        "trainable_parameters": 144,
        "total_parameters": 1368,
        "world_size": 1,
        "metrics": {"eval_loss": 2.5},
        "versions": {"python": "3.12.3", "torch": "2.13.0"},
        "git_revision": None,
        "hardware": {"cpu_cores": 2, "device": "cpu", "memory_gb": 16.0},
        "started": "2026-11-01T10:00:00+00:00",
        "finished": "2026-11-01T10:00:02+00:00",
        "extra": {"comparison": {"method": "svd"}},
    }
    write_run_info(run, info)
    log = TrainingLog(run / TRAINING_LOG)
    log.append({"step": 0, "eval_loss": 4.0})
    log.append({"step": 1, "epoch": 0.5, "tokens": 24, "loss": 3.5, "learning_rate": 1e-05})
    log.append({"step": 2, "epoch": 1.0, "tokens": 48, "loss": 3.0, "seconds": 1.5})
    log.append({"step": 2, "epoch": 1.0, "tokens": 48, "eval_loss": 2.5, "seconds": 1.5})


if __name__ == "__main__":
    main()
