"""The delta between two checkpoints of one architecture, streamed tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..checkpoints import Checkpoint, LinearWeights
from ..linalg import frobenius_norm


@dataclass(frozen=True)
class Uncovered:
    """A tensor that fine-tuning changed and linear factors do not express, such as an embedding."""

    key: str
    relative_change: float


class CheckpointPair(Mapping[str, Tensor]):
    """Read-only, lazy view of tuned − base: module name to delta, float32 (out, in).

    Args:
        base: folder or Hub id of the model before fine-tuning.
        tuned: the same after.
        target_modules: as in LoraConfig.
        base_revision, tuned_revision: branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: if a checkpoint is missing.
        ValueError: if the vocabularies differ, or as `Checkpoint` and `LinearWeights` raise.
        TypeError: as `LinearWeights` raises.
    """

    def __init__(
        self,
        base: str | os.PathLike,
        tuned: str | os.PathLike,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        base_revision: str | None = None,
        tuned_revision: str | None = None,
    ) -> None:
        base_checkpoint = Checkpoint(base, argument="base", revision=base_revision)
        tuned_checkpoint = Checkpoint(tuned, argument="tuned", revision=tuned_revision)
        self.base = LinearWeights(base_checkpoint, target_modules=target_modules)
        self.tuned = LinearWeights(
            tuned_checkpoint,
            architecture=base_checkpoint.folder,
            target_modules=target_modules,
        )
        self._others = self._checked_others()

    def _checked_others(self) -> dict[str, str]:
        """Key in the base to key in tuned, of tensors outside the linear layers that both hold."""
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        others = {}
        for key in base.shapes.keys() - self.base.keys_of.values():
            partner = tuned.stored_key(key, self.base.prefix)
            if partner is None:
                continue
            if tuned.shapes[partner] != base.shapes[key]:
                raise ValueError(
                    f"tuned: {partner} has shape {tuned.shapes[partner]}, the base's has "
                    f"{base.shapes[key]}: was the vocabulary changed? Resize both models to one "
                    "vocabulary before taking the delta"
                )
            others[key] = partner
        return others

    def __getitem__(self, name: str) -> Float[Tensor, "out in"]:
        return self.tuned[name] - self.base[name]

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def uncovered(self) -> list[Uncovered]:
        """Tensors outside the linear layers that differ, largest relative change first."""
        changed = []
        for key, partner in self._others.items():
            before = self.base.checkpoint.tensor(key).float()
            change = frobenius_norm(self.tuned.checkpoint.tensor(partner).float() - before)
            if change:
                changed.append(Uncovered(key, change / (frobenius_norm(before) or 1.0)))
        return sorted(changed, key=lambda tensor: (-tensor.relative_change, tensor.key))
