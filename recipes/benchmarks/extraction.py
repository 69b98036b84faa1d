"""An adapter out of a full fine-tune: streamed extraction against an SVD of every matrix.

    python recipes/benchmarks/extraction.py [--quick] [--layers 6] [--mergekit_python PATH]
    python recipes/benchmarks/extraction.py --llama_8b      # 30 GiB of disk, ours alone

A pair of Llama checkpoints, 2048 wide, in sharded bfloat16, is written: random weights, and a delta
whose singular values are 1/j. On one thread, in CPU seconds with the time
of the imports taken off:

- ours: `svdinit extract --rank 32`, without and with the check of every layer;
- svd loop: torch.linalg.svd of every delta, by one of each shape times their number;
- mergekit: `mergekit-extract-lora`, if `--mergekit_python` names a Python that has it.

The error ratio is that of the worst layer over its optimum, by the eigenvalues of its Gram matrix
in float64. Peak memory is the resident set of a fresh process. `--quick` takes two layers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measuring import cpu_seconds, options_parser, run_child, svdinit
from torch import Tensor
from transformers import LlamaConfig

from peft_svdinit.factors import CheckpointPair
from peft_svdinit.files import TensorWriter
from peft_svdinit.linalg import gram_matrix

_RANK = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and how many singular values its delta has."""

    width: int = 2048
    inner: int = 8192
    kv_width: int = 2048
    vocabulary: int = 256
    terms: int = 2048

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of a block."""
        return {
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (self.kv_width, self.width),
            "self_attn.v_proj": (self.kv_width, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.inner, self.width),
            "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
        }


def make_pair(folder: Path, layers: int, shape_of: Shape) -> None:
    """Write `base` and `tuned`, a shard for each layer."""
    width, vocabulary = shape_of.width, shape_of.vocabulary
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=shape_of.inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=shape_of.kv_width // 128,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)
    sides = {side for shape in shape_of.linears.values() for side in shape}
    bases = {side: _orthonormal(side, shape_of.terms, generator) for side in sorted(sides)}
    ends = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    ends["lm_head.weight"] = (vocabulary, width)
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
    index: dict[str, str] = {}
    for layer in range(layers + 1):
        shapes: dict[str, tuple[int, ...]] = dict(ends)
        if layer < layers:
            prefix = f"model.layers.{layer}"
            shapes = {f"{prefix}.{name}.weight": shape for name, shape in shape_of.linears.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (width,)
        file = f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors"
        index |= dict.fromkeys(shapes, file)
        layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        with (
            TensorWriter(folder / "base" / file, layout, {"format": "pt"}) as base,
            TensorWriter(folder / "tuned" / file, layout, {"format": "pt"}) as tuned,
        ):
            for name, shape in shapes.items():
                weight = 0.02 * torch.randn(shape, generator=generator)
                delta = _delta(bases, shape, generator) if "proj" in name else 0.0
                base.write(name, weight.bfloat16())
                tuned.write(name, (weight + delta).bfloat16())
    for name in ("base", "tuned"):
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        (folder / name / "model.safetensors.index.json").write_text(text)


def _orthonormal(side: int, terms: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(side, min(side, terms), generator=generator)).Q


def _delta(bases: dict[int, Tensor], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Singular values 1/j, and vectors that are permuted and signed from layer to layer."""
    count = min(bases[side].shape[1] for side in shape)
    values = torch.arange(1, count + 1).float().reciprocal()
    left, right = (
        bases[side][torch.randperm(side, generator=generator), :count]
        * (1 - 2 * torch.randint(0, 2, (side, 1), generator=generator))
        for side in shape
    )
    return (left * values) @ right.mT


def ours(folder: Path, verify: str) -> tuple[float, float]:
    """CPU seconds without imports, and peak MiB."""
    options = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
    options += ["--output_dir", str(folder / f"ours-{verify}"), "--rank", str(_RANK)]
    return svdinit("extract", *options, "--verify", verify)


