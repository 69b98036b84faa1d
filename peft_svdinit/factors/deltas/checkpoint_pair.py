"""The delta between two checkpoints of one architecture, streamed tensor by tensor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...files import LazyMapping
from ...models import (
    CastCheck,
    Checkpoint,
    LinearWeights,
    StoredParameters,
    endings,
    is_chosen,
    model_skeleton,
)
from .configurations import changed_settings
from .heads import heads_of_pair, stored_in_neither
from .other_tensors import OtherTensors, Uncovered
from .whole_tensors import WholeTensors, whole_tensors

logger = logging.getLogger(__name__)


class CheckpointPair(LazyMapping[Tensor]):
    """Read-only, lazy view of tuned − base: module name to delta, float32 (out, in).

    A delta is made block by block of rows, so that beside it no tensor of its size is in memory.
    It is zero where casts alone explain it, as between a model in float32 and one in bfloat16.

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
        heads: full names of modules that an adapter stores whole: those that PEFT stores in every
            adapter of the tuned model's task type, and of a tuned model of another class than the
            base's what it brings along. None that are excluded or targeted by name.
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
            base_checkpoint.folder, tuned_checkpoint.folder, arguments
        )
        self._folders = base_checkpoint.folder, tuned_checkpoint.folder
        skeleton = self.skeleton()
        before, after = (
            StoredParameters(checkpoint, skeleton)
            for checkpoint in (base_checkpoint, tuned_checkpoint)
        )
        self.heads = [
            name
            for name in heads_of_pair(before, after)
            if not is_chosen(name, exclude_modules, "exclude_modules")
            and (target_modules == "all-linear" or not is_chosen(name, target_modules))
        ]
        absent = stored_in_neither(before, after)
        if absent:
            logger.warning(
                "%s of %s: in neither checkpoint, and left out",
                ", ".join(absent),
                type(skeleton).__name__,
            )
        options: dict[str, Any] = {
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "whole_modules": [*self.heads, *absent],
        }
        self.base = LinearWeights(before, **options)
        self.names = self.base.names
        self.tuned = LinearWeights(after, **options, longer_modules=slice_modules)
        self._slice = slice_modules
        self._is_rounding: dict[str, bool] = {}
        for argument, choice in (("exclude", exclude_modules), ("slice", slice_modules)):
            self._check_choice(f"{argument}_modules", choice)
        self._others = OtherTensors(
            before,
            after,
            layers=self.names,
            exclude_modules=exclude_modules,
            slice_modules=slice_modules,
            heads=self.heads,
        )

    def skeleton(self) -> nn.Module:
        """The model that an adapter of this pair is for, on the meta device, made anew.

        It is the base's, in the class and with the labels of the tuned one.
        """
        base, tuned = self._folders
        return model_skeleton(base, tuned=tuned)

    @property
    def source(self) -> dict[str, Any]:
        """What factors of this pair say of where they come from."""
        return {"kind": "checkpoints", "architecture": type(self.base.parameters.model).__name__}

    def _check_choice(self, argument: str, choice: str | Sequence[str]) -> None:
        before, after = self.base.parameters, self.tuned.parameters
        keys = {*before.tied_to, *before.shapes, *after.shapes}
        modules = {key.rpartition(".")[0] for key in keys}
        if isinstance(choice, str):
            missing = [] if any(is_chosen(module, choice) for module in modules) else [choice]
        else:
            there = {ending for module in modules for ending in endings(module)}
            missing = [[ending] for ending in choice if ending not in there]
        if missing:
            raise ValueError(f"{argument}={missing[0]!r} matches no module of the two checkpoints")

    def __getitem__(self, name: str) -> Float[Tensor, "out in"]:
        delta, cast = torch.empty(self.base.stored_shape(name)), CastCheck()
        for before, after, rows in self._blocks(name):
            torch.sub(after, before, out=delta[rows])
            cast.add(before, after)
        self._is_rounding[name] = cast.is_rounding
        return self.base.oriented(name, delta.zero_() if cast.is_rounding else delta)

    def _blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor, slice]]:
        blocks = zip(self.base.blocks(name), self.tuned.blocks(name), strict=True)
        for (start, before), (_, after) in blocks:
            yield before, after, slice(start, start + len(after))

    def is_rounding(self, name: str) -> bool:
        """Whether a layer differs by casts of one weight alone, so that its delta counts as zero.

        Reads both sides unless the delta was read before.
        """
        if name not in self._is_rounding:
            cast = CastCheck()
            for before, after, _ in self._blocks(name):
                cast.add(before, after)
            self._is_rounding[name] = cast.is_rounding
        return self._is_rounding[name]

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

    @property
    def rounded_tensors(self) -> list[str]:
        """Tensors outside the linear layers that differ by casts alone, after `uncovered`."""
        return list(self._others.rounded)

    def uncovered(self) -> list[Uncovered]:
        """Tensors outside the linear layers that differ, largest relative change first.

        Those that casts of one tensor explain are no change. Read once, and remembered.

        Raises:
            ValueError: if one has NaN or infinite entries.
        """
        return list(self._changed)

    def is_parameter(self, key: str) -> bool:
        """Whether the architecture knows a tensor by this name."""
        return key not in self.base.parameters.unknown

    def is_stack(self, key: str) -> bool:
        """Whether a tensor is a stack of matrices, as the fused experts of a layer are."""
        tuned = self.tuned.parameters
        kernel = hasattr(tuned.model.get_submodule(key.rpartition(".")[0]), "kernel_size")
        shape = tuned.shapes[tuned.stored(key) or key]
        return not kernel and [size > 1 for size in shape] == [True] * 3

    def whole_tensors(self, modules: Sequence[str]) -> WholeTensors:
        """Tuned parameters of the heads and of other modules outside the linear layers.

        Args:
            modules: names or endings; "changed" stands for all whose parameters differ and that
                PEFT can store: biases of linear layers, and parameters of modules that hold others,
                stay uncovered.

        Raises:
            ValueError: if a name matches none, or a linear layer.
        """
        changed = [tensor.key for tensor in self._changed] if "changed" in modules else []
        return whole_tensors(
            self.tuned.parameters,
            [ending for ending in modules if ending != "changed"],
            layers=self.names,
            heads=self.heads,
            changed=changed,
            slice_modules=self._slice,
        )
