"""Truncated SVDs: ours against torch, scikit-learn and PEFT, with the error of each.

    python recipes/benchmarks/linalg.py [--quick]

Matrices of known spectra, and of SmolLM2-135M a gradient and the delta of ten AdamW steps. On one
thread, in CPU seconds, the median of the repetitions:

- speedup: time of torch.linalg.svd over ours, for the tolerance asked for;
- error_ratio: our Frobenius error over the optimum, worst of three seeds;
- captured_ratio: our energy over the optimum's, which near-flat spectra judge more sternly;
- gemm_limit_share: time of two products with rank + 8 vectors, which no method of this kind can
  beat, over ours.

Peers in the same run: torch.svd_lowrank as PEFT's `pissa_niter_4` calls it (q = rank, niter=4) and
with eight further columns, and scikit-learn's randomized_svd where it is installed. `--quick`
leaves out what takes long: the model and the 2048 x 2048 matrix.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import cpu_seconds, options_parser
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svdinit.linalg import truncated_svd
from peft_svdinit.training import resolve_model

Triplets = tuple[Tensor, Tensor, Tensor]
Method = Callable[[Tensor, int], Triplets]  # of a matrix and a seed
_TOLERANCES = (1.1, 1.05, 1.01, 1.003)
_LAYER, _STEPS, _LENGTH = 15, 10, 256


@dataclass(frozen=True)
class Case:
    """A matrix and the rank to which it is cut."""

    name: str
    matrix: Tensor
    rank: int


def of_spectrum(rows: int, cols: int, values: Tensor) -> Tensor:
    """A matrix with these singular values and random vectors."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator)).Q
        for side in (rows, cols)
    )
    return (left * values) @ right.mT


def synthetic(quick: bool) -> Iterable[Case]:
    def polynomial(count: int) -> Tensor:
        return torch.arange(1, count + 1).float().reciprocal()

    yield Case("256x256 r26 polynomial", of_spectrum(256, 256, polynomial(256)), 26)
    gaussian = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    yield Case("256x256 r26 Gaussian", gaussian, 26)
    yield Case("576x576 r16 polynomial", of_spectrum(576, 576, polynomial(576)), 16)
    yield Case("5000x256 r26 polynomial", of_spectrum(5000, 256, polynomial(256)), 26)
    yield Case("1000x1000 r100 polynomial", of_spectrum(1000, 1000, polynomial(1000)), 100)
    if not quick:
        yield Case("2048x2048 r64 polynomial", of_spectrum(2048, 2048, polynomial(2048)), 64)


def of_the_model() -> Iterable[Case]:
    """A gradient, and what ten steps of AdamW made of the weights."""
    path = resolve_model("builtin:smollm2-135m")
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    source = "".join(inspect.getsource(module) for module in (textwrap, argparse, inspect))
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(source, return_tensors="pt").input_ids[0]
    batches = ids[: _STEPS * _LENGTH].view(_STEPS, 1, _LENGTH)
    block = f"model.layers.{_LAYER}"
    names = {"q_proj": f"{block}.self_attn.q_proj", "gate_proj": f"{block}.mlp.gate_proj"}
    before = {key: model.get_submodule(name).weight.detach().clone() for key, name in names.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    for step, batch in enumerate(batches):
        model(input_ids=batch, labels=batch).loss.backward()
        if step == 0:
            for key, name in names.items():
                gradient = model.get_submodule(name).weight.grad.clone()
                yield Case(f"gradient {key} r16", gradient, 16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for key, name in names.items():
        delta = model.get_submodule(name).weight.detach() - before[key]
        yield Case(f"delta {key} r16", delta, 16)


def ours(rank: int, tolerance: float) -> Method:
    def method(matrix: Tensor, seed: int) -> Triplets:
        generator = torch.Generator().manual_seed(seed)
        svd = truncated_svd(matrix, rank, tolerance=tolerance, generator=generator)
        return svd.U, svd.S, svd.Vh

    return method


def peers(rank: int) -> dict[str, Method]:
    def lowrank(matrix: Tensor, columns: int, seed: int) -> Triplets:
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=columns, niter=4)
        return U[:, :rank], S[:rank], V[:, :rank].mT

    found: dict[str, Method] = {
        "svd_lowrank, as PEFT calls it": lambda matrix, seed: lowrank(matrix, rank, seed),
        "svd_lowrank, 8 more columns": lambda matrix, seed: lowrank(matrix, rank + 8, seed),
    }
    if importlib.util.find_spec("sklearn"):
        from sklearn.utils.extmath import randomized_svd  # pyright: ignore[reportMissingImports]

        def learned(matrix: Tensor, seed: int) -> Triplets:
            U, S, Vh = randomized_svd(matrix.numpy(), rank, random_state=seed)
            return torch.from_numpy(U.copy()), torch.from_numpy(S), torch.from_numpy(Vh.copy())

        found["scikit-learn randomized_svd"] = learned
    return found


def error_of(matrix: Tensor, triplets: Triplets) -> float:
    U, S, Vh = (part.double() for part in triplets)
    return float(torch.linalg.matrix_norm(matrix.double() - (U * S) @ Vh))


def measure(case: Case, repetitions: int) -> dict[str, dict[str, float]]:
    matrix, rank = case.matrix, case.rank
    slow = 1 if min(matrix.shape) > 1500 else 3
    dense = cpu_seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), slow)
    block = torch.randn(matrix.shape[1], rank + 8)
    products = cpu_seconds(lambda: (matrix @ block).mT @ matrix, repetitions)
    values = torch.linalg.svdvals(matrix.double())
    optimum, energy = float(values[rank:].norm()), float(values[:rank].square().sum())
    whole = float(values.square().sum())
    methods = {f"ours, within {limit:g}": ours(rank, limit) for limit in _TOLERANCES} | peers(rank)
    print(f"\n{case.name}: torch.linalg.svd {dense * 1e3:.1f} ms, limit {dense / products:.0f}x")
    found = {}
    for name, method in methods.items():
        seconds = cpu_seconds(lambda method=method: method(matrix, 0), repetitions)
        error = max(error_of(matrix, method(matrix, seed)) for seed in range(3))
        found[name] = {
            "speedup": round(dense / seconds, 1),
            "error_ratio": round(error / optimum, 4),
            "captured_ratio": round((whole - error**2) / energy, 4),
            "gemm_limit_share": round(products / seconds, 3),
        }
        row = found[name]
        print(
            f"  {name:<30} {row['speedup']:7.1f}x  error {row['error_ratio']:.4f}  captured "
            f"{row['captured_ratio']:.4f}  share of the limit {row['gemm_limit_share']:.2f}",
            flush=True,
        )
    return found


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    cases = list(synthetic(options.quick))
    cases += [] if options.quick else of_the_model()
    for case in cases:
        found = measure(case, options.repetitions)
        result[case.name] = {
            f"{tolerance:g}": found[f"ours, within {tolerance:g}"] for tolerance in _TOLERANCES
        }
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
