"""Models of very many layers: how time grows with their number, and the memory of a mask.

    python recipes/benchmarks/scale.py [--quick]

Artefacts of 500, 1,000, 2,000 and 4,000 layers of 64 x 64, of rank 4, are made from random numbers.
Timed in this process on one thread, in CPU seconds, the median of the repetitions:

- read: every layer of a factors file;
- export: `svdinit export` of it;
- analyze: `svdinit analyze` of it;
- mask: `svdinit mask` of a LoRI adapter by magnitude.

The growth is the time's ratio per doubling of the layers, fitted to all four sizes (least squares
of the logarithms): 2 is linear, 4 the square. `--quick` repeats less and draws no figures.

The memory of a mask is the peak of the resident set of `svdinit mask`, figures included, of 5,000
layers whose scores take 320 MB, over these. The peak of the same command for ten layers, which is
that of its imports, is taken off.

Ends with a line `RESULT {json}`: `growth_read`, `growth_export`, `growth_analyze`, `growth_mask`,
`mask_memory`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import cpu_seconds, options_parser, run_child

from peft_svdinit.cli import main as svdinit
from peft_svdinit.factors import FactorsFile, FactorsMetadata, LowRankFactors, save_factors
from peft_svdinit.files import TensorWriter, write_json
from peft_svdinit.masks import random_projection

_SIZES = (500, 1000, 2000, 4000)
_SIDE, _RANK, _SEED = 64, 4, 0
_KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# Of the mask whose memory is measured: layers, outputs and rank.
_MANY, _TALL, _WIDE = 5000, 512, 32


def layer_names(count: int) -> list[str]:
    """Names as of a Llama."""
    return [f"model.layers.{i // len(_KINDS)}.{_KINDS[i % len(_KINDS)]}" for i in range(count)]


def make_factors(folder: Path, names: list[str]) -> None:
    """Orthonormal vectors, and descending singular values that hold nine tenths of the energy."""
    generator = torch.Generator().manual_seed(_SEED)
    factors = {}
    for name in names:
        U, Vh = (
            torch.linalg.qr(torch.randn(_SIDE, _RANK, generator=generator)).Q for _ in range(2)
        )
        S = torch.rand(_RANK, generator=generator).sort(descending=True).values
        factors[name] = LowRankFactors(U, S, Vh.mT, float(S.norm()) / math.sqrt(0.9))
    save_factors(folder, factors, FactorsMetadata())


def make_adapter(folder: Path, names: list[str], out: int, rank: int) -> None:
    """A LoRI adapter with a random B."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "svdinit_config.json", {"config_class": "LoriConfig", "lori_seed": _SEED})
    keys = {n: [f"base_model.model.{n}.lora_{part}.weight" for part in "AB"] for n in names}
    shapes = ((rank, _SIDE), (out, rank))
    layout = {
        key: (torch.float32, shape)
        for pair in keys.values()
        for key, shape in zip(pair, shapes, strict=True)
    }
    generator = torch.Generator().manual_seed(_SEED)
    with TensorWriter(folder / "adapter_model.safetensors", layout) as writer:
        for name, (key_A, key_B) in keys.items():
            writer.write(key_A, random_projection(name, rank, _SIDE, _SEED))
            writer.write(key_B, torch.randn(out, rank, generator=generator))


def verb(*arguments: object) -> None:
    """Run a verb here, without what it prints."""
    sys.argv = ["svdinit", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()):
        svdinit()


def read(folder: Path) -> None:
    for _ in FactorsFile(folder).values():
        pass


def jobs(folder: Path, plots: bool) -> dict[str, Callable[[], None]]:
    """What is timed, of the artefacts in a folder."""
    factors, out = folder / "factors", folder / "out"
    drawn = ("--plots", plots)
    return {
        "read": lambda: read(factors),
        "export": lambda: verb(
            *("export", "--factors", factors, "--lora_r", 2, "--output_dir", out / "export")
        ),
        "analyze": lambda: verb(
            *("analyze", "--factors", factors, "--lora_r", 2, "--output_dir", out / "analyze"),
            *drawn,
        ),
        "mask": lambda: verb(
            *("mask", "--source", "magnitude", "--adapter", folder / "adapter"),
            *("--output", out / "mask", *drawn),
        ),
    }


def timed(folder: Path, repetitions: int, plots: bool) -> dict[str, list[float]]:
    """CPU seconds of every job for each size."""
    seconds: dict[str, list[float]] = {}
    for place, size in enumerate(_SIZES):
        here = folder / str(size)
        make_factors(here / "factors", layer_names(size))
        make_adapter(here / "adapter", layer_names(size), _SIDE, _RANK)
        for name, job in jobs(here, plots).items():
            if not place:
                job()  # Imports, and what is made once.
            seconds.setdefault(name, []).append(cpu_seconds(job, repetitions))
    return seconds


def growth(seconds: list[float]) -> float:
    """The ratio per doubling of the layers, fitted to all sizes."""
    logarithms = ([math.log2(x) for x in values] for values in (_SIZES, seconds))
    return 2 ** statistics.linear_regression(*logarithms).slope


def mask_memory(folder: Path) -> float:
    """Peak memory of a mask over the bytes of its scores in float32."""
    peaks = []
    for count in (10, _MANY):
        here = folder / f"memory{count}"
        make_adapter(here / "adapter", layer_names(count), _TALL, _WIDE)
        arguments = ["mask", "--source", "magnitude", "--adapter", str(here / "adapter")]
        run = "from peft_svdinit.cli import main; main()"
        command = [sys.executable, "-c", run, *arguments, "--output", str(here / "mask")]
        peaks.append(run_child(command)[1])
    return (peaks[1] - peaks[0]) * 2**20 / (4 * _MANY * _TALL * _WIDE)


def main() -> None:
    options = options_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        memory = mask_memory(Path(name))
        seconds = timed(Path(name), 1 if options.quick else 5, not options.quick)
    print(f"{'layers':<10}{''.join(f'{size:>10,}' for size in _SIZES)}    growth")
    for job, row in seconds.items():
        print(f"{job:<10}{''.join(f'{value:>8.2f} s' for value in row)}    {growth(row):6.2f}")
    print(f"memory of a mask of {_MANY:,} layers: {memory:.2f} times its scores")
    result = {f"growth_{job}": round(growth(row), 3) for job, row in seconds.items()}
    print(f"RESULT {json.dumps(result | {'mask_memory': round(memory, 3)})}")


if __name__ == "__main__":
    main()
