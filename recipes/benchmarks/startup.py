"""What the command and the library cost before they do anything, against what they cannot avoid.

    python recipes/benchmarks/startup.py [--quick]

CPU seconds of processes of their own, medians of runs taken in turn, one thread:

- `svdinit --help` beside `python -c pass`;
- `from peft_svdinit.linalg import truncated_svd` and `svdinit resize` of a kohya file, both beside
  `import torch`.

Ends with a line `RESULT {json}`: `help_seconds`, and by how much the others are above what stands
beside them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from measuring import options_parser, run_child
from safetensors.torch import save_file

_MAIN = "from peft_svdinit.cli import main; main()"


def make_kohya_file(path: Path) -> None:
    """A LoRA of rank 8 on four small layers, as kohya's scripts name them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(4):
        layer = f"lora_unet_blocks_{index}_attn_to_q"
        tensors[f"{layer}.lora_down.weight"] = torch.randn(8, 64, generator=generator)
        tensors[f"{layer}.lora_up.weight"] = torch.randn(64, 8, generator=generator)
        tensors[f"{layer}.alpha"] = torch.tensor(8.0)
    save_file(tensors, path)


def measured(folder: Path, turns: int) -> dict[str, float]:
    """Median CPU seconds of every process, by name."""
    source, output = folder / "kohya.safetensors", folder / "resized.safetensors"
    make_kohya_file(source)
    resize = ["resize", "--adapter", str(source), "--output", str(output), "--rank", "4"]
    commands = {
        "python": ["pass"],
        "help": [_MAIN, "--help"],
        "torch": ["import torch"],
        "linalg": ["from peft_svdinit.linalg import truncated_svd"],
        "resize": [_MAIN, *resize],
    }
    spent: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(turns + 1):
        for name, command in commands.items():
            seconds, _ = run_child([sys.executable, "-c", *command])
            if turn:  # The first fills the disk's cache and writes byte code.
                spent[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def main() -> None:
    options = options_parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measured(Path(folder), turns=3 if options.quick else 9)
    for name, value in seconds.items():
        print(f"{name:<8} {value:6.2f} CPU s")
    result = {
        "help_seconds": seconds["help"],
        "help_over_python": seconds["help"] - seconds["python"],
        "linalg_over_torch": seconds["linalg"] - seconds["torch"],
        "resize_over_torch": seconds["resize"] - seconds["torch"],
    }
    print(f"RESULT {json.dumps({name: round(value, 3) for name, value in result.items()})}")


if __name__ == "__main__":
    main()
