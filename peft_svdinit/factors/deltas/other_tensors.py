"""What two checkpoints share outside the linear layers: embeddings, norms, biases and the like."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg import frobenius_norm
from ...models import CastCheck, StoredParameters, is_chosen, is_within

# Masks and frequencies that old versions of transformers stored beside the weights.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"attn\.masked_bias$", r"h\.\d+\.attn\.bias$")


@dataclass(frozen=True)
class Uncovered:
    """A tensor that fine-tuning changed and linear factors do not express, such as an embedding."""

    key: str
    relative_change: float


class OtherTensors:
    """The tensors outside the linear layers of `base` and `tuned`, matched by name and checked.

    Args:
        base, tuned: the parameters; both read as the same architecture.
        layers: names of the linear layers.
        exclude_modules: modules that are not compared.
        slice_modules: modules of which only the rows that the base has are read.
        heads: full names of modules that a fine-tune may bring along or shape otherwise, with all
            that they contain.

    Attributes:
        rounded: tensors that differ by casts alone, once `uncovered` was asked.

    Raises:
        ValueError: if one side has a tensor that the other lacks, or their shapes differ.
    """

    def __init__(
        self,
        base: StoredParameters,
        tuned: StoredParameters,
        *,
        layers: Collection[str],
        exclude_modules: str | Sequence[str],
        slice_modules: str | Sequence[str],
        heads: Collection[str],
    ) -> None:
        self.base, self.tuned, self._heads = base, tuned, heads
        self._exclude = exclude_modules
        if not isinstance(exclude_modules, str):
            self._exclude = frozenset(exclude_modules)
        self._slice = slice_modules
        self.arguments = base.argument, tuned.argument
        self.pairs: dict[str, tuple[str, str]] = {}
        self.replaced: list[str] = []
        self.rounded: list[str] = []
        self._match_parameters({f"{name}.weight" for name in layers})
        self._match_unknown()
        for name, stored in list(self.pairs.items()):
            self._check_shapes(name, *stored)

    def _match_parameters(self, weights: Collection[str]) -> None:
        seen: set[str] = set()
        for name in [*self.base.tied_to, *self._buffers()]:
            if name in weights or self._excluded(name):
                continue
            stored = [side.stored(name) for side in (self.base, self.tuned)]
            if stored == [None, None] or stored[1] in seen:
                continue
            if stored[1] is not None and is_within(name, self._heads) and stored[0] is None:
                self.replaced.append(name)
            elif None in stored and self._excluded_by_tie(name):
                continue
            elif None in stored:
                has, lacks = self.arguments[:: 1 if stored[1] is None else -1]
                raise ValueError(
                    f"{lacks}: it has no tensor {name}, which {has} has: another architecture? "
                    f"exclude_modules can leave {name.rpartition('.')[0]} out"
                )
            else:
                self.pairs[name] = (str(stored[0]), str(stored[1]))
            seen.add(str(stored[1]))

    def _buffers(self) -> list[str]:
        """Buffers that both checkpoints hold, running means for one; no counters."""
        known = {n for n, buffer in self.base.model.named_buffers() if buffer.is_floating_point()}
        return sorted(known & self.base.shapes.keys() & self.tuned.shapes.keys())

    def _match_unknown(self) -> None:
        """Tensors under names that the architecture lacks."""
        known = {name for name, _ in self.base.model.named_buffers()}
        for key in sorted(self.tuned.unknown - known):
            if self._excluded(key):
                continue
            if key in self.base.unknown:
                self.pairs[key] = (key, key)
            elif not any(re.search(pattern, key) for pattern in _OLD_BUFFERS):
                raise ValueError(
                    f"{self.arguments[1]}: it has a tensor {key} that the base's architecture "
                    "lacks: another architecture? "
                    f"exclude_modules can leave {key.rpartition('.')[0]} out"
                )

    def _excluded_by_tie(self, name: str) -> bool:
        tied_to = self.base.tied_to
        return any(
            self._excluded(other)
            for other, first in tied_to.items()
            if first == tied_to.get(name, name)
        )

    def _excluded(self, name: str) -> bool:
        return is_chosen(name.rpartition(".")[0], self._exclude)

    def _check_shapes(self, name: str, base_key: str, tuned_key: str) -> None:
        before, after = self.base.shapes[base_key], self.tuned.shapes[tuned_key]
        if after != before and is_within(name, self._heads):
            del self.pairs[name]
            self.replaced.append(name)
            return
        module = name.rpartition(".")[0]
        longer = after[1:] == before[1:] and after[:1] > before[:1]
        if after != before and not (longer and is_chosen(module, self._slice)):
            raise ValueError(
                f"{self.arguments[1]}: {name} has shape {after}, the base's has {before}: was the "
                "vocabulary changed? Resize both models to one vocabulary before taking the delta, "
                f"or name {module} in exclude_modules to leave it out"
                + (", or in slice_modules to read the rows that both have" if longer else "")
            )

    @property
    def sliced(self) -> bool:
        """Whether a tuned tensor has rows beyond the base's."""
        shapes = self.base.shapes, self.tuned.shapes
        return any(shapes[0][one] != shapes[1][other] for one, other in self.pairs.values())

    def uncovered(self) -> list[Uncovered]:
        """The tensors that differ by more than casts explain, largest relative change first.

        Those that the base lacks count as changed.

        Raises:
            ValueError: if one has NaN or infinite entries.
        """
        changed, self.rounded = [Uncovered(name, 1.0) for name in self.replaced], []
        for name, (base_key, tuned_key) in self.pairs.items():
            rows = self.base.shapes[base_key][:1]
            blocks = zip(
                self.base.blocks(base_key), self.tuned.blocks(tuned_key, *rows), strict=True
            )
            before, change, cast = 0.0, 0.0, CastCheck()
            for (_, old), (_, new) in blocks:
                if old.is_floating_point() and new.is_floating_point():
                    cast.add(old.float(), new.float())
                old, new = old.double(), new.double()
                before = math.hypot(before, self._norm(0, name, old))
                self._norm(1, name, new)
                change = math.hypot(change, frobenius_norm(new - old))
            if cast.is_rounding:
                self.rounded.append(name)
            elif change and not self._repeats_its_source(name, tuned_key):
                changed.append(Uncovered(name, change / (before or 1.0)))
        return sorted(changed, key=lambda tensor: (-tensor.relative_change, tensor.key))

    def _norm(self, side: int, name: str, block: Tensor) -> float:
        try:
            return frobenius_norm(block)
        except ValueError:
            raise ValueError(
                f"{self.arguments[side]}: {name} has NaN or infinite entries"
            ) from None

    def _repeats_its_source(self, name: str, tuned_key: str) -> bool:
        """Whether a tied parameter that is stored a second time equals the one it is tied to."""
        source = self.base.tied_to.get(name, name)
        if source == name or source not in self.pairs:
            return False
        tuned_source = self.pairs[source][1]
        blocks = zip(self.tuned.blocks(tuned_key), self.tuned.blocks(tuned_source), strict=True)
        return all(torch.equal(one, other) for (_, one), (_, other) in blocks)