def mergekit(python: str, folder: Path) -> float:
    """CPU seconds of mergekit's extractor without its imports."""
    module = "mergekit.scripts.extract_lora"
    imports, _ = run_child([python, "-c", f"import {module}"])
    command = [python, "-c", f"from {module} import main; main()"]
    command += ["--model", str(folder / "tuned"), "--base-model", str(folder / "base")]
    command += ["--out-path", str(folder / "mergekit"), "--max-rank", str(_RANK)]
    # Offline it fails on its model card, after the weights.
    seconds, _ = run_child(command, check=False)
    if not (folder / "mergekit" / "adapter_model.safetensors").is_file():
        raise RuntimeError("mergekit wrote no adapter; run its command by hand to see why")
    return seconds - imports


def svd_loop(pair: CheckpointPair) -> float:
    """CPU seconds of a full SVD of every delta, one of each shape measured."""
    counts = Counter(pair.base.stored_shape(name) for name in pair)
    total = 0.0
    for shape, count in counts.items():
        name = next(name for name in pair if pair.base.stored_shape(name) == shape)
        delta = pair[name]
        total += count * cpu_seconds(partial(torch.linalg.svd, delta, full_matrices=False), 1)
    return total


def largest_error_ratio(pair: CheckpointPair, folder: Path, every: int) -> float:
    """Of the reported error over that of the best approximation, over one layer in `every`."""
    layers = json.loads((folder / "extraction.json").read_text())["layers"]
    worst = 0.0
    for name in list(pair)[::every]:
        delta = pair[name]
        tall = delta if delta.shape[0] >= delta.shape[1] else delta.mT
        discarded = torch.linalg.eigvalsh(gram_matrix(tall))[:-_RANK].clamp_min(0).sum().item()
        error = layers[name]["relative_error"] * layers[name]["norm"]
        worst = max(worst, error / math.sqrt(discarded))
    return worst


def compare(folder: Path, layers: int, options: argparse.Namespace) -> None:
    """Ours against the others."""
    make_pair(folder, layers, Shape())
    pair = CheckpointPair(folder / "base", folder / "tuned")
    seconds, peak = ours(folder, "none")
    verified, verified_peak = ours(folder, "layers")
    _, torch_alone = run_child([sys.executable, "-c", "import torch"])
    rows = [("ours", seconds, peak), ("ours, every layer verified", verified, verified_peak)]
    loop = svd_loop(pair)
    rows.append(("SVD of every delta", loop, float("nan")))
    largest = max(math.prod(pair.base.stored_shape(name)) for name in pair)
    every = 7 if options.quick else 1
    result = {
        "speedup_over_svd_loop": round(loop / seconds, 1),
        "peak_rss_mb": round(peak, 1),
        "torch_rss_mb": round(torch_alone, 1),
        "largest_tensor_mb": round(4 * largest / 2**20, 1),
        "max_error_ratio": round(largest_error_ratio(pair, folder / "ours-none", every), 5),
    }
    if options.mergekit_python:
        theirs = mergekit(options.mergekit_python, folder)
        rows.append(("mergekit-extract-lora", theirs, float("nan")))
        result["speedup_over_mergekit"] = round(theirs / seconds, 1)
    print(f"{layers} layers, {len(pair)} matrices; {'':<7} CPU seconds   ratio  peak MiB")
    for label, spent, memory in rows:
        print(f"{label:<34} {spent:11.2f}  {spent / seconds:6.1f}  {memory:8.0f}")
    print(f"RESULT {json.dumps(result)}")


def llama_8b(folder: Path) -> None:
    """Ours alone, on the shapes of Llama-3-8B."""
    shape = Shape(width=4096, inner=14336, kv_width=1024, vocabulary=128_256, terms=256)
    make_pair(folder, 32, shape)
    read = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    began = time.perf_counter()
    seconds, peak = ours(folder, "none")
    wall = time.perf_counter() - began
    result = {
        "cpu_seconds": round(seconds, 1),
        "wall_seconds": round(wall, 1),
        "checkpoints_gb": round(read / 1e9, 2),
        "peak_rss_mb": round(peak, 1),
        "largest_tensor_mb": round(4 * shape.width * shape.inner / 2**20, 1),
    }
    print(f"RESULT {json.dumps(result)}")


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mergekit_python", default=None, help="a Python that has mergekit")
    parser.add_argument("--llama_8b", action="store_true", help="the shapes of Llama-3-8B")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; temporary if not")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.llama_8b:
            llama_8b(Path(name))
        else:
            compare(Path(name), 2 if options.quick else options.layers, options)


if __name__ == "__main__":
    main()
