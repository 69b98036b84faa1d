"""What a training is said to need, beside the tensors of one and what the allocator reports."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_models import tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_svdinit.training import (
    ModelOptions,
    enable_checkpointing_,
    estimate_memory,
    load_model,
    load_skeleton,
)

SIZES: dict[str, Any] = {"batch_size": 8, "length": 64}
# 8-bit states begin at 4096 entries: one tensor of the LoRA of this size has more, most have fewer.
WIDER = {"hidden_size": 64, "intermediate_size": 512, "vocab_size": 1024}


def adapted(model, kind: str):
    if kind == "lora":
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wider")
    tiny_model("llama", tie_word_embeddings=True, **WIDER).save_pretrained(place)
    return place


class Held(TrainerCallback):
    """Bytes that a step has when its gradients and the optimizer's state are both there."""

    def on_optimizer_step(self, args, state, control, *, model, optimizer, **kwargs):
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        self.trained = sum(p.nbytes for p in trained)
        self.frozen = sum(t.nbytes for t in [*parameters, *model.buffers()]) - self.trained
        self.gradients = sum(p.grad.nbytes for p in trained)
        tables = ("qmap1", "qmap2")
        self.optimizer = sum(
            value.nbytes
            for state in optimizer.optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and name not in tables
        )


@pytest.mark.parametrize(
    ("kind", "dtype", "optim"),
    [
        ("lora", "bfloat16", "adamw_torch"),
        ("full", "bfloat16", "adamw_torch_fused"),
        ("full", "float32", "adafactor"),
        ("lora", "float32", "sgd"),
        ("lora", "bfloat16", "adamw_8bit"),
        ("full", "bfloat16", "adamw_8bit"),
    ],
)
def test_all_but_the_step_is_what_a_training_holds(folder, tmp_path, kind, dtype, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    options = ModelOptions(str(folder), dtype=dtype)
    held = Held()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, optim=optim, report_to="none", disable_tqdm=True
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    model = adapted(load_model(options), kind)
    Trainer(model, arguments, train_dataset=rows, callbacks=[held]).train()  # pyright: ignore
    found = estimate_memory(adapted(load_skeleton(options), kind), optim=optim, **SIZES)
    assert {name: getattr(found, name) for name in vars(held)} == vars(held)


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast", "checkpointing"),
    [
        ("lora", "float32", None, False),
        # Not bfloat16: a CPU casts what meets a float32 adapter within operations.
        ("lora", "float32", torch.bfloat16, True),
        ("full", "float32", torch.bfloat16, False),
        ("full", "bfloat16", None, True),
    ],
)
def test_a_step_peaks_where_the_allocator_says(folder, kind, dtype, autocast, checkpointing):
    options = ModelOptions(str(folder), dtype=dtype)
    found, real = (adapted(load(options), kind).train() for load in (load_skeleton, load_model))
    for model in (found, real) if checkpointing else ():
        enable_checkpointing_(model)
    found = estimate_memory(found, optim="sgd", autocast=autocast, eval_batch_size=3, **SIZES)
    for parameter in real.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        tokens = torch.zeros(SIZES["batch_size"], SIZES["length"], dtype=torch.long)
        mask = torch.ones_like(tokens)
        mask[0, 0] = 0
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            outputs = real(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False)
        if autocast is not None:
            outputs.logits = outputs.logits.float()  # as Accelerate does
        loss = outputs.loss
        del outputs
        loss.backward()

    step()
    assert found.step == pytest.approx(allocated(step), rel=0.02)
    assert found.evaluation and found.step and found.evaluation < found.step


def allocated(work) -> int:
    """Peak of what PyTorch's allocator gave out during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    recorded: Any = profiled.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_have_the_size_of_bitsandbytes(folder, kind):
    quantise = pytest.importorskip("bitsandbytes.functional")
    in_4bit = kind == "4bit"
    options = ModelOptions(str(folder), load_in_4bit=in_4bit, load_in_8bit=not in_4bit)
    skeleton = load_skeleton(options)
    layer: Any = skeleton.get_submodule("model.layers.0.mlp.up_proj")
    weight = torch.randn(512, 64)
    if in_4bit:
        packed, state = quantise.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        expected = packed.nbytes + state.absmax.nbytes + state.code.nbytes
    else:
        packed, scales, _ = quantise.int8_vectorwise_quant(weight.half())
        expected = packed.nbytes + scales.nbytes
    assert layer.stored_bytes == expected
    found = estimate_memory(adapted(skeleton, "lora"), optim="sgd", **SIZES)
    assert found.step and found.frozen < sum(p.nbytes for p in load_skeleton(
        ModelOptions(str(folder))).parameters())  # fmt: skip


def test_zero_divides_what_its_stage_says(folder):
    model = load_skeleton(ModelOptions(str(folder), dtype="bfloat16"))
    one, ddp, *stages = (
        estimate_memory(model, optim="adamw_torch", devices=devices, zero_stage=stage, **SIZES)
        for devices, stage in ((1, 0), (4, 0), (4, 1), (4, 2), (4, 3))
    )
    count = one.trained_parameters
    assert ddp.buckets == one.gradients == 2 * count and one.buckets == 0
    for stage, found in enumerate(stages, 1):
        # A float32 copy and two float32 moments of each bfloat16 weight.
        assert found.optimizer == pytest.approx(12 * count / 4, rel=1e-3)
        assert found.gradients == 2 * count // (4 if stage >= 2 else 1)
        assert found.trained == 2 * count // (4 if stage >= 3 else 1)
        assert found.step == one.step and found.buckets == 0
        assert found.saved == 2 * count and found.checkpoint == pytest.approx(14 * count, rel=1e-3)
    with pytest.raises(ValueError, match="zero_stage=4"):
        estimate_memory(model, optim="sgd", zero_stage=4, **SIZES)


class Routed(nn.Module):
    """A model whose course depends on its values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, device="meta"))

    def forward(self, input_ids, **kwargs):
        chosen = self.weight[input_ids]
        return {"loss": chosen.sum() if chosen.mean() > 0 else -chosen.sum()}


def test_a_step_that_depends_on_values_is_unknown(caplog):
    found = estimate_memory(Routed(), optim="sgd", **SIZES)
    assert found.step is None and found.total == found.fixed == 2 * 64 * 4
    assert "unknown" in caplog.text
