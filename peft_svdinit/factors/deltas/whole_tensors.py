"""Tuned parameters that an adapter stores as they are, for PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Size, Tensor

from ...files import LazyMapping
from ...models import StoredParameters, is_chosen, is_within


class WholeTensors(LazyMapping[Tensor]):
    """Read-only, lazy view of a checkpoint's tensors by parameter name, in their own dtype.

    Args:
        parameters: the checkpoint's.
        keys: name to the parameter that is stored in its place.
        sliced: names of which as many rows are read as the model has, whose vocabulary is shorter.

    Raises:
        ValueError: if another one has not the model's shape.
    """

    def __init__(
        self, parameters: StoredParameters, keys: Mapping[str, str], sliced: Collection[str] = ()
    ) -> None:
        self._parameters, self._keys, self._sliced = parameters, dict(keys), set(sliced)
        self.names = self._keys
        for name, key in self._keys.items():
            found, expected = parameters.shapes[key], tuple(self._shape(name))
            longer = found[1:] == expected[1:] and found[:1] > expected[:1]
            if found != expected and not (longer and name in self._sliced):
                raise ValueError(
                    f"{parameters.argument}: {name} has shape {found}, but the model of its "
                    f"config.json and the base's has {expected}: another number of labels, or "
                    "another vocabulary?"
                )

    def _shape(self, name: str) -> Size:
        return self._parameters.model.get_parameter(name).shape

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._parameters.tensor(self._keys[name])
        return tensor[: self._shape(name)[0]] if name in self._sliced else tensor

    def stored_bytes(self) -> int:
        """Size of all of them together."""
        return sum(map(self._parameters.stored_bytes, self._keys.values()))


def whole_tensors(
    parameters: StoredParameters,
    modules: Sequence[str],
    *,
    layers: Collection[str],
    heads: Collection[str] = (),
    changed: Collection[str] = (),
    slice_modules: str | Sequence[str] = (),
) -> WholeTensors:
    """The parameters of modules, and those that are tied to them.

    Args:
        parameters: the tuned model's.
        modules: names or endings.
        layers: names of the linear layers, which have factors.
        heads: full names of further modules, with all that they contain.
        changed: parameters whose modules are taken too, if PEFT can store these.
        slice_modules: modules of which only the rows that the model has are read.

    Raises:
        ValueError: if a name matches none, or a linear layer, or a tensor has another shape than
            the model's.
    """
    stored = parameters.stored_once()
    found = {name.rpartition(".")[0] for name in stored}
    chosen = {module for module in found if is_within(module, heads)}
    chosen |= {
        module
        for module in {name.rpartition(".")[0] for name in changed} - set(layers)
        if module in found and _is_storable(parameters, module)
    }
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
    sliced = {
        tied_to[name] for name in tied_to if is_chosen(name.rpartition(".")[0], slice_modules)
    }
    return WholeTensors(parameters, keys, [name for name in keys if tied_to[name] in sliced])


def _is_storable(parameters: StoredParameters, module: str) -> bool:
    """Whether a module is nothing but its own parameters, which can be given to PEFT."""
    held = parameters.model.get_submodule(module)
    own = {name for name, _ in held.named_parameters(recurse=False)}
    return bool(module) and set(held.state_dict()) <= own
