"""The delta between two checkpoints of one architecture, streamed tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...files import LazyMapping
from ...models import Checkpoint, LinearWeights, is_chosen
from .configurations import changed_settings
from .other_tensors import OtherTensors, Uncovered, WholeTensors


class CheckpointPair(LazyMapping[Tensor]):
    """Read-only, lazy view of tuned − base: module name to delta, float32 (out, in).

    A delta is made block by block of rows, so that beside it no tensor of its size is in memory.

    Args:
        base: folder or Hub id of the model before fine-tuning.
        tuned: the same after.
        target_modules, exclude_modules: as in LoraConfig; what is excluded is not compared at all.
        slice_modules: modules, by their names or endings, of which only the rows that the base has
            are read, for a vocabulary that grew.
        base_revision, tuned_revision: branch, tag or commit on the Hub.
        arguments: by which the user gave base and tuned; the messages of errors begin with one.

    Attributes:
        base, tuned: the linear layers on both sides.
        changed_settings: settings of the configuration that differ, name to (base, tuned); no
            adapter can carry them.

    Raises:
        FileNotFoundError: if a checkpoint is missing.
        ValueError: if the architectures or vocabularies differ, one side has a tensor that the
            other lacks, a choice of modules matches nothing, or as `Checkpoint` and
            `LinearWeights` raise.
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
        arguments: tuple[str, str] = ("base", "tuned"),
    ) -> None:
        base_checkpoint = Checkpoint(base, argument=arguments[0], revision=base_revision)
        tuned_checkpoint = Checkpoint(tuned, argument=arguments[1], revision=tuned_revision)
        self.changed_settings: dict[str, tuple[Any, Any]] = changed_settings(
            base_checkpoint.folder, tuned_checkpoint.folder, arguments[1]
        )
        self.base = LinearWeights(
            base_checkpoint, target_modules=target_modules, exclude_modules=exclude_modules
        )
        self.names = self.base.names
        self.tuned = LinearWeights(
            tuned_checkpoint,
            skeleton=self.base.skeleton,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            longer_modules=slice_modules,
        )
        for argument, choice in (("exclude", exclude_modules), ("slice", slice_modules)):
            self._check_choice(f"{argument}_modules", choice)
        self._others = OtherTensors(
            self.base, self.tuned, exclude_modules=exclude_modules, slice_modules=slice_modules
        )

    def _check_choice(self, argument: str, choice: str | Sequence[str]) -> None:
        keys = {*self.base.tied_to, *self.base.parameters.shapes, *self.tuned.parameters.shapes}
        modules = {key.rpartition(".")[0] for key in keys}
        for part in [choice] if isinstance(choice, str) else [[ending] for ending in choice]:
            if not any(is_chosen(module, part) for module in modules):
                raise ValueError(f"{argument}={part!r} matches no module of the two checkpoints")

    def __getitem__(self, name: str) -> Float[Tensor, "out in"]:
        delta = torch.empty(self.base.stored_shape(name))
        for start, block in self.tuned.blocks(name):
            delta[start : start + len(block)] = block
        for start, block in self.base.blocks(name):
            delta[start : start + len(block)].sub_(block)
        return self.base.oriented(name, delta)

    @property
    def sliced(self) -> bool:
        """Whether tuned has rows beyond the base's, which are not read."""
        base, tuned = self.base, self.tuned
        return self._others.sliced or any(
            base.parameters.shapes[base.stored_as[name]]
            != tuned.parameters.shapes[tuned.stored_as[name]]
            for name in self
        )

    def stored_bytes(self, name: str) -> int:
        """What reading one delta reads from the disk."""
        return sum(
            side.parameters.stored_bytes(side.stored_as[name]) for side in (self.base, self.tuned)
        )

    @cached_property
    def _changed(self) -> list[Uncovered]:
        return self._others.uncovered()

    def uncovered(self) -> list[Uncovered]:
        """Tensors outside the linear layers that differ, largest relative change first.

        Read once, and remembered.

        Raises:
            ValueError: if one has NaN or infinite entries.
        """
        return list(self._changed)

    def is_parameter(self, key: str) -> bool:
        """Whether the architecture knows a tensor by this name."""
        return key not in self.base.parameters.unknown

    def is_stack(self, key: str) -> bool:
        """Whether a tensor is a stack of matrices, as the fused experts of a layer are."""
        module = self.base.skeleton.get_submodule(key.rpartition(".")[0])
        kernel = hasattr(module, "kernel_size")
        shape = self.base.parameters.shapes[self._others.pairs[key][0]]
        return not kernel and [size > 1 for size in shape] == [True] * 3

    def whole_tensors(self, modules: Sequence[str]) -> WholeTensors:
        """Tuned parameters of modules outside the linear layers, for `modules_to_save`.

        Args:
            modules: names or endings; "changed" stands for all whose parameters differ.

        Raises:
            ValueError: if a name matches none, or a linear layer.
        """
        return self._others.whole(modules, self._changed if "changed" in modules else ())
