"""How much of a base that ZeRO-3 has split is whole at a time while an adapter starts on it.

    python recipes/benchmarks/zero3_start.py [--quick]

Starts itself in two processes on the CPU (DeepSpeed is needed: DS_ACCELERATOR=cpu pip install
deepspeed). The base is a random Llama, loaded under `deepspeed.zero.Init` by `from_pretrained`:
8 blocks with `--quick`, else 16, with untied embeddings of a small vocabulary and with tied ones of
a vocabulary that makes them the largest weight. The starts: a factors file, the weights, gradients
and activations of two batches, and the checks of the base.

Every all-gather of torch.distributed is watched, whoever calls it: counted as whole are the bytes
that gathers filled and that are still held by anything (views that autograd keeps among them), or
those of all parameters that say that they are available, if these are more.

Ends with a line `RESULT {json}`: `peak_over_one_layer` is the most of these bytes over those of the
model's largest weight, the worst of all starts (target: at most 1.5); `all_over_one_layer` is what
gathering the whole model would be.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import options_parser
from peft import get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_svdinit import (
    FactorsMetadata,
    SvdLoraConfig,
    activation_factors,
    base_samples,
    gradient_factors,
    save_factors,
    weight_factors,
)

_FOLDER = "PEFT_SVDINIT_ZERO3_START"
_RANK = 8
_BASES = {"untied": {"vocab_size": 256}, "tied": {"vocab_size": 2048, "tie_word_embeddings": True}}
_MOMENT = 0.01
# Where torch's collectives put what they gather.
_GATHERS = ("all_gather_into_tensor", "all_gather_single", "_all_gather_base", "all_gather")


class Watch:
    """The bytes that are whole, looked at whenever something is gathered while there is a model."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        # from_pretrained splits models as long as this is referred to.
        self.alive: HfDeepSpeedConfig | None = None
        self.peak = 0
        self.gathers = 0
        self._filled: dict[int, tuple[StorageWeakRef, int]] = {}
        for name in _GATHERS:
            if hasattr(dist, name):
                setattr(dist, name, self._watched(getattr(dist, name)))

    def begin(self, model: nn.Module) -> None:
        self.model, self.peak, self.gathers = model, 0, 0
        self._filled.clear()

    def _watched(self, gather: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.model is None:
                return gather(*args, **kwargs)
            # What is filled comes first, by position or by name.
            output = next(iter((*args, *kwargs.values())))
            for tensor in [output] if isinstance(output, Tensor) else output:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._filled[reference.cdata] = (reference, storage.nbytes())
            self.gathers += 1
            self.peak = max(self.peak, self._whole())
            return gather(*args, **kwargs)

        return watched

    def _whole(self) -> int:
        # A thread of gloo's lets go of what it filled a little later than it says it is done.
        time.sleep(_MOMENT)
        self._filled = {key: held for key, held in self._filled.items() if not held[0].expired()}
        assert self.model is not None
        parameters = self.model.parameters()
        available = sum(each.nbytes for each in parameters if hasattr(each, "ds_id"))
        return max(sum(size for _, size in self._filled.values()), available)


def starts(base: Callable[[], Any], folder: Path, watch: Watch) -> dict[str, int]:
    """Most bytes that were whole during each start."""
    ids = torch.randint(2, 250, (2, 32), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    options: dict[str, Any] = {"r": _RANK, "target_modules": "all-linear"}
    sources: dict[str, Callable[[nn.Module], Any]] = {
        "gradients": lambda model: gradient_factors(model, batches, rank=_RANK),
        "activations": lambda model: activation_factors(model, batches, rank=_RANK),
        "weights": lambda model: weight_factors(model, rank=_RANK),
    }
    peaks = {}

    def record(name: str) -> None:
        if not watch.gathers:
            raise RuntimeError(f"{name}: nothing was gathered, so that nothing was measured")
        peaks[name] = watch.peak

    for name, source in sources.items():
        model = base()
        watch.begin(model)
        factors = source(model)
        samples = base_samples(model, factors)
        record(name)
        if dist.get_rank() == 0:
            save_factors(folder / name, factors, FactorsMetadata(), base_samples=samples)
        dist.barrier()
    for name, config in {
        "file": SvdLoraConfig(**options, svd_factors=str(folder / "gradients")),
        "config of weights": SvdLoraConfig(
            **options, svd_source="weight", svd_start="reference", svd_split="balanced"
        ),
        "DoRA": SvdLoraConfig(**options, svd_factors=str(folder / "gradients"), use_dora=True),
    }.items():
        model = base()
        watch.begin(model)
        get_peft_model(model, config)
        record(name)
    return peaks


def measured(folder: Path, blocks: int) -> dict[str, float]:
    """Measure in this process, with the others."""
    watch = Watch()  # Before DeepSpeed takes hold of the functions.
    import deepspeed  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    worst = whole = 0.0
    for name, extra in _BASES.items():
        path = folder / name
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, **extra}
            config = LlamaConfig(num_hidden_layers=blocks, num_attention_heads=4, **shape)
            LlamaForCausalLM(config).save_pretrained(path)
        dist.barrier()
        watch.alive = HfDeepSpeedConfig(zero3)

        def base(path: Path = path) -> Any:
            return AutoModelForCausalLM.from_pretrained(path)

        sizes = {
            key: each.ds_numel * each.element_size()  # pyright: ignore
            for key, each in base().named_parameters()
        }
        largest = max(sizes, key=sizes.__getitem__)
        if dist.get_rank() == 0:
            print(f"{name}: {blocks} blocks, {sum(sizes.values()):,} bytes, largest {largest}")
        for start, peak in starts(base, path, watch).items():
            ratio = peak / sizes[largest]
            worst = max(worst, ratio)
            if dist.get_rank() == 0:
                print(f"  {start:<18} {peak:>12,} bytes at once, {ratio:.3f} of the largest weight")
        whole = max(whole, sum(sizes.values()) / sizes[largest])
    return {"peak_over_one_layer": round(worst, 3), "all_over_one_layer": round(whole, 1)}


def main() -> None:
    quick: bool = options_parser(__doc__).parse_args().quick
    if importlib.util.find_spec("deepspeed") is None:
        sys.exit(
            "zero3_start.py measures DeepSpeed's ZeRO-3, and deepspeed is not installed: "
            "DS_ACCELERATOR=cpu pip install deepspeed"
        )
    if _FOLDER in os.environ:
        result = measured(Path(os.environ[_FOLDER]), blocks=8 if quick else 16)
        if dist.get_rank() == 0:
            print(f"RESULT {json.dumps(result)}", flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
        done = subprocess.run(
            [sys.executable, *launcher, __file__, *sys.argv[1:]],
            env={**environment, _FOLDER: folder},
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
