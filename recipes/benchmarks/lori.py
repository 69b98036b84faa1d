"""What a LoRI adapter costs beside a LoRA of the same rank: parameters, state, file and steps.

    python recipes/benchmarks/lori.py [--quick]

SmolLM2-135M, rank 32 on all linear layers, density 0.1. Sizes are those of the tensors after one
step of AdamW, and of the files written: the compact one (mask bits, bfloat16 values, seed) against
a LoRA saved in bfloat16. Steps (forward, backward, clipping, AdamW) of 4 x 128 tokens take turns in
this process on one thread, timed in CPU seconds; a ratio is the median over the turns. Beside ours:

- lora: PEFT's LoRA, A and B trained;
- dense_masked: the way of the LoRI reference implementation: A frozen, B dense with its gradient
  multiplied by a mask that is held as float32; with one AdamW over all layers, which favours it
  (the reference runs one optimizer per matrix).

The figures for Llama-3-8B come from its shapes. `--quick` takes 6 of 30 blocks and three turns.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring import options_parser
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svdinit import LoriConfig
from peft_svdinit.adapters import compact_adapter_folder
from peft_svdinit.masks import Selection, random_scores, select
from peft_svdinit.training import resolve_model

RANK, DENSITY = 32, 0.1
_MODEL = "builtin:smollm2-135m"
# (in, out) of the linear layers of a block, and the number of blocks.
_LLAMA_3_8B = (
    [
        (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096),
        (4096, 14336), (4096, 14336), (14336, 4096),
    ],
    32,
)  # fmt: skip


@dataclass
class Method:
    """A model with its adapter and its optimizer, and the seconds of its steps."""

    model: Any
    masks: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)

    def step(self, batch: dict[str, Tensor]) -> None:
        began = time.process_time()
        self.model(**batch).loss.backward()
        for parameter, mask in zip(self.trained, self.masks, strict=False):
            assert parameter.grad is not None
            parameter.grad *= mask
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.seconds.append(time.process_time() - began)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def gradient_bytes(self) -> int:
        return sum(p.grad.nbytes for p in self.trained if p.grad is not None)

    @property
    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(part.nbytes for state in states for part in state.values())


def adapted(config: LoraConfig, blocks: int | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(resolve_model(_MODEL), dtype=torch.float32)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def make_methods(blocks: int | None) -> dict[str, Method]:
    options: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    dense = adapted(LoriConfig(**options, lori_density=1.0), blocks)
    shapes = {
        name: (parameter.shape[0], parameter.shape[1])
        for name, parameter in dense.named_parameters()
        if parameter.requires_grad
    }
    masks = select(random_scores(shapes, 0), Selection(DENSITY))
    return {
        "lora": Method(adapted(LoraConfig(**options), blocks)),
        "lori": Method(adapted(LoriConfig(**options, lori_density=DENSITY), blocks)),
        "dense_masked": Method(dense, [masks[name].float() for name in shapes]),
    }


def make_batch() -> dict[str, Tensor]:
    ids = AutoTokenizer.from_pretrained(resolve_model(_MODEL))(inspect.getsource(argparse))
    rows = torch.tensor(ids["input_ids"][: 4 * 128]).view(4, 128)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}


def file_sizes(methods: dict[str, Method]) -> tuple[int, int]:
    """Bytes of the compact LoRI adapter, and of the LoRA in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        methods["lori"].model.save_pretrained(str(saved))
        compact = compact_adapter_folder(saved, folder)
        lora = Path(folder) / "lora.safetensors"
        tensors = {
            name: parameter.detach().bfloat16()
            for name, parameter in methods["lora"].model.named_parameters()
            if parameter.requires_grad
        }
        save_file(tensors, lora)
        return compact.stat().st_size, lora.stat().st_size


def llama_figures() -> str:
    layers, blocks = _LLAMA_3_8B
    lora_A = RANK * blocks * sum(inputs for inputs, _ in layers)
    lora_B = RANK * blocks * sum(outputs for _, outputs in layers)
    trained = int(DENSITY * lora_B + 0.5)
    lora, compact = lora_A + lora_B, lora_B // 8 + 2 * trained
    return (
        f"Llama-3-8B, rank {RANK}: LoRA trains {lora:,}, LoRI {trained:,} ({trained / lora:.2%}); "
        f"Adam's state in float32 {8 * lora / 1e6:.1f} and {8 * trained / 1e6:.1f} MB; file in "
        f"bfloat16 {2 * lora / 1e6:.1f} MB, compact {compact / 1e6:.1f} MB "
        f"({compact / (2 * lora):.2%}) and its header."
    )


def main() -> None:
    options = options_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    methods, batch = make_methods(6 if options.quick else None), make_batch()
    for _ in range(1 + (3 if options.quick else 9)):
        for method in methods.values():
            method.step(batch)
            method.optimizer.zero_grad()
    lora, lori, dense = (methods[name] for name in ("lora", "lori", "dense_masked"))
    for method in methods.values():  # The gradients that a step leaves behind, for their sizes.
        method.model(**batch).loss.backward()
    compact, stock = file_sizes(methods)

    def ratio(other: Method) -> float:
        pairs = zip(lori.seconds[1:], other.seconds[1:], strict=True)  # The first ones warm up.
        return statistics.median(ours / theirs for ours, theirs in pairs)

    print(f"{'':<14} {'trained':>12} {'gradients':>12} {'Adam state':>12} {'CPU s/step':>11}")
    for name, method in methods.items():
        print(
            f"{name:<14} {method.parameters:>12,} {method.gradient_bytes:>12,} "
            f"{method.state_bytes:>12,} {statistics.median(method.seconds[1:]):>11.3f}"
        )
    print(f"adapter file: compact {compact:,} bytes, LoRA in bfloat16 {stock:,} bytes")
    print(llama_figures())
    result = {
        "trained_share": round(lori.parameters / lora.parameters, 5),
        "gradient_share": round(lori.gradient_bytes / lora.gradient_bytes, 5),
        "state_share": round(lori.state_bytes / lora.state_bytes, 5),
        "file_share": round(compact / stock, 5),
        "step_ratio_to_lora": round(ratio(lora), 3),
        "step_ratio_to_dense_masked": round(ratio(dense), 3),
        "turns": len(lori.seconds) - 1,
    }
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
