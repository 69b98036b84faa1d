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
        _check_vocabulary(base_checkpoint, tuned_checkpoint)
        self.base = LinearWeights(base_checkpoint, target_modules=target_modules)
        self.tuned = LinearWeights(
            tuned_checkpoint,
            architecture=base_checkpoint.folder,
            target_modules=target_modules,
        )

    def __getitem__(self, name: str) -> Float[Tensor, "out in"]:
        return self.tuned[name] - self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def uncovered(self) -> list[Uncovered]:
        """Tensors outside the linear layers that differ, largest relative change first."""
        covered = set(self.base.keys_of.values())
        base, tuned = self.base.checkpoint, self.tuned.checkpoint
        changed = []
        for key, shape in base.shapes.items():
            if key in covered or tuned.shapes.get(key) != shape:
                continue
            before = base.tensor(key).float()
            change = frobenius_norm(tuned.tensor(key).float() - before)
            if change:
                changed.append(Uncovered(key, change / (frobenius_norm(before) or 1.0)))
        return sorted(changed, key=lambda tensor: -tensor.relative_change)


def _check_vocabulary(base: Checkpoint, tuned: Checkpoint) -> None:
    for key, shape in base.shapes.items():
        other = tuned.shapes.get(key, shape)
        if other != shape and "embed" in key:
            raise ValueError(
                f"tuned: {key} has shape {other}, the base's has {shape}: the vocabulary was "
                "changed; resize both models to one vocabulary before taking the delta"
            )
