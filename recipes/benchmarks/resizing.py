"""A LoRA of rank 64 to rank 32: `svdinit resize` against PEFT's conversion, in one run.

    python recipes/benchmarks/resizing.py [--quick]

An adapter of rank 64 on all 210 linear layers of SmolLM2-135M is given random weights and saved.
Timed on one thread, in CPU seconds:

- ours: read, resize, and write adapter and report; the median of the repetitions;
- peft: `convert_to_lora` on the loaded model, which materialises every delta; without reading and
  writing.

`--quick` takes PEFT's conversion of one transformer block in five, times five. The error ratio is
ours over the optimum, from dense float64 SVDs of the layers of one block. The peak memory is that
of the resident set of `svdinit resize` in a process of its own, imports included.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from measuring import cpu_seconds, options_parser, svdinit
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from peft_svdinit.adapters import resize
from peft_svdinit.factors import LoraAdapter, RankRule
from peft_svdinit.training import resolve_model

_RANK, _LOWER_RANK = 64, 32


def make_adapter(folder: Path) -> None:
    """A rank-64 adapter on all linear layers with random weights of a decaying spectrum."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:smollm2-135m"))
    torch.manual_seed(0)
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    decay = 0.01 / torch.arange(1, _RANK + 1).sqrt()
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn_like(parameter) * decay
    adapted.save_pretrained(str(folder))


def ours(folder: Path, output: Path) -> None:
    resize([folder], output, RankRule(rank=_LOWER_RANK))


def load_with_peft(folder: Path, every: int) -> PeftModel:
    """The model with the adapter, in one transformer block of `every` if that is not 1."""
    base = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:smollm2-135m"))
    model = PeftModel.from_pretrained(base, folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and int(name.split("layers.")[1].split(".")[0]) % every:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model


def max_error_ratio(folder: Path, output: Path) -> float:
    """Largest ratio of the error of a layer of the first block to the optimum of its rank."""
    before, after, ratios = LoraAdapter(folder), LoraAdapter(output), []
    for name in after:
        if ".layers.0." in f".{name}":
            deltas = [
                one[name].scaling * one[name].lora_B.double() @ one[name].lora_A.double()
                for one in (before, after)
            ]
            optimum = torch.linalg.svdvals(deltas[0])[_LOWER_RANK:].norm()
            ratios.append(((deltas[0] - deltas[1]).norm() / optimum).item())
    return max(ratios)


def peak_rss_mb(folder: Path, output: Path) -> float:
    """Peak resident memory of the verb in a fresh process."""
    adapters = ("--adapter", str(folder), "--output", str(output))
    return svdinit("resize", *adapters, "--rank", str(_LOWER_RANK))[1]


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, output = Path(name, "adapter"), Path(name, "resized")
        make_adapter(folder)
        mine = cpu_seconds(lambda: ours(folder, output), options.repetitions)
        ratio = max_error_ratio(folder, output)
        peak = peak_rss_mb(folder, Path(name, "again"))
        every = 5 if options.quick else 1
        model = load_with_peft(folder, every)
        theirs = every * cpu_seconds(
            lambda: convert_to_lora(model, rank=_LOWER_RANK, progressbar=False), 1
        )
    rows = [("svdinit resize", mine), ("PEFT convert_to_lora", theirs)]
    print(f"{'rank 64 to 32, 210 layers':<28} CPU seconds   ratio")
    for label, seconds in rows:
        print(f"{label:<28} {seconds:11.2f}   {seconds / mine:5.1f}")
    result = {
        "seconds": round(mine, 3),
        "speedup_over_peft_convert": round(theirs / mine, 1),
        "peak_rss_mb": round(peak, 1),
        "max_error_ratio": round(ratio, 7),
    }
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
