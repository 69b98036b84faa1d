"""Weights of a saved model, read tensor by tensor from safetensors."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .linear_modules import LinearModule, is_chosen, linear_modules, model_skeleton
from .recognition import Position, sampled_positions
from .sources import hub_pickles, inside, read_json, resolve_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK_ENTRIES = 1 << 19
_BLOCKS_MAPPED = 16
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
_WEIGHT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Checkpoint:
    """The tensors of a model folder in safetensors, one file or sharded, opened one at a time.

    Args:
        path_or_id: a folder or Hub repository.
        argument: the name of the caller's argument, for errors.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        FileNotFoundError: if there is no checkpoint, or a shard is missing.
        ValueError: if it is a pickle, truncated, or its index leads out of the folder.
    """

    def __init__(
        self, path_or_id: str | os.PathLike, *, argument: str, revision: str | None = None
    ) -> None:
        self.folder = resolve_folder(path_or_id, argument=argument, revision=revision)
        self.argument = argument
        self._source, self._revision = path_or_id, revision
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():
                        self._file_of[key] = path
                        tensor = file.get_slice(key)
                        self.shapes[key] = tuple(tensor.get_shape())
                        self.dtypes[key] = tensor.get_dtype()
            except SafetensorError as error:
                raise ValueError(
                    f"{argument}: {path} is not a readable safetensors file ({error}): truncated "
                    "while copying? Fetch it again"
                ) from error

    def _shards(self) -> list[Path]:
        if (self.folder / _SINGLE).is_file():  # As in transformers, before an index.
            paths = [self.folder / _SINGLE]
        elif (self.folder / _INDEX).is_file():
            index = read_json(self.folder / _INDEX, self.argument)
            map_ = index.get("weight_map")
            if not isinstance(map_, dict) or not all(isinstance(v, str) for v in map_.values()):
                raise ValueError(
                    f"{self.argument}: {self.folder / _INDEX} must map tensors to file names in "
                    '"weight_map": truncated while copying? Fetch it again'
                )
            paths = [inside(self.folder, name) for name in sorted(set(map_.values()))]
        else:
            if any(self.folder.glob("pytorch_model*.bin")):
                self._refuse_pickle(self.folder, self.folder)
            if hub_pickles(self._source, self._revision):
                self._refuse_pickle(self._source, "converted")
            raise FileNotFoundError(
                f"{self.argument}: the folder {self.folder} has neither {_SINGLE} nor {_INDEX}"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.argument}: {self.folder} lacks the shards {', '.join(missing)}"
            )
        return paths

    def _refuse_pickle(self, source: str | os.PathLike, target: str | os.PathLike) -> NoReturn:
        raise ValueError(
            f"{self.argument}: {os.fspath(source)} holds its weights as a pickle, which can run "
            'code when it is loaded. If you trust it, convert it once: python -c "from '
            "transformers import AutoModelForCausalLM; AutoModelForCausalLM."
            f"from_pretrained('{os.fspath(source)}').save_pretrained('{os.fspath(target)}')\""
        )

    def tensor(self, key: str) -> Tensor:
        """One tensor; its file is reopened each time, so that no mapped pages pile up."""
        with safe_open(self._file_of[key], framework="pt") as file:
            return file.get_tensor(key)

    def blocks(self, key: str, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The tensor in blocks of whole rows: the first row's index and the block.

        `rows` stops after that many of them. Blocks have about `BLOCK_ENTRIES` entries, and the
        file is opened anew after some of them, since pages that were read stay mapped until it is
        closed: a tensor of any size is read in bounded memory.
        """
        shape = self.shapes[key]
        last = math.prod(shape[:1]) if rows is None else min(rows, *shape[:1])
        step = max(1, BLOCK_ENTRIES // max(1, math.prod(shape[1:])))
        for start in range(0, last, _BLOCKS_MAPPED * step):
            end = min(start + _BLOCKS_MAPPED * step, last)
            with safe_open(self._file_of[key], framework="pt") as file:
                if not shape:
                    yield 0, file.get_tensor(key)
                    return
                tensor = file.get_slice(key)
                for first in range(start, end, step):
                    yield first, tensor[first : min(first + step, end)]

    def stored_bytes(self, key: str) -> int:
        """Size of a tensor in its file."""
        return math.prod(self.shapes[key]) * _ITEM_SIZES.get(self.dtypes[key], 8)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def stored_key(self, key: str, prefix: str) -> str | None:
        """`key` as this file spells it: unchanged, or without or with the model's prefix."""
        for candidate in _spellings(key, prefix):
            if candidate in self.shapes:
                return candidate
        return None

    def entries(self, key: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """A few entries of a matrix of floating numbers, in its dtype.

        They are read one by one: around an entry of a mapped file the system would read ahead,
        megabytes perhaps.
        """
        cols = self.shapes[key][1]
        dtype = _WEIGHT_DTYPES[self.dtypes[key]]
        with open(self._file_of[key], "rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            first = 8 + length + json.loads(file.read(length))[key]["data_offsets"][0]
            stored = bytearray()
            for row, col in positions:
                file.seek(first + (row * cols + col) * dtype.itemsize)
                stored += file.read(dtype.itemsize)
        return torch.frombuffer(stored, dtype=dtype)


class LinearWeights(Mapping[str, Tensor]):
    """Read-only, lazy view of the linear layers: module name to weight, float32 (out, in).

    The layers are those of the architecture, so that Conv1D weights are turned to (out, in) and
    names agree with the loaded model even where the checkpoint's keys lack its prefix.

    Args:
        checkpoint: the tensors.
        architecture: folder whose config.json names the architecture; the checkpoint's own if None.
        target_modules, exclude_modules: as in LoraConfig.
        longer_modules: layers, by their names or endings, that may have more rows than the
            architecture says, as an output head does after its vocabulary grew; rows beyond are
            not read.

    Raises:
        ValueError: if a layer is missing or has another shape than the architecture's; on reading
            one with NaN or infinite entries.
        TypeError: if a layer is quantised.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        architecture: Path | None = None,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Sequence[str] = (),
        longer_modules: str | Sequence[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.skeleton = model_skeleton(architecture or checkpoint.folder)
        self.prefix = getattr(self.skeleton, "base_model_prefix", "")
        self.tied_to = _tied_parameters(self.skeleton)
        self.modules = {
            name: module
            for name, module in linear_modules(self.skeleton, target_modules).items()
            if not is_chosen(name, exclude_modules)
        }
        if not self.modules:
            raise ValueError(f"exclude_modules={exclude_modules!r} leaves no linear layer")
        self.keys_of = {name: self._key(name) for name in self.modules}
        for module in self.modules.values():
            self._check(module, may_be_longer=is_chosen(module.name, longer_modules))

    def stored_key(self, parameter: str) -> str | None:
        """The checkpoint's key of a parameter, or of the one that it is tied to."""
        for name in (parameter, self.tied_to.get(parameter, parameter)):
            stored = self.checkpoint.stored_key(name, self.prefix)
            if stored is not None:
                return stored
        return None

    def _key(self, name: str) -> str:
        stored = self.stored_key(f"{name}.weight")
        if stored is not None:
            return stored
        argument = self.checkpoint.argument
        for packed in ("qweight", "weight_packed"):
            if self.checkpoint.stored_key(f"{name}.{packed}", self.prefix):
                raise TypeError(
                    f"{argument}: the weight of layer {name} is stored as {packed}: quantised "
                    "checkpoints have no delta; dequantise the model first"
                )
        spellings = dict.fromkeys(_spellings(f"{name}.weight", self.prefix))
        raise ValueError(
            f"{argument}: {self.checkpoint.folder} has no weight for layer {name} (looked for "
            f"{', '.join(spellings)}): another architecture?"
        )

    def _check(self, module: LinearModule, *, may_be_longer: bool) -> None:
        argument, key = self.checkpoint.argument, self.keys_of[module.name]
        if self.checkpoint.dtypes[key] not in _WEIGHT_DTYPES:
            raise TypeError(
                f"{argument}: the weight of layer {module.name} is stored as "
                f"{self.checkpoint.dtypes[key]}: quantised checkpoints have no delta; dequantise "
                "the model first"
            )
        shape = self.checkpoint.shapes[key]
        expected = (module.out_features, module.in_features)
        oriented = shape[::-1] if module.transposed else shape
        longer = oriented[1:] == expected[1:] and oriented[0] > expected[0]
        if oriented != expected and not (longer and may_be_longer and not module.transposed):
            raise ValueError(
                f"{argument}: the weight of layer {module.name} has shape {shape}, but (out, in) = "
                f"{expected} was expected: another architecture? Of a longer vocabulary, "
                "slice_modules compares the rows that both have"
            )

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The stored weight in blocks of rows of float32, those of Conv1D being its inputs."""
        module, key = self.modules[name], self.keys_of[name]
        rows = module.in_features if module.transposed else module.out_features
        for start, block in self.checkpoint.blocks(key, rows):
            wide = block.float()
            # The norm is cheaper to look at than every entry; it may overflow without a defect.
            if not (torch.linalg.vector_norm(wide).isfinite() or torch.isfinite(wide).all()):
                raise ValueError(
                    f"{self.checkpoint.argument}: the weight of layer {name} has NaN or infinite "
                    "entries"
                )
            yield start, wide

    def stored_shape(self, name: str) -> tuple[int, int]:
        """(out, in), or (in, out) of a Conv1D."""
        module = self.modules[name]
        if module.transposed:
            return module.in_features, module.out_features
        return module.out_features, module.in_features

    def oriented(self, name: str, stored: Tensor) -> Float[Tensor, "out in"]:
        """What is stored in the checkpoint's orientation, as (out, in)."""
        return stored.mT if self.modules[name].transposed else stored

    def __getitem__(self, name: str) -> Tensor:
        weight = torch.empty(self.stored_shape(name))
        for start, block in self.blocks(name):
            weight[start : start + len(block)] = block
        return self.oriented(name, weight)

    def __contains__(self, name: object) -> bool:
        return name in self.modules  # Mapping's own would read the layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def entries(self, name: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """Entries of the (out, in) weight in its stored dtype, without reading the rest."""
        if self.modules[name].transposed:
            positions = [(col, row) for row, col in positions]
        return self.checkpoint.entries(self.keys_of[name], positions)

    def sample(self, name: str) -> Float[Tensor, " n"]:
        """The entries by which the weight is recognised, see `recognition_sample`."""
        module = self.modules[name]
        return self.entries(name, sampled_positions((module.out_features, module.in_features)))


def _tied_parameters(skeleton: nn.Module) -> dict[str, str]:
    """Every parameter and the first one that it is tied to, mostly itself."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: group[0] for group in groups.values() for name in group}


def _spellings(key: str, prefix: str) -> tuple[str, str, str]:
    return key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"
