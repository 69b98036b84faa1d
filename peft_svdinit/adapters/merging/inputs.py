"""The adapters to be merged: opened, checked against the method, and read layer by layer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ...factors import LoraProduct
from ..output_folder import OutputFolder
from ..weighted_sum import WeightedSum
from .methods import MergeMethod
from .terms import Term

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeInputs:
    """LoRA adapters with weights that are not 0.

    Attributes:
        left_out: adapters whose weight is 0.
    """

    adapters: WeightedSum
    left_out: tuple[str, ...]

    @classmethod
    def of(
        cls,
        paths: Sequence[str | os.PathLike],
        weights: Sequence[float] | None,
        method: MergeMethod,
    ) -> MergeInputs:
        """Open the adapters; see `merge` for what is refused."""
        given = WeightedSum(paths, weights)
        pairs = list(zip(given.paths, given.weights, strict=True))
        if len(pairs) < 2:
            raise ValueError("adapters must be two at least; svdinit resize is for one")
        _require_loras(given)
        chosen = [(path, weight) for path, weight in pairs if weight]
        if len(chosen) < (2 if method.through_peft else 1):
            raise ValueError(
                f"weights: {len(pairs) - len(chosen)} of {len(pairs)} are 0, which leaves too few "
                f"adapters for method {method.name}"
            )
        negative = [f"{path} has {weight}" for path, weight in chosen if weight < 0]
        if negative and method.elects_signs:
            raise ValueError(
                f"weights must be positive with method {method.name}, but {negative[0]}: PEFT "
                "elects the signs before it applies weights, so an adapter to be subtracted would "
                "vote as if it were added; use cat, svd or dare_linear"
            )
        _warn_of_other_bases(given)
        if len(chosen) < len(pairs):
            given = WeightedSum([path for path, _ in chosen], [weight for _, weight in chosen])
        return cls(given, tuple(path for path, weight in pairs if not weight))

    @contextmanager
    def terms(self) -> Iterator[Callable[[str], list[Term]]]:
        """A reader of a layer's summands, for as long as the context lasts."""
        with ExitStack() as stack:
            opened = [
                (weight, adapter, stack.enter_context(adapter.opened()))
                for weight, adapter in zip(
                    self.adapters.weights, self.adapters.adapters, strict=True
                )
            ]

            def read(name: str) -> list[Term]:
                return [
                    Term(index, weight, cast(LoraProduct, reader(name)))
                    for index, (weight, adapter, reader) in enumerate(opened)
                    if name in adapter.layers
                ]

            yield read

    def checked_output(self, path: str | os.PathLike) -> OutputFolder:
        """The folder, if it may be written.

        Raises:
            ValueError: if it is an input or holds one, is a file, or holds anything but an adapter.
        """
        folders = [adapter.file.path.parent for adapter in self.adapters.adapters]
        left_out = (Path(adapter).expanduser() for adapter in self.left_out)
        return OutputFolder.checked(path, "output", [*folders, *left_out])


def _require_loras(given: WeightedSum) -> None:
    for path, adapter in zip(given.paths, given.adapters, strict=True):
        if adapter.style is not None or adapter.config.get("peft_type") != "LORA":
            raise ValueError(
                f"adapters must be PEFT folders of type LORA, got {path}; svdinit resize adds up "
                "adapters of other kinds"
            )


def _warn_of_other_bases(given: WeightedSum) -> None:
    bases = {
        path: adapter.config.get("base_model_name_or_path")
        for path, adapter in zip(given.paths, given.adapters, strict=True)
    }
    if len(set(filter(None, bases.values()))) > 1:
        logger.warning(
            "The adapters name different base models: %s. Their shapes agree, and the merged "
            "adapter names the first; are these one model?",
            ", ".join(f"{path}: {base}" for path, base in bases.items()),
        )
