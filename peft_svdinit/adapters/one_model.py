"""Adapters of one model have its layers by the same names, or are told that they do not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .formats.stored import StoredAdapter

# A model alone, with a head, or as the text model of a larger one: the order depends on the version
# of transformers.
_HEADS = {"base_model", "model", "language_model"}
_THROUGH_PEFT = (
    "load both into the base with PEFT's load_adapter, which knows its older names, and save them "
    "again"
)

Heads = Mapping[str, set[str]]  # By the part of the model, see `_heads`.


@dataclass(frozen=True)
class Respelled:
    """A layer as an adapter spells it, and the name that it is given."""

    own: str
    given: str


def of_one_model(
    paths: Sequence[str], adapters: Sequence[StoredAdapter]
) -> tuple[list[StoredAdapter], dict[str, Respelled]]:
    """The adapters with each layer by one name, that of the first, and a layer of those respelled.

    Names that differ in leading `model` and `language_model` alone are of one layer, as long as
    every name of an adapter can be told in the spelling of the others. Adapters may share no layer
    if they are of one part of a model, such as its list of blocks, or if they are files for other
    models of one pipeline, such as UNet and text encoder.

    Raises:
        ValueError: if an adapter shares neither with the others, or its spelling is ambiguous.
    """
    agreed: dict[int, StoredAdapter] = {0: adapters[0]}
    respelled: dict[str, Respelled] = {}
    waiting = dict(list(enumerate(adapters))[1:])
    while waiting:
        names = [name for adapter in agreed.values() for name in adapter.layers]
        index = next((i for i, a in waiting.items() if _meet(a, adapters[0], names)), None)
        if index is None:
            raise ValueError(_nothing_shared(paths, adapters, next(iter(waiting))))
        adapter = waiting.pop(index)
        new_names = _in_the_spelling_of(names, adapter.layers, paths[index])
        layers = {new_names[name]: layer for name, layer in adapter.layers.items()}
        agreed[index] = replace(adapter, layers=layers)
        for own, given in new_names.items():
            if own != given:
                respelled.setdefault(paths[index], Respelled(own, given))
    return [agreed[index] for index in range(len(adapters))], respelled


def _meet(adapter: StoredAdapter, first: StoredAdapter, names: Sequence[str]) -> bool:
    parts, others = _heads(adapter.layers).keys(), _heads(names).keys()
    apart = not {*map(_component, adapter.layers)} & {*map(_component, names)}
    return bool(parts & others) or (first.style is not None and apart)


def _in_the_spelling_of(names: Iterable[str], own: Iterable[str], path: str) -> dict[str, str]:
    """Each of `own` as `names` spell it."""
    wanted, found = _heads(names), _heads(own)
    images: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for part in wanted.keys() & found.keys():
        for head in found[part]:
            images[head].add((head,) if found[part] == wanted[part] else tuple(wanted[part]))
    same = all(image == {(head,)} for head, image in images.items())
    new_names = {}
    for name in own:
        head, rest = _split(name)
        image = {(head,)} if same else images.get(head, set())
        if len(image) != 1 or len(*image) != 1:
            raise ValueError(
                f"adapters: {path} spells the layers of the others in another way, and that of "
                f"{name} among theirs cannot be told; {_THROUGH_PEFT}"
            )
        new_names[name] = next(iter(image))[0] + rest
    if len({*new_names.values()}) < len(new_names):
        raise ValueError(
            f"adapters: {path} has layers that are one in the spelling of the others, "
            f"{min(new_names)} among them; {_THROUGH_PEFT}"
        )
    return new_names


def _split(name: str) -> tuple[str, str]:
    """Leading words that depend on how the model is wrapped into others, and what follows."""
    words = name.split(".")
    count = next((i for i, word in enumerate(words[:-1]) if word not in _HEADS), len(words) - 1)
    return "".join(f"{word}." for word in words[:count]), ".".join(words[count:])


def _heads(names: Iterable[str]) -> Heads:
    """Leading words by the part of the model: what comes before a first number, or the layer."""
    heads: dict[str, set[str]] = defaultdict(set)
    for name in names:
        head, rest = _split(name)
        numbered = re.match(r"(.+?)[._]\d+(?:[._]|$)", rest)
        heads[numbered[1] if numbered else rest].add(head)
    return heads


def _component(name: str) -> str:
    """The model within a pipeline: `unet`, `text_encoder`, in kohya's files `lora_unet`."""
    first, dot, _ = name.partition(".")
    return first if dot else "_".join(first.split("_")[:2])


def _nothing_shared(paths: Sequence[str], adapters: Sequence[StoredAdapter], other: int) -> str:
    one, two = (next(iter(adapters[index].layers)) for index in (0, other))
    remedy = f"If they are, {_THROUGH_PEFT}, or merge them there by add_weighted_adapter"
    if adapters[0].style is not None:
        remedy = "If they are, resize each alone: programs load several files side by side"
    return (
        f"adapters: {paths[0]} and {paths[other]} share no layer, nor any part of a model ({one}; "
        f"{two}): are they for the same model? {remedy}"
    )
