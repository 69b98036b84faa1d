"""What layers of low rank gain and lose: their speed, a training step, the loss, the disk.

    python recipes/benchmarks/low_rank_layers.py [--quick]

On one thread, in float32 and CPU seconds. Works that are compared by time take turns in this
process, in reversed order every other turn; a ratio is the median over the turns.

- Layers: forward and backward, the gradient of the input included, of `LowRankLinear` beside
  nn.Linear (speed-up) and beside two plain matmuls `(x @ Vh.mT) @ U.mT` of the same factors (share
  of their speed: 1 is no overhead), and once with D and S trained. Ranks are ratio * min(in, out),
  rounded down to multiples of 8; FLOPs is in * out / (rank * (in + out)), the limit.
- A step: forward, backward, clipping and AdamW of a Llama of six blocks, dense and switched at
  ratios 0.10 (attention) and 0.15 (feed-forward), on 512 tokens. Arithmetic predicts the dense step
  less, for each switched layer, what nn.Linear takes over two plain matmuls, each measured alone in
  the same turns, and less the clipping and AdamW of the parameters saved.
- The loss: SmolLM2-135M on the source of a module of Python, before and right after factorising, no
  step trained in between: by plain SVD, by rows of their own size (`row_normalise="norms"`) and by
  outputs, on four batches of 2 x 256 tokens of another module. Errors are the layers' mean
  ‖W - UV‖ / ‖W‖, the seconds those of `factorize_`. At 0.50 the square layers stay dense, for low
  rank is not cheaper there.
- The disk: what `save_pretrained` of the switched SmolLM2 writes.

`--quick` takes two shapes, switches 6 of SmolLM2's 30 blocks and takes one ratio for the loss.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measuring import options_parser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_svdinit.low_rank import (
    PLAN_NAME,
    LowRankLinear,
    LowRankPlan,
    LowRankRule,
    factorize_,
    make_plan,
)
from peft_svdinit.training import resolve_model

DEFAULT = {"attention": 0.10, "feed_forward": 0.15}
# (out, in)
ASKED, ASKED_TOKENS = (1024, 4096), 2048
SHAPES = ((576, 576), (576, 1536), (1024, 1024), ASKED, (2048, 2048))
RATIOS = (0.10, 0.15, 0.25, 0.50)
_MODEL = "builtin:smollm2-135m"
_FIRST_BLOCKS = r"model\.layers\.[0-5]\..*"
_STEP_TOKENS, _LENGTH = 512, 256

Seconds = Mapping[str, Sequence[float]]
Batch = dict[str, Tensor]


def take_turns(works: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of each work in each turn, after one that warms up."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + turns):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            began = time.process_time()
            works[name]()
            spent[name].append(time.process_time() - began)
    return {name: seconds[1:] for name, seconds in spent.items()}


def ratio(spent: Seconds, over: str, under: str) -> float:
    pairs = zip(spent[over], spent[under], strict=True)
    return statistics.median(above / below for above, below in pairs)


def rank_of(shape: tuple[int, int], share: float) -> int:
    return int(share * min(shape)) // 8 * 8


def layer_works(
    shape: tuple[int, int], ranks: Mapping[str, int], tokens: int, *, norms: bool = False
) -> dict[str, Callable[[], object]]:
    """Forward and backward: "dense", and per name in `ranks` "ours", "plain" and "norms"."""
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = randn(tokens, cols).requires_grad_()
    gradient = randn(tokens, rows)

    def of_layer(layer: nn.Module) -> Callable[[], object]:
        leaves = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), leaves, gradient)

    def of_matmuls(U: Tensor, Vh: Tensor) -> Callable[[], object]:
        leaves = [x, U.requires_grad_(), Vh.requires_grad_()]
        return lambda: torch.autograd.grad((x @ Vh.mT) @ U.mT, leaves, gradient)

    works = {"dense": of_layer(nn.Linear(cols, rows, bias=False))}
    for name, rank in ranks.items():
        U, Vh = randn(rows, rank) / rank**0.5, randn(rank, cols) / cols**0.5
        works[f"ours {name}"] = of_layer(LowRankLinear(U, Vh))
        works[f"plain {name}"] = of_matmuls(U, Vh)
        if norms:
            D, S = torch.ones(rows), torch.ones(rank)
            works[f"norms {name}"] = of_layer(LowRankLinear(U, Vh, row_norm=D, sv_norm=S))
    return works


def compare_layers(quick: bool) -> dict[str, float]:
    """Print the table of shapes; the figures of the one that is asked for."""
    turns = 7
    cases = [(shape, tokens) for shape in SHAPES for tokens in (256, 2048)]
    if quick:
        cases = [((576, 576), 256), (ASKED, ASKED_TOKENS)]
    result: dict[str, float] = {}
    print(
        f"{'out x in':>11} {'tokens':>6} {'ratio':>5} {'rank':>5} {'FLOPs':>6} "
        f"{'nn.Linear ms':>12} {'ours ms':>9} {'speed-up':>8} {'share of two matmuls':>20} "
        f"{'speed-up, norms':>15}"
    )
    for shape, tokens in cases:
        asked = (shape, tokens) == (ASKED, ASKED_TOKENS)
        shares = RATIOS[:1] if quick else RATIOS
        ranks = {f"{share:.2f}": rank_of(shape, share) for share in shares}
        repeated = 3 * turns if asked and not quick else turns
        spent = take_turns(layer_works(shape, ranks, tokens, norms=asked), repeated)
        for name, rank in ranks.items():
            ours = f"ours {name}"
            speedup, share = ratio(spent, "dense", ours), ratio(spent, f"plain {name}", ours)
            flops = shape[0] * shape[1] / (rank * sum(shape))
            trained = f"{ratio(spent, 'dense', f'norms {name}'):15.2f}" if asked else ""
            print(
                f"{shape[0]:>5} x {shape[1]:>3} {tokens:>6} {name:>5} {rank:>5} {flops:>6.2f} "
                f"{1e3 * statistics.median(spent['dense']):>12.2f} "
                f"{1e3 * statistics.median(spent[ours]):>9.2f} {speedup:>8.2f} {share:>20.3f} "
                f"{trained}".rstrip(),
                flush=True,
            )
            if asked and name == "0.10":
                result = {
                    "speedup_1024x4096_r10": round(speedup, 3),
                    "share_of_two_matmuls": round(share, 3),
                    "speedup_with_norms": round(ratio(spent, "dense", f"norms {name}"), 3),
                    "layer_turns": repeated,
                }
    return result


class Training:
    """A model and its optimizer, and the seconds of its steps."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.batch = model.train(), batch
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.update_seconds: list[float] = []

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        began = time.process_time()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.update_seconds.append(time.process_time() - began)
        self.optimizer.zero_grad()

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def compare_steps(quick: bool) -> dict[str, float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    rows = torch.randint(1024, (1, _STEP_TOKENS))
    batch = {"input_ids": rows, "labels": rows}
    switched = copy.deepcopy(model)
    plan = make_plan(switched, LowRankRule(ratio=DEFAULT))
    factorize_(switched, plan)
    dense, low = Training(model, batch), Training(switched, batch)
    counts: dict[tuple[tuple[int, int], int], int] = {}
    for layer in plan.layers.values():
        counts[layer.shape, layer.rank] = counts.get((layer.shape, layer.rank), 0) + 1
    works: dict[str, Callable[[], object]] = {"step": dense.step, "switched step": low.step}
    for shape, rank in counts:
        alone = layer_works(shape, {str(rank): rank}, _STEP_TOKENS)
        works[f"dense {shape} {rank}"] = alone["dense"]
        works[f"plain {shape} {rank}"] = alone[f"plain {rank}"]
    turns = 7 if quick else 21
    spent = take_turns(works, turns)
    saved = (dense.parameters - low.parameters) / dense.parameters
    predicted, updates = [], dense.update_seconds[1:]
    for turn in range(turns):
        layers = sum(
            count
            * (spent[f"dense {key[0]} {key[1]}"][turn] - spent[f"plain {key[0]} {key[1]}"][turn])
            for key, count in counts.items()
        )
        predicted.append(spent["step"][turn] - layers - saved * updates[turn])
    spent["predicted"] = predicted
    over, speedup = (
        ratio(spent, "switched step", "predicted"),
        ratio(spent, "step", "switched step"),
    )
    print(f"\na step on {_STEP_TOKENS} tokens: {plan.summary()}")
    print(f"{'':<28} {'CPU ms':>9} {'clipping and AdamW':>19} {'parameters':>12}")
    for name, key, training in (("dense", "step", dense), ("switched", "switched step", low)):
        print(
            f"{name:<28} {1e3 * statistics.median(spent[key]):>9.1f} "
            f"{1e3 * statistics.median(training.update_seconds[1:]):>19.1f} "
            f"{training.parameters:>12,}"
        )
    print(f"{'switched, by arithmetic':<28} {1e3 * statistics.median(predicted):>9.1f}")
    print(f"speed-up {speedup:.2f}, measured over arithmetic {over:.3f}", flush=True)
    return {
        "step_speedup": round(speedup, 3),
        "step_over_arithmetic": round(over, 3),
        "step_turns": turns,
    }


def plan_for(model: Any, chosen: Any, quick: bool) -> LowRankPlan:
    targets = _FIRST_BLOCKS if quick else "all-linear"
    return make_plan(model, LowRankRule(ratio=chosen, target_modules=targets))


def rows_of(module: ModuleType, count: int) -> Tensor:
    """The beginning of a module's source as `count` rows of tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model(_MODEL))
    ids = tokenizer(inspect.getsource(module), return_tensors="pt").input_ids[0]
    return ids[: count * _LENGTH].view(count, _LENGTH)


@torch.no_grad()
def loss_of(model: Any, rows: Tensor) -> float:
    losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(2)]
    return statistics.mean(losses)


def compare_losses(base: Any, quick: bool) -> dict[str, float]:
    held_out = rows_of(statistics, 4 if quick else 16)
    batches = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        for rows in rows_of(argparse, 8).split(2)
    ]
    ratios: dict[str, Any] = {"default": DEFAULT, "25": 0.25, "50": 0.50}
    if quick:
        ratios = {"25": 0.25}
    ways: dict[str, dict[str, Any]] = {
        "svd": {},
        "norms": {"row_normalise": "norms"},
        "outputs": {"batches": batches},
    }
    before = loss_of(base, held_out)
    result = {"loss_dense": round(before, 4)}
    print(f"\nSmolLM2-135M, loss {before:.4f} before")
    print(f"{'ratio':<8} {'layers':>6} {'way':<8} {'loss':>8} {'mean error':>10} {'CPU s':>7}")
    for label, chosen in ratios.items():
        plan = plan_for(base, chosen, quick)
        for way, options in ways.items():
            model = copy.deepcopy(base)
            began = time.process_time()
            switched = factorize_(model, plan, **options)
            seconds = time.process_time() - began
            error = statistics.mean(each.error for each in switched)
            loss = loss_of(model, held_out)
            print(
                f"{label:<8} {len(switched):>6} {way:<8} {loss:>8.4f} {error:>10.4f} "
                f"{seconds:>7.2f}",
                flush=True,
            )
            result[f"loss_{way}_{label}"] = round(loss, 4)
            result[f"seconds_{way}_{label}"] = round(seconds, 2)
    return result


def compare_files(base: Any, quick: bool) -> dict[str, int]:
    """Switch the model, and print the bytes of what it saves."""
    plan = plan_for(base, DEFAULT, quick)
    factorize_(base, plan)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder)
        record = json.loads((folder / PLAN_NAME).read_text())
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    print(f"\non the disk: {plan.summary()}")
    for file, size in sorted(sizes.items()):
        print(f"{file:<28} {size:>13,} bytes")
    found = {key: record[key] for key in ("dense_bytes", "factor_bytes")}
    print(
        f"switched layers: dense {found['dense_bytes']:,}, factors {found['factor_bytes']:,} bytes"
    )
    return {
        "dense_file_bytes": sizes["model.safetensors"],
        "factor_file_bytes": sizes["low_rank.safetensors"],
        **found,
    }


def main() -> None:
    quick: bool = options_parser(__doc__).parse_args().quick
    torch.set_num_threads(1)
    result: dict[str, float] = compare_layers(quick)
    result |= compare_steps(quick)
    base: Any = AutoModelForCausalLM.from_pretrained(resolve_model(_MODEL), dtype=torch.float32)
    result |= compare_losses(base.eval(), quick)
    result |= compare_files(base, quick)
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
