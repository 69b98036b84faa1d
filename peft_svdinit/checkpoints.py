"""Weights of a saved model, read tensor by tensor from safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .linear_modules import LinearModule, linear_modules, model_skeleton
from .sources import inside, read_json, resolve_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLE_SIZE = 8


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
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():
                        self._file_of[key] = path
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
            except SafetensorError as error:
                raise ValueError(
                    f"{argument}: {path} is not a readable safetensors file ({error}): truncated "
                    "while copying? Fetch it again"
                ) from error

    def _shards(self) -> list[Path]:
        if (self.folder / _INDEX).is_file():
            index = read_json(self.folder / _INDEX, self.argument)
            names = set(index.get("weight_map", {}).values())
            paths = [inside(self.folder, name) for name in sorted(names)]
        elif (self.folder / _SINGLE).is_file():
            paths = [self.folder / _SINGLE]
        else:
            if any(self.folder.glob("pytorch_model*.bin")):
                raise ValueError(
                    f"{self.argument}: {self.folder} holds its weights as a pickle, which can run "
                    'code when it is loaded. If you trust it, convert it once: python -c "from '
                    "transformers import AutoModelForCausalLM; AutoModelForCausalLM."
                    f"from_pretrained('{self.folder}').save_pretrained('{self.folder}')\""
                )
            raise FileNotFoundError(
                f"{self.argument}: the folder {self.folder} has neither {_SINGLE} nor {_INDEX}"
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.argument}: {self.folder} lacks the shards {', '.join(missing)}"
            )
        return paths

    def tensor(self, key: str) -> Tensor:
        """One tensor; its file is reopened each time, so that no mapped pages pile up."""
        with safe_open(self._file_of[key], framework="pt") as file:
            return file.get_tensor(key)

    def stored_key(self, key: str, prefix: str) -> str | None:
        """`key` as this file spells it: unchanged, or without or with the model's prefix."""
        for candidate in _spellings(key, prefix):
            if candidate in self.shapes:
                return candidate
        return None

    def corner(self, key: str, size: int) -> Tensor:
        """The first `size` rows and columns of a matrix, without reading the rest."""
        with safe_open(self._file_of[key], framework="pt") as file:
            return file.get_slice(key)[:size, :size]


class LinearWeights(Mapping[str, Tensor]):
    """Read-only, lazy view of the linear layers: module name to weight, float32 (out, in).

    The layers are those of the architecture, so that Conv1D weights are turned to (out, in) and
    names agree with the loaded model even where the checkpoint's keys lack its prefix.

    Args:
        checkpoint: the tensors.
        architecture: folder whose config.json names the architecture; the checkpoint's own if None.
        target_modules: as in LoraConfig.

    Raises:
        ValueError: if a layer is missing or has another shape than the architecture's; on reading
            one with NaN or infinite entries.
        TypeError: on reading a quantised layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        architecture: Path | None = None,
        target_modules: str | Sequence[str] = "all-linear",
    ) -> None:
        self.checkpoint = checkpoint
        skeleton = model_skeleton(architecture or checkpoint.folder)
        self.prefix = getattr(skeleton, "base_model_prefix", "")
        self.modules = linear_modules(skeleton, target_modules)
        self.keys_of = {name: self._key(name) for name in self.modules}
        for module in self.modules.values():
            self._check_shape(module)

    def _key(self, name: str) -> str:
        stored = self.checkpoint.stored_key(f"{name}.weight", self.prefix)
        if stored is None:
            spellings = dict.fromkeys(_spellings(f"{name}.weight", self.prefix))
            raise ValueError(
                f"{self.checkpoint.argument}: {self.checkpoint.folder} has no weight for layer "
                f"{name} (looked for {', '.join(spellings)}): another architecture?"
            )
        return stored

    def _check_shape(self, module: LinearModule) -> None:
        shape = self.checkpoint.shapes[self.keys_of[module.name]]
        expected = (module.out_features, module.in_features)
        if (shape[::-1] if module.transposed else shape) != expected:
            raise ValueError(
                f"{self.checkpoint.argument}: the weight of layer {module.name} has shape {shape}, "
                f"but (out, in) = {expected} was expected: another architecture?"
            )

    def _oriented(self, name: str, weight: Tensor) -> Float[Tensor, "out in"]:
        argument = self.checkpoint.argument
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                f"{argument}: the weight of layer {name} is {weight.dtype}: quantised checkpoints "
                "have no delta; dequantise the model first"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"{argument}: the weight of layer {name} has NaN or infinite entries")
        return weight.float().mT if self.modules[name].transposed else weight.float()

    def __getitem__(self, name: str) -> Tensor:
        return self._oriented(name, self.checkpoint.tensor(self.keys_of[name]))

    def __contains__(self, name: object) -> bool:
        return name in self.modules  # Mapping's own would read the layer

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def sample(self, name: str) -> Tensor:
        """A few entries by which the weight is recognised, see `recognition_sample`."""
        corner = self.checkpoint.corner(self.keys_of[name], SAMPLE_SIZE)
        return recognition_sample(self._oriented(name, corner))


def _spellings(key: str, prefix: str) -> tuple[str, str, str]:
    return key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"


def recognition_sample(weight: Float[Tensor, "out in"]) -> Float[Tensor, " n"]:
    """The first entries of a weight's first row, in float32: enough to tell base models apart."""
    return weight[0, :SAMPLE_SIZE].detach().float().cpu().clone()
