"""Adapters of one model have its layers by the same names, or are told that they do not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .formats.stored import StoredAdapter

# Words before the names of a model's parts. From transformers 4.52 on, models of text and pictures
# have others: this is what PEFT turns an adapter's older names into when it loads them.
_HEADS = {"model", "language_model"}
_NEWER = {
    "language_model.model.": "model.language_model.",
    "model.": "model.language_model.",
    "": "model.",
    "language_model.": "",
}
_REMEDY = (
    "load both into the base with PEFT's load_adapter, which knows older names, and save them again"
)


@dataclass(frozen=True)
class Respelled:
    """A layer as an adapter spells it, and the name that it is given."""

    own: str
    given: str


def of_one_model(
    paths: Sequence[str], adapters: Sequence[StoredAdapter]
) -> tuple[list[StoredAdapter], dict[str, Respelled]]:
    """The adapters with each layer by one name, and by path a layer of each that was respelled.

    Where adapters differ in older and newer names of one part of a model, the newer ones are given.
    Adapters may share no layer if they are of one part, such as its list of blocks, or files for
    other models of one pipeline, such as UNet and text encoder.

    Raises:
        ValueError: if the adapters have no part in common, or spell it in ways of which none is the
            newer one of the other.
    """
    _refuse_strangers(paths, adapters)
    heads = [_heads(adapter.layers) for adapter in adapters]
    conflicts: dict[str, str] = {}
    for part in dict.fromkeys(part for found in heads for part in found):
        spelled = [found[part] for found in heads if part in found]
        if any(one != spelled[0] for one in spelled):
            conflicts[part] = _newest(part, set().union(*spelled), paths, heads)
    same_model, respelled = [], {}
    for path, adapter, found in zip(paths, adapters, heads, strict=True):
        names = _given(path, [*adapter.layers, *adapter.beside], found, conflicts)
        layers = {names[name]: layer for name, layer in adapter.layers.items()}
        beside = {
            names[name]: replace(one, layer=names.get(one.layer or "", one.layer))
            for name, one in adapter.beside.items()
        }
        same_model.append(replace(adapter, layers=layers, beside=beside))
        changed = [Respelled(own, given) for own, given in names.items() if own != given]
        if changed:
            respelled[path] = changed[0]
    return same_model, respelled


def _newest(
    part: str, spelled: set[str], paths: Sequence[str], heads: Sequence[Mapping[str, set[str]]]
) -> str:
    """The head of a part that is newer than the other one."""
    single = all(len(found[part]) == 1 for found in heads if part in found)
    for head in spelled & _NEWER.keys():
        if single and spelled == {head, _NEWER[head]}:
            return _NEWER[head]
    owners = [(f"{min(h[part])}{part}", p) for h, p in zip(heads, paths, strict=True) if part in h]
    (one, path), (two, other) = min(owners), max(owners)
    raise ValueError(
        f"adapters: {path} has {one} and {other} has {two}: are they for the same model? If they "
        f"are, {_REMEDY}"
    )


def _given(
    path: str,
    names: Iterable[str],
    heads: Mapping[str, set[str]],
    conflicts: Mapping[str, str],
) -> dict[str, str]:
    """The names of an adapter's layers in the newer spelling, if the adapter has an older one."""
    newer = {head: conflicts[part] for part in heads.keys() & conflicts for head in heads[part]}
    if all(head == given for head, given in newer.items()):
        return {name: name for name in names}
    found = {}
    for name in names:
        head, rest = _split(name)
        given = conflicts.get(_part(rest), newer.get(head))
        if given is None:
            raise ValueError(
                f"adapters: {path} spells the layers of the others in an older way, and the newer "
                f"name of {name} cannot be told from theirs; {_REMEDY}"
            )
        found[name] = given + rest
    return found


def _split(name: str) -> tuple[str, str]:
    """What is before the name of a part, and the rest."""
    words = name.split(".")
    count = next((i for i, word in enumerate(words[:-1]) if word not in _HEADS), len(words) - 1)
    return "".join(f"{word}." for word in words[:count]), ".".join(words[count:])


def _part(rest: str) -> str:
    """What a list of blocks is called; a layer in no list is a part of its own."""
    numbered = re.match(r"(.+?)[._]\d+(?:[._]|$)", rest)
    return numbered[1] if numbered else rest


def _heads(names: Iterable[str]) -> dict[str, set[str]]:
    """What comes before each part."""
    heads: dict[str, set[str]] = defaultdict(set)
    for head, rest in map(_split, names):
        heads[_part(rest)].add(head)
    return dict(heads)


def _refuse_strangers(paths: Sequence[str], adapters: Sequence[StoredAdapter]) -> None:
    """Raise ValueError unless every adapter meets the others."""
    known, waiting = list(adapters[0].layers), dict(enumerate(adapters))
    while waiting:
        index = next((i for i, a in waiting.items() if _meet(a, known)), None)
        if index is None:
            other = next(iter(waiting))
            one, two = (next(iter(adapters[i].layers)) for i in (0, other))
            remedy = "merge them where both are loaded, by PEFT's add_weighted_adapter"
            if adapters[0].style is not None:
                remedy = "resize each alone: programs load several files side by side"
            raise ValueError(
                f"adapters: {paths[0]} and {paths[other]} share no layer, nor any part of a model "
                f"({one}; {two}): are they for the same model? If they are, {remedy}"
            )
        known += waiting.pop(index).layers


def _meet(adapter: StoredAdapter, names: Sequence[str]) -> bool:
    """Whether an adapter has a part of the others, or is a file for another model of a pipeline."""
    if _heads(adapter.layers).keys() & _heads(names).keys():
        return True
    apart = not {*map(_component, adapter.layers)} & {*map(_component, names)}
    return adapter.style is not None and apart


def _component(name: str) -> str:
    """The model within a pipeline: `unet`, `text_encoder`, in kohya's files `lora_unet`."""
    first, dot, _ = name.partition(".")
    return first if dot else "_".join(first.split("_")[:2])
