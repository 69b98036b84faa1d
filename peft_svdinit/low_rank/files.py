"""What a low-rank model leaves beside its dense checkpoint: `low_rank.json` and its factors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ..files import HeadedFile, read_json, refuse_non_floats, write_json
from ..models import recognition_sample
from .plan import LowRankPlan

PLAN_NAME = "low_rank.json"
FACTORS_NAME = "low_rank.safetensors"
PARTS = ("U", "Vh", "row_norm", "sv_norm")
_FILE = HeadedFile("low_rank", FACTORS_NAME, "factors of low-rank layers")


class _Layers(msgspec.Struct):
    layers: dict[str, Any]


def write_files(
    folder: Path,
    plan: LowRankPlan,
    factors: Mapping[str, Mapping[str, Tensor]],
    dense: Mapping[str, Tensor],
) -> None:
    """Write both files; the JSON last, so that where it stands all is there.

    Args:
        folder: of the dense checkpoint.
        plan: the layers' ranks.
        factors: `PARTS` of each layer.
        dense: each layer's weight, (out, in), as the checkpoint has it: a few of its entries are
            kept, by which factors beside another checkpoint are noticed.
    """
    layers = plan.as_dict()
    tensors = {f"{name}.{part}": t for name, parts in factors.items() for part, t in parts.items()}
    tensors |= {f"{name}.sample": recognition_sample(weight) for name, weight in dense.items()}
    (folder / PLAN_NAME).unlink(missing_ok=True)
    _FILE.write(folder / FACTORS_NAME, {"layers": layers}, tensors)
    record = {
        "format_version": 1,
        "dense_parameters": plan.dense_parameters,
        "parameters": plan.parameters,
        "dense_bytes": sum(weight.nbytes for weight in dense.values()),
        "factor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "layers": layers,
    }
    write_json(folder / PLAN_NAME, record)


def remove_files(folder: Path) -> None:
    """Remove both, of a model that is dense again."""
    for name in (PLAN_NAME, FACTORS_NAME):
        (folder / name).unlink(missing_ok=True)


def is_low_rank(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a plan of low-rank layers."""
    return (Path(folder) / PLAN_NAME).is_file()


def read_plan(folder: Path, argument: str) -> LowRankPlan:
    """What `low_rank.json` in a folder says of its layers.

    Args:
        folder: that has the file.
        argument: by which the user gave the folder; the messages of errors begin with it.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / PLAN_NAME
    record = read_json(path, argument, _Layers)
    try:
        return LowRankPlan.from_dict(record["layers"])
    except ValueError as error:
        raise ValueError(f"{argument}: {path}: {error}") from error


@dataclass(frozen=True)
class StoredLayers:
    """The layers of a folder, read one by one.

    Attributes:
        plan: names, ranks and shapes.
    """

    plan: LowRankPlan
    _file: Any
    _keys: Set[str]

    def factors(self, name: str) -> dict[str, Tensor]:
        """The parts of a layer that there are.

        Raises:
            ValueError: if their shapes are not those of the plan.
        """
        tensors = (f"{name}.{part}" for part in (*PARTS, "sample"))
        refuse_non_floats(self._file, filter(self._keys.__contains__, tensors))
        found = {
            part: self._file.get_tensor(f"{name}.{part}")
            for part in PARTS
            if f"{name}.{part}" in self._keys
        }
        planned = self.plan.layers[name]
        rows, cols = planned.shape
        shapes = {
            "U": (rows, planned.rank),
            "Vh": (planned.rank, cols),
            "row_norm": (rows,),
            "sv_norm": (planned.rank,),
        }
        wrong = [part for part in found if tuple(found[part].shape) != shapes[part]]
        if wrong or not {"U", "Vh"} <= set(found):
            raise ValueError(f"the factors of layer {name} are not those of its plan")
        return found

    def sample(self, name: str) -> Tensor:
        """A few entries of its dense weight."""
        return self._file.get_tensor(f"{name}.sample")


@contextmanager
def stored_layers(folder: Path, argument: str) -> Iterator[StoredLayers]:
    """The low-rank layers of a folder.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if one is damaged, or they do not belong together.
    """
    if not is_low_rank(folder):
        raise FileNotFoundError(
            f"{argument}: {folder} has no {PLAN_NAME}, so that its low-rank layers are unknown"
        )
    plan = read_plan(folder, argument)
    with _FILE.opened(folder, argument, _Layers) as (file, header):
        if plan.as_dict() != header.layers:
            raise ValueError(f"{PLAN_NAME} beside it is of other layers: write the folder again")
        yield StoredLayers(plan, file, set(file.keys()))
