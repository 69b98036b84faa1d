"""Factors and analysis of every layer of a LoRA: our QR core against dense SVDs, in one run.

    python recipes/benchmarks/lora_factors.py [--quick]

An adapter of rank 16 on all 210 linear layers of SmolLM2-135M is given random weights and saved.
Timed on one thread, in CPU seconds, ours as the median of the repetitions:

- ours: read the adapter, SVD of every layer, analysis at rank 8;
- dense: torch.linalg.svd of the dense delta of every layer;
- peft: `convert_to_lora` itself, on the loaded model, to rank 8.

`--quick` leaves PEFT's own out and takes the dense SVD of one transformer block in five. The extra
memory is the peak of the resident set over the time before, in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import cpu_seconds, options_parser
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from transformers import AutoModelForCausalLM

from peft_svdinit.analysis import analyze
from peft_svdinit.factors import LoraAdapter, factors_of_adapter
from peft_svdinit.training import resolve_model

_RANK, _LOWER_RANK = 16, 8


def make_adapter(folder: Path) -> None:
    """A rank-16 adapter on all linear layers with random, trained-looking weights."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:smollm2-135m"))
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=_RANK, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(folder))


def ours(folder: Path) -> None:
    analyze(factors_of_adapter(LoraAdapter(folder)).factors, _LOWER_RANK)


def dense_svd(folder: Path, every: int) -> None:
    for name, product in LoraAdapter(folder).items():
        if int(name.split(".")[2]) % every == 0:
            torch.linalg.svd(product.lora_B @ product.lora_A * product.scaling, full_matrices=False)


def peak_extra_mb(folder: Path) -> float:
    """Peak resident memory of `ours` above what the imports hold, in a process of its own."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\nfrom lora_factors import ours\n"
        "from peft_svdinit.training.memory import peak_memory_mb, reset_peak_memory\n"
        "torch.linalg.svd(torch.randn(64, 64)); device = torch.device('cpu')\n"
        "reset_peak_memory(device); before = peak_memory_mb(device)\n"
        "ours(Path(sys.argv[2])); print(peak_memory_mb(device) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_adapter(folder)
        mine = cpu_seconds(lambda: ours(folder), options.repetitions)
        every = 5 if options.quick else 1
        dense = every * cpu_seconds(lambda: dense_svd(folder, every), 1)
        rows = [("ours", mine), ("dense SVD of every delta", dense)]
        result = {
            "seconds": round(mine, 3),
            "speedup_over_dense_svd": round(dense / mine, 1),
            "peak_extra_mb": round(peak_extra_mb(folder), 1),
        }
        if not options.quick:
            base = AutoModelForCausalLM.from_pretrained(resolve_model("builtin:smollm2-135m"))
            model = PeftModel.from_pretrained(base, folder)
            theirs = cpu_seconds(
                lambda: convert_to_lora(model, rank=_LOWER_RANK, progressbar=False), 1
            )
            rows.append(("PEFT convert_to_lora", theirs))
            result["speedup_over_peft_convert"] = round(theirs / mine, 1)
    print(f"{'':<28} CPU seconds   ratio")
    for label, seconds in rows:
        print(f"{label:<28} {seconds:11.2f}   {seconds / mine:5.1f}")
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
