"""The weights of a checkpoint's linear layers, by module name, read one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..files import FLOAT_DTYPES, LazyMapping, WrongKind
from .architecture import LinearModule, is_chosen, linear_modules
from .names import is_within, natural_order
from .recognition import Position, sampled_positions
from .stored_parameters import StoredParameters


class LinearWeights(LazyMapping[Tensor]):
    """Read-only, lazy view of the linear layers: module name to weight, float32 (out, in).

    The layers are those of the architecture, so that Conv1D weights are turned to (out, in) and
    names agree with the loaded model, whatever the checkpoint calls them.

    Args:
        parameters: the model's parameters.
        target_modules, exclude_modules: as in LoraConfig.
        whole_modules: full names of modules, with all that they contain, that are no layers.
        longer_modules: layers, by their names or endings, that may have more rows than the
            architecture says, as an output head does after its vocabulary grew; rows beyond are
            not read.

    Raises:
        ValueError: if a layer is missing or has another shape than the architecture's; on reading
            one with NaN or infinite entries.
        TypeError: if a layer is quantised.
    """

    def __init__(
        self,
        parameters: StoredParameters,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: str | Collection[str] = (),
        whole_modules: Collection[str] = (),
        longer_modules: str | Sequence[str] = (),
    ) -> None:
        self.parameters, self.checkpoint = parameters, parameters.checkpoint
        if not isinstance(exclude_modules, str):
            exclude_modules = frozenset(exclude_modules)
        self.names = self.modules = {
            name: module
            for name, module in linear_modules(parameters.model, target_modules).items()
            if not is_chosen(name, exclude_modules, "exclude_modules")
            and not is_within(name, whole_modules)
        }
        if not self.modules:
            raise ValueError(f"exclude_modules={exclude_modules!r} leaves no linear layer")
        self.stored_as = {name: self._stored_weight(name) for name in self.modules}
        for module in self.modules.values():
            self._check(
                module, may_be_longer=is_chosen(module.name, longer_modules, "slice_modules")
            )

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError unless the model has all layers of deltas of these (out, in) shapes."""
        for name, shape in shapes.items():
            module = self.modules.get(name)
            if module is None or (module.out_features, module.in_features) != shape:
                raise ValueError(
                    f"{self.checkpoint.argument}: {self.checkpoint.folder} has no linear layer "
                    f"{name} of shape {shape} (out, in): not the base model of these deltas?"
                )

    def _stored_weight(self, name: str) -> str:
        stored = self.parameters.stored(f"{name}.weight")
        if stored is not None:
            return stored
        argument = self.checkpoint.argument
        for packed in ("qweight", "weight_packed"):
            if f"{name}.{packed}" in self.parameters.unknown:
                raise WrongKind(
                    f"{argument}: the weight of layer {name} is stored as {packed}: quantised "
                    "checkpoints have no delta; dequantise the model first"
                )
        unknown = sorted(self.parameters.unknown, key=natural_order)
        beside = f"; it holds {unknown[0]}, which the model does not have" if unknown else ""
        raise ValueError(
            f"{argument}: {self.checkpoint.folder} has no weight for layer {name} of "
            f"{type(self.parameters.model).__name__}{beside}: another architecture?"
        )

    def _check(self, module: LinearModule, *, may_be_longer: bool) -> None:
        argument, weight = self.checkpoint.argument, self.stored_as[module.name]
        dtype = self.parameters.dtype(weight)
        if dtype not in FLOAT_DTYPES:
            raise WrongKind(
                f"{argument}: the weight of layer {module.name} is stored as {dtype}: quantised "
                "checkpoints have no delta; dequantise the model first"
            )
        shape = self.parameters.shapes[weight]
        expected = (module.out_features, module.in_features)
        oriented = shape[::-1] if module.transposed else shape
        longer = oriented[1:] == expected[1:] and oriented[0] > expected[0]
        if oriented != expected and not (longer and may_be_longer and not module.transposed):
            raise ValueError(
                f"{argument}: the weight of layer {module.name} has shape {shape}, but (out, in) = "
                f"{expected} was expected: another architecture? Of a longer vocabulary, "
                "slice_modules compares the rows that both have"
            )

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The stored weight in blocks of rows of float32, those of Conv1D being its inputs."""
        module = self.modules[name]
        rows = module.in_features if module.transposed else module.out_features
        for start, block in self.parameters.blocks(self.stored_as[name], rows):
            wide = block.float()
            # The norm is cheaper to look at than every entry; it may overflow without a defect.
            if not (torch.linalg.vector_norm(wide).isfinite() or torch.isfinite(wide).all()):
                raise ValueError(
                    f"{self.checkpoint.argument}: the weight of layer {name} has NaN or infinite "
                    "entries"
                )
            yield start, wide

    def stored_shape(self, name: str) -> tuple[int, int]:
        """(out, in), or (in, out) of a Conv1D."""
        module = self.modules[name]
        if module.transposed:
            return module.in_features, module.out_features
        return module.out_features, module.in_features

    def oriented(self, name: str, stored: Tensor) -> Float[Tensor, "out in"]:
        """What is stored in the checkpoint's orientation, as (out, in)."""
        return stored.mT if self.modules[name].transposed else stored

    def __getitem__(self, name: str) -> Tensor:
        weight = torch.empty(self.stored_shape(name))
        for start, block in self.blocks(name):
            weight[start : start + len(block)] = block
        return self.oriented(name, weight)

    def entries(self, name: str, positions: Sequence[Position]) -> Float[Tensor, " n"]:
        """Entries of the (out, in) weight in its stored dtype, without reading the rest."""
        if self.modules[name].transposed:
            positions = [(col, row) for row, col in positions]
        return self.parameters.entries(self.stored_as[name], positions)

    def sample(self, name: str) -> Float[Tensor, " n"]:
        """The entries by which the weight is recognised, see `recognition_sample`."""
        module = self.modules[name]
        return self.entries(name, sampled_positions((module.out_features, module.in_features)))
