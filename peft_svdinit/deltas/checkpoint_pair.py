"""The delta between two checkpoints of one architecture, streamed tensor by tensor."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoints import Checkpoint, LinearWeights
from ..linalg import frobenius_norm
from ..linear_modules import is_chosen


@dataclass(frozen=True)
class Uncovered:
    """A tensor that fine-tuning changed and linear factors do not express, such as an embedding."""

    key: str
    relative_change: float


class CheckpointPair(Mapping[str, Tensor]):
    """Read-only, lazy view of tuned − base: module name to delta, float32 (out, in).

    A delta is made block by block of rows, so that beside it no tensor of its size is in memory.

    Args:
        base: folder or Hub id of the model before fine-tuning.
        tuned: the same after.
        target_modules, exclude_modules: as in LoraConfig; what is excluded is not compared at all.
        slice_modules: modules, by their names or endings, of which only the rows that the base has
            are read, for a vocabulary that grew.
        base_revision, tuned_revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if a checkpoint is missing.
        ValueError: if the vocabularies differ, one side has a tensor that the other lacks, or as
            `Checkpoint` and `LinearWeights` raise.
        TypeError: as `LinearWeights` raises.
    """

    def __init__(
        self,
        base: str | os.PathLike,
        tuned: str | os.PathLike,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Sequence[str] = (),
        slice_modules: str | Sequence[str] = (),
        base_revision: str | None = None,
        tuned_revision: str | None = None,
    ) -> None:
        base_checkpoint = Checkpoint(base, argument="base", revision=base_revision)
        tuned_checkpoint = Checkpoint(tuned, argument="tuned", revision=tuned_revision)
        self.base = LinearWeights(
            base_checkpoint, target_modules=target_modules, exclude_modules=exclude_modules
        )
        self.tuned = LinearWeights(
            tuned_checkpoint,
            architecture=base_checkpoint.folder,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            longer_modules=slice_modules,
        )
        self._exclude, self._slice = exclude_modules, slice_modules
        self._tied_to = _tied_parameters(self.base)
        self._others = self._checked_others()

    def _checked_others(self) -> dict[str, tuple[str, str]]:
        """Parameter to its keys in base and tuned, of those outside the linear layers."""
        others: dict[str, tuple[str, str]] = {}
        weights = {f"{name}.weight" for name in self}
        for name, source in self._tied_to.items():
            if name in weights or is_chosen(name.rpartition(".")[0], self._exclude):
                continue
            keys = [self._stored(side, name, source) for side in (self.base, self.tuned)]
            if keys == [None, None] or keys[1] in {pair[1] for pair in others.values()}:
                continue
            if None in keys:
                has, lacks = ("base", "tuned") if keys[1] is None else ("tuned", "base")
                raise ValueError(
                    f"{lacks}: it has no tensor {name}, which {has} has: another architecture? "
                    f"exclude_modules can leave {name.rpartition('.')[0]} out"
                )
            others[name] = (str(keys[0]), str(keys[1]))
            self._check_shapes(name, *others[name])
        self._refuse_unknown()
        return others

    def _stored(self, side: LinearWeights, name: str, source: str) -> str | None:
        keys = (side.checkpoint.stored_key(key, side.prefix) for key in (name, source))
        return next((key for key in keys if key is not None), None)

    def _check_shapes(self, name: str, base_key: str, tuned_key: str) -> None:
        before = self.base.checkpoint.shapes[base_key]
        after = self.tuned.checkpoint.shapes[tuned_key]
        module = name.rpartition(".")[0]
        longer = after[1:] == before[1:] and after[:1] > before[:1]
        if after != before and not (longer and is_chosen(module, self._slice)):
            raise ValueError(
                f"tuned: {name} has shape {after}, the base's has {before}: was the vocabulary "
                "changed? Resize both models to one vocabulary before taking the delta, or name "
                f"{module} in exclude_modules to leave it out"
                + (", or in slice_modules to read the rows that both have" if longer else "")
            )

    def _refuse_unknown(self) -> None:
        """A tensor that only tuned has is a part of the model that the adapter would lack."""
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        known = {*self._tied_to, *(name for name, _ in self.base.skeleton.named_buffers())}
        for key in tuned.shapes:
            spellings = {key, key.removeprefix(f"{self.base.prefix}."), f"{self.base.prefix}.{key}"}
            module = key.rpartition(".")[0]
            if spellings & (known | base.shapes.keys()) or is_chosen(module, self._exclude):
                continue
            raise ValueError(
                f"tuned: it has a tensor {key} that the base's architecture lacks: another "
                f"architecture? exclude_modules can leave {module} out"
            )

    def __getitem__(self, name: str) -> Float[Tensor, "out in"]:
        delta = torch.empty(self.base.stored_shape(name))
        for start, block in self.tuned.blocks(name):
            delta[start : start + len(block)] = block
        for start, block in self.base.blocks(name):
            delta[start : start + len(block)].sub_(block)
        return self.base.oriented(name, delta)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def sliced(self) -> bool:
        """Whether tuned has rows beyond the base's, which are not read."""
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        keys = [*self._others.values()]
        keys += [(self.base.keys_of[name], self.tuned.keys_of[name]) for name in self]
        return any(base.shapes[one] != tuned.shapes[other] for one, other in keys)

    def stored_bytes(self, name: str) -> int:
        """What reading one delta reads from the disk."""
        return sum(
            side.checkpoint.stored_bytes(side.keys_of[name]) for side in (self.base, self.tuned)
        )

    def uncovered(self) -> list[Uncovered]:
        """Parameters outside the linear layers that differ, largest relative change first."""
        changed = []
        for name, (base_key, tuned_key) in self._others.items():
            rows = self.base.checkpoint.shapes[base_key][:1]
            pairs = zip(
                self.base.checkpoint.blocks(base_key),
                self.tuned.checkpoint.blocks(tuned_key, *rows),
                strict=True,
            )
            before = change = 0.0
            for (_, old), (_, new) in pairs:
                before = math.hypot(before, frobenius_norm(old.float()))
                change = math.hypot(change, frobenius_norm(new.float() - old.float()))
            if change and not self._repeats_its_source(name, tuned_key):
                changed.append(Uncovered(name, change / (before or 1.0)))
        return sorted(changed, key=lambda tensor: (-tensor.relative_change, tensor.key))

    def _repeats_its_source(self, name: str, tuned_key: str) -> bool:
        """Whether a tied parameter that is stored a second time equals the one it is tied to."""
        source = self._tied_to[name]
        if source == name or source not in self._others:
            return False
        tuned = self.tuned.checkpoint
        blocks = zip(tuned.blocks(tuned_key), tuned.blocks(self._others[source][1]), strict=True)
        return all(torch.equal(one, other) for (_, one), (_, other) in blocks)

    def whole_tensors(self, modules: Sequence[str]) -> WholeTensors:
        """Tuned parameters of modules outside the linear layers, for `modules_to_save`.

        Args:
            modules: names or endings; "changed" stands for all whose parameters differ.

        Raises:
            ValueError: if a name matches none.
        """
        chosen = [name for name in modules if name != "changed"]
        changed = {t.key.rpartition(".")[0] for t in self.uncovered()} if chosen != modules else ()
        for module in chosen:
            if not any(is_chosen(name.rpartition(".")[0], [module]) for name in self._others):
                raise ValueError(
                    f"modules_to_save: {module} is no module outside the linear layers that the "
                    "two checkpoints share"
                )
        keys = {
            name: tuned_key
            for name, (_, tuned_key) in self._others.items()
            if name.rpartition(".")[0] in changed or is_chosen(name.rpartition(".")[0], chosen)
        }
        rows = {name: self.base.checkpoint.shapes[self._others[name][0]][0] for name in keys}
        return WholeTensors(self.tuned.checkpoint, keys, rows)


class WholeTensors(Mapping[str, Tensor]):
    """Read-only, lazy view of a checkpoint's tensors by parameter name, in their own dtype."""

    def __init__(
        self, checkpoint: Checkpoint, keys: Mapping[str, str], rows: Mapping[str, int]
    ) -> None:
        self._checkpoint, self._keys, self._rows = checkpoint, dict(keys), dict(rows)

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(self._keys[name])[: self._rows[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def stored_bytes(self) -> int:
        """Size of all of them together."""
        return sum(self._checkpoint.stored_bytes(key) for key in self._keys.values())


def _tied_parameters(weights: LinearWeights) -> dict[str, str]:
    """Every parameter of the architecture and the first one that it is tied to, mostly itself."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in weights.skeleton.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: group[0] for group in groups.values() for name in group}
