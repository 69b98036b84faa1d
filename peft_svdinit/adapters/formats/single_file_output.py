"""Writing an adapter file in the key style of another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import TensorWriter, publishing, write_json
from ..carried import Carried
from ..rounding import Factors
from . import diffusers, kohya
from .key_styles import ALPHA
from .stored import StoredAdapter


def write_single_file(
    adapter: StoredAdapter,
    output: Path,
    weights: Mapping[str, Factors],
    kernels: Mapping[str, tuple[int, ...]],
    carried: Carried,
    report: Mapping[str, Any],
) -> None:
    """Write (lora_A, lora_B) by layer, of scaling 1, in the style of `adapter`, and the report.

    What is `carried` lies beside them under the names that it had.

    The factors of convolutions get their kernel back. A LoHa, or a LoKr with a factored w2, of a
    convolution stores no kernel: its LoRA is written as matrices, which ComfyUI reshapes and
    sd-scripts refuses.
    """
    style = adapter.style
    if style is None:
        raise TypeError("adapter must be a single file, got a PEFT folder")
    tensors: dict[str, Tensor] = {}
    for name, (lora_A, lora_B) in weights.items():
        kernel, rank = kernels[name], lora_A.shape[0]
        ones = [1] * len(kernel)
        tensors[f"{name}{style.down}"] = lora_A.reshape(rank, -1, *kernel)
        tensors[f"{name}{style.up}"] = lora_B.reshape(-1, rank, *ones)
        if style.alpha_per_layer:
            tensors[f"{name}.{ALPHA}"] = lora_A.new_tensor(float(rank))
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    metadata = {"format": "pt", **_metadata(adapter, weights, carried)}
    with publishing(output.parent) as folder:
        with TensorWriter(folder / output.name, {**layout, **carried.layout}, metadata) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
            for key in carried.layout:
                writer.write(key, carried.tensor(key))
        write_json(folder / report_path(output).name, report)


def _metadata(
    adapter: StoredAdapter, weights: Mapping[str, Factors], carried: Carried
) -> dict[str, str]:
    if adapter.style is not kohya.STYLE:
        return diffusers.metadata_after(adapter.file.metadata)
    ranks = [lora_A.shape[0] for lora_A, _ in weights.values()]
    # Layers that are kept have ranks of their own, or none.
    different = [-1] if carried.layers_kept else []
    alone = not (carried.names("difference") or carried.names("magnitude") or different)
    return kohya.metadata_after(adapter.file.metadata, [*ranks, *different], lora_alone=alone)


def report_path(output: Path) -> Path:
    """Where the report of a single file lies."""
    return output.with_name(f"{output.stem}.resize.json")
