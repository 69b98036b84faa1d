"""What an extraction will read, write and need, before it begins."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass

import torch

from ...factors import CheckpointPair, Factorisation, RankRule
from ...linalg import default_block, krylov_multiplications, krylov_passes, truncated_svd
from ...models import LinearModule
from ..dtypes import BYTES
from ..output_folder import OutputFolder
from .extract import AdapterForm, check_targets, whole_of

_FLOAT32 = 4
_PROBE, _PROBE_RANK = 1024, 32
# A process that has imported torch, transformers and PEFT.
_IMPORTS = 500 << 20


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes are counted, memory and time are estimated.

    Attributes:
        layers: linear layers compared, and the parameters that they have.
        read: of both checkpoints, once.
        verifying: what verification reads.
        written: of the adapter at its largest.
        working: of the working folder, gone at the end.
        memory: peak without the models that verify="full" runs.
        model: of one model, which verify="full" loads, one at a time.
        seconds: of the factorisation on this machine, by the rate of a small one; without reading.
        free: on the disk of the output.
    """

    layers: int
    parameters: int
    read: int
    verifying: int
    written: int
    working: int
    memory: int
    model: int
    seconds: float
    free: int

    def as_text(self) -> str:
        """One line for each."""
        verified = f", and {_size(self.model)} for one model at a time" if self.model else ""
        again = f", {_size(self.verifying)} more to verify" if self.verifying else ""
        lines = [
            f"layers     {self.layers} linear layers, {self.parameters:,} parameters",
            f"read       {_size(self.read)}{again}",
            f"written    {_size(self.written)} at most; {_size(self.working)} while it works",
            f"free disk  {_size(self.free)}",
            f"memory     {_size(self.memory)}{verified}",
            f"time       {self.seconds:.0f} s for the SVDs on {torch.get_num_threads()} threads",
        ]
        if self.free < self.written + self.working:
            lines.append("The disk is too small: make room, or choose another output_dir.")
        return "\n".join(lines)


def estimate(
    pair: CheckpointPair,
    rule: RankRule,
    form: AdapterForm,
    output_dir: str | os.PathLike,
    *,
    device: str = "cpu",
    read_ahead: int = 1,
) -> Estimate:
    """Count what `extract_adapter` with these arguments would do; writes nothing.

    Raises:
        ValueError: as `extract_adapter` does before it reads weights.
    """
    folder = OutputFolder.checked(output_dir, "output_dir").path.resolve()
    check_targets(pair)
    modules = list(pair.base.modules.values())
    whole = whole_of(pair, form)
    factors = sum(_rank(rule, m) * (m.out_features + m.in_features) for m in modules)
    kept = min(factors, rule.max_parameters or factors)
    largest = max(modules, key=lambda m: m.out_features * m.in_features)
    delta = _FLOAT32 * largest.out_features * largest.in_features
    block = default_block(_rank(rule, largest))
    passes = krylov_passes(Factorisation.tolerance)
    spaces = 2 * _FLOAT32 * (largest.out_features + largest.in_features) * block * (passes // 2)
    checkpoint = pair.base.checkpoint
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    read = sum(map(pair.stored_bytes, pair))
    model = sum(map(checkpoint.stored_bytes, checkpoint.shapes)) if form.verify == "full" else 0
    return Estimate(
        layers=len(modules),
        parameters=sum(m.out_features * m.in_features for m in modules),
        read=read,
        verifying=0 if form.verify == "none" else read + 2 * model,
        written=BYTES[form.dtype] * kept + whole.stored_bytes(),
        working=_FLOAT32 * factors,
        memory=_IMPORTS + (1 + read_ahead) * delta + spaces,
        model=model,
        seconds=sum(_multiplications(rule, m) for m in modules) / _rate(device),
        free=shutil.disk_usage(existing).free,
    )


def _rank(rule: RankRule, module: LinearModule) -> int:
    sides = (module.out_features, module.in_features)
    return min(*sides, rule.most or min(sides))


def _multiplications(rule: RankRule, module: LinearModule) -> int:
    shape = (module.out_features, module.in_features)
    return krylov_multiplications(shape, _rank(rule, module), Factorisation.tolerance)


def _rate(device: str) -> float:
    """Multiplications per second of a factorisation here."""
    matrix = torch.randn(_PROBE, _PROBE, device=device)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        svd = truncated_svd(matrix, _PROBE_RANK, method="krylov", tolerance=Factorisation.tolerance)
        float(svd.S[0])  # Waits for the device.
        times.append(time.perf_counter() - began)
    return krylov_multiplications(matrix.shape, _PROBE_RANK, Factorisation.tolerance) / min(times)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
