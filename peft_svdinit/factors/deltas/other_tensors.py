"""What two checkpoints share outside the linear layers: embeddings, norms, biases and the like."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...files import LazyMapping
from ...linalg import frobenius_norm
from ...models import LinearWeights, StoredParameters, is_chosen

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
        base, tuned: the linear layers; both read as the same architecture.
        exclude_modules: modules that are not compared.
        slice_modules: modules of which only the rows that the base has are read.

    Raises:
        ValueError: if one side has a tensor that the other lacks, or their shapes differ.
    """

    def __init__(
        self,
        base: LinearWeights,
        tuned: LinearWeights,
        *,
        exclude_modules: str | Sequence[str],
        slice_modules: str | Sequence[str],
    ) -> None:
        self.base, self.tuned = base, tuned
        self._exclude, self._slice = exclude_modules, slice_modules
        self.arguments = base.checkpoint.argument, tuned.checkpoint.argument
        self.pairs: dict[str, tuple[str, str]] = {}
        self._match_parameters()
        self._match_unknown()
        for name, stored in self.pairs.items():
            self._check_shapes(name, *stored)

    def _match_parameters(self) -> None:
        weights = {f"{name}.weight" for name in self.base}
        buffers = {name for name, _ in self.base.skeleton.named_buffers()}
        buffers &= self.base.parameters.shapes.keys() & self.tuned.parameters.shapes.keys()
        seen: set[str] = set()
        for name in [*self.base.tied_to, *sorted(buffers)]:
            if name in weights or self._excluded(name):
                continue
            stored = [side.stored(name) for side in (self.base, self.tuned)]
            if stored == [None, None] or stored[1] in seen:
                continue
            if None in stored:
                has, lacks = self.arguments[:: 1 if stored[1] is None else -1]
                raise ValueError(
                    f"{lacks}: it has no tensor {name}, which {has} has: another architecture? "
                    f"exclude_modules can leave {name.rpartition('.')[0]} out"
                )
            self.pairs[name] = (str(stored[0]), str(stored[1]))
            seen.add(str(stored[1]))

    def _match_unknown(self) -> None:
        """Tensors under names that the architecture lacks."""
        known = {name for name, _ in self.base.skeleton.named_buffers()}
        for key in sorted(self.tuned.parameters.unknown - known):
            if self._excluded(key):
                continue
            if key in self.base.parameters.unknown:
                self.pairs[key] = (key, key)
            elif not any(re.search(pattern, key) for pattern in _OLD_BUFFERS):
                raise ValueError(
                    f"{self.arguments[1]}: it has a tensor {key} that the base's architecture "
                    "lacks: another architecture? "
                    f"exclude_modules can leave {key.rpartition('.')[0]} out"
                )

    def _excluded(self, name: str) -> bool:
        return is_chosen(name.rpartition(".")[0], self._exclude)

    def _check_shapes(self, name: str, base_key: str, tuned_key: str) -> None:
        before = self.base.parameters.shapes[base_key]
        after = self.tuned.parameters.shapes[tuned_key]
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
        base, tuned = self.base.parameters, self.tuned.parameters
        return any(base.shapes[one] != tuned.shapes[other] for one, other in self.pairs.values())

    def uncovered(self) -> list[Uncovered]:
        """The tensors that differ, largest relative change first.

        Raises:
            ValueError: if one has NaN or infinite entries.
        """
        changed = []
        for name, (base_key, tuned_key) in self.pairs.items():
            rows = self.base.parameters.shapes[base_key][:1]
            blocks = zip(
                self.base.parameters.blocks(base_key),
                self.tuned.parameters.blocks(tuned_key, *rows),
                strict=True,
            )
            before = change = 0.0
            for (_, old), (_, new) in blocks:
                old, new = old.double(), new.double()
                before = math.hypot(before, self._norm(0, name, old))
                self._norm(1, name, new)
                change = math.hypot(change, frobenius_norm(new - old))
            if change and not self._repeats_its_source(name, tuned_key):
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
        tuned = self.tuned.parameters
        blocks = zip(tuned.blocks(tuned_key), tuned.blocks(self.pairs[source][1]), strict=True)
        return all(torch.equal(one, other) for (_, one), (_, other) in blocks)

    def whole(self, modules: Sequence[str], changed: Sequence[Uncovered]) -> WholeTensors:
        """Tuned parameters of modules, for `modules_to_save`.

        Args:
            modules: names or endings; "changed" stands for all modules in `changed` but the linear
                layers, whose biases stay uncovered.

        Raises:
            ValueError: if a name matches none, or a linear layer.
        """
        parameters = {name.rpartition(".")[0] for name in self.pairs if name in self.base.tied_to}
        chosen = {t.key.rpartition(".")[0] for t in changed} if "changed" in modules else set()
        chosen -= set(self.base.modules)
        for ending in modules:
            found = {module for module in parameters if is_chosen(module, [ending])}
            if ending != "changed" and (not found or found & set(self.base.modules)):
                raise ValueError(
                    f"modules_to_save: {ending} is no module outside the linear layers that the "
                    "two checkpoints share"
                )
            chosen |= found
        roots = {
            self.base.tied_to[name]
            for name in self.pairs
            if name in self.base.tied_to and name.rpartition(".")[0] in chosen
        }
        # All that is tied to one that is chosen: PEFT would leave the others at the base's value.
        keys = {
            name: tuned_key
            for name, (_, tuned_key) in self.pairs.items()
            if self.base.tied_to.get(name) in roots
        }
        rows = {name: self.base.parameters.shapes[self.pairs[name][0]][:1] for name in keys}
        return WholeTensors(self.tuned.parameters, keys, rows)


class WholeTensors(LazyMapping[Tensor]):
    """Read-only, lazy view of a checkpoint's tensors by parameter name, in their own dtype.

    Args:
        keys: name to the parameter that is stored in its place.
        rows: name to (rows,), how many of them count; () of a scalar.
    """

    def __init__(
        self,
        stored: StoredParameters,
        keys: Mapping[str, str],
        rows: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._stored, self._keys, self._rows = stored, dict(keys), dict(rows)
        self.names = self._keys

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored.tensor(self._keys[name])
        return tensor[: self._rows[name][0]] if self._rows[name] else tensor

    def stored_bytes(self) -> int:
        """Size of all of them together."""
        return sum(self._stored.stored_bytes(key) for key in self._keys.values())
