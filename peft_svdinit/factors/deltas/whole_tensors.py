"""Tuned parameters that an adapter stores as they are, for PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ...files import LazyMapping
from ...models import StoredParameters, is_chosen, is_within


class WholeTensors(LazyMapping[Tensor]):
    """Read-only, lazy view of a checkpoint's tensors by parameter name, in their own dtype.

    Args:
        parameters: the checkpoint's.
        keys: name to the parameter that is stored in its place. Of each, as many rows are read as
            the model has, which are fewer where its vocabulary is shorter.
    """

    def __init__(self, parameters: StoredParameters, keys: Mapping[str, str]) -> None:
        self._parameters, self._keys = parameters, dict(keys)
        self.names = self._keys

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters.tensor(self._keys[name])
        rows = self._parameters.model.get_parameter(name).shape[:1]
        return tensor[: rows[0]] if rows else tensor

    def stored_bytes(self) -> int:
        """Size of all of them together."""
        return sum(map(self._parameters.stored_bytes, self._keys.values()))


def whole_tensors(
    parameters: StoredParameters,
    modules: Sequence[str],
    *,
    layers: Collection[str],
    full_names: Collection[str] = (),
) -> WholeTensors:
    """The parameters of modules, and those that are tied to them.

    Args:
        parameters: the tuned model's.
        modules: names or endings.
        layers: names of the linear layers, which have factors.
        full_names: further modules, with all that they contain.

    Raises:
        ValueError: if a name matches none, or a linear layer.
    """
    stored = parameters.stored_once()
    found = {name.rpartition(".")[0] for name in stored}
    chosen = {module for module in found if is_within(module, full_names)}
    for ending in modules:
        meant = {module for module in found if is_chosen(module, [ending])}
        if not meant or meant & set(layers):
            raise ValueError(
                f"modules_to_save: {ending} is no module of the tuned model outside the linear "
                "layers that are compared"
            )
        chosen |= meant
    # All that is tied to one that is chosen: PEFT would leave the others at the base's value.
    tied_to = parameters.tied_to
    roots = {tied_to[name] for name in stored if name.rpartition(".")[0] in chosen}
    keys = {name: key for name, key in stored.items() if tied_to[name] in roots}
    return WholeTensors(parameters, keys)
